"""`PlanScheduler` alone: its configs, its steps, and what diffusers' tests ask of a scheduler (their own are run by `test_common.py`)."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers", minversion="0.32")

import fewstep as fs  # noqa: E402
from fewstep.diffusers import PlanScheduler  # noqa: E402
from fewstep.diffusers.config import betas_of, schedule_of, times_of  # noqa: E402
from fewstep.diffusers.networks import network_of  # noqa: E402
from fewstep.diffusers.rows import Run  # noqa: E402
from fewstep.plan import Interval, Row  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SHAPE = (2, 3, 4, 4)
MIX = 0.2 * torch.randn(48, 48, generator=torch.Generator().manual_seed(3))
SOLVERS = [
    "ddim",
    "dpmpp_2m",
    "dpmpp_3m",
    "dpmpp_2m_sde",
    "dpmpp_2s_sde",
    "unipc",
    "deis",
    "dpmpp_3s",
    "edm_heun",
    "rho_rk4",
    "ipndm",
    "auto",
]


def noise(seed=0, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(x, t):
    """Not linear, and it knows the time."""
    return (torch.tanh(x.flatten(1) @ MIX.to(x.dtype)) * (1.0 + float(t) / 2000)).reshape(x.shape)


def loop(scheduler, x, *, net=network, first=0, **options):
    generator = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(net(x, t), t, x, generator=generator, return_dict=False, **options)[0]
    return x


def made(solver="dpmpp_2m", config=None, **options):
    return PlanScheduler.from_config({} if config is None else config, solver=solver, **options)


def peer_loop(scheduler, n, x):
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    return x


# ---- beside the peers --------------------------------------------------------------------------------------------------------------

TWO = {"solver": "dpmpp_2m", "lower_order_final": 15}
PEERS = {
    "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False}, {"solver": "ddim"}),
    "DDIM, no zero": (
        diffusers.DDIMScheduler,
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {"solver": "ddim"},
    ),
    "DDIM trailing": (diffusers.DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}, {"solver": "ddim"}),
    "2M": (diffusers.DPMSolverMultistepScheduler, {}, TWO),
    "2M sigma_min": (diffusers.DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min"}, TWO),
    "2M leading": (diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "leading", "steps_offset": 1}, TWO),
    "2M trailing": (diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}, TWO),
    "2M Karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, TWO),
    "2M lambda": (diffusers.DPMSolverMultistepScheduler, {"use_lu_lambdas": True}, TWO),
    "2M v": (diffusers.DPMSolverMultistepScheduler, {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}, TWO),
    "2M sample, cosine": (
        diffusers.DPMSolverMultistepScheduler,
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        TWO,
    ),
    "2M threshold": (diffusers.DPMSolverMultistepScheduler, {"thresholding": True}, TWO),
    "2M zero SNR": (diffusers.DPMSolverMultistepScheduler, {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}, TWO),
    "UniPC bh2": (diffusers.UniPCMultistepScheduler, {}, {"solver": "unipc_2", "lower_order_final": True}),
    "UniPC bh2 v": (
        diffusers.UniPCMultistepScheduler,
        {"prediction_type": "v_prediction"},
        {"solver": "unipc_2", "lower_order_final": True},
    ),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler, {}, {"solver": "ddim"}),
    "flow shift": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {"solver": "flow_euler"}),
    "flow terminal": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "shift_terminal": 0.1}, {"solver": "flow_euler"}),
    "flow Karras": (diffusers.FlowMatchEulerDiscreteScheduler, {"use_karras_sigmas": True}, {"solver": "flow_euler"}),
}


@pytest.mark.parametrize(("peer", "config", "options"), PEERS.values(), ids=PEERS)
def test_agrees_with_diffusers(peer, config, options):
    host = peer(**config)
    ours = PlanScheduler.from_config(host.config, **options)
    for n in (4, 10, 20) if "shift_terminal" in config else (1, 4, 10, 20):  # theirs divides 0 by 0 at one step
        wanted = peer_loop(host, n, noise())
        ours.set_timesteps(n)
        assert torch.allclose(ours.timesteps.double(), host.timesteps.double(), atol=1e-3)
        found = loop(ours, noise())
        assert float((found - wanted).abs().max()) < 1e-4 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_betas(name):
    theirs = diffusers.DDPMScheduler(beta_schedule=name)
    np.testing.assert_allclose(betas_of(theirs.config), theirs.betas.double().numpy(), rtol=2e-4, atol=1e-7)
    assert made(config=theirs.config).alphas_cumprod.shape == (1000,)


def test_betas_of_the_exponential():
    theirs = diffusers.HeunDiscreteScheduler(beta_schedule="exp")
    np.testing.assert_allclose(betas_of(theirs.config), theirs.betas.double().numpy(), rtol=1e-5)


def test_zero_snr_starts_at_no_signal():
    scheduler = made(config={"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"})
    scheduler.set_timesteps(5)
    assert float(scheduler.plan.schedule.alpha(scheduler.plan.grid[0])) == 0.0
    assert bool(torch.isfinite(loop(scheduler, noise())).all())


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("name", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_sigmas_from_no_signal(name, final):
    """The first state is the noise itself; the curve is theirs, from 4096."""
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear", name: True}
    ours = made(config=config, final_sigmas_type=final)
    host = diffusers.DPMSolverMultistepScheduler(**config)
    for n in (1, 2, 8):
        host.set_timesteps(n + (final == "sigma_min"))  # theirs repeats the last
        ours.set_timesteps(n)
        assert float(ours.plan.schedule.alpha(ours.plan.grid[0])) == 0.0
        assert int(ours.timesteps[0]) == 999
        theirs = host.sigmas[1 : n + 1]
        np.testing.assert_allclose(ours.sigmas[1:], theirs, rtol=2e-3)
        assert bool(torch.isfinite(loop(ours, noise())).all())


@pytest.mark.parametrize("name", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"])
def test_sigmas(name):
    """Theirs exactly with "zero". With "sigma_min" theirs spends the last call on a step of length 0; ours has n steps."""
    host = diffusers.DPMSolverMultistepScheduler(**{name: True})
    host.set_timesteps(8)
    ours = made(config=host.config)
    ours.set_timesteps(8)
    np.testing.assert_allclose(ours.sigmas.numpy(), host.sigmas.numpy(), rtol=2e-4, atol=1e-6)
    ours = made(config=host.config, final_sigmas_type="sigma_min")
    ours.set_timesteps(8)
    assert bool((ours.sigmas.diff() < 0).all())
    assert float(ours.sigmas[-1]) == pytest.approx(float(host.sigmas[-2]), rel=1e-4)


def test_dynamic_shift():
    config = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config
    host, ours = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config), made(config=config)
    for kind in ("exponential", "linear"):
        host = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, time_shift_type=kind)
        ours = made(config=config, time_shift_type=kind)
        for arguments in ({"num_inference_steps": 6}, {"sigmas": np.linspace(1.0, 1 / 6, 6)}):
            host.set_timesteps(**arguments, mu=0.8)
            ours.set_timesteps(**arguments, mu=0.8)
            np.testing.assert_allclose(ours.timesteps.numpy(), host.timesteps.numpy(), rtol=1e-5)
    with pytest.raises(ValueError, match="mu must be given"):
        ours.set_timesteps(6)


DEFAULT = [999, 749, 500, 250]


@pytest.mark.parametrize(
    ("solver", "times"), [*((name, DEFAULT) for name in ("ddim", "ddpm", "unipc")), ("pndm", [999, 666, 666, 333])]
)
def test_a_default_spacing_is_kept(solver, times):
    """That of DPM-Solver++ is "linspace", DDIM's "leading", which begins below the first timestep. PNDM calls twice at its second."""
    ours = made(solver, diffusers.DPMSolverMultistepScheduler().config)
    ours.set_timesteps(4)
    assert ours.timesteps.tolist() == times


