"""UniPC against the paper's linear systems, diffusers, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import SCHEDULES
from test_solvers import MEANS, WEIGHTS, exact_solution, mixture, noise, same

import fewstep as fs
from fewstep.errors import UnknownNameError
from fewstep.numerics import exponential_weights
from fewstep.solvers import DPMSolverPP, UniPC


def test_predictors_are_solvers_that_are_known():
    for name in ("vp_linear", "vp_cosine_full", "flow_full", "edm", "zero_snr"):
        schedule = SCHEDULES[name]
        for final in ("t_end", "zero"):

            def plan(solver, final=final, schedule=schedule):
                return solver.plan(schedule, 9, grid="lambda", final=final)

            same(plan(UniPC(order=1, corrector=False)), plan(fs.solvers.DDIM()), schedule)
            same(plan(UniPC(order=1, corrector=False, prediction="noise")), plan(fs.solvers.DDIM()), schedule)
            two = plan(UniPC(order=2, corrector=False, shortcut="bh2"))
            same(two, plan(fs.solvers.DPMSolverPP(order=2)), schedule)
            two = plan(UniPC(order=2, corrector=False, shortcut="none"))
            same(two, plan(fs.solvers.DPMSolverPP(order=2, variant="taylor")), schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_third_order_dpm_solver_is_unip_corrected_in_its_first_step(name):
    """Every row. The midpoint variant differs in its one step of order 2, UniP-3 alone in the row after the first step as well."""
    schedule = SCHEDULES[name]
    first = int(np.isinf(schedule.lam(schedule.t_start)))  # the first step between finite lambdas
    for nfe in range(1, 31):
        others = tuple(step for step in range(nfe) if step != first)
        corrected = UniPC(order=3, shortcut="none", corrector_skip=others)
        taylor, midpoint, ours, predictor = (
            solver.plan(schedule, nfe, "time").rows
            for solver in (DPMSolverPP(order=3, variant="taylor"), DPMSolverPP(order=3), corrected, UniPC(corrector=False))
        )
        for i in range(nfe):
            assert_same_row(ours[i], taylor[i])
            if i != first + 1:
                assert_same_row(ours[i], midpoint[i])
                assert_same_row(ours[i], predictor[i])


def assert_same_row(one, two):
    scale = max(1.0, *np.abs(two.weights))
    np.testing.assert_allclose(one.carry, two.carry, rtol=1e-12)
    np.testing.assert_allclose(one.weights, two.weights, rtol=1e-12, atol=1e-12 * scale)


def test_the_free_function_cancels_without_shortcuts():
    """bh1 and bh2 differ in the two shortcuts alone: from the third step on, UniPC-3's rows are the same."""
    schedule = fs.schedules.EDM()
    plans = [UniPC(order=3, shortcut=shortcut).plan(schedule, 9, grid="lambda") for shortcut in ("bh1", "bh2", "none")]
    for i in range(3, 9):
        assert plans[0].rows[i].weights == plans[1].rows[i].weights == plans[2].rows[i].weights
    assert plans[0].rows[1].weights != plans[1].rows[1].weights != plans[2].rows[1].weights


def papers_step(m, x, lam, scale, kept, order, b, hh, new=None):
    """x_t of algorithms 1-4, by the R and b of the paper. m, lam: newest first, lam[0] at s; new: (lam_t, m_t)."""
    phi, factorial, right = math.expm1(hh) / hh - 1, 1.0, []
    for i in range(1, order + 1):
        right.append(phi * factorial / b)
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    ratios = [(lam[k] - lam[0]) / abs(hh) for k in range(1, order)] + [1.0]
    left = np.array([[r**i for r in ratios] for i in range(order)])
    differences = [(m[k] - m[0]) / ratios[k - 1] for k in range(1, order)]
    base = kept * x - scale * math.expm1(hh) * m[0]
    if new is not None:
        rho = np.array([0.5]) if order == 1 else np.linalg.solve(left, right)
        return base - scale * b * (sum(r * d for r, d in zip(rho, differences, strict=False)) + rho[-1] * (new - m[0]))
    if order == 1:
        return base
    rho = np.array([0.5]) if order == 2 else np.linalg.solve(left[:-1, :-1], right[:-1])
    return base - scale * b * sum(r * d for r, d in zip(rho, differences, strict=True))


