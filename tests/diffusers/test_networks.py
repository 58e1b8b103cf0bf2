"""`PlanScheduler` for networks that are asked in other ways, beside the schedulers made for them, in the loop of a pipeline."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", minversion="0.32")

import fewstep as fs  # noqa: E402
from fewstep.diffusers import PlanScheduler  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SHAPE = (2, 3, 4, 4)
MIX = 0.2 * torch.randn(48, 48, generator=torch.Generator().manual_seed(3))
VIDEO = {
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "beta_schedule": "scaled_linear",
}
"""The config of Stable Video Diffusion."""


def noise(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def network(x, t):
    """Not linear, and it knows the time."""
    return (torch.tanh(x.flatten(1) @ MIX.to(x.dtype)) * (1.0 + 0.1 * float(t) / (1.0 + abs(float(t))))).reshape(x.shape)


def loop(scheduler, x, **options):
    """As pipelines have it."""
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(given, t), t, x, return_dict=False, **options)[0]
    return x


def assert_same(ours, host, n, *, our_n=None):
    host.set_timesteps(n)
    ours.set_timesteps(our_n or n)
    assert ours.timesteps.shape == host.timesteps.shape
    torch.testing.assert_close(ours.timesteps.double(), host.timesteps.double(), rtol=1e-4, atol=1e-5)
    wanted, found = loop(host, noise()), loop(ours, noise())
    assert float((found - wanted).abs().max()) < 1e-4 * max(1.0, float(wanted.abs().max()))


PEERS = {
    "Euler": (diffusers.EDMEulerScheduler, {}, {"solver": "ddim"}),
    "Euler exponential v": (
        diffusers.EDMEulerScheduler,
        {"sigma_schedule": "exponential", "prediction_type": "v_prediction"},
        {"solver": "edm_euler"},
    ),
    "Euler other data": (diffusers.EDMEulerScheduler, {"sigma_data": 1.3, "rho": 5.0, "sigma_max": 14.0}, {"solver": "ddim"}),
    "1M": (diffusers.EDMDPMSolverMultistepScheduler, {"solver_order": 1}, {"solver": "dpmpp_1"}),
    "2M": (diffusers.EDMDPMSolverMultistepScheduler, {}, {"solver": "dpmpp_2m", "lower_order_final": 15}),
    "2M taylor": (
        diffusers.EDMDPMSolverMultistepScheduler,
        {"solver_type": "heun"},
        {"solver": "dpmpp_2m_taylor", "lower_order_final": 15},
    ),
    "2M threshold": (
        diffusers.EDMDPMSolverMultistepScheduler,
        {"thresholding": True},
        {"solver": "dpmpp_2m", "lower_order_final": 15},
    ),
    "3M": (
        diffusers.EDMDPMSolverMultistepScheduler,
        {"solver_order": 3},
        {"solver": "dpmpp_3m", "compat": "official", "lower_order_final": 15},
    ),
    "video": (diffusers.EulerDiscreteScheduler, VIDEO, {"solver": "ddim"}),
    "continuous trailing": (
        diffusers.EulerDiscreteScheduler,
        {"prediction_type": "v_prediction", "timestep_type": "continuous", "timestep_spacing": "trailing"},
        {"solver": "ddim"},
    ),
}


@pytest.mark.parametrize(("peer", "config", "options"), PEERS.values(), ids=PEERS)
@pytest.mark.parametrize("n", [4, 8, 20])
def test_agrees_with_diffusers(peer, config, options, n):
    host = peer(**config)
    assert_same(PlanScheduler.from_config(host.config, **options), host, n)


@pytest.mark.parametrize("order", [1, 2])
def test_stable_audio(order, monkeypatch):
    """Its scheduler's own noise, handed to both."""
    pytest.importorskip("torchsde")
    host = diffusers.CosineDPMSolverMultistepScheduler(solver_order=order, sigma_max=50.0)
    ours = PlanScheduler.from_config(host.config, solver="dpmpp_2m_sde", order=order, lower_order_final=15)
    for n in (8, 20):
        host.set_timesteps(n)
        ours.set_timesteps(n)
        np.testing.assert_allclose(ours.timesteps.numpy(), host.timesteps.numpy(), rtol=1e-5)
        host.noise_sampler = lambda *_: noise(1)
        wanted, found = loop(host, noise()), loop(ours, noise(), variance_noise=noise(1))
        assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_edm_with_noise(monkeypatch):
    host = diffusers.EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    ours = PlanScheduler.from_config(host.config, solver="dpmpp_2m_sde", lower_order_final=15)
    monkeypatch.setattr(sys.modules[type(host).__module__], "randn_tensor", lambda *_, **__: noise(1))
    host.set_timesteps(9)
    ours.set_timesteps(9)
    wanted, found = loop(host, noise()), loop(ours, noise(), variance_noise=noise(1))
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_levels_uniform_in_log_sigma():
    """Ours, told the time of its state. Theirs has the same levels, and tells the network those of other timesteps."""
    host = diffusers.EulerDiscreteScheduler(interpolation_type="log_linear")
    ours = PlanScheduler.from_config(host.config, solver="ddim")
    host.set_timesteps(8)
    ours.set_timesteps(8)
    np.testing.assert_allclose(ours.sigmas.numpy(), host.sigmas[:9].numpy(), rtol=2e-4)
    own = [
        float(host._sigma_to_t(s, np.log(((1 - host.alphas_cumprod) / host.alphas_cumprod).sqrt().numpy())))
        for s in host.sigmas[:8]
    ]
    assert float(np.abs(ours.timesteps.numpy() - own).max()) < 1.0
    assert float(np.abs(host.timesteps.numpy() - own).max()) > 100.0


