"""``fewstep prefer`` and ``fewstep control``: what they write, that it is used by `fewstep sample`, and what they refuse."""

import json

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.cli import main
from fewstep.models import SmallUNet, SmallUNetConfig, save_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder with random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    network = SmallUNet(SmallUNetConfig(in_channels=1, image_size=8, channels=(16, 32), blocks=(1, 1), classes=10))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_model(folder, network, schedule=fs.schedules.VPLinear(), predicts="velocity")
    return str(folder)


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


LITTLE = ("--iterations", 4, "--batch", 2, "--count", 8, "--quiet")


def test_prefer_writes_a_student_that_sample_and_prefer_and_control_take(tiny, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    status, text, error = run(capsys, "prefer", tiny, "--reward", "ink", "--nfe", 2, "--out", out, "--json", *LITTLE)
    assert (status, error) == (0, "")
    assert json.loads(text)["reward"].keys() == {"before", "after", "gain"}
    names = {file.name for file in out.iterdir()}
    assert {"student.json", "student.safetensors", "plan-2.safetensors", "index.html", "results.json"} <= names
    assert {"samples-0000001.png", "samples-0000004.png"} <= names
    assert not (tmp_path / "out.unfinished").exists()
    status, _, _ = run(capsys, "sample", out, "--plan", out, "--count", 2, "--label", "1", "--out", tmp_path / "samples", "--quiet")
    assert status == 0
    options = ("--method", "spo", "--pairs", 0, "--options", "candidates=2,beta=5", "--reward", "classifier", "--seed", 1)
    status, _, error = run(capsys, "prefer", out, *options, "--out", again, *LITTLE)
    assert (status, error) == (0, "")
    card = json.loads((again / "student.json").read_text())
    assert card["method"]["of"]["name"] == "prefer, pso"
    assert "candidates=2" in card["method"]["options"]
    status, text, error = run(
        capsys,
        "control",
        again,
        "--target",
        "class",
        "--wanted",
        3,
        "--label",
        3,
        "--count",
        2,
        "--iterations",
        3,
        "--out",
        tmp_path / "c",
        "--json",
    )
    assert status == 0
    assert json.loads(text)["decode_calls"] == 2


def test_prefer_trains_an_adapter_and_learns_from_targets(tiny, tmp_path, capsys):
    pytest.importorskip("peft")
    data = tmp_path / "targets.npz"
    np.savez(data, x=np.ones((6, 1, 8, 8), np.float32), label=np.arange(6))
    out = tmp_path / "out"
    options = ("--method", "offline-pso", "--data", data, "--nfe", 2, "--adapter", 2)
    status, _, error = run(capsys, "prefer", tiny, *options, "--out", out, *LITTLE)
    assert (status, error) == (0, "")
    assert (out / "pytorch_lora_weights.safetensors").exists()
    assert not (out / "student.safetensors").exists()


def test_spo_trains_its_preference_model(tiny, tmp_path, capsys, monkeypatch):
    from fewstep.steer import preference_model

    asked = {}
    real = preference_model.fit_preference

    def few(network, model, pairs, *, steps, **options):
        asked.update(steps=steps, pairs=len(pairs["better"]))
        return real(network, model, pairs, steps=2, **options)

    monkeypatch.setattr("fewstep.steer.fit_preference", few)
    options = ("--method", "spo", "--reward", "ink", "--pairs", 8, "--nfe", 2, "--options", "threshold=0")
    status, _, error = run(capsys, "prefer", tiny, *options, "--out", tmp_path / "out", *LITTLE)
    assert (status, error) == (0, "")
    assert asked == {"steps": 300, "pairs": 8}
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["score_evaluations"] == 2 * 8 * 2 + 2 * 2 * 64  # two samples of 2 calls a pair; 2 steps of 64 pairs


@pytest.mark.parametrize("target", ["inpaint", "rows", "curve"])
def test_control_meets_pictures_and_curves(tiny, tmp_path, capsys, target):
    from PIL import Image

    picture, array = tmp_path / "p.png", tmp_path / "x.npy"
    Image.fromarray((np.arange(64).reshape(8, 8) * 4).astype(np.uint8)).save(picture)
    np.save(array, np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8))
    given = {
        "inpaint": ("--target", "inpaint", "--image", picture, "--mask", "top"),
        "rows": ("--target", "intensity", "--image", array),
        "curve": ("--target", "intensity", "--curve", "0.2", "--axis", "columns", "--refined", 1, "--surrogate", 1),
    }[target]
    out = tmp_path / "out"
    common = ("--nfe", 2, "--count", 3, "--iterations", 5, "--out", out, "--json", "--quiet")
    status, text, error = run(capsys, "control", tiny, *given, *common)
    assert (status, error) == (0, "")
    told = json.loads(text)
    assert told["error"] < told["without"]
    assert np.load(out / "samples.npz")["samples"].shape == (3, 1, 8, 8)
    assert {"samples.png", "samples-0.png", "index.html", "results.json"} <= {file.name for file in out.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefer"], "give --reward"),
        (["prefer", "--reward", "inc"], "unknown reward 'inc'"),
        (["prefer", "--method", "offline-pso"], "give --data"),
        (["prefer", "--reward", "ink", "--options", "betta=1"], "no option 'betta'"),
        (["prefer", "--reward", "ink", "--solver", "ddim"], "draws none"),
        (["prefer", "--reward", "ink", "--count", "1"], "0 or at least 2"),
        (["control"], "give --image"),
        (["control", "--target", "intensity"], "one of --image and --curve"),
        (["control", "--target", "intensity", "--curve", "1,2"], "8 for the rows"),
        (["control", "--target", "class", "--wanted", "12"], "classes 0 to 9"),
        (["control", "--target", "class", "--refined", "100"], "--refined"),
        (["control", "--target", "class", "--wanted", "3", "--guidance", "2"], "--guidance needs --label"),
        (["control", "--target", "class"], "give --wanted"),
        (["prefer", "--reward", "ink", "--size", "8"], "one size"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny, tmp_path, capsys, arguments, message):
    status, _, error = run(capsys, arguments[0], tiny, *arguments[1:], "--out", tmp_path / "out", "--quiet")
    assert status == 2
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def several(tiny, tmp_path_factory):
    """A student that is told its number of calls, 1 or 2, and says something else each time."""
    from fewstep.distill import Student, distill

    folder = tmp_path_factory.mktemp("students") / "tdm"
    labels = {"label": torch.arange(10)}
    student = distill(
        fs.load(tiny), method="tdm", steps=(1, 2), conditions=labels, iterations=1, batch_size=4, seed=0, compare=None
    )
    torch.manual_seed(3)
    torch.nn.init.normal_(student.network.branch[2].weight, std=0.3)
    student.card["base"]["source"] = tiny
    student.save(folder)
    return Student.load(folder)


def test_control_asks_a_student_for_the_number_of_calls_of_each_plan(several, tmp_path, monkeypatch):
    from fewstep.cli.control import ControlOptions, _model

    several.save(tmp_path / "tdm")
    decoder, through, surrogate, decode = _model(
        ControlOptions(model=str(tmp_path / "tdm"), nfe=2, surrogate=1, label="1", device="cpu")
    )
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        for denoiser, plan in ((through, surrogate), (decoder, decode)):
            assert torch.equal(denoiser(x, 1.0, label=label), several.denoiser_of(plan.nfe)(x, 1.0, label=label))
        assert not torch.allclose(through(x, 1.0, label=label), decoder(x, 1.0, label=label))
    assert (surrogate.nfe, decode.nfe) == (1, 2)


def test_of_a_student_of_several_numbers_of_calls_the_tuned_one_is_kept(several, tmp_path, capsys):
    folder, out, data = tmp_path / "tdm", tmp_path / "out", tmp_path / "samples.npz"
    several.save(folder)
    written = {"samples": np.zeros((4, 1, 8, 8), np.float32), "labels": np.arange(4), "seeds": np.arange(4)}
    np.savez(data, **written, worse=np.ones((4, 1, 8, 8), np.float32))  # but for worse, as sample writes them
    options = ("--method", "offline-pso", "--data", data, "--nfe", 2, "--out", out)
    status, _, error = run(capsys, "prefer", folder, *options, *LITTLE)
    assert (status, error) == (0, "")
    made = fs.distill.Student.load(out)
    assert list(made.plans) == [2]
    assert sorted(file.name for file in out.glob("plan-*")) == ["plan-2.safetensors"]
    assert made.told_number(2) == several.told_number(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefer", "--reward", "ink", "--solver", "lcm"], "leave --solver out"),
        (["prefer", "--reward", "ink", "--size", "16"], "one size"),
        (["prefer", "--reward", "ink", "--threads", "-3"], "--threads must be"),
        (["prefer", "--reward", "ink", "--label", ""], "give --label"),
        (["control", "--target", "class", "--wanted", "3"], "give --label"),
    ],
)
def test_what_a_student_cannot_honour_is_refused(several, tmp_path, capsys, arguments, message):
    several.save(tmp_path / "tdm")
    status, _, error = run(capsys, arguments[0], tmp_path / "tdm", *arguments[1:], "--out", tmp_path / "out", "--quiet")
    assert status == 2
    assert message in error


def test_the_reward_of_a_model_of_latents_sees_pictures():
    from fewstep.cli.prefer import _Decoded
    from fewstep.steer import make_reward
    from fewstep.steer.method import told_of

    class Latents:
        def decode(self, x):
            return x.repeat_interleave(2, -1)

    seen = []
    reward = _Decoded(Latents(), lambda x, **cond: seen.append(tuple(x.shape)) or x.flatten(1).mean(1))
    assert reward(torch.zeros(2, 4, 2, 2)).tolist() == [0.0, 0.0]
    assert seen == [(2, 4, 2, 4)]
    assert told_of(_Decoded(Latents(), make_reward("ink"))) == "ink of pictures"