def papers_run(schedule, network, x, times, order, shortcut, prediction, skip=(), lower=False):
    lam, alpha, sigma = schedule.lam(times), schedule.alpha(times), schedule.sigma(times)
    scale, kept = (alpha, sigma) if prediction == "data" else (sigma, alpha)
    convert = (lambda x, d, i: d) if prediction == "data" else (lambda x, d, i: (x - alpha[i] * d) / sigma[i])
    m, n = [convert(x, network(x, times[0]), 0)], len(times) - 1
    for i in range(n):
        h = lam[i + 1] - lam[i]
        hh = -h if prediction == "data" else h
        b = hh if shortcut == "bh1" else math.expm1(hh)
        p = min(order, i + 1, n - i if lower else order)
        given = (m, x, lam[i::-1], scale[i + 1], kept[i + 1] / kept[i], p, b, hh)
        predicted = papers_step(*given)
        if i + 1 == n:
            return predicted
        new = convert(predicted, network(predicted, times[i + 1]), i + 1)
        x = predicted if i in skip else papers_step(*given, new=new)
        m = [new, *m]
    return x


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("shortcut", ["bh1", "bh2"])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_the_papers_algorithm(order, shortcut, prediction):
    schedule = fs.schedules.VPCosine()
    x, denoiser = noise(schedule), mixture(schedule)
    for skip, lower in (((), False), ((0, 3), True)):
        solver = UniPC(order, shortcut=shortcut, prediction=prediction, corrector_skip=skip, lower_order_final=lower)
        plan = solver.plan(schedule, 8, grid="time")
        paper = papers_run(schedule, denoiser, x, plan.grid, order, shortcut, prediction, skip, lower)
        # the paper's systems lose digits as the order grows
        torch.testing.assert_close(fs.sample(denoiser, x, plan), paper, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shortcut", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_step_for_step_with_diffusers(order, shortcut, prediction):
    """Every state, to 1e-6, with their sigmas as our grid. Their bh1 is NaN in the last step, into sigma = 0: there ours is finite."""
    diffusers = pytest.importorskip("diffusers", minversion="0.32")
    peer = diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type=shortcut, disable_corrector=[1], predict_x0=prediction == "data", final_sigmas_type="zero"
    )
    peer.set_timesteps(9)
    peer.sigmas = peer.sigmas.double()  # as they are, rounded to float32
    schedule = fs.schedules.FromAlphasCumprod(peer.alphas_cumprod.double().tolist())
    grid = schedule.t_of_lam(-np.log(np.maximum(peer.sigmas.numpy(), 1e-300)))
    grid[-1] = schedule.t_zero
    x, denoiser = noise(schedule), mixture(schedule)
    solver = UniPC(order, shortcut=shortcut, prediction=prediction, corrector_skip=(1,), lower_order_final=True)
    run = fs.sample(denoiser, x, solver.plan(schedule, grid=grid), trajectory=True)
    state = x.clone()
    for i, t in enumerate(peer.timesteps):
        torch.testing.assert_close(state, run.states[i], rtol=1e-6, atol=1e-6)
        alpha, sigma = float(schedule.alpha(grid[i])), float(schedule.sigma(grid[i]))
        state = peer.step((state - alpha * denoiser(state, float(grid[i]))) / sigma, t, state).prev_sample
    assert bool(torch.isfinite(run.samples).all())
    if shortcut == "bh1":
        assert bool(torch.isnan(state).any())
    elif prediction == "data":
        torch.testing.assert_close(state, run.samples, rtol=1e-6, atol=1e-6)


def test_orders_from_noise():
    """On an interval that starts in noise the first step costs nothing, and UniPC-p shows its p + 1."""
    schedule = fs.schedules.VPLinear(t_end=0.01)
    denoiser = fs.exact.GaussianMixture(schedule, MEANS, torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64), WEIGHTS)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = exact_solution(denoiser, x)

    def errors(solver, *calls):
        runs = (fs.sample(denoiser, x, solver.plan(schedule, n, grid="lambda")) for n in calls)
        return [float((run - exact).square().sum(1).mean().sqrt()) for run in runs]

    for solver, order in (
        (UniPC(order=3, corrector=False), 3),
        (UniPC(order=1), 2),
        (UniPC(order=2, shortcut="bh2"), 3),
        (UniPC(order=3), 4),
        (UniPC(order=3, shortcut="none"), 4),
        (UniPC(order=3, prediction="noise"), 4),
        (UniPC(order=4), 5),
        (UniPC(order=4, prediction="noise"), 5),
    ):
        coarse, fine = errors(solver, 160, 320)
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15), solver


# RMS end-point errors of an independent implementation on the bench of test_solvers.TABLE, printed to two digits
TABLE = {
    ("bh1", 1): {10: 6.2e-2, 20: 1.7e-2, 320: 7.2e-5},
    ("bh2", 1): {10: 1.0e-1, 20: 3.1e-2, 320: 1.6e-4},
    ("bh2", 2): {10: 3.6e-2, 20: 4.9e-3, 40: 8.5e-4, 80: 1.3e-4, 160: 1.7e-5, 320: 2.2e-6},
    ("bh1", 3): {10: 3.8e-2, 20: 4.3e-3, 40: 2.8e-4, 80: 1.8e-5, 160: 1.2e-6, 320: 7.4e-8},
}


def test_errors_are_those_of_an_independent_implementation():
    schedule = fs.schedules.VPLinear(t_end=0.01)
    denoiser = fs.exact.GaussianMixture(schedule, MEANS, torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64), WEIGHTS)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = exact_solution(denoiser, x)
    for (shortcut, order), row in TABLE.items():
        for nfe, error in row.items():
            run = fs.sample(denoiser, x, UniPC(order, shortcut=shortcut).plan(schedule, nfe, grid="lambda"))
            assert float((run - exact).square().sum(1).mean().sqrt()) == pytest.approx(error, rel=0.1), (shortcut, order, nfe)


def test_a_corrected_step_is_exact_for_polynomials():
    """Weights with the new value integrate a polynomial of degree p in lambda exactly: p = 4, by another quadrature."""
    z, nodes = 0.7, np.array([1.0, 0.0, -0.8, -1.9, -3.0])
    u, w = np.polynomial.legendre.leggauss(40)
    u, w = 0.5 * (u + 1.0), 0.5 * w
    expected = w @ (z * np.exp(-z * (1 - u)) * (u**4 - 2 * u**3 + 1))
    assert exponential_weights(nodes, z) @ (nodes**4 - 2 * nodes**3 + 1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniPC(order=0), "orders 1 to 6"),
        (lambda: UniPC(shortcut="bh3"), "bh1"),
        (lambda: UniPC(prediction="velocity"), "noise"),
        (lambda: UniPC(corrector=False, corrector_skip=(0,)), "Leave it out"),
        (lambda: UniPC(corrector_skip=(-1,)), "from 0"),
    ],
)
def test_refused(make, message):
    with pytest.raises((ValueError, UnknownNameError), match=message):
        make()
