"""`fs.load` on diffusers pipelines and models, built from their classes with tiny random networks: the latents of the pipeline itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

diffusers = pytest.importorskip("diffusers", minversion="0.32")
pytest.importorskip("transformers")

from tiny_pipelines import LATENT, dit, flux, sd3, sdxl, stable_diffusion, text_parts, unconditional, video  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.diffusers import PlanScheduler  # noqa: E402
from fewstep.diffusers.pipelines import PipelineDenoiser  # noqa: E402
from fewstep.errors import ArtefactError, FewstepError, UnknownNameError  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
]
TOLERANCE = 1e-4
NFE = 5
PROMPTS = ["a red fox", "two owls"]


def scheduler_of(kind):
    if kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if kind == "dynamic":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return diffusers.DDIMScheduler(**LATENT, clip_sample=False, set_alpha_to_one=False, prediction_type=kind)


def text_pipeline(family, kind):
    text, scheduler = text_parts(family), scheduler_of(kind)
    if family == "stable_diffusion":
        return stable_diffusion(diffusers.StableDiffusionPipeline, scheduler, text)
    if family == "sdxl":
        return sdxl(diffusers.StableDiffusionXLPipeline, scheduler, text)
    if family == "sd3":
        return sd3(diffusers.StableDiffusion3Pipeline, scheduler, text)
    return video(scheduler, text) if family == "video" else flux(scheduler, text, distilled=family == "distilled flux")


def planned(pipe, solver="dpmpp_2m"):
    pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, solver=solver)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def packed(x):
    """Latents in the form of Flux's pipeline."""
    batch, channels, height, width = x.shape
    return diffusers.FluxPipeline._pack_latents(x, batch, channels, height, width)


def assert_close(found, wanted):
    assert wanted.std() > 1e-3
    assert (found - wanted).abs().max() < TOLERANCE * max(1.0, float(wanted.abs().max()))


# ---- what the pipeline itself gives ------------------------------------------------------------------------------------------------

TEXT = {
    "Stable Diffusion": ("stable_diffusion", "epsilon", (16, 16), {}),
    "Stable Diffusion 2": ("stable_diffusion", "v_prediction", (16, 24), {}),
    "SDXL": ("sdxl", "epsilon", (16, 24), {}),
    "SD3": ("sd3", "flow", (16, 24), {}),
    "Flux": ("flux", "dynamic", (16, 24), {}),
    "Wan": ("video", "flow", (16, 32, 5), {"num_frames": 5}),
}


@pytest.mark.parametrize("negative", [None, "blurry"])
@pytest.mark.parametrize(("family", "kind", "size", "options"), TEXT.values(), ids=TEXT)
def test_guided_latents_are_those_of_the_pipeline(family, kind, size, options, negative):
    pipe = planned(text_pipeline(family, kind))
    den = fs.load(pipe).with_size(size)
    assert den.size == size
    x = fs.draw_noise(den.info.shape, range(2))
    scale = {"true_cfg_scale": 4.0} if family == "flux" else {"guidance_scale": 4.0}
    told = (negative or "") if family == "flux" else negative
    start = packed(x) if family == "flux" else x
    wanted = pipe(
        PROMPTS,
        negative_prompt=None if told is None else [told] * 2,
        num_inference_steps=NFE,
        latents=start,
        height=size[0],
        width=size[1],
        output_type="latent",
        **scale,
        **options,
    )[0]
    cond, null = den.encode(PROMPTS, negative)
    with torch.no_grad():
        found = fs.sample(den.guided(4.0, null), x, pipe.scheduler.plan, cond=cond)
    assert den.calls == NFE
    assert_close(packed(found) if family == "flux" else found, wanted)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_preconditioned_network(prediction):
    """As Playground v2.5 has it; and with the output of CosXL."""
    host = diffusers.EDMDPMSolverMultistepScheduler(prediction_type=prediction)
    pipe = planned(sdxl(diffusers.StableDiffusionXLPipeline, host, text_parts("sdxl")))
    den = fs.load(pipe)
    x = fs.draw_noise(den.info.shape, range(2))
    size = {"height": 16, "width": 16}
    wanted = pipe(PROMPTS, num_inference_steps=NFE, latents=x, guidance_scale=4.0, output_type="latent", **size)[0]
    cond, null = den.encode(PROMPTS)
    with torch.no_grad():
        start = x * pipe.scheduler.init_noise_sigma
        found = fs.sample(den.guided(4.0, null), start, pipe.scheduler.plan, cond=cond)
    assert_close(found, wanted)
    assert fs.load(pipe.to(torch.bfloat16)).network_dtype is torch.float32  # of what is around the network


