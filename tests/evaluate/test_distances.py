"""Distances of distributions: closed forms, invariances, coverage of the intervals, size of the test."""

from __future__ import annotations

import hashlib
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

import fewstep as fs
from fewstep.errors import ArtefactError, MissingExtraError, UnknownNameError
from fewstep.evaluate import (
    DISTANCES,
    KID,
    MMD,
    Frechet,
    SlicedWasserstein,
    Wasserstein,
    digit_features,
    excess,
    features,
    frechet_of_gaussians,
    make_distances,
    make_features,
    measure,
    pixels,
    wasserstein_of_points,
)
from fewstep.evaluate.features import CLASSIFIER
from fewstep.models import read_classifier
from fewstep.train.recipes import digits


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_frechet_is_the_formula():
    x, y = draw(50, 4) @ draw(4, 4, seed=1), draw(60, 4, seed=2) + 0.5
    (m1, c1), (m2, c2) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
    wanted = np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2)))
    assert Frechet()(x, y) == pytest.approx(wanted, rel=1e-8)
    assert frechet_of_gaussians(m1, c1, m2, c2) == pytest.approx(wanted, rel=1e-8)
    # diagonal Gaussians: the sum of squared differences of means and of standard deviations; one of them singular
    assert frechet_of_gaussians(np.zeros(2), np.diag([4.0, 0.0]), np.ones(2), np.diag([1.0, 9.0])) == pytest.approx(1 + 1 + 1 + 9)


def test_frechet_of_fewer_samples_than_features_is_that_of_the_whole_space():
    x, y = draw(12, 40), draw(15, 40, seed=1) * 2.0
    (m1, c1), (m2, c2) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
    assert Frechet()(x, y) == pytest.approx(frechet_of_gaussians(m1, c1, m2, c2), rel=1e-6)


