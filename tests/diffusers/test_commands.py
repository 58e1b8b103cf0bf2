"""The commands on diffusers pipelines: prompts, sizes, guidance, pictures that say how they were made, and plans for the pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers", minversion="0.32")
pytest.importorskip("transformers")

from tiny_pipelines import LATENT, dit, flux, stable_diffusion, text_parts, unconditional, video  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.cli import main  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
]
PROMPTS = ["a red fox", "zwei Eulen, größer"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny pipelines, and a file of prompts."""
    folder = tmp_path_factory.mktemp("models")
    host = diffusers.DDIMScheduler(**LATENT, clip_sample=False, prediction_type="v_prediction")
    stable_diffusion(diffusers.StableDiffusionPipeline, host, text_parts("stable_diffusion")).save_pretrained(folder / "sd")
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flux(flow, text_parts("flux"), distilled=True).save_pretrained(folder / "flux")
    video(flow, text_parts("video")).save_pretrained(folder / "video")
    dit(diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(folder / "dit")
    unconditional(diffusers.DDPMPipeline, diffusers.DDPMScheduler()).save_pretrained(folder / "pixels")
    (folder / "prompts.txt").write_text("\n".join([PROMPTS[0], "", f"  {PROMPTS[1]} ", ""]), encoding="utf-8")
    (folder / "none.txt").write_text("\n\n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    return folder


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_samples_of_prompts(models, tmp_path, capsys):
    out = tmp_path / "out"
    asked = ("--prompt-file", models / "prompts.txt", "--negative", "blurry", "--guidance", 4, "--seed", "3-5", "--nfe", 3)
    status, text, _ = run(capsys, "sample", models / "sd", *asked, "--batch", 2, "--out", out, "--json")
    assert status == 0
    told = json.loads(text)
    pictures = [f"{i:05d}-seed-{i + 3}.png" for i in range(3)]
    files = [*pictures, "plan.safetensors", "sample.json", "samples.npz", "samples.png"]
    assert sorted(file.name for file in out.iterdir()) == files
    arrays = np.load(out / "samples.npz")
    assert arrays["latents"].shape == (3, 4, 8, 8)
    assert arrays["samples"].shape == (3, 3, 16, 16)
    with Image.open(out / pictures[1]) as picture:
        about = picture.info
        assert picture.size == (16, 16)  # as large as it is
    assert about == {
        "prompt": PROMPTS[1],
        "negative": "blurry",
        "seed": "4",
        "guidance": "4",
        "plan": told["plan"],
        "solver": "auto",
        "grid": "auto",
        "final": "zero",
        "size": "16x16",
        "precision": "float32",
        "calls": "3",
        "model": "sd",
        "path": str(models / "sd"),
    }
    with Image.open(out / "samples.png") as picture:
        assert picture.size == (2 * 17 * 4 - 4, 2 * 17 * 4 - 4)  # small ones are shown larger
        assert picture.info["prompt"] == "\n".join(PROMPTS)
        assert picture.info["seed"] == "3, 4, 5"
    record = json.loads((out / "sample.json").read_text())
    assert record["prompts"] == [*PROMPTS, PROMPTS[0]]
    assert record["negative"] == "blurry"
    made = {"path": str(models / "sd"), "solver": "auto", "solver_options": {}, "grid": "auto", "final": "zero", "size": "16x16"}
    assert {name: record[name] for name in made} == made
    assert record["precision"] == "float32"
    # the same, from the library
    den, plan = fs.load(models / "sd"), fs.Plan.load(out / "plan.safetensors")
    cond, null = den.encode(record["prompts"], "blurry")
    with torch.no_grad():
        x = fs.sample(den.guided(4.0, null), fs.draw_noise(den.info.shape, range(3, 6), plan), plan, cond=cond)
    np.testing.assert_allclose(arrays["latents"], x, atol=1e-4)
    np.testing.assert_allclose(arrays["samples"], den.decode(x), atol=1e-4)


@pytest.mark.parametrize(
    ("model", "asked", "latents", "samples", "sheet"),
    [
        ("flux", ("--prompt", "a fox", "--size", "16x24", "--guidance", 3.5), (2, 4, 8, 12), (2, 3, 16, 24), (98, 32)),
        ("video", ("--prompt", "a fox", "--size", "16x16x5", "--guidance", 2), (2, 4, 2, 2, 2), (2, 3, 5, 16, 16), (336, 132)),
        ("dit", ("--label", "3,4", "--guidance", 2), (2, 4, 8, 8), (2, 3, 16, 16), (132, 64)),
        ("pixels", ("--size", "16"), None, (2, 3, 16, 16), (132, 64)),
    ],
)
def test_samples_of_every_kind(model, asked, latents, samples, sheet, models, tmp_path, capsys):
    status, _, error = run(capsys, "sample", models / model, *asked, "--count", 2, "--nfe", 2, "--out", tmp_path / "out", "--quiet")
    assert status == 0, error
    arrays = np.load(tmp_path / "out" / "samples.npz")
    assert arrays["samples"].shape == samples
    assert (arrays["latents"].shape if latents else None) == latents
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.size == sheet
        assert picture.info.get("guidance") == (str(asked[-1]) if "--guidance" in asked else "1")


def test_pictures_of_an_earlier_run_go(models, tmp_path, capsys):
    asked = ("sample", models / "sd", "--prompt", "a fox", "--nfe", 1, "--out", tmp_path / "out", "--quiet")
    assert run(capsys, *asked, "--count", 3)[0] == 0
    (tmp_path / "out" / "mine.png").write_bytes(b"")
    assert run(capsys, *asked, "--seed", "5,6")[0] == 0
    left = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert left == ["00000-seed-5.png", "00001-seed-6.png", "mine.png", "samples.png"]


def test_the_record_of_a_plan_names_its_solver_and_options(models, tmp_path, capsys):
    den = fs.load(models / "sd")
    fs.make_plan("unipc", den.schedule, 3, grid="karras", order=2).save(tmp_path / "plan")
    out = tmp_path / "out"
    asked = ("sample", models / "sd", "--prompt", "a fox", "--count", 1, "--out", out, "--json")
    assert run(capsys, *asked, "--plan", tmp_path / "plan")[0] == 0
    record = json.loads((out / "sample.json").read_text())
    assert (record["solver"], record["solver_options"], record["grid"], record["final"]) == (
        "unipc",
        {"order": 2},
        "karras",
        "t_end",
    )
    with Image.open(out / "00000-seed-0.png") as picture:
        assert (picture.info["solver"], picture.info["solver options"], picture.info["grid"]) == ("unipc", '{"order": 2}', "karras")


def test_the_precision_of_the_network(models, tmp_path, capsys):
    asked = ("sample", models / "sd", "--prompt", "a fox", "--guidance", 2, "--count", 1, "--nfe", 2, "--quiet")
    found = {}
    for dtype in ("float32", "float64", "bfloat16"):
        assert run(capsys, *asked, "--dtype", dtype, "--out", tmp_path / dtype)[0] == 0
        found[dtype] = np.load(tmp_path / dtype / "samples.npz")["latents"]
    assert found["float64"].dtype == np.float64
    np.testing.assert_allclose(found["float32"], found["float64"], atol=1e-3)
    assert 1e-5 < np.abs(found["bfloat16"] - found["float64"]).max() < 0.3


IN_THE_PIPELINE = """
import sys
import diffusers, numpy as np, torch
import fewstep as fs

folder, plan, out, *prompts = sys.argv[1:]
pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
pipe.scheduler = fs.diffusers.PlanScheduler.from_plan(plan, pipe.scheduler.config)
plan = fs.Plan.load(plan)
x = fs.draw_noise((4, 8, 8), range(7, 7 + len(prompts)), plan)
options = {"negative_prompt": ["blurry"] * len(prompts), "guidance_scale": 5.0, "output_type": "latent"}
found = pipe(prompts, num_inference_steps=plan.nfe, latents=x, height=16, width=16, **options)[0]
np.save(out, found.numpy())
"""


def test_tuned_plans_give_the_same_in_the_pipeline_of_another_process(models, tmp_path, capsys):
    asked = ("--prompt-file", models / "prompts.txt", "--negative", "blurry")
    tuning = ("--nfe", 6, "--guidance", 5, "--method", "closed-form", "--trajectories", 4)
    status, text, error = run(capsys, "tune", models / "sd", *asked, *tuning, "--out", tmp_path / "tuned", "--json", "--quiet")
    assert status == 0, error
    report = json.loads(text)["plans"]["6"]
    assert report["rms"] <= report["untuned_rms"]
    results = json.loads((tmp_path / "tuned" / "results.json").read_text())
    assert (results["prompts"], results["negative"]) == (PROMPTS, "blurry")
    with Image.open(tmp_path / "tuned" / "tuned-6.png") as picture:
        assert picture.mode == "RGB"  # decoded
    file = tmp_path / "tuned" / "plan-6.safetensors"
    sampling = ("--guidance", 5, "--seed", "7-8", "--plan", file, "--out", tmp_path / "out")
    assert run(capsys, "sample", models / "sd", *asked, *sampling, "--quiet")[0] == 0
    wanted = np.load(tmp_path / "out" / "samples.npz")["latents"]
    command = [sys.executable, "-c", IN_THE_PIPELINE, models / "sd", file, tmp_path / "found.npy", *PROMPTS]
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), wanted, atol=1e-4)
    # another negative prompt is another model
    other = ("sample", models / "sd", "--prompt", "a fox", *sampling)
    status, _, error = run(capsys, *other)
    assert status == 2
    assert "this plan was tuned for" in error


