"""LMS and the Adams predictor-corrector: limits, the fourth order, and diffusers' and k-diffusion's LMS."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import FINITE, SCHEDULES
from scipy.integrate import quad
from test_deis import bench
from test_solvers import exact_solution, mixture, noise, same

import fewstep as fs
from fewstep.errors import UnknownNameError
from fewstep.solvers import DEIS, Adams


@pytest.mark.parametrize("name", SCHEDULES)
def test_order_one_is_ddim_and_lms_is_deis_in_rho(name):
    schedule = SCHEDULES[name]
    for nfe in (1, 2, 3, 9):
        for prediction in ("noise", "flow"):
            same(Adams(1, prediction, "none").plan(schedule, nfe), fs.make_plan("ddim", schedule, nfe), schedule, 1e-11)
        for order in (2, 3, 4):
            for corrector, compat in (("none", "official"), ("start", "exact")):
                if order > 2 or corrector == "none":
                    theirs = DEIS(order, "rho", compat=compat).plan(schedule, nfe)
                    same(Adams(order, "noise", corrector).plan(schedule, nfe), theirs, schedule, 1e-11)


def test_weights_are_those_of_equal_steps():
    """Adams-Bashforth 55, -59, 37, -9 over 24, and the same with the Adams-Moulton weights 9, 19, -5, 1 over 24 of the step before."""
    schedule = fs.schedules.EDM(t_start=10.0, t_end=2.0)
    h, bashforth = -1.0, np.array([55, -59, 37, -9]) / 24
    plain = Adams(4, corrector="none").plan(schedule, 8, grid="time").rows[-1]
    np.testing.assert_allclose(plain.weights, h * bashforth, rtol=1e-12)
    both = Adams(3, corrector="every").plan(schedule, 8, grid="time").rows[-1]
    third = np.array([23, -16, 5, 0]) / 12
    correction = np.array([9, 19, -5, 1]) / 24 - np.array([0, 23, -16, 5]) / 12
    np.testing.assert_allclose(both.weights, h * (third + correction), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("schedule", FINITE.values(), ids=FINITE)
def test_corrector_gains_an_order(schedule):
    denoiser, x = mixture(schedule), noise(schedule)
    exact = exact_solution(denoiser, x)
    for order in (1, 2):
        solver = Adams(order, "flow", "every")
        plans = [solver.plan(schedule, nfe, grid="lambda") for nfe in (160, 320)]
        errors = [float((fs.sample(denoiser, x, plan) - exact).square().mean().sqrt()) for plan in plans]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(solver.claimed_order, abs=0.15)
        assert solver.claimed_order == order + 1


def test_fourth_order_where_sampling_starts_in_noise():
    schedule, denoiser, x, exact = bench()
    for solver in (Adams(4, "noise", "none"), Adams(4, "noise"), Adams(4, "flow"), Adams(3, "flow", "every")):
        runs = [fs.sample(denoiser, x, solver.plan(schedule, nfe, grid="lambda")) for nfe in (320, 640)]
        errors = [float((run - exact).square().mean().sqrt()) for run in runs]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.2), solver


def test_flow_keeps_the_step_from_pure_noise():
    plan = Adams(2, "flow", "none").plan(fs.schedules.Flow(t_end=0.0), 4, grid="time")
    assert [len(row.weights) for row in plan.rows] == [1, 2, 2, 1]
    np.testing.assert_allclose(plan.rows[1].weights, [-0.375, 0.125], rtol=1e-12)  # -(3/2, -1/2) / 4


def linear_multistep(denoiser, schedule, grid, x, order):
    """k-diffusion's sampler, of which the coefficients are integrals of Lagrange polynomials in sigma."""
    sigmas, slopes, states = schedule.sigma(grid), [], [x]
    for i in range(len(grid) - 1):
        slopes.insert(0, (states[-1] - denoiser(states[-1], float(grid[i]))) / sigmas[i])
        used = min(i + 1, order)
        step = torch.zeros_like(x)
        for j in range(used):

            def basis(s, j=j, used=used, i=i):
                return math.prod((s - sigmas[i - k]) / (sigmas[i - j] - sigmas[i - k]) for k in range(used) if k != j)

            step = step + quad(basis, sigmas[i], sigmas[i + 1], epsrel=1e-12)[0] * slopes[j]
        states.append(states[-1] + step)
    return torch.stack(states)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_step_for_step(order):
    schedule = fs.schedules.EDM(sigma_min=0.02)
    denoiser, x = mixture(schedule), noise(schedule)
    plan = Adams(order, corrector="none").plan(schedule, 10, grid="karras")
    ours = fs.sample(denoiser, x, plan, trajectory=True).states
    torch.testing.assert_close(ours, linear_multistep(denoiser, schedule, plan.grid, x, order), rtol=0, atol=1e-10)
    diffusers = pytest.importorskip("diffusers", minversion="0.32")
    scheduler = diffusers.LMSDiscreteScheduler()
    scheduler.set_timesteps(plan.nfe)
    scheduler.sigmas, scheduler.is_scale_input_called = torch.tensor(schedule.sigma(plan.grid)), True
    state, theirs = x, [x]
    for label, t in zip(scheduler.timesteps, plan.tau.tolist(), strict=True):
        state = scheduler.step((state - denoiser(state, t)) / t, label, state, order=order).prev_sample
        theirs.append(state)
    torch.testing.assert_close(
        ours, torch.stack(theirs), rtol=0, atol=1e-6
    )  # it integrates to a relative 1e-4, of polynomials exactly


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adams(5), "orders 1 to 4"),
        (lambda: Adams(prediction="data"), "prediction"),
        (lambda: Adams(corrector="all"), "corrector"),
    ],
)
def test_refused(make, message):
    with pytest.raises((ValueError, UnknownNameError), match=message):
        make()