@pytest.mark.parametrize(("solver", "end"), [("lcm", 0.0), ("tcd", 0.0292)])
def test_timesteps_of_consistency_models(solver, end):
    """Some of those on which the model was distilled; LCM ends at clean data, TCD at the table's first entry."""
    for original in (50, 40, 1000):
        host = (diffusers.LCMScheduler if solver == "lcm" else diffusers.TCDScheduler)(original_inference_steps=original)
        ours = made(solver, host.config)
        for n in range(1, 51 if original >= 50 else 41):
            host.set_timesteps(n)
            ours.set_timesteps(n)
            assert ours.timesteps.tolist() == host.timesteps.tolist()
            assert float(ours.sigmas[-1]) == pytest.approx(end, abs=1e-4)
    made(solver).set_timesteps(4)  # another config: LCM's default
    with pytest.raises(fs.FewstepError, match="distilled on 40 timesteps"):
        made(solver, original_inference_steps=40).set_timesteps(41)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("LCMScheduler", {}),
        ("TCDScheduler", {}),
        ("CogVideoXDDIMScheduler", {}),
        ("CogVideoXDPMScheduler", {"snr_shift_scale": 2.0}),
        ("CogVideoXDDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ],
)
def test_a_default_table_is_kept(name, settings):
    """Theirs is another than that of most schedulers, and CogVideoX moves it to more noise."""
    host = getattr(diffusers, name)(**settings)
    ours = made("ddim", host.config)
    np.testing.assert_allclose(ours.alphas_cumprod.numpy(), host.alphas_cumprod.float().numpy(), rtol=1e-4, atol=1e-6)


# ---- the times of the class that a config came from --------------------------------------------------------------------------------

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
EULERS = {
    "EulerDiscreteScheduler": "ddim",
    "EulerAncestralDiscreteScheduler": "ddpm",
    "HeunDiscreteScheduler": "edm_heun",
    "KDPM2DiscreteScheduler": "dpm_2s",
    "LMSDiscreteScheduler": "lms",
    "DPMSolverSDEScheduler": "dpmpp_2s_sde",
}
TWO_CALLS = ("edm_heun", "dpm_2s", "dpmpp_2s_sde")
CURVES = ("use_karras_sigmas", "use_exponential_sigmas")


def peer_of(name, **settings):
    """A scheduler of diffusers, or a skip where it needs a library that is not installed."""
    found = getattr(diffusers, name)
    if found.__module__.startswith("diffusers.utils"):
        pytest.skip(f"{name} is not installed")
    return found(**SD, **settings)


