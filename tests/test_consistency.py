"""LCM and TCD against their formulas, in their limits, and on data for which a consistency model is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import FINITE, SCHEDULES
from test_solvers import mixture, noise, same

import fewstep as fs
from fewstep.noise import BrownianPath
from fewstep.solvers import LCM, TCD

SEEDS = range(16)


def draws(plan):
    """Unit noise of every row, as `fewstep.sample` draws it for `SEEDS`."""
    path = BrownianPath(SEEDS, (2,))
    return [None if r.noise is None else torch.from_numpy(path.normalised(r.noise.begin, r.noise.end)) for r in plan.rows]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", ["t_end", "zero"])
def test_the_prediction_is_noised_anew(name, final):
    """Algorithm 1 of the first paper, written out."""
    schedule = SCHEDULES[name]
    plan, denoiser, x = LCM().plan(schedule, 5, final=final), mixture(schedule), noise(schedule)
    ours = fs.sample(denoiser, x, plan, seeds=SEEDS)
    for i, xi in enumerate(draws(plan)):
        alpha, sigma = (float(f(plan.grid[i + 1])) for f in (schedule.alpha, schedule.sigma))
        x = alpha * denoiser(x, float(plan.tau[i])) + (0.0 if xi is None else sigma * xi)
    torch.testing.assert_close(ours, x, rtol=1e-13, atol=1e-13)


def test_boundary_conditions():
    """c_skip and c_out of the paper with its sigma_data, 0.5; at the network's time 0 the state itself is the prediction."""
    schedule = SCHEDULES["betas"]
    plan = LCM(timestep_scaling=10.0).plan(schedule, grid=[1.0, 0.02, 0.001], final="t_end")
    for row, t, end in zip(plan.rows, (999, 19), plan.grid[1:], strict=True):
        square = (10.0 * t) ** 2 + 0.25
        alpha = float(schedule.alpha(end))
        assert row.carry == (pytest.approx(alpha * 0.25 / square, rel=1e-12),)
        assert row.weights == (pytest.approx(alpha * 10.0 * t / math.sqrt(square), rel=1e-12),)
    (first,) = LCM(timestep_scaling=10.0).plan(schedule, grid=[0.001, schedule.t_zero]).rows
    assert first.carry == (1.0,)
    assert first.weights == ()


def test_lcm_is_the_stochastic_equation_of_infinite_strength():
    """At eta = 10 and steps of 4/3 in lambda, but for a share e^(-40/3) of the state."""
    share = math.exp(-40 / 3)
    grid = FINITE["vp_linear"].t_of_lam(np.linspace(-2.0, 2.0, 4))
    ours = LCM().plan(FINITE["vp_linear"], grid=grid)
    sde = fs.solvers.DPMSolverPP(order=1, eta=10.0).plan(FINITE["vp_linear"], grid=grid)
    for mine, other in zip(ours.rows, sde.rows, strict=True):
        assert abs(other.carry[0]) < share
        np.testing.assert_allclose(mine.weights, other.weights, rtol=2 * share)
        assert mine.noise.scale == pytest.approx(other.noise.scale, rel=2 * share)


def written_out(schedule, denoiser, x, plan, times, between):
    """TCD as its paper has it, with s given for every step."""
    for i, (xi, s) in enumerate(zip(draws(plan), between, strict=True)):
        (a, b, c), (p, q, r) = schedule.alpha([times[i], s, times[i + 1]]), schedule.sigma([times[i], s, times[i + 1]])
        d = denoiser(x, float(times[i]))
        x = float(b) * d + float(q / p) * (x - float(a) * d)
        x = float(c / b) * x + (0.0 if xi is None else math.sqrt(r**2 - (c / b * q) ** 2) * xi)
    return x


def test_tcd_on_a_table_goes_down_to_whole_entries():
    schedule = SCHEDULES["stable_diffusion"]
    indices = np.array([999, 759, 499, 259, 0])
    times, gamma = (indices + 1.0) / 1000, 0.3
    plan, x = TCD(gamma).plan(schedule, grid=times), noise(schedule)
    between = (np.floor(0.7 * indices[1:]) + 1.0) / 1000
    wanted = written_out(schedule, mixture(schedule), x, plan, times, between)
    torch.testing.assert_close(fs.sample(mixture(schedule), x, plan, seeds=SEEDS), wanted, rtol=1e-12, atol=1e-12)
    assert [row.noise is None for row in plan.rows] == [False, False, False, True]


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "edm", "flow", "flow_full"])
def test_tcd_without_a_table_takes_a_share_of_the_time(name):
    schedule = SCHEDULES[name]
    plan, x = TCD(0.4).plan(schedule, 6, grid="lambda"), noise(schedule)
    wanted = written_out(schedule, mixture(schedule), x, plan, plan.grid, 0.6 * plan.grid[1:])
    torch.testing.assert_close(fs.sample(mixture(schedule), x, plan, seeds=SEEDS), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", ["t_end", "zero"])
def test_ends_of_gamma(name, final):
    """0 is DDIM. 1 is LCM where the network's time 0 is clean data."""
    schedule = SCHEDULES[name]
    same(TCD(0.0).plan(schedule, 7, final=final), fs.make_plan("ddim", schedule, 7, final=final), schedule)
    if float(schedule.network_time(0.0)) == 0.0:
        same(TCD(1.0).plan(schedule, 7, final=final), LCM().plan(schedule, 7, final=final), schedule, 1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", [LCM(), TCD(0.3), TCD(1.0)])
def test_constant_data_keep_their_noise_level(name, solver):
    """The variance of what the run draws, and keeps, is sigma^2 at every state."""
    schedule = SCHEDULES[name]
    plan = solver.plan(schedule, 9)
    dense, first = plan.dense(), float(schedule.sigma(plan.grid[0]))
    variance = (dense.A * first) ** 2 + (dense.C**2).sum(1)
    np.testing.assert_allclose(variance, schedule.sigma(plan.grid) ** 2, rtol=1e-10)


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_a_consistency_model_of_a_gaussian_has_its_law(nfe):
    """20,000 samples, mean and deviation within 4 standard errors: the end of the ODE is known in closed form, so no step has an error."""
    schedule, count = fs.schedules.VPCosine(t_start=1.0, t_end=0.0), 20_000
    mean, deviation = torch.tensor([0.7, -0.2]), torch.tensor([0.5, 1.5])

    def consistent(x, t):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        return mean + deviation * (x - alpha * mean) / (alpha**2 * deviation**2 + sigma**2).sqrt()

    x = fs.draw_noise((2,), range(count), dtype=torch.float64)
    run = fs.sample(consistent, x, LCM().plan(schedule, nfe, grid="time"), seeds=range(count))
    assert ((run.mean(0) - mean).abs() < 4 * deviation / math.sqrt(count)).all()
    assert ((run.std(0) - deviation).abs() < 4 * deviation / math.sqrt(2 * count)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LCM(timestep_scaling=0.0), "positive, got 0"),
        (lambda: LCM(timestep_scaling=math.inf), "positive, got inf"),
        (lambda: TCD(gamma=-0.1), r"\[0, 1\], got -0.1"),
        (lambda: TCD(gamma=1.1), r"\[0, 1\], got 1.1"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
