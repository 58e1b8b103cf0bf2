"""Step for step beside diffusers' schedulers, wherever they are right or their fault can be switched on.

Both sides see the same network: the exact data prediction of a Gaussian mixture at the noise level that the scheduler is at. Their
coefficients and states are single precision, so agreement is to 1e-5 of the state's size.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from two_gaussians import data_prediction

import fewstep as fs
from fewstep.noise import BrownianPath

diffusers = pytest.importorskip("diffusers", minversion="0.32")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
TOLERANCE = 1e-5
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
SCHEDULE = fs.schedules.FromBetas(BETAS.tolist())
SEEDS = range(8)


def denoiser(schedule):
    def network(x, t):
        return data_prediction(x, schedule.alpha(float(t[0])), schedule.sigma(float(t[0])))

    return fs.Denoiser(network, schedule, predicts="data", network_time=lambda t: t)


def ours(plan, noise):
    return fs.sample(denoiser(plan.schedule), noise, plan, seeds=SEEDS if plan.stochastic else None)


def theirs(scheduler, noise, *, flow=False, variance_noise=None):
    """Their loop. `variance_noise` is injected where they would draw."""
    x = noise
    for i, t in enumerate(scheduler.timesteps):
        ratio = float(scheduler.sigmas[i])
        alpha, sigma = (1.0 - ratio, ratio) if flow else (1.0 / np.hypot(1.0, ratio), ratio / np.hypot(1.0, ratio))
        d = data_prediction(x.double(), alpha, sigma)
        output = (x - d) / sigma if flow else (x - alpha * d) / sigma
        extra = {} if variance_noise is None else {"variance_noise": variance_noise[i]}
        x = scheduler.step(output, t, x, return_dict=False, **extra)[0].double()
    return x


def times(scheduler, schedule=SCHEDULE, *, flow=False):
    """The times of their noise levels."""
    ratio = np.asarray(scheduler.sigmas, np.float64)
    with np.errstate(divide="ignore"):
        ratio = ratio / (1.0 - ratio) if flow else ratio
        return schedule.t_of_lam(-np.log(ratio))


def multistep(n, **options):
    scheduler = diffusers.DPMSolverMultistepScheduler(trained_betas=BETAS, **options)
    scheduler.set_timesteps(n)
    return scheduler


def start(schedule=SCHEDULE, count=8):
    return fs.draw_noise((2,), range(count), dtype=torch.float64) * float(schedule.sigma(schedule.t_start))


def assert_close(a, b):
    assert float((a - b).abs().max()) < TOLERANCE * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("n", [1, 2, 8, 20])
def test_ddim(n):
    """Where n divides 1000: elsewhere their step ends beside the time of the next one."""
    scheduler = diffusers.DDIMScheduler(trained_betas=BETAS, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False)
    scheduler.set_timesteps(n)
    x = noise = start()
    for t in scheduler.timesteps:
        at = (float(t) + 1.0) / 1000
        alpha, sigma = SCHEDULE.alpha(at), SCHEDULE.sigma(at)
        output = (x - alpha * data_prediction(x, alpha, sigma)) / sigma
        x = scheduler.step(output, t, x, return_dict=False)[0]
    ends = [max(int(t) - 1000 // n, 0) for t in scheduler.timesteps[-1:]]  # they end at table entry 0
    plan = fs.solvers.DDIM().plan(SCHEDULE, grid=[*((scheduler.timesteps.double().numpy() + 1) / 1000), (ends[0] + 1) / 1000])
    assert_close(ours(plan, noise), x)


CASES = {
    "1": ({"solver_order": 1}, {"order": 1}),
    "2 midpoint": ({"solver_order": 2}, {"order": 2}),
    "2 taylor": ({"solver_order": 2, "solver_type": "heun"}, {"order": 2, "variant": "taylor"}),
    "3": ({"solver_order": 3, "solver_type": "heun"}, {"order": 3, "variant": "taylor", "compat": "official"}),
}
GRIDS = {
    "linspace": {},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "lambda": {"use_lu_lambdas": True},
    "exponential": {"use_exponential_sigmas": True},
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("they", "we"), CASES.values(), ids=CASES)
def test_dpm_solver_pp(they, we, grid):
    for n in (1, 2, 6, 16):
        scheduler = multistep(n, **they, **grid)
        plan = fs.solvers.DPMSolverPP(**we, lower_order_final=15).plan(SCHEDULE, grid=times(scheduler), final="zero")
        noise = start()
        assert_close(ours(plan, noise), theirs(scheduler, noise))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("n", [2, 6, 16])
def test_sde_with_the_same_noise(order, n):
    scheduler = multistep(n, solver_order=order, algorithm_type="sde-dpmsolver++")
    plan = fs.solvers.DPMSolverPP(order=order, eta=1.0, lower_order_final=15).plan(SCHEDULE, grid=times(scheduler), final="zero")
    path = BrownianPath(SEEDS, (2,))
    drawn = [row.noise and torch.from_numpy(path.normalised(row.noise.begin, row.noise.end)).float() for row in plan.rows]
    nothing = torch.zeros(len(SEEDS), 2)
    noise = start()
    assert_close(ours(plan, noise), theirs(scheduler, noise, variance_noise=[nothing if xi is None else xi for xi in drawn]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_ddim(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(9)
    schedule = fs.schedules.Flow()
    plan = fs.solvers.DDIM().plan(schedule, grid=times(scheduler, schedule, flow=True), final="zero")
    noise = start(schedule)
    assert_close(ours(plan, noise), theirs(scheduler, noise, flow=True))


def test_flow_multistep():
    scheduler = multistep(9, use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    schedule = fs.schedules.Flow()
    plan = fs.solvers.DPMSolverPP(lower_order_final=15).plan(schedule, grid=times(scheduler, schedule, flow=True), final="zero")
    noise = start(schedule)
    assert_close(ours(plan, noise), theirs(scheduler, noise, flow=True))


@pytest.mark.parametrize("n", [4, 10, 25])
@pytest.mark.parametrize("name", ["linspace", "trailing", "leading"])
def test_the_grids_of_tables(name, n):
    """Their integer timesteps are ours, on the table's own time. (Their multistep class divides by n + 1 in "leading", the others by n.)"""
    scheduler = multistep(n, timestep_spacing=name)
    if name == "leading":
        scheduler = diffusers.DDIMScheduler(trained_betas=BETAS, timestep_spacing=name, steps_offset=1)
        scheduler.set_timesteps(n)
    indices = np.rint(fs.grids.make_grid(name, SCHEDULE, n)[:-1] * 1000 - 1)
    assert indices.tolist() == scheduler.timesteps.tolist()


