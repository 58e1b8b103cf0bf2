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
    report = fs.check(den, batch.pop("x"), cond=batch, most=8)
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
    assert fs.check(fs.Denoiser(network, VP, truth), x, cond=batch, most=8).ok
    for claimed in {"noise", "data", "velocity", "flow"} - {truth}:
        report = fs.check(fs.Denoiser(network, VP, claimed), x, cond=batch, most=8)
        assert not report.ok
        assert report.best["predicts"] == truth
        assert f"predicts '{truth}', not '{claimed}'" in report.message


def test_check_finds_a_wrong_time_range_or_sign():
    den, batch = fs.load("digits"), shipped_data("digits")
    x = batch.pop("x")

    def thousand(x, time, **cond):
        return den.network(x, time / 1000, **cond)

    report = fs.check(fs.Denoiser(thousand, VP, den.predicts), x, cond=batch, most=8)
    assert report.best["time"] == "1000 t"
    assert "its time is 1000 t" in str(report)
    report = fs.check(den, 0.5 * (x + 1), cond=batch, most=8)
    assert not report.ok
    assert report.best["data"] == "2 x - 1"
    report = fs.check(fs.Denoiser(lambda x, t, **c: -den.network(x, t, **c), VP, den.predicts), x, cond=batch, most=8)
    assert report.best["predicts"] == "minus velocity"


def test_check_says_when_nothing_fits():
    report = fs.check(fs.Denoiser(lambda x, t: 7.0 * torch.cos(40.0 * x), VP, "data"), shipped_data("digits")["x"], most=8)
    assert not report.ok
    assert "no reading" in report.message or "most likely" in report.message
    with pytest.raises(TypeError, match="raw network"):
        fs.check(lambda x, t: x, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="finite"):
        fs.check(fs.Denoiser(lambda x, t: x, VP), torch.full((2, 2), float("nan")))


def exact_noise(exact):
    """The exact noise prediction, as a network of the schedule's own time."""

    def network(x, t):
        at = float(t[0])
        alpha, sigma = float(exact.schedule.alpha(at)), float(exact.schedule.sigma(at))
        return (x - alpha * exact(x, at)) / sigma

    return network


def test_check_looks_at_every_level():
    """Under EDM a noise predictor read as velocity loses at the middle levels alone."""
    means = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * 0.6
    exact = fs.exact.GaussianMixture(fs.schedules.EDM(), means, 0.05)
    report = fs.check(fs.Denoiser(exact_noise(exact), exact.schedule, "velocity"), exact.draw(32, seed=0))
    assert not report.ok
    assert report.best["predicts"] == "noise"


def test_check_names_nothing_where_nothing_works():
    data = fs.exact.Gaussian(VP, torch.zeros(8), 0.2).draw(32, seed=0)
    for predicts in ("noise", "velocity", "flow"):
        report = fs.check(fs.Denoiser(lambda x, t: 0.0 * x, VP, predicts), data)
        assert not report.ok
        assert "untrained" in report.message


def test_check_finds_the_time_of_another_schedule():
    exact = fs.exact.GaussianMixture(VP, torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * 0.6, 0.05)
    report = fs.check(fs.Denoiser(exact_noise(exact), fs.schedules.VPCosine(), "noise"), exact.draw(32, seed=0))
    assert not report.ok
    assert report.best["schedule"] == "VPLinear()"
    assert "its schedule is VPLinear()" in report.message


def test_check_survives_networks_that_refuse_times():
    exact = fs.exact.GaussianMixture(VP, torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.05)

    def picky(x, t):
        assert float(t.max()) <= 1.0
        return exact_noise(exact)(x, t)

    assert fs.check(fs.Denoiser(picky, VP, "noise"), exact.draw(32, seed=0)).ok


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
        (lambda p: fs.check(fs.load("digits"), {"x": torch.zeros(2, 1, 8, 8)}), TypeError, r'got dict; pass data\["x"\]'),
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


@pytest.mark.parametrize("name", ["n.ckpt", "models/n.safetensors"])
def test_a_file_that_is_missing_is_called_so(name):
    with pytest.raises(FileNotFoundError, match=f"there is no file {name}"):
        fs.load(name)
