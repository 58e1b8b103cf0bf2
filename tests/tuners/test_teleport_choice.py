"""The choice of a teleportation: all the way for Gaussian data, to about sigma = 10 for digits, and as a method of tuning."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.solvers import DDIM, DPMSolverPP, GaussianPrior, Teleport
from fewstep.tuners import Effort, teleport_skip

EDM = fs.schedules.EDM()


def gaussian(schedule, seed=0, size=5):
    """An exact denoiser of Gaussian data, and the same as a prior."""
    random = np.random.default_rng(seed)
    root, mean = random.normal(size=(size, size)), random.normal(size=size)
    values, axes = np.linalg.eigh(root @ root.T)
    return fs.exact.Gaussian(schedule, mean, root @ root.T), GaussianPrior(mean, axes.T, values)


@pytest.fixture(scope="module")
def digits():
    """The exact denoiser of 1,500 digits, each widened by 0.15, on EDM's schedule from 80, and their Gaussian."""
    from sklearn.datasets import load_digits

    points = torch.from_numpy(load_digits().images).reshape(-1, 1, 8, 8)[:1500] / 8.0 - 1.0
    fitted = GaussianPrior.fit(points)
    prior = GaussianPrior(fitted.mean, fitted.axes, fitted.variances + 0.15**2, 0.15**2)
    return fs.exact.FiniteData(EDM, points, bandwidth=0.15), prior, 80.0 * fs.draw_noise((1, 8, 8), range(48), dtype=torch.float64)


@pytest.mark.parametrize("schedule", [EDM, fs.schedules.VPLinear(), fs.schedules.Flow()], ids=lambda s: type(s).__name__)
def test_gaussian_data_allow_every_skip_exactly(schedule):
    denoiser, prior = gaussian(schedule)
    noise = float(schedule.sigma(schedule.t_start)) * fs.draw_noise((5,), range(16), dtype=torch.float64)
    skip = teleport_skip(denoiser, prior, noise)
    assert skip.to == skip.times[-1]
    assert skip.deviations.max() < 1e-9  # of the noise prediction; both are near x / sigma, which cancels
    exact = denoiser.solution(noise, schedule.t_start, schedule.t_end)
    for to in skip.times[[0, len(skip.times) // 2, -2]]:
        plan = Teleport(DDIM(), prior, float(to)).plan(schedule, grid=[float(to), schedule.t_end])
        moved = fs.sample(denoiser, noise, plan, trajectory=True).states[0]
        torch.testing.assert_close(moved, denoiser.solution(noise, schedule.t_start, float(to)), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(denoiser.solution(moved, float(to), schedule.t_end), exact, rtol=1e-10, atol=1e-10)


def test_directions_that_were_not_kept_count_with_their_mean_variance():
    denoiser = fs.exact.Gaussian(EDM, [1.0, 2.0, 3.0], np.diag([4.0, 0.5, 0.5]))
    prior = GaussianPrior(np.array([1.0, 2.0, 3.0]), np.eye(3)[:1], np.array([4.0]), 0.5)
    assert teleport_skip(denoiser, prior, 80.0 * fs.draw_noise((3,), range(8), dtype=torch.float64)).deviations.max() < 1e-9


def test_the_choice_for_digits_moves_the_end_by_less_than_a_thousandth(digits):
    denoiser, prior, noise = digits
    skip = teleport_skip(denoiser, prior, noise)
    assert skip.to is not None
    assert 5.0 < skip.to < 20.0
    fine = DPMSolverPP(order=3)
    wanted = fs.sample(denoiser, noise, fine.plan(EDM, 200, "lambda"))
    moves = {}
    for to in (10.0, skip.to, 3.0):
        moved = fs.sample(denoiser, noise, Teleport(fine, prior, to).plan(EDM, 200, "lambda"))
        moves[to] = float((moved - wanted).norm() / wanted.norm())
    assert moves[10.0] < 1e-3
    assert moves[skip.to] < 1e-3
    assert moves[3.0] > 1e-2  # what the deviations warn of
    assert skip.within(1e-1) < skip.to < skip.within(1e-4)


def test_a_farther_skip_needs_a_larger_tolerance(digits):
    denoiser, prior, noise = digits
    skip = teleport_skip(denoiser, prior, noise[:16], times=[40.0, 20.0, 10.0, 5.0])
    assert (np.diff(skip.deviations) > 0).all()
    assert skip.within(0.5 * skip.deviations[0]) is None
    assert [skip.within(float(d)) for d in skip.deviations] == [40.0, 20.0, 10.0, 5.0]


def test_tune_by_teleportation(digits):
    """At 5 calls from 80 the best skip leaves 0.77 of the best untuned error, on other noise; 0.85 leaves room for rounding elsewhere."""
    denoiser, _, noise = digits
    effort = Effort(trajectories=128, held_out=64, pool=1, reference_calls=64)
    tuned = fs.tune(denoiser, nfe=5, noise=noise, method="teleport", effort=effort)
    told = tuned.report["plans"]["5"]
    tried = [candidate for candidate in tuned.candidates[5] if candidate.tuned]
    assert {candidate.plan.provenance["solver"]["name"] for candidate in tried} == {"Teleport"}
    assert told["best"].startswith("teleport: to ")
    assert tuned.plan.noise_time == 80.0 > tuned.plan.grid[0]
    assert told["ratio"] < 0.85


def test_what_cannot_be_looked_at_is_refused():
    denoiser, prior = gaussian(EDM)
    noise = 80.0 * fs.draw_noise((5,), range(4))
    with pytest.raises(ValueError, match="tolerance must be positive"):
        teleport_skip(denoiser, prior, noise, tolerance=0.0)
    with pytest.raises(ValueError, match=r"shape \(4,\), the Gaussian of \(5,\)"):
        teleport_skip(denoiser, prior, noise[:, :4])
    for times in ([10.0, 20.0], [80.0, 10.0], []):
        with pytest.raises(ValueError, match="must decrease in noise"):
            teleport_skip(denoiser, prior, noise, times=times)
