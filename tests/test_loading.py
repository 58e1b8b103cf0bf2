from __future__ import annotations

import shutil

import pytest
import torch

import fewstep as fs
from fewstep.errors import ArtefactError, UnknownNameError
from fewstep.loading import SHIPPED, shipped_models
from fewstep.predictions import target_coefficients
from fewstep.train.recipes import digits, photos

VP = fs.schedules.VPLinear()


def shipped_data(name, count=24):
    if name == "digits":
        return {key: value[:count] for key, value in digits("held_out").items()}
    return photos("held_out")(count, torch.Generator().manual_seed(0))


def test_both_models_are_there_and_small():
    assert shipped_models() == ["digits", "photos"]
    for name in shipped_models():
        assert sum(file.stat().st_size for file in (SHIPPED / name).iterdir()) <= 4_000_000
        den = fs.load(name)
        assert den.info.name == name
        assert den.info.data_range == (-1.0, 1.0)
        assert len(den.info.fingerprint) == 64
        assert not any(parameter.requires_grad for parameter in den.network.parameters())


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_shipped_models_load_from_any_folder_and_pass_their_check(name, tmp_path):
    shutil.copytree(SHIPPED / name, tmp_path / "mine")
    den, batch = fs.load(tmp_path / "mine"), shipped_data(name)
    report = fs.check(den, batch.pop("x"), cond=batch)
    assert report.ok, report
    assert report.score < -0.5
    assert den.calls == 0


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_samples_do_not_depend_on_the_batch(name):
    den = fs.load(name)
    seeds, plan = range(21), fs.make_plan("dpmpp_2m_sde", den.schedule, 4, grid="lambda")
    x = fs.draw_noise(den.info.shape, seeds, plan)
    label = torch.arange(21) % 10
    conds = [{"label": label[i : i + 7]} if name == "digits" else {} for i in (0, 7, 14)]
    pieces = [fs.sample(den, x[i : i + 7], plan, seeds=seeds[i : i + 7], cond=c) for i, c in zip((0, 7, 14), conds, strict=True)]
    whole = fs.sample(den, x, plan, seeds=seeds, cond={"label": label} if name == "digits" else {})
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-5)


def as_kind(den, predicts):
    """The digits network as one of another kind of prediction."""

    def network(x, time, **cond):
        t = float(time[0])
        alpha, sigma = float(den.schedule.alpha(t)), float(den.schedule.sigma(t))
        data = den(x, t, **cond)
        a, b = target_coefficients(predicts, alpha, sigma)
        return a * data + b * (x - alpha * data) / sigma

    return network


@pytest.mark.parametrize("truth", ["noise", "data", "velocity", "flow"])
def test_check_finds_a_wrong_prediction(truth):
    den, batch = fs.load("digits"), shipped_data("digits")
    x = batch.pop("x")
    network = as_kind(den, truth)
    assert fs.check(fs.Denoiser(network, VP, truth), x, cond=batch).ok
    for claimed in {"noise", "data", "velocity", "flow"} - {truth}:
        report = fs.check(fs.Denoiser(network, VP, claimed), x, cond=batch)
        assert not report.ok
        assert report.best["predicts"] == truth
        assert f"predicts '{truth}', not '{claimed}'" in report.message


def test_check_finds_a_wrong_time_range_or_sign():
    den, batch = fs.load("digits"), shipped_data("digits")
    x = batch.pop("x")

    def thousand(x, time, **cond):
        return den.network(x, time / 1000, **cond)

    report = fs.check(fs.Denoiser(thousand, VP, den.predicts), x, cond=batch)
    assert report.best["time"] == "1000 t"
    assert "its time is 1000 t" in str(report)
    report = fs.check(den, 0.5 * (x + 1), cond=batch)
    assert not report.ok
    assert report.best["data"] == "2 x - 1"
    report = fs.check(fs.Denoiser(lambda x, t, **c: -den.network(x, t, **c), VP, den.predicts), x, cond=batch)
    assert report.best["predicts"] == "minus velocity"


def test_check_says_when_nothing_fits():
    report = fs.check(fs.Denoiser(lambda x, t: 7.0 * torch.cos(40.0 * x), VP, "data"), shipped_data("digits")["x"])
    assert not report.ok
    assert "no reading" in report.message or "most likely" in report.message
    with pytest.raises(TypeError, match="raw network"):
        fs.check(lambda x, t: x, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="finite"):
        fs.check(fs.Denoiser(lambda x, t: x, VP), torch.full((2, 2), float("nan")))


def test_any_module_or_callable():
    module = torch.nn.Module()
    module.forward = lambda x, t: x
    den = fs.load(module, schedule=fs.schedules.EDM(), predicts="data", scalar_time=True)
    assert den.scalar_time
    assert den(torch.ones(1, 2), 3.0).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: fs.load(lambda x, t: x), TypeError, "schedule="),
        (lambda p: fs.load("digits", predicts="noise"), TypeError, "says its schedule"),
        (lambda p: fs.load("digit"), UnknownNameError, "Did you mean 'digits'"),
        (lambda p: fs.load(p / "none"), FileNotFoundError, "no model folder"),
        (lambda p: fs.load(p), ArtefactError, "no config.json"),
        (lambda p: fs.load(p / "file"), ArtefactError, "is a file"),
    ],
)
def test_refused(call, error, message, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(error, match=message):
        call(tmp_path)
