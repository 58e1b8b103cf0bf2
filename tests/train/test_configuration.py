"""A run as a file: every key counts, none is guessed, and what a run writes makes it again."""

import json
import sys

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.cli import main
from fewstep.errors import UnknownNameError
from fewstep.train import PowerFunction
from fewstep.train.configuration import Configuration, default_network, read_configuration
from fewstep.train.recipes import RECIPES
from fewstep.train.stages import ADAMW

WHOLE = """
[data]
path = "arrays.npz"
mirrored = true

[network]
channels = [16, 32]
blocks = [1, 1]
dropout = 0.2

[schedule]
kind = "VPLinear"
beta_max = 18.0

[loss]
predicts = "velocity"
weighting = "min_snr"
times = "logit_normal"
label_dropout = 0.25

[optimizer]
name = "adamw"
betas = [0.8, 0.9]
weight_decay = 0.1

[training]
steps = 6
batch_size = 4
learning_rate = 0.002
warmup = 2
decay = "cosine"
floor = 0.1
clip = 0.5
ema = {sigma_rel = 0.1}
precision = "bfloat16"
seed = 3
accumulate = 2
divergence = 50.0
checkpoint_every = 2
log_every = 1
"""


@pytest.fixture
def arrays(tmp_path):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "arrays.npz", x=random.integers(0, 255, (8, 1, 8, 8), np.uint8), label=np.arange(8) % 2)
    return tmp_path


toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="the standard library reads TOML from Python 3.11 on")


