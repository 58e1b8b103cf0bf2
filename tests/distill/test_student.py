"""Students: the same samples in a fresh process, in a pipeline of diffusers, and after a resumption."""

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fewstep as fs
from fewstep.cli.setup import parse_labels
from fewstep.distill import LCM, METHODS, STUDENT, Comparison, Student, Training, distill, read_as, teacher_samples
from fewstep.distill.student_network import AdaptedNetwork, core, part_of
from fewstep.errors import ArtefactError, PlanError
from fewstep.schedules import Flow
from fewstep.train import Stage
from fewstep.tuners import Effort

LABELS = torch.arange(4)
LITTLE = {"iterations": 8, "batch_size": 4, "compare": None}


def digits_data(count=32):
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(count, 1, 8, 8, generator=generator).clamp(-1, 1), "label": torch.arange(count) % 10}


def guided(scale=2.0):
    return fs.guidance.ClassifierFree(fs.load("digits"), scale, {"label": 10})


@pytest.fixture(scope="module")
def small_student():
    return distill(guided(), data=digits_data(), steps=(1, 2), **LITTLE)


# ---- a network -----------------------------------------------------------------------------------------------------------------


def test_the_teacher_stays_as_it_is(small_student):
    teacher = fs.load("digits").network
    mine = fs.load("digits").network
    student = distill(guided(), data=digits_data(), steps=1, **LITTLE)
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), mine.state_dict().values(), strict=True))
    assert not torch.equal(student.network.head.weight, teacher.head.weight)
    again = distill(guided(), data=digits_data(), steps=1, **LITTLE)
    assert all(torch.equal(a, b) for a, b in zip(student.network.parameters(), again.network.parameters(), strict=True))


def test_what_a_student_is(small_student):
    assert small_student.plan().nfe == 2
    assert small_student.sample(range(4), cond={"label": LABELS}).shape == (4, 1, 8, 8)
    one = small_student.sample([2], nfe=2, cond={"label": LABELS[2:3]})
    both = small_student.sample(range(4), nfe=2, cond={"label": LABELS})
    assert (one - both[2:3]).abs().max() <= 1e-5
    assert small_student.card["guidance"]["guidance_scale"] == 2.0
    assert small_student.card["calls"]["2"] == pytest.approx(small_student.plan(2).tau.tolist())
    assert small_student.card["training"]["evaluations"] == 8 * 4 * (3 + 2 + 1)  # student with gradient, guided pair, target
    with pytest.raises(PlanError, match="plans of 1, 2 calls, not of 3"):
        small_student.plan(3)
    with pytest.raises(ValueError, match="not told the guidance scale"):
        small_student.sample(range(4), guidance_scale=2.0, cond={"label": LABELS})
    with pytest.raises(TypeError, match="not a part of a diffusers pipeline"):
        small_student.pipeline(None)


def test_a_student_that_never_saw_the_null_label_does_not_know_it(small_student):
    """So that commands ask for a class; one that says nothing of it keeps what the teacher knows."""
    assert small_student.denoiser.info.conditions["label"]["null"] == 10
    for seen in (False, True):
        told = dataclasses.replace(small_student, card={**small_student.card, "null_label": seen})
        assert ("null" in told.denoiser.info.conditions["label"]) == seen
        with pytest.raises(ValueError, match="needs a class: give --label") if not seen else nullcontext():
            parse_labels(None, told.denoiser, 2)
    assert "null" in small_student.teacher.info.conditions["label"]


