"""Runge-Kutta in rho and in the velocity: tableaux, orders of every kind, budgets, and diffusers' flow schedulers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import SCHEDULES
from test_solvers import exact_solution, mixture, noise, same

import fewstep as fs
from fewstep.errors import UnknownNameError
from fewstep.solvers import FlowRK, RhoRK
from fewstep.solvers.runge_kutta import TABLEAUX


@pytest.mark.parametrize("kind", TABLEAUX)
def test_tableaux_meet_the_order_conditions(kind):
    order, rows, b = TABLEAUX[kind]
    a = np.zeros((len(b), len(b)))
    for i, row in enumerate(rows, start=1):
        a[i, : len(row)] = row
    c, b = a.sum(1), np.array(b)
    conditions = {
        1: [(b.sum(), 1)],
        2: [(b @ c, 1 / 2)],
        3: [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
        4: [(b @ c**3, 1 / 4), (b @ (c * (a @ c)), 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)],
    }
    for p, pairs in conditions.items():
        met = all(abs(value - wanted) < 1e-14 for value, wanted in pairs)
        assert met == (p <= order)


@pytest.mark.parametrize("make", [RhoRK, FlowRK])
@pytest.mark.parametrize("kind", TABLEAUX)
def test_orders_of_every_kind(make, kind):
    """Whatever the rest of the budget is: 241 to 243 steps' worth of calls."""
    schedule = fs.schedules.VPLinear(t_start=0.95, t_end=0.05)
    denoiser, x = mixture(schedule), noise(schedule, 4)
    exact, solver = exact_solution(denoiser, x), make(kind)
    for rest in range(solver.stages):
        plans = [solver.plan(schedule, n * solver.stages + rest, grid="lambda") for n in (160, 320)]
        errors = [float((fs.sample(denoiser, x, plan) - exact).square().mean().sqrt()) for plan in plans]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(solver.claimed_order, abs=0.15), rest


def test_every_budget_is_spent_and_ends_in_no_single_call():
    for stages, kind in ((2, "heun"), (3, "kutta3"), (4, "rk4")):
        for nfe in range(1, 31):
            calls = RhoRK(kind).split(nfe)
            assert sum(calls) == nfe
            assert max(calls) <= stages
            assert max(calls) - min(calls) <= 1 or nfe < stages
            assert FlowRK(kind).plan(fs.schedules.Flow(), nfe).nfe == nfe
    assert RhoRK("kutta3").split(7) == [3, 2, 2]


@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_is_ddim(name):
    schedule = SCHEDULES[name]
    for make in (RhoRK, FlowRK):
        for nfe in (1, 2, 9):
            same(make("euler").plan(schedule, nfe), fs.make_plan("ddim", schedule, nfe), schedule)
        same(make("rk4").plan(schedule, 1), fs.make_plan("ddim", schedule, 1), schedule)


@pytest.mark.parametrize("make", [RhoRK, FlowRK])
def test_stages_are_those_of_the_tableau(make):
    """The textbook's loop on the ODE itself."""
    schedule = fs.schedules.VPLinear(t_start=0.9, t_end=0.1)
    denoiser, x = mixture(schedule), noise(schedule)
    plan = make("houwen3").plan(schedule, 3)
    run = fs.sample(denoiser, x, plan, trajectory=True)
    alpha, sigma = schedule.alpha(plan.grid), schedule.sigma(plan.grid)
    scale = alpha if make is RhoRK else alpha + sigma
    u = sigma / scale
    np.testing.assert_allclose((u - u[0])[:3] / (u[-1] - u[0]), [0, 8 / 15, 2 / 3], atol=1e-12)
    slopes = []
    for i in range(3):
        d = run.predictions[i]
        eps = (run.states[i] - alpha[i] * d) / sigma[i]
        slopes.append(eps if make is RhoRK else eps - d)
    for i, weights in enumerate([(8 / 15,), (1 / 4, 5 / 12), (1 / 4, 0, 3 / 4)], start=1):
        step = sum(w * slope for w, slope in zip(weights, slopes[:i], strict=True))
        expected = scale[i] * (x / scale[0] + (u[-1] - u[0]) * step)
        torch.testing.assert_close(run.states[i], expected, rtol=1e-12, atol=1e-12)


def test_flow_heun_takes_two_calls_from_pure_noise():
    plan = FlowRK("heun").plan(fs.schedules.Flow(t_end=0.0), 5, grid="time")
    np.testing.assert_allclose(plan.tau, [1.0, 0.6, 0.6, 0.2, 0.2], atol=1e-12)
    plan = RhoRK("heun").plan(fs.schedules.Flow(t_end=0.0), 4, grid="time")  # in rho it is singular, and the end is in both
    np.testing.assert_allclose(plan.tau, [1.0, 0.75, 0.25, 0.25], atol=1e-12)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_flow_match_euler_step_for_step(shift):
    diffusers = pytest.importorskip("diffusers", minversion="0.32")
    schedule = fs.schedules.Flow(t_end=0.0)
    denoiser, x = mixture(schedule), noise(schedule)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(9)
    grid = scheduler.sigmas.double().numpy()
    ours = fs.sample(denoiser, x, FlowRK("euler").plan(schedule, grid=grid), trajectory=True).states
    state, theirs = x, [x]
    for label, t in zip(scheduler.timesteps, grid.tolist(), strict=False):
        state = scheduler.step((state - denoiser(state, t)) / t, label, state).prev_sample
        theirs.append(state)
    torch.testing.assert_close(ours, torch.stack(theirs).double(), rtol=0, atol=2e-6)  # it works in float32


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
def test_diffusers_flow_match_heun_step_for_step():
    diffusers = pytest.importorskip("diffusers", minversion="0.32")
    schedule = fs.schedules.Flow(t_end=0.0)
    denoiser, x = mixture(schedule), noise(schedule)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(6)
    grid = scheduler.sigmas.double().numpy()[[0, 1, 3, 5, 7, 9, 11]]
    plan = FlowRK("heun").plan(schedule, grid=grid)
    assert plan.nfe == len(scheduler.timesteps) == 11
    state = x
    for label, t in zip(scheduler.timesteps, plan.tau.tolist(), strict=True):
        state = scheduler.step((state - denoiser(state, t)) / t, label, state).prev_sample
    torch.testing.assert_close(fs.sample(denoiser, x, plan), state.double(), rtol=0, atol=5e-6)  # it works in float32


def test_refused():
    for make in (RhoRK, FlowRK):
        with pytest.raises(UnknownNameError, match="Did you mean 'heun'"):
            make("huen")