def test_a_noise_prediction_of_a_flow():
    """The config says both."""
    host = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon")
    pipe = stable_diffusion(diffusers.StableDiffusionPipeline, host, text_parts("stable_diffusion"))
    assert fs.load(pipe).predicts == "noise"


def test_times_between_the_entries_of_the_table():
    pipe = text_pipeline("stable_diffusion", "epsilon")
    for fractional in (False, True):
        pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, fractional_timesteps=fractional)
        assert fs.load(pipe).integer_time != fractional


def test_distilled_guidance_is_a_condition():
    pipe = planned(flux(scheduler_of("dynamic"), text_parts("flux"), distilled=True))
    den = fs.load(pipe).with_size((16, 16))
    x = fs.draw_noise(den.info.shape, range(2))
    options = {"num_inference_steps": NFE, "height": 16, "width": 16, "output_type": "latent"}
    cond, _ = den.encode(PROMPTS)
    latents = {}
    for scale in (1.0, 3.5):
        wanted = pipe(PROMPTS, guidance_scale=scale, latents=packed(x), **options)[0]
        with torch.no_grad():
            latents[scale] = fs.sample(den.guided(scale), x, pipe.scheduler.plan, cond=cond)
        assert_close(packed(latents[scale]), wanted)
    assert (latents[1.0] - latents[3.5]).abs().max() > 1e-3


@pytest.mark.parametrize("clip", [False, True])
def test_pixels(clip):
    host = diffusers.DDPMScheduler(clip_sample=clip)
    pipe = planned(unconditional(diffusers.DDPMPipeline, host))
    den = fs.load(pipe)
    assert den.info.shape == (3, 8, 8)
    assert den.info.data_range == (-1.0, 1.0)
    wanted = torch.from_numpy(pipe(2, generator=torch.manual_seed(0), num_inference_steps=NFE, output_type="np")[0])
    x = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(0))
    with torch.no_grad():
        found = den.decode(fs.sample(den.guided(), x, pipe.scheduler.plan))
    assert_close((0.5 * found + 0.5).clamp(0, 1).permute(0, 2, 3, 1), wanted)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_classes(scale):
    pipe = planned(dit(diffusers.DDIMScheduler(clip_sample=False)))
    pipe.vae.register_to_config(shift_factor=None)
    den = fs.load(pipe)
    assert den.info.conditions == {"label": {"classes": 1000, "null": 1000}}
    options = {"num_inference_steps": NFE, "output_type": "np", "guidance_scale": scale}
    wanted = torch.from_numpy(pipe([3, 7], generator=torch.manual_seed(0), **options)[0])
    x = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))
    with torch.no_grad():
        x = fs.sample(den.guided(scale, {"label": 1000}), x, pipe.scheduler.plan, cond={"label": torch.tensor([3, 7])})
    assert_close((0.5 * den.decode(x) + 0.5).clamp(0, 1).permute(0, 2, 3, 1), wanted)


def test_pixels_of_classes():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "block_out_channels": (8, 16)}
    unet = diffusers.UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, num_class_embeds=3, out_channels=6, **blocks)
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    den = fs.load(pipe)
    assert den.info.conditions == {"label": {"classes": 3}}
    plan, x = fs.make_plan("ddim", den.schedule, 2), fs.draw_noise((3, 8, 8), range(2))
    found = fs.sample(den, x, plan, cond={"label": torch.tensor([0, 2])})
    assert found.shape == (2, 3, 8, 8)  # without the variance, which is the other half of the output
    with pytest.raises(ValueError, match="3 classes, from 0"):
        fs.sample(den, x, plan, cond={"label": torch.tensor([0, 3])})


