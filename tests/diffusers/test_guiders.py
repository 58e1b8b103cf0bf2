"""diffusers' guiders: with `PlanScheduler` in a modular pipeline, and around a network for `fewstep.sample`."""

from __future__ import annotations

import importlib

import pytest
import torch

diffusers = pytest.importorskip("diffusers", minversion="0.32")
guiders = pytest.importorskip("diffusers.guiders")

import fewstep as fs  # noqa: E402
from fewstep.diffusers import GuidedNetwork, PlanScheduler  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not hasattr(guiders.BaseGuidance, "prepare_inputs_from_block_state"), reason="guiders had another form"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TOLERANCE = 1e-4
GUIDERS = {
    "classifier-free": lambda: guiders.ClassifierFreeGuidance(guidance_scale=5.0),
    "rescaled, some steps": lambda: guiders.ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=0.5, start=0.2, stop=0.7),
    "projected, with momentum": lambda: guiders.AdaptiveProjectedGuidance(
        guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.5
    ),
    "zero star": lambda: guiders.ClassifierFreeZeroStarGuidance(guidance_scale=5.0),
    "tangential": lambda: guiders.TangentialClassifierFreeGuidance(guidance_scale=5.0),
}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}


def noise(*shape, seed=7):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- in a modular pipeline ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline():
    pytest.importorskip("transformers")
    before = importlib.import_module("diffusers.modular_pipelines.stable_diffusion_xl.before_denoise")
    denoise = importlib.import_module("diffusers.modular_pipelines.stable_diffusion_xl.denoise")
    blocks = {
        "input": before.StableDiffusionXLInputStep(),
        "set_timesteps": before.StableDiffusionXLSetTimestepsStep(),
        "latents": before.StableDiffusionXLPrepareLatentsStep(),
        "conditions": before.StableDiffusionXLPrepareAdditionalConditioningStep(),
        "denoise": denoise.StableDiffusionXLDenoiseStep(),
    }
    pipe = diffusers.modular_pipelines.SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=6 * 2 + 8,
    )
    pipe.update_components(unet=unet, vae=diffusers.AutoencoderKL(block_out_channels=[4], norm_num_groups=4))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipeline, scheduler, guider):
    pipeline.update_components(scheduler=scheduler, guider=guider)
    return pipeline(
        prompt_embeds=noise(1, 4, 8),
        negative_prompt_embeds=0.5 * noise(1, 4, 8),
        pooled_prompt_embeds=noise(1, 8),
        negative_pooled_prompt_embeds=0.5 * noise(1, 8),
        num_inference_steps=6,
        height=8,
        width=8,
        generator=torch.manual_seed(0),
        output="latents",
    )


@pytest.mark.parametrize("guider", GUIDERS.values(), ids=GUIDERS)
def test_the_same_images_in_a_modular_pipeline(pipeline, guider):
    host = diffusers.EulerDiscreteScheduler(**LATENT)
    peer = diffusers.DPMSolverMultistepScheduler.from_config(host.config)
    for theirs, options in ((host, {"solver": "ddim"}), (peer, {"solver": "dpmpp_2m", "lower_order_final": 15})):
        wanted = latents(pipeline, theirs, guider())
        found = latents(pipeline, PlanScheduler.from_config(host.config, **options), guider())
        assert float(wanted.std()) > 0.1
        assert float((found - wanted).abs().max()) < TOLERANCE * float(wanted.abs().max())


def test_guiders_change_the_images(pipeline):
    scheduler = PlanScheduler.from_config(diffusers.EulerDiscreteScheduler(**LATENT).config)
    found = [latents(pipeline, scheduler, guider()) for guider in GUIDERS.values()]
    for i, one in enumerate(found):
        assert all(float((one - other).abs().max()) > 1e-3 for other in found[:i])


# ---- around a network --------------------------------------------------------------------------------------------------------------

SCHEDULE = fs.schedules.VPLinear()
NETWORK = fs.load("digits").network
START = fs.draw_noise((1, 8, 8), range(3))
LABEL = torch.tensor([1, 5, 7])


