from __future__ import annotations

import math

import pytest
import torch

import fewstep as fs
from fewstep.solvers import DDIM, DPMSolverPP, EpsilonScale

SCHEDULE = fs.schedules.VPLinear()
EXACT = fs.exact.GaussianMixture(SCHEDULE, [[1.0, 0.5], [-1.0, -0.3]], 0.1)


def noise():
    return torch.randn(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Scaled:
    """The denoiser whose noise prediction is divided, by the definition."""

    schedule = SCHEDULE

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x, t):
        alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
        eps = (x - alpha * EXACT(x, t)) / sigma
        return (x - sigma * eps / self.scale(t)) / alpha


@pytest.mark.parametrize("solver", [DDIM(), DDIM(eta=1.0), DPMSolverPP(order=2), DPMSolverPP(order=3)])
@pytest.mark.parametrize("final", ["t_end", "zero"])
def test_it_is_the_solver_with_a_scaled_network(solver, final):
    plain = solver.plan(SCHEDULE, 8, final=final)
    for scale in (1.017, tuple(1.0 + 0.01 * i for i in range(8))):
        plan = EpsilonScale(solver, scale).plan(SCHEDULE, 8, final=final)
        scales = dict(zip(plan.tau.tolist(), scale if isinstance(scale, tuple) else [scale] * 8, strict=True))
        one = fs.sample(EXACT, noise(), plan, seeds=range(32))
        two = fs.sample(Scaled(lambda t, scales=scales: scales[t]), noise(), plain, seeds=range(32))
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_scale_one_switches_it_off_exactly():
    for scale in (1.0, (1.0,) * 6):
        assert EpsilonScale(DPMSolverPP(), scale).plan(SCHEDULE, 6).rows == DPMSolverPP().plan(SCHEDULE, 6).rows
        assert EpsilonScale(DPMSolverPP(), scale).claimed_order == 2
    assert EpsilonScale(DPMSolverPP(), 1.01).claimed_order == 0


def test_a_network_that_predicts_too_much_noise_is_put_right_exactly():
    inflated = fs.Denoiser(
        lambda x, t: 1.02 * (x - float(SCHEDULE.alpha(t[0])) * EXACT(x, float(t[0]))) / float(SCHEDULE.sigma(t[0])), SCHEDULE
    )
    wanted = fs.sample(EXACT, noise(), DPMSolverPP().plan(SCHEDULE, 10))
    got = fs.sample(inflated, noise(), EpsilonScale(DPMSolverPP(), 1.02).plan(SCHEDULE, 10))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_where_alpha_is_zero_the_call_is_left_alone():
    schedule = fs.schedules.Flow(t_end=0.0)
    exact = fs.exact.Gaussian(schedule, [1.0, -1.0], 0.25)
    plan = EpsilonScale(DDIM(), 1.01).plan(schedule, 5)
    assert plan.rows[0].output_gain == 1.0
    assert plan.rows[1].output_gain == 1.0 / 1.01
    assert torch.isfinite(fs.sample(exact, noise(), plan)).all()


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, (1.0, math.nan)])
def test_refused(scale):
    with pytest.raises(ValueError, match="must be positive"):
        EpsilonScale(DDIM(), scale)


def test_a_tuple_must_fit_the_calls():
    with pytest.raises(ValueError, match="5 calls needs as many scales, got 2"):
        EpsilonScale(DDIM(), (1.0, 1.1)).plan(SCHEDULE, 5)