def test_compare(models, tmp_path, capsys):
    asked = (
        "--prompt-file",
        models / "prompts.txt",
        "--guidance",
        2,
        "--nfe",
        3,
        "--count",
        3,
        "--others",
        3,
        "--solvers",
        "ddim,dpmpp_2m",
    )
    status, _, error = run(capsys, "compare", models / "sd", *asked, "--tol", 0.05, "--out", tmp_path / "out", "--quiet")
    assert status == 0, error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["prompts"] == PROMPTS
    assert results["guidance"] == 2.0
    assert len(results["models"]["sd"]["ranking_by_error"]) == 2


CHEAP = [
    (("--solver", "unpc"), "Did you mean 'unipc'"),
    (("--grid", "kerras"), "Did you mean 'karras'"),
    (("--nfe", "0"), "--nfe must be at least 1"),
    (("--seed", "a"), "--seed takes"),
    (("--prompt-file", "absent.txt"), "No such file"),
    (("--size", "big"), "--size takes"),
    (("--plan", "absent.safetensors"), "No such file"),
    (("--device", "cuda:77"), "cannot be used"),
]
"""What is told before a model is looked for."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "sd"], "sd takes prompts: give --prompt or --prompt-file"),
        (["sample", "sd", "--prompt", "a", "--prompt-file", "prompts.txt"], "give one of"),
        (["sample", "sd", "--prompt-file", "absent.txt"], "No such file"),
        (["sample", "sd", "--prompt-file", "none.txt"], "holds no prompts"),
        (["sample", "sd", "--prompt-file", "bytes.txt"], "no text in UTF-8"),
        (["sample", "sd", "--prompt", "a", "--label", "1"], "takes no labels"),
        (["sample", "sd", "--prompt", "a", "--negative", "b"], "is not guided; give --guidance"),
        (["sample", "sd", "--prompt", "a", "--size", "big"], "--size takes"),
        (["sample", "sd", "--prompt", "a", "--size", "15"], "multiples of 2"),
        (["sample", "sd", "--prompt", "a", "--size", "16x16x5"], "2 positive numbers"),
        (["sample", "sd/unet", "--prompt", "a"], "give the folder of its whole pipeline"),
        (["sample", "flux", "--prompt", "a", "--negative", "b", "--guidance", "3"], "has its guidance within"),
        (["sample", "dit", "--prompt", "a"], "takes no prompts"),
        (["sample", "dit", "--guidance", "2"], "--guidance needs --label"),
        (["sample", "dit", "--size", "32"], "one size"),
        (["sample", "pixels", "--negative", "b"], "takes no prompts"),
        (["sample", "pixels", "--label", "1", "--guidance", "2"], "takes no labels"),
        (["sample", "digits", "--prompt", "a"], "takes no prompts"),
        (["sample", "digits", "--size", "8"], "one size"),
        (["sample", "digits", "--guidance", "2"], "--guidance needs --label"),
        (["tune", "sd", "--guidance", "2"], "takes prompts"),
        (["tune", "pixels", "--guidance", "2"], "--guidance needs a model with conditions"),
        (["compare", "sd"], "takes prompts"),
        (["sample", "sd/vae", "--prompt", "a"], "AutoencoderKL"),
        *((["sample", "absent", *wrong], message) for wrong, message in CHEAP),
        (["tune", "absent", "--method", "lerned"], "unknown method of tuning"),
        (["tune", "absent", "--prompt-file", "none.txt"], "holds no prompts"),
        (["compare", "absent", "--solvers", "unpc"], "Did you mean 'unipc'"),
        (["compare", "absent", "--grids", "auto,karas"], "Did you mean 'karras'"),
    ],
)
def test_bad_input_is_one_line_and_a_status(arguments, message, models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(models)
    status, _, error = run(capsys, *arguments, "--out", tmp_path / "out", "--quiet")
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
