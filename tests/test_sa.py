"""SA-Solver: limits, piecewise tau, one Brownian path, and diffusers' scheduler with its own noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cases import SCHEDULES
from scipy.integrate import quad
from test_solvers import mixture, noise, same, without_noise

import fewstep as fs
from fewstep.errors import UnknownNameError
from fewstep.evaluate.distances import SlicedWasserstein
from fewstep.noise import BrownianPath
from fewstep.solvers import DPMSolverPP, SASolver


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_corrector_it_is_sde_dpm_solver(name):
    """With the same noise: eta = tau^2."""
    schedule = SCHEDULES[name]
    for nfe, tau in itertools.product((1, 2, 7), (0.0, 1.0, 0.6)):
        for order, variant in ((1, "midpoint"), (2, "taylor")):
            theirs = DPMSolverPP(order, variant, eta=tau**2).plan(schedule, nfe, grid="lambda")
            same(SASolver(order, 0, tau).plan(schedule, nfe, grid="lambda"), theirs, schedule, 1e-10)


def test_weights_are_the_papers_integrals_where_tau_changes_inside_a_step():
    schedule = fs.schedules.VPLinear()
    solver = SASolver(3, 0, 1.3, (0.21, 0.52))
    plan = solver.plan(schedule, 4, grid="time")
    lam, alpha, sigma = (f(plan.grid) for f in (schedule.lam, schedule.alpha, schedule.sigma))
    low, high = schedule.lam([0.52, 0.21])

    def energy(a, b):
        return 1.3**2 * max(0.0, min(b, high) - max(a, low))

    for i in range(2, 4):
        end, nodes = lam[i + 1], lam[i - 2 : i + 1][::-1]
        for j, weight in enumerate(plan.rows[i].weights):

            def integrand(at, j=j, nodes=nodes, end=end):
                basis = math.prod((at - nodes[k]) / (nodes[j] - nodes[k]) for k in range(3) if k != j)
                return (1 + 1.3**2 * (low <= at <= high)) * math.exp(at - end - energy(at, end)) * basis

            cuts = [lam[i], *(edge for edge in (low, high) if lam[i] < edge < end), end]
            parts = (quad(integrand, a, b, epsabs=0.0, epsrel=1e-12)[0] for a, b in itertools.pairwise(cuts))
            assert weight == pytest.approx(alpha[i + 1] * math.fsum(parts), rel=1e-9)
        spent = energy(lam[i], end)
        assert plan.rows[i].carry[0] == pytest.approx(sigma[i + 1] / sigma[i] * math.exp(-spent), rel=1e-12)
        drawn = plan.rows[i].noise
        assert (drawn.scale if drawn else 0.0) == pytest.approx(sigma[i + 1] * math.sqrt(-math.expm1(-2 * spent)), rel=1e-12)
    assert plan.rows[0].noise is None


@pytest.mark.parametrize("solver", [SASolver(2, 3), SASolver(3, 4, 0.7), SASolver(2, 2, 1.0, (0.1, 0.6)), SASolver(1, 0, 2.0)])
def test_a_constant_prediction_is_exact_with_its_noise(solver):
    """D = c: the state is sigma_t e^{-E} x_s / sigma_s + ..., whatever the steps, and its noise has the variance of the SDE."""
    schedule = fs.schedules.VPLinear()
    whole = fs.Plan.dense(solver.plan(schedule, 1))
    for nfe in (2, 5, 16):
        dense = solver.plan(schedule, nfe, grid="time").dense()
        assert dense.A[-1] == pytest.approx(whole.A[-1], rel=1e-9, abs=1e-15)
        assert dense.B[-1].sum() == pytest.approx(whole.B[-1].sum(), rel=1e-9)
        assert (dense.C[-1] ** 2).sum() == pytest.approx((whole.C[-1] ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("interval", [None, (0.2, 0.7)])
def test_steps_follow_one_brownian_path(interval):
    """A finer grid gives the same samples up to the discretisation: the distance falls, and to far less than the noise's own size."""
    schedule = fs.schedules.VPLinear(t_end=0.1)
    denoiser, x = mixture(schedule), noise(schedule, 32)
    solver = SASolver(2, 3, 1.0, interval)
    runs = [fs.sample(denoiser, x, solver.plan(schedule, nfe, grid="lambda"), seeds=range(32)) for nfe in (20, 80, 320)]
    other = fs.sample(denoiser, x, solver.plan(schedule, 320, grid="lambda"), seeds=range(100, 132))
    far, near = (float((run - runs[2]).square().mean().sqrt()) for run in runs[:2])
    assert near < 0.5 * far
    assert near < 0.2 * float((other - runs[2]).square().mean().sqrt())