# ---- pictures ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize(("family", "kind", "size", "options"), TEXT.values(), ids=TEXT)
def test_decoded_in_slices_as_by_the_pipeline(family, kind, size, options, statistics):
    pipe = planned(text_pipeline(family, kind))
    if family == "stable_diffusion":
        pipe.vae.register_to_config(shift_factor=0.1)  # not looked at by this pipeline
    if statistics and family == "sdxl":
        pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 0.9, 0.8, 0.7])
    den = fs.load(pipe).with_size(size)
    x = fs.draw_noise(den.info.shape, range(2))
    told = {"num_inference_steps": 1, "latents": packed(x) if family == "flux" else x, "height": size[0], "width": size[1]}
    told |= {"guidance_scale": 1.0, **options}
    images = pipe(PROMPTS, output_type="pt", **told)[0]
    latents = pipe(PROMPTS, output_type="latent", **told)[0]
    if family == "flux":
        latents = pipe._unpack_latents(latents, size[0], size[1], pipe.vae_scale_factor)
    found = den.decode(latents, at_once=1)
    torch.testing.assert_close(found, den.decode(latents), rtol=1e-4, atol=1e-4)
    found = found.movedim(1, 2) if family == "video" else found
    torch.testing.assert_close((0.5 * found + 0.5).clamp(0, 1), images, rtol=1e-3, atol=1e-4)


# ---- from disk ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Stable Diffusion on disk."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    text_pipeline("stable_diffusion", "v_prediction").save_pretrained(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def renamed(path, old, new):
    for file in path.rglob(f"*{old}"):
        file.rename(file.with_name(file.name.replace(old, new)))


def test_a_pipeline_folder(folder):
    den = fs.load(folder)
    assert isinstance(den, PipelineDenoiser)
    assert (den.info.name, den.info.shape, den.info.data_range, den.size) == ("tiny", (4, 8, 8), None, (16, 16))
    assert (den.predicts, den.takes_prompts, den.integer_time) == ("velocity", True, True)
    assert den.info.fingerprint == fs.load(str(folder)).info.fingerprint
    assert not any(parameter.requires_grad or parameter.grad_fn for parameter in den.network.parameters())
    assert not den.network.training
    wanted = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    cond, null = den.encode(["a fox", "an owl", "a fox"])
    theirs = wanted.encode_prompt(["a fox", "an owl"], "cpu", 1, True)
    torch.testing.assert_close(cond["prompt_embeds"], theirs[0][[0, 1, 0]])
    torch.testing.assert_close(null["prompt_embeds"], theirs[1][0])
    den.network.encode = lambda *_: pytest.fail("what was encoded is not remembered")
    assert torch.equal(den.encode(["an owl"])[0]["prompt_embeds"], cond["prompt_embeds"][1:2])