def test_levels_uniform_in_log_sigma_with_continuous_times():
    """Theirs makes one call more than it is asked for, and then goes to 0."""
    options = {"interpolation_type": "log_linear", "timestep_type": "continuous", "prediction_type": "v_prediction"}
    host = diffusers.EulerDiscreteScheduler(**options)
    assert_same(PlanScheduler.from_config(host.config, solver="ddim", final_sigmas_type="zero"), host, 8, our_n=9)


@pytest.mark.parametrize("arguments", [{"num_inference_steps": 8}, {"sigmas": np.linspace(1.0, 0.1, 8)}])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_inverted_flow(arguments, shift):
    host = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, shift=shift)
    ours = PlanScheduler.from_config(host.config, solver="flow_euler")
    host.set_timesteps(**arguments)
    ours.set_timesteps(**arguments)
    torch.testing.assert_close(ours.timesteps, host.timesteps, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(loop(ours, noise()), loop(host, noise()), rtol=1e-4, atol=1e-4)
    told = ours.timesteps.clone()
    ours.set_timesteps(timesteps=told)
    torch.testing.assert_close(ours.timesteps, told)


@pytest.mark.parametrize("solver", ["unipc", "dpmpp_2s", "edm_heun", "deis", "auto", "dpmpp_3m_sde"])
@pytest.mark.parametrize("host", [diffusers.EDMEulerScheduler(), diffusers.EulerDiscreteScheduler(**VIDEO)], ids=["edm", "video"])
def test_every_solver_is_sample(host, solver):
    """The loop of the host gives what `fewstep.sample` gives, with the raw network in `fewstep.load`."""
    ours = PlanScheduler.from_config(host.config, solver=solver)
    ours.set_timesteps(9)
    plan = ours.plan
    if not plan.stochastic:
        data, sign = (0.5, 1.0) if "sigma_data" in host.config else (1.0, -1.0)
        den = fs.load(lambda x, c: sign * network(x, c[0]), preconditioning="edm", sigma_data=data, schedule=plan.schedule)
        x = noise().double()
        wanted = fs.sample(den, x * ours.init_noise_sigma, plan)
        found = loop(ours, x)
        assert float((found - wanted).abs().max()) < 1e-5 * max(1.0, float(wanted.abs().max()))  # c_noise is told in float32
        ours.set_timesteps(9)
    found = loop(ours, noise(), generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(found).all())


def test_begins_anywhere():
    """Constant data are reached from every step, at its noise level."""
    data = torch.full(SHAPE, 0.3, dtype=torch.float64)
    for first in range(6):
        scheduler = PlanScheduler.from_config(diffusers.EDMEulerScheduler().config, solver="dpmpp_2m")
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(first)
        x = scheduler.add_noise(data, noise().double(), scheduler.timesteps[first : first + 1])
        for i, t in enumerate(scheduler.timesteps[first:], start=first):
            sigma = float(scheduler.sigmas[i])
            given = scheduler.scale_model_input(x, t)
            torch.testing.assert_close(given, x / (sigma**2 + 0.25) ** 0.5, rtol=1e-6, atol=0.0)
            root = (sigma**2 + 0.25) ** 0.5
            x = scheduler.step((data - 0.25 / root**2 * x) * root / (0.5 * sigma), t, x).prev_sample
        assert float((x - data).abs().max()) < 1e-5  # attributes are single precision


def test_timesteps_and_sigmas_of_the_callers():
    scheduler = PlanScheduler.from_config(diffusers.EDMEulerScheduler().config, solver="unipc")
    scheduler.set_timesteps(sigmas=[10.0, 1.0, 0.1, 0.0])
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [10.0, 1.0, 0.1, 0.0], rtol=1e-6)
    told = scheduler.timesteps
    np.testing.assert_allclose(told.numpy(), 0.25 * np.log([10.0, 1.0, 0.1]), rtol=1e-6)
    scheduler = PlanScheduler.from_config(diffusers.EDMEulerScheduler().config, solver="unipc")
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        scheduler.set_timesteps(timesteps=told)
    scheduler = PlanScheduler.from_config(scheduler.config, use_karras_sigmas=False)
    scheduler.set_timesteps(timesteps=told)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [10.0, 1.0, 0.1, 0.0], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"), [("EDMEulerScheduler", {"sigma_data": 0.7}), ("CosineDPMSolverMultistepScheduler", {})]
)
def test_a_round_trip(name, settings, tmp_path):
    if name.startswith("Cosine"):
        pytest.importorskip("torchsde")
    scheduler = PlanScheduler.from_config(getattr(diffusers, name)(**settings).config, solver="unipc")
    scheduler.save_pretrained(tmp_path)
    again = PlanScheduler.from_pretrained(tmp_path)
    assert {k: v for k, v in scheduler.config.items() if k != "_use_default_values"} == dict(again.config)
    again.set_timesteps(5)
    scheduler.set_timesteps(5)
    assert torch.equal(again.timesteps, scheduler.timesteps)
    assert torch.equal(loop(again, noise()), loop(scheduler, noise()))


