"""Students of pipelines of diffusers: what they are told, where they begin, and what an adversary looks at."""

import numpy as np
import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep.distill import DMD2, TDM, Adversary, FreeFlow, Student, distill
from fewstep.distill.networks import bottleneck
from fewstep.distill.told import Told
from fewstep.errors import ArtefactError, UnknownNameError

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
import tiny_pipelines  # noqa: E402

LITTLE = {"iterations": 2, "batch_size": 2, "warmup": 0, "learning_rate": 2e-2, "compare": None}


@pytest.fixture(scope="module")
def text():
    return tiny_pipelines.text_parts("stable_diffusion")


@pytest.fixture(scope="module")
def made(text):
    """A tiny pipeline, its denoiser, and the conditions of two prompts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scheduler = diffusers.DDIMScheduler(**tiny_pipelines.LATENT, clip_sample=False, set_alpha_to_one=False)
        pipeline = tiny_pipelines.stable_diffusion(diffusers.StableDiffusionPipeline, scheduler, text)
    pipeline.set_progress_bar_config(disable=True)
    den = fs.load(pipeline)
    return pipeline, den, {"prompt_embeds": den.encode(["a", "b"])[0]["prompt_embeds"]}


@pytest.fixture
def again(made):
    """The pipeline, put back as it was."""
    pipeline = made[0]
    unet, scheduler = pipeline.unet, pipeline.scheduler
    yield pipeline
    pipeline.unload_lora_weights()
    pipeline.unet, pipeline.scheduler = unet, scheduler


def images(pipeline, cond, latents, nfe):
    options = {"num_inference_steps": nfe, "guidance_scale": 1.0, "output_type": "latent"}
    return pipeline(**cond, latents=latents, generator=torch.Generator().manual_seed(0), **options).images


def moved(student):
    """Let the branch, which begins at zero, say something."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        nn.init.normal_(student.network.branch[2].weight, std=0.3)
    return student


def test_what_a_student_is_told_is_in_the_pipeline_too(made, again):
    """One student of several numbers of calls, each with what it is told, beside `sample`; and FreeFlow's, which is told 1."""
    _, den, cond = made
    student = moved(distill(den, method="tdm", steps=(1, 2), conditions=cond, **LITTLE))
    assert student.network.at.endswith("time_embedding.linear_2")
    assert student.card["told_number"] == {"1": 1.0, "2": 0.5}
    latents = torch.randn(2, *den.info.shape, generator=torch.Generator().manual_seed(1))
    for nfe in (1, 2):
        mine = student.sample(range(2), nfe=nfe, cond=cond, noise=latents)
        pipeline = student.pipeline(again, nfe=nfe)
        assert (images(pipeline, cond, latents, nfe) - mine).abs().max() <= 1e-5 * max(1.0, float(mine.abs().max()))
    other = fs.sample(student.denoiser_of(1), latents, student.plan(2), cond=cond)
    assert (other - student.sample(range(2), nfe=2, cond=cond, noise=latents)).abs().max() > 1e-3
    flow = moved(distill(den, method="freeflow", steps=1, conditions=cond, **LITTLE))
    mine = flow.sample(range(2), cond=cond, noise=latents)
    pipeline = flow.pipeline(again)
    assert (images(pipeline, cond, latents, 1) - mine).abs().max() <= 1e-5 * max(1.0, float(mine.abs().max()))


def test_what_no_bias_can_hold_is_refused(made, again):
    _, den, cond = made

    class Elsewhere(FreeFlow):
        def wrapped(self, network):
            return Told(network, at="model.mid_block")

    student = distill(den, method=Elsewhere(), steps=1, conditions=cond, **LITTLE)
    unet = again.unet
    with pytest.raises(TypeError, match="linear layer or a convolution"):
        student.pipeline(again)
    assert again.unet is unet


def test_names_within_a_pipelines_network_are_known(made):
    _, den, cond = made
    assert bottleneck(den.network) == "model.mid_block"
    data = {"x": torch.randn(4, *den.info.shape), "prompt_embeds": cond["prompt_embeds"].repeat(2, 1, 1)}
    method = DMD2(adversary=Adversary(), update_ratio=1)
    student = distill(den, method=method, steps=1, data=data, **LITTLE)
    assert student.sample(range(2), cond=cond).isfinite().all()


def test_a_student_with_an_early_time_begins_in_a_pipeline_as_it_does_here(made, again):
    """From noise of unit variance, as published."""
    _, den, cond = made
    student = distill(den, method=DMD2(times=(0.4,), update_ratio=1), steps=1, conditions=cond, **LITTLE)
    plan = student.plan(1)
    assert student.card["calls"]["1"] == [399.0]
    assert plan.noise_time == den.schedule.t_start
    assert plan.start.scale == pytest.approx(1.0)
    latents = torch.randn(2, *den.info.shape, generator=torch.Generator().manual_seed(1))
    mine = student.sample(range(2), cond=cond, noise=latents)
    assert (images(student.pipeline(again), cond, latents, 1) - mine).abs().max() <= 1e-5 * max(1.0, float(mine.abs().max()))
    assert again.scheduler.timesteps.tolist() == [399]


def test_times_are_those_of_whole_indices(made, again):
    _, den, cond = made
    student = distill(den, method=DMD2(steps=4, update_ratio=1), steps=4, conditions=cond, **LITTLE)
    assert student.card["calls"]["4"] == [999.0, 749.0, 499.0, 249.0]
    np.testing.assert_allclose(den.network_time(student.plan(4).tau), student.card["calls"]["4"])
    student.pipeline(again).scheduler.set_timesteps(4)
    assert again.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_an_adapter_may_be_put_into_a_pipeline_twice_and_a_refused_save_leaves_what_was_there(made, again, tmp_path):
    from fewstep.adapt import LoraOptions, save_adapter
    from fewstep.distill.student_network import core

    _, den, cond = made
    data = {"x": torch.randn(2, *den.info.shape), **cond}
    student = distill(den, method="lcm-lora", adapter=LoraOptions(rank=2, targets=("to_q",)), data=data, steps=(1, 2), **LITTLE)
    latents = torch.randn(2, *den.info.shape, generator=torch.Generator().manual_seed(1))
    student.pipeline(again, nfe=2)
    mine = student.sample(range(2), nfe=1, cond=cond, noise=latents)
    assert (images(student.pipeline(again, nfe=1), cond, latents, 1) - mine).abs().max() <= 1e-5 * max(1.0, float(mine.abs().max()))
    place = student.save(tmp_path / "student")
    (place / "mine.txt").write_text("mine")
    with pytest.raises(UnknownNameError, match="khoya"):
        student.save(place, form="khoya")
    answers = iter(range(10))
    with pytest.raises(ArtefactError, match="was not saved"):
        save_adapter(core(student.network), place, ask=lambda network: torch.ones(1) * next(answers), part="unet")
    student.probe["x"].mul_(float("nan"))  # what is written is no longer what is read
    with pytest.raises(ArtefactError):
        student.save(place)
    student.probe["x"].copy_(torch.ones_like(student.probe["x"]))
    assert torch.equal(Student.load(place, den).sample(range(2), nfe=1, cond=cond, noise=latents), mine)
    assert (place / "mine.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    assert not list(place.glob(".*"))
    whole = distill(den, method=TDM(steps=1, update_ratio=1), steps=1, conditions=cond, **LITTLE)
    with pytest.raises(ValueError, match="whole network"):
        whole.save(tmp_path / "whole", form="kohya")
