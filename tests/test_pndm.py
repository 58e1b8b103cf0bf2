"""PNDM written out, how it spends calls, and what it has in common with iPNDM and DDIM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import FINITE, SCHEDULES
from test_solvers import mixture, noise, same

import fewstep as fs
from fewstep.errors import GridError, UnknownNameError
from fewstep.solvers import DDIM, PNDM

MEANS = {1: [1.0], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def written_out(schedule, denoiser, x, times, order, startup):
    """Algorithm 2 of the paper, and its second-order relative."""

    def noise_at(x, t):
        return (x - float(schedule.alpha(t)) * denoiser(x, t)) / float(schedule.sigma(t))

    def transfer(x, e, s, t):
        (a, b), (p, q) = schedule.alpha([s, t]), schedule.sigma([s, t])
        return b * (x / a + (q / b - p / a) * e)

    known = []
    for k, (s, t) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        e = noise_at(x, s)
        known = [e, *known][:order]
        if startup == "runge_kutta" and k < order - 1:
            middle = 0.5 * (s + t)
            second = noise_at(transfer(x, e, s, middle), middle)
            third = noise_at(transfer(x, second, s, middle), middle)
            fourth = noise_at(transfer(x, third, s, t), t)
            e = (e + 2 * second + 2 * third + fourth) / 6
        elif startup == "heun" and k == 0:
            e = 0.5 * (e + noise_at(transfer(x, e, s, t), t))
        else:
            e = sum(weight * value for weight, value in zip(MEANS[len(known)], known, strict=True))
        x = transfer(x, e, s, t)
    return x


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("startup", ["heun", "runge_kutta"])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_written_out(name, startup, order):
    schedule = FINITE[name]
    times, x = fs.grids.make_grid("lambda", schedule, 9), noise(schedule)
    plan = PNDM(order, startup).plan(schedule, grid=times)
    assert plan.nfe == 9 + (1 if startup == "heun" else 3 * (order - 1))
    wanted = written_out(schedule, mixture(schedule), x, times, order, startup)
    torch.testing.assert_close(fs.sample(mixture(schedule), x, plan), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("solver", "shares"),
    [
        (PNDM(), {1: [1], 2: [2], 3: [2, 1], 5: [2, 1, 1, 1]}),
        (PNDM(2, "runge_kutta"), {3: [2, 1], 4: [4], 6: [4, 1, 1]}),
        (PNDM(4, "runge_kutta"), {4: [4], 7: [4, 1, 1, 1], 8: [4, 4], 13: [4, 4, 4, 1]}),
    ],
)
def test_how_calls_are_spent(solver, shares):
    schedule = FINITE["vp_linear"]
    for budget, wanted in shares.items():
        assert solver.split(budget) == wanted
        plan = solver.plan(schedule, budget, "time")
        assert plan.nfe == budget
        assert set(np.linspace(0.95, 0.05, len(wanted) + 1).round(9)) <= set(plan.grid.round(9))  # the steps are equally long


def test_without_a_start_it_is_ipndm():
    schedule = FINITE["vp_cosine"]
    times = fs.grids.make_grid("time", schedule, 8)
    plan = PNDM().plan(schedule, 8, grid=times)
    same(plan, fs.make_plan("ipndm", schedule, grid=times), schedule, 1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("startup", ["heun", "runge_kutta"])
def test_a_constant_noise_is_followed_exactly(name, startup):
    """Weights of sum 1: the prediction of noise eps keeps y - rho eps, as DDIM does."""
    schedule = SCHEDULES[name]
    eps = torch.tensor([[0.3, -1.0]], dtype=torch.float64)

    def denoiser(x, t):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        return (x - sigma * eps) / alpha if alpha else x * 0.0

    x = float(schedule.sigma(schedule.t_start)) * eps + float(schedule.alpha(schedule.t_start)) * 0.7
    for final in ("t_end", "zero"):
        plan = PNDM(startup=startup).plan(schedule, 17, final=final)
        same_end = DDIM().plan(schedule, 17, final=final)
        torch.testing.assert_close(fs.sample(denoiser, x, plan), fs.sample(denoiser, x, same_end), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PNDM(order=1), ValueError, "2, 3 or 4 predictions, got 1"),
        (lambda: PNDM(startup="huen"), UnknownNameError, "Did you mean 'heun'"),
        (lambda: PNDM(startup="runge_kutta").plan(FINITE["edm"], 4, grid=[9.0, 1.0, 0.1]), GridError, "leaves 3"),
    ],
)
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
