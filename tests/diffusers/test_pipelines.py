"""`PlanScheduler` in diffusers' own pipelines, built from their classes with tiny random networks: the same images as with the peer."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", minversion="0.32")

from tiny_pipelines import LATENT, controlled, dit, flux, image_to_video, sd3, sdxl, stable_diffusion, unconditional, video  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.diffusers import PlanScheduler  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
]
TOLERANCE = 1e-4


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


TEXT = {"prompt_embeds": noise(1, 4, 8), "negative_prompt_embeds": 0.5 * noise(1, 4, 8), "output_type": "latent"}
POOLED = {"pooled_prompt_embeds": noise(1, 8), "negative_pooled_prompt_embeds": 0.5 * noise(1, 8)}
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(8))
MASK = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)


def images(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    out = pipe(generator=torch.manual_seed(0), **options)[0]
    return np.asarray(out.detach() if isinstance(out, torch.Tensor) else out)


def assert_alike(pipe, peer, ours, **options):
    """The same images with the peer and with ours, which is made from the config of the pipeline's own scheduler."""
    pipe.scheduler = peer
    wanted = images(pipe, **options)
    pipe.scheduler = ours
    found = images(pipe, **options)
    assert np.isfinite(wanted).all()
    assert wanted.std() > 1e-3
    assert np.abs(found - wanted).max() < TOLERANCE * max(1.0, np.abs(wanted).max())


# ---- the same images ---------------------------------------------------------------------------------------------------------------

MULTISTEP = {
    "2M": (diffusers.DPMSolverMultistepScheduler, {}, {"solver": "dpmpp_2m", "lower_order_final": 15}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}, {"solver": "unipc_2", "lower_order_final": True}),
    "2M, Karras": (
        diffusers.DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True},
        {"solver": "dpmpp_2m", "lower_order_final": 15},
    ),
}


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_unconditional_ddim(steps):
    host = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    pipe = unconditional(diffusers.DDIMPipeline, host)
    ours = PlanScheduler.from_config(host.config, solver="ddim")
    assert_alike(pipe, host, ours, num_inference_steps=steps, output_type="np")


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_unconditional_multistep(kind):
    host = diffusers.DDPMScheduler(prediction_type=kind, clip_sample=False)
    pipe = unconditional(diffusers.DDPMPipeline, host)
    peer = diffusers.DPMSolverMultistepScheduler.from_config(host.config)
    ours = PlanScheduler.from_config(host.config, solver="dpmpp_2m", lower_order_final=15)
    assert_alike(pipe, peer, ours, num_inference_steps=8, output_type="np")


def test_ancestral_sampling_runs_with_as_many_steps_as_the_table_has():
    host = diffusers.DDPMScheduler(num_train_timesteps=50)
    pipe = unconditional(diffusers.DDPMPipeline, host)
    pipe.scheduler = PlanScheduler.from_config(host.config, solver="ddpm")
    first = images(pipe, num_inference_steps=50, output_type="np")
    assert np.array_equal(first, images(pipe, num_inference_steps=50, output_type="np"))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_class_conditional(guidance):
    host = diffusers.DDIMScheduler(clip_sample=False)
    pipe = dit(host)
    options = {"class_labels": [3], "guidance_scale": guidance, "num_inference_steps": 5, "output_type": "np"}
    assert_alike(pipe, host, PlanScheduler.from_config(host.config, solver="ddim"), **options)
    peer = diffusers.DPMSolverMultistepScheduler.from_config(host.config)
    assert_alike(pipe, peer, PlanScheduler.from_config(host.config, lower_order_final=15), **options)


@pytest.mark.parametrize(
    ("name", "solver"), [("LCMScheduler", {"solver": "lcm", "timestep_scaling": 10.0}), ("TCDScheduler", {"solver": "tcd"})]
)
def test_stable_diffusion_of_consistency_models(name, solver):
    """As it is done with a LoRA: from the config of Stable Diffusion. Both draw the same noise; TCD's gamma is the pipeline's eta."""
    host = diffusers.PNDMScheduler(**LATENT, skip_prk_steps=True)
    pipe = stable_diffusion(diffusers.StableDiffusionPipeline, host)
    peer = getattr(diffusers, name).from_config(host.config)
    options = {**TEXT, "num_inference_steps": 4, "guidance_scale": 1.0, "height": 16, "width": 16}
    pipe.scheduler = peer
    wanted = images(pipe, **options, eta=0.3)
    pipe.scheduler = PlanScheduler.from_config(host.config, **solver)
    found = images(pipe, **options)
    assert np.abs(found - wanted).max() < TOLERANCE * max(1.0, np.abs(wanted).max())


