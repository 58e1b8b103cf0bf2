"""DPM-Solver and DPM-Solver++ against the published formulas, against diffusers, and in their limits."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import BETAS, FINITE, SCHEDULES
from test_solvers import exact_solution, mixture, noise, same, without_noise

import fewstep as fs
from fewstep.errors import UnknownNameError
from fewstep.grids import make_grid
from fewstep.solvers import DEIS, DPMSolver, DPMSolverPP, DPMSolverPPSinglestep, DPMSolverSinglestep

MULTISTEP = {True: DPMSolver, False: DPMSolverPP}
SINGLESTEP = {True: DPMSolverSinglestep, False: DPMSolverPPSinglestep}
STOCHASTIC = ["ddpm", "dpmpp_1_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s_sde", "dpmpp_3s_sde"]


def published(schedule, denoiser, x, steps, of_noise, variant):
    """The steps of arXiv 2206.00927, appendix D.2, and 2211.01095, algorithm 1, one by one: x from s to t through the inner times."""
    f = 1.0 if of_noise else -1.0

    def level(t):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        return (alpha, sigma) if of_noise else (sigma, alpha)

    def predict(x, t):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        d = denoiser(x, t)
        return (x - alpha * d) / sigma if of_noise else d

    for times in steps:
        s, t, order = times[0], times[-1], len(times) - 1
        lam = schedule.lam(times).tolist()
        h = lam[-1] - lam[0]
        (a_s, _), (a_t, b_t) = level(s), level(t)
        e0 = predict(x, s)
        new = a_t / a_s * x - b_t * f * math.expm1(f * h) * f * e0
        if order > 1:
            r1 = (lam[1] - lam[0]) / h
            a_1, b_1 = level(times[1])
            e1 = predict(a_1 / a_s * x - b_1 * math.expm1(f * r1 * h) * e0, times[1])
        if order == 2 and variant == "midpoint":
            new = new - b_t * math.expm1(f * h) / (2 * r1) * (e1 - e0)
        elif order == 2:
            new = new - b_t * (math.expm1(f * h) / (f * h) - 1) / r1 * (e1 - e0)
        elif order == 3:
            r2 = (lam[2] - lam[0]) / h
            a_2, b_2 = level(times[2])
            phi = math.expm1(f * r2 * h) / (f * r2 * h) - 1
            e2 = predict(a_2 / a_s * x - b_2 * math.expm1(f * r2 * h) * e0 - r2 / r1 * b_2 * phi * (e1 - e0), times[2])
            phi_2 = math.expm1(f * h) / (f * h) - 1
            if variant == "midpoint":
                new = new - b_t * phi_2 / r2 * (e2 - e0)
            else:
                d10, d11 = (e1 - e0) / r1, (e2 - e0) / r2
                first, second = (r2 * d10 - r1 * d11) / (r2 - r1), 2 * (d11 - d10) / (r2 - r1)
                new = new - b_t * phi_2 * first - b_t * (phi_2 / (f * h) - 0.5) * second
        x = new
    return x


@pytest.mark.parametrize("inner", ["lambda", "time", "quadratic", "karras"])
@pytest.mark.parametrize("variant", ["midpoint", "taylor"])
@pytest.mark.parametrize("of_noise", [True, False])
def test_single_steps_are_the_published_ones(of_noise, variant, inner):
    schedule, tested = fs.schedules.VPLinear(), 0
    denoiser, x = mixture(schedule), noise(schedule, 8)
    for order in (1, 2, 3):
        for nfe in (1, 2, 3, 7, 9, 11):
            solver = SINGLESTEP[of_noise](order=order, variant=variant, inner=inner, budget="fast")
            plan, calls = solver.plan(schedule, nfe, inner), solver.split(nfe)
            nodes = plan.grid.tolist()
            begins = np.cumsum([0, *calls[:-1]])
            steps = [nodes[b : b + c + 1] for b, c in zip(begins, calls, strict=True)]
            for step, count in zip(steps, calls, strict=True):  # the places inside are those of the grid's rule
                if inner == "lambda":
                    np.testing.assert_allclose(np.diff(schedule.lam(step)), np.ptp(schedule.lam(step)) / count, rtol=1e-8)
                if inner == "time":
                    np.testing.assert_allclose(np.diff(step), (step[-1] - step[0]) / count, rtol=1e-10)
            expected = published(schedule, denoiser, x, steps, of_noise, variant)
            # noise predictions enter with weights of up to 1 / alpha(1) = 150, and few steps multiply these
            torch.testing.assert_close(fs.sample(denoiser, x, plan), expected, rtol=1e-9, atol=1e-9)
            tested += 1
    assert tested == 18


def test_how_calls_are_split():
    """The paper's rule (arXiv 2206.00927, appendix D.3) and the one that keeps the order."""
    fast = [DPMSolverSinglestep(budget="fast").split(n) for n in range(8)]
    assert fast == [[], [1], [2], [2, 1], [3, 1], [3, 2], [3, 2, 1], [3, 3, 1]]
    ours = [DPMSolverSinglestep().split(n) for n in range(8)]
    assert ours == [[], [1], [2], [3], [2, 2], [2, 3], [3, 3], [2, 2, 3]]
    assert [DPMSolverPPSinglestep(budget=b).split(5) for b in ("order", "fast")] == [[2, 2, 1], [2, 2, 1]]
    assert DPMSolverSinglestep(order=1).split(3) == [1, 1, 1]
    for solver in (DPMSolverSinglestep(order=2), DPMSolverSinglestep(), DPMSolverPPSinglestep(order=3, eta=0.5, budget="fast")):
        for name, schedule in SCHEDULES.items():
            for final in ("t_end", "zero"):
                assert [solver.plan(schedule, n, "time", final=final).nfe for n in range(1, 31)] == list(range(1, 31)), name


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", ["t_end", "zero"])
def test_first_order_is_ddim_in_every_form(name, final):
    schedule = SCHEDULES[name]
    for nfe in (1, 2, 7, 20):
        ddim = fs.make_plan("ddim", schedule, nfe, grid="lambda", final=final)
        for solver in (DPMSolver(order=1), DPMSolverSinglestep(order=1), DPMSolverPPSinglestep(order=1)):
            # the noise form multiplies by 1 / alpha at the start and divides again at the end
            same(solver.plan(schedule, nfe, "lambda", final=final), ddim, schedule, 1e-11)


