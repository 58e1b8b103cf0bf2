"""Orders, equalities and ends of every named solver, on exact denoisers."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from cases import FINITE, SCHEDULES, SOLVERS
from scipy.integrate import solve_ivp

import fewstep as fs
from fewstep.errors import GridError, UnknownNameError
from fewstep.grids import grid_names
from fewstep.plan import Plan

MEANS = torch.tensor([[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.1, 0.05], [0.05, 0.2]], [[0.2, 0.0], [0.0, 0.1]], [[0.15, -0.05], [-0.05, 0.15]]], dtype=torch.float64
)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def mixture(schedule):
    return fs.exact.GaussianMixture(schedule, MEANS, COVARIANCES, WEIGHTS)


def noise(schedule, count=16):
    return fs.draw_noise((2,), range(count), dtype=torch.float64) * float(schedule.sigma(schedule.t_start))


def exact_solution(denoiser, x):
    """dy/dlambda = D - y with y = x / alpha, by SciPy's eighth-order method."""
    schedule = denoiser.schedule

    def slope(lam, y):
        t = float(schedule.t_of_lam(lam))
        return denoiser(torch.from_numpy(y.reshape(x.shape)) * float(schedule.alpha(t)), t).numpy().ravel() - y

    span = [float(schedule.lam(t)) for t in (schedule.t_start, schedule.t_end)]
    start = (x / float(schedule.alpha(schedule.t_start))).numpy().ravel()
    y = solve_ivp(slope, span, start, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    return torch.from_numpy(y.reshape(x.shape)) * float(schedule.alpha(schedule.t_end))


def without_noise(plan):
    return Plan(plan.schedule, plan.grid, tuple(dataclasses.replace(row, noise=None) for row in plan.rows))


def test_every_name_has_its_row():
    assert set(SOLVERS) == set(fs.solver_names())
    for name, case in SOLVERS.items():
        assert fs.solvers.make_solver(name).claimed_order == case.order
        assert fs.make_plan(name, fs.schedules.VPLinear(), 4).stochastic == case.stochastic


@pytest.mark.parametrize("schedule", FINITE.values(), ids=FINITE)
def test_orders(schedule):
    denoiser, x = mixture(schedule), noise(schedule)
    exact, tested = exact_solution(denoiser, x), 0
    for name, case in SOLVERS.items():
        if case.stochastic:
            continue
        # uniform sigma takes EDM's steps where nothing happens: its asymptotic range begins late, so Karras stands in there
        for grid in ("lambda", "karras" if type(schedule).__name__ == "EDM" else "time"):
            plans = [fs.make_plan(name, schedule, n, grid=grid) for n in (case.coarse, 2 * case.coarse)]
            errors = [float((fs.sample(denoiser, x, plan) - exact).square().mean().sqrt()) for plan in plans]
            observed = math.log2(errors[0] / errors[1])
            assert observed > case.order - 0.15, (name, grid)
            assert case.at_least or observed < case.order + 0.15, (name, grid)
            tested += 1
    assert tested == 2 * sum(not case.stochastic for case in SOLVERS.values())


@pytest.mark.parametrize("schedule", FINITE.values(), ids=FINITE)
def test_orders_of_the_drift_of_stochastic_solvers(schedule):
    """With D = sin(lambda) the mean of the SDE has a closed form: (e^{-z}-weighted integral of sine)."""
    tested = 0
    for name, case in SOLVERS.items():
        if not case.stochastic:
            continue
        eta = 1e9 if case.renews else getattr(fs.solvers.make_solver(name), "eta", 0.0)
        rate = 1.0 + eta ** (2 if name == "ddpm" else 1)
        a, b = (float(schedule.lam(t)) for t in (schedule.t_start, schedule.t_end))

        def antiderivative(lam, rate=rate):
            return rate * (rate * math.sin(lam) - math.cos(lam)) / (rate**2 + 1)

        shift = float(schedule.alpha(schedule.t_end)) * (antiderivative(b) - math.exp(-rate * (b - a)) * antiderivative(a))
        decay = float(schedule.sigma(schedule.t_end) / schedule.sigma(schedule.t_start)) * math.exp(-(rate - 1.0) * (b - a))
        x = noise(schedule)
        errors = []
        first = max(320, case.coarse)
        for n in (first, 2 * first):
            plan = without_noise(fs.make_plan(name, schedule, n, grid="lambda"))
            run = fs.sample(lambda x, t: torch.full_like(x, math.sin(float(schedule.lam(t)))), x, plan)
            errors.append(float((run - (decay * x + shift)).abs().max()))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(case.order, abs=0.15), name
        tested += 1
    assert tested == sum(case.stochastic for case in SOLVERS.values())


# RMS end-point errors of independent implementations (the authors' formulas, fixed-step RK4 reference) on a two-dimensional isotropic
# mixture, VP-linear from 1 to 0.01, uniform lambda: printed to two digits
TABLE = {
    "ddim": {10: 1.8e-1, 20: 9.4e-2, 40: 4.9e-2, 80: 2.6e-2, 160: 1.3e-2, 320: 6.9e-3},
    "dpmpp_2m": {10: 4.2e-2, 20: 1.1e-2, 40: 2.7e-3, 80: 6.7e-4, 160: 1.7e-4, 320: 4.1e-5},
    "dpmpp_2m_taylor": {10: 7.3e-2, 20: 1.8e-2, 40: 4.2e-3, 80: 1.0e-3, 160: 2.6e-4, 320: 6.5e-5},
    "dpmpp_3m_official": {10: 3.7e-2, 20: 5.5e-3, 40: 1.1e-3, 80: 2.4e-4, 160: 5.5e-5, 320: 1.3e-5},
    "dpmpp_3m": {10: 3.3e-2, 20: 6.1e-3, 40: 9.4e-4, 80: 1.2e-4, 160: 1.5e-5, 320: 1.8e-6},
}


def test_errors_are_those_of_independent_implementations():
    schedule = fs.schedules.VPLinear(t_end=0.01)
    denoiser = fs.exact.GaussianMixture(schedule, MEANS, torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64), WEIGHTS)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = exact_solution(denoiser, x)
    for name, row in TABLE.items():
        for nfe, error in row.items():
            run = fs.sample(denoiser, x, fs.make_plan(name, schedule, nfe, grid="lambda"))
            assert float((run - exact).square().sum(1).mean().sqrt()) == pytest.approx(error, rel=0.1), (name, nfe)


