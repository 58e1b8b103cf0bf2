"""Restart against its algorithm written out, and in what it keeps: the calls, the noise level, the law."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import SCHEDULES
from test_solvers import mixture, noise

import fewstep as fs
from fewstep.errors import GridError
from fewstep.kdiffusion import kdiffusion_sampler
from fewstep.noise import BrownianPath
from fewstep.solvers import DDIM, PNDM, DPMSolverPP, DPMSolverPPSinglestep, EDMHeun, Restart

SEEDS = range(16)
INTERVAL = (0.1, 2.0, 3, 2)


def nearest(levels, level):
    return int(np.argmin(np.abs(np.log(levels) - math.log(level))))


def written_out(denoiser, x, levels, xi, s_noise=1.0):
    """Algorithm of the paper on EDM's schedule, with Heun's method; xi are the noises of the jumps."""

    def heun(x, here, there):
        slope = (x - denoiser(x, here)) / here
        end = x + (there - here) * slope
        return x + (there - here) * 0.5 * (slope + (end - denoiser(end, there)) / there) if there else end

    low, high, steps, times = INTERVAL
    lower, upper = nearest(levels[:-1], low), nearest(levels[:-1], high)
    t_low, t_high = levels[lower], levels[upper]
    path = (t_high ** (1 / 7) + np.linspace(0, 1, steps + 1) * (t_low ** (1 / 7) - t_high ** (1 / 7))) ** 7
    for i, (here, there) in enumerate(pairwise(levels)):
        x = heun(x, here, there)
        if i + 1 == lower:
            for k in range(times):
                x = x + s_noise * math.sqrt(t_high**2 - t_low**2) * xi[k]
                for a, b in pairwise(path.tolist()):
                    x = heun(x, a, b)
    return x


def draws(plan):
    path = BrownianPath(SEEDS, (2,))
    return [torch.from_numpy(path.normalised(r.noise.begin, r.noise.end)) for r in plan.rows if r.noise is not None]


@pytest.mark.parametrize("s_noise", [1.0, 1.003])
def test_written_out(s_noise):
    schedule = fs.schedules.EDM()
    plan, x = Restart(EDMHeun(), [INTERVAL], s_noise).plan(schedule, 29, "karras", final="zero"), noise(schedule)
    assert plan.nfe == 29
    outer = fs.grids.make_grid("karras", schedule, 17, final="zero")[
        [*range(0, 17, 2), 17]
    ]  # 8 steps of Heun, 1 of Euler, 12 calls
    xi = draws(plan)
    assert len(xi) == 2
    wanted = written_out(mixture(schedule), x, outer.tolist(), xi, s_noise)
    torch.testing.assert_close(fs.sample(mixture(schedule), x, plan, seeds=SEEDS), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP(order=3), DPMSolverPPSinglestep(order=2)])
def test_constant_data_keep_their_noise_level(name, solver):
    """On every schedule: the variance of what is drawn and kept is sigma^2 at the end of the jumps, and of the run."""
    schedule = SCHEDULES[name]
    plan = Restart(solver, [INTERVAL, (0.6, 1.5, 2, 1)]).plan(schedule, 60, "lambda")
    assert plan.nfe == 60
    dense, sigma = plan.dense(), schedule.sigma(plan.grid)
    variance = (dense.A * sigma[0]) ** 2 + (dense.C**2).sum(1)
    jumps = [i + 1 for i, row in enumerate(plan.rows) if row.noise is not None]
    assert len(jumps) == 3
    np.testing.assert_allclose(variance[[*jumps, -1]], sigma[[*jumps, -1]] ** 2, rtol=1e-8)


def test_a_method_with_a_start_starts_again_after_every_jump():
    plan = Restart(PNDM(), [INTERVAL]).plan(fs.schedules.EDM(), 25, "lambda")
    jumps = [i for i, row in enumerate(plan.rows) if row.noise is not None]
    assert plan.nfe == 25
    assert [plan.rows[i + 1].carry[0] != 0.0 and len(plan.rows[i + 2].weights) == 2 for i in jumps] == [True, True]


def test_a_gaussian_keeps_its_law():
    """20,000 samples, within 4 standard errors and 1 % for the steps."""
    schedule, count = fs.schedules.VPLinear(t_end=0.01), 20_000
    exact = fs.exact.Gaussian(schedule, torch.tensor([0.7]), torch.tensor([1.5]))
    x = fs.draw_noise((1,), range(count), dtype=torch.float64)
    plan = Restart(EDMHeun(), [(0.2, 3.0, 8, 3)]).plan(schedule, 100, "lambda")
    run = fs.sample(exact, x, plan, seeds=range(count))
    alpha, sigma = float(schedule.alpha(0.01)), float(schedule.sigma(0.01))
    variance = 1.5 * alpha**2 + sigma**2
    assert abs(float(run.mean()) - 0.7 * alpha) < 4 * math.sqrt(variance / count) + 0.01
    assert float(run.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / count) + 0.01)


def test_jumps_are_independent():
    plan = Restart(DDIM(), [(0.1, 2.0, 3, 3)]).plan(fs.schedules.EDM(), 40, "karras")
    xi = torch.stack([d.flatten() for d in draws(plan)])
    assert float(torch.corrcoef(xi).fill_diagonal_(0.0).abs().max()) < 4 / math.sqrt(xi.shape[1])
    assert float((xi[0] - xi[1]).abs().max()) > 1.0


def test_a_host_counts_its_own_steps():
    schedule, seen, asked = fs.schedules.EDM(), [], []
    grid = fs.grids.make_grid("karras", schedule, 10, final="zero")
    calls = []

    def model(x, sigma):
        calls.append(float(sigma[0]))
        return mixture(schedule)(x, float(sigma[0]))

    def sampler(sigma, sigma_next):
        asked.append((float(sigma), float(sigma_next)))
        return torch.zeros(16, 2, dtype=torch.float64)

    run = kdiffusion_sampler(Restart(EDMHeun(), [INTERVAL]))
    run(
        model,
        noise(schedule),
        torch.from_numpy(grid),
        callback=lambda found: seen.append(found["i"]),
        noise_sampler=sampler,
        disable=True,
    )
    assert seen == list(range(10))
    assert len(calls) == 19 + 12
    low, high = (float(grid[nearest(grid[:-1], level)]) for level in INTERVAL[:2])
    assert asked == [(pytest.approx(low), pytest.approx(high))] * 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Restart(DDIM(), [(2.0, 0.1, 3, 1)]), ValueError, "0 < low < high, got 2 and 0.1"),
        (lambda: Restart(DDIM(), [(0.1, 2.0, 0, 1)]), ValueError, "at least 1, got 0 and 1"),
        (lambda: Restart(DDIM(), [(0.1, 2.0, 3, 1.0)]), ValueError, "whole numbers"),
        (lambda: Restart(DDIM(), [], 0.0), ValueError, "positive, got 0"),
        (lambda: Restart(DDIM(), [INTERVAL]).plan(fs.schedules.EDM(), 6), GridError, "alone take 6 calls, but nfe=6"),
        (lambda: Restart(DDIM(), [(1.0, 1.1, 3, 1)]).plan(fs.schedules.EDM(), 9), GridError, "no two levels near 1 and 1.1"),
        (lambda: Restart(DDIM(), [INTERVAL] * 2).plan(fs.schedules.EDM(), 50), GridError, "another one ends there"),
        (lambda: Restart(DDIM(eta=1.0), [INTERVAL]).plan(fs.schedules.EDM(), 50), ValueError, "draws noise"),
        (lambda: Restart(DDIM(), [INTERVAL]).inverse_plan(fs.schedules.EDM(), 50), ValueError, "no way back"),
    ],
)
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