def assert_same_times(ours, host, calls_a_step, n):
    """Those at which a step begins, and the end; KDPM2 rounds the timesteps of Karras sigmas."""
    rounded = 0.5 if isinstance(host, diffusers.KDPM2DiscreteScheduler) else 0.06
    host.set_timesteps(n)
    ours.set_timesteps(calls_a_step * n - calls_a_step + 1)
    np.testing.assert_allclose(ours.timesteps.double()[::calls_a_step], host.timesteps.double()[::calls_a_step], atol=rounded)
    begins, theirs = host.sigmas.double()[: len(host.timesteps)][::calls_a_step], ours.sigmas.double()[:-1][::calls_a_step]
    np.testing.assert_allclose(theirs, begins, rtol=1e-3)
    assert float(ours.sigmas[-1]) == pytest.approx(float(host.sigmas[-1]), rel=1e-4)


@pytest.mark.parametrize("curve", [None, *CURVES])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(("name", "solver"), EULERS.items())
def test_the_times_of_eulers_family(name, solver, spacing, curve, tmp_path):
    """In memory and from a folder, where every setting is said."""
    if curve and name == "EulerAncestralDiscreteScheduler":
        pytest.skip("it has no curves")
    host = peer_of(name, timestep_spacing=spacing, **({curve: True} if curve else {}))
    host.save_pretrained(tmp_path)
    calls = 2 if solver in TWO_CALLS else 1
    for config in (
        getattr(diffusers, name)(**SD, timestep_spacing=spacing, **({curve: True} if curve else {})).config,
        host.config,
    ):
        ours = PlanScheduler.from_config(config, solver=solver)
        assert ours.config.times_as in EULERS
        for n in (5, 10, 20):
            assert_same_times(ours, host, calls, n)
    saved = PlanScheduler.from_pretrained(tmp_path, solver=solver)
    assert saved.config.times_as == name
    assert_same_times(saved, host, calls, 10)


def test_eulers_samples_with_karras_sigmas_as_models_ship_them():
    """SDXL's config, with Karras sigmas: those between its own timesteps."""
    host = peer_of("EulerDiscreteScheduler", timestep_spacing="leading", use_karras_sigmas=True)
    ours = PlanScheduler.from_config(host.config, solver="ddim")
    host.set_timesteps(20)
    ours.set_timesteps(20)
    x = noise() * float(host.init_noise_sigma)
    for t in host.timesteps:
        x = host.step(network(host.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    np.testing.assert_allclose(loop(ours, noise()), x, atol=1e-3 * float(x.abs().max()))


@pytest.mark.parametrize(("name", "solver"), [("DEISMultistepScheduler", "deis_logrho"), ("SASolverScheduler", "sa")])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_deis_and_sa_end_where_theirs_do(name, solver, spacing):
    host = peer_of(name, timestep_spacing=spacing)
    assert_same_times(PlanScheduler.from_config(host.config, solver=solver), host, 1, 10)
    other = PlanScheduler.from_config(host.config, solver="unipc")
    other.set_timesteps(10)
    assert float(other.sigmas[-1]) == 0.0


@pytest.mark.parametrize(
    ("name", "solver", "end"),
    [("EulerDiscreteScheduler", "ddim", 0.0), ("DDPMScheduler", "ddpm", 0.0), ("DDIMScheduler", "ddim", 0.0292)],
)
def test_a_setting_of_ddim_is_left_over(name, solver, end):
    """The config of Stable Diffusion 1.5 says `set_alpha_to_one`, whatever its class."""
    shipped = diffusers.PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=False).config
    config = {**getattr(diffusers, name).from_config(shipped, clip_sample=False).config, "_class_name": name}
    ours = PlanScheduler.from_config(config, solver=solver)
    ours.set_timesteps(10)
    assert float(ours.sigmas[-1]) == pytest.approx(end, abs=1e-4)


def test_the_class_of_a_config_is_remembered(tmp_path):
    """By our own config, which a folder keeps; another solver has its own rule, and `times_as` chooses."""
    config = peer_of("EulerDiscreteScheduler", timestep_spacing="linspace").config
    PlanScheduler.from_config(config, solver="ddim").save_pretrained(tmp_path)
    again = PlanScheduler.from_pretrained(tmp_path)
    again.set_timesteps(4)
    assert again.timesteps.tolist() == [999.0, 666.0, 333.0, 0.0]
    for changes in ({"solver": "dpmpp_2m"}, {"times_as": None}):
        other = PlanScheduler.from_config(again.config, **changes)
        other.set_timesteps(4)
        assert other.timesteps.tolist() == [999, 749, 500, 250]
    with pytest.raises(fs.FewstepError, match=r"unknown times_as 'EulerScheduler'. Did you mean 'EulerDiscreteScheduler'"):
        PlanScheduler.from_config(again.config, times_as="EulerScheduler")


def test_our_own_settings_are_kept(tmp_path):
    PlanScheduler(clip_sample=True, beta_start=0.001).save_pretrained(tmp_path)
    for config in (PlanScheduler(clip_sample=True, beta_start=0.001).config, PlanScheduler.load_config(tmp_path)):
        ours = PlanScheduler.from_config(config, solver="ddim").config
        assert (ours.clip_sample, ours.beta_start, ours.times_as) == (True, 0.001, None)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("DDIMScheduler", {"clip_sample": True}),
        ("HeunDiscreteScheduler", {"beta_start": 0.00085, "beta_end": 0.012}),
        ("CogVideoXDDIMScheduler", {"beta_schedule": "scaled_linear", "snr_shift_scale": 3.0, "clip_sample": False}),
    ],
)
def test_what_a_class_takes_its_model_for_is_kept(name, wanted, tmp_path):
    """In memory, where it is a default, as from a folder, where it is written down."""
    host = getattr(diffusers, name)()
    host.save_pretrained(tmp_path)
    for ours in (PlanScheduler.from_config(getattr(diffusers, name)().config), PlanScheduler.from_pretrained(tmp_path)):
        assert {key: ours.config[key] for key in wanted} == wanted
        torch.testing.assert_close(ours.alphas_cumprod.double(), host.alphas_cumprod.double(), rtol=1e-3, atol=1e-6)


