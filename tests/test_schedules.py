from __future__ import annotations

import math

import numpy as np
import pytest
from cases import BETAS, FINITE, SCHEDULES
from hypothesis import given
from hypothesis import strategies as st

from fewstep import schedules
from fewstep.errors import UnknownNameError

ALL = {**SCHEDULES, **{f"finite_{k}": v for k, v in FINITE.items()}}


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_lambda_and_its_inverse(schedule):
    low, high = sorted((schedule.t_end, schedule.t_start))
    t = np.linspace(low, high, 2001)
    lam = schedule.lam(t)
    assert (np.diff(lam) < 0).all()
    np.testing.assert_allclose(schedule.t_of_lam(lam), t, rtol=1e-10, atol=1e-12)
    finite = np.isfinite(lam)
    ratio = schedule.alpha(t[finite]) / schedule.sigma(t[finite])
    np.testing.assert_allclose(np.log(ratio), lam[finite], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "vp_cosine_full", "betas", "stable_diffusion", "zero_snr"])
def test_variance_is_preserved(name):
    schedule = SCHEDULES[name]
    t = np.linspace(schedule.t_end, schedule.t_start, 500)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, atol=1e-12)


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_sigma_vanishes_at_t_zero(schedule):
    assert float(schedule.sigma(schedule.t_zero)) == pytest.approx(0.0, abs=1e-9)
    assert schedule.t_zero <= schedule.t_end


def test_ends_are_exact():
    cosine, flow, zero_snr = SCHEDULES["vp_cosine_full"], SCHEDULES["flow_full"], SCHEDULES["zero_snr"]
    for schedule in (cosine, flow, zero_snr):
        assert float(schedule.alpha(1.0)) == 0.0
        assert float(schedule.sigma(1.0)) == 1.0
        assert float(schedule.lam(1.0)) == -math.inf
        assert float(schedule.t_of_lam(-math.inf)) == 1.0
    assert float(cosine.sigma(0.0)) == float(flow.sigma(0.0)) == 0.0
    assert float(cosine.lam(0.0)) == float(flow.lam(0.0)) == math.inf


def test_golden_values():
    # 50-digit arithmetic of the definitions
    assert float(schedules.VPLinear().log_alpha(0.5)) == pytest.approx(-1.26875, rel=1e-15)
    assert float(schedules.VPLinear().lam(1.0)) == pytest.approx(-5.02497840665920, rel=1e-13)
    assert float(schedules.VPCosine().alpha(0.5)) == pytest.approx(
        math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    )
    assert float(schedules.Flow(shift=3.0).sigma(0.5)) == 0.75


def test_tables_interpolate_log_alpha_through_their_entries():
    schedule = SCHEDULES["betas"]
    acp = np.cumprod(1 - BETAS)
    n = np.arange(1000)
    np.testing.assert_allclose(schedule.alpha((n + 1) / 1000) ** 2, acp, rtol=1e-13)
    np.testing.assert_array_equal(schedule.network_time((n + 1) / 1000), n)
    middle = 0.5 * (np.log(acp[10]) + np.log(acp[11]))
    assert float(2 * schedule.log_alpha(11.5 / 1000)) == pytest.approx(middle, rel=1e-12)
    assert schedules.FromAlphasCumprod(acp.tolist()).lam(0.5) == pytest.approx(schedule.lam(0.5), rel=1e-14)


@given(st.floats(-7, 7))
def test_inverse_from_lambda(lam):
    for schedule in (schedules.VPLinear(), schedules.VPCosine(), schedules.EDM(), schedules.Flow(shift=2.0)):
        assert float(schedule.lam(schedule.t_of_lam(lam))) == pytest.approx(lam, abs=1e-8)


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_config_round_trip(schedule):
    assert schedules.from_config(schedule.config()) == schedule


def test_same_noise_ignores_the_ends_only():
    assert schedules.VPLinear().same_noise(schedules.VPLinear(t_end=1e-4))
    assert not schedules.VPLinear().same_noise(schedules.VPLinear(beta_max=19.0))
    assert not schedules.VPLinear().same_noise(schedules.Flow())
    assert schedules.EDM().same_noise(schedules.EDM(sigma_max=40.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.VPLinear(beta_min=-1.0), "0 < beta_min"),
        (lambda: schedules.VPLinear(t_start=0.1, t_end=0.5), "noisier"),
        (lambda: schedules.EDM(sigma_min=80.0, sigma_max=0.002), "noisier"),
        (lambda: schedules.Flow(shift=0.0), "positive shift"),
        (lambda: schedules.Flow(t_start=math.nan), "from 0 to 1, got t_start=nan"),
        (lambda: schedules.VPLinear(t_start=-1.0), "from 0 to 1, got t_start=-1"),
        (lambda: schedules.VPCosine(t_end=-0.1), "got t_end=-0.1"),
        (lambda: schedules.EDM(sigma_max=math.inf), "got t_start=inf"),
        (lambda: schedules.FromBetas([0.1, -0.1]), "numbers in"),
        (lambda: schedules.FromAlphasCumprod([0.5, 0.9]), "strictly decrease"),
        (lambda: schedules.FromAlphasCumprod([0.5]), "at least 2"),
        (lambda: schedules.from_config({"kind": "VPLinear", "gamma": 1}), "not gamma"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_kind_names_the_nearest():
    with pytest.raises(UnknownNameError, match="VPLinear"):
        schedules.from_config({"kind": "vplinear"})


def test_no_time_has_alpha_zero_under_vp_linear():
    assert schedules.VPLinear().t_of_lam(-math.inf) == math.inf


def test_tensors_of_any_precision_are_times():
    import torch

    schedule = schedules.VPLinear()
    assert schedule.alpha(torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True)) == schedule.alpha([0.5])


def test_a_table_of_betas_and_of_their_products_are_the_same_noise():
    betas = np.linspace(1e-4, 0.02, 50)
    first, second = schedules.FromBetas(betas.tolist()), schedules.FromAlphasCumprod(np.cumprod(1 - betas).tolist())
    assert first.same_noise(second)
    assert second.same_noise(first)
    assert not first.same_noise(schedules.FromBetas(betas[:-1].tolist()))
    assert not first.same_noise(schedules.VPLinear())
    assert not schedules.VPLinear().same_noise(first)


@pytest.mark.parametrize(("kind", "name"), [(schedules.FromBetas, "betas"), (schedules.FromAlphasCumprod, "alphas_cumprod")])
def test_a_long_table_is_not_printed_whole(kind, name):
    table = np.linspace(1e-4, 0.02, 1000)
    schedule = kind(table if name == "betas" else np.cumprod(1.0 - table))
    assert len(repr(schedule)) < 120
    assert f"{name}=<1000 from " in repr(schedule)
    short = (0.9, 0.5)
    assert repr(kind(short)) == f"{kind.__name__}({name}={short}, t_start=1.0, t_end=0.5)"