def test_noise_form_is_the_data_form_with_alpha_and_sigma_exchanged():
    """On a Gaussian of unit variance noise and data predictions mirror each other: a run and its mirror image give the same numbers."""
    z = np.linspace(0.01, 3.0, 7)
    from fewstep.solvers.dpm import _interpolant

    for count in (2, 3):
        places = -np.arange(count).astype(float)
        for h in z:
            # integral of h e^{h(1-u)} m: by quadrature
            u, w = np.polynomial.legendre.leggauss(40)
            u, w = 0.5 * (u + 1), 0.5 * w
            for j, weight in enumerate(_interpolant(places, -h, "taylor")):
                basis = np.prod([(u - places[k]) / (places[j] - places[k]) for k in range(count) if k != j], axis=0)
                assert -weight == pytest.approx(float((w * h * np.exp(h * (1 - u)) * basis).sum()), rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_multistep_in_the_noise_is_deis_in_log_rho(name):
    """Every order, start included, there and back; with the midpoint variant all but the steps of order 2."""
    schedule = SCHEDULES[name]
    back = math.isfinite(schedule.lam(schedule.t_end))
    for order in (1, 2, 3):
        deis = DEIS(order=order, variable="logrho")
        for nfe in (1, 2, 3, 8):
            for kind in ("plan", "inverse_plan") if back else ("plan",):
                taylor, midpoint, wanted = (
                    getattr(solver, kind)(schedule, nfe, "time").rows
                    for solver in (DPMSolver(order=order, variant="taylor"), DPMSolver(order=order), deis)
                )
                for one, two, deis_row in zip(taylor, midpoint, wanted, strict=True):
                    for row in (one, two) if len(two.weights) != 2 else (one,):
                        scale = max(1.0, *np.abs(deis_row.weights))
                        np.testing.assert_allclose(row.carry, deis_row.carry, rtol=1e-12, atol=1e-12)
                        np.testing.assert_allclose(row.weights, deis_row.weights, rtol=1e-12, atol=1e-12 * scale)


def test_a_corrected_first_step_does_not_overshoot():
    """From near alpha = 0, and back from near sigma = 0. Without a correction the errors are 0.12 and 0.18; the bounds are twice those."""
    schedule = fs.schedules.Flow(t_start=0.999)
    exact = fs.exact.GaussianMixture(schedule, [[1, 0.5], [-1, -0.3], [0.2, -1.2]], [0.1, 0.2, 0.15], [0.3, 0.5, 0.2])
    x = fs.draw_noise((2,), range(64), dtype=torch.float64)
    run, wanted = fs.sample(exact, x, DPMSolver(order=3).plan(schedule, 4, "time")), fs.reference(exact, x, schedule, tol=1e-6)
    assert float((run - wanted.plain()).square().mean().sqrt()) < 0.24
    x = exact.draw(64, seed=0)
    run, wanted = (
        fs.sample(exact, x, DPMSolverPP(order=3).inverse_plan(schedule, 4, "time")),
        fs.invert(exact, x, schedule, tol=1e-6),
    )
    error, scale = (float(values.square().mean().sqrt()) for values in (run - wanted.plain(), wanted.plain()))
    assert error < 0.36 * scale


# ---- diffusers ---------------------------------------------------------------------------------------------------------------------


def diffusers_run(kind, denoiser, schedule, x, nfe, **config):
    """A run of a diffusers scheduler with its noise levels in float64, no noise drawn; the states' times."""
    diffusers = pytest.importorskip("diffusers", minversion="0.32")
    scheduler = getattr(diffusers, kind)(
        trained_betas=BETAS, prediction_type="sample", final_sigmas_type="sigma_min", lower_order_final=True, **config
    )
    scheduler.set_timesteps(nfe)
    indices = [*scheduler.timesteps.tolist(), 0]
    times = (np.array(indices) + 1.0) / len(BETAS)
    scheduler.sigmas = torch.from_numpy(schedule.sigma(times) / schedule.alpha(times))
    silent = {"generator": None}
    if kind == "DPMSolverMultistepScheduler":
        silent = {"variance_noise": torch.zeros_like(x)}
    for t, index in zip(times, scheduler.timesteps, strict=False):
        x = scheduler.step(denoiser(x, float(t)), index, x, **silent).prev_sample
    return x, times


@pytest.mark.filterwarnings("ignore")  # their own
@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_multistep_as_diffusers(algorithm, variant):
    schedule = SCHEDULES["betas"]
    denoiser, x = mixture(schedule), noise(schedule)
    for order in (1, 2, 3):
        for nfe in (9, 27):  # numbers for which its rounded times are evenly spaced
            theirs, times = diffusers_run(
                "DPMSolverMultistepScheduler",
                denoiser,
                schedule,
                x,
                nfe,
                algorithm_type=algorithm,
                solver_type=variant,
                solver_order=order,
            )
            options = {"order": order, "variant": "taylor" if variant == "heun" else "midpoint", "lower_order_final": 15}
            if algorithm == "dpmsolver":
                solver = DPMSolver(**options, compat="official")
            else:
                solver = DPMSolverPP(**options, compat="diffusers", eta=float(algorithm.startswith("sde")))
            ours = fs.sample(denoiser, x, without_noise(solver.plan(schedule, grid=times)))
            # its steps are rounded to float32: 6e-8 a step, relative to states of up to 4
            assert float((ours - theirs).abs().max()) < 5e-6, (order, nfe)


@pytest.mark.filterwarnings("ignore")  # their own
@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_singlestep_as_diffusers(algorithm, variant, monkeypatch):
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_dpmsolver_singlestep")
    monkeypatch.setattr(scheduling, "randn_tensor", lambda shape, **_: torch.zeros(shape, dtype=torch.float64))
    schedule = SCHEDULES["betas"]
    denoiser, x = mixture(schedule), noise(schedule)
    for order in (1, 2, 3):
        for nfe in (9, 27, 37):
            theirs, times = diffusers_run(
                "DPMSolverSinglestepScheduler",
                denoiser,
                schedule,
                x,
                nfe,
                algorithm_type=algorithm,
                solver_type=variant,
                solver_order=order,
            )
            split = {1: [1] * nfe, 2: [2] * (nfe // 2) + [1] * (nfe % 2), 3: [3] * (nfe // 3 - 1) + [2, 1] * (nfe % 3 == 0)}[order]
            split = [3] * (nfe // 3) + [1] if order == 3 and nfe % 3 else split
            options = {
                "order": order,
                "variant": "taylor" if variant == "heun" else "midpoint",
                "inner": "time",
                "compat": "diffusers",
            }
            family = DPMSolverSinglestep(**options) if algorithm == "dpmsolver" else None
            solver = family or DPMSolverPPSinglestep(**options, eta=float(algorithm.startswith("sde")))
            plan = solver.plan(schedule, nfe, times[[0, *np.cumsum(split)]])
            np.testing.assert_allclose(plan.grid, times, rtol=1e-12)
            ours = fs.sample(denoiser, x, without_noise(plan))
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_what_is_wrong_elsewhere_is_reproduced_with_its_order():
    """D = sin(lambda), whose mean under the SDE is known: the sign in diffusers' third order costs two orders, the factor one."""
    schedule = FINITE["vp_linear"]
    a, b = (float(schedule.lam(t)) for t in (schedule.t_start, schedule.t_end))

    def error(solver, n):
        rate = 1.0 + solver.eta
        x = noise(schedule)
        plan = without_noise(solver.plan(schedule, n, "lambda"))
        run = fs.sample(lambda x, t: torch.full_like(x, math.sin(float(schedule.lam(t)))), x, plan)
        ends = [rate * (rate * math.sin(lam) - math.cos(lam)) / (rate**2 + 1) for lam in (a, b)]
        shift = float(schedule.alpha(schedule.t_end)) * (ends[1] - math.exp(-rate * (b - a)) * ends[0])
        decay = float(schedule.sigma(schedule.t_end) / schedule.sigma(schedule.t_start)) * math.exp(-solver.eta * (b - a))
        return float((run - (decay * x + shift)).abs().max())

    solvers = [
        DPMSolverPP(order=3, eta=1.0, compat="diffusers"),
        DPMSolverPP(order=3, eta=1.0, compat="official"),
        DPMSolverPP(order=3, compat="diffusers"),
        DPMSolverPPSinglestep(order=3, eta=1.0, variant="taylor", compat="diffusers"),
        DPMSolverPPSinglestep(order=3, eta=1.0, variant="taylor"),
        DPMSolverPPSinglestep(order=2, eta=1.0, variant="taylor"),
        DPMSolverPPSinglestep(order=3, eta=0.5),
    ]
    for solver in solvers:
        order = math.log2(error(solver, 480) / error(solver, 960))
        assert order == pytest.approx(solver.claimed_order, abs=0.15), solver
    assert [solver.claimed_order for solver in solvers] == [1, 2, 2, 1, 3, 2, 3]


# ---- order -------------------------------------------------------------------------------------------------------------------------


def test_third_order_where_it_starts_in_noise():
    """VP-linear from 1 to 0.01, uniform in lambda, N from 324 to 648: slopes within 0.15, variants included."""
    schedule = fs.schedules.VPLinear(t_end=0.01)
    denoiser, x = mixture(schedule), noise(schedule, 8)
    exact = exact_solution(denoiser, x)
    for family in (DPMSolverSinglestep, DPMSolverPPSinglestep):
        for order in (1, 2, 3):
            for variant in ("midpoint", "taylor"):
                solver = family(order=order, variant=variant)
                runs = [fs.sample(denoiser, x, solver.plan(schedule, n, "lambda")) for n in (324, 648)]
                errors = [float((run - exact).square().mean().sqrt()) for run in runs]
                assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15), solver


# ---- noise -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_states_have_the_marginals_variance_on_data_at_zero(name):
    """D = 0: every state, those inside a step included, is Gaussian with deviation sigma."""
    schedule = SCHEDULES[name]
    for solver in STOCHASTIC:
        for nfe in (1, 4, 11):
            for grid in ("lambda", "time"):
                plan = fs.make_plan(solver, schedule, nfe, grid=grid)
                dense, sigma = plan.dense(), schedule.sigma(plan.grid)
                variance = dense.A**2 * sigma[0] ** 2 + (dense.C**2).sum(1)
                np.testing.assert_allclose(variance, sigma**2, rtol=1e-9, err_msg=f"{solver} {nfe} {grid}")


def test_more_steps_approach_the_same_solution_along_the_same_path():
    """Strong convergence, order 1 for additive noise: the distance to one fine run, same seeds, falls by 8 from 32 calls to 256. The
    median over the samples, for a few of them change to another component of the mixture; 5 is asked, which order 1/2 (2.8) misses."""
    schedule = FINITE["vp_linear"]
    denoiser, x = mixture(schedule), noise(schedule, 128)

    def run(name, n, first=0):
        return fs.sample(denoiser, x, fs.make_plan(name, schedule, n, grid="lambda"), seeds=range(first, first + 128))

    def distance(samples):
        return float((samples - fine).square().mean(1).sqrt().median())

    fine = run("dpmpp_2m_sde", 1024)
    apart = distance(run("dpmpp_2m_sde", 256, 128))
    for solver in STOCHASTIC[2:]:
        far, near = (distance(run(solver, n)) for n in (32, 256))
        assert near < far / 5.0, solver
        assert near < 0.01 * apart, solver


@pytest.mark.parametrize("solver", ["dpmpp_2s_sde", "dpmpp_3s_sde", "dpmpp_3m_sde"])
def test_a_gaussian_keeps_its_moments(solver):
    """10,000 samples, 60 calls: mean and variance within 4 standard errors of the marginal's, plus the bias of the discretisation."""
    schedule = fs.schedules.VPLinear(t_end=0.05)
    variances = torch.tensor([0.5, 1.5], dtype=torch.float64)
    exact = fs.exact.Gaussian(schedule, [0.7, -0.2], variances)
    count, alpha, sigma = 10_000, float(schedule.alpha(0.05)), float(schedule.sigma(0.05))
    x = fs.draw_noise((2,), range(count), dtype=torch.float64)
    run = fs.sample(exact, x, fs.make_plan(solver, schedule, 60, grid="lambda"), seeds=range(count))
    variance = alpha**2 * variances + sigma**2
    assert ((run.mean(0) - alpha * torch.tensor([0.7, -0.2])).abs() < 4 * (variance / count).sqrt()).all()
    assert ((run.var(0) - variance).abs() < 4 * variance * math.sqrt(2 / count) + 2e-3).all()


def test_batch_precision_and_gradients():
    """A sample does not depend on its batch; float32 follows float64; a run is differentiable in its start."""
    schedule = fs.schedules.VPLinear()
    denoiser, x = mixture(schedule), noise(schedule, 8)
    for name in ("dpm_3s", "dpm_3m", "dpmpp_3s", "dpmpp_2s_sde"):
        plan = fs.make_plan(name, schedule, 10, grid="time")
        whole = fs.sample(denoiser, x, plan, seeds=range(8))
        assert torch.equal(fs.sample(denoiser, x[2:3], plan, seeds=[2]), whole[2:3])
        # rounding of 6e-8, times weights 1 / alpha of up to 150 for noise predictions
        torch.testing.assert_close(fs.sample(denoiser, x.float(), plan, seeds=range(8)).double(), whole, rtol=1e-3, atol=1e-3)
        start = x.clone().requires_grad_()
        fs.sample(denoiser, start, plan, seeds=range(8)).sum().backward()
        assert start.grad is not None
        assert bool((start.grad.abs() > 0).all())


def test_explicit_grids_take_the_calls_they_pay_for():
    schedule = fs.schedules.VPLinear()
    times = make_grid("lambda", schedule, 4)
    assert DPMSolverSinglestep().plan(schedule, grid=times).nfe == 12
    assert DPMSolverSinglestep().plan(schedule, 9, times).nfe == 9
    assert all(a > b for a, b in pairwise(DPMSolverSinglestep().plan(schedule, grid=times).grid))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMSolver(order=4), "DPM-Solver has orders 1, 2 and 3"),
        (lambda: DPMSolverSinglestep(order=0), "orders 1, 2 and 3"),
        (lambda: DPMSolverPPSinglestep(eta=-1.0), r"\[0, 10\]"),
        (lambda: DPMSolverPPSinglestep(inner="lam"), "Did you mean 'lambda'"),
        (lambda: DPMSolverPPSinglestep(budget="quick"), "fast"),
        (lambda: DPMSolverPPSinglestep(compat="difusers"), "Did you mean 'diffusers'"),
        (lambda: DPMSolver(compat="diffusers"), "official"),
    ],
)
def test_refused(make, message):
    with pytest.raises((ValueError, UnknownNameError), match=message):
        make()