def test_the_grids_in_noise():
    """Theirs has n noise levels from the first to the last, and 0 after them: ours of n - 1 calls, and 0 after them."""
    for name, options in {"karras": {"use_karras_sigmas": True}, "lambda": {"use_lu_lambdas": True}}.items():
        scheduler = multistep(8, **options)
        grid = fs.grids.make_grid(name, SCHEDULE, 7)
        np.testing.assert_allclose(np.exp(-SCHEDULE.lam(grid)), scheduler.sigmas[:-1].double().numpy(), rtol=3e-5)


def test_our_third_order_is_third_and_theirs_second():
    """Their own class on its own noise levels, which are set by hand so that they may be finely spaced, and ours on the same."""
    schedule = fs.schedules.VPLinear(t_start=0.95, t_end=0.05)
    noise = start(schedule, 32)
    exact = fs.reference(denoiser(schedule), noise, schedule, tol=1e-10)
    errors = {"theirs": [], "ours": []}
    for n in (10, 40, 80):
        plan = fs.solvers.DPMSolverPP(order=3).plan(schedule, n, grid="lambda")
        errors["ours"].append(float((ours(plan, noise) - exact).square().mean().sqrt()))
        scheduler = multistep(n, solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min", use_lu_lambdas=True)
        scheduler.sigmas = torch.from_numpy(np.exp(-schedule.lam(plan.grid)))
        errors["theirs"].append(float((theirs(scheduler, noise) - exact).square().mean().sqrt()))
    order = {name: float(np.log2(e[1] / e[2])) for name, e in errors.items()}
    assert order["ours"] > 2.7, order
    assert order["theirs"] < 2.3, order