def test_stable_diffusion_pndm():
    """The default of early pipelines; asked for n steps, it makes n + 1 calls."""
    host = diffusers.PNDMScheduler(**LATENT, skip_prk_steps=True, set_alpha_to_one=False)
    pipe = stable_diffusion(diffusers.StableDiffusionPipeline, host)
    options = {**TEXT, "guidance_scale": 5.0, "height": 16, "width": 16}
    wanted = images(pipe, **options, num_inference_steps=6)
    pipe.scheduler = PlanScheduler.from_config(host.config, solver="pndm")
    found = images(pipe, **options, num_inference_steps=7)
    assert np.abs(found - wanted).max() < TOLERANCE * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize(("peer", "changes", "ours"), MULTISTEP.values(), ids=MULTISTEP)
def test_stable_diffusion(peer, changes, ours):
    host = diffusers.PNDMScheduler(**LATENT, skip_prk_steps=True)
    pipe = stable_diffusion(diffusers.StableDiffusionPipeline, host)
    options = {**TEXT, "num_inference_steps": 6, "guidance_scale": 5.0, "height": 16, "width": 16}
    theirs, ours = peer.from_config(host.config, **changes), PlanScheduler.from_config(host.config, **changes, **ours)
    assert_alike(pipe, theirs, ours, **options)


def test_chosen_timesteps():
    host = diffusers.PNDMScheduler(**LATENT)
    pipe = stable_diffusion(diffusers.StableDiffusionPipeline, host)
    options = {**TEXT, "timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24], "height": 16, "width": 16}
    peer = diffusers.DPMSolverMultistepScheduler.from_config(host.config)
    assert_alike(pipe, peer, PlanScheduler.from_config(host.config, lower_order_final=15), **options)


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("name", ["2M", "UniPC"])
def test_image_to_image(name, strength):
    """A run that begins at a later step plans from there: its first step is of order 1, as with the peer."""
    peer, changes, ours = MULTISTEP[name]
    host = diffusers.PNDMScheduler(**LATENT)
    pipe = stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline, host)
    options = {**TEXT, "image": IMAGE, "strength": strength, "num_inference_steps": 20}
    ours = {key: value for key, value in ours.items() if key != "lower_order_final"}
    more = {} if name == "UniPC" else {"lower_order_final": False}
    lower = {"lower_order_final": True} if name == "UniPC" else {}
    theirs = peer.from_config(host.config, **changes, **more)
    assert_alike(pipe, theirs, PlanScheduler.from_config(host.config, **ours, **lower), **options)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(strength):
    """The host writes what it knows into every state; the solver goes on from there."""
    host = diffusers.PNDMScheduler(**LATENT)
    pipe = stable_diffusion(diffusers.StableDiffusionInpaintPipeline, host)
    options = {
        **TEXT,
        "image": IMAGE,
        "mask_image": MASK,
        "strength": strength,
        "num_inference_steps": 20,
        "height": 16,
        "width": 16,
    }
    peer = diffusers.DPMSolverMultistepScheduler.from_config(host.config, lower_order_final=False)
    assert_alike(pipe, peer, PlanScheduler.from_config(host.config, solver="dpmpp_2m"), **options)


def test_sdxl():
    """The host's latents are in units of sigma / alpha (Euler); ours are not, and the images are the same."""
    host = diffusers.EulerDiscreteScheduler(**LATENT, timestep_spacing="leading")
    pipe = sdxl(diffusers.StableDiffusionXLPipeline, host)
    options = {**TEXT, **POOLED, "num_inference_steps": 5, "height": 16, "width": 16}
    peer = diffusers.DPMSolverMultistepScheduler.from_config(host.config)
    assert_alike(pipe, peer, PlanScheduler.from_config(host.config, lower_order_final=15), **options)
    pipe.scheduler = host
    wanted = images(pipe, **options)
    pipe.scheduler = PlanScheduler.from_config(host.config, solver="ddim")
    assert np.abs(images(pipe, **options) - wanted).max() < TOLERANCE * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        (diffusers.EDMDPMSolverMultistepScheduler(), {"solver": "dpmpp_2m", "lower_order_final": 15}),
        (diffusers.EDMEulerScheduler(prediction_type="v_prediction"), {"solver": "ddim"}),
    ],
    ids=["2M", "Euler"],
)
def test_a_preconditioned_network(host, ours):
    """As Playground v2.5 has it."""
    pipe = sdxl(diffusers.StableDiffusionXLPipeline, host)
    options = {**TEXT, **POOLED, "num_inference_steps": 6, "height": 16, "width": 16}
    assert_alike(pipe, host, PlanScheduler.from_config(host.config, **ours), **options)