def same(a, b, schedule, tolerance=1e-12):
    x, denoiser = noise(schedule), mixture(schedule)
    one, two = (fs.sample(denoiser, x, plan, seeds=range(16)) for plan in (a, b))
    scale = float(two.abs().max())
    assert float((one - two).abs().max()) < tolerance * max(1.0, scale)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", ["t_end", "zero"])
def test_first_order_is_ddim(name, final):
    schedule = SCHEDULES[name]
    for nfe in (1, 2, 7, 20):
        grid = "lambda"
        same(
            fs.make_plan("dpmpp_1", schedule, nfe, grid=grid, final=final),
            fs.make_plan("ddim", schedule, nfe, grid=grid, final=final),
            schedule,
        )
        sde = fs.make_plan("dpmpp_1", schedule, nfe, grid=grid, final=final, eta=1.0)
        same(sde, fs.make_plan("ddpm", schedule, nfe, grid=grid, final=final), schedule, 1e-10)


def test_ddim_eta_is_the_papers():
    schedule, eta = fs.schedules.VPLinear(), 0.6
    plan = fs.make_plan("ddim", schedule, 9, eta=eta)
    alpha, sigma = schedule.alpha(plan.grid), schedule.sigma(plan.grid)
    paper = eta * np.sqrt(sigma[1:] ** 2 / sigma[:-1] ** 2 * (1 - alpha[:-1] ** 2 / alpha[1:] ** 2))
    np.testing.assert_allclose([row.noise.scale for row in plan.rows], paper, rtol=1e-9)


