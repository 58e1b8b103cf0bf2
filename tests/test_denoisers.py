from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.errors import NetworkError, UnknownNameError
from fewstep.predictions import PREDICTIONS, data_coefficients, target_coefficients

VP = fs.schedules.VPLinear()


def as_network(exact, predicts):
    """An exact denoiser as a network of another kind of prediction."""

    def network(x, t, **cond):
        time = float(t.flatten()[0])
        alpha, sigma = float(exact.schedule.alpha(time)), float(exact.schedule.sigma(time))
        data = exact(x, time, **cond)
        a, b = target_coefficients(predicts, alpha, sigma)
        return a * data + b * (x - alpha * data) / sigma

    return network


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_one_time_a_sample_gives_the_same_bits_as_one_time_for_all(predicts):
    den = fs.Denoiser(lambda x, t: torch.tanh(x) * t.to(x).reshape(-1, 1, 1), VP, predicts)
    x = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0))
    for t in (0.05, 0.4, 0.9):
        assert torch.equal(den(x, torch.full((7,), t, dtype=torch.float64)), den(x, t))


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("schedule", [VP, fs.schedules.EDM(), fs.schedules.Flow(shift=2.0)], ids=["vp", "edm", "flow"])
def test_every_prediction_gives_the_same_data(predicts, schedule):
    exact = fs.exact.Gaussian(schedule, torch.tensor([0.5, -1.0]), torch.tensor([0.3, 2.0]))
    den = fs.Denoiser(as_network(exact, predicts), schedule, predicts=predicts)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (0.05, 0.4, 0.9):
        torch.testing.assert_close(den(x, t), exact(x, t), rtol=1e-11, atol=1e-11)
    each = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    network = fs.Denoiser(
        lambda x, t: torch.stack([as_network(exact, predicts)(x[i : i + 1], t[i : i + 1])[0] for i in range(6)]), schedule, predicts
    )
    one_by_one = torch.cat([exact(x[i : i + 1], float(t)) for i, t in enumerate(each)])
    torch.testing.assert_close(network(x, each), one_by_one, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(network(x, each.numpy()), one_by_one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_coefficients_are_inverse_maps(predicts):
    alpha, sigma, x0, eps = 0.3, 1.7, 0.8, -0.4
    a_target, b_target = target_coefficients(predicts, alpha, sigma)
    a, b = data_coefficients(predicts, alpha, sigma)
    assert a * (alpha * x0 + sigma * eps) + b * (a_target * x0 + b_target * eps) == pytest.approx(x0, rel=1e-13)


def test_alpha_zero_is_legal_except_for_noise():
    flow = fs.schedules.Flow()
    x = torch.ones(2, 3)
    assert torch.equal(fs.Denoiser(lambda x, t: x, flow, "flow")(x, 1.0), x - x)
    for predicts in ("noise", "score"):
        with pytest.raises(ValueError, match="alpha is 0"):
            fs.Denoiser(lambda x, t: x, flow, predicts)(x, 1.0)


def seen_by(den_options, schedule=VP, x=None, t=0.5):
    seen = {}

    def network(x, time):
        seen.update(x=x, time=time)
        return x

    fs.Denoiser(network, schedule, "data", **den_options)(torch.ones(4, 2) if x is None else x, t)
    return seen


def test_time_conventions():
    assert seen_by({})["time"].tolist() == [0.5] * 4
    assert seen_by({"scalar_time": True})["time"].shape == ()
    assert seen_by({"network_time": lambda t: 999 * t})["time"].tolist() == [499.5] * 4
    rounded = seen_by({"network_time": lambda t: 999 * t, "integer_time": True})["time"]
    assert rounded.dtype is torch.int64
    assert rounded.tolist() == [500] * 4
    table = fs.schedules.FromBetas(np.linspace(1e-4, 0.02, 1000).tolist())
    assert seen_by({"integer_time": True}, table, t=0.5)["time"].tolist() == [499] * 4
    assert seen_by({}, table, t=torch.tensor([0.001, 1.0, 0.5, 0.25]))["time"].tolist() == [0.0, 999.0, 499.0, 249.0]
    flow = fs.schedules.Flow(shift=3.0)
    assert seen_by({"network_time": flow.sigma}, flow)["time"].tolist() == [0.75] * 4


def test_half_precision_network_under_a_float32_state():
    network = torch.nn.Linear(3, 3).to(torch.bfloat16)
    times = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x, t):
            assert x.dtype is torch.bfloat16
            times.append(t.dtype)
            return self.inner(x)

    den = fs.Denoiser(Net(), VP, "noise")
    x = fs.draw_noise((3,), range(4))
    samples = fs.sample(den, x, fs.make_plan("dpmpp_2m", VP, 5))
    assert samples.dtype is torch.float32
    assert set(times) == {torch.float32}
    assert fs.sample(den, x.half(), fs.make_plan("dpmpp_2m", VP, 5)).dtype is torch.float32
    assert den(x.double(), 0.5).dtype is torch.float64


def test_calls_are_counted():
    den = fs.Denoiser(lambda x, t: x, VP, "data")
    for nfe in (1, 5, 12):
        before = den.calls
        fs.sample(den, torch.ones(2, 2), fs.make_plan("dpmpp_3m", VP, nfe))
        assert den.calls - before == nfe


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fs.Denoiser(3, VP), TypeError, "callable"),
        (lambda: fs.Denoiser(lambda x, t: x, "vp"), TypeError, "schedule"),
        (lambda: fs.Denoiser(lambda x, t: x, VP, "epsilon"), UnknownNameError, "noise"),
        (lambda: fs.Denoiser(lambda x, t: x[:, :1], VP)(torch.ones(2, 3), 0.5), NetworkError, r"shape \(2, 1\) at t=0.5"),
        (lambda: fs.Denoiser(lambda x, t: (x,), VP)(torch.ones(2, 3), 0.5), NetworkError, "returned tuple"),
        (lambda: fs.Denoiser(lambda x, t: x, VP)(torch.ones(2, 3), torch.ones(3)), ValueError, r"one per sample \(2,\)"),
    ],
)
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- thresholding ------------------------------------------------------------------------------------------------------------------