def test_flow_by_the_multistep_convention():
    """Where diffusers' UniPC puts the timesteps, but for its truncation to whole numbers and its 1e-6 at the start."""
    host = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    host.set_timesteps(6)
    ours = made("unipc_2", host.config)
    ours.set_timesteps(6)
    np.testing.assert_allclose(ours.sigmas.numpy(), host.sigmas.numpy(), atol=2e-6)
    assert float((ours.timesteps - host.timesteps).abs().max()) <= 1.0


# ---- configs -----------------------------------------------------------------------------------------------------------------------


def test_options_of_the_solver():
    host = diffusers.DPMSolverMultistepScheduler(solver_order=3)
    assert made("unipc", host.config).config.solver_options is None  # their solver_order is not ours
    assert made("unipc", host.config, solver_order=2).config.solver_options == {"order": 2}
    assert made("unipc", host.config, order=2).config.solver_options == {"order": 2}
    changed = PlanScheduler.from_config(made("unipc", host.config, order=2).config, corrector=False)
    assert changed.config.solver_options == {"order": 2, "corrector": False}
    assert PlanScheduler.from_config(changed.config, solver="ddim").config.solver_options is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"solver": "dpmm"}, ValueError, "unknown solver"),
        ({"ordr": 2}, TypeError, "ordr is neither a setting"),
        ({"grid": "karas"}, ValueError, "karas"),
        ({"timestep_spacing": "trailin"}, ValueError, "trailing"),
        ({"prediction_type": "eps"}, ValueError, "epsilon"),
        ({"beta_schedule": "quadratic"}, ValueError, "scaled_linear"),
        ({"timestep_type": "continuos"}, ValueError, "continuous"),
        ({"sigma_data": -1.0}, ValueError, "sigma_data must be positive"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, ValueError, "only one"),
        ({"plan": "nowhere.safetensors"}, FileNotFoundError, "no plan nowhere"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        PlanScheduler.from_config({}, **arguments)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (diffusers.CMStochasticIterativeScheduler().config, {}),
        (diffusers.EDMEulerScheduler().config, {"prediction_type": "sample"}),
        ({}, {"invert_sigmas": True}),
    ],
)
def test_refuses_networks_of_another_kind(config, options):
    with pytest.raises(fs.FewstepError):
        made(config=config, **options)


def test_a_json_round_trip(tmp_path):
    scheduler = made("unipc", diffusers.PNDMScheduler(steps_offset=1).config, order=2, grid="lambda")
    scheduler.save_pretrained(tmp_path)
    again = PlanScheduler.from_pretrained(tmp_path)
    assert {k: v for k, v in scheduler.config.items() if k != "_use_default_values"} == dict(again.config)
    assert diffusers.DDIMScheduler.from_pretrained(tmp_path).config.steps_offset == 1  # and back to theirs
    changed = PlanScheduler.from_pretrained(tmp_path, solver="ddim")
    assert changed.config.solver == "ddim"


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "dpmpp_2m"},
        {"solver": "dpmpp_2m_sde", "timestep_spacing": "leading"},
        {"solver": "unipc", "prediction_type": "flow_prediction"},
    ],
)
def test_there_and_back(options):
    """Through the config of every compatible scheduler, nothing of ours is lost."""
    scheduler = PlanScheduler(**options)
    tried = 0
    for other in scheduler.compatibles:
        if other.__module__.startswith("diffusers.utils"):
            continue  # stands for one that needs a library that is not there
        back = PlanScheduler.from_config(other.from_config(scheduler.config).config)
        assert {key: back.config[key] for key in scheduler.config} == dict(scheduler.config), other
        tried += 1
    assert tried > 8


def test_another_grid():
    scheduler = made("unipc", grid="lambda")
    scheduler.set_timesteps(7)
    lams = scheduler.plan.schedule.lam(scheduler.plan.grid)
    assert np.ptp(np.diff(lams[:-1])) < 1e-6


