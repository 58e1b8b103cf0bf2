from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.errors import PlanError
from fewstep.noise import BrownianPath, check_seeds, draw_noise, normals


def test_noise_depends_on_the_seed_alone():
    whole = draw_noise((3, 4), range(10))
    assert torch.equal(draw_noise((3, 4), [7, 2]), whole[[7, 2]])
    assert draw_noise((3, 4), range(10), dtype=torch.float64).to(torch.float32).equal(whole)
    assert not torch.equal(whole[0], whole[1])


def test_noise_has_the_scale_of_the_plans_start():
    plan = fs.solvers.DDIM().plan(fs.schedules.EDM(), nfe=3, grid="karras")
    x = draw_noise((50, 50), range(4), plan, dtype=torch.float64)
    assert float(x.std()) == pytest.approx(80.0, rel=5 / np.sqrt(2 * x.numel()))  # 5 standard errors
    assert abs(float(x.mean())) < 5 * 80 / np.sqrt(x.numel())


def test_increments_add_up_over_any_cut():
    rng, path = np.random.default_rng(0), BrownianPath([1, 2], (3,))
    for begin, end in [(0.0, 1.0), (1e-9, 3e4), (1.0, 1.001), (0.3, 0.31), (0.0, 2.0**-60), (5.0, 5e6)]:
        cuts = np.sort(rng.uniform(begin, end, 5))
        nodes = [begin, *cuts.tolist(), end]
        parts = sum(BrownianPath([1, 2], (3,)).increment(a, b) for a, b in pairwise(nodes))
        np.testing.assert_allclose(path.increment(begin, end), parts, rtol=1e-9, atol=1e-9 * np.sqrt(end))


@pytest.mark.parametrize(("begin", "end"), [(0.4, 0.9), (1.1, 1.2), (0.0, 1e-20), (3.0, 700.0), (2.0, 4.0), (1.0, 1.0 + 1e-3)])
def test_increments_are_standard_normal_and_independent(begin, end):
    path = BrownianPath(range(200), (50,))
    middle = begin + 0.37 * (end - begin)
    first, second = path.normalised(begin, middle), path.normalised(middle, end)
    count = first.size
    for draw in (first, second):
        assert abs(draw.mean()) < 5 / np.sqrt(count)
        assert abs(draw.var() - 1) < 5 * np.sqrt(2 / count)
    assert abs((first * second).mean()) < 5 / np.sqrt(count)  # 5 standard errors


def test_normals_are_normal():
    """A million numbers: five moments within 5 standard errors, no correlation between elements, seeds or keys; 12 sigmas of tails."""
    x = normals(range(1000), (1, 2), (1000,))
    n = x.size
    for power, moment, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]:
        assert abs((x**power).mean() - moment) < 5 * np.sqrt(spread / n), power
    for other in (
        x[:, ::-1],
        x[::-1],
        np.roll(x, 1, 0),
        np.roll(x, 1, 1),
        normals(range(1000), (1, 3), (1000,)),
        normals(range(1, 1001), (1, 2), (1000,))[::-1],
    ):
        assert abs((x * other)[:, :499].mean()) < 5 / np.sqrt(1000 * 499)
    assert 4.0 < np.abs(x).max() < 6.7
    counts = np.histogram(x, [-np.inf, -2, -1, -0.5, 0, 0.5, 1, 2, np.inf])[0] / n
    shares = [0.02275013, 0.13590512, 0.14988228, 0.19146246]  # of the normal distribution
    np.testing.assert_allclose(counts, shares + shares[::-1], atol=5 * np.sqrt(0.25 / n))


def test_refused():
    with pytest.raises(PlanError, match="0 <= begin < end"):
        BrownianPath([0], (1,)).increment(1.0, 1.0)
    with pytest.raises(ValueError, match="2 seeds for 3 samples"):
        check_seeds([1, 2], 3)
    with pytest.raises(ValueError, match="at least 0"):
        check_seeds([-1])
    with pytest.raises(TypeError, match="whole numbers"):
        check_seeds([0.5])
    assert check_seeds(torch.tensor([3, 4])) == [3, 4]