def fixed(values):
    return fs.Denoiser(lambda x, t: values.to(x.dtype), VP, "data")


def test_clipping_and_dynamic_thresholding():
    d = 3.0 * torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clipped = fs.denoisers.Clipped(fixed(d), -1.0, 0.5)(d, 0.5)
    assert torch.equal(clipped, d.clamp(-1.0, 0.5))
    assert torch.equal(fs.denoisers.Clipped(fixed(clipped), -1.0, 0.5)(d, 0.5), clipped)  # idempotent
    for q in (0.0, 0.5, 0.995, 1.0):
        out = fs.denoisers.DynamicThreshold(fixed(d), q)(d, 0.5)
        s = np.quantile(d.abs().flatten(1).numpy(), q, axis=1).clip(1.0)[:, None, None, None]
        np.testing.assert_allclose(out.numpy(), np.clip(d.numpy(), -s, s) / s, rtol=1e-12)
        assert float(out.abs().max()) <= 1.0
        again = fs.denoisers.DynamicThreshold(fixed(out), q)(d, 0.5)
        assert torch.equal(again, out)
    inside = d / d.abs().max()
    assert torch.equal(fs.denoisers.DynamicThreshold(fixed(inside))(d, 0.5), inside)  # nothing leaves the range, nothing changes
    half = fs.denoisers.DynamicThreshold(fixed(d), 0.9, limit=0.5)(d, 0.5)
    torch.testing.assert_close(half, 0.5 * fs.denoisers.DynamicThreshold(fixed(2.0 * d), 0.9)(d, 0.5))
    capped = fs.denoisers.DynamicThreshold(fixed(d), 0.9, ceiling=1.0)(d, 0.5)
    assert torch.equal(capped, d.clamp(-1.0, 1.0))


def test_dynamic_thresholding_is_per_sample_and_takes_every_size_and_precision(monkeypatch):
    d = 3.0 * torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    whole = fs.denoisers.DynamicThreshold(fixed(d))(d, 0.5)
    assert torch.equal(fs.denoisers.DynamicThreshold(fixed(d[2:3]))(d[2:3], 0.5), whole[2:3])
    for dtype in (torch.bfloat16, torch.float16):
        half = fs.denoisers.DynamicThreshold(fixed(d))(d.to(dtype), 0.5)
        assert half.dtype is dtype
        # the precision of bfloat16, once for the input and once for the result
        torch.testing.assert_close(half.float(), whole, rtol=0.02, atol=0.02)
    for q in (0.0, 0.3, 0.995, 1.0):
        expected = fs.denoisers.DynamicThreshold(fixed(d), q)(d, 0.5)
        with monkeypatch.context() as patch:  # the way for more elements than torch.quantile takes
            patch.setattr(fs.denoisers, "LARGEST_QUANTILE", 10)
            torch.testing.assert_close(fs.denoisers.DynamicThreshold(fixed(d), q)(d, 0.5), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # their own
def test_dynamic_thresholding_as_diffusers():
    diffusers = pytest.importorskip("diffusers", minversion="0.32")
    d = 2.0 * torch.randn(5, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ceiling in (1.0, 2.5):
        theirs = diffusers.DPMSolverMultistepScheduler(sample_max_value=ceiling)._threshold_sample(d)
        ours = fs.denoisers.DynamicThreshold(fixed(d), ceiling=ceiling)(d, 0.5)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_limited_denoiser_is_a_denoiser():
    """It has the schedule and the counter of the one inside, runs plans, guidance and the reference, and can be copied."""
    import copy

    inner = fs.Denoiser(lambda x, t: 3.0 * torch.tanh(x), VP, "data", info=fs.ModelInfo(name="inner"))
    limited = fs.denoisers.Clipped(inner)
    run = fs.sample(
        limited, torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), fs.make_plan("dpmpp_2m", VP, 6, final="zero")
    )
    assert limited.calls == inner.calls == 6
    assert float(run.abs().max()) <= 1.0 + 1e-6
    assert limited.schedule is VP
    assert limited.info.name == "inner"
    assert copy.deepcopy(limited).high == 1.0
    assert not hasattr(limited, "jumps")
    with pytest.raises(fs.FewstepError):
        fs.sample(limited, torch.ones(1, 2), fs.make_plan("ddim", fs.schedules.EDM(), 2))
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    fs.denoisers.DynamicThreshold(inner)(x, 0.5).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fs.denoisers.Clipped(3), TypeError, "callable"),
        (lambda: fs.denoisers.Clipped(fixed(torch.ones(1, 1)), 1.0, -1.0), ValueError, "low must be less than high"),
        (lambda: fs.denoisers.DynamicThreshold(fixed(torch.ones(1, 1)), 1.5), ValueError, r"\[0, 1\]"),
        (lambda: fs.denoisers.DynamicThreshold(fixed(torch.ones(1, 1)), ceiling=0.5), ValueError, "ceiling at least that"),
    ],
)
def test_refused_limits(make, error, message):
    with pytest.raises(error, match=message):
        make()
