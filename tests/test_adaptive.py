"""Adaptive sampling: against the published algorithm for one sample, per-sample control, ends, failures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import SCHEDULES
from test_solvers import mixture, noise

import fewstep as fs
from fewstep.errors import GridError, NetworkError, UnknownNameError
from fewstep.integrate import ToleranceError, adaptive

VP = fs.schedules.VPLinear()


def published(schedule, denoiser, x, order, f, rtol=0.05, atol=0.0078, h=0.05):
    """The authors' loop (arXiv 2206.00927, algorithm 3) for one sample: f = 1 for noise, -1 for data predictions.

    Returns the sample, the accepted times, and the number of rejections.
    """

    def level(lam):
        t = float(schedule.t_of_lam(lam))
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        return (t, alpha, sigma) if f > 0 else (t, sigma, alpha)

    def predict(x, lam):
        t = float(schedule.t_of_lam(lam))
        d = denoiser(x, t)
        return (x - float(schedule.alpha(t)) * d) / float(schedule.sigma(t)) if f > 0 else d

    lam, end = (float(schedule.lam(t)) for t in (schedule.t_start, schedule.t_end))
    before, times, rejected = x, [schedule.t_start], 0
    while end - lam > 1e-12:
        (_, a_s, _), (t, a_t, b_t) = level(lam), level(lam + h)
        e0, r1 = predict(x, lam), 1.0 / order
        _, a_1, b_1 = level(lam + r1 * h)
        e1 = predict(a_1 / a_s * x - f * b_1 * math.expm1(f * r1 * h) * f * e0, lam + r1 * h)
        first = a_t / a_s * x - b_t * math.expm1(f * h) * e0
        second = first - b_t * math.expm1(f * h) / (2 * r1) * (e1 - e0)
        low, high = first, second
        if order == 3:
            _, a_2, b_2 = level(lam + 2 * r1 * h)
            phi = math.expm1(f * 2 * r1 * h) / (f * 2 * r1 * h) - 1
            e2 = predict(a_2 / a_s * x - b_2 * math.expm1(f * 2 * r1 * h) * e0 - 2 * b_2 * phi * (e1 - e0), lam + 2 * r1 * h)
            low, high = second, first - 1.5 * b_t * (math.expm1(f * h) / (f * h) - 1) * (e2 - e0)
        allowed = torch.maximum(rtol * torch.maximum(low.abs(), before.abs()), torch.tensor(atol, dtype=x.dtype))
        error = float(((high - low) / allowed).square().mean().sqrt())
        if error <= 1.0:
            x, before, lam = high, low, lam + h
            times.append(t)
        else:
            rejected += 1
        h = min(0.9 * h * error ** (-1.0 / order), end - lam)
    return x, times, rejected


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("predicts", ["noise", "data"])
def test_every_sample_is_the_published_algorithm_run_alone(order, predicts):
    """Variance-preserving, and without the limit on growth, which the authors do not have."""
    denoiser, x = mixture(VP), noise(VP, 5)
    run = adaptive(denoiser, x, VP, order=order, predicts=predicts, growth=math.inf)
    for k in range(5):
        expected, times, rejected = published(VP, denoiser, x[k : k + 1], order, 1.0 if predicts == "noise" else -1.0)
        torch.testing.assert_close(run.samples[k : k + 1], expected, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(run.grids[k], times, rtol=1e-8)
        assert run.rejected[k] == rejected
        # a rejected step is tried again from a prediction that is known
        assert run.calls[k] == order * (len(times) - 1) + (order - 1) * rejected


def test_a_sample_does_not_depend_on_its_batch():
    for name, schedule in SCHEDULES.items():
        denoiser, x = mixture(schedule), noise(schedule, 6)
        whole = adaptive(denoiser, x, schedule)
        alone = adaptive(denoiser, x[3:4], schedule)
        assert torch.equal(whole.samples[3:4], alone.samples), name
        np.testing.assert_array_equal(whole.grids[3], alone.grids[0])
        assert whole.calls[3] == alone.calls[0] == alone.nfe
        assert whole.nfe >= whole.calls.max()
        assert len({len(grid) for grid in whole.grids} | set(whole.calls.tolist())) > 1, "all samples alike: the test tests nothing"


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine_full", "edm", "flow_full", "zero_snr"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("predicts", ["noise", "data"])
def test_the_error_follows_the_tolerance(name, order, predicts):
    """Down to 1e-4; at the ends without a lambda the first-order steps add an error of their own, which does not shrink."""
    schedule = SCHEDULES[name]
    denoiser, x = mixture(schedule), noise(schedule, 8)
    exact = fs.reference(denoiser, x, schedule, tol=1e-7).plain()
    floor = 0.0 if np.isfinite(schedule.lam([schedule.t_start, schedule.t_end])).all() else 0.02
    errors, calls = [], []
    for tol in (3e-2, 3e-3, 3e-4):
        run = adaptive(denoiser, x, schedule, order=order, predicts=predicts, rtol=tol, atol=tol)
        errors.append(float((run.samples - exact).square().mean(1).sqrt().max()))
        calls.append(int(run.nfe))
        assert errors[-1] < 8.0 * tol + floor  # a local tolerance: some steps' errors add up
    assert calls[0] < calls[1] < calls[2]
    assert errors[2] < 0.2 * errors[0] + floor


def test_together_is_one_step_size_and_one_time_for_all():
    times = []

    def network(x, t):
        times.append(t)
        return mixture(VP)(x, t)

    x = noise(VP, 5)
    run = adaptive(network, x, VP, together=True)
    assert all(isinstance(t, float) for t in times)
    assert run.nfe == len(times) == run.calls.max() == run.calls.min()
    assert all(np.array_equal(grid, run.grids[0]) for grid in run.grids)
    assert len(run.grids) == 5
    assert len(adaptive(network, x[:1], VP).grids[0]) <= len(run.grids[0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_ends_grids_and_counts(name):
    schedule = SCHEDULES[name]
    inner, x = mixture(schedule), noise(schedule, 4)
    denoiser = fs.Denoiser(lambda x, t: inner(x, t), schedule, "data", network_time=lambda t: t)
    run = adaptive(denoiser, x.float(), schedule, t_end=schedule.t_zero)
    assert run.samples.dtype is torch.float32
    assert bool(torch.isfinite(run.samples).all())
    assert denoiser.calls == run.nfe
    for grid in run.grids:
        assert grid[0] == schedule.t_start
        assert grid[-1] == schedule.t_zero
        assert (np.diff(schedule.lam(grid)) > 0).all()


def test_conditions_precision_and_no_gradients():
    def network(x, t, *, shift):
        return mixture(VP)(x - shift, t) + shift

    x = noise(VP, 3)
    run = adaptive(network, x, VP, cond={"shift": 0.1}, rtol=1e-3)
    assert not torch.equal(run.samples, adaptive(network, x, VP, cond={"shift": 0.0}, rtol=1e-3).samples)
    assert adaptive(network, x.half(), VP, cond={"shift": 0.1}).samples.dtype is torch.float32
    assert not adaptive(network, x.requires_grad_(), VP, cond={"shift": 0.1}).samples.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": 1}, ValueError, "orders 2 and 3"),
        ({"predicts": "velocity"}, UnknownNameError, "noise"),
        ({"atol": 0.0}, ValueError, "atol positive"),
        ({"safety": 1.0}, ValueError, "safety between 0 and 1"),
        ({"growth": 1.0}, ValueError, "growth must be over 1"),
        ({"first_step": 0.0}, ValueError, "first_step must be positive"),
        ({"t_end": 1.0}, GridError, "strictly decrease"),
        ({"max_calls": 5}, ToleranceError, "5 calls allowed are spent"),
    ],
)
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        adaptive(mixture(VP), noise(VP, 2), VP, **options)


def test_broken_networks():
    with pytest.raises(NetworkError, match="not finite near t="):
        adaptive(lambda x, t: torch.full_like(x, math.nan), noise(VP, 2), VP)
    with pytest.raises(NetworkError, match=r"shape \(2, 1\)"):
        adaptive(lambda x, t: x[:, :1], noise(VP, 2), VP)
    with pytest.raises(ValueError, match="noise schedule"):
        adaptive(mixture(VP), noise(VP, 2), fs.schedules.EDM())


def test_the_result_prints_in_one_line():
    run = adaptive(mixture(VP), noise(VP, 3), VP)
    assert repr(run).startswith(f"Adaptive(3 samples, nfe={run.nfe}, {run.calls.min()} to {run.calls.max()} calls a sample, ")
    assert len(repr(run)) < 100
