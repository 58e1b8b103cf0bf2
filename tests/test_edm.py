"""EDM's samplers against algorithm 2 written out, against diffusers, and in their limits."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import BETAS, FINITE, SCHEDULES
from test_solvers import exact_solution, mixture, noise, same, without_noise

import fewstep as fs
from fewstep.plan import Plan
from fewstep.solvers import EDMEuler, EDMHeun

IMAGENET = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}


def algorithm_2(schedule, denoiser, x, times, xi, *, heun, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """Line by line, in y = x / alpha and the paper's sigma; xi[k] is the noise of step k. Also returns the levels of the calls."""

    def denoise(y, level):
        levels.append(level)
        t = float(schedule.t_of_lam(-math.log(level)))
        return denoiser(y * float(schedule.alpha(t)), t)

    levels = []
    sigmas = [math.exp(-lam) for lam in schedule.lam(times).tolist()]
    y, steps = x / float(schedule.alpha(times[0])), len(sigmas) - 1
    for k, (here, there) in enumerate(pairwise(sigmas)):
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= here <= s_tmax else 0.0
        raised = here + gamma * here
        y_hat = y + math.sqrt(raised**2 - here**2) * s_noise * xi[k]
        slope = (y_hat - denoise(y_hat, raised)) / raised
        y = y_hat + (there - raised) * slope
        if heun and there != 0.0:
            y = y_hat + (there - raised) * (0.5 * slope + 0.5 * (y - denoise(y, there)) / there)
    return y * float(schedule.alpha(times[-1])), levels


def run_with(plan: Plan, denoiser, x, xi):
    """A run of the plan in which step k's noise is xi[k]."""
    drawn = iter(range(1, len(xi)))
    scales = [None if row.noise is None else row.noise.scale for row in plan.rows]

    def add(i, t, z):
        if i + 1 < plan.nfe and i not in inner:
            k = next(drawn)
            return z if scales[i] is None else z + scales[i] * xi[k]
        return z

    # the state after row i is inside a step if the next row is Heun's second one, which weighs the change of the prediction
    inner = {i - 1 for i, row in enumerate(plan.rows) if len(row.weights) == 2 and row.weights[0] == -row.weights[1]}
    return fs.sample(denoiser, x, without_noise(plan), hooks=fs.Hooks(state=add))


