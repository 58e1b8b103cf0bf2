"""Statistics of a model against their closed form, their definition and what they are good for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.errors import FewstepError, PlanError, UnknownNameError
from fewstep.solvers import DPMSolverPP, DPMSolverV3
from fewstep.statistics import ModelStatistics
from fewstep.tuners import Effort, model_statistics, trace_paths
from fewstep.tuners.task import errors_of

MEAN, VARIANCE = [1.0, -0.5, 0.0], [0.5, 1.5, 0.05]
SCHEDULES = [
    fs.schedules.VPLinear(),
    fs.schedules.VPCosine(),
    fs.schedules.EDM(),
    fs.schedules.Flow(t_start=0.99, t_end=0.02),
    fs.schedules.Flow(t_end=0.0),
]
VP = fs.schedules.VPLinear(t_end=1e-2)


def start(schedule, count, size, first=0):
    return fs.draw_noise((size,), range(first, first + count), dtype=torch.float64) * float(schedule.sigma(schedule.t_start))


def line():
    """Three clusters of numbers: with one element, a random sign tells the derivative exactly."""
    return fs.exact.GaussianMixture(VP, [[1.0], [-1.0], [0.2]], [0.1, 0.2, 0.15], [0.3, 0.5, 0.2])


def mixture(schedule=VP):
    """Three clusters in the plane, of unequal weight and width."""
    return fs.exact.GaussianMixture(schedule, [[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2]], [0.1, 0.2, 0.15], [0.3, 0.5, 0.2])


@pytest.mark.parametrize("jvp", ["auto", "differences"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{type(s).__name__} to {s.t_end:g}")
def test_a_diagonal_gaussian_has_its_closed_form(schedule, jvp):
    denoiser = fs.exact.Gaussian(schedule, MEAN, VARIANCE)
    found = model_statistics(denoiser, noise=start(schedule, 16, 3), nodes=240, jvp=jvp)
    exact = ModelStatistics.gaussian(schedule, MEAN, VARIANCE, nodes=240)
    assert found.provenance["jvp"] == ("forward" if jvp == "auto" else "differences")
    np.testing.assert_allclose(found.lam, exact.lam, atol=1e-9)
    np.testing.assert_allclose(found.l, exact.l, atol=1e-12 if jvp == "auto" else 1e-8)
    assert not found.s.any()  # f does not vary at all
    np.testing.assert_allclose(found.b, exact.b, atol=1e-5)  # slopes of fourth order over 240 nodes


@pytest.mark.parametrize("schedule", SCHEDULES[:4], ids=lambda s: type(s).__name__)
def test_one_step_is_exact_for_a_diagonal_gaussian(schedule):
    denoiser = fs.exact.Gaussian(schedule, MEAN, VARIANCE)
    stats = model_statistics(denoiser, noise=start(schedule, 16, 3), nodes=240)
    noise = start(schedule, 64, 3, first=9000)
    samples = fs.sample(denoiser, noise, DPMSolverV3(stats).plan(schedule, 1))
    assert float((samples - denoiser.solution(noise, schedule.t_start, schedule.t_end)).abs().max()) < 1e-4


def defined(denoiser, x, t, lam_step=1e-4):
    """l, s and b at one time from their definition: derivatives by autograd, f' along the ODE with l' by differences."""
    schedule = denoiser.schedule

    def f_and_l(x, t):
        alpha = float(schedule.alpha(t))
        jacobian = torch.func.vmap(torch.func.jacrev(lambda one: denoiser(one[None], t)[0]))(x)
        slopes = 1.0 - alpha * torch.diagonal(jacobian, dim1=1, dim2=2).mean(0)
        return (1.0 - slopes) * x / alpha - denoiser(x, t), slopes

    def moved(by):  # the ODE, dx/dlambda of a variance-preserving schedule; Heun's step
        t_next = float(schedule.t_of_lam(float(schedule.lam(t)) + by))

        def slope(x, t):
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
            return sigma**2 * x - (x - alpha * denoiser(x, t))

        first = slope(x, t)
        return x + 0.5 * by * (first + slope(x + by * first, t_next)), t_next

    f, slopes = f_and_l(x, t)
    rate = (f_and_l(*moved(lam_step))[0] - f_and_l(*moved(-lam_step))[0]) / (2 * lam_step)
    s = ((f * rate).mean(0) - f.mean(0) * rate.mean(0)) / f.var(0, correction=0)
    return [value.numpy() for value in (slopes, s, rate.mean(0) - s * f.mean(0))]


def test_a_mixture_has_what_the_definition_says():
    denoiser = line()
    paths = trace_paths(denoiser, start(VP, 64, 1), VP, calls=128)
    stats = model_statistics(denoiser, paths=paths, nodes=120)
    for k in (30, 60, 90):
        t = float(VP.t_of_lam(stats.lam[k]))
        slopes, s, b = defined(denoiser, paths.at(t), t)
        np.testing.assert_allclose(stats.l[k], slopes, rtol=1e-10)
        np.testing.assert_allclose(stats.s[k], s, rtol=1e-3)
        np.testing.assert_allclose(stats.b[k], b, rtol=1e-3, atol=1e-4)


def test_signs_estimate_the_diagonal_of_the_derivative():
    denoiser = mixture()
    paths = trace_paths(denoiser, start(VP, 64, 2), VP, calls=64)
    stats = model_statistics(denoiser, paths=paths, nodes=12, probes=32)
    t = float(VP.t_of_lam(stats.lam[6]))
    np.testing.assert_allclose(stats.l[6], defined(denoiser, paths.at(t), t)[0], atol=0.02)  # 2048 signs


def test_v3_beats_dpm_solver_pp_by_a_quarter_at_4_to_8_calls():
    denoiser = mixture()
    stats = model_statistics(denoiser, noise=start(VP, 512, 2), nodes=240)
    noise = start(VP, 512, 2, first=9000)
    exact = fs.reference(denoiser, noise, VP, tol=1e-6).plain()
    solver = DPMSolverV3(stats, order=2, corrector="raised")
    for grid in ("lambda", "quadratic"):
        for nfe in (4, 5, 6, 7, 8):
            plans = (solver.plan(VP, nfe, grid), DPMSolverPP(order=2).plan(VP, nfe, grid))
            mine, other = (errors_of(fs.sample(denoiser, noise, plan), exact).rms for plan in plans)
            assert mine < 0.75 * other


def test_blocks_and_weights():
    denoiser, noise = line(), start(VP, 32, 1)
    whole, parts = (model_statistics(denoiser, noise=noise, nodes=20, block=block) for block in (32, 7))
    paths = trace_paths(denoiser, noise, VP, calls=64)
    twice = paths.take(np.array([0, *range(31)]))
    weighted = dataclasses.replace(paths, weights=np.array([2.0] + [1.0] * 30 + [0.0]))
    one, two = (model_statistics(denoiser, paths=chosen, nodes=20) for chosen in (twice, weighted))
    for name in ("l", "s", "b"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-6, atol=1e-6)


def test_pools():
    mean = torch.arange(24.0).reshape(2, 3, 4) / 24
    image, noise = fs.exact.Gaussian(VP, mean, 0.3), start(VP, 8, 24).reshape(8, 2, 3, 4)
    found = {pool: model_statistics(image, noise=noise, nodes=40, pool=pool) for pool in ("none", "channel", "all")}
    assert {pool: stats.shape for pool, stats in found.items()} == {"none": (2, 3, 4), "channel": (2, 1, 1), "all": ()}
    np.testing.assert_allclose(found["all"].l, found["none"].l[:, 0, 0, 0], rtol=1e-10)
    plan = DPMSolverV3(found["channel"]).plan(VP, 3)
    assert bool(torch.isfinite(fs.sample(image, noise, plan)).all())


class NoForward(torch.autograd.Function):
    """An operator without a forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


