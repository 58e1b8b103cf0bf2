"""The functions with k-diffusion's signature, beside k-diffusion's own."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from two_gaussians import MEANS, data_prediction

import fewstep as fs
from fewstep.kdiffusion import kdiffusion_sampler

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LEVELS = torch.tensor([*np.geomspace(14.6, 0.03, 10).tolist(), 0.0], dtype=torch.float64)


class Model:
    """A host's model, which counts its calls."""

    def __init__(self, flow=False):
        self.sigmas, self.flow = [], flow

    def __call__(self, x, sigma, **extra_args):
        assert sigma.shape == x.shape[:1]
        self.sigmas.append(float(sigma[0]))
        return data_prediction(x.double(), 1.0 - float(sigma[0]) if self.flow else 1.0, float(sigma[0])).to(x.dtype)


def start(levels=LEVELS, count=16):
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return float(levels[0]) * noise


class Draws:
    """A noise sampler that gives the same at every run, and remembers what it was asked for."""

    def __init__(self, x):
        self.shape, self.generator, self.asked = x.shape, torch.Generator().manual_seed(1), []

    def __call__(self, sigma, sigma_next):
        self.asked.append((float(sigma), float(sigma_next)))
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def theirs():
    if importlib.util.find_spec("k_diffusion") is None:
        pytest.skip("k_diffusion is not installed")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("peers")._k_diffusion_sampling()
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("peers", None)