@pytest.mark.parametrize("family", [EDMHeun, EDMEuler])
@pytest.mark.parametrize("options", [{}, IMAGENET, {"s_churn": 3.0, "s_tmax": 2.0}])
@pytest.mark.parametrize("name", ["edm", "vp_linear", "vp_cosine", "flow_full", "stable_diffusion"])
def test_steps_are_those_of_algorithm_2(family, options, name):
    schedule, tested = SCHEDULES[name], 0
    denoiser = mixture(schedule)
    if options == IMAGENET:  # its bound keeps the first step and levels above the start out, where the start is 80
        options = {**IMAGENET, "s_tmax": min(50.0, math.exp(-float(schedule.lam(schedule.t_start))) / 1.6)}
    for final in ("t_end", "zero"):
        for steps in (1, 2, 9, 20):
            start = None if name != "flow_full" else 0.98
            times = fs.grids.make_grid("karras", schedule, steps, start=start, final=final)
            plan = family(**options).plan(schedule, grid=times)
            x = fs.draw_noise((2,), range(6), plan, dtype=torch.float64)
            xi = torch.randn(steps, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(steps))
            expected, levels = algorithm_2(schedule, denoiser, x, times, xi, heun=family is EDMHeun, **options)
            torch.testing.assert_close(run_with(plan, denoiser, x, xi), expected, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(np.exp(-schedule.lam(plan.tau)), levels, rtol=1e-8)
            tested += plan.stochastic
    assert tested >= (4 if options else 0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", ["t_end", "zero"])
def test_euler_without_churn_is_ddim(name, final):
    schedule = SCHEDULES[name]
    for nfe in (1, 2, 7, 20):
        plans = [fs.make_plan(solver, schedule, nfe, grid="lambda", final=final) for solver in ("edm_euler", "ddim")]
        same(*plans, schedule)


@pytest.mark.filterwarnings("ignore")  # their own
def test_heun_as_diffusers():
    diffusers = pytest.importorskip("diffusers", minversion="0.32")
    schedule = SCHEDULES["betas"]
    denoiser = mixture(schedule)
    scheduler = diffusers.HeunDiscreteScheduler(trained_betas=BETAS, prediction_type="sample", timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    indices = [*scheduler.timesteps[::2].tolist(), 0]
    times = np.append((np.array(indices[:-1]) + 1.0) / len(BETAS), schedule.t_zero)
    levels = schedule.sigma(times) / schedule.alpha(times)
    scheduler.sigmas = torch.from_numpy(np.concatenate([levels[:1], levels[1:-1].repeat(2), levels[-1:]]))
    plan = EDMHeun().plan(schedule, grid=times)
    x = noise(schedule)
    y, alphas = x / float(schedule.alpha(times[0])), schedule.alpha(plan.tau)
    for t, alpha, index in zip(plan.tau.tolist(), alphas.tolist(), scheduler.timesteps, strict=True):
        y = scheduler.step(denoiser(y * alpha, t), index, y).prev_sample
    torch.testing.assert_close(fs.sample(denoiser, x, plan), y * float(schedule.alpha(times[-1])), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", FINITE.values(), ids=FINITE)
def test_churned_samples_have_the_right_moments_and_the_first_step_none(schedule):
    """D = 0 and s_noise = 1: every state is Gaussian with the deviation of its level, raised levels included."""
    for family in (EDMHeun, EDMEuler):
        for churn in (0.5, 5.0, 100.0):
            plan = family(s_churn=churn).plan(schedule, 15, "lambda")
            dense, sigma = plan.dense(), schedule.sigma(plan.grid)
            assert plan.grid[0] == schedule.t_start
            # Heun's predictions of zero change nothing, so both methods carry the noise exactly
            np.testing.assert_allclose(dense.A**2 * sigma[0] ** 2 + (dense.C**2).sum(1), sigma**2, rtol=1e-9)
            assert (schedule.lam(plan.grid) >= schedule.lam(schedule.t_start) - 1e-9).all()


def test_the_intervals_of_the_noise_do_not_overlap():
    plan = EDMHeun(s_churn=10.0).plan(fs.schedules.EDM(), 21, "karras")
    ends = [(row.noise.begin, row.noise.end) for row in plan.rows if row.noise is not None]
    assert len(ends) == 10
    assert all(a[1] <= b[0] for a, b in pairwise(ends))


def test_churn_is_of_first_order_in_the_drift():
    """S_churn / K a step on a grid uniform in lambda is the SDE with eta = S_churn / length: D = sin(lambda) has a closed form."""
    schedule = FINITE["vp_linear"]
    a, b = (float(schedule.lam(t)) for t in (schedule.t_start, schedule.t_end))
    churn = 2.0
    rate = 1.0 + churn / (b - a)
    ends = [rate * (rate * math.sin(lam) - math.cos(lam)) / (rate**2 + 1) for lam in (a, b)]
    shift = float(schedule.alpha(schedule.t_end)) * (ends[1] - math.exp(-rate * (b - a)) * ends[0])
    decay = float(schedule.sigma(schedule.t_end) / schedule.sigma(schedule.t_start)) * math.exp(-churn)
    x = noise(schedule)
    for family, calls in ((EDMHeun, 2), (EDMEuler, 1)):
        errors = []
        for steps in (200, 400):
            plan = without_noise(family(s_churn=churn).plan(schedule, calls * steps, "lambda"))
            run = fs.sample(lambda x, t: torch.full_like(x, math.sin(float(schedule.lam(t)))), x, plan)
            errors.append(float((run - (decay * x + shift)).abs().max()))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(family(s_churn=churn).claimed_order, abs=0.15)


def test_churned_samples_of_a_mixture_have_its_moments():
    """10,000 samples, 59 calls: mean and covariance are the mixture's, within 5 standard errors, and a bias for the covariance."""
    schedule = fs.schedules.EDM()
    denoiser, count = mixture(schedule), 10_000
    plan = EDMHeun(s_churn=10.0, s_tmin=0.05, s_tmax=50.0).plan(schedule, 59, "karras", final="zero")
    x = fs.draw_noise((2,), range(count), plan, dtype=torch.float64)
    run, truth = fs.sample(denoiser, x, plan, seeds=range(count)), denoiser.draw(count, 0)
    spread = (torch.cov(truth.T) * 2 / count).abs().sqrt().max()
    assert float((run.mean(0) - truth.mean(0)).abs().max()) < 5 * math.sqrt(2 * float(truth.var(0).max()) / count)
    assert float((torch.cov(run.T) - torch.cov(truth.T)).abs().max()) < 5 * math.sqrt(2) * float(spread) + 5e-3


def test_heun_beats_euler_at_equal_calls():
    schedule = fs.schedules.EDM()
    denoiser, x = mixture(schedule), noise(schedule)
    exact = exact_solution(denoiser, x)
    errors = {}
    for name in ("edm_heun", "edm_euler"):
        run = fs.sample(denoiser, x, fs.make_plan(name, schedule, 35, grid="karras"))
        errors[name] = float((run - exact).square().mean().sqrt())
    assert errors["edm_heun"] < 0.7 * errors["edm_euler"]


@pytest.mark.parametrize("final", ["t_end", "zero"])
def test_the_budget_is_spent_and_plans_are_saved(final, tmp_path):
    for name, schedule in SCHEDULES.items():
        for solver in (EDMHeun(**IMAGENET), EDMEuler(s_churn=7.0)):
            for nfe in range(1, 31):
                plan = solver.plan(schedule, nfe, final=final)
                assert plan.nfe == nfe, name
                assert all(any(w != 0.0 for w in row.weights) for row in plan.rows)
    plan = EDMHeun(s_churn=7.0).plan(fs.schedules.EDM(), 9, "karras")
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s_churn": -1.0}, "s_churn must be at least 0"),
        ({"s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin <= s_tmax"),
        ({"s_noise": 0.0}, "s_noise must be positive"),
    ],
)
def test_refused(options, message):
    for family in (EDMHeun, EDMEuler):
        with pytest.raises(ValueError, match=message):
            family(**options)