def test_a_folder_is_the_student_or_refused(small_student, tmp_path):
    place = small_student.save(tmp_path / "student")
    loaded = Student.load(place)
    x = [student.sample(range(4), nfe=2, cond={"label": LABELS}) for student in (small_student, loaded)]
    assert torch.equal(*x)
    with pytest.raises(ArtefactError, match=r"was made for digits .* but the base has other weights"):
        Student.load(place, fs.load("photos"))
    tensors = load_file(place / "student.safetensors")
    tensors["head.weight"] += 0.01
    save_file(tensors, place / "student.safetensors")
    with pytest.raises(ArtefactError, match="is not the student that was saved"):
        Student.load(place)
    (place / "student.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ArtefactError, match="truncated"):
        Student.load(place)
    (place / "student.json").write_text("{")
    with pytest.raises(ArtefactError, match="damaged"):
        Student.load(place)
    with pytest.raises(FileNotFoundError, match="no student in"):
        Student.load(tmp_path)


def test_a_student_that_is_told_the_scale_can_be_saved(tmp_path):
    teacher = guided(3.0)
    student = distill(
        teacher, method=LCM(guidance=(1.0, 4.0), embedded=True), data=digits_data(), steps=(1,), learning_rate=1e-2, **LITTLE
    )
    loaded = Student.load(student.save(tmp_path), teacher)
    x = {s: student.sample(range(4), cond={"label": LABELS}, guidance_scale=s) for s in (1.0, 3.0)}
    assert not torch.equal(x[1.0], x[3.0])
    for scale, samples in x.items():
        assert torch.equal(loaded.sample(range(4), cond={"label": LABELS}, guidance_scale=scale), samples)
    assert torch.equal(loaded.sample(range(4), cond={"label": LABELS}), x[3.0])


class Crash(Exception):
    """Of a process that is killed."""


class Data:
    """Draws batches, and fails at one of them if asked to."""

    def __init__(self, fails_at=None):
        self.fails_at, self.drawn, self.rows = fails_at, 0, digits_data()

    def __call__(self, count, generator):
        self.drawn += 1
        if self.drawn == self.fails_at:
            raise Crash
        rows = torch.randint(32, (count,), generator=generator)
        return {name: values[rows] for name, values in self.rows.items()}


@pytest.mark.parametrize("name", ["lcm", "lcm-lora"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, name):
    options = {"method": name, "steps": 1, "checkpoint_every": 3, "sheets": 4, **LITTLE}
    if name == "lcm-lora":
        pytest.importorskip("peft")
        options["adapter"] = _lora(4)
    whole = distill(guided(), data=Data(), folder=tmp_path / "whole", **options)
    with pytest.raises(Crash):
        distill(guided(), data=Data(fails_at=9), folder=tmp_path / "killed", **options)
    resumed = distill(guided(), data=Data(), folder=tmp_path / "killed", **options)
    pairs = zip(whole.network.state_dict().items(), resumed.network.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert resumed.card["training"]["evaluations"] == whole.card["training"]["evaluations"]
    assert sorted(file.name for file in (tmp_path / "whole").glob("*.png")) == ["samples-0000004.png", "samples-0000008.png"]
    if name == "lcm-lora":  # checkpoints hold the adapter alone
        assert (tmp_path / "whole" / "checkpoint.safetensors").stat().st_size < 2_000_000


def _lora(rank):
    from fewstep.adapt import LoraOptions

    return LoraOptions(rank=rank, alpha=2.0 * rank)


# ---- without a network of the teacher's, and without data ----------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x, time):
        return self.layers(torch.cat([x, time[:, None].to(x)], 1))


def test_an_exact_teacher_and_the_report(tmp_path):
    exact = fs.exact.GaussianMixture(Flow(t_start=0.98), [[-1.0, 0.0], [1.0, 0.5]], 0.05)
    effort = Effort(trajectories=32, held_out=32, pool=1, trials=4, polish=1)
    student = distill(
        exact,
        network=Small(),
        data={"x": exact.draw(256, seed=0).float()},
        steps=(1, 2),
        iterations=20,
        compare=Comparison(count=400, reference_calls=16, tuned=effort),
    )
    report = student.card["report"]
    assert report["evaluations"] == 20 * 64 * (3 + 1)
    for nfe in ("1", "2"):
        found = report["calls"][nfe]
        assert found["untuned"]["distance"] > report["floor"] > 0.0
        assert found["tuned"]["distance"] > 0.0
        if found["break_even"] is not None:
            assert found["break_even"] == round(report["evaluations"] / (found["equal"] - int(nfe)))
    assert len(student.card["told"]) == 2
    assert student.card["told"][0].startswith("1 calls: distance")
    loaded = Student.load(student.save(tmp_path), exact, network=Small())
    assert torch.equal(loaded.sample(range(3)), student.sample(range(3)))
    assert json.loads((tmp_path / "student.json").read_text())["report"] == json.loads(json.dumps(report))
    with pytest.raises(TypeError, match="pass network="):
        Student.load(tmp_path, exact)


def test_what_is_missing_is_said():
    exact = fs.exact.Gaussian(Flow(), [0.0, 1.0], 0.1)
    with pytest.raises(ValueError, match="lcm learns from clean data"):
        distill(exact, network=Small(), steps=1)
    with pytest.raises(TypeError, match="no torch module that the student could begin as"):
        distill(exact, data={"x": torch.zeros(4, 2)}, steps=1)
    assert {"lcm", "lcm-lora"} <= METHODS.keys()


def test_data_of_the_teacher():
    data = teacher_samples(guided(), range(6), {"label": torch.arange(6)}, nfe=3, block=4)
    alone = teacher_samples(guided(), [5], {"label": torch.tensor([5])}, nfe=3)
    assert (data["x"][5] - alone["x"][0]).abs().max() <= 1e-5


# ---- adapters, in diffusers' pipelines -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory):
    """A tiny pipeline, a student of it that is an adapter, and what both make in this process and in a fresh one."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import tiny_pipelines

    place = tmp_path_factory.mktemp("text_to_image")
    scheduler = diffusers.DDIMScheduler(**tiny_pipelines.LATENT, clip_sample=False, set_alpha_to_one=False)
    text = tiny_pipelines.text_parts("stable_diffusion")
    pipeline = tiny_pipelines.stable_diffusion(diffusers.StableDiffusionPipeline, scheduler, text)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(place / "base")
    den = fs.load(pipeline)
    cond, null = den.encode(["a lighthouse", "a storm", "a boat", "rain"])
    generator = torch.Generator().manual_seed(0)
    data = {"x": torch.randn(4, *den.info.shape, generator=generator), "prompt_embeds": cond["prompt_embeds"]}
    student = distill(
        den.guided(3.0, null),
        method="lcm-lora",
        adapter=_lora(4),
        data=data,
        steps=(1, 2),
        iterations=6,
        batch_size=4,
        learning_rate=5e-2,
        compare=None,
    )
    student.save(place / "adapter")
    distill(guided(), data=digits_data(), steps=(1, 2), **LITTLE).save(place / "network")
    given = {
        "prompt_embeds": cond["prompt_embeds"][:2],
        "latents": torch.randn(2, *den.info.shape, generator=generator),
        "label": LABELS,
    }
    save_file({name: value.contiguous() for name, value in given.items()}, place / "given.safetensors")
    paths = os.pathsep.join([str(Path(fs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, str(Path(__file__).parent / "fresh.py"), str(place)], check=True, env={**os.environ, "PYTHONPATH": paths}
    )
    return place, pipeline, student, given, load_file(place / "made.safetensors")


def test_a_fresh_process_makes_the_same_samples(text_to_image):
    place, _, student, given, made = text_to_image
    network = Student.load(place / "network")
    for nfe in (1, 2):
        mine = network.sample(range(4), nfe=nfe, cond={"label": LABELS})
        assert (made[f"network.{nfe}"] - mine).abs().max() <= 1e-6
    mine = student.sample(range(2), nfe=2, cond={"prompt_embeds": given["prompt_embeds"]})
    assert (made["adapter"] - mine).abs().max() <= 1e-5


def test_load_lora_weights_in_a_fresh_process_makes_the_same_samples(text_to_image):
    _, pipeline, student, given, made = text_to_image
    without = core(student.network)
    run = {
        "prompt_embeds": given["prompt_embeds"],
        "latents": given["latents"],
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    bare = pipeline(**run, generator=torch.Generator().manual_seed(0)).images
    mine = student.pipeline(pipeline)(**run, generator=torch.Generator().manual_seed(0)).images
    assert pipeline.scheduler.timesteps.tolist() == [999, 499]
    assert (made["pipeline"] - mine).abs().max() <= 1e-5
    assert (mine - bare).abs().max() > 1e-2
    assert without is core(student.network)
    pipeline.unload_lora_weights()


def test_one_call_in_the_pipeline_is_one_of_the_student(text_to_image):
    _, pipeline, student, given, _ = text_to_image
    student.pipeline(pipeline, nfe=1)
    run = {"prompt_embeds": given["prompt_embeds"], "latents": given["latents"], "num_inference_steps": 1, "output_type": "latent"}
    images = pipeline(**run, guidance_scale=1.0).images
    cond = {"prompt_embeds": given["prompt_embeds"]}
    mine = student.sample(range(2), nfe=1, cond=cond, noise=given["latents"])
    assert (images - mine).abs().max() <= 1e-5
    pipeline.unload_lora_weights()


def test_an_adapter_for_another_base_is_refused_unless_meant(text_to_image, tmp_path):
    place, _, student, given, _ = text_to_image
    other = fs.load(str(place / "base"))
    with torch.no_grad():
        core(other.network).conv_in.weight.add_(0.01)
    other = fs.load(other.pipeline)
    with pytest.raises(ArtefactError, match="other_base=True"):
        Student.load(place / "adapter", other)
    there = Student.load(place / "adapter", other, other_base=True)
    assert there.sample(range(2), cond={"prompt_embeds": given["prompt_embeds"]}).isfinite().all()
    assert part_of(student.network) == "unet"
    assert isinstance(there.network, AdaptedNetwork)
    assert (place / "adapter" / "README.md").read_text().startswith("# Student of StableDiffusionPipeline")


def test_kohya_files_are_read_by_diffusers(text_to_image, tmp_path):
    _, pipeline, student, given, made = text_to_image
    student.save(tmp_path, form="kohya")
    assert torch.equal(
        Student.load(tmp_path, student.teacher).sample(range(2), cond={"prompt_embeds": given["prompt_embeds"]}),
        student.sample(range(2), cond={"prompt_embeds": given["prompt_embeds"]}),
    )
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pipeline.scheduler = fs.diffusers.PlanScheduler.from_pretrained(tmp_path / "scheduler")
    run = {"prompt_embeds": given["prompt_embeds"], "latents": given["latents"], "num_inference_steps": 2, "output_type": "latent"}
    images = pipeline(**run, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)).images
    assert (images - made["pipeline"]).abs().max() <= 1e-5
    pipeline.unload_lora_weights()


class Copied:
    """A method without data: the student says what the teacher says, of noise."""

    needs_data = False

    def training(self, teacher, student):
        def objective(model, batch, generator):
            assert not batch["x"].any()
            x = torch.randn(batch["x"].shape, generator=generator)
            cond = {"label": batch["label"]}
            with torch.no_grad():
                wanted = teacher(x, 1.0, **cond)
            return (read_as(teacher, model[STUDENT])(x, 1.0, **cond) - wanted).square().mean(), {}

        return Training({STUDENT: student}, (Stage(objective, STUDENT),))

    def plan(self, teacher, nfe):
        return fs.solvers.DDIM().plan(teacher.schedule, nfe, "time")


def test_a_method_of_ones_own_without_data():
    student = distill(guided(), method=Copied(), conditions={"label": torch.arange(10)}, steps=2, **LITTLE)
    assert student.card["method"]["name"] == "Copied"
    assert student.sample(range(2), cond={"label": LABELS[:2]}).shape == (2, 1, 8, 8)
    assert student.card["training"]["evaluations"] == 8 * 4 * (3 + 2)
    nameless = fs.Denoiser(Small(), Flow(), "flow")
    with pytest.raises(ValueError, match="does not say the shape"):
        distill(nameless, method=Copied(), steps=2, **LITTLE)


@pytest.mark.parametrize(("method", "nfe"), [("dmd2", 1), ("tdm", 4), ("freeflow", 1)])
def test_students_of_every_method_come_back(method, nfe, tmp_path):
    """Those without data too, with the branch that FreeFlow's network has."""
    label = {"label": torch.arange(4)}
    options = {"iterations": 2, "batch_size": 4, "warmup": 1, "compare": None}
    student = distill(fs.load("digits"), method=method, steps=nfe, conditions={"label": torch.arange(16) % 10}, **options)
    student.save(tmp_path / "student")
    again = Student.load(tmp_path / "student")
    assert torch.equal(again.sample(range(4), nfe=nfe, cond=label), student.sample(range(4), nfe=nfe, cond=label))
    with pytest.raises(PlanError, match=str(nfe)):
        again.sample(range(4), nfe=nfe + 1, cond=label)


def test_methods_for_one_number_of_calls_say_so():
    with pytest.raises(ValueError, match="one number of calls"):
        distill(fs.load("digits"), method="dmd2", steps=(1, 2), conditions={"label": torch.arange(16) % 10}, compare=None)
