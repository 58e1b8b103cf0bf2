"""Denoisers to azula and from it: the same samples by its samplers and by ours."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.azula import from_azula, to_azula
from fewstep.errors import MissingExtraError
from fewstep.exact import GaussianMixture

X = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def azula():
    pytest.importorskip("azula")
    import azula.denoise
    import azula.noise
    import azula.sample

    return azula


class Backbone(torch.nn.Module):
    """A small network of a state and a time, in double precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).double()

    def forward(self, x, time, label=None):
        time = time.reshape(-1, 1).expand(len(x), 1)
        out = self.inner(torch.cat([x, time], 1))
        return out if label is None else out + label[:, None]


def mixture(schedule):
    return GaussianMixture(schedule, [[1.0, 0.5], [-1.0, -0.3]], [0.16, 0.09], [0.5, 0.5])


@pytest.mark.parametrize("schedule", [fs.schedules.VPLinear(), fs.schedules.Flow(t_start=0.99), fs.schedules.EDM(0.01, 10.0)])
@pytest.mark.parametrize(("theirs", "name", "steps", "stages"), [("DDIMSampler", "ddim", 8, 1), ("HeunSampler", "rho_heun", 5, 2)])
def test_their_samplers_on_our_denoiser(azula, schedule, theirs, name, steps, stages):
    den = mixture(schedule)
    sampler = getattr(azula.sample, theirs)(to_azula(den), steps=steps, silent=True, dtype=torch.float64)
    noise = float(schedule.sigma(schedule.t_start)) * X
    plan = fs.make_plan(name, schedule, steps * stages, grid=np.linspace(schedule.t_start, schedule.t_end, steps + 1))
    torch.testing.assert_close(sampler(noise), fs.sample(den, noise, plan), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ["VPSchedule", "VESchedule", "CosineSchedule", "RectifiedSchedule"])
@pytest.mark.parametrize("kind", ["KarrasDenoiser", "SimpleDenoiser"])
@torch.no_grad()
def test_our_samplers_on_their_denoiser(azula, kind, schedule):
    inner = getattr(azula.denoise, kind)(Backbone(), getattr(azula.noise, schedule)())
    den, steps = from_azula(inner), 6
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    alpha, sigma = inner.schedule(times)
    label = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)
    expected = azula.sample.DDIMSampler(inner, steps=steps, silent=True, dtype=torch.float64)(sigma[0] * X, label=label)
    plan = fs.make_plan("ddim", den.schedule, grid=(sigma / alpha).numpy())
    found = fs.sample(den, sigma[0] / alpha[0] * X, plan, cond={"label": label}) * alpha[-1]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert den.calls == steps
    assert den.info.fingerprint is not None


def test_there_and_back(azula):
    den = mixture(fs.schedules.VPLinear())
    back = from_azula(to_azula(den))
    times = np.array([0.9, 0.5, 0.01])
    for t, sigma in zip(times, np.exp(-den.schedule.lam(times)), strict=True):
        alpha = float(den.schedule.alpha(t))
        torch.testing.assert_close(back(X, float(sigma)), den(alpha * X, float(t)), rtol=1e-8, atol=1e-8)
    each = back(X, torch.linspace(0.5, 5.0, 8, dtype=torch.float64))
    torch.testing.assert_close(each[3:4], back(X[3:4], float(np.linspace(0.5, 5.0, 8)[3])), rtol=1e-8, atol=1e-8)


def test_a_network_moves_with_its_wrapper(azula):
    del azula
    network = Backbone()
    wrapped = to_azula(fs.Denoiser(network, fs.schedules.VPLinear(), predicts="noise"))
    assert sum(p.numel() for p in wrapped.parameters()) == sum(p.numel() for p in network.parameters())


def test_without_azula(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "azula"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "azula", None)
    with pytest.raises(MissingExtraError, match=r"fewstep\[azula\]"):
        to_azula(mixture(fs.schedules.VPLinear()))
    with pytest.raises(TypeError, match="needs a denoiser with a fewstep schedule"):
        to_azula(lambda x, t: x)