def test_kid_and_mmd_are_the_sums_over_all_pairs():
    x, y = draw(7, 3), draw(9, 3, seed=1) + 0.3

    def unbiased(kernel):
        within = [np.mean([kernel(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
        return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])

    assert KID()(x, y) == pytest.approx(unbiased(lambda a, b: (a @ b / 3 + 1) ** 3), rel=1e-10)
    pool = np.concatenate([x, y])
    median = np.median([np.square(a - b).sum() for a, b in itertools.combinations(pool, 2)])
    widths = (0.25, 0.5, 1.0, 2.0)
    wanted = unbiased(lambda a, b: np.mean([math.exp(-np.square(a - b).sum() / (2 * w * w * median)) for w in widths]))
    assert MMD()(x, y) == pytest.approx(wanted, rel=1e-10)


def test_sliced_wasserstein_in_one_dimension_is_the_exact_distance():
    x, y = draw(40, 1), draw(40, 1, seed=1) + 1.0
    assert SlicedWasserstein()(x, y) == pytest.approx(Wasserstein()(x, y), rel=1e-12)
    # unequal sizes: every sample of one set stands for three of the other
    assert SlicedWasserstein()(x, np.repeat(y, 3, axis=0)) == pytest.approx(SlicedWasserstein()(x, y), rel=1e-12)
    assert SlicedWasserstein()(x[:3], y[:2]) == pytest.approx(
        SlicedWasserstein()(np.repeat(x[:3], 2, axis=0), np.repeat(y[:2], 3, axis=0)), rel=1e-12
    )
    # in d dimensions the mean over directions of (shift . direction)^2 is |shift|^2 / d
    z = draw(50, 8)
    assert SlicedWasserstein(directions=20_000)(z, z + 1.0) == pytest.approx(1.0, rel=0.03)


def test_exact_wasserstein_of_draws_of_a_mixture():
    schedule = fs.schedules.VPLinear()
    mixture = fs.exact.GaussianMixture(schedule, [[-3.0, 0.0], [3.0, 0.0]], 1e-4, [0.5, 0.5])
    one, two = mixture.draw(200, seed=0), mixture.draw(200, seed=1)
    x, y = one.numpy(), two.numpy()
    best = min(
        math.sqrt(np.square(x[:5] - y[list(order)]).sum(1).mean()) for order in itertools.permutations(range(5))
    )  # all 120 assignments
    assert Wasserstein()(x[:5], y[:5]) == pytest.approx(best, rel=1e-12)
    moved = one + torch.tensor([0.0, 2.0])
    assert Wasserstein()(one, moved) == pytest.approx(2.0, rel=1e-12)
    # the two draws differ in how many points each component got: each of these goes 6 far
    surplus = abs(int((x[:, 0] > 0).sum()) - int((y[:, 0] > 0).sum()))
    assert Wasserstein()(one, two) == pytest.approx(6.0 * math.sqrt(surplus / 200), rel=0.02)  # a component is 0.01 wide


def test_exact_wasserstein_of_unequal_sets_in_one_dimension_is_the_sorted_coupling():
    pytest.importorskip("ot")
    x, y = draw(7, 1), draw(10, 1, seed=1) * 2.0 + 1.0
    wanted = math.sqrt(np.square(np.repeat(np.sort(x, 0), 10, 0) - np.repeat(np.sort(y, 0), 7, 0)).mean())  # 70 quantiles each
    assert Wasserstein()(x, y) == pytest.approx(wanted, rel=1e-12)
    assert Wasserstein()(y, x) == pytest.approx(wanted, rel=1e-12)
    # a set counts its members as draws, in several dimensions too: copies of all change nothing, and the assignment is the same
    a, b = draw(6, 3), draw(6, 3, seed=1) + 0.3
    assert Wasserstein()(a, np.repeat(b, 3, 0)) == pytest.approx(Wasserstein()(a, b), rel=1e-10)
    (found,) = measure(draw(40, 2), draw(60, 2, seed=1) + 2.0, "wasserstein", resamples=20)
    assert (found.sizes, found.p) == ((40, 60), 1 / 21)
    assert found.low < found.value < found.high


def test_wasserstein_of_weighted_points():
    pytest.importorskip("ot")
    # one dimension: the coupling of quantiles; x has mass 1/4 at 0 and 3/4 at 1, y has 1/2 at 0, 1/3 at 2 and 1/6 at 5
    parts = ((1 / 4, 0, 0), (1 / 4, 1, 0), (1 / 3, 1, 2), (1 / 6, 1, 5))
    wanted = math.sqrt(sum(mass * (a - b) ** 2 for mass, a, b in parts))
    x, y = np.array([[1.0], [0.0]]), torch.tensor([[2.0], [5.0], [0.0]])
    assert wasserstein_of_points(x, y, np.array([3.0, 1.0]), torch.tensor([2.0, 1.0, 3.0])) == pytest.approx(wanted, rel=1e-12)
    # two far pairs of points, each of which keeps its own mass: a shift of both components is all there is
    centres, weights = np.array([[0.0, 0.0], [100.0, 0.0]]), np.array([0.2, 0.8])
    assert wasserstein_of_points(centres, centres + np.array([3.0, 4.0]), weights, weights) == pytest.approx(5.0, rel=1e-12)
    # the weights alone: 0.3 of the mass goes 100 far
    assert wasserstein_of_points(centres, centres, weights, np.array([0.5, 0.5])) == pytest.approx(100 * math.sqrt(0.3), rel=1e-12)
    u, v = draw(20, 3), draw(20, 3, seed=1)
    assert wasserstein_of_points(u, v) == pytest.approx(Wasserstein()(u, v), rel=1e-10)
    for bad in (np.array([1.0, -1.0]), np.zeros(2), np.ones(3), np.array([1.0, np.nan])):
        with pytest.raises(ValueError, match="2 finite numbers of at least 0"):
            wasserstein_of_points(centres, centres, bad)


def test_exact_wasserstein_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(MissingExtraError, match=r"unequal size or with weights needs POT.*fewstep\[evaluate\]"):
        Wasserstein()(draw(4, 2), draw(5, 2))
    assert Wasserstein()(draw(5, 2), draw(5, 2) + 1.0) == pytest.approx(math.sqrt(2.0))


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
def test_every_distance_is_symmetric_blind_to_order_and_counts_draws_as_copies(distance):
    x, y = draw(20, 3), draw(20, 3, seed=1) + 0.4
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-9)
    assert distance(x, y) == pytest.approx(distance(x[::-1], torch.from_numpy(y).roll(3, 0)), rel=1e-9)
    assert distance(x, y + 2.0) > distance(x, y)
    if distance.name in ("frechet", "sliced_wasserstein", "wasserstein"):  # the others leave out a member's pairs with itself
        pool, counts = np.concatenate([x, y]), np.zeros(40, np.int64)
        counts[[0, 3, 5, 7]] = [10, 5, 3, 2]
        copies = np.repeat(pool[:20], counts[:20], axis=0)
        members = (np.arange(40) >= 20).astype(np.int64)
        assert distance.bind(pool, 20)(counts, members) == pytest.approx(distance(copies, y), rel=1e-9)


def test_sets_are_checked():
    with pytest.raises(ValueError, match="3 and 2 numbers"):
        Frechet()(draw(5, 3), draw(5, 2))
    with pytest.raises(ValueError, match="1 of 5 samples are not finite"):
        KID()(np.where(np.arange(5)[:, None] == 2, np.nan, draw(5, 3)), draw(5, 3))
    with pytest.raises(ValueError, match="at least 2"):
        MMD()(draw(1, 3), draw(5, 3))
    with pytest.raises(ValueError, match="median distance is 0"):
        MMD()(np.zeros((5, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="the same samples"):
        measure(draw(5, 3), draw(5, 3))
    with pytest.raises(ValueError, match="resamples must be"):
        measure(draw(5, 3), draw(5, 3, seed=1), resamples=3)
    with pytest.raises(UnknownNameError, match="Did you mean 'frechet'"):
        make_distances("frechett")


def test_a_measurement_repeats_with_its_seed_and_says_what_it_is():
    x, y = draw(60, 3), draw(80, 3, seed=1) + 0.5
    one, again, other = (measure(x, y, "mmd", resamples=40, seed=s)[0] for s in (3, 3, 4))
    assert one == again
    assert (one.low, one.p) != (other.low, other.floor)
    assert one.value == other.value == MMD()(x, y)
    assert (one.sizes, one.resamples, one.seed, one.p) == ((60, 80), 40, 3, 1 / 41)
    assert "told apart with 60 and 80 samples" in str(one)
    calls = []
    measure(x, y, [Frechet(), KID()], resamples=20, after=lambda: calls.append(1))
    assert len(calls) == 2 * 2 * 20


@pytest.mark.parametrize("distance", [Frechet(), KID(), SlicedWasserstein(32)], ids=lambda d: d.name)
def test_intervals_cover_the_expected_figure_and_the_test_has_its_size(distance):
    """100 pairs of sets: coverage of a 95 % interval is within three standard errors, and so is the rate of p <= 0.05 of equal ones."""

    def pair(seed, shift):
        random = np.random.default_rng(seed)
        return random.standard_normal((60, 3)) + shift, random.standard_normal((80, 3))

    expected = np.mean([distance(*pair(10_000 + i, 0.6)) for i in range(400)])
    found = [measure(*pair(i, 0.6), [distance], resamples=60, seed=i)[0] for i in range(100)]
    covered = np.mean([m.low <= expected <= m.high for m in found])
    assert covered >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 100)
    equal = [measure(*pair(i, 0.0), [distance], resamples=39, seed=i)[0] for i in range(100)]
    assert np.mean([m.p <= 0.05 for m in equal]) <= 0.05 + 3 * math.sqrt(0.95 * 0.05 / 100)
    assert np.mean([m.p <= 0.05 for m in found]) > 0.9
    # the floor is what independent sets of these sizes show: to three standard errors of the 100 values
    values = np.array([m.value for m in equal])
    assert np.mean([m.floor for m in equal]) == pytest.approx(values.mean(), abs=3 * values.std() / 10)


def test_excess_cancels_the_noise_that_is_shared():
    twin, y = draw(150, 4), draw(200, 4, seed=1)
    near = excess(twin + 0.15, twin, y, SlicedWasserstein())
    assert near.excess == pytest.approx(SlicedWasserstein()(twin + 0.15, y) - SlicedWasserstein()(twin, y))
    assert near.excess_high - near.excess_low < near.high - near.low
    none = excess(twin, twin, y, Frechet(), resamples=30)
    assert none.excess == none.excess_low == none.excess_high == 0.0
    with pytest.raises(ValueError, match="equally large"):
        excess(twin[:9], twin, y, KID())


def test_groups_are_kept_when_the_numbers_of_samples_of_each_are_fixed():
    """Two far clusters, equally many of each in both sets: independent draws would put the floor on the clusters' numbers."""
    random = np.random.default_rng(0)
    labels = np.arange(80) % 2
    x, y = (random.standard_normal((80, 2)) + 20.0 * labels[:, None] for _ in range(2))
    (kept,) = measure(x, y, [Frechet()], groups=(labels, torch.from_numpy(labels)), resamples=60)
    (free,) = measure(x, y, [Frechet()], resamples=60)
    assert (kept.groups, free.groups) == (2, 1)
    assert kept.value == free.value
    assert kept.floor < 0.2 * free.floor
    assert kept.high - kept.low < 0.5 * (free.high - free.low)
    assert kept.p > 0.05
    (moved,) = measure(x + 0.7, y, [Frechet()], groups=(labels, labels), resamples=60)
    assert moved.p == 1 / 61
    inside = excess(x + 0.1, x, y, SlicedWasserstein(), groups=(labels, labels), resamples=30)
    assert inside.high - inside.low < 0.5 * (lambda e: e.high - e.low)(excess(x + 0.1, x, y, SlicedWasserstein(), resamples=30))
    with pytest.raises(ValueError, match="one number a sample"):
        measure(x, y, [Frechet()], groups=(labels, labels[:7]))


# ---- features ----------------------------------------------------------------------------------------------------------------------


def test_the_shipped_classifier_knows_held_out_digits():
    network, meta = read_classifier(CLASSIFIER)
    data = digits("held_out")
    assert float((network(data["x"]).argmax(1) == data["label"]).float().mean()) >= 0.98
    assert meta["training"]["seed"] == 0
    assert "CC BY 4.0" in meta["licence"]
    assert CLASSIFIER.stat().st_size < 300_000
    found = digit_features(data["x"][:300])
    torch.testing.assert_close(found, network.features(data["x"][:300]).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.square().mean(1), torch.ones(300).double(), rtol=0.01, atol=0.0)


def test_features_by_name(tmp_path):
    assert make_features("auto", (3, 32, 32)) is pixels
    assert make_features("digits", (1, 8, 8)) is digit_features
    with pytest.raises(UnknownNameError, match="Did you mean 'pixels'"):
        make_features("pixel", (2,))
    with pytest.raises(ValueError, match="sees samples of shape"):
        digit_features(torch.zeros(2, 3, 8, 8))
    with pytest.raises(FileNotFoundError, match="weights of Inception are not at"):
        make_features("inception", (3, 32, 32), weights=str(tmp_path / "none.pth"))
    (tmp_path / "other.pth").write_bytes(b"weights")
    with pytest.raises(ArtefactError, match="its SHA-256 begins with"):
        make_features("inception", (3, 32, 32), weights=str(tmp_path / "other.pth"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_inception_distance_is_that_of_torchmetrics(tmp_path, monkeypatch):
    """With random weights in the place of the real ones, which are not shipped: the path from pictures to the figure is the same."""
    fid = pytest.importorskip("torchmetrics.image.fid")
    pytest.importorskip("torch_fidelity")
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    monkeypatch.setattr(torch, "load", lambda *_, **__: {})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(b"").hexdigest())
    torch.manual_seed(0)
    inception = features.Inception(file)
    random = np.random.default_rng(0)
    sets = [torch.from_numpy(random.integers(0, high, (12, 3, 32, 32)).astype(np.uint8)) for high in (256, 200)]
    mine = [inception(x.float() / 127.5 - 1.0) for x in sets]
    assert mine[0].shape == (12, 2048)
    wanted = fid._compute_fid(*(value for x in mine for value in (x.mean(0), torch.cov(x.T))))
    assert Frechet()(*mine) == pytest.approx(float(wanted), rel=1e-3)  # their square root of a matrix of rank 11
    theirs = inception.network(sets[0])
    torch.testing.assert_close(mine[0].float(), theirs, rtol=1e-4, atol=1e-4)
    gray = inception(torch.zeros(2, 1, 8, 8))
    torch.testing.assert_close(gray, inception(torch.zeros(2, 3, 8, 8)))
    with pytest.raises(ValueError, match="1 or 3"):
        inception(torch.zeros(2, 8, 8))


def test_small_sets_that_are_not_told_apart_are_called_few():
    (few,) = measure(draw(30, 2), draw(40, 2, seed=1), "mmd", resamples=20)
    (many,) = measure(draw(150, 2), draw(150, 2, seed=1), "mmd", resamples=20)
    (apart,) = measure(draw(30, 2), draw(40, 2, seed=1) + 5.0, "mmd", resamples=20)
    assert str(few).endswith("not told apart with 30 and 40 samples, which are few")
    assert str(many).endswith("not told apart with 150 and 150 samples")
    assert "few" not in str(apart)