OFFICIAL = {"compat": "official", "variant": "taylor"}
"""With the factor 2 that the published third-order step lacks, and so k-diffusion's."""
SAME = {  # k-diffusion's function and its options -> our name and its options
    "euler": ("sample_euler", {}, "ddim", {}),
    "euler, flow": ("sample_euler", {}, "flow_euler", {}),
    "heun": ("sample_heun", {}, "edm_heun", {}),
    "heun in rho": ("sample_heun", {}, "rho_heun", {}),
    "dpm_2": ("sample_dpm_2", {}, "dpm_2s", {}),
    "lms 4": ("sample_lms", {"order": 4}, "lms", {"order": 4, "corrector": "none"}),
    "lms 2": ("sample_lms", {"order": 2}, "lms", {"order": 2, "corrector": "none"}),
    "dpmpp_2s": ("sample_dpmpp_2s_ancestral", {"eta": 0.0}, "dpmpp_2s", {}),
    "dpmpp_2m": ("sample_dpmpp_2m", {}, "dpmpp_2m", {}),
    "dpmpp_2m_sde, no noise": ("sample_dpmpp_2m_sde", {"eta": 0.0, "solver_type": "midpoint"}, "dpmpp_2m", {}),
    "dpmpp_2m_sde heun, no noise": ("sample_dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}, "dpmpp_2m_taylor", {}),
    "dpmpp_3m_sde, no noise": ("sample_dpmpp_3m_sde", {"eta": 0.0}, "dpmpp_3m", OFFICIAL),
    "euler_ancestral": ("sample_euler_ancestral", {}, "ddpm", {}),
    "dpmpp_2m_sde": ("sample_dpmpp_2m_sde", {}, "dpmpp_2m_sde", {}),
    "dpmpp_2m_sde half": ("sample_dpmpp_2m_sde", {"eta": 0.5}, "dpmpp_2m_sde", {"eta": 0.5}),
    "dpmpp_3m_sde": ("sample_dpmpp_3m_sde", {}, "dpmpp_3m_sde", OFFICIAL),
}


OTHER_AT_ZERO: set[str] = {"lms 2", "lms 4"}
"""Theirs extrapolate the slope into sigma = 0; ours take the data prediction there."""


@pytest.mark.parametrize(
    ("case", "levels"), [(case, end) for case in SAME for end in ("zero", "above") if end == "above" or case not in OTHER_AT_ZERO]
)
def test_same_as_k_diffusion(theirs, case, levels):
    function, their_options, name, options = SAME[case]
    x, levels = start(), LEVELS if levels == "zero" else LEVELS[:-1]
    mine, other, calls, their_calls = Model(), Model(), [], []
    draws, their_draws = Draws(x), Draws(x)
    stochastic = fs.make_plan(name, fs.schedules.EDM(), 4, **options).stochastic
    more = {"noise_sampler": their_draws} if stochastic else {}
    expected = getattr(theirs, function)(other, x, levels, callback=their_calls.append, disable=True, **more, **their_options)
    more = {"noise_sampler": draws} if stochastic else {}
    found = kdiffusion_sampler(name, **options)(mine, x, levels, callback=calls.append, disable=True, **more)
    assert (found - expected).abs().max() < 1e-5
    np.testing.assert_allclose(mine.sigmas, other.sigmas, rtol=1e-9)
    np.testing.assert_allclose(draws.asked, their_draws.asked, rtol=1e-9)
    assert len(calls) == len(their_calls) == len(levels) - 1
    for call, their_call in zip(calls, their_calls, strict=True):
        assert call.keys() == their_call.keys()
        assert call["i"] == their_call["i"]
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            torch.testing.assert_close(call[key], their_call[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", cases.SOLVERS)
@pytest.mark.parametrize("space", ["ve", "flow"])
def test_every_solver_runs_through_the_hosts_levels(name, space):
    levels = LEVELS if space == "ve" else torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0])
    model, calls = Model(flow=space == "flow"), []
    sampler = kdiffusion_sampler(name, space=space)
    x = start(levels).float()
    out = sampler(model, x, levels, {"seed": 3}, calls.append, True)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert [call["i"] for call in calls] == list(range(len(levels) - 1))
    np.testing.assert_allclose([float(call["sigma"]) for call in calls], levels[:-1].numpy(), rtol=1e-6)
    assert all(torch.isfinite(call["x"]).all() for call in calls)
    near = (out[:, None] - MEANS.float()).norm(dim=-1).amin(1)
    assert near.mean() < 1.0  # by then they are the data's, whose deviation is 0.3 to 0.4 in both directions
    again = sampler(Model(flow=space == "flow"), x, levels, {"seed": 3}, None, True)
    assert torch.equal(out, again)


def test_samples_are_those_of_the_loop():
    levels = LEVELS.numpy()
    schedule = fs.schedules.EDM(0.03, 14.6, t_end=0.0)
    plan = fs.make_plan("dpmpp_2m_sde", schedule, grid=levels)
    den = fs.Denoiser(lambda x, t: data_prediction(x, 1.0, float(t[0])), schedule, predicts="data")
    expected = fs.sample(den, start(), plan, seeds=range(7, 23))
    found = kdiffusion_sampler("dpmpp_2m_sde")(Model(), start(), LEVELS, {"seed": 7}, disable=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found = kdiffusion_sampler("dpmpp_2m_sde")(Model(), start(), LEVELS, disable=True, seeds=range(7, 23))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_without_a_seed_noise_is_torchs():
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(kdiffusion_sampler("ddpm")(Model(), start(), LEVELS, disable=True))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


SCHEDULES = {
    "edm": (fs.schedules.EDM(0.03, 14.6), "ve"),
    "vp": (fs.schedules.VPLinear(), "ve"),
    "flow from 1": (fs.schedules.Flow(shift=3.0), "flow"),
    "flow from less": (fs.schedules.Flow(t_start=0.9), "ve"),
}


@pytest.mark.parametrize("name", ["unipc", "edm_heun", "rho_midpoint", "dpmpp_2m_sde", "dpmpp_2s_sde"])
@pytest.mark.parametrize("case", SCHEDULES)
def test_a_saved_plan_of_any_schedule(tmp_path, case, name):
    schedule, space = SCHEDULES[case]
    plan = fs.make_plan(name, schedule, 9, grid="lambda" if case != "flow from 1" else "time", final="zero")
    plan.save(tmp_path / "plan.safetensors")

    def network(x, t):
        return data_prediction(x, float(schedule.alpha(float(t[0]))), float(schedule.sigma(float(t[0]))))

    den = fs.Denoiser(network, schedule, predicts="data", network_time=lambda t: t)
    noise = fs.draw_noise((2,), range(8), plan, dtype=torch.float64)
    expected = fs.sample(den, noise, plan, seeds=range(8))
    sampler = kdiffusion_sampler(tmp_path / "plan.safetensors", space=space)
    own, model, calls = sampler.sigmas, Model(flow=space == "flow"), []
    assert own[-1] == 0.0
    sigma, alpha = float(schedule.sigma(plan.grid[0])), float(schedule.alpha(plan.grid[0]))
    host = noise * float(own[0]) / sigma
    found = sampler(model, host, own, callback=calls.append, disable=True, seeds=range(8))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # alpha = 1 at the end of all
    assert len(model.sigmas) == plan.nfe
    assert [call["i"] for call in calls] == sorted({call["i"] for call in calls})
    assert calls[-1]["i"] <= len(own) - 2
    assert float(own[0]) == pytest.approx(sigma / alpha if space == "ve" else sigma / (sigma + alpha))


def test_a_plan_that_transforms_the_noise():
    schedule = fs.schedules.VPLinear()
    prior = fs.solvers.GaussianPrior(MEANS.mean(0).numpy(), np.eye(2), np.array([1.1, 0.3]))
    plan = fs.solvers.Teleport(fs.solvers.UniPC(), prior, to=0.7).plan(schedule, 6, "lambda", final="zero")

    def network(x, t):
        return data_prediction(x, float(schedule.alpha(float(t[0]))), float(schedule.sigma(float(t[0]))))

    den = fs.Denoiser(network, schedule, predicts="data")
    noise = fs.draw_noise((2,), range(8), plan, dtype=torch.float64)
    sampler, model, calls = kdiffusion_sampler(plan), Model(), []
    own = sampler.sigmas
    assert float(own[0]) == pytest.approx(float(np.exp(-schedule.lam(schedule.t_start))))
    found = sampler(model, noise * float(own[0]) / float(schedule.sigma(schedule.t_start)), own, None, calls.append, True)
    torch.testing.assert_close(found, fs.sample(den, noise, plan), rtol=1e-9, atol=1e-9)
    assert model.sigmas[0] == pytest.approx(float(np.exp(-schedule.lam(0.7))))
    assert [call["i"] for call in calls] == list(range(6))


def test_a_plan_refuses_other_levels():
    plan = fs.make_plan("unipc", fs.schedules.VPLinear(), 9, grid="lambda")
    sampler = kdiffusion_sampler(plan)
    own = sampler.sigmas
    for levels in (own[1:], own[:-1], 1.1 * own, torch.cat([own[:-1], torch.zeros(1)])):
        with pytest.raises(fs.FewstepError, match=r"takes 9 steps from sigma \d.*sampler\.sigmas"):
            sampler(Model(), start(levels), levels, disable=True)
    wanted = sampler(Model(), start(own), own, disable=True)
    inner = torch.cat([own[:1], 1.3 * own[1:-1], own[-1:]])  # as many, with the same ends: the plan's own are used
    assert torch.equal(sampler(Model(), start(own), inner, disable=True), wanted)


def test_pure_noise_does_not_fit_a_ve_host():
    plan = fs.make_plan("flow_euler", fs.schedules.Flow(), 4, final="zero")
    with pytest.raises(fs.FewstepError, match='space="flow"'):
        kdiffusion_sampler(plan)(Model(), start(), LEVELS, disable=True)


def test_a_plan_tuned_with_guidance_leaves_it_to_the_host():
    plan = fs.make_plan("ddim", fs.schedules.EDM(0.03, 14.6), 4)
    model = {"name": "other", "fingerprint": "0" * 64, "guidance": {"kind": "classifier-free", "guidance_scale": 5.0}}
    tuned = fs.Plan(plan.schedule, plan.grid, plan.rows, None, {**plan.provenance, "tuned": {"model": model}})
    sampler = kdiffusion_sampler(tuned)
    assert torch.equal(
        sampler(Model(), start(), sampler.sigmas, disable=True),
        kdiffusion_sampler(plan)(Model(), start(), sampler.sigmas, disable=True),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states(dtype):
    seen = []

    def model(x, sigma):
        seen.append((x.dtype, sigma.dtype))
        return data_prediction(x.double(), 1.0, float(sigma[0])).to(x.dtype)

    out = kdiffusion_sampler("dpmpp_2m")(model, start().to(dtype), LEVELS, disable=True)
    assert out.dtype == dtype
    assert set(seen) == {(dtype, dtype)}
    exact = kdiffusion_sampler("dpmpp_2m")(Model(), start(), LEVELS, disable=True)
    assert (out.double() - exact).abs().median() < 0.05


def test_copies_do_the_same():
    sampler = kdiffusion_sampler("dpmpp_2m_sde", eta=0.5)
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert other.__name__ == sampler.__name__
        runs = [each(Model(), start(), LEVELS, {"seed": 1}, disable=True) for each in (sampler, other)]
        assert torch.equal(*runs)


def test_bad_input():
    sampler = kdiffusion_sampler("ddim")
    with pytest.raises(fs.FewstepError, match="does not decrease in noise"):
        sampler(Model(), start(), LEVELS.flip(0), disable=True)
    with pytest.raises(fs.FewstepError, match="repeats"):
        sampler(Model(), start(), torch.tensor([2.0, 1.0, 1.0, 0.0]), disable=True)
    x = start()
    assert sampler(Model(), x, LEVELS[:1], disable=True) is x
    with pytest.raises(fs.FewstepError, match="unknown solver"):
        kdiffusion_sampler("euler_a")
    with pytest.raises(fs.FewstepError, match="unknown space"):
        kdiffusion_sampler("ddim", space="vp")
    with pytest.raises(TypeError, match="options are for a solver given by name"):
        kdiffusion_sampler(fs.solvers.DDIM(), eta=1.0)
    assert "DDIM" in repr(kdiffusion_sampler(fs.solvers.DDIM()))
    assert kdiffusion_sampler("dpmpp_2m").__name__ == "sample_dpmpp_2m"