# ---- steps -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("solver", [name for name in SOLVERS if "sde" not in name])
def test_is_sample(solver, kind):
    """The loop of the host gives what `fewstep.sample` gives."""
    scheduler = made(solver, prediction_type=kind)
    scheduler.set_timesteps(9)
    told = dict(zip(scheduler.plan.tau.tolist(), scheduler.timesteps, strict=True))
    predicts = {"epsilon": "noise", "sample": "data", "v_prediction": "velocity", "flow_prediction": "flow"}[kind]
    den = fs.Denoiser(
        lambda x, t: network(x, t[0]), scheduler.plan.schedule, predicts, network_time=lambda t: float(told[float(t)])
    )
    wanted = fs.sample(den, noise(dtype=torch.float64), scheduler.plan)
    found = loop(scheduler, noise(dtype=torch.float64))
    assert float((found - wanted).abs().max()) < 1e-10 * float(wanted.abs().max())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_every_number_of_steps(solver, n):
    scheduler = made(solver)
    scheduler.set_timesteps(n)
    assert len(scheduler.timesteps) == n
    assert len(scheduler.sigmas) == n + 1
    assert bool(torch.isfinite(loop(scheduler, noise())).all())
    with pytest.raises(ValueError, match="steps are done"):
        scheduler.step(noise(), 0, noise())


@pytest.mark.parametrize("solver", SOLVERS)
def test_begins_anywhere(solver):
    """Constant data are reached from every step, at its noise level, whatever the solver."""
    data = torch.full(SHAPE, 0.3, dtype=torch.float64)
    for first in range(9):
        scheduler = made(solver, prediction_type="sample")
        scheduler.set_timesteps(9)
        scheduler.set_begin_index(first)
        x = scheduler.add_noise(data, noise(dtype=torch.float64), scheduler.timesteps[first : first + 1])
        assert scheduler.step_index is None
        out = loop(scheduler, x, net=lambda x, t: data, first=first)
        assert scheduler.step_index == 9
        assert float((out - data).abs().max()) < 1e-9


def test_the_first_step_is_found_without_begin_index():
    scheduler = made("unipc")
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(3)
    wanted = loop(scheduler, noise(), first=3)
    for told in (lambda t: t, lambda t: t.clone(), int):
        scheduler.set_timesteps(8)
        x = noise()
        for t in scheduler.timesteps[3:]:
            x = scheduler.step(network(x, t), told(t), x).prev_sample
        assert torch.equal(x, wanted)


def test_half_precision_keeps_a_single_precision_state():
    """Rounding of the returned samples does not add up: the error is that of the network's inputs and outputs alone."""

    def net(x, t):  # a network that does not see the rounding of its input
        return seen[int(t)].to(x.dtype)

    scheduler = made("unipc")
    seen = {int(t): noise(int(t)).bfloat16().float() for t in range(1000)}
    scheduler.set_timesteps(30)
    start = noise().bfloat16()
    wanted = loop(scheduler, start.float(), net=net)
    scheduler.set_timesteps(30)
    found = loop(scheduler, start, net=net)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())
    scheduler.set_timesteps(30)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x.clone(), return_dict=False)[0]
    assert not torch.equal(x, wanted.bfloat16())  # a host that hands back another tensor counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_the_host_changes_counts(dtype):
    """In place, and by another tensor."""

    def run(change):
        scheduler = made("dpmpp_2m")
        scheduler.set_timesteps(6)
        x = noise().to(dtype)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
            x = change(x) if i == 2 else x
        return x

    other = run(lambda x: x * 0.5)
    assert torch.equal(run(lambda x: x.mul_(0.5)), other)
    assert not torch.equal(run(lambda x: x), other)


def test_output_forms_and_shapes():
    scheduler = made()
    scheduler.set_timesteps(4)
    output = scheduler.step(noise(), scheduler.timesteps[0], noise())
    assert isinstance(output, diffusers.schedulers.scheduling_utils.SchedulerOutput)
    assert output.prev_sample.shape == SHAPE
    scheduler.set_timesteps(4)
    (as_tuple,) = scheduler.step(noise(), scheduler.timesteps[0], noise(), return_dict=False)
    assert torch.equal(as_tuple, output.prev_sample)
    scheduler.set_timesteps(4)
    with_variance = torch.cat([noise(), noise(1)], 1)
    assert torch.equal(scheduler.step(with_variance, scheduler.timesteps[0], noise())[0], as_tuple)
    with pytest.raises(fs.FewstepError, match="shape"):
        scheduler.step(noise()[:, :1], scheduler.timesteps[1], noise())
    with pytest.raises(ValueError, match="set_timesteps"):
        made().step(noise(), 1, noise())


def test_eta_is_an_option_of_the_solver():
    scheduler = made("ddim")
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="option of the solver"):
        scheduler.step(noise(), scheduler.timesteps[0], noise(), eta=1.0)
    assert made("ddim", eta=0.5).config.solver_options == {"eta": 0.5}


def test_pndm_that_begins_later():
    """Behind its start it goes on as iPNDM would; inside, where two calls are at one time, in first-order steps. Any budget is planned."""
    config = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False).config
    scheduler, x = made("pndm", config), noise()
    for n in (1, 2, 3, 4):
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n
    scheduler.set_timesteps(9)
    assert scheduler.timesteps.tolist() == [876, 751, 751, 626, 501, 376, 251, 126, 1]
    scheduler.set_begin_index(3)
    ours = loop(scheduler, x, first=3)
    other = made("ipndm", config, final_sigmas_type="sigma_min")
    other.set_timesteps(timesteps=scheduler.timesteps[3:])
    torch.testing.assert_close(ours, loop(other, x), rtol=1e-5, atol=1e-5)
    scheduler.set_timesteps(9)
    scheduler.set_begin_index(1)
    assert bool(torch.isfinite(loop(scheduler, x, first=1)).all())