def guided(guider, nfe=6, **options):
    return fs.load(GuidedNetwork(NETWORK, guider, {"label": 10}, nfe=nfe, **options), schedule=SCHEDULE, predicts="velocity")


def test_classifier_free_guidance_is_ours():
    """Its weights add up to 1, so it is the same of velocities and of data predictions."""
    ours = fs.guidance.ClassifierFree(fs.load("digits"), 5.0, {"label": 10})
    plan = fs.make_plan("dpmpp_2m", SCHEDULE, nfe=6)
    wanted = fs.sample(ours, START, plan, cond={"label": LABEL})
    den = guided(GUIDERS["classifier-free"]())
    for _ in range(2):  # a second run begins anew
        found = fs.sample(den, START, plan, cond={"label": LABEL})
        assert float((found - wanted).abs().max()) < TOLERANCE * float(wanted.abs().max())
    assert den.calls == 12


@pytest.mark.parametrize("guider", GUIDERS.values(), ids=GUIDERS)
def test_the_host_of_a_guider_gives_the_same(guider):
    """The loop of a modular pipeline, written out."""
    table = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    scheduler = PlanScheduler.from_config(table.config, solver="dpmpp_2m")
    scheduler.set_timesteps(6)
    theirs, x = guider(), START
    for i, t in enumerate(scheduler.timesteps):
        theirs.set_state(step=i, num_inference_steps=6, timestep=t)
        state = theirs.prepare_inputs({"label": (LABEL, torch.full_like(LABEL, 10))})
        for batch in state:
            theirs.prepare_models(NETWORK)
            batch.noise_pred = NETWORK(x, ((t + 1.0) / 1000).expand(3), label=batch.label)
            theirs.cleanup_models(NETWORK)
        x = scheduler.step(theirs(state)[0], t, x, return_dict=False)[0]
    network = GuidedNetwork(NETWORK, guider(), {"label": 10}, nfe=6)
    den = fs.Denoiser(network, scheduler.plan_schedule, "velocity", network_time=lambda t: t)
    found = fs.sample(den, START, scheduler.plan, cond={"label": LABEL})
    assert float((found - x).abs().max()) < TOLERANCE * float(x.abs().max())


def test_after_an_interrupted_run():
    guider = guiders.ClassifierFreeGuidance(guidance_scale=5.0, stop=0.5)
    den, plan = guided(guider), fs.make_plan("dpmpp_2m", SCHEDULE, nfe=6)
    wanted = fs.sample(den, START, plan, cond={"label": LABEL})
    den(START, 0.5, label=LABEL)
    assert not torch.equal(fs.sample(den, START, plan, cond={"label": LABEL}), wanted)
    den.network.reset()
    assert torch.equal(fs.sample(den, START, plan, cond={"label": LABEL}), wanted)


def test_a_tensor_for_no_condition():
    def network(x, time, *, text, size):
        assert size == 3
        return x * text.mean(-1)[:, None]

    null = torch.tensor([0.0, 0.0])
    net = GuidedNetwork(network, guiders.ClassifierFreeGuidance(guidance_scale=3.0), {"text": null}, nfe=2)
    out = net(torch.ones(2, 4), torch.ones(2), text=torch.tensor([[1.0, 1.0], [2.0, 2.0]]), size=3)
    assert out.tolist() == [[3.0] * 4, [6.0] * 4]


def test_refuses():
    with pytest.raises(TypeError, match="guider must be"):
        GuidedNetwork(NETWORK, "cfg", {"label": 10}, nfe=5)
    guider = GUIDERS["classifier-free"]()
    with pytest.raises(ValueError, match="at least 1 call"):
        GuidedNetwork(NETWORK, guider, {"label": 10}, nfe=0)
    with pytest.raises(ValueError, match="empty"):
        GuidedNetwork(NETWORK, guider, {}, nfe=5)
    with pytest.raises(ValueError, match="'label' as a tensor"):
        guided(guider)(START, 0.5)