@pytest.mark.parametrize("pipeline", ["pixels", "classes", "sdxl", "sd3", "flux", "video"])
def test_every_family_from_its_folder(pipeline, tmp_path):
    if pipeline == "pixels":
        made = unconditional(diffusers.DDPMPipeline, diffusers.DDPMScheduler())
    elif pipeline == "classes":
        made = dit(diffusers.DDIMScheduler(clip_sample=False))
    else:
        made = text_pipeline(pipeline, "epsilon" if pipeline == "sdxl" else "flow")
    made.save_pretrained(tmp_path)
    one, other = fs.load(tmp_path), fs.load(made)
    assert one.info.fingerprint == other.info.fingerprint
    assert one.info.shape == other.info.shape
    assert one.schedule == other.schedule
    if one.takes_prompts:
        for mine, theirs in zip(one.encode(["a fox"]), other.encode(["a fox"]), strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_parts_that_a_pipeline_was_saved_without(tmp_path):
    """SD3 without its third encoder."""
    pipe = text_pipeline("sd3", "flow")
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    den = fs.load(tmp_path)
    plan = fs.make_plan("ddim", den.schedule, 1)
    cond, null = den.encode(PROMPTS)
    x = fs.sample(den.guided(2.0, null), fs.draw_noise(den.info.shape, range(2), plan), plan, cond=cond)
    assert bool(torch.isfinite(x).all())


def test_nothing_is_said_of_torchvision(folder):
    """In a process of its own, where transformers was not imported before."""
    code = "import sys, fewstep as fs; fs.load(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, env=environment)
    assert "torchvision" not in done.stdout + done.stderr


def test_precision(folder):
    den = fs.load(folder, dtype=torch.bfloat16)
    assert den.network_dtype is torch.bfloat16
    cond, null = den.encode(["a fox"])
    x = fs.draw_noise(den.info.shape, [0])
    x = fs.sample(den.guided(2.0, null), x, fs.make_plan("ddim", den.schedule, 2), cond=cond)
    assert x.dtype is torch.float32
    assert torch.isfinite(den.decode(x)).all()


def test_a_pipeline_of_half_precision_goes_on_working(folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    den = fs.load(pipe)
    decoded = den.decode(torch.zeros(1, 4, 8, 8))
    assert decoded.dtype is torch.float32
    assert pipe.vae.dtype is torch.bfloat16
    assert pipe(PROMPTS[:1], num_inference_steps=1, output_type="np")[0].shape == (1, 16, 16, 3)


def test_a_pipeline_that_was_saved_with_a_plan(copied):
    den = fs.load(copied)
    plan = fs.make_plan("unipc", den.schedule, 4, final="zero")
    PlanScheduler.from_plan(plan, den.pipeline.scheduler.config).save_pretrained(copied / "scheduler")
    changed(copied / "model_index.json", scheduler=["fewstep.diffusers", "PlanScheduler"])
    again = fs.load(copied)
    assert again.schedule == den.schedule
    assert again.predicts == den.predicts
    again.pipeline.scheduler.set_timesteps(4)
    assert again.pipeline.scheduler.plan == plan


def test_a_variant_alone(copied):
    renamed(copied, ".safetensors", ".fp16.safetensors")
    assert fs.load(copied).info.shape == (4, 8, 8)


def test_a_model_folder(folder, copied):
    den, whole = fs.load(folder / "unet"), fs.load(folder)
    assert (den.info.name, den.info.shape, den.predicts) == ("unet", (4, 8, 8), "velocity")
    assert den.info.fingerprint == whole.info.fingerprint
    cond, _ = whole.encode(["a fox"])
    x = fs.draw_noise(den.info.shape, [0])
    assert torch.equal(den(x, 0.5, **cond), whole(x, 0.5, **cond))
    shutil.rmtree(copied / "scheduler")
    with pytest.raises(TypeError, match="needs schedule= and predicts="):
        fs.load(copied / "unet")
    alone = fs.load(copied / "unet", schedule=whole.schedule, predicts="velocity")
    torch.testing.assert_close(alone(x, 0.5, **cond), whole(x, 0.5, **cond))


def test_an_id_of_the_hub(folder, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def found(name, file):
        assert name == "owner/tiny"
        return str(folder / file)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda name, use_safetensors: str(folder))
    assert fs.load("owner/tiny").info.name == "owner/tiny"

    def missing(name, file):
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(folder / "unet"))
    assert fs.load("owner/tiny").info.name == "owner/tiny"

    def unreachable(name, file):
        raise LocalEntryNotFoundError("no connection\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(FileNotFoundError, match=r"cannot be reached: no connection$"):
        fs.load("owner/tiny")


def test_a_single_file(folder, tmp_path, monkeypatch):
    """What is asked of diffusers; its own conversion needs configs of the hub."""
    from safetensors.torch import save_file

    path = tmp_path / "sd.safetensors"
    save_file({"model.diffusion_model.out.0.bias": torch.zeros(2)}, path)
    asked = []

    def read(file, **options):
        asked.append(file)
        return diffusers.StableDiffusionPipeline.from_pretrained(folder)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", read)
    assert fs.load(path).info.name == "sd"
    assert asked == [str(path)]
    fs.make_plan("ddim", fs.schedules.EDM(), 2).save(tmp_path / "plan.safetensors")
    with pytest.raises(ArtefactError, match="no checkpoint"):
        fs.load(tmp_path / "plan.safetensors")


# ---- refused -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "model.bin", "model.pkl"])
def test_pickled_files_are_refused_unread(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ArtefactError, match="is pickled, and opening it may run code") as refused:
            fs.load(source)
        assert "save_pretrained" in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_parts_are_refused(part, copied):
    (file,) = (copied / part).glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ArtefactError, match="use_safetensors=False"):
        fs.load(copied)


def test_pickled_weights_beside_are_not_opened(copied):
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert fs.load(copied).info.shape == (4, 8, 8)


def test_shards_that_are_pickled_are_not_opened(copied):
    text_pipeline("stable_diffusion", "epsilon").unet.save_pretrained(copied / "unet", max_shard_size="20KB")
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert fs.load(copied).info.shape == (4, 8, 8)
    index = copied / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    named = json.loads(index.read_text())["weight_map"]
    changed(index, weight_map=dict.fromkeys(named, "evil.bin"))
    with pytest.raises(ArtefactError, match=r"not \.safetensors"):
        fs.load(copied)


def changed(path, **changes):
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda p: changed(p / "model_index.json", _class_name="KandinskyPipeline"),
            UnknownNameError,
            "It is not served.*FluxPipeline",
        ),
        (lambda p: changed(p / "model_index.json", unet=["evil", "Net"]), ArtefactError, "comes from evil"),
        (lambda p: (p / "model_index.json").write_text("{"), ArtefactError, "no JSON file"),
        (lambda p: shutil.rmtree(p / "vae"), FileNotFoundError, "no folder vae"),
        (lambda p: next((p / "vae").glob("*.safetensors")).unlink(), FileNotFoundError, "no weights"),
        (lambda p: next((p / "unet").glob("*.safetensors")).write_bytes(b"x"), ArtefactError, "cannot be read"),
        (lambda p: changed(p / "unet" / "config.json", in_channels=9), ArtefactError, "cannot be read"),
        (lambda p: changed(p / "scheduler" / "scheduler_config.json", prediction_type="eps"), UnknownNameError, "'eps'"),
        (lambda p: (p / "scheduler" / "scheduler_config.json").unlink(), ArtefactError, "cannot be read"),
    ],
)
def test_spoiled_folders_are_refused(spoil, error, message, copied):
    spoil(copied)
    with pytest.raises(error, match=message) as refused:
        fs.load(copied)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def loaded(folder):
    return fs.load(folder)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: fs.load(p, predicts="noise"), TypeError, "says its schedule"),
        (lambda p: fs.load(p, scalar_time=True), TypeError, "says its schedule"),
        (lambda p: fs.load(p / "vae"), UnknownNameError, "AutoencoderKL"),
        (lambda p: fs.load(next((p / "vae").glob("*.safetensors"))), ArtefactError, "part of one: load its folder, .*vae"),
        (lambda p: fs.load(p).encode([]), ValueError, "at least one"),
        (lambda p: fs.load(p).encode("a fox"), ValueError, "a list"),
        (lambda p: fs.load(p).guided(2.0), FewstepError, "needs a null"),
        (lambda p: fs.load(p).with_size((16, 15)), ValueError, "multiples of 2"),
        (lambda p: fs.load(p).with_size((16,)), ValueError, "2 positive numbers"),
    ],
)
def test_refused(call, error, message, folder):
    with pytest.raises(error, match=message):
        call(folder)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (lambda den: {}, r"got no conditions, but 'prompt_embeds' must be given: .*den\.encode\(prompts\) makes them"),
        (lambda den: {"prompt": "a fox"}, "got 'prompt', but 'prompt_embeds' must be given"),
        (lambda den: {"prompt_embeds": "a fox"}, "'prompt_embeds' is str: this model takes"),
        (lambda den: den.encode(["a fox"])[0], r"4 samples, but 'prompt_embeds' for 1: give as many of both\. This model takes"),
        (lambda den: den.encode(["a fox", "a tree"])[0], "4 samples, but 'prompt_embeds' for 2"),
    ],
)
def test_conditions_that_do_not_fit(cond, message, guided, loaded):
    """Told before the network is asked, by `sample` and by `tune`."""
    den = loaded.guided(3.0, loaded.encode(["a fox"])[1]) if guided else loaded
    plan, noise = fs.make_plan("ddim", den.schedule, 2), fs.draw_noise(den.info.shape, range(4))
    with pytest.raises(FewstepError, match=message):
        fs.sample(den, noise, plan, cond=cond(loaded))
    with pytest.raises(ValueError, match=f"{message}|has [12] entries for 4 noises"):
        fs.tune(den, nfe=2, noise=noise, cond=cond(loaded))


def test_models_of_other_kinds_are_refused():
    pipe = dit(diffusers.DDIMScheduler(clip_sample=False))
    with pytest.raises(FewstepError, match="takes no prompts"):
        fs.load(pipe).encode(["a fox"])
    with pytest.raises(ValueError, match="one size"):
        fs.load(pipe).with_size((32, 32))
    pipe = text_pipeline("stable_diffusion", "epsilon")
    pipe.unet.register_to_config(time_cond_proj_dim=4)
    with pytest.raises(FewstepError, match="distilled"):
        fs.load(pipe)
    pipe = text_pipeline("sd3", "flow")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(FewstepError, match="invert_sigmas"):
        fs.load(pipe)
    pipe = text_pipeline("stable_diffusion", "epsilon")
    pipe.vae = None
    with pytest.raises(FewstepError, match="has no vae"):
        fs.load(pipe)
    pipe = text_pipeline("video", "flow")
    pipe.register_to_config(boundary_ratio=0.9)
    with pytest.raises(FewstepError, match="boundary_ratio"):
        fs.load(pipe)
