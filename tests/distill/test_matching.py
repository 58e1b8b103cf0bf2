"""DMD2, TDM and FreeFlow against closed forms: gradients, zeros, limits."""

import math

import numpy as np
import pytest
import torch
from mixtures import as_network, teacher_of

import fewstep as fs
from fewstep.distill import FiniteDifference, ForwardMode
from fewstep.distill.distribution import fake_weight, matching_gradient, matching_loss
from fewstep.distill.flow_map import FlowMap, prediction_error, velocity
from fewstep.distill.states import noised
from fewstep.distill.trajectory import land, trajectory_loss

BETAS = tuple(np.linspace(1e-3, 0.2, 100).tolist())
SCHEDULES = {
    "VPLinear": fs.schedules.VPLinear(),
    "VPCosine": fs.schedules.VPCosine(),
    "EDM": fs.schedules.EDM(),
    "Flow": fs.schedules.Flow(),
    "FromBetas": fs.schedules.FromBetas(BETAS),
}
KINDS = ("noise", "data", "velocity", "flow")
MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.2], [0.2, 0.9]], dtype=torch.float64)


def cubature(size):
    """Points of equal weight with the moments of normal ones up to the third order, so that integrals of quadratics are exact."""
    return math.sqrt(size) * torch.cat([torch.eye(size), -torch.eye(size)]).double()