# ---- noise -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m_sde", "dpmpp_2s_sde", "dpmpp_3s_sde", "sa", "edm_heun", "lcm", "tcd"])
def test_noise_of_the_generator(solver):
    """Reproducible, and of the law of `fewstep.sample`: the same deviations of the samples, within 5 sigmas of the estimate."""
    options = {"s_churn": 10.0} if solver == "edm_heun" else {}
    scheduler = made(solver, prediction_type="sample", final_sigmas_type="sigma_min", **options)
    scheduler.set_timesteps(15)
    plan = scheduler.plan
    assert plan.stochastic
    levels = {
        t: (plan.schedule.alpha(tau), plan.schedule.sigma(tau))
        for t, tau in zip(scheduler.timesteps.tolist(), plan.tau, strict=True)
    }

    def exact(x, t):  # data of standard deviation 0.5
        alpha, sigma = levels[int(t)]
        return x * float(0.25 * alpha / (0.25 * alpha**2 + sigma**2))

    count = 20_000
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(5))
    first = loop(scheduler, x, net=exact)
    scheduler.set_timesteps(15)
    assert torch.equal(loop(scheduler, x, net=exact), first)
    told = dict(zip(plan.tau.tolist(), scheduler.timesteps.tolist(), strict=True))
    ours = fs.sample(lambda x, t: exact(x, told[t]), x, plan, seeds=range(count))
    assert float(first.std() / ours.std()) == pytest.approx(1.0, abs=5 / (2 * count) ** 0.5)
    assert not torch.allclose(first, ours, atol=0.1)


def test_noise_that_is_given():
    """Zero noise is the drift alone; and a list of generators is one a sample."""
    scheduler = made("dpmpp_2m_sde")
    scheduler.set_timesteps(5)
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, variance_noise=torch.zeros_like(x)).prev_sample
    assert bool(torch.isfinite(x).all())
    scheduler.set_timesteps(5)
    scheduler.step(noise(), scheduler.timesteps[0], noise(), generator=[torch.Generator().manual_seed(k) for k in range(2)])


def test_noise_of_overlapping_intervals_is_one_path():
    """Where rows share a part of the clock, what they share is drawn once, and kept for as long as it is needed."""
    intervals = [(0.5, 1.0), (0.2, 1.0), (0.2, 0.6), (0.0, 0.2)]
    rows = tuple(
        Row(tau, (1.0,), (), noise=Interval(1.0, *interval)) for tau, interval in zip((0.9, 0.8, 0.7, 0.6), intervals, strict=True)
    )
    plan = fs.Plan(fs.schedules.VPLinear(), [0.9, 0.8, 0.7, 0.6, 0.5], rows)
    x = torch.zeros(40_000, 1)
    run = Run(plan, x, 0, network_of({"prediction_type": "sample"}), limited=False)
    generator = torch.Generator().manual_seed(0)
    drawn = [run.noise(i, x, generator, None) for i in range(4)]
    assert not run.drawn
    for i, (begin, end) in enumerate(intervals):
        for j, (low, high) in enumerate(intervals):
            shared = max(0.0, min(end, high) - max(begin, low)) / ((end - begin) * (high - low)) ** 0.5
            assert float((drawn[i] * drawn[j]).mean()) == pytest.approx(shared, abs=0.035)  # 5 sigmas


