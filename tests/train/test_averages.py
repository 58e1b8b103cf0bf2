"""Averages of the weights: the profile of the power function, by its definition, and averages of other lengths afterwards."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.errors import ArtefactError
from fewstep.train import PowerFunction, average_afterwards, fit
from fewstep.train.averages import Averages, combination, overlap


def profile(average, updates):
    """The weight of every update in the average, by averaging unit vectors."""
    averages = Averages([average], {"w": torch.zeros(updates, dtype=torch.float64)})
    for unit in torch.eye(updates, dtype=torch.float64):
        averages.update({"w": unit})
    return averages.values[average]["w"].numpy()


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.25])
def test_the_profile_is_the_power_function(sigma_rel):
    power = PowerFunction(sigma_rel)
    weights, times = profile(power, 2000), np.arange(1, 2001)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)  # nothing of the untrained weights
    exact = (power.gamma + 1) * (times / 2000) ** power.gamma / 2000
    np.testing.assert_allclose(weights, exact, atol=0.01 * exact.max())  # the sum is an integral, to a step in 2000
    mean = (weights * times).sum()
    deviation = math.sqrt((weights * (times - mean) ** 2).sum())
    assert deviation / 2000 == pytest.approx(sigma_rel, rel=2e-3)


def test_sigma_rel_inverts_its_definition():
    for sigma_rel in (0.01, 0.05, 0.1, 0.2, 0.28):
        gamma = PowerFunction(sigma_rel).gamma
        assert math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)) == pytest.approx(sigma_rel, rel=1e-9)
    for wrong in (0.0, 0.29, -1.0, math.nan):
        with pytest.raises(ValueError, match="sigma_rel above 0"):
            PowerFunction(wrong)


def test_overlaps_are_the_integrals():
    grid = (np.arange(200_000) + 0.5) / 200_000 * 3.0

    def p(gamma, t):
        return np.where(grid < t, (gamma + 1) * grid**gamma / t ** (gamma + 1), 0.0)

    for a, b in (((3.0, 2.0), (5.0, 3.0)), ((5.0, 3.0), (3.0, 2.0)), ((4.0, 1.5), (4.0, 1.5))):
        assert overlap(*a, *b) == pytest.approx((p(*a) * p(*b)).sum() * 3.0 / 200_000, rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15])
def test_other_lengths_afterwards(sigma_rel):
    """From eight snapshots of two lengths: the profile of a third, within a few hundredths of its norm."""
    at, pair = [100 * k for k in range(1, 9)], (PowerFunction(0.05), PowerFunction(0.10))
    known = [(p.sigma_rel, t) for t in at for p in pair]
    basis = [np.pad(profile(p, t), (0, 800 - t)) for t in at for p in pair]
    wanted = profile(PowerFunction(sigma_rel), 800)
    found = combination(known, (sigma_rel, 800)) @ np.array(basis)
    nearest = min(np.linalg.norm(b - wanted) for b in basis)
    assert np.linalg.norm(found - wanted) < 0.12 * np.linalg.norm(wanted)
    assert np.linalg.norm(found - wanted) < 0.3 * nearest


def linear():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def train(folder, ema, **options):
    """The weight is 1, 2, 3, ... so averages are known sums."""
    run = {"steps": 60, "batch_size": 1, "learning_rate": 1.0, "warmup": 0, "decay": "constant", "clip": None, "folder": folder}
    return fit(
        lambda model, batch, generator: (-model.weight.sum(), {}),
        linear(),
        {"x": torch.zeros(1, 1)},
        optimizer=torch.optim.SGD,
        ema=ema,
        **{**run, **options},
    )


def test_snapshots_of_a_run(tmp_path):
    pair = (PowerFunction(0.05), PowerFunction(0.10))
    result = train(tmp_path, (*pair, 0.9), snapshot_every=5)
    assert len(list(tmp_path.glob("averages-*.safetensors"))) == 12
    direct = train(None, PowerFunction(0.07)).averages[PowerFunction(0.07)]["weight"].item()
    assert direct == pytest.approx((profile(PowerFunction(0.07), 60) * np.arange(1, 61)).sum(), rel=1e-6)
    assert average_afterwards(tmp_path, 0.07)["weight"].item() == pytest.approx(direct, rel=0.01)
    assert average_afterwards(tmp_path, 0.05)["weight"].item() == pytest.approx(result.averages[pair[0]]["weight"].item(), rel=1e-6)
    early = train(None, PowerFunction(0.07), steps=30).averages[PowerFunction(0.07)]["weight"].item()
    assert average_afterwards(tmp_path, 0.07, 30)["weight"].item() == pytest.approx(early, rel=0.01)
    with pytest.raises(ValueError, match=r"55, 60\), got 33"):
        average_afterwards(tmp_path, 0.07, 33)


def test_snapshots_beyond_the_checkpoint_are_made_again(tmp_path):
    train(tmp_path, (PowerFunction(0.05),), snapshot_every=10, checkpoint_every=25)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("averages-*")}
    (tmp_path / "averages-000000090.safetensors").write_bytes(b"of a longer run")
    train(tmp_path, (PowerFunction(0.05),), snapshot_every=10, checkpoint_every=25)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("averages-*")} == kept
    with pytest.raises(ArtefactError, match="needs two"):
        average_afterwards(tmp_path, 0.07)
    with pytest.raises(ArtefactError, match="has no snapshots"):
        average_afterwards(tmp_path / "nowhere", 0.07)
