"""DEIS and iPNDM: coefficients, limits, the fourth order, and diffusers' schedulers step for step."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cases import SCHEDULES
from scipy.integrate import quad
from test_solvers import exact_solution, mixture, noise, same

import fewstep as fs
from fewstep.errors import UnknownNameError
from fewstep.solvers import DEIS, IPNDM

VARIABLES = ("t", "rho", "logrho")


def places(variable, schedule, times):
    rho = np.exp(-schedule.lam(times))
    return {"t": times, "rho": rho, "logrho": np.log(rho)}[variable]


def regular(plan, schedule):
    """The calls whose step lies between finite lambdas."""
    lam = schedule.lam(plan.grid)
    return [i for i in range(plan.nfe) if np.isfinite(lam[i : i + 2]).all()]


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_coefficients_add_up_to_the_step_in_rho(name, variable):
    schedule, tested = SCHEDULES[name], 0
    for nfe in (1, 2, 6, 20):
        plan = DEIS(4, variable, compat="official").plan(schedule, nfe)
        alpha, sigma = schedule.alpha(plan.grid), schedule.sigma(plan.grid)
        for i in regular(plan, schedule):
            step = sigma[i + 1] - alpha[i + 1] * sigma[i] / alpha[i]
            size = sum(map(abs, plan.rows[i].weights))
            assert math.fsum(plan.rows[i].weights) == pytest.approx(step, abs=2e-14 * size)
            tested += 1
    assert tested >= 22


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "edm", "flow", "betas"])
def test_coefficients_are_the_papers_integrals(name, variable):
    """Equation 15 by adaptive quadrature, told of the kinks of a table."""
    schedule = SCHEDULES[name]
    plan = DEIS(4, variable, compat="official").plan(schedule, 7, grid="karras")
    lam, u = schedule.lam(plan.grid), places(variable, schedule, plan.grid)
    kinks = schedule.lam(np.arange(1, 1001) / 1000) if name == "betas" else np.zeros(0)
    for i in (3, 6):
        inside = np.sort(kinks[(kinks > lam[i]) & (kinks < lam[i + 1])])
        edges = [lam[i], *inside, lam[i + 1]] if variable == "t" else [lam[i], lam[i + 1]]
        for j, weight in enumerate(plan.rows[i].weights):
            others = [u[i - k] for k in range(len(plan.rows[i].weights)) if k != j]

            def integrand(at, own=u[i - j], others=others):
                here = float(places(variable, schedule, schedule.t_of_lam(at)))
                return -math.exp(-at) * math.prod((here - other) / (own - other) for other in others)

            pairs = itertools.pairwise(edges)
            integral = math.fsum(quad(integrand, a, b, epsabs=0.0, epsrel=1e-13, limit=200)[0] for a, b in pairs)
            assert weight == pytest.approx(float(schedule.alpha(plan.grid[i + 1])) * integral, rel=2e-11)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", [*(DEIS(1, variable) for variable in VARIABLES), IPNDM(1)])
def test_first_order_is_ddim(name, solver):
    schedule = SCHEDULES[name]
    for nfe in (1, 2, 9):
        same(solver.plan(schedule, nfe), fs.make_plan("ddim", schedule, nfe), schedule)


def test_in_edms_time_t_is_rho():
    schedule = fs.schedules.EDM()
    for grid in ("karras", "lambda"):
        a, b = (DEIS(4, variable).plan(schedule, 9, grid=grid) for variable in ("t", "rho"))
        for one, two in zip(a.rows, b.rows, strict=True):
            np.testing.assert_allclose(one.weights, two.weights, rtol=1e-11, atol=1e-13 * max(map(abs, two.weights)))


def test_log_rho_is_the_second_order_dpm_solver_in_the_noise():
    """x_t = (a_t/a_s) x - s_t (e^h - 1) e_0 - s_t ((e^h - 1)/h - 1) (e_0 - e_1)/r, the "taylor" 2M with noise predictions."""
    schedule = fs.schedules.VPLinear()
    plan = DEIS(2, "logrho").plan(schedule, 6, grid="time")
    lam, sigma = schedule.lam(plan.grid), schedule.sigma(plan.grid)
    for i in range(1, 6):
        h = lam[i + 1] - lam[i]
        slope = (math.expm1(h) / h - 1) * h / (lam[i] - lam[i - 1])
        np.testing.assert_allclose(plan.rows[i].weights, -sigma[i + 1] * np.array([math.expm1(h) + slope, -slope]), rtol=1e-11)


# RMS end-point errors of an independent implementation (40,000-point sums, fixed-step RK4 reference) on an isotropic mixture, VP-linear
# from 1 to 0.01, uniform lambda, the published start: printed to two digits
TABLE = {
    "t": {10: 2.4e-2, 20: 4.3e-3, 40: 6.6e-4, 80: 7.0e-5, 160: 5.6e-6, 320: 3.9e-7},
    "rho": {10: 8.8e-2, 20: 1.8e-2, 40: 2.3e-3, 80: 1.9e-4, 160: 1.4e-5, 320: 9.3e-7},
    "logrho": {10: 1.3e-2, 20: 2.1e-3, 40: 2.6e-4, 80: 2.2e-5, 160: 1.5e-6, 320: 9.2e-8},
}


def bench():
    from test_solvers import MEANS, WEIGHTS

    schedule = fs.schedules.VPLinear(t_end=0.01)
    denoiser = fs.exact.GaussianMixture(schedule, MEANS, torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64), WEIGHTS)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return schedule, denoiser, x, exact_solution(denoiser, x)


def test_errors_and_the_fourth_order_where_sampling_starts_in_noise():
    schedule, denoiser, x, exact = bench()

    def error(solver, nfe):
        run = fs.sample(denoiser, x, solver.plan(schedule, nfe, grid="lambda"))
        return float((run - exact).square().sum(1).mean().sqrt())

    for variable, row in TABLE.items():
        published = {nfe: error(DEIS(4, variable, compat="official"), nfe) for nfe in row}
        assert published == pytest.approx(row, rel=0.1)
        for compat in ("exact", "official"):
            for order in (2, 3, 4):
                solver = DEIS(order, variable, compat=compat)
                slope = math.log2(error(solver, 160) / error(solver, 320))
                assert slope == pytest.approx(order, abs=0.2), solver


def test_ipndm_has_its_order_on_a_grid_uniform_in_rho():
    """And 2 elsewhere, which `test_orders` measures. The start in pure noise leaves no trace."""
    schedule = fs.schedules.EDM(t_start=80.0, t_end=20.0)
    denoiser, x = mixture(schedule), noise(schedule)
    exact = exact_solution(denoiser, x)
    for order in (2, 3, 4):
        errors = [
            float((fs.sample(denoiser, x, IPNDM(order).plan(schedule, nfe, grid="time")) - exact).abs().max()) for nfe in (40, 80)
        ]
        assert math.log2(errors[0] / errors[1]) > min(order, 2) - 0.3
    row = IPNDM(4).plan(schedule, 8, grid="time").rows[-1]
    full = DEIS(4, "rho").plan(schedule, 8, grid="time").rows[-1]
    np.testing.assert_allclose(row.weights, full.weights, rtol=1e-10)


def run_scheduler(scheduler, plan, schedule, denoiser, x):
    """diffusers' loop on the plan's grid in float64. Returns every state."""
    scheduler.set_timesteps(plan.nfe)
    scheduler.sigmas = torch.tensor(np.exp(-schedule.lam(plan.grid)))
    trajectory = [x]
    for label, t in zip(scheduler.timesteps, plan.tau.tolist(), strict=True):
        state = trajectory[-1]
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        eps = (state - alpha * denoiser(state, t)) / sigma
        trajectory.append(scheduler.step(eps, label, state).prev_sample)
    return torch.stack(trajectory)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("order", [1, 2, 3])
def test_diffusers_deis_step_for_step(order):
    diffusers = pytest.importorskip("diffusers", minversion="0.32")
    schedule = fs.schedules.VPLinear()
    denoiser, x = mixture(schedule), noise(schedule)
    scheduler = diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=False)
    plan = DEIS(order, "logrho", compat="official").plan(schedule, 12, grid="lambda")
    theirs = run_scheduler(scheduler, plan, schedule, denoiser, x)
    ours = fs.sample(denoiser, x, plan, trajectory=True).states
    # the authors of diffusers subtract antiderivatives, which cancel
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
def test_diffusers_ipndm_step_for_step():
    diffusers = pytest.importorskip("diffusers", minversion="0.32")
    sigmas = np.float32(
        [0.984375, 0.96875, 0.9375, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    )  # its own table: sigma, in float32
    schedule = fs.schedules.VPLinear()
    grid = schedule.t_of_lam(0.5 * np.log1p(-(np.float64(sigmas) ** 2)) - np.log(np.float64(sigmas)))
    plan = IPNDM(4).plan(schedule, grid=grid)
    denoiser, x = mixture(schedule), noise(schedule)
    scheduler = diffusers.IPNDMScheduler(trained_betas=sigmas)
    scheduler.set_timesteps(plan.nfe)
    state, theirs = x, [x]
    for label, t in zip(scheduler.timesteps, plan.tau.tolist(), strict=True):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        d = denoiser(state, t)
        state = scheduler.step(alpha * (state - alpha * d) / sigma - sigma * d, label, state).prev_sample  # it takes velocities
        theirs.append(state)
    ours = fs.sample(denoiser, x, plan, trajectory=True).states
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=0, atol=1e-5)  # its alphas are rounded to float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DEIS(5), "orders 1 to 4"),
        (lambda: DEIS(variable="lambda"), "variable"),
        (lambda: DEIS(compat="published"), "official"),
        (lambda: IPNDM(0), "orders 1 to 4"),
    ],
)
def test_refused(make, message):
    with pytest.raises((ValueError, UnknownNameError), match=message):
        make()