@pytest.mark.parametrize("operator", [NoForward.apply, lambda x: torch.tanh(x.detach() + 0 * x)], ids=["missing", "cut off"])
def test_networks_without_forward_derivatives_are_differentiated_by_differences(operator):
    denoiser = fs.Denoiser(lambda x, time: operator(x), VP, predicts="data")
    found = model_statistics(denoiser, noise=start(VP, 8, 2), nodes=10)
    assert found.provenance["jvp"] == "differences"
    x = start(VP, 8, 2)
    expected = 1.0 - float(VP.alpha(1.0)) * (1.0 - torch.tanh(x).square()).mean(0)
    np.testing.assert_allclose(found.l[0], expected, atol=1e-6)


def test_nodes_of_a_model_with_integer_times_are_whole():
    schedule = fs.schedules.FromBetas(np.linspace(1e-4, 0.02, 1000).tolist())
    exact, seen = mixture(schedule), set()

    def network(x, i):
        seen.add(int(i[0]))
        return exact(x, float(i[0] + 1) / 1000)

    denoiser = fs.Denoiser(network, schedule, predicts="data", integer_time=True)
    paths = trace_paths(denoiser, start(schedule, 64, 2), schedule, calls=64)
    seen.clear()
    found = model_statistics(denoiser, paths=paths, nodes=120, seed=3, probes=2)
    numbers = schedule.network_time(schedule.t_of_lam(found.lam))
    assert 60 < len(found.lam) <= 121
    np.testing.assert_allclose(numbers, np.rint(numbers), atol=1e-3)
    assert {0, 999} <= seen
    smooth = model_statistics(exact, paths=paths, nodes=120, seed=3, probes=2)
    middle = slice(len(found.lam) // 4, len(found.lam) // 2)
    for name in ("l", "s", "b"):
        other = [np.interp(found.lam, smooth.lam, getattr(smooth, name)[:, j]) for j in (0, 1)]
        np.testing.assert_allclose(getattr(found, name)[middle], np.stack(other, 1)[middle], atol=0.03)


def test_they_say_whose_they_are_and_plans_made_of_them_refuse_others(tmp_path):
    guided = fs.guidance.ClassifierFree(mixture(), 2.0, {"label": -1}, interval=(0.1, 0.9))
    noise, cond = start(VP, 16, 2), {"label": torch.arange(16) % 3}
    model_statistics(guided, noise=noise, cond=cond, nodes=20, seed=5).save(tmp_path / "stats.safetensors")
    stats = ModelStatistics.load(tmp_path / "stats.safetensors")
    assert stats.provenance["model"]["guidance"]["guidance_scale"] == 2.0
    assert (stats.provenance["samples"], stats.provenance["seed"], stats.provenance["pool"]) == (16, 5, "none")
    plan = DPMSolverV3(stats).plan(VP, 4)
    fs.sample(guided, noise, plan, cond=cond)
    with pytest.raises(PlanError, match=r"guidance of scale 2 within \[0.1, 0.9\], but the denoiser has no guidance"):
        fs.sample(mixture(), noise, plan)


def test_tune_by_statistics_computes_them_once():
    effort, said = Effort(trajectories=64, held_out=64, pool=1), []
    tuned = fs.tune(mixture(), nfe=[4, 5], noise=start(VP, 64, 2), method="statistics", effort=effort, report=said.append)
    assert said.count("statistics of the model") == 1
    told = tuned.report["plans"]["4"]
    assert told["rms"] < 0.9 * told["untuned_rms"]
    assert tuned.plans[4].provenance["solver"]["name"] == "DPMSolverV3"
    assert tuned.plans[4].provenance["tuned"]["model"]["name"] == "GaussianMixture"


def test_what_is_wrong_is_said():
    denoiser, noise = mixture(), start(VP, 4, 2)
    with pytest.raises(UnknownNameError, match="channel"):
        model_statistics(denoiser, noise=noise, pool="chanel")
    with pytest.raises(UnknownNameError, match="forward"):
        model_statistics(denoiser, noise=noise, jvp="forwards")
    with pytest.raises(ValueError, match="give one of them"):
        model_statistics(denoiser)
    with pytest.raises(ValueError, match="4 nodes"):
        model_statistics(denoiser, noise=noise, nodes=3)
    with pytest.raises(ValueError, match="one noise"):
        model_statistics(denoiser, noise=noise[:0])
    with pytest.raises(FewstepError, match="noise schedule"):
        model_statistics(lambda x, t: x, noise=noise)