@pytest.mark.parametrize("schedule", [fs.schedules.VPLinear(), fs.schedules.Flow(), fs.schedules.EDM()], ids=["vp", "flow", "edm"])
def test_the_default_orders_are_the_better_ones_at_few_calls(schedule):
    """Than the authors' 3 and 4, by sliced Wasserstein distance to the data; 2 to 6 times as large was measured."""
    means, weights = [[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2]], [0.3, 0.5, 0.2]
    denoiser = fs.exact.GaussianMixture(schedule, means, [0.1, 0.02, 0.05], weights)
    wanted, distances = denoiser.draw(2000, seed=5).numpy(), []
    for solver in (SASolver(), SASolver(3, 4)):
        plan = solver.plan(schedule, 12)
        x = fs.draw_noise((2,), range(2000), plan, dtype=torch.float64)
        distances.append(SlicedWasserstein(64)(fs.sample(denoiser, x, plan, seeds=range(2000)).numpy(), wanted))
    assert distances[1] > 1.5 * distances[0]


def test_corrector_gains_accuracy_and_order_of_the_drift():
    """D = sin(lambda), tau = 0: the closed form of the ODE."""
    schedule = fs.schedules.Flow(t_start=0.95, t_end=0.05)
    a, b = (float(schedule.lam(t)) for t in (0.95, 0.05))
    x = noise(schedule)

    def integral(at):
        return math.exp(at - b) * (math.sin(at) - math.cos(at)) / 2

    sigma = schedule.sigma([0.95, 0.05])
    exact = float(sigma[1] / sigma[0]) * x + float(schedule.alpha(0.05)) * (integral(b) - integral(a))
    for solver, order in ((SASolver(1, 2, 0.0), 2), (SASolver(2, 0, 0.0), 2), (SASolver(2, 3, 0.0), 3)):
        assert solver.claimed_order == order
        errors = []
        for nfe in (640, 1280):
            plan = solver.plan(schedule, nfe, grid="lambda")
            run = fs.sample(lambda x, t: torch.full_like(x, math.sin(float(schedule.lam(t)))), x, plan)
            errors.append(float((run - exact).abs().max()))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2), solver


@pytest.mark.parametrize("final", ["t_end", "zero"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("compat", ["exact", "official", "diffusers"])
def test_every_compat_is_finite_at_the_ends(name, final, compat):
    schedule = SCHEDULES[name]
    for predictor, corrector, nfe in itertools.product((1, 4), (0, 2, 4), (1, 2, 3, 9)):
        plan = SASolver(predictor, corrector, compat=compat).plan(schedule, nfe, final=final)
        assert plan.nfe == nfe
        run = fs.sample(mixture(schedule), noise(schedule, 4), plan, seeds=range(4))
        assert run.isfinite().all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize(("predictor", "corrector"), [(2, 2), (3, 4), (1, 2), (4, 3)])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_diffusers_step_for_step(predictor, corrector, tau, monkeypatch):
    diffusers = pytest.importorskip("diffusers", minversion="0.32")
    schedule, seeds = fs.schedules.VPLinear(), range(8)
    denoiser, x = mixture(schedule), noise(schedule, 8)
    plan = SASolver(predictor, corrector, tau, compat="diffusers").plan(schedule, 9, grid="lambda")
    path = BrownianPath(seeds, (2,))
    draws = iter([torch.from_numpy(path.normalised(row.noise.begin, row.noise.end)) for row in plan.rows])
    module = diffusers.schedulers.scheduling_sasolver
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(draws))
    scheduler = diffusers.SASolverScheduler(
        predictor_order=predictor, corrector_order=corrector, tau_func=lambda t: torch.tensor(tau, dtype=torch.float64)
    )
    scheduler.set_timesteps(plan.nfe)
    scheduler.sigmas = torch.tensor(np.exp(-schedule.lam(plan.grid)))
    state = x
    for label, t in zip(scheduler.timesteps, plan.tau.tolist(), strict=True):
        eps = (state - float(schedule.alpha(t)) * denoiser(state, t)) / float(schedule.sigma(t))
        state = scheduler.step(eps, label, state).prev_sample
    torch.testing.assert_close(fs.sample(denoiser, x, plan, seeds=seeds), state, rtol=0, atol=1e-6)


def test_official_draws_no_noise_in_the_last_step_and_lowers_the_order():
    plan = SASolver(3, 0, compat="official").plan(fs.schedules.VPLinear(), 7, grid="time")
    assert [row.noise is None for row in plan.rows] == [False] * 6 + [True]
    assert [len(row.weights) for row in plan.rows] == [1, 2, 3, 3, 3, 2, 1]
    assert not SASolver(tau=0.0).plan(fs.schedules.VPLinear(), 7).stochastic
    assert not without_noise(plan).stochastic


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SASolver(0), "orders 1 to 4"),
        (lambda: SASolver(corrector=1), "2 to 4 predictions"),
        (lambda: SASolver(tau=-1.0), "at least 0"),
        (lambda: SASolver(interval=(0.8, 0.2)), "t_low < t_high"),
        (lambda: SASolver(compat="few_steps"), "compat"),
    ],
)
def test_refused(make, message):
    with pytest.raises((ValueError, UnknownNameError), match=message):
        make()
