from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.solvers import TimeShift

SCHEDULE = fs.schedules.VPLinear()
SIZE = 4096


def state(t, variance=0.25, count=3, seed=0):
    """Forward-noised states at time t of data whose elements are independent with this variance."""
    g = torch.Generator().manual_seed(seed)
    data, eps = (torch.randn(count, SIZE, generator=g, dtype=torch.float64) for _ in range(2))
    return float(SCHEDULE.alpha(t)) * variance**0.5 * data + float(SCHEDULE.sigma(t)) * eps


def test_the_corrected_criterion_finds_the_time_of_the_state():
    # the variance over 4096 elements has a relative standard error of 2.2 %; 4 of them, over the slope of the marginal's variance
    for t_true in (0.35, 0.4, 0.45):
        found = TimeShift(SCHEDULE, window=0.4, data_variance=0.25)(3, 0.4, state(t_true))
        total = [float(SCHEDULE.alpha(t) ** 2 * 0.25 + SCHEDULE.sigma(t) ** 2) for t in (t_true - 0.01, t_true, t_true + 0.01)]
        allowed = 4 * 0.022 * total[1] / ((total[2] - total[0]) / 0.02) + 0.4 / 128
        assert np.abs(found - t_true).max() < allowed


def test_the_papers_criterion_is_pushed_towards_noise_by_the_variance_of_the_data():
    x = state(0.3)
    plain, corrected = (TimeShift(SCHEDULE, 0.1, data_variance=v)(2, 0.3, x) for v in (None, 0.25))
    assert plain.mean() > 0.34  # near the noisy edge
    assert (np.abs(corrected - 0.3) < 0.04).all()
    unit = TimeShift(SCHEDULE, 0.1)(2, 0.3, state(0.3, variance=1.0))
    assert (unit == 0.35).all()


def test_the_minimum_is_that_of_a_search_over_the_window():
    """The definition, on the grid of candidates, one sample and one time after another."""
    x, t, window = state(0.5, seed=4), 0.5, 0.06
    found = TimeShift(SCHEDULE, window)(1, t, x)
    taus = np.linspace(t - window / 2, t + window / 2, 129)
    for sample, shifted in zip(x, found, strict=True):
        distance = [abs(float(sample.var()) - float(SCHEDULE.sigma(tau)) ** 2) for tau in taus]
        assert shifted == pytest.approx(taus[int(np.argmin(distance))], abs=1e-12)


def test_what_switches_it_off():
    x = state(0.5)
    assert TimeShift(SCHEDULE, 0.0)(2, 0.5, x) == 0.5
    assert TimeShift(SCHEDULE, 0.1)(0, 0.5, x) == 0.5
    assert TimeShift(SCHEDULE, 0.1, cutoff=0.5)(2, 0.5, x) == 0.5
    assert isinstance(TimeShift(SCHEDULE, 0.1, cutoff=0.49)(2, 0.5, x), np.ndarray)
    assert TimeShift(SCHEDULE, 0.1, data_variance=1.0)(2, 0.5, x) == 0.5  # the variance is 1 at all times: no information


def test_it_stays_within_the_schedule():
    x = state(0.99) * 3.0
    assert TimeShift(SCHEDULE, 0.5)(1, 0.99, x).max() <= 1.0
    assert TimeShift(SCHEDULE, 0.5)(1, 0.01, 0.0 * x).min() >= SCHEDULE.t_end


def test_as_a_hook_it_is_batch_invariant_and_zero_width_changes_nothing():
    exact = fs.exact.Gaussian(SCHEDULE, torch.zeros(100), 0.2)
    plan = fs.make_plan("dpmpp_2m", SCHEDULE, 6)
    x = fs.draw_noise((100,), range(6), dtype=torch.float64)
    plain = fs.sample(exact, x, plan)
    assert torch.equal(fs.sample(exact, x, plan, hooks=fs.Hooks(time=TimeShift(SCHEDULE, 0.0))), plain)
    hooks = fs.Hooks(time=TimeShift(SCHEDULE, 0.05, data_variance=0.2))
    shifted = fs.sample(exact, x, plan, hooks=hooks)
    assert not torch.equal(shifted, plain)
    torch.testing.assert_close(fs.sample(exact, x[2:4], plan, hooks=hooks), shifted[2:4], rtol=1e-13, atol=1e-13)


def test_a_network_gets_one_time_a_sample():
    seen = []

    def network(x, t):
        seen.append(t.clone())
        return torch.zeros_like(x)

    denoiser = fs.Denoiser(network, SCHEDULE, predicts="velocity")
    x = fs.draw_noise((100,), range(4))
    fs.sample(denoiser, x, fs.make_plan("ddim", SCHEDULE, 4), hooks=fs.Hooks(time=TimeShift(SCHEDULE, 0.2)))
    assert denoiser.calls == 4
    assert len(set(seen[0].tolist())) == 1
    assert len(set(seen[1].tolist())) > 1


def test_with_an_exact_denoiser_the_mean_shift_is_small_and_the_error_grows():
    """Corrected criterion, 3,072 elements: the mean shift is within 1 % of the range. The error is a sixth larger: a sample whose
    variance is above the average keeps it along the exact path, and the shift takes that for noise."""
    exact = fs.exact.Gaussian(SCHEDULE, torch.zeros(3072), 0.3)
    x, plan = fs.draw_noise((3072,), range(8), dtype=torch.float64), fs.make_plan("dpmpp_2m", SCHEDULE, 10)
    shift, moved = TimeShift(SCHEDULE, window=0.03, cutoff=0.1, data_variance=0.3), []

    def time(i, t, x):
        tau = shift(i, t, x)
        moved.append(np.mean(tau) - t)
        return tau

    wanted = exact.solution(x, 1.0, 1e-3)
    plain = fs.sample(exact, x, plan)
    shifted = fs.sample(exact, x, plan, hooks=fs.Hooks(time=time))
    errors = [float((run - wanted).square().mean().sqrt()) for run in (plain, shifted)]
    assert abs(np.mean(moved)) < 0.01
    assert 1.0 < errors[1] / errors[0] < 1.25


def test_refused():
    with pytest.raises(ValueError, match="window"):
        TimeShift(SCHEDULE, -0.1)
    with pytest.raises(ValueError, match="variance of the data"):
        TimeShift(SCHEDULE, 0.1, data_variance=-1.0)
    with pytest.raises(ValueError, match="with 2 of them that is no estimate"):
        TimeShift(SCHEDULE, 0.1)(1, 0.5, torch.zeros(4, 2))
