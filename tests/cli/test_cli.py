from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep as fs
from fewstep.cli import COMMANDS, compare, evaluate, main, setup
from fewstep.cli.tune import _told_how_to_go_on
from fewstep.dequantization import Levels
from fewstep.evaluate import comparison
from fewstep.likelihood import bits_per_dim
from fewstep.models import SmallUNet, SmallUNetConfig, save_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder with random weights, small enough for every command."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    network = SmallUNet(SmallUNetConfig(in_channels=1, image_size=8, channels=(16, 32), blocks=(1, 1), classes=10))
    save_model(folder, network, schedule=fs.schedules.VPLinear(), predicts="velocity")
    return str(folder)


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_of_every_command(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "--help"])
        assert stop.value.code == 0
        assert "usage: fewstep" in capsys.readouterr().out
    assert len(COMMANDS) == 15
    assert main([]) == 2
    with pytest.raises(SystemExit):
        main(["--version"])
    assert fs.__version__ in capsys.readouterr().out


def test_sample_writes_pictures_numbers_and_the_plan(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    status, text, _ = run(capsys, "sample", tiny, "--nfe", 3, "--count", 5, "--label", "each", "--out", out, "--json", "--batch", 2)
    assert status == 0
    assert json.loads(text)["nfe"] == 3
    assert sorted(p.name for p in out.iterdir()) == ["plan.safetensors", "sample.json", "samples.npz", "samples.png"]
    arrays = np.load(out / "samples.npz")
    assert arrays["samples"].shape == (5, 1, 8, 8)
    assert arrays["labels"].tolist() == [0, 1, 2, 3, 4]
    with Image.open(out / "samples.png") as picture:
        assert picture.width == (3 * 9 - 1) * 8
    assert fs.Plan.load(out / "plan.safetensors").nfe == 3
    # again, from the saved plan, other batches: the same samples
    run(
        capsys,
        "sample",
        tiny,
        "--plan",
        out / "plan.safetensors",
        "--seed",
        "2-4",
        "--label",
        "2,3,4",
        "--out",
        tmp_path / "b",
        "--quiet",
    )
    np.testing.assert_allclose(np.load(tmp_path / "b" / "samples.npz")["samples"], arrays["samples"][2:], atol=1e-5)
    assert run(capsys, "sample", tiny, "--count", 1, "--nfe", 1, "--guidance", 2.0, "--label", 3, "--out", out)[0] == 0  # replaces


def test_options_that_contradict_a_plan_are_refused(tiny, tmp_path, capsys):
    schedule = fs.load(tiny).schedule
    (tmp_path / "tuned").mkdir()
    file = tmp_path / "tuned" / "plan-6.safetensors"
    fs.make_plan("unipc", schedule, 6, grid="lambda", final="zero").save(file)
    asked = ("sample", tiny, "--count", 1, "--out", tmp_path / "out", "--quiet")
    same = ("--nfe", 6, "--solver", "unipc", "--grid", "lambda", "--final", "zero")
    for given in ((), same):
        assert run(capsys, *asked, "--plan", file, *given)[0] == 0
        assert run(capsys, *asked, "--plan", tmp_path / "tuned", *given)[0] == 0  # the only one
    for name, value in (("nfe", 10), ("solver", "ddim"), ("grid", "auto"), ("final", "t_end")):
        status, _, error = run(capsys, *asked, "--plan", file, f"--{name}", value)
        assert (status, error.count("\n")) == (2, 1)
        assert f"--{name} {value} contradicts {file}, a plan of 6 calls (solver UniPC, grid lambda, final zero)" in error
    fs.make_plan("unipc", schedule, 10, grid="lambda").save(tmp_path / "tuned" / "plan-10.safetensors")
    status, _, error = run(capsys, *asked, "--plan", tmp_path / "tuned")
    assert (status, error.count("\n")) == (2, 1)
    assert "several numbers of calls, and --nfe says which: plan-6.safetensors, plan-10.safetensors" in error


def test_demo_makes_a_page_that_needs_nothing_else(tiny, tmp_path, capsys):
    out = tmp_path / "demo"
    status, text, _ = run(capsys, "demo", "--models", tiny, "--count", 4, "--nfe", "4,6", "--out", out, "--quiet", "--json")
    assert status == 0
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3 * 3 + 1
    assert "http" not in page.replace("http-equiv", "")
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(text)
    assert len(results["rows"]) == 3 * 3 * 2
    assert {"model", "solver", "grid", "nfe", "error"} == set(results["rows"][0])


def test_compare_ranks_all_solvers_in_one_page(tiny, tmp_path, capsys):
    out = tmp_path / "compare"
    options = ["--nfe", "2,4", "--count", 12, "--tol", 0.1, "--resamples", 20, "--batch", 5, "--seed", 3]
    status, text, err = run(capsys, "compare", tiny, *options, "--solvers", "all", "--out", out, "--json", "--quiet")
    assert (status, err) == (0, "")
    results = json.loads(text)
    assert results == json.loads((out / "results.json").read_text())
    found = results["models"]["tiny"]
    ran = {row["solver"] for row in results["rows"]}
    assert ran | set(found["same"]) | set(found["skipped"]) >= set(fs.solver_names())
    assert {place["solver"] for place in found["ranking_by_distance"]} == ran
    stochastic = {row["solver"] for row in results["rows"] if row.get("stochastic")}
    assert {place["solver"] for place in found["ranking_by_error"]} == ran - stochastic
    scores = [place["score"] for place in found["ranking_by_error"]]
    assert scores == sorted(scores)
    assert found["distance"]["sizes"] == [12, 24]
    page = (out / "index.html").read_text()
    assert "http" not in page
    assert page.count("data:image/png;base64,") >= 4
    assert all(f"{name}" in page for name in ran)
    # the same from other batches, and in words
    status, text, _ = run(capsys, "compare", tiny, *options, "--solvers", "ddim,dpmpp_2m", "--out", tmp_path / "b", "--batch", 12)
    assert status == 0
    assert "12 against 24 samples, seed 3" in text
    assert re.search(r"by error  by distance  solver +error at calls: +2 +4\n +\d +\d  (ddim|dpmpp_2m) +0\.\d+ +0\.\d+\n", text)
    again = json.loads((tmp_path / "b" / "results.json").read_text())["rows"]
    assert "all runs and the exact solution end at noise level 0" in text
    before = {(row["solver"], row["nfe"]): row["error"] for row in results["rows"]}
    for row in again:
        assert row["error"] == pytest.approx(before.get((row["solver"], row["nfe"]), row["error"]), rel=1e-4)
    # and to the last time of the schedule
    options += ["--solvers", "ddim", "--out", tmp_path / "c", "--final", "t_end", "--json", "--quiet"]
    ended = json.loads(run(capsys, "compare", tiny, *options)[1])
    assert ended["models"]["tiny"]["end"].startswith("t = 0.001")
    assert f"end at {ended['models']['tiny']['end']}" in (tmp_path / "c" / "index.html").read_text()
    assert all(row["error"] != before["ddim", row["nfe"]] for row in ended["rows"])


@pytest.fixture
def heeds_interrupts():
    """A process that a shell started in the background ignores SIGINT, and so do its children: undo that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_keeps_the_solvers_that_are_finished(number, tiny, tmp_path, capsys, monkeypatch):
    runs = []

    def interrupted(*arguments, **options):
        runs.append(1)
        if len(runs) == 4:  # the second run of the second solver
            signal.raise_signal(number)
        return excess(*arguments, **options)

    excess = comparison.excess
    monkeypatch.setattr(comparison, "excess", interrupted)
    options = ["--nfe", "2,4", "--count", 4, "--tol", 0.1, "--resamples", 20, "--solvers", "ddim,dpmpp_2m,unipc"]
    status, _, err = run(capsys, "compare", tiny, *options, "--out", tmp_path / "out", "--quiet")
    assert status == 130
    assert err.strip() == f"fewstep: interrupted; what was finished is in {tmp_path / 'out'}."
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not results["finished"]
    assert results["models"]["tiny"]["unfinished"] == ["dpmpp_2m, auto", "unipc, auto"]
    assert [(row["solver"], row["nfe"]) for row in results["rows"]] == [("ddim", 2), ("ddim", 4)]
    assert "Interrupted before" in (tmp_path / "out" / "index.html").read_text()
    runs[:] = [1, 1, 1]  # at the first run: nothing is finished
    assert run(capsys, "compare", tiny, *options, "--out", tmp_path / "none", "--quiet")[::2] == (130, "fewstep: interrupted.\n")
    assert not (tmp_path / "none").exists()


def test_sample_leaves_out_what_was_searched_for_its_plan(tiny, tmp_path, capsys):
    denoiser = fs.load(tiny)
    plan, noise = fs.make_plan("auto", denoiser.schedule, 3, grid="auto", final="t_end"), fs.draw_noise((1, 8, 8), range(8))
    names = fs.tuners.skippable(denoiser, noise)
    table = np.ones((3, len(names)), bool)
    skips = fs.tuners.LayerSkips(names, plan.tau, table, fs.identity.identity(denoiser), plan.digest, plan.nfe)
    skips.save(tmp_path / "skips.safetensors")
    plan.save(tmp_path / "plan.safetensors")
    options = ("--plan", tmp_path / "plan.safetensors", "--skips", tmp_path / "skips.safetensors")
    status, _, _ = run(capsys, "sample", tiny, "--count", 2, *options, "--out", tmp_path / "out")
    assert status == 0
    assert json.loads((tmp_path / "out" / "sample.json").read_text())["skips"] == skips.digest
    noise = fs.draw_noise((1, 8, 8), range(2), plan)
    wanted = fs.sample(fs.tuners.Skipping(denoiser, skips), noise, plan)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "samples.npz")["samples"], wanted.numpy(), atol=1e-6)
    status, _, error = run(capsys, "sample", tiny, "--nfe", 4, *options[2:], "--out", tmp_path / "other")
    assert status != 0
    assert "of 3 calls, but this is" in error
    assert not (tmp_path / "other").exists()


def test_compare_takes_as_many_samples_as_fit_a_few_minutes(tiny, tmp_path, capsys, monkeypatch):
    options = ["--nfe", "2", "--tol", 0.1, "--resamples", 20, "--solvers", "ddim"]
    calls = 2 + 3 * compare.EXACT_CALLS
    for seconds, count in ((compare.GOAL / calls / 45, 40), (1.0, compare.FEWEST), (1e-9, compare.MOST)):
        monkeypatch.setattr(setup, "seconds_a_call", lambda *_, value=seconds: value)
        _, text, err = run(capsys, "compare", tiny, *options, "--out", tmp_path / "out", "--json")
        assert f"tiny: {count} samples of every solver" in err
        assert json.loads(text)["models"]["tiny"]["count"] == count


def test_evaluate_reads_what_sample_writes_and_pictures(tiny, tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 100)):
        assert run(capsys, "sample", tiny, "--nfe", 2, "--count", 20, "--seed", seed, "--out", tmp_path / name, "--quiet")[0] == 0
    out = tmp_path / "report"
    arguments = ["evaluate", tmp_path / "a", tmp_path / "b" / "samples.npz", "--resamples", 20, "--out", out, "--json", "--quiet"]
    arguments += ["--distances", "frechet,kid,mmd,sliced_wasserstein,wasserstein"]
    status, text, _ = run(capsys, *arguments)
    assert status == 0
    results = json.loads(text)
    assert results == json.loads((out / "results.json").read_text())
    assert [figure["distance"] for figure in results["distances"]] == arguments[-1].split(",")
    assert all(figure["sizes"] == [20, 20] and figure["seed"] == 0 for figure in results["distances"])
    assert sorted(p.name for p in out.iterdir()) == ["data.png", "index.html", "results.json", "samples.png"]
    arrays = [np.load(tmp_path / name / "samples.npz")["samples"] for name in "ab"]
    features = [fs.evaluate.digit_features(torch.from_numpy(array)) for array in arrays]
    assert results["distances"][0]["value"] == pytest.approx(fs.evaluate.Frechet()(*features))
    # with classes on one side only: a was made without condition
    run(capsys, "sample", tiny, "--nfe", 1, "--count", 10, "--label", "each", "--out", tmp_path / "c", "--quiet")
    text = run(capsys, "evaluate", tmp_path / "a", tmp_path / "c", "--resamples", 20)[1]
    assert "features: digits (auto)" in text
    assert "The samples have no labels, so the classes are not held fixed and the test has less power." in text


def test_evaluate_bits_per_dim(tiny, tmp_path, capsys):
    """As the library's function gives them, on the held-out digits."""
    arguments = [
        "evaluate",
        tiny,
        "--bits-per-dim",
        "--count",
        4,
        "--time",
        0.1,
        "--tol",
        1e-2,
        "--out",
        tmp_path / "out",
        "--quiet",
    ]
    status, text, _ = run(capsys, *arguments, "--json")
    assert status == 0
    results = json.loads(text)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    x = evaluate.read_samples("digits", evaluate.EvaluateOptions(samples="digits", count=4))[0]
    label = torch.full((4,), 10)
    found = bits_per_dim(fs.load(tiny), x, Levels(17), t=0.1, tol=1e-2, cond={"label": label})
    assert results["bits_per_dim"] == pytest.approx(found.value, rel=1e-6)
    assert results["levels"] == 17
    assert results["bound"]
    text = run(capsys, *arguments[:7], "--tol", 1e-2, "--dequantization", "uniform")[1]
    assert "tiny on 4 samples of digits (held_out): at most" in text.replace(str(tiny), "tiny")


def test_bits_per_dim_of_the_folder_that_was_trained_on(tiny, tmp_path, capsys):
    """Sub-folders are classes, pictures are cut and scaled as in training, and it is said under which class they are judged."""
    random = np.random.default_rng(0)
    for name, number in (("a", 0), ("a", 1), ("b", 2)):
        (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (12, 16), np.uint8)).save(tmp_path / "pictures" / name / f"{number}.png")
    arguments = ["evaluate", tiny, tmp_path / "pictures", "--bits-per-dim", "--time", 0.1, "--tol", 0.05, "--quiet", "--json"]
    status, text, error = run(capsys, *arguments)
    assert status == 0, error
    found = json.loads(text)
    assert (found["count"], found["levels"], found["condition"]) == (3, 256, "under no class")
    reverse = json.loads(run(capsys, *arguments, "--differentiation", "reverse")[1])
    assert reverse["bits_per_dim"] == pytest.approx(found["bits_per_dim"], rel=1e-4)
    assert reverse["differentiation"] == "reverse"
    assert json.loads(run(capsys, *arguments, "--count", 2)[1])["count"] == 2


