from __future__ import annotations

import json

import pytest
import torch

import fewstep as fs
from fewstep.cli import main
from fewstep.distill.student import Student
from fewstep.scale import read_shards

DRAW = ["sample", "digits", "--nfe", "1", "--solver", "ddim", "--count", "10", "--batch", "4", "--label", "each", "--shards"]


@pytest.fixture
def refused(capsys):
    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    return run


def test_samples_as_shards_are_told_and_go_on(tmp_path, capsys):
    out = str(tmp_path / "s")
    assert main([*DRAW, "--shard-size", "4", "--out", out]) == 0
    assert "10 samples of digits, 1 network calls each, in 3 shards" in capsys.readouterr().out
    samples, about = read_shards(out)
    assert samples.shape == (10, 1, 8, 8)
    assert about[7] == {"index": 7, "seed": 7, "label": 7}
    (tmp_path / "s" / "samples-000001.tar").unlink()
    assert main([*DRAW, "--shard-size", "4", "--out", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["drawn"], told["damaged"], len(told["shards"])) == (4, ["samples-000001.tar"], 3)


def test_shards_hold_what_sample_writes_with_the_same_batch(tmp_path):
    import numpy as np

    assert main([*DRAW, "--quiet", "--out", str(tmp_path / "s")]) == 0
    assert main([*DRAW[:-1], "--quiet", "--out", str(tmp_path / "n")]) == 0
    assert np.array_equal(read_shards(tmp_path / "s")[0], np.load(tmp_path / "n" / "samples.npz")["samples"])


class Told(torch.nn.Module):
    """A network that is told its number of calls."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, time, told=0.0):
        return self.weight * torch.tanh(x) + told


def test_shards_of_a_student_that_is_told_its_number_of_calls_are_those_of_that_number(tmp_path, monkeypatch):
    schedule = fs.schedules.Flow()
    teacher = fs.Denoiser(Told(), schedule, "flow", info=fs.ModelInfo(name="toy", shape=(1, 4, 4), data_range=(-1.0, 1.0)))
    plans = {nfe: fs.make_plan("ddim", schedule, nfe, final="zero", grid="time") for nfe in (1, 4)}
    student = Student(Told(), teacher, plans, {"told_number": {"1": 1.0, "4": 0.25}}, {"x": torch.zeros(1, 1, 4, 4)})
    monkeypatch.setattr("fewstep.cli.setup.open_model", lambda name, options, nfe=None: student.denoiser_of(nfe))
    for nfe in (1, 4):
        out = str(tmp_path / str(nfe))
        draw = ["sample", "student", "--nfe", str(nfe), "--solver", "ddim", "--grid", "time", "--count", "3", "--quiet", "--shards"]
        assert main([*draw, "--out", out]) == 0
        assert torch.equal(torch.from_numpy(read_shards(out)[0]), student.sample(range(3), nfe=nfe))


def test_evaluate_reads_shards(tmp_path, capsys):
    out = str(tmp_path / "s")
    assert main([*DRAW, "--quiet", "--out", out]) == 0
    capsys.readouterr()
    options = ["--features", "pixels", "--distances", "sliced_wasserstein", "--count", "20", "--resamples", "20", "--json"]
    assert main(["evaluate", out, "digits", *options]) == 0
    assert json.loads(capsys.readouterr().out)["distances"][0]["sizes"] == [10, 20]


def test_evaluate_refuses_a_set_that_is_not_complete(tmp_path, refused):
    out = tmp_path / "s"
    assert main([*DRAW, "--quiet", "--shard-size", "4", "--out", str(out)]) == 0
    document = json.loads((out / "shards.json").read_text())
    (out / "shards.json").write_text(json.dumps({**document, "complete": False, "shards": document["shards"][:2]}))
    assert "is not complete: it has 8 of 10 samples, the first 8 without a gap" in refused("evaluate", str(out), "digits")


def test_what_would_do_nothing_or_something_else_is_refused(tmp_path, refused):
    assert "--workers does nothing without --shards" in refused("sample", "--workers", "2")
    assert "--workers does nothing without --engine ray" in refused(*DRAW, "--workers", "2")
    assert "multiple of --batch (4)" in refused(*DRAW, "--shard-size", "6")
    assert "--address does nothing without --engine ray" in refused("compare", "--address", "auto")
    assert "--workers does nothing without --engine ray" in refused("tune", "--workers", "3")
    out = str(tmp_path / "s")
    assert main([*DRAW, "--quiet", "--out", out]) == 0
    assert "holds samples with samples 10, and this run has 11" in refused(*DRAW[:7], "11", *DRAW[8:], "--out", out)


def test_compare_stops_early(tmp_path, capsys):
    options = ["--nfe", "2", "--count", "16", "--others", "16", "--tol", "0.1", "--resamples", "20"]
    solvers = "ddim,dpmpp_2m,unipc_2,deis,ddpm,ipndm,dpm_2m,dpmpp_2s"
    out = ["--out", str(tmp_path / "c")]
    assert main(["compare", "--solvers", solvers, *options, "--stop-early", "successive-halving", *out]) == 0
    told = f"  skipped: 3 stopped early on 8 samples; which, and why: {tmp_path / 'c'}/results.json\n"
    assert told in capsys.readouterr().out
    results = json.loads((tmp_path / "c" / "results.json").read_text())
    found = results["models"]["digits"]
    stopped = [name for name, why in found["skipped"].items() if why.startswith("stopped early on 8 samples: its error was ")]
    assert len(stopped) == 3
    assert {place["solver"] for place in found["ranking_by_distance"]} == set(solvers.split(",")) - set(stopped)