def test_a_tuned_plan(tmp_path):
    schedule = fs.schedules.EDM()
    plan = fs.make_plan("dpmpp_2m", schedule, nfe=6, grid="karras", final="zero")
    scheduler = PlanScheduler.from_plan(plan, diffusers.EDMEulerScheduler().config)
    scheduler.set_timesteps(6)
    assert scheduler.plan.digest == plan.digest
    with pytest.raises(fs.FewstepError, match="noise levels"):
        PlanScheduler.from_plan(fs.make_plan("ddim", fs.schedules.Flow(t_end=0.0), nfe=5), diffusers.EDMEulerScheduler().config)


def test_velocity_is_no_target():
    scheduler = PlanScheduler.from_config(diffusers.EDMEulerScheduler().config)
    with pytest.raises(fs.FewstepError, match="preconditioning"):
        scheduler.get_velocity(noise(), noise(1), torch.tensor([0.5]))


@pytest.mark.parametrize("karras", [False, True])
def test_a_preconditioned_network_begins_at_a_finite_sigma(karras):
    """Where the table has zero terminal SNR; as theirs."""
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_type": "continuous"}
    host = diffusers.EulerDiscreteScheduler(**config, beta_schedule="scaled_linear", use_karras_sigmas=karras)
    ours = PlanScheduler.from_config(host.config, solver="ddim")
    host.set_timesteps(6)
    ours.set_timesteps(6)
    assert float(ours.sigmas[0]) == pytest.approx(float(host.sigmas[0]), rel=1e-5)
    assert bool(torch.isfinite(loop(ours, noise())).all())