def test_the_class_under_which_data_are_judged():
    def model(known):
        return SimpleNamespace(info=SimpleNamespace(name="m", conditions={} if known is None else {"label": known}))

    labels = np.array([0, 2, 1])
    assert evaluate._labels_for(model(None), labels, 3) == (None, "a model without classes")
    found, told = evaluate._labels_for(model({"classes": 3, "null": 3}), labels, 3)
    assert (found.tolist(), told) == ([3, 3, 3], "under no class")
    found, told = evaluate._labels_for(model({"classes": 3}), labels, 3)
    assert (found.tolist(), told) == ([0, 2, 1], "each under its class")
    for classes in (None, labels + 1):
        with pytest.raises(ValueError, match="needs a class of every sample, 0 to 2"):
            evaluate._labels_for(model({"classes": 3}), classes, 3)


def test_evaluate_reads_pictures_and_bytes(tmp_path, capsys):
    """Bytes are brought to [-1, 1]. The exact distance takes all samples of both sides."""
    pytest.importorskip("ot")
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8)).astype(np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
    np.save(tmp_path / "bytes.npy", pixels[:, None])
    for source in (folder, tmp_path / "bytes.npy"):
        options = ["--resamples", 20, "--features", "pixels", "--distances", "wasserstein", "--json", "--count", 50]
        status, text, _ = run(capsys, "evaluate", source, "digits", *options)
        assert status == 0
        (found,) = json.loads(text)["distances"]
        assert found["sizes"] == [6, 50]
        assert found["p"] == 1 / 21 or found["value"] > 4.0
    status, text, _ = run(capsys, "evaluate", folder, "--resamples", 20, "--quiet")
    assert (status, text) == (0, "")
    Image.fromarray(pixels[0, :4]).save(folder / "x.png")
    status, _, err = run(capsys, "evaluate", folder)
    assert status == 2
    assert "pictures must be alike" in err


def test_plan_make_and_show(tmp_path, capsys):
    file = tmp_path / "p.safetensors"
    assert run(capsys, "plan", "make", "dpmpp_3m", "--schedule", "edm", "--nfe", 6, "--grid", "karras", "--out", file)[0] == 0
    status, text, _ = run(capsys, "plan", "show", file)
    assert status == 0
    assert text.strip() == fs.Plan.load(file).show()
    details = json.loads(run(capsys, "plan", "show", file, "--json")[1])
    assert len(details["B"]) == 7
    assert details["provenance"]["grid"] == "karras"
    assert run(capsys, "plan", "make", "ddim", "--schedule", "edm", "--grid", "80,3,0", "--out", file)[0] == 0
    assert fs.Plan.load(file).grid.tolist() == [80.0, 3.0, 0.0]


def test_solvers(capsys):
    rows = json.loads(run(capsys, "solvers", "--json")[1])
    assert [row["name"] for row in rows] == fs.solver_names()
    costs = {row["name"]: row["cost"] for row in rows}
    assert [costs[n] for n in ("dpm_3s", "dpmpp_2s", "flow_euler", "flow_rk4", "edm_heun", "auto")] == [
        f"{calls} calls a step" if calls > 1 else "1 call a step" for calls in (3, 2, 1, 4, 2, 1)
    ]
    text = run(capsys, "solvers")[1]
    assert "dpmpp_3m_sde" in text
    assert max(map(len, text.splitlines())) <= 110
    assert "Elucidating the Design Space ..., arXiv 2206.00364" in text


def test_check(tiny, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((8, 1, 8, 8)).astype(np.float32))
    status, text, _ = run(capsys, "check", tiny, "--data", tmp_path / "x.npy")
    assert status == 1  # an untrained network
    assert text.startswith("PROBLEM")
    assert run(capsys, "check", "digits", "--json")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "digit"], "Did you mean 'digits'"),
        (["sample", "TINY", "--solver", "dpmpp2m"], "Did you mean 'dpmpp_2m'"),
        (["sample", "TINY", "--solver", "DPMSolverPP"], "is a class; solvers of it are dpmpp, dpmpp_1"),
        (["sample", "TINY", "--solver", "dpm"], "`fewstep solvers`"),
        (["sample", "TINY", "--grid", "carras"], "Did you mean 'karras'"),
        (["sample", "TINY", "--nfe", "0"], "at least 1"),
        (["sample", "TINY", "--count", "0"], "at least 1"),
        (["sample", "TINY", "--seed", "x"], "--seed takes"),
        (["sample", "TINY", "--seed", "0..7"], "--seed takes"),
        (["sample", "TINY", "--seed", "7-0"], "--seed 7-0 gives no samples"),
        (["sample", "TINY", "--seed", "0-7", "--count", "4"], "--seed 0-7 asks for 8 samples and --count for 4: leave --count out"),
        (["sample", "TINY", "--seed", "3,5", "--count", "16"], "--seed 3,5 asks for 2 samples and --count for 16"),
        (["sample", "TINY", "--label", "10"], "classes 0 to 9"),
        (["sample", "TINY", "--label", "cat"], "--label takes"),
        (["sample", "photos", "--label", "1"], "takes no labels"),
        (["sample", "photos", "--guidance", "2"], "--guidance needs"),
        (["sample", "TINY", "--device", "cuda:77"], "cannot be used"),
        (["sample", "TINY", "--plan", "DIR/none"], "No such file"),
        (["sample", "TINY", "--plan", "DIR/bad"], "truncated, damaged or foreign"),
        (["sample", "TINY", "--plan", "DIR/edm"], "made for EDM"),
        (["sample", "TINY", "--out", "DIR/bad"], "is a file"),
        (["sample", "TINY", "--out", "DIR/no/such"], "no folder"),
        (["sample", "DIR"], "no config.json"),
        (["demo", "--nfe", "a"], "--nfe takes"),
        (["demo", "--models", "none"], "unknown model"),
        (["plan", "show", "DIR/bad"], "truncated, damaged or foreign"),
        (["plan", "make", "ddim", "--grid", "0.1,0.2,0.3"], "does not decrease"),
        (["plan", "make", "ddim", "--out", "DIR/no/such"], "there is no folder"),
        (["plan", "make", "ddim", "--grid", "1,0.5,0.1", "--nfe", "2"], "says calls, start and end by itself: leave --nfe out"),
        (["check", "TINY"], "--data is needed"),
        (["check", "TINY", "--data", "DIR/bad"], "no .npy or .npz"),
        (["train", "cats"], "cats"),
        (["train", "digits-classifier", "--steps", "3"], "takes --out, --seed and --quiet only"),
        (["compare", "TINY", "--solvers", "dpmpp2m"], "Did you mean 'dpmpp_2m'"),
        (["compare", "TINY", "--nfe", "a"], "--nfe takes"),
        (["compare", "TINY", "--distance", "kid"], "can be negative"),
        (["compare", "TINY", "--features", "pixel"], "Did you mean 'pixels'"),
        (["compare", "TINY,TINY"], "different names"),
        (["compare", "TINY", "--count", "1"], "at least 2"),
        (["compare", "TINY", "--grids", "karas"], "Did you mean 'karras'"),
        (["compare", "TINY", "--grids", "linspace"], "no solver can be run on tiny: with 10 calls and grid linspace"),
        (["compare", "photos", "--features", "digits"], "sees samples of shape"),
        (["evaluate", "DIR/bad"], "no .npy or .npz"),
        (["evaluate", "DIR/one.png"], "Put the pictures in a folder"),
        (["evaluate", "DIR"], "neither samples.npz nor at least 2 pictures"),
        (["evaluate", "DIR/none"], "there are no samples"),
        (["evaluate", "digits", "photos"], "have shape (1, 8, 8)"),
        (["evaluate", "digits", "digits"], "the same samples"),
        (["evaluate", "digits", "--distances", "fid"], "unknown distance"),
        (["evaluate", "digits", "--features", "inception", "--weights", "DIR/none"], "weights of Inception are not at"),
        (["evaluate", "TINY", "--bits-per-dim", "--levels", "16"], "Pass the levels that they take"),
        (["evaluate", "TINY", "photos", "--bits-per-dim"], "makes samples of shape (1, 8, 8), the data photos have (3, 32, 32)"),
        (["evaluate", "photos", "--bits-per-dim"], "the data digits have (1, 8, 8): name data of the model's shape"),
        (["evaluate", "TINY", "--bits-per-dim", "--features", "pixels"], "--features does nothing with --bits-per-dim"),
        (["evaluate", "digits", "--levels", "16", "--draws", "2"], "--levels, --draws do nothing without --bits-per-dim"),
    ],
)
def test_bad_input_is_one_line_and_a_status(arguments, message, tiny, tmp_path, capsys):
    (tmp_path / "bad").write_bytes(b"not a plan")
    (tmp_path / "one.png").write_bytes(b"a picture")
    fs.make_plan("ddim", fs.schedules.EDM(), 3).save(tmp_path / "edm")
    given = [a.replace("TINY", tiny).replace("DIR", str(tmp_path)) for a in arguments]
    if "--out" not in given and given[0] in ("sample", "demo", "compare"):
        given += ["--out", str(tmp_path / "out")]
    before = sorted(p.name for p in tmp_path.iterdir())
    status, out, err = run(capsys, *given)
    assert status == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert message in err
    assert not re.match(r"fewstep: \w+Error", err)
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing half-written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "make"], "fewstep plan make: the following arguments are required: SOLVER; `fewstep plan make --help` says"),
        (["plan"], "fewstep plan: the following arguments are required: COMMAND; `fewstep plan --help` says"),
        (["smaple"], "invalid choice: 'smaple'"),
        (["sample", "--nfe", "x"], "argument --nfe: invalid int value: 'x'"),
        (["sample", "digits", "--cuont", "3"], "unrecognized arguments: --cuont"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_help_begins_with_what_a_command_is_called_with(capsys):
    for command, usage in (
        ("plan make", "SOLVER"),
        ("plan export", "FILE OUT"),
        ("sample", "[MODEL]"),
        ("evaluate", "SAMPLES [DATA]"),
    ):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        assert capsys.readouterr().out.startswith(f"usage: fewstep {command} {usage} [options]\n")


def test_what_is_given_wrong_is_told_without_torch(tmp_path):
    code = (
        "import sys; from fewstep.cli import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'ray'} & sys.modules.keys(), 'it loaded them first'; sys.exit(status)"
    )
    for arguments in (
        ["sample", "--seed", "0-7", "--count", "4"],
        ["sample", "--workers", "2"],
        ["sample", "--shards", "--workers", "2"],
        ["compare", "--nfe", "a"],
        ["compare", "--address", "auto"],
        ["tune", "--nfe", "a"],
        ["tune", "--minutes", "3", "--evaluations", "4"],
        ["demo", "--nfe", "a"],
        ["distill", "--steps", "a"],
        ["prefer", "--dtype", "float64", "--reward", "ink"],
        ["control", "--target", "intensity"],
        ["serve", "--port", "70000"],
        ["serve", "--size", "small"],
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (arguments, done.stderr)


def test_what_should_not_happen_is_called_by_its_class(tiny, capsys, monkeypatch):
    def broken(*arguments):
        raise KeyError("x")

    monkeypatch.setattr(setup, "open_model", broken)
    assert run(capsys, "sample", tiny) == (
        2,
        "",
        "fewstep: KeyError: 'x' (this should not happen: FEWSTEP_TRACEBACK=1 shows where)\n",
    )


def test_an_unwritable_folder_is_one_line(tiny, tmp_path):
    if os.geteuid() == 0:
        place = "/proc/fewstep-test"  # root may write anywhere else
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        place = tmp_path / "locked" / "out"
    command = [sys.executable, "-m", "fewstep", "sample", tiny, "--nfe", "1", "--out", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.usefixtures("heeds_interrupts")
def test_interrupt_leaves_nothing_and_says_so(tiny, tmp_path):
    command = [
        sys.executable,
        "-m",
        "fewstep",
        "sample",
        tiny,
        "--nfe",
        "1000",
        "--count",
        "400",
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(p.name.startswith(".out") for p in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "fewstep: interrupted."
    assert list(tmp_path.iterdir()) == []


def test_tune_writes_plans_that_sample_takes(tiny, tmp_path, capsys):
    out = tmp_path / "tuned"
    status, text, _ = run(capsys, "tune", tiny, "--nfe", "2,3", "--trajectories", 16, "--out", out, "--json", "--quiet")
    assert status == 0
    report = json.loads(text)
    assert sorted(report["plans"]) == ["2", "3"]
    assert all(told["rms"] <= told["untuned_rms"] for told in report["plans"].values())
    assert {"plan-2.safetensors", "plan-3.safetensors", "index.html", "results.json", "exact.png"} <= {
        p.name for p in out.iterdir()
    }
    assert not (tmp_path / "tuned.unfinished").exists()
    plan = out / "plan-3.safetensors"
    assert run(capsys, "sample", tiny, "--plan", plan, "--count", 2, "--label", "1", "--out", tmp_path / "s")[0] == 0
    if "tuned" in fs.Plan.load(plan).provenance:
        other = ("sample", tiny, "--plan", plan, "--count", 2, "--label", "1", "--guidance", 3, "--out", tmp_path / "s")
        status, _, error = run(capsys, *other)
        assert status == 2
        assert "was tuned for no guidance, but the denoiser has classifier-free guidance of scale 3" in error


def test_tune_writes_the_page_of_any_plan(tiny, tmp_path, capsys):
    options = ("--nfe", 3, "--label", "1", "--trajectories", 8, "--final", "zero", "--method", "compensation")
    status, _, error = run(capsys, "tune", tiny, *options, "--out", tmp_path / "c")
    assert (status, "Traceback" in error) == (0, False)
    sampled = ("sample", tiny, "--plan", tmp_path / "c", "--count", 1, "--label", "1", "--out", tmp_path / "s")
    assert run(capsys, *sampled, "--nfe", 3)[0] == 0
    status, _, error = run(capsys, *sampled, "--nfe", 4)
    assert (status, len(error.splitlines()), "no plan for 4 calls (--nfe): plan-3.safetensors" in error) == (2, 1, True)


def test_tune_makes_a_family_over_guidance_scales(tiny, tmp_path, capsys):
    out = tmp_path / "family"
    options = ("--nfe", 3, "--label", "each", "--guidance", "3,2", "--trajectories", 16, "--out", out)
    status, text, _ = run(capsys, "tune", tiny, *options)
    assert status == 0
    assert "guidance 2" in text
    assert "calls between guidance 2 and 3" in text
    assert {"family.json", "plan-3-guidance-2.safetensors", "guidance-3", "index.html"} <= {p.name for p in out.iterdir()}
    assert (out / "guidance-2" / "index.html").exists()
    sampled = ("sample", tiny, "--plan", out, "--count", 2, "--label", "1", "--out", tmp_path / "s")
    assert run(capsys, *sampled, "--nfe", 3, "--guidance", 3)[0] == 0
    status, _, error = run(capsys, *sampled, "--nfe", 3, "--guidance", 5)
    assert (status, error.count("tuned were [3] calls at [2.0, 3.0]"), "should not happen" in error) == (2, 1, False)
    status, _, error = run(capsys, "tune", tiny, "--guidance", "3,x", "--out", tmp_path / "y")
    assert (status, len(error.splitlines())) == (2, 1)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([], ""),
        (["spending.json"], "stopped before the exact paths were finished: the same command begins with them again"),
        (["spending.json", "fit.safetensors"], "what is finished is kept in"),
    ],
)
def test_a_stopped_tuning_says_what_is_kept(files, told, tmp_path, capsys):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(KeyboardInterrupt), _told_how_to_go_on(tmp_path):
        raise KeyboardInterrupt
    error = capsys.readouterr().err
    assert told in error
    assert bool(error) == bool(told)


def test_files_of_an_earlier_tuning_go(tiny, tmp_path, capsys):
    """From several scales to one and back, and from one number of calls to another; what is not ours stays."""
    out = tmp_path / "tuned"
    asked = ("tune", tiny, "--label", "1", "--trajectories", 8, "--method", "closed-form", "--out", out, "--quiet")
    assert run(capsys, *asked, "--nfe", 3, "--guidance", "2,3")[0] == 0
    for name in ("mine.png", "guidance-2/notes.txt"):
        (out / name).write_text("mine")
    assert run(capsys, *asked, "--nfe", 2, "--guidance", "3,4")[0] == 0
    assert {file.name for file in out.glob("plan-*")} == {"plan-2-guidance-3.safetensors", "plan-2-guidance-4.safetensors"}
    assert {file.name for file in (out / "guidance-3").glob("plan-*")} == {"plan-2.safetensors"}
    assert [file.name for file in (out / "guidance-2").iterdir()] == ["notes.txt"]
    assert run(capsys, *asked, "--nfe", 2)[0] == 0
    found = {file.name for file in out.iterdir()}
    assert {"plan-2.safetensors", "mine.png", "guidance-2"} <= found
    assert not {"family.json", "guidance-3", "plan-2-guidance-3.safetensors"} & found


def test_tune_refuses_what_it_cannot_do(tiny, tmp_path, capsys):
    for wrong, words in (
        (("--minutes", 1, "--trajectories", 9), "give one of"),
        (("--minutes", 0.00001), "do not suffice"),
        (("--method", "lerned"), "learned"),
    ):
        status, _, error = run(capsys, "tune", tiny, "--nfe", 2, *wrong, "--out", tmp_path / "x", "--quiet")
        assert (status, len(error.splitlines())) == (2, 1)
        assert words in error
        assert not (tmp_path / "x").exists()


def test_distill_writes_a_student_that_sample_takes(tiny, tmp_path, capsys):
    pytest.importorskip("peft")
    out, data = tmp_path / "student", tmp_path / "data.npz"
    generator = np.random.default_rng(0)
    np.savez(data, x=generator.uniform(-1, 1, (32, 1, 8, 8)).astype(np.float32), label=np.arange(32) % 10)
    common = ["--iterations", 6, "--batch", 4, "--quiet", "--out", out]
    status, text, error = run(
        capsys, "distill", tiny, "--steps", "1,2", "--data", data, "--count", 16, "--untuned", "--json", *common
    )
    assert (status, error) == (0, "")
    card = json.loads(text)
    assert card["report"]["calls"].keys() == {"1", "2"}
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith("samples-")) == [
        *("README.md", "index.html", "plan-1.safetensors", "plan-2.safetensors"),
        *("probe.safetensors", "results.json", "student.json", "student.safetensors"),
    ]
    assert not Path(f"{out}.unfinished").exists()
    made = tmp_path / "samples"
    status, _, error = run(
        capsys, "sample", out, "--plan", out, "--nfe", 2, "--count", 3, "--label", "each", "--out", made, "--quiet"
    )
    assert (status, error) == (0, "")
    from fewstep.distill import Student

    mine = Student.load(out).sample(range(3), nfe=2, cond={"label": torch.arange(3)})
    np.testing.assert_allclose(np.load(made / "samples.npz")["samples"], mine.numpy(), atol=1e-6)
    options = [
        "--method",
        "lcm-lora",
        "--drawn",
        8,
        "--count",
        0,
        "--options",
        "loss=l2,solver_steps=10",
        "--steps",
        2,
    ]
    status, _, error = run(capsys, "distill", tiny, *options, *common)
    assert (status, error) == (0, "")
    assert "pytorch_lora_weights.safetensors" in {p.name for p in out.iterdir()}
    assert "student.safetensors" not in {p.name for p in out.iterdir()}
    card = json.loads((out / "student.json").read_text())
    assert card["method"]["name"] == "lcm-lora"
    assert "solver_steps=10" in card["method"]["options"]


def test_sample_tells_a_student_its_number_of_calls(tiny, tmp_path, capsys):
    """One student of several numbers, each sampled as in Python."""
    from fewstep.distill import Student

    out, common = tmp_path / "student", ["--iterations", 1, "--batch", 2, "--count", 0, "--quiet"]
    status, _, error = run(capsys, "distill", tiny, "--method", "tdm", "--steps", "1,2", "--out", out, *common)
    assert (status, error) == (0, "")
    student = Student.load(out)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in student.network.parameters():  # some begin at zero, and say nothing
            parameter += 0.1 * torch.randn(parameter.shape)
    student.save(out)
    for nfe in (1, 2):
        plan = ("--plan", out) if nfe == 1 else ()  # its own, if nothing else is said
        asked = (*plan, "--nfe", nfe, "--count", 3, "--label", "each", "--out", tmp_path / "samples", "--quiet")
        status, _, error = run(capsys, "sample", out, *asked)
        assert (status, error) == (0, "")
        mine = student.sample(range(3), nfe=nfe, cond={"label": torch.arange(3)})
        np.testing.assert_allclose(np.load(tmp_path / "samples" / "samples.npz")["samples"], mine.numpy(), atol=1e-6)
    other = fs.sample(student.denoiser_of(1), fs.draw_noise((1, 8, 8), range(3)), student.plan(2), cond={"label": torch.arange(3)})
    assert (other - mine).abs().max() > 1e-4
    for arguments, message in (
        (("sample", out, "--nfe", 2, "--label", 1, "--guidance", 3, "--out", tmp_path / "no"), "has its guidance within"),
        (("sample", out, "--nfe", 3, "--label", 1, "--out", tmp_path / "no"), "3"),
        (("distill", out, "--steps", 1, "--out", tmp_path / "no"), "is a student"),
        (("control", out, "--target", "class", "--label", 1, "--out", tmp_path / "no"), "give --wanted"),
    ):
        status, _, error = run(capsys, *arguments)
        assert (status, len(error.splitlines())) == (2, 1)
        assert message in error


def test_an_adversary_and_pairs_are_within_reach(tiny, tmp_path, capsys):
    common = ["--iterations", 1, "--batch", 2, "--count", 0, "--drawn", 8, "--steps", 1, "--quiet"]
    for number, asked in enumerate((["--method", "dmd2", "--adversary"], ["--method", "hipa", "--options", "pair_calls=2"])):
        out = tmp_path / str(number)
        status, _, error = run(capsys, "distill", tiny, *asked, *common, "--out", out)
        assert (status, error) == (0, "")
        card = json.loads((out / "student.json").read_text())
        assert ("Adversary(" if number == 0 else "pairs=8, pair_calls=2") in card["method"]["options"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lcn"], "unknown method of distillation 'lcn'"),
        (["--options", "loss"], "--options takes name=value"),
        (["--options", "losss=l2"], "has no option 'losss'"),
        (["--iterations", 0], "must be at least 1"),
        (["--steps", 51, "--iterations", 1, "--count", 0, "--drawn", 2], "1 to 50 calls"),
        (["--data", "a.npz", "--drawn", 2], "give one of --data and --drawn"),
        (["--dtype", "float64"], "trained in float32"),
        (["--method", "tdm", "--data", "a.npz"], "leave --data out"),
        (["--method", "freeflow", "--steps", 1, "--drawn", 2], "leave --drawn out"),
        (["--adversary"], "--adversary is one of dmd2"),
        (["--method", "dmd2", "--steps", 1, "--options", "adversary=True"], "on the command line, --adversary"),
        (["--options", "solver_steps=a"], "a whole number of solver_steps"),
        (["--options", "guidance=3"], "guidance is a range"),
    ],
)
def test_distill_refuses_what_makes_no_sense(tiny, tmp_path, capsys, arguments, message):
    status, _, error = run(capsys, "distill", tiny, "--out", tmp_path / "out", "--quiet", *arguments)
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.filterwarnings("always:.*no value below 0")
def test_a_warning_is_one_line_without_code(tmp_path, capsys):
    np.savez(tmp_path / "u.npz", x=np.random.default_rng(0).random((8, 1, 8, 8)))
    arguments = ["--size", 8, "--steps", 2, "--batch-size", 2, "--no-samples", "--quiet"]
    status, _, err = run(capsys, "train", tmp_path / "u.npz", *arguments, "--out", tmp_path / "model")
    assert status == 0
    assert err == f"fewstep: {tmp_path}/u.npz holds x with no value below 0: is this [0, 1]? Pictures in [-1, 1] are 2 x - 1.\n"