def divergence(mean, covariance, schedule, t):
    """KL of the noised N(mean, covariance) from the noised teacher's."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    ours = alpha**2 * covariance + sigma**2 * torch.eye(2).double()
    theirs = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2).double()
    shift, inverse = alpha * (mean - MEAN), torch.linalg.inv(theirs)
    return 0.5 * (torch.trace(inverse @ ours) + shift @ inverse @ shift + torch.logdet(theirs) - torch.logdet(ours) - 2.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_direction_is_the_gradient_of_the_divergence(schedule, kind):
    t = float(schedule.t_of_lam(-0.4))
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    mean = torch.tensor([-0.2, 0.3], dtype=torch.float64, requires_grad=True)
    spread = torch.tensor([[0.6, -0.3], [0.1, 1.2]], dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(divergence(mean, spread @ spread.T, schedule, t), (mean, spread))

    teacher = teacher_of(fs.exact.Gaussian(schedule, MEAN, COVARIANCE), kind)
    fake = teacher_of(fs.exact.Gaussian(schedule, mean.detach(), (spread @ spread.T).detach()), kind)
    z, eps = cubature(4).chunk(2, 1)
    x = mean + z @ spread.T
    x_t = alpha * x.detach() + sigma * eps
    times = np.full(len(x), t)
    gradient = matching_gradient(teacher, fake, x.detach(), (x_t, times), {})
    size = (x.detach() - teacher(x_t, times)).abs().mean(1, keepdim=True)
    # by Tweedie's formula D - D' is sigma^2 / alpha times the difference of the scores; and the chain rule puts in an alpha
    scored = (alpha**2 / sigma**2 * gradient * size * x).sum(1).mean()
    found = torch.autograd.grad(scored, (mean, spread))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_direction_is_zero_for_equal_distributions_only(schedule):
    teacher = teacher_of(fs.exact.Gaussian(schedule, MEAN, COVARIANCE), "data")
    other = teacher_of(fs.exact.Gaussian(schedule, MEAN, 1.1 * COVARIANCE), "data")
    x = fs.exact.Gaussian(schedule, MEAN, COVARIANCE).draw(64, seed=0)
    t = schedule.t_of_lam(np.linspace(-2.0, 2.0, 64))
    state = (noised(schedule, x, t, torch.randn(64, 2, dtype=torch.float64)), t)
    assert matching_loss(teacher, teacher, x, state, {}) == 0.0
    assert matching_loss(teacher, other, x, state, {}) > 1e-4


def test_nothing_to_divide_by_is_no_gradient():
    exact = fs.exact.Gaussian(fs.schedules.Flow(), MEAN, 0.0)
    teacher, x = teacher_of(exact, "data"), MEAN.expand(3, 2)
    assert matching_gradient(teacher, teacher, x, (x, np.full(3, 0.5)), {}).abs().max() == 0.0


@pytest.mark.parametrize("kind", [*KINDS, "score"])
def test_weights_are_those_of_the_kinds(kind):
    """The weighted error of the data prediction is the plain error of what a network of the kind gives."""
    schedule, t = fs.schedules.VPLinear(), 0.37
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    A, B = fs.predictions.target_coefficients(kind, alpha, sigma)
    x, eps, error = 0.4, -0.8, 0.05
    # a data prediction that errs by `error` at the same x_t means noise that errs by -alpha / sigma times that
    output = A * (x + error) + B * (eps - alpha / sigma * error)
    assert fake_weight(kind, "flow", alpha, sigma) * error**2 == pytest.approx((output - A * x - B * eps) ** 2, rel=1e-9)
    assert fake_weight("own", kind, alpha, sigma) == fake_weight("edm" if kind == "data" else kind, "flow", alpha, sigma)


# ---- TDM ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [SCHEDULES["VPLinear"], SCHEDULES["Flow"], SCHEDULES["EDM"]], ids=["VPLinear", "Flow", "EDM"])
def test_one_call_of_tdm_has_the_gradient_of_dmd2(schedule):
    """With a Huber loss that is a square; times a constant, and but for the normalisation both share."""
    teacher = teacher_of(fs.exact.GaussianMixture(schedule, [[1.0, 0.0], [-1.0, 0.5]], 0.1), "data")
    fake = teacher_of(fs.exact.Gaussian(schedule, MEAN, COVARIANCE), "data")
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(32, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    x, z = (torch.randn(32, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    start, end = np.full(32, schedule.t_start), np.full(32, schedule.t_zero)
    tau = schedule.t_of_lam(np.linspace(-1.5, 2.0, 32))
    landing = land(schedule, (float(schedule.sigma(schedule.t_start)) * x, start), x_0, (end, tau), z)
    np.testing.assert_allclose(landing.weight, 1.0, rtol=1e-12)
    np.testing.assert_allclose(landing.x_tau, noised(schedule, x_0.detach(), tau, z), rtol=1e-12, atol=1e-12)
    c = 1e4
    (ours,) = torch.autograd.grad(c * trajectory_loss(teacher, fake, landing, {}, c), x_0)
    (theirs,) = torch.autograd.grad(matching_loss(teacher, fake, x_0, (landing.x_tau, tau), {}), x_0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9)


def test_a_landing_is_the_students_state_noised():
    """Mean and variance of x_tau given the state; and the weight is the ratio of densities, tempered by the number of elements."""
    schedule, count = fs.schedules.VPLinear(), 200_000
    t, middle, tau = (np.full(count, s) for s in (0.75, 0.5, 0.6))
    x = torch.full((count, 1), 0.8, dtype=torch.float64)
    x_0 = torch.full((count, 1), 0.3, dtype=torch.float64)
    z = torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    landing = land(schedule, (x, t), x_0, (middle, tau), z)
    eps = (0.8 - float(schedule.alpha(0.75)) * 0.3) / float(schedule.sigma(0.75))
    at_middle = float(schedule.alpha(0.5)) * 0.3 + float(schedule.sigma(0.5)) * eps
    kept = float(schedule.alpha(0.6) / schedule.alpha(0.5))
    spread = math.sqrt(float(schedule.sigma(0.6)) ** 2 - (kept * float(schedule.sigma(0.5))) ** 2)
    assert landing.x_tau.mean().item() == pytest.approx(kept * at_middle, abs=5.0 * spread / math.sqrt(count))
    assert landing.x_tau.std().item() == pytest.approx(spread, rel=0.01)
    mixed = (landing.x_tau - float(schedule.alpha(0.6)) * 0.3) / float(schedule.sigma(0.6))
    np.testing.assert_allclose(landing.weight, torch.exp(0.5 * (z.square() - mixed.square())).squeeze(1), rtol=1e-9)


# ---- FreeFlow ----------------------------------------------------------------------------------------------------------------------


def closed_form(schedule, mean, variance):
    """The flow map of a Gaussian teacher as a student's network that predicts data."""
    alpha, sigma = float(schedule.alpha(schedule.t_start)), float(schedule.sigma(schedule.t_start))
    scale, start = alpha + sigma, sigma / (alpha + sigma)

    def network(x, time, told):
        z, delta = x / scale, told[:, None]
        r = start * (1.0 - delta)
        ratio = ((1.0 - r) ** 2 * variance + r**2) / ((1.0 - start) ** 2 * variance + start**2)
        end = (1.0 - r) * mean + ratio.sqrt() * (z - (1.0 - start) * mean)
        return z + (end - z) / delta

    return network