def test_add_noise_and_velocity():
    host = diffusers.DDPMScheduler()
    ours = made(config=host.config)
    data, eps, times = noise(1), noise(2), torch.tensor([3, 871])
    assert torch.allclose(ours.add_noise(data, eps, times), host.add_noise(data, eps, times), atol=1e-5)
    assert torch.allclose(ours.get_velocity(data, eps, times), host.get_velocity(data, eps, times), atol=1e-5)
    ours.set_timesteps(5)
    level = ours.plan.schedule.sigma(ours.plan.grid[2])
    noised = ours.add_noise(torch.zeros_like(data), eps, ours.timesteps[2:3])
    assert torch.allclose(noised, float(level) * eps, atol=1e-6)
    flow = made(config=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    flow.set_timesteps(4)
    sigma = flow.sigmas[1]
    assert torch.allclose(flow.scale_noise(data, flow.timesteps[1:2], eps), (1 - sigma) * data + sigma * eps, atol=1e-6)


# ---- plans -------------------------------------------------------------------------------------------------------------------------


def fitted(nfe=5, solver="dpmpp_3m", grid="lambda"):
    return fs.make_plan(solver, schedule_of({}), nfe=nfe, grid=grid, final="zero")


def test_a_folder_of_plans_is_no_plan(tmp_path):
    fitted().save(tmp_path / "plan-5.safetensors")
    with pytest.raises(OSError, match=r"is a folder; give one of the plans in it: plan-5\.safetensors\."):
        PlanScheduler.from_plan(tmp_path)
    with pytest.raises(fs.FewstepError, match="Did you mean 'karras'"):
        made(grid="kerras")


def test_a_table_is_not_printed_whole():
    text = repr(PlanScheduler.from_plan(fitted()))
    assert len(text) < 3000
    assert '"trained_betas": "1000 numbers"' in text


def test_a_plan_at_its_own_number_of_steps_and_at_others():
    scheduler = PlanScheduler.from_plan(fitted())
    assert scheduler.config.solver == "dpmpp_3m"
    assert scheduler.config.grid == "lambda"
    scheduler.set_timesteps(5)
    assert scheduler.plan == fitted()
    with pytest.warns(UserWarning, match="base solver, 'dpmpp_3m', plans"):
        scheduler.set_timesteps(8)
    assert scheduler.plan == fitted(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(9)  # said once


@pytest.mark.parametrize("final", ["zero", "t_end"])
@pytest.mark.parametrize("schedule", [schedule_of({}), fs.schedules.Flow(shift=3.0)], ids=["table", "flow"])
@pytest.mark.filterwarnings("ignore:the plan has:UserWarning")
def test_other_numbers_of_steps_are_planned_as_the_plan_was(schedule, final):
    """With its solver, kind of grid, shift and end."""
    scheduler = PlanScheduler.from_plan(fs.make_plan("unipc", schedule, 5, grid="time", final=final))
    scheduler.set_timesteps(8)
    assert scheduler.plan == fs.make_plan("unipc", schedule, 8, grid="time", final=final)


@pytest.mark.parametrize(
    ("solver", "name", "options"),
    [
        (fs.solvers.UniPC(), "unipc", None),
        (fs.solvers.UniPC(order=2, corrector_skip=(0,)), "unipc", {"order": 2, "corrector_skip": [0]}),
        (fs.solvers.SASolver(interval=(0.2, 0.8)), "sa", {"interval": [0.2, 0.8]}),
        (fs.solvers.DualFast(fs.solvers.DEIS()), "deis", None),
    ],
)
def test_the_base_solver_of_a_plan(solver, name, options, tmp_path):
    PlanScheduler.from_plan(solver.plan(schedule_of({}), 5)).save_pretrained(tmp_path)
    config = PlanScheduler.from_pretrained(tmp_path).config
    assert (config.solver, config.solver_options) == (name, options)


def test_a_plan_from_the_middle_is_its_base_solvers():
    scheduler = PlanScheduler.from_plan(fitted(6))
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    with pytest.warns(UserWarning, match="begins at its first call"):
        out = loop(scheduler, noise(), first=2)
    assert bool(torch.isfinite(out).all())


def test_a_plan_in_files(tmp_path):
    fitted().save(tmp_path / "tuned.safetensors")
    scheduler = PlanScheduler.from_plan(tmp_path / "tuned.safetensors", diffusers.DDPMScheduler(clip_sample=False).config)
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["plan"] == fitted().digest
    script = (
        "import sys, torch; from fewstep.diffusers import PlanScheduler; s = PlanScheduler.from_pretrained(sys.argv[1]);"
        "s.set_timesteps(5); print(s.plan.digest)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "scheduler"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fitted().digest
    fitted(6).save(tmp_path / "scheduler" / "plan.safetensors")
    with pytest.raises(fs.FewstepError, match="not the plan"):
        PlanScheduler.from_pretrained(tmp_path / "scheduler")
    (tmp_path / "scheduler" / "plan.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        PlanScheduler.from_pretrained(tmp_path / "scheduler")
    assert PlanScheduler.from_pretrained(tmp_path / "scheduler", solver="unipc").config.plan is None


def test_a_plan_of_the_hub(tmp_path, monkeypatch):
    """It comes from where the config came from."""
    import huggingface_hub

    scheduler, asked = PlanScheduler.from_plan(fitted()), []
    scheduler.save_pretrained(tmp_path)

    def found(name, file, **told):
        asked.append((name, told))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found)
    monkeypatch.setattr(PlanScheduler, "load_config", lambda name, **told: (dict(scheduler.config), {}))
    assert PlanScheduler.from_pretrained("owner/name", subfolder="scheduler", revision="v2").config.plan == fitted().digest
    assert asked == [("owner/name", {"subfolder": "scheduler", "revision": "v2"})]


def test_a_plan_of_other_noise_levels_is_refused():
    with pytest.raises(fs.FewstepError, match="noise levels"):
        PlanScheduler.from_plan(fitted(), {"beta_schedule": "scaled_linear"})
    with pytest.raises(fs.FewstepError, match="needs config"):
        PlanScheduler.from_plan(fs.make_plan("ddim", fs.schedules.VPLinear(), nfe=3))


def test_a_tuned_plan(tmp_path):
    """Fitted to a model, saved, loaded in another scheduler: the samples of `fewstep.sample`."""
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    schedule = schedule_of(config)
    exact = fs.exact.GaussianMixture(schedule, torch.tensor([[1.0, 0.5], [-1.0, -0.3]]), 0.1)

    def net(x, t):
        at = (float(t.flatten()[0]) + 1.0) / 1000
        alpha, sigma = float(schedule.alpha(at)), float(schedule.sigma(at))
        return (x - alpha * exact(x, at)) / sigma

    den = fs.Denoiser(net, schedule, "noise", integer_time=True)
    x = fs.draw_noise((2,), range(64))
    plan = fs.tune(den, nfe=3, noise=x, method="learned", seed=0).plan
    PlanScheduler.from_plan(plan, config).save_pretrained(tmp_path)
    scheduler = PlanScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(3)
    assert scheduler.plan == plan
    assert torch.allclose(loop(scheduler, x, net=net), fs.sample(den, x, plan), atol=1e-4)


def test_times_between_the_entries_of_the_table():
    plan = fitted()
    for fractional in (False, True):
        scheduler = PlanScheduler.from_plan(plan, fractional_timesteps=fractional)
        scheduler.set_timesteps(5)
        assert scheduler.timesteps.is_floating_point() == fractional
        exact = 1000 * plan.tau - 1
        np.testing.assert_allclose(scheduler.timesteps.numpy(), exact if fractional else np.rint(exact), rtol=1e-6)


def test_a_flow_plan():
    """Made for a flow with a shift of its own; the network is told sigma."""
    plan = fs.make_plan("unipc", fs.schedules.Flow(shift=3.0, t_end=0.0), nfe=5, grid="time")
    scheduler = PlanScheduler.from_plan(plan)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.2, 5))  # what flow pipelines hand to every scheduler
    assert scheduler.plan == plan
    np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * plan.schedule.sigma(plan.tau), rtol=1e-6)
    data = torch.full(SHAPE, 0.3)
    scheduler.set_begin_index(0)
    x = scheduler.scale_noise(data, scheduler.timesteps[:1], noise())
    assert torch.equal(x, noise())
    x = loop(scheduler, x, net=lambda x, t: noise() - data)
    assert torch.allclose(x, data, atol=1e-5)


