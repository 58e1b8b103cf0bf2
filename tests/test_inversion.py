"""Image-to-image starts, the way back in few calls, and round trips."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import FINITE, SCHEDULES, SOLVERS

import fewstep as fs
from fewstep.errors import GridError
from fewstep.recipes import Recipe
from fewstep.solvers import DDIM, DEIS, DPMSolverPP, DPMSolverV3, EpsilonScale, Mixed, make_solver
from fewstep.statistics import ModelStatistics

MEAN = torch.tensor([0.7, -0.2], dtype=torch.float64)
VARIANCE = torch.tensor([0.5, 0.05], dtype=torch.float64)


def data(count=32):
    return fs.exact.Gaussian(fs.schedules.EDM(), MEAN, VARIANCE).draw(count, seed=1)


@pytest.mark.parametrize("schedule", FINITE.values(), ids=FINITE)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_way_back_has_the_order_of_the_solver(schedule, order):
    exact = fs.exact.Gaussian(schedule, MEAN, VARIANCE)
    x = float(schedule.alpha(schedule.t_end)) * data() + 0.05 * fs.draw_noise((2,), range(32), dtype=torch.float64)
    wanted = exact.solution(x, schedule.t_end, schedule.t_start)
    errors = []
    for nfe in (160, 320):
        plan = DPMSolverPP(order=order).inverse_plan(schedule, nfe, "lambda")
        assert plan.nfe == nfe
        errors.append(float((fs.sample(exact, x, plan) - wanted).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["vp_linear", "flow"])
def test_every_solver_finds_the_way_back(name):
    """To the exact noise and there and back, at no less than the order of the way there."""
    schedule, tested = FINITE[name], 0
    exact = fs.exact.Gaussian(schedule, MEAN, VARIANCE)
    noise = exact.solution(data(), schedule.t_end, schedule.t_start)
    for solver_name, case in SOLVERS.items():
        if case.stochastic:
            continue
        solver, errors, round_trips = make_solver(solver_name), [], []
        for nfe in (120, 240):
            found = fs.sample(exact, data(), solver.inverse_plan(schedule, nfe, "lambda"))
            back = fs.sample(exact, found, solver.plan(schedule, nfe, "lambda"))
            errors.append(float((found - noise).abs().max()))
            round_trips.append(float((back - data()).abs().max()))
        for coarse, fine in (errors, round_trips):
            assert math.log2(coarse / fine) > case.order - 0.15, solver_name
        tested += 1
    assert tested == sum(not case.stochastic for case in SOLVERS.values())


@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow"])
@pytest.mark.parametrize("nfe", [1, 2, 5, 20])
def test_the_way_back_with_statistics_of_a_gaussian_is_exact(name, nfe):
    """In any number of calls, up to the cubics between the nodes; up to the trapezoids with those of the authors."""
    schedule = FINITE[name]
    exact, stats = fs.exact.Gaussian(schedule, MEAN, VARIANCE), ModelStatistics.gaussian(schedule, MEAN.numpy(), VARIANCE.numpy())
    recipe = Recipe.multistep(nfe, order=min(nfe, 2), prediction="v3")
    for solver, bound in (
        (DPMSolverV3(stats), 1e-8),
        (DPMSolverV3(stats, corrector="raised", lower_order_final=False), 1e-8),
        (Mixed(recipe, stats), 1e-8),
        (DPMSolverV3(stats, compat="official"), 3e-5),
    ):
        plan = solver.inverse_plan(schedule, nfe, "lambda")
        wanted = exact.solution(data(), float(plan.grid[0]), float(plan.grid[-1]))
        assert float((fs.sample(exact, data(), plan) - wanted).abs().max()) < bound * float(wanted.abs().max()), solver


@pytest.mark.parametrize(
    ("solver", "bound"), [(DEIS(order=3), 1.7e-3), (DEIS(order=4, compat="official"), 0.021)], ids=["exact", "official"]
)
@pytest.mark.parametrize("name", ["betas", "zero_snr"])
def test_the_way_back_over_the_kinks_of_a_table(name, solver, bound):
    """In the time of a table, whose quadrature is cut at its entries. Bounds: twice what was measured."""
    schedule = SCHEDULES[name]
    exact = fs.exact.Gaussian(schedule, MEAN, VARIANCE)
    times = np.linspace(0.05, 0.95, 61)[::-1]
    wanted = exact.solution(data(), 0.05, 0.95)
    found = fs.sample(exact, data(), solver.inverse_plan(schedule, grid=times))
    assert float((found - wanted).abs().max()) < bound


def test_ddim_inversion_is_the_known_formula():
    schedule = fs.schedules.VPLinear()
    mixture = fs.exact.GaussianMixture(schedule, torch.stack([MEAN, -MEAN]), 0.1)
    plan = DDIM().inverse_plan(schedule, 7, "time")
    x = expected = data()
    for s, t in zip(plan.grid[:-1].tolist(), plan.grid[1:].tolist(), strict=True):
        (a, b), (c, d) = ((float(schedule.alpha(u)), float(schedule.sigma(u))) for u in (s, t))
        x_0 = mixture(expected, s)
        expected = c * x_0 + d * (expected - a * x_0) / b
    torch.testing.assert_close(fs.sample(mixture, x, plan), expected, rtol=1e-12, atol=1e-12)


def test_a_round_trip_gets_better_with_the_calls():
    """Encode and decode with n calls each; a mixture, whose paths are curved. The bounds are twice what was measured."""
    schedule = fs.schedules.VPLinear(t_end=0.01)
    mixture = fs.exact.GaussianMixture(schedule, [[1.0, 0.5], [-1.0, -0.3]], 0.05)
    x = mixture.draw(64, seed=0)
    for nfe, bound in ((10, 0.08), (40, 2.8e-3), (160, 5.8e-5)):
        solver = DPMSolverPP(order=2)
        noise = fs.sample(mixture, x, solver.inverse_plan(schedule, nfe, "lambda"))
        back = fs.sample(mixture, noise, solver.plan(schedule, nfe, "lambda"))
        assert float((back - x).square().mean().sqrt()) < bound


def test_encode_and_decode_exactly():
    """`invert` to a tolerance and `reference` back."""
    schedule = fs.schedules.Flow(t_end=0.02)
    mixture = fs.exact.GaussianMixture(schedule, [[1.0, 0.5], [-1.0, -0.3]], 0.05)
    x = mixture.draw(16, seed=0)
    noise = fs.invert(mixture, x, schedule, tol=1e-9).plain()
    back = fs.reference(mixture, noise, schedule, tol=1e-9).plain()
    assert float((back - x).abs().max()) < 1e-6
    few = fs.sample(mixture, x, DPMSolverPP(order=3).inverse_plan(schedule, 100, "lambda"))
    assert float((few - noise).abs().max()) < 1e-2


def test_the_way_back_at_the_ends(tmp_path):
    for name in ("vp_cosine_full", "flow_full"):
        schedule = SCHEDULES[name]
        exact = fs.exact.Gaussian(schedule, MEAN, VARIANCE)
        with pytest.raises(GridError, match="cannot begin at sigma = 0"):
            DDIM().inverse_plan(schedule, 5)
        for solver in (DDIM(), DPMSolverPP(order=3)):
            plan = solver.inverse_plan(schedule, grid=[1.0, 0.9, 0.7, 0.4, 0.1, 0.01])  # alpha = 0 at its end
            assert torch.isfinite(fs.sample(exact, data(), plan)).all()
            plan.save(tmp_path / "p.safetensors")
            assert fs.Plan.load(tmp_path / "p.safetensors") == plan
    assert DDIM().inverse_plan(fs.schedules.EDM(), 4, start=10.0).grid[-1] == 10.0
    one = DDIM().inverse_plan(fs.schedules.EDM(), 1)
    assert one.nfe == 1
    assert one.provenance["inverse"] is True


def test_the_way_back_with_a_wrapper():
    schedule = fs.schedules.VPLinear()
    assert EpsilonScale(DDIM(), 1.0).inverse_plan(schedule, 5).rows == DDIM().inverse_plan(schedule, 5).rows


def test_no_way_back_for_a_stochastic_solver():
    with pytest.raises(ValueError, match="no way back"):
        DDIM(eta=1.0).inverse_plan(fs.schedules.VPLinear(), 5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_image_to_image_starts_where_the_plan_does_and_keeps_the_calls(name):
    schedule = SCHEDULES[name]
    middle = float(schedule.t_of_lam(0.0))
    plan = fs.make_plan("dpmpp_2m", schedule, 6, start=middle, final="zero")
    assert plan.nfe == 6
    assert plan.grid[0] == middle
    x_0 = data()
    x = fs.add_noise(x_0, range(32), plan)
    eps = fs.draw_noise((2,), range(32), dtype=torch.float64)
    expected = float(schedule.alpha(middle)) * x_0 + float(schedule.sigma(middle)) * eps
    torch.testing.assert_close(x, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(fs.add_noise(x_0[3:5], [3, 4], plan), x[3:5])  # a sample depends on its seed alone


def test_image_to_image_keeps_the_distribution_of_the_data():
    """Noised data have the marginal's distribution, so what comes back has that of the data: 20,000 samples, 4 standard errors."""
    schedule, count = fs.schedules.VPLinear(), 20_000
    exact = fs.exact.Gaussian(schedule, MEAN, VARIANCE)
    plan = fs.make_plan("dpmpp_3m", schedule, 40, grid="lambda", start=0.5)
    run = fs.sample(exact, fs.add_noise(data(count), range(count), plan), plan)
    assert ((run.mean(0) - MEAN).abs() < 4 * (VARIANCE / count).sqrt() + 1e-3).all()
    assert ((run.var(0) - VARIANCE).abs() < 4 * VARIANCE * math.sqrt(2 / count) + 1e-3).all()


def test_nearer_to_the_image_the_less_noise():
    schedule = fs.schedules.Flow()
    mixture = fs.exact.GaussianMixture(schedule, [[1.0, 0.5], [-1.0, -0.3]], 0.01)
    x_0 = mixture.draw(200, seed=0)
    changes = []
    for start in (0.05, 0.4, 0.95):
        plan = fs.make_plan("dpmpp_2m", schedule, 20, start=start, final="zero")
        changes.append(float((fs.sample(mixture, fs.add_noise(x_0, range(200), plan), plan) - x_0).square().mean()))
    assert changes[0] < changes[1] < changes[2]


def test_refused():
    plan = fs.make_plan("ddim", fs.schedules.Flow(), 4, start=0.5)
    with pytest.raises(TypeError, match=r"floating-point tensor \(batch"):
        fs.add_noise(torch.ones(3), [0, 1, 2], plan)
    with pytest.raises(ValueError, match="2 seeds for 3 samples"):
        fs.add_noise(torch.ones(3, 2), [0, 1], plan)