def test_published_second_order_formulas():
    schedule = fs.schedules.VPCosine()
    for variant in ("midpoint", "taylor"):
        plan = fs.make_plan("dpmpp_2m", schedule, 6, variant=variant, grid="time")
        lam, alpha, sigma = (f(plan.grid) for f in (schedule.lam, schedule.alpha, schedule.sigma))
        for i in range(1, 6):
            h, r0 = lam[i + 1] - lam[i], (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
            slope = -math.expm1(-h) / 2 if variant == "midpoint" else math.expm1(-h) / h + 1
            expected = alpha[i + 1] * np.array([-math.expm1(-h) + slope / r0, -slope / r0])
            np.testing.assert_allclose(plan.rows[i].weights, expected, rtol=1e-10)
            np.testing.assert_allclose(plan.rows[i].carry, [sigma[i + 1] / sigma[i]], rtol=1e-14)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_third_order_formula_with_and_without_the_factor(factor):
    schedule = fs.schedules.VPLinear()
    plan = fs.make_plan("dpmpp_3m" if factor == 2.0 else "dpmpp_3m_official", schedule, 7, grid="time")
    lam, alpha = schedule.lam(plan.grid), schedule.alpha(plan.grid)
    for i in range(2, 7):
        h = lam[i + 1] - lam[i]
        r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
        phi2 = math.expm1(-h) / h + 1
        phi3 = phi2 / h - 0.5
        d10, d11 = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1
        d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
        d2 = factor * (d10 - d11) / (r0 + r1)
        expected = alpha[i + 1] * (-math.expm1(-h) * np.array([1, 0, 0]) + phi2 * d1 - phi3 * d2)
        np.testing.assert_allclose(plan.rows[i].weights, expected, rtol=1e-8, atol=1e-12)


def test_a_gaussian_keeps_its_moments_under_stochastic_solvers():
    """20,000 samples, 50 calls: mean and covariance within 4 standard errors of the marginal's, plus the bias of the discretisation."""
    schedule = fs.schedules.VPLinear(t_end=0.05)
    exact = fs.exact.Gaussian(schedule, torch.tensor([0.7, -0.2]), torch.tensor([0.5, 1.5]))
    count, alpha, sigma = 20_000, float(schedule.alpha(0.05)), float(schedule.sigma(0.05))
    x = fs.draw_noise((2,), range(count), dtype=torch.float64)
    run = fs.sample(exact, x, fs.make_plan("dpmpp_2m_sde", schedule, 50, grid="lambda"), seeds=range(count))
    variance = alpha**2 * torch.tensor([0.5, 1.5]) + sigma**2
    assert ((run.mean(0) - alpha * torch.tensor([0.7, -0.2])).abs() < 4 * (variance / count).sqrt()).all()
    assert ((run.var(0) - variance).abs() < 4 * variance * math.sqrt(2 / count) + 2e-3).all()
    assert abs(float(torch.corrcoef(run.T)[0, 1])) < 4 / math.sqrt(count)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_number_of_calls_grid_and_end(name):
    """1 to 50 calls: finite, no warning, and every call has weight in the sample."""
    schedule, tested = SCHEDULES[name], 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for grid in grid_names():
            try:
                fs.make_plan("ddim", schedule, 2, grid=grid)
            except GridError:
                continue  # a rule that does not fit this schedule; test_grids says which
            for solver in SOLVERS:
                for final in ("t_end", "zero"):
                    thorough = solver == "dpmpp_3m_sde" and grid in ("auto", "karras", "trailing")
                    for nfe in range(1, 51) if thorough else (1, 2, 3, 15):
                        plan = fs.make_plan(solver, schedule, nfe, grid=grid, final=final)
                        assert plan.nfe == nfe
                        assert all(any(abs(w) > 0 for w in row.weights) for row in plan.rows)
                        # no null steps: a time comes back only as the second call of a step and the first of the next
                        assert Counter(plan.tau.tolist()).most_common(1)[0][1] <= min(2, fs.solvers.make_solver(solver).stages)
                    tested += 1
    assert tested >= 10 * len(SOLVERS) * 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_samples_are_finite_and_clean_at_zero(name):
    schedule = SCHEDULES[name]
    denoiser, x = mixture(schedule), noise(schedule, 8)
    for solver in SOLVERS:
        for nfe in (1, 2, 5, 30):
            plan = fs.make_plan(solver, schedule, nfe, final="zero")
            run = fs.sample(denoiser, x, plan, seeds=range(8), trajectory=True)
            torch.testing.assert_close(
                run.samples, run.predictions[-1] * float(schedule.alpha(plan.grid[-1])), rtol=1e-9, atol=1e-9
            )


def test_one_call_per_step_and_lowered_last_steps():
    plan = fs.make_plan("dpmpp_3m", fs.schedules.VPLinear(), 8, lower_order_final=10)
    assert [len(row.weights) for row in plan.rows] == [1, 2, 3, 3, 3, 3, 2, 1]
    assert [len(row.weights) for row in fs.make_plan("dpmpp_3m", fs.schedules.VPLinear(), 12, lower_order_final=10).rows][-2:] == [
        3,
        3,
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.solvers.DDIM(eta=1.5), r"\[0, 1\]"),
        (lambda: fs.solvers.DPMSolverPP(order=4), "orders 1, 2 and 3"),
        (lambda: fs.solvers.DPMSolverPP(eta=-1.0), r"\[0, 10\]"),
        (lambda: fs.solvers.DPMSolverPP(variant="mid"), "Did you mean 'midpoint'"),
        (lambda: fs.solvers.DPMSolverPP(compat="published"), "official"),
        (lambda: fs.make_plan("dpmp_2m", fs.schedules.EDM(), 3), "Did you mean 'dpmpp_2m'"),
    ],
)
def test_refused(make, message):
    with pytest.raises((ValueError, UnknownNameError), match=message):
        make()


