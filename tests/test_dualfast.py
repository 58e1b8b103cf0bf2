"""DualFast: off at weight 0, the identity with the second-order solver, and what it does on an exact denoiser."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.plan import Row
from fewstep.solver import Solver
from fewstep.solvers import DDIM, DPMSolverPP, DualFast

MEANS = torch.tensor([[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
SCHEDULE = fs.schedules.VPLinear(t_end=0.01)
MIXTURE = fs.exact.GaussianMixture(SCHEDULE, MEANS, torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64), WEIGHTS)


def noise(count=64):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(solver, nfe, **options):
    return fs.sample(MIXTURE, noise(), solver.plan(SCHEDULE, nfe, grid="lambda", **options))


@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP(order=2), DPMSolverPP(order=3)])
@pytest.mark.parametrize("anchor", ["previous", "first"])
def test_weight_zero_switches_it_off_exactly(solver, anchor):
    for nfe in (1, 2, 9):
        for weight in (0.0, (0.0,) * (nfe - 1)):
            wrapped = DualFast(solver, weight, anchor)
            assert wrapped.plan(SCHEDULE, nfe).rows == solver.plan(SCHEDULE, nfe).rows
            assert wrapped.claimed_order == solver.claimed_order


def test_half_of_the_previous_step_on_ddim_is_second_order_dpm_solver():
    """c = 1/2 on a uniform grid in lambda: x_t = (alpha_t / alpha_s) x - sigma_t (e^h - 1) (eps_i + (eps_i - eps_{i-1}) / 2)."""
    nfe = 9
    times = fs.grids.make_grid("lambda", SCHEDULE, nfe)
    alpha, sigma, lam = SCHEDULE.alpha(times), SCHEDULE.sigma(times), SCHEDULE.lam(times)
    x, before = noise(), None
    for i in range(nfe):
        eps = (x - alpha[i] * MIXTURE(x, float(times[i]))) / sigma[i]
        mixed = eps if before is None else 1.5 * eps - 0.5 * before
        x = alpha[i + 1] / alpha[i] * x - sigma[i + 1] * math.expm1(lam[i + 1] - lam[i]) * mixed
        before = eps
    torch.testing.assert_close(run(DualFast(DDIM(), (0.5,) * (nfe - 1)), nfe), x, rtol=1e-12, atol=1e-12)


class Stored(Solver):
    """DDIM that stores something else than the data prediction, to see whether that is taken back."""

    source = "none"
    claimed_order = 1

    def __init__(self, kind):
        self.kind = kind

    def rows(self, schedule, times, calls):
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        for i, t in enumerate(times[:-1].tolist()):
            if self.kind == "noise":
                ratio = float(alpha[i + 1] / alpha[i])
                yield Row(
                    t, (ratio,), (float(sigma[i + 1] - ratio * sigma[i]),), 1.0 / float(sigma[i]), -float(alpha[i] / sigma[i])
                )
            else:  # o_i = d_i / 2 + z_i + 0.3 o_{i-1}
                ratio = float(sigma[i + 1] / sigma[i])
                weight = 2.0 * float(alpha[i + 1] - alpha[i] * ratio)
                memory = (0.3,) * (i > 0)
                yield Row(t, (ratio - weight,), (weight, *(-0.3 * weight for _ in memory)), 1.0, 0.5, memory)


@pytest.mark.parametrize("kind", ["noise", "mixed"])
@pytest.mark.parametrize("anchor", ["previous", "first"])
def test_it_does_not_matter_what_the_solver_stores(kind, anchor):
    times = fs.grids.make_grid("time", SCHEDULE, 7)
    for weight in (0.5, (0.1, 0.4, 0.0, 0.3, 0.2, 0.5)):
        plans = [
            fs.Plan(SCHEDULE, times, tuple(DualFast(solver, weight, anchor).rows(SCHEDULE, times, [1] * 7)))
            for solver in (DDIM(), Stored(kind))
        ]
        one, two = (fs.sample(MIXTURE, noise(), plan) for plan in plans)
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)
    if kind == "noise":
        assert all(len(row.carry) == 1 for row in plans[1].rows)  # nothing is left of the states


# RMS end-point errors of an independent step-by-step calculation (no plans), against an eighth-order reference
MEASURED = {
    ("ddim", None, 5): 0.364,
    ("ddim", "previous", 5): 0.3138,
    ("ddim", "first", 5): 0.3112,
    ("ddim", None, 10): 0.1833,
    ("ddim", "previous", 10): 0.1379,
    ("ddim", "first", 10): 0.1168,
    ("dpmpp_2m", None, 5): 0.0947,
    ("dpmpp_2m", "previous", 5): 0.1067,
    ("dpmpp_2m", "previous", 10): 0.0831,
    ("dpmpp_2m", None, 40): 0.0027,
    ("dpmpp_2m", "previous", 40): 0.0211,
    ("dpmpp_2m", "first", 80): 0.0835,
}


def test_a_gain_for_first_order_and_a_loss_for_second():
    exact = fs.reference(MIXTURE, noise(), SCHEDULE, tol=1e-8)
    for (name, anchor, nfe), error in MEASURED.items():
        solver = fs.solvers.make_solver(name)
        result = run(solver if anchor is None else DualFast(solver, 0.5, anchor), nfe)
        # the table has four digits after the point
        assert float((result - exact).square().sum(1).mean().sqrt()) == pytest.approx(error, abs=6e-5), (name, anchor, nfe)


def test_at_both_ends():
    schedule = fs.schedules.Flow(t_end=0.0)
    exact = fs.exact.Gaussian(schedule, [1.0, -1.0], 0.25)
    for anchor in ("previous", "first"):
        for nfe in (1, 2, 3, 8):
            plan = DualFast(DPMSolverPP(), 0.5, anchor).plan(schedule, nfe)
            assert torch.isfinite(fs.sample(exact, noise(4), plan)).all()
            assert all(np.any(row.weights) for row in plan.rows)


def test_provenance_names_both():
    made_by = DualFast(DPMSolverPP(order=3), 0.2).plan(SCHEDULE, 4).provenance["solver"]
    assert made_by["name"] == "DualFast"
    assert made_by["options"]["solver"]["name"] == "DPMSolverPP"
    assert made_by["options"]["solver"]["options"]["order"] == 3


class TwoCalls(Stored):
    stages = 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DualFast(DDIM(), math.nan), "finite"),
        (lambda: DualFast(DDIM(), anchor="last"), "first"),
        (lambda: DualFast(TwoCalls("noise")), "one call a step"),
        (lambda: DualFast(DDIM(eta=1.0)).plan(SCHEDULE, 4), "draws noise"),
        (lambda: DualFast(DDIM(), (0.5, 0.5)).plan(SCHEDULE, 4), "needs 3 weights"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