@toml
def test_every_key_counts(arrays):
    (arrays / "run.toml").write_text(WHOLE)
    recipe = read_configuration(arrays / "run.toml").recipe()
    assert recipe.network == fs.models.SmallUNetConfig(1, 8, channels=(16, 32), blocks=(1, 1), classes=2, dropout=0.2)
    assert recipe.loss.schedule == fs.schedules.VPLinear(beta_max=18.0)
    assert (recipe.loss.predicts, recipe.loss.weighting, recipe.loss.times) == ("velocity", "min_snr", "logit_normal")
    assert (recipe.loss.dropout.null, recipe.loss.dropout.probability) == (2, 0.25)
    assert recipe.optimizer.keywords == {"betas": (0.8, 0.9), "weight_decay": 0.1}
    assert len(recipe.data()) == 16
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate, recipe.warmup, recipe.decay) == (6, 4, 0.002, 2, "cosine")
    assert (recipe.floor, recipe.record()["floor"]) == (0.1, 0.1)
    assert (recipe.clip, recipe.ema, recipe.precision, recipe.seed) == (0.5, PowerFunction(0.1), torch.bfloat16, 3)
    assert (recipe.accumulate, recipe.divergence, recipe.checkpoint_every, recipe.log_every) == (2, 50.0, 2, 1)
    assert json.loads(json.dumps(recipe.record()))["optimizer"] == ["AdamW", {"betas": [0.8, 0.9], "weight_decay": 0.1}]


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@toml
def test_a_run_by_file_is_sampled_and_repeated(arrays, capsys):
    (arrays / "run.toml").write_text(WHOLE)
    out = arrays / "model"
    status, text, _ = run(capsys, "train", arrays / "run.toml", "--out", out, "--threads", 1, "--seed", 4)
    assert status == 0
    assert "sample with: fewstep sample" in text
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "train.json", "training", "samples"}
    assert json.loads((out / "train.json").read_text())["training"]["seed"] == 4
    assert [json.loads(line)["step"] for line in (out / "training" / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    den = fs.load(str(out))
    assert den.info.conditions == {"label": {"classes": 2, "null": 2}}
    status, _, _ = run(capsys, "train", out / "train.json", "--out", arrays / "again", "--threads", 1, "--quiet", "--no-samples")
    assert status == 0
    assert (arrays / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    # and on: the same command again changes nothing; other options are refused
    assert run(capsys, "train", out / "train.json", "--out", out, "--threads", 1, "--quiet", "--no-samples")[0] == 0
    status, _, error = run(capsys, "train", out / "train.json", "--out", out, "--quiet", "--learning-rate", 0.1)
    assert (status, error.count("\n")) == (2, 1)
    assert "learning_rate was 0.002, now 0.1" in error


def test_a_folder_needs_no_file(arrays, capsys):
    from PIL import Image

    for name in ("cat", "dog"):
        (arrays / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((9, 11, 3), 40 * i, np.uint8)).save(arrays / "pictures" / name / f"{i}.png")
    options = ("--size", 8, "--steps", 2, "--batch-size", 4, "--threads", 1, "--quiet", "--out", arrays / "m", "--mirrored")
    assert run(capsys, "train", arrays / "pictures", *options) == (0, "", "")
    config = json.loads((arrays / "m" / "config.json").read_text())
    assert config["network"]["in_channels"] == 3
    assert config["conditions"] == {"label": {"classes": 2, "null": 2}}
    assert (arrays / "m" / "samples" / "samples.png").is_file()


def test_shipped_recipes_take_options(tmp_path, capsys):
    out = tmp_path / "m"
    options = ("--steps", 2, "--batch-size", 4, "--threads", 1, "--quiet", "--no-samples", "--precision", "float32", "--out", out)
    assert run(capsys, "train", "digits", *options)[0] == 0
    training = json.loads((out / "config.json").read_text())["training"]
    assert (training["steps"], training["batch_size"], training["precision"], training["data"]) == (2, 4, "None", "digits")
    assert Configuration(data={"path": "digits"}).recipe() == RECIPES["digits"]
    assert Configuration(data={"path": "photos"}).recipe() == RECIPES["photos"]


@pytest.mark.parametrize("size", [1, 2, 6, 7, 8, 12, 16, 20, 24, 28, 32, 36, 48, 64, 96, 128, 256])
def test_every_even_size_has_a_network(size):
    if size % 2:
        with pytest.raises(ValueError, match="divisible"):
            default_network((3, size, size), None, {})
        return
    config = default_network((3, size, size), 4, {})
    assert config.shape == (3, size, size)
    assert size // config.patch <= 36


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [
        ({"dta": {}}, UnknownNameError, "section of the file 'dta'. Did you mean 'data'"),
        ({"training": {}}, ValueError, "no section data"),
        ({"data": 3}, ValueError, "must consist of sections"),
        ({"data": {}}, ValueError, "needs a path"),
        ({"data": {"path": "arrays.npz", "sizes": 8}}, UnknownNameError, "section data 'sizes'. Did you mean 'size'"),
        ({"data": {"path": "arrays.npz"}, "training": {"step": 3}}, UnknownNameError, "Did you mean 'steps'"),
        ({"data": {"path": "arrays.npz"}, "network": {"channel": [8]}}, UnknownNameError, "Did you mean 'channels'"),
        (
            {"data": {"path": "arrays.npz"}, "network": {"channels": [9]}},
            ValueError,
            "in the section network: channels must be multiples",
        ),
        ({"data": {"path": "arrays.npz"}, "loss": {"predict": "flow"}}, UnknownNameError, "Did you mean 'predicts'"),
        ({"data": {"path": "arrays.npz"}, "loss": {"predicts": "velocty"}}, ValueError, "velocity"),
        ({"data": {"path": "arrays.npz"}, "schedule": {"kind": "Flw"}}, UnknownNameError, "Did you mean 'Flow'"),
        ({"data": {"path": "arrays.npz"}, "schedule": {"kind": "Flow", "x": 1}}, ValueError, "section schedule: Flow takes"),
        ({"data": {"path": "arrays.npz"}, "optimizer": {"name": "adam2"}}, UnknownNameError, "Did you mean 'adam'"),
        ({"data": {"path": "arrays.npz"}, "optimizer": {"beta": 1}}, UnknownNameError, "Did you mean 'betas'"),
        (
            {"data": {"path": "arrays.npz"}, "optimizer": {"betas": [2.0, 0.9]}},
            ValueError,
            "in the section optimizer: Invalid beta",
        ),
        ({"data": {"path": "arrays.npz"}, "training": {"precision": "half"}}, UnknownNameError, "precision"),
        ({"data": {"path": "arrays.npz"}, "training": {"steps": 9, "warmup": 9}}, ValueError, "warmup=9 must be less than steps=9"),
        ({"data": {"path": "arrays.npz"}, "training": {"floor": 1.5}}, ValueError, "floor is the share"),
        ({"data": {"path": "arrays.npz"}, "training": {"floor": "x"}}, ValueError, "floor must be a number"),
        ({"data": {"path": "arrays.npz"}, "training": {"steps": "many"}}, ValueError, "steps must be a whole number"),
        ({"data": {"path": "arrays.npz"}, "training": {"steps": 2.5}}, ValueError, "steps must be a whole number"),
        ({"data": {"path": "arrays.npz"}, "training": {"clip": "x"}}, ValueError, "clip must be a number"),
        ({"data": {"path": "arrays.npz"}, "training": {"ema": [0.9, 0.99]}}, ValueError, "ema must be one decay"),
        ({"data": {"path": "arrays.npz"}, "training": {"ema": {"sigma": 0.1}}}, UnknownNameError, "sigma_rel"),
        ({"data": {"path": "arrays.npz"}, "training": {"decay": "cosin"}}, UnknownNameError, "Did you mean 'cosine'"),
        ({"data": {"path": "nowhere"}}, FileNotFoundError, "nowhere"),
        ({"data": {"path": "digits", "size": 8}}, ValueError, "has its own size"),
        ({"data": {"path": "photos"}, "loss": {"label_dropout": 0.1}}, ValueError, "photos has none"),
        (
            {"data": {"path": "arrays.npz", "labelled": False}, "loss": {"label_dropout": 0.1}},
            ValueError,
            "needs pictures with classes",
        ),
    ],
    ids=str,
)
def test_configurations_that_are_refused(arrays, document, error, message):
    (arrays / "run.json").write_text(json.dumps(document))
    with pytest.raises(error, match=message):
        read_configuration(arrays / "run.json").recipe()


def test_files_that_are_no_configuration(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_configuration(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="no configuration"):
        read_configuration(tmp_path / "b.json")


def test_naming_the_usual_optimizer_changes_nothing(arrays):
    for path in ("arrays.npz", "digits"):
        usual = Configuration(data={"path": path}, place=arrays).recipe()
        for section in ({"name": "adamw"}, {"betas": [0.9, 0.99]}):
            found = Configuration(data={"path": path}, optimizer=section, place=arrays).recipe()
            assert found.optimizer is usual.optimizer is ADAMW
            assert found.record() == usual.record()
    other = Configuration(data={"path": "digits"}, optimizer={"weight_decay": 0.1}).recipe()
    assert other.optimizer.keywords == {"betas": (0.9, 0.99), "weight_decay": 0.1}


def test_only_the_usual_warmup_is_cut(arrays):
    def recipe(**training):
        return Configuration(data={"path": "arrays.npz"}, training=training, place=arrays).recipe()

    assert [recipe(steps=steps).rise for steps in (5000, 300, 5)] == [200, 30, 0]
    assert recipe(steps=300, warmup=250).rise == 250
    assert recipe(steps=300, warmup=250).record()["warmup"] == 250
    assert recipe(steps=300, warmup=0).rise == 0


@toml
def test_broken_toml(tmp_path):
    (tmp_path / "a.toml").write_text("[data")
    with pytest.raises(ValueError, match="not valid TOML"):
        read_configuration(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "Did you mean 'digits'"),
        (["no/such"], "wanted a folder of pictures"),
        (["none.toml"], "there is no configuration none.toml"),
        (["digits", "--size", "9"], "leave size out"),
        (["digits", "--device", "nowhere"], "--device nowhere cannot be used"),
        (["digits", "--threads", "-1"], "--threads"),
        (["digits", "--batch-size", "-4"], "batch_size must be a whole number"),
        (["digits", "--accumulate", "3"], "multiple of 3"),
        (["digits", "--steps", "-1"], "steps"),
        (["digits", "--out", "FILE"], "is a file"),
    ],
)
def test_commands_that_are_refused(tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    arguments = [str(tmp_path / "file") if argument == "FILE" else argument for argument in arguments]
    out = () if "--out" in arguments else ("--out", tmp_path / "m")
    status, _, error = run(capsys, "train", *arguments, *out, "--quiet")
    assert (status, error.count("\n")) == (2, 1)
    assert message in error