def test_a_start_transform():
    schedule = schedule_of({})
    prior = fs.solvers.GaussianPrior(np.full((3, 4, 4), 0.2), np.eye(48)[:2].reshape(2, 3, 4, 4), np.array([0.5, 0.2]), rest=0.3)
    plan = fs.solvers.Teleport(fs.solvers.DPMSolverPP(), prior, to=0.6).plan(schedule, nfe=5, final="zero")
    assert plan.start is not None
    scheduler = PlanScheduler.from_plan(plan, prediction_type="v_prediction")
    scheduler.set_timesteps(5)
    den = fs.Denoiser(lambda x, t: network(x, t[0]), schedule, "velocity", integer_time=True)
    x = noise()
    wanted = fs.sample(den, x, plan)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    assert torch.allclose(x, wanted, atol=1e-5)
    scheduler.set_timesteps(5)
    with pytest.raises(fs.FewstepError, match="scale_model_input"):
        scheduler.step(noise(), scheduler.timesteps[0], noise())


# ---- apart, and quiet --------------------------------------------------------------------------------------------------------------


def test_runs_do_not_share_state():
    first = made("unipc")
    first.set_timesteps(6)
    wanted = loop(first, noise())
    first.set_timesteps(6)
    x = first.step(network(noise(), first.timesteps[0]), first.timesteps[0], noise(), return_dict=False)[0]
    second = copy.deepcopy(first)
    second.set_timesteps(4)
    loop(second, noise(2))
    for t in first.timesteps[1:]:
        x = first.step(network(x, t), t, x, return_dict=False)[0]
    assert torch.equal(x, wanted)


class Reads(TorchDispatchMode):
    """Counts the operations that read a value, and all others."""

    NAMES = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_to_copy")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "dpmpp_3s", "deis"])
def test_steps_read_nothing(solver):
    scheduler = made(solver)
    scheduler.set_timesteps(10)
    times = list(scheduler.timesteps)
    with Reads() as reads:
        x = noise()
        before = len(reads.seen)
        for t in times:
            x = scheduler.step(x, t, x, return_dict=False)[0]
    seen = reads.seen[before:]
    assert not set(seen) & set(Reads.NAMES), set(seen)
    assert len(seen) < 8 * 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator: synchronisations cannot be forbidden")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_synchronisation_on_an_accelerator(dtype):
    for solver in ("dpmpp_2m", "unipc", "dpmpp_2m_sde", "dpmpp_2s_sde"):
        scheduler = made(solver)
        scheduler.set_timesteps(10, device="cuda")
        x = torch.randn(SHAPE, device="cuda", dtype=dtype)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in scheduler.timesteps:
                x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(torch.isfinite(x).all())


def test_needs_diffusers():
    script = "import sys; sys.modules['diffusers'] = None\nimport fewstep\nfewstep.diffusers"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert 'pip install "fewstep[diffusers]"' in done.stderr


def test_times_need_one_argument():
    with pytest.raises(ValueError, match="exactly one"):
        times_of({}, schedule_of({}))
    with pytest.raises(ValueError, match="at least 1"):
        made().set_timesteps(0)
    with pytest.raises(ValueError, match="there are 2 times"):
        made().set_timesteps(5, timesteps=[500, 20])
    for outside in ([1000, 20], [500, -1], [float("nan"), 20]):
        with pytest.raises(ValueError, match="between 0 and 999"):
            made().set_timesteps(timesteps=outside)
    for nothing in ({"timesteps": []}, {"sigmas": []}):
        with pytest.raises(ValueError, match="there are no times"):
            made().set_timesteps(**nothing)
    with pytest.raises(ValueError, match="places them itself"):
        made(use_karras_sigmas=True).set_timesteps(timesteps=[500, 20])
    scheduler = made()
    scheduler.set_timesteps(sigmas=[14.0, 3.0, 0.5, 0.0])
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [14.0, 3.0, 0.5, 0.0], rtol=1e-6)
    assert len(scheduler) == 1000
