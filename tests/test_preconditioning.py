"""EDM's preconditioning: the raw network of an exact denoiser is that denoiser again."""

from __future__ import annotations

import math

import pytest
import torch

import fewstep as fs
from fewstep.preconditioning import EDMPreconditioned, edm_coefficients

SIGMA_DATA = 0.7
EXACT = fs.exact.GaussianMixture(fs.schedules.EDM(), [[1.0, 0.5], [-1.0, -0.3]], [0.16, 0.09])


def raw(x, c_noise):
    """The network F whose data prediction is exact."""
    sigma = torch.exp(4.0 * c_noise).reshape(-1, 1)
    skip, out, scale = edm_coefficients(sigma, SIGMA_DATA)
    state = x / scale
    return (EXACT(state, sigma.reshape(-1)) - skip * state) / out


def noised(sigma, count=16):
    return EXACT.draw(count, seed=0) + sigma * fs.draw_noise((2,), range(count), dtype=torch.float64)


def test_coefficients_have_unit_variances():
    """Table 1 of the paper: inputs and targets of variance 1, and the least amplification of the network's errors."""
    for sigma in (0.01, 0.7, 30.0):
        skip, out, scale = edm_coefficients(sigma, SIGMA_DATA)
        assert scale**2 * (sigma**2 + SIGMA_DATA**2) == pytest.approx(1.0)
        assert (1.0 - skip) ** 2 * SIGMA_DATA**2 + skip**2 * sigma**2 == pytest.approx(out**2)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_the_data_prediction(sigma):
    denoiser = fs.load(raw, preconditioning="edm", sigma_data=SIGMA_DATA)
    x = noised(sigma)
    assert float((denoiser(x, sigma) - EXACT(x, sigma)).abs().max()) < 1e-10
    assert denoiser.calls == 1


def test_one_time_a_sample():
    denoiser = fs.load(raw, preconditioning="edm", sigma_data=SIGMA_DATA)
    sigma = torch.logspace(-2, 2, 16, dtype=torch.float64)
    x = noised(sigma[:, None])
    assert float((denoiser(x, sigma) - EXACT(x, sigma)).abs().max()) < 1e-10


def test_sampling():
    denoiser = fs.load(raw, preconditioning="edm", sigma_data=SIGMA_DATA, schedule=fs.schedules.EDM(0.01, 10.0))
    plan = fs.make_plan("edm_heun", denoiser.schedule, nfe=11, grid="karras", final="zero")
    x = 10.0 * fs.draw_noise((2,), range(16), dtype=torch.float64)
    assert float((fs.sample(denoiser, x, plan) - fs.sample(EXACT, x, plan)).abs().max()) < 1e-9


class Half(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

    def forward(self, x, c_noise, label=None):
        assert x.dtype == torch.bfloat16
        assert c_noise.dtype == torch.float32
        return self.scale * x if label is None else label[:, None] * x


def test_only_the_network_runs_in_half_precision():
    """At a low noise level the prediction is the state, which bfloat16 would round by up to 0.4 %."""
    denoiser = fs.load(Half(), preconditioning="edm")
    x = noised(0.0).float()
    d = denoiser(x, 1e-4).detach()
    assert d.dtype == torch.float32
    assert float((d - x).abs().max()) < 1e-3 * float(x.abs().max())
    assert float((d - x / (1.0 + 4e-8)).abs().max()) < 1e-3


def test_conditions_reach_the_network():
    denoiser = fs.load(Half(), preconditioning="edm", sigma_data=1.0)
    label = torch.tensor([0.0, 1.0])
    x = torch.ones(2, 2)
    found = denoiser(x, 1.0, label=label)
    assert found[0].tolist() == pytest.approx([0.5, 0.5])
    assert found[1].tolist() == pytest.approx([0.5 + math.sqrt(0.5) * math.sqrt(0.5)] * 2, rel=1e-2)


def test_a_network_that_holds_its_preconditioning_predicts_data():
    official = EDMPreconditioned(raw, SIGMA_DATA)  # as the networks of the paper's code are called: network(x, sigma)
    denoiser = fs.load(official, schedule=fs.schedules.EDM(), predicts="data")
    x = noised(3.0)
    assert float((denoiser(x, 3.0) - EXACT(x, 3.0)).abs().max()) < 1e-10


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preconditioning": "edn"}, ValueError, "preconditioning"),
        ({"preconditioning": "edm", "predicts": "noise"}, TypeError, "leave predicts= out"),
        ({"preconditioning": "edm", "schedule": fs.schedules.VPLinear()}, TypeError, "schedule=EDM"),
        ({"preconditioning": "edm", "sigma_data": 0.0}, ValueError, "sigma_data must be positive"),
        ({"schedule": fs.schedules.EDM(), "predicts": "data", "sigma_data": 0.5}, TypeError, "belongs to preconditioning"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        fs.load(raw, **options)


def test_a_shipped_model_takes_no_preconditioning():
    with pytest.raises(TypeError, match="says its schedule"):
        fs.load("digits", preconditioning="edm")


def test_refuses_what_is_no_network():
    with pytest.raises(TypeError, match="callable"):
        EDMPreconditioned(3)
    wrong = fs.load(lambda x, c_noise: x[:, :1], preconditioning="edm")
    with pytest.raises(fs.FewstepError, match="shape"):
        wrong(noised(1.0), 1.0)