@pytest.mark.parametrize("derivative", [ForwardMode(), FiniteDifference(1e-4)], ids=["forward mode", "difference"])
@pytest.mark.parametrize("schedule", [SCHEDULES[name] for name in ("Flow", "VPLinear", "EDM")], ids=["Flow", "VPLinear", "EDM"])
def test_the_error_of_a_gaussians_flow_map_is_zero(schedule, derivative):
    teacher = teacher_of(fs.exact.Gaussian(schedule, MEAN, 0.6), "data")
    flow = FlowMap(teacher, closed_form(schedule, MEAN, 0.6))
    generator = torch.Generator().manual_seed(0)
    z = flow.start * torch.randn(64, 2, generator=generator, dtype=torch.float64)
    delta = 0.05 + 0.9 * torch.rand(64, generator=generator, dtype=torch.float64)
    _, error = prediction_error(flow, teacher, z, delta, {}, derivative)
    assert error.abs().max() < 1e-6
    wrong = FlowMap(teacher, closed_form(schedule, MEAN, 0.8))
    assert prediction_error(wrong, teacher, z, delta, {}, derivative)[1].abs().max() > 0.01


def test_the_map_ends_where_the_ode_does():
    schedule = fs.schedules.VPLinear(t_end=1e-5)
    exact = fs.exact.Gaussian(schedule, MEAN, 0.6)
    flow = FlowMap(teacher_of(exact, "data"), closed_form(schedule, MEAN, 0.6))
    x = torch.randn(8, 2, dtype=torch.float64)
    found, _ = flow.end(x / flow.scale, {})
    np.testing.assert_allclose(found, exact.solution(x, schedule.t_start, 0.0), rtol=1e-9, atol=1e-9)


def test_a_point_is_reached_in_one_straight_step():
    schedule = fs.schedules.Flow()
    teacher = teacher_of(fs.exact.Gaussian(schedule, MEAN, 0.0), "flow")
    student = FlowMap(teacher, lambda x, time, told: x - MEAN)  # the flow eps - x_0
    z = torch.randn(16, 2, dtype=torch.float64)
    _, error = prediction_error(student, teacher, z, torch.linspace(0.01, 0.99, 16).double(), {}, FiniteDifference())
    assert error.abs().max() < 1e-9
    np.testing.assert_allclose(student.end(z, {})[0], MEAN.expand(16, 2), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_and_kind_is_the_same_straight_path(schedule, kind):
    y, r = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), np.linspace(0.1, 0.9, 8)
    mixture = [[1.0, 0.0], [-1.0, 0.5]]
    plain = velocity(fs.exact.GaussianMixture(fs.schedules.Flow(), mixture, 0.1), y, r, {})
    other = velocity(teacher_of(fs.exact.GaussianMixture(schedule, mixture, 0.1), kind), y, r, {})
    np.testing.assert_allclose(other, plain, rtol=1e-8, atol=1e-9)


def test_as_network_is_what_it_says():
    schedule = fs.schedules.VPLinear()
    exact = fs.exact.Gaussian(schedule, MEAN, COVARIANCE)
    x = torch.randn(5, 2, dtype=torch.float64)
    for kind in KINDS:
        found = fs.Denoiser(as_network(exact, kind), schedule, kind)(x, 0.4)
        np.testing.assert_allclose(found, exact(x, 0.4), rtol=1e-10)
