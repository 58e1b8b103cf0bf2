"""The closed-form denoisers against autograd, quadrature by hand and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.exact import FiniteData, Gaussian, GaussianMixture, widest_dtype
from fewstep.schedules import EDM, Flow, FromBetas, NoiseSchedule, VPCosine, VPLinear

SCHEDULES = [
    VPLinear(),
    VPCosine(t_start=1.0),
    EDM(),
    Flow(shift=2.0),
    FromBetas(np.linspace(1e-4, 0.02, 1000)),  # type: ignore[arg-type]
]
MEANS = [[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2]]
FULL = [[[1.0, 0.3], [0.3, 0.5]], [[0.2, 0.0], [0.0, 0.1]], [[0.1, 0.05], [0.05, 0.1]]]
COVARIANCES = [0.3, [0.1, 0.2, 0.15], [[0.1, 0.4], [0.2, 0.2], [0.3, 0.05]], FULL]
WEIGHTS = [0.3, 0.5, 0.2]

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)


def levels(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def times(schedule: NoiseSchedule) -> list[float]:
    return [schedule.t_start, float(schedule.t_of_lam(0.3)), schedule.t_end, schedule.t_zero]


def states(schedule: NoiseSchedule, t: float, shape: tuple[int, ...] = (7, 2)) -> Tensor:
    return math.hypot(*levels(schedule, t)) * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def mixture_density(x: Tensor, schedule: NoiseSchedule, t: float) -> Tensor:
    """Independent of the code under test: torch.distributions."""
    alpha, sigma = levels(schedule, t)
    total = alpha**2 * torch.tensor(FULL, dtype=torch.float64) + sigma**2 * torch.eye(2, dtype=torch.float64)
    parts = torch.distributions.MultivariateNormal(alpha * torch.tensor(MEANS, dtype=torch.float64), total)
    return (parts.log_prob(x[:, None]) + torch.tensor(WEIGHTS, dtype=torch.float64).log()).logsumexp(-1)


# ---- the mixture ---------------------------------------------------------------------------------------------------------------------


@every_schedule
def test_mixture_has_the_density_score_and_posterior_mean_of_tweedie(schedule):
    mixture = GaussianMixture(schedule, MEANS, FULL, WEIGHTS)
    for t in times(schedule):
        x = states(schedule, t).requires_grad_()
        density = mixture_density(x, schedule, t)
        (score,) = torch.autograd.grad(density.sum(), x)
        alpha, sigma = levels(schedule, t)
        torch.testing.assert_close(mixture.log_density(x, t), density, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mixture.score(x, t), score, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(alpha * mixture(x, t), x + sigma**2 * score, rtol=1e-10, atol=1e-10)


@every_schedule
@pytest.mark.parametrize("covariances", COVARIANCES, ids=["number", "isotropic", "diagonal", "full"])
def test_mixture_score_is_the_gradient_for_every_kind_of_covariance(schedule, covariances):
    mixture = GaussianMixture(schedule, MEANS, covariances, WEIGHTS)
    for t in times(schedule):
        x = states(schedule, t).requires_grad_()
        (score,) = torch.autograd.grad(mixture.log_density(x, t).sum(), x)
        torch.testing.assert_close(mixture.score(x, t), score, rtol=1e-10, atol=1e-12)


def test_kinds_of_covariance_agree():
    x = states(EDM(), 1.0)
    as_full = [v * np.eye(2) for v in (0.1, 0.2, 0.15)]
    results = [
        GaussianMixture(EDM(), MEANS, c, WEIGHTS)(x, 1.0) for c in ([0.1, 0.2, 0.15], [[0.1] * 2, [0.2] * 2, [0.15] * 2], as_full)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-15)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("schedule", [VPCosine(t_start=1.0), Flow()], ids=["cosine", "flow"])
def test_alpha_zero_gives_the_prior_mean(schedule):
    x = states(schedule, 1.0)
    mean = (torch.tensor(WEIGHTS, dtype=torch.float64)[:, None] * torch.tensor(MEANS, dtype=torch.float64)).sum(0)
    points = torch.randn(50, 2, dtype=torch.float64)
    for exact, expected in [
        (GaussianMixture(schedule, MEANS, FULL, WEIGHTS), mean),
        (Gaussian(schedule, MEANS[0], FULL[0]), torch.tensor(MEANS[0], dtype=torch.float64)),
        (FiniteData(schedule, points), points.mean(0)),
        (FiniteData(schedule, points, bandwidth=0.3), points.mean(0)),
    ]:
        torch.testing.assert_close(exact(x, 1.0), expected.expand(7, 2), rtol=0, atol=1e-14)


@every_schedule
def test_sigma_zero_gives_the_state(schedule):
    x = states(schedule, schedule.t_zero)
    for exact in (
        GaussianMixture(schedule, MEANS, FULL, WEIGHTS),
        Gaussian(schedule, MEANS[0], FULL[0]),
        FiniteData(schedule, MEANS, bandwidth=0.3),
    ):
        torch.testing.assert_close(exact(x, schedule.t_zero), x, rtol=0, atol=1e-13)


def test_singular_covariances_at_sigma_zero_give_the_nearest_support():
    x = torch.tensor([[0.9, 0.2], [-3.0, 0.1]], dtype=torch.float64)
    points = GaussianMixture(EDM(), [[1.0, 0.0], [-1.0, 0.0]], 0.0)
    assert points(x, 0.0).tolist() == [[1.0, 0.0], [-1.0, 0.0]]
    line = GaussianMixture(EDM(), [[0.0, 0.0]], [[1.0, 0.0]])
    torch.testing.assert_close(line(x, 0.0), x * torch.tensor([1.0, 0.0]), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(Gaussian(EDM(), [0.0, 0.0], [1.0, 0.0])(x, 0.0), x * torch.tensor([1.0, 0.0]), rtol=0, atol=1e-15)


def test_a_label_leaves_one_component():
    mixture = GaussianMixture(Flow(), MEANS, FULL, WEIGHTS)
    x = states(Flow(), 0.4)
    labels = torch.tensor([0, 1, 2, -1, 3, 0, 1])
    conditional = mixture(x, 0.4, label=labels)
    for i, label in enumerate(labels.tolist()):
        one = mixture if label in (-1, 3) else Gaussian(Flow(), MEANS[label], FULL[label])
        torch.testing.assert_close(conditional[i : i + 1], one(x[i : i + 1], 0.4), rtol=0, atol=1e-14)
        density = mixture.log_density(x, 0.4, label=labels)[i]
        if 0 <= label < 3:  # the component's own mass, weight included
            alone = GaussianMixture(Flow(), [MEANS[label]], [FULL[label]])
            assert float(density - alone.log_density(x, 0.4)[i]) == pytest.approx(math.log(WEIGHTS[label]))
    torch.testing.assert_close(mixture(x, 0.4, label=1), mixture(x, 0.4, label=torch.ones(7, dtype=torch.int64)))


# ---- the Gaussian --------------------------------------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("covariance", [0.3, [0.1, 0.4], FULL[0]], ids=["number", "diagonal", "full"])
def test_gaussian_is_a_mixture_of_one(schedule, covariance):
    gaussian = Gaussian(schedule, MEANS[0], covariance)
    mixture = GaussianMixture(schedule, [MEANS[0]], covariance if isinstance(covariance, float) else [covariance])
    for t in times(schedule):
        x = states(schedule, t)
        torch.testing.assert_close(gaussian(x, t), mixture(x, t), rtol=0, atol=1e-12)


@every_schedule
def test_solution_satisfies_the_ode_and_carries_the_marginals(schedule):
    exact = Gaussian(schedule, MEANS[0], FULL[0])
    x = states(schedule, schedule.t_start)
    middle = float(schedule.t_of_lam(0.3))
    # along the path y = x / alpha the ODE is dy / dlambda = D - y; central differences of the closed form
    lam, h = 0.3, 1e-4
    at = [float(schedule.t_of_lam(lam + step)) for step in (-h, h)]
    y = [exact.solution(x, schedule.t_start, t) / float(schedule.alpha(t)) for t in at]
    state = exact.solution(x, schedule.t_start, middle)
    slope = exact(state, middle) - state / float(schedule.alpha(middle))
    torch.testing.assert_close((y[1] - y[0]) / (2 * h), slope, rtol=1e-6, atol=1e-6)
    there_and_back = exact.solution(state, middle, schedule.t_start)
    torch.testing.assert_close(there_and_back, x, rtol=1e-12, atol=1e-12)


# ---- the finite data set -------------------------------------------------------------------------------------------------------------


def brute_force(x, points, alpha, sigma, bandwidth, keep=None):
    """One sample and one point at a time, in NumPy."""
    result = []
    for i, state in enumerate(x.numpy()):
        chosen = [p for j, p in enumerate(points.numpy()) if keep is None or keep[i][j]]
        total = alpha**2 * bandwidth**2 + sigma**2
        logs = np.array([-0.5 * ((state - alpha * p) ** 2).sum() / total for p in chosen])
        weights = np.exp(logs - logs.max())
        parts = [p + alpha * bandwidth**2 / total * (state - alpha * p) for p in chosen]
        result.append(sum(w * part for w, part in zip(weights / weights.sum(), parts, strict=True)))
    return torch.from_numpy(np.array(result))


@every_schedule
@pytest.mark.parametrize("bandwidth", [0.0, 0.2])
def test_finite_data_is_the_posterior_mean(schedule, bandwidth):
    points = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    exact = FiniteData(schedule, points, labels, bandwidth=bandwidth)
    asked = torch.tensor([0, 1, 2, -1, 3, 0, 1])
    keep = [[label in (-1, 3) or label == known for known in labels.tolist()] for label in asked.tolist()]
    for t in times(schedule)[:3]:
        alpha, sigma = levels(schedule, t)
        x = alpha * points[:7] + sigma * states(schedule, t, (7, 3)) / math.hypot(alpha, sigma)
        torch.testing.assert_close(exact(x, t), brute_force(x, points, alpha, sigma, bandwidth), rtol=0, atol=1e-8)
        expected = brute_force(x, points, alpha, sigma, bandwidth, keep)
        torch.testing.assert_close(exact(x, t, label=asked), expected, rtol=0, atol=1e-8)


def test_finite_data_in_blocks_and_by_products_is_the_same(monkeypatch):
    points = torch.randn(60, 2, 2, generator=torch.Generator().manual_seed(0))
    x = torch.randn(11, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(60) % 2
    per_sample = torch.linspace(0.1, 0.9, 11, dtype=torch.float64)
    asked = torch.arange(11) % 3 - 1
    calls = [lambda e: e(x, 0.3), lambda e: e(x, per_sample), lambda e: e(x, per_sample, label=asked)]
    whole = [call(FiniteData(Flow(), points, labels)) for call in calls]
    for setting in ({"BLOCK": 50}, {"BLOCK": 200}, {"CANCELLATION": 0.0}):
        with monkeypatch.context() as patch:
            for name, value in setting.items():
                patch.setattr(f"fewstep.exact.{name}", value)
            for call, expected in zip(calls, whole, strict=True):
                torch.testing.assert_close(call(FiniteData(Flow(), points, labels)), expected, rtol=0, atol=1e-9)


@every_schedule
def test_finite_data_at_sigma_zero_is_the_nearest_point(schedule):
    points = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    nearest = points[torch.cdist(x, points).argmin(1)]
    exact = FiniteData(schedule, points)
    torch.testing.assert_close(exact(x, schedule.t_zero), nearest, rtol=0, atol=1e-14)
    per_sample = torch.full((30,), schedule.t_zero, dtype=torch.float64)
    torch.testing.assert_close(exact(x, per_sample), nearest, rtol=0, atol=1e-14)
    torch.testing.assert_close(exact(points, schedule.t_zero), points, rtol=0, atol=1e-14)


# ---- all of them ---------------------------------------------------------------------------------------------------------------------


def each(schedule):
    return [
        Gaussian(schedule, MEANS[0], FULL[0]),
        GaussianMixture(schedule, MEANS, FULL, WEIGHTS),
        FiniteData(schedule, MEANS, bandwidth=0.1),
        FiniteData(schedule, MEANS),
    ]


@every_schedule
def test_a_time_per_sample_a_float32_state_and_the_counter(schedule):
    for exact in each(schedule):
        t = np.array(times(schedule))
        x = torch.stack([states(schedule, time)[0] for time in t])
        one_by_one = torch.cat([exact(x[i : i + 1], float(t[i])) for i in range(4)])
        torch.testing.assert_close(exact(x, t), one_by_one, rtol=0, atol=1e-14)
        torch.testing.assert_close(exact(x, torch.from_numpy(t)), one_by_one, rtol=0, atol=1e-14)
        assert exact.calls == 6
        single = exact(x.float(), t)
        assert single.dtype is torch.float32
        # a float32 state is a rounded state; its answer is exact up to the answer's own rounding
        torch.testing.assert_close(single, exact(x.float().double(), t).float(), rtol=0, atol=0)
        assert exact(x[:0], 0.5).shape == (0, 2)
        assert exact.schedule is schedule


def test_any_shape_of_sample():
    means = torch.randn(3, 2, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat, shaped = GaussianMixture(EDM(), means.reshape(3, 8), 0.1), GaussianMixture(EDM(), means, 0.1)
    x = torch.randn(5, 2, 4, 1)
    assert torch.equal(shaped(x, 2.0), flat(x.reshape(5, 8), 2.0).reshape(5, 2, 4, 1))
    assert torch.equal(shaped.score(x, 2.0), flat.score(x.reshape(5, 8), 2.0).reshape(5, 2, 4, 1))
    assert shaped.draw(6, 0).shape == (6, 2, 4, 1)
    assert Gaussian(EDM(), means[0], 1.0).draw(6, 0).shape == (6, 2, 4, 1)


@pytest.mark.parametrize(
    "exact",
    [
        Gaussian(EDM(), MEANS[0], FULL[0]),
        GaussianMixture(EDM(), MEANS, FULL, WEIGHTS),
        FiniteData(EDM(), MEANS, bandwidth=0.4),
    ],
    ids=lambda exact: type(exact).__name__,
)
def test_draws_have_the_moments_of_the_prior(exact):
    count = 40_000
    data = exact.draw(count, seed=5)
    assert data.dtype is torch.float64
    assert torch.equal(exact.draw(100, seed=5), data[:100])
    assert not torch.equal(exact.draw(100, seed=6), data[:100])
    if isinstance(exact, Gaussian):
        mean, covariance = torch.tensor(MEANS[0]), torch.tensor(FULL[0])
    else:
        means = torch.tensor(MEANS)
        weights = torch.tensor(WEIGHTS) if isinstance(exact, GaussianMixture) else torch.full((3,), 1 / 3)
        inside = torch.tensor(FULL) if isinstance(exact, GaussianMixture) else 0.16 * torch.eye(2).expand(3, 2, 2)
        mean = weights @ means
        covariance = (weights[:, None, None] * (inside + means[:, :, None] * means[:, None, :])).sum(0) - mean[:, None] * mean
    # five standard errors; those of the covariance taken from its fourth moments
    centred = data - mean
    error = data.std(0) / math.sqrt(count)
    assert bool(((data.mean(0) - mean).abs() < 5 * error).all())
    products = centred[:, :, None] * centred[:, None, :]
    assert bool(((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(count)).all())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own, on the first jvp
def test_derivatives_pass_through():
    for exact in each(EDM()):
        x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        assert torch.autograd.gradcheck(lambda state, e=exact: e(state, 0.7), x)
        _, forward = torch.func.jvp(lambda state, e=exact: e(state, 0.7), (x.detach(),), (torch.ones_like(x),))
        difference = (exact(x.detach() + 1e-6, 0.7) - exact(x.detach() - 1e-6, 0.7)) / 2e-6
        torch.testing.assert_close(forward, difference, rtol=1e-6, atol=1e-7)


def test_widest_dtype():
    assert widest_dtype(torch.device("mps")) is torch.float32
    assert widest_dtype(torch.device("cuda")) is torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(EDM(), 0.0, 1.0), "at least one dimension"),
        (lambda: Gaussian(EDM(), [0.0, 1.0], [1.0, 1.0, 1.0]), r"must be a number or have shape"),
        (lambda: Gaussian(EDM(), [0.0, 1.0], [[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (lambda: Gaussian(EDM(), [0.0, 1.0], [[1.0, 2.0], [2.0, 1.0]]), "positive semi-definite"),
        (lambda: Gaussian(EDM(), [0.0, math.nan], 1.0), "finite"),
        (lambda: GaussianMixture(EDM(), [0.0, 1.0], 1.0), r"k \*shape"),
        (lambda: GaussianMixture(EDM(), MEANS, -1.0), "positive semi-definite"),
        (lambda: GaussianMixture(EDM(), MEANS, 1.0, [0.5, 0.5]), "3 positive numbers"),
        (lambda: GaussianMixture(EDM(), MEANS, 1.0, [0.5, 0.5, 0.0]), "3 positive numbers"),
        (lambda: GaussianMixture(EDM(), MEANS, 1.0)(torch.zeros(1, 2), 1.0, label=5), r"within 0\.\.2"),
        (lambda: GaussianMixture(EDM(), MEANS, 1.0)(torch.zeros(1, 2), 1.0, label=torch.tensor([0.5])), "whole numbers"),
        (lambda: GaussianMixture(EDM(), MEANS, 1.0)(torch.zeros(1, 3), 1.0), r"samples of shape \(2,\)"),
        (lambda: GaussianMixture(EDM(), MEANS, 1.0)(torch.zeros(2, 2), torch.ones(3)), r"one per sample \(2,\)"),
        (lambda: FiniteData(EDM(), torch.zeros(0, 2)), "at least one point"),
        (lambda: FiniteData(EDM(), MEANS, bandwidth=-1.0), "bandwidth"),
        (lambda: FiniteData(EDM(), MEANS, [0, 1]), "3 whole numbers"),
        (lambda: FiniteData(EDM(), MEANS)(torch.zeros(1, 2), 1.0, label=0), "have none"),
        (lambda: FiniteData(EDM(), MEANS, [0, 0, 2])(torch.zeros(1, 2), 1.0, label=1), "no point has the label 1"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_is_needed():
    with pytest.raises(TypeError, match=r"must be a fewstep\.schedules schedule"):
        Gaussian(lambda t: t, [0.0], 1.0)  # type: ignore[arg-type]