def test_image_to_video():
    """Stable Video Diffusion: continuous timesteps."""
    host = diffusers.EulerDiscreteScheduler(
        **LATENT,
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    pipe = image_to_video(host)
    options = {"image": IMAGE, "num_inference_steps": 5, "height": 16, "width": 16, "num_frames": 2, "output_type": "latent"}
    assert_alike(pipe, host, PlanScheduler.from_config(host.config, solver="ddim"), **options)


@pytest.mark.parametrize("solver", ["ddim", "flow_euler"])
def test_sd3(solver):
    host = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = sd3(diffusers.StableDiffusion3Pipeline, host)
    options = {**TEXT, **POOLED, "num_inference_steps": 5, "height": 16, "width": 16}
    assert_alike(pipe, host, PlanScheduler.from_config(host.config, solver=solver), **options)


def test_sd3_image_to_image():
    host = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = sd3(diffusers.StableDiffusion3Img2ImgPipeline, host)
    options = {**TEXT, **POOLED, "image": IMAGE, "strength": 0.6, "num_inference_steps": 10, "height": 16, "width": 16}
    assert_alike(pipe, host, PlanScheduler.from_config(host.config, solver="ddim"), **options)


def test_flux_with_a_shift_by_resolution():
    host = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = flux(host)
    options = {"prompt_embeds": noise(1, 4, 8), "pooled_prompt_embeds": noise(1, 8), "output_type": "latent"}
    options |= {"num_inference_steps": 4, "height": 16, "width": 16}
    assert_alike(pipe, host, PlanScheduler.from_config(host.config, solver="ddim"), **options)
    assert_alike(pipe, host, PlanScheduler.from_config(host.config, solver="flow_euler"), **options)


def test_controlnet():
    host = diffusers.PNDMScheduler(**LATENT)
    pipe = controlled(host)
    peer = diffusers.DPMSolverMultistepScheduler.from_config(host.config)
    options = {**TEXT, "image": IMAGE, "num_inference_steps": 5, "height": 16, "width": 16}
    assert_alike(pipe, peer, PlanScheduler.from_config(host.config, lower_order_final=15), **options)


def test_video():
    host = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = video(host)
    options = {**TEXT, "num_inference_steps": 4, "height": 16, "width": 16, "num_frames": 5}
    assert_alike(pipe, host, PlanScheduler.from_config(host.config, solver="ddim"), **options)
    multistep = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    pipe.scheduler = PlanScheduler.from_config(multistep.config, solver="unipc")  # theirs cuts its timesteps off: no comparison
    assert np.isfinite(images(pipe, **options)).all()


# ---- plans -------------------------------------------------------------------------------------------------------------------------


def test_a_pipeline_keeps_its_plan(tmp_path):
    host = diffusers.DDIMScheduler(clip_sample=False)
    pipe = unconditional(diffusers.DDPMPipeline, host)
    schedule = PlanScheduler.from_config(host.config).plan_schedule
    plan = fs.make_plan("unipc", schedule, nfe=5, grid="lambda", final="zero")
    pipe.scheduler = PlanScheduler.from_plan(plan, host.config)
    wanted = images(pipe, num_inference_steps=5, output_type="np")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "scheduler" / "plan.safetensors").is_file()
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, PlanScheduler)
    assert again.scheduler.plan is None  # nothing of the run is saved
    pipe.scheduler = again.scheduler
    assert np.array_equal(images(pipe, num_inference_steps=5, output_type="np"), wanted)


def test_a_plan_in_a_pipeline_is_the_plan_in_sample():
    host = diffusers.DDIMScheduler(clip_sample=False)
    pipe = unconditional(diffusers.DDPMPipeline, host)
    scheduler = PlanScheduler.from_config(host.config)
    plan = fs.make_plan("dpmpp_3m", scheduler.plan_schedule, nfe=6, grid="trailing", final="zero")
    pipe.scheduler = PlanScheduler.from_plan(plan, host.config)
    found = 2.0 * images(pipe, num_inference_steps=6, output_type="np") - 1.0
    start = torch.randn(1, 3, 8, 8, generator=torch.manual_seed(0))
    den = fs.Denoiser(lambda x, t: pipe.unet(x, t).sample, plan.schedule, predicts="noise", integer_time=True)
    with torch.no_grad():
        wanted = fs.sample(den, start, plan).clamp(-1, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_two_threads_on_one_plan():
    host = diffusers.DDIMScheduler(clip_sample=False)
    pipe = unconditional(diffusers.DDPMPipeline, host)
    plan = fs.make_plan("unipc", PlanScheduler.from_config(host.config).plan_schedule, nfe=12, grid="lambda", final="zero")
    first = PlanScheduler.from_plan(plan, host.config)
    schedulers = [first, copy.deepcopy(first)]
    starts = [noise(1, 3, 8, 8), -0.5 * noise(1, 3, 8, 8)]

    @torch.no_grad()
    def run(k, into):
        scheduler, x = schedulers[k], starts[k]
        for _ in range(5):
            scheduler.set_timesteps(12)
            x = starts[k]
            for t in scheduler.timesteps:
                x = scheduler.step(pipe.unet(x, t).sample, t, x, return_dict=False)[0]
        into[k] = x

    alone, together = {}, {}
    for k in (0, 1):
        run(k, alone)
    threads = [threading.Thread(target=run, args=(k, together)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])
