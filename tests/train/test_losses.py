"""The denoising loss: one error has one size in every kind of prediction; weights, times and label dropout do what they say."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.errors import UnknownNameError
from fewstep.predictions import PREDICTIONS, data_coefficients
from fewstep.schedules import EDM, Flow, FromBetas, VPCosine, VPLinear
from fewstep.train import DenoisingLoss, LabelDropout
from fewstep.train.losses import TIMES, WEIGHTINGS

SCHEDULES = [VPLinear(), VPCosine(), EDM(), Flow(), Flow(shift=3.0), FromBetas(np.linspace(1e-3, 0.2, 50).tolist())]
X = torch.randn(12, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def data_network(x_t, time):
    """Some smooth data prediction."""
    return torch.tanh(x_t) * torch.cos(time)[:, None, None]


def as_kind(schedule, predicts):
    """The same network, speaking another kind: f = (x_0 - a x_t) / b."""

    def network(x_t, time):
        lookup = {float(schedule.network_time(t)): t for t in network.times}
        t = np.array([lookup[float(v)] for v in time])
        a, b = data_coefficients(predicts, schedule.alpha(t), schedule.sigma(t))
        column = lambda v: torch.as_tensor(v)[:, None, None]  # noqa: E731
        return (data_network(x_t, time) - column(a) * x_t) / column(b)

    return network


def losses(schedule, predicts, weighting, seed=0):
    objective = DenoisingLoss(schedule, predicts, weighting)
    network = as_kind(schedule, predicts)
    network.times = objective.draw_times(len(X), torch.Generator().manual_seed(seed))
    return objective(network, {"x": X}, torch.Generator().manual_seed(seed))[0].item()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "constant"])
def test_weighted_loss_is_the_same_in_every_kind(schedule, weighting):
    values = [losses(schedule, predicts, weighting) for predicts in PREDICTIONS]
    np.testing.assert_allclose(values, values[0], rtol=1e-9)
    assert values[0] > 0.0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_weight_of_a_kind_is_the_plain_loss_of_that_kind(schedule, kind):
    np.testing.assert_allclose(losses(schedule, kind, kind), losses(schedule, kind, "constant"), rtol=1e-12)
    other = next(predicts for predicts in PREDICTIONS if predicts != kind)
    np.testing.assert_allclose(losses(schedule, other, kind), losses(schedule, kind, "constant"), rtol=1e-9)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_true_target_has_no_loss(predicts):
    """A network that knows x_0, here always 0.5, is right in every kind."""
    schedule = VPLinear()
    objective = DenoisingLoss(schedule, predicts)

    def network(x_t, time):
        t = time.numpy()
        a, b = (torch.as_tensor(v)[:, None] for v in data_coefficients(predicts, schedule.alpha(t), schedule.sigma(t)))
        return (0.5 - a * x_t) / b

    data = {"x": torch.full((32, 4), 0.5, dtype=torch.float64)}
    loss, info = objective(network, data, torch.Generator().manual_seed(0))
    assert loss < 1e-20
    assert info["squared_error"] < 1e-20


def test_min_snr_weight_by_hand():
    schedule = VPLinear()
    t = np.array([0.01, 0.3, 0.9])
    snr = schedule.alpha(t) ** 2 / schedule.sigma(t) ** 2
    # Table of the paper: the weight is min(SNR, 5) for data, min(SNR, 5) / SNR for noise, min(SNR, 5) / (SNR + 1) for velocity
    for predicts, wanted in (("data", 1.0), ("noise", 1.0 / snr), ("velocity", 1.0 / (snr + 1.0))):
        np.testing.assert_allclose(DenoisingLoss(schedule, predicts, "min_snr").weight(t), np.minimum(snr, 5) * wanted, rtol=1e-10)


@given(seed=st.integers(0, 2**32), count=st.integers(1, 40))
def test_times_lie_between_the_ends(seed, count):
    for name in TIMES:
        for schedule in (Flow(t_start=0.8, t_end=0.1), EDM()):
            t = DenoisingLoss(schedule, "data", times=name).draw_times(count, torch.Generator().manual_seed(seed))
            assert t.shape == (count,)
            assert ((t >= schedule.t_end) & (t <= schedule.t_start)).all()


def test_distributions_of_times():
    generator = torch.Generator().manual_seed(0)
    even = TIMES["low_discrepancy"](64, generator).sort().values
    assert (even.diff() - 1 / 64).abs().max() < 1e-12
    normal = TIMES["logit_normal"](20_000, generator).logit()
    assert abs(normal.mean()) < 4 / 20_000**0.5  # four standard errors
    assert abs(normal.std() - 1) < 4 / 40_000**0.5
    uniform = TIMES["uniform"](20_000, generator)
    assert abs(uniform.mean() - 0.5) < 4 * (1 / 12 / 20_000) ** 0.5


def test_label_dropout():
    seen = []

    def network(x_t, time, label):
        seen.append(label)
        return x_t

    data = {"x": torch.zeros(4000, 1), "label": torch.arange(4000) % 10}
    DenoisingLoss(VPLinear(), "noise", dropout=LabelDropout(null=10, probability=0.2))(
        network, data, torch.Generator().manual_seed(0)
    )
    dropped = seen[0] == 10
    assert abs(dropped.float().mean() - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5
    assert torch.equal(seen[0][~dropped], data["label"][~dropped])
    assert data["label"].max() == 9  # the caller's batch is untouched


def test_repeatable_and_dependent_on_the_generator():
    objective = DenoisingLoss(VPLinear(), "noise")
    call = lambda seed: objective(data_network, {"x": X}, torch.Generator().manual_seed(seed))[0].item()  # noqa: E731
    assert call(1) == call(1) != call(2)


def test_wrong_options():
    for wrong in ({"predicts": "noize"}, {"weighting": "snr"}, {"times": "normal"}):
        with pytest.raises(UnknownNameError, match="Known"):
            dataclasses.replace(DenoisingLoss(VPLinear(), "noise"), **wrong)
    with pytest.raises(ValueError, match="probability"):
        LabelDropout(null=0, probability=1.5)