@pytest.mark.parametrize("wrong", [True, 2.0, "2", 0, 7, None])
def test_orders_are_ints_that_exist(wrong):
    s = fs.solvers
    makes = [
        *(lambda order, kind=kind: kind(order=order) for kind in (s.Adams, s.DEIS, s.IPNDM, s.UniPC, s.DPMSolver, s.DPMSolverPP)),
        *(lambda order, kind=kind: kind(order=order) for kind in (s.DPMSolverSinglestep, s.DPMSolverPPSinglestep)),
        lambda order: s.DPMSolverV3(fs.statistics.ModelStatistics.degenerate(fs.schedules.EDM()), order=order),
        lambda order: s.SASolver(predictor=order),
        lambda order: s.SASolver(corrector=7 if order == 0 else order),  # 0 leaves the corrector out
        lambda order: s.Compensated(s.UniPC(), (1.0,), degree=order),
    ]
    assert len(makes) == 12
    for make in makes:
        with pytest.raises(ValueError, match="got "):
            make(wrong)


def test_a_little_noise_is_possible():
    for eta in (1e-9, 1e-3):
        assert fs.solvers.DDIM(eta=eta).plan(fs.schedules.EDM(), 20).stochastic
        assert fs.solvers.DPMSolverPP(eta=eta).plan(fs.schedules.EDM(), 20).stochastic


@pytest.mark.parametrize("name", SOLVERS)
def test_batch_half_precision_and_gradients(name):
    """Every solver: a sample does not depend on its batch, a bfloat16 network under a float32 state is close, gradients reach the start."""
    schedule = fs.schedules.VPLinear()
    denoiser, x = mixture(schedule), noise(schedule, 6).float()
    plan = fs.make_plan(name, schedule, 9)
    whole = fs.sample(denoiser, x, plan, seeds=range(6))
    parts = [fs.sample(denoiser, x[i : i + 1], plan, seeds=[i]) for i in (4, 0)]
    assert torch.equal(torch.cat(parts), whole[[4, 0]])

    def network(x, t):
        assert x.dtype is torch.bfloat16
        return denoiser(x.float(), t.double().numpy()).bfloat16()

    half = fs.Denoiser(network, schedule, "data", network_dtype=torch.bfloat16)
    rough = fs.sample(half, x, plan, seeds=range(6))
    assert rough.dtype is torch.float32
    assert float((rough - whole).abs().median()) < 0.05  # bfloat16 has 3 digits; noise predictions magnify them near alpha = 0
    start = x.clone().requires_grad_()
    fs.sample(denoiser, start, plan, seeds=range(6)).sum().backward()
    assert bool(torch.isfinite(start.grad).all())
    assert float(start.grad.abs().max()) > 0.0


def test_an_unknown_name_shows_the_near_ones_and_where_all_are():
    with pytest.raises(fs.FewstepError, match="Did you mean 'dpmpp_2m'") as caught:
        fs.solvers.make_solver("dpmpp2m")
    assert "`fewstep solvers`" in str(caught.value)
    assert "teleport" not in str(caught.value)
    assert len(str(caught.value)) < 250
    with pytest.raises(fs.FewstepError, match="EDMHeun is a class; solvers of it are edm_heun"):
        fs.solvers.make_solver("EDMHeun")


def test_an_option_that_a_solver_has_not_is_refused_with_those_it_has():
    with pytest.raises(TypeError, match=r"ordr is no option of the solver 'unipc', which has: corrector, .*order"):
        fs.make_plan("unipc", fs.schedules.EDM(), 4, ordr=3)


def test_the_name_of_every_solver_is_found_again():
    for name in fs.solver_names():
        solver = fs.solvers.make_solver(name)
        found = fs.solvers.name_of(solver.described())
        assert found is None or fs.solvers.make_solver(found[0], **found[1]) == solver
