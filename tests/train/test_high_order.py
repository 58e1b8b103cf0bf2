"""Second- and third-order objectives: on exact models the residuals have mean zero at every noisy state; errors enter squared."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fewstep.exact import Gaussian, GaussianMixture
from fewstep.predictions import data_coefficients
from fewstep.schedules import EDM, Flow, VPLinear
from fewstep.train import DenoisingLoss, HighOrderLoss, fit
from fewstep.train.high_order import Residuals, residuals

SCHEDULES = {"vp": (VPLinear(), 0.3), "edm": (EDM(), 0.7), "flow": (Flow(), 0.4)}
MEANS, COVARIANCES = [[-0.8, 0.3], [0.7, 0.2]], [[[0.20, 0.06], [0.06, 0.10]], [[0.08, -0.03], [-0.03, 0.15]]]
BASIS = math.sqrt(2.0) * torch.eye(2, dtype=torch.float64)
"""Probes whose mean is the exact trace."""


def mixture(schedule):
    return GaussianMixture(schedule, MEANS, COVARIANCES, [0.4, 0.6])


def speaking(denoiser, predicts, t, wrong=0.0):
    """The denoiser as a network of a kind, its data prediction off by `wrong` times a smooth function."""
    a, b = (float(v) for v in data_coefficients(predicts, denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)))

    def network(x, time):
        data = denoiser(x, t) + wrong * torch.sin(x.flip(1) + 0.5 * x)
        return (data - a * x) / b

    return network


def posterior(schedule, t, x_t, points=121):
    """Data on a grid and their posterior probabilities given one noisy state."""
    axis = torch.linspace(-3.5, 3.5, points, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    log = mixture(schedule).log_density(grid, schedule.t_zero) - (x_t - alpha * grid).square().sum(1) / (2 * sigma**2)
    keep = log > log.max() - 40
    return grid[keep], log[keep].softmax(0)


def mean_residuals(schedule, t, x_t, predicts="velocity", wrong=0.0):
    """The posterior means of r_2 and r_3, with exact traces."""
    objective = DenoisingLoss(schedule, predicts)
    x_0, probability = posterior(schedule, t, x_t)
    states = x_t.expand_as(x_0)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    noised = objective.noised(x_0, (states - alpha * x_0) / sigma, np.full(len(x_0), t), np.ones(len(x_0)), {})
    signs = BASIS[:, None, :].expand(2, *x_0.shape)
    found = residuals(objective, speaking(mixture(schedule), predicts, t, wrong), noised, signs)
    second = (found.second.mean(0) * probability).sum()
    return float(second.detach()), (found.third.mean(0) * probability[:, None]).sum(0).detach()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("predicts", ["noise", "velocity", "flow"])
def test_exact_model_has_no_mean_residual(name, predicts):
    """The identities of second and third order, with the posterior by quadrature: a mixture's derivatives are the posterior's cumulants."""
    schedule, t = SCHEDULES[name]
    for x_t in torch.tensor([[[0.1, 0.2]], [[-0.6, 0.5]]], dtype=torch.float64):
        second, third = mean_residuals(schedule, t, x_t, predicts)
        assert abs(second) < 1e-8
        assert third.abs().max() < 1e-6


@pytest.mark.parametrize("name", SCHEDULES)
def test_first_order_errors_enter_squared(name):
    """With a first-order error delta the second order's target is off by kappa |delta|^2, the third's by O(delta^2): order 2, measured."""
    schedule, t = SCHEDULES[name]
    x_t = torch.tensor([[0.1, 0.2]], dtype=torch.float64)
    kappa = float(schedule.alpha(t) / schedule.sigma(t) ** 2)
    steps, excess = (0.02, 0.01), {2: [], 3: []}
    for step in steps:
        second, third = mean_residuals(schedule, t, x_t, wrong=step)
        x = x_t.clone().requires_grad_()
        error = step * torch.sin(x.flip(1) + 0.5 * x)
        jacobian = torch.autograd.functional.jacobian(lambda y, s=step: s * torch.sin(y.flip(1) + 0.5 * y), x_t)[0, :, 0]
        hessian = torch.autograd.functional.hessian(lambda y, s=step: s * torch.sin(y.flip(1) + 0.5 * y).sum(), x_t)
        assert hessian.shape == (1, 2, 1, 2)
        # r = (derivative of the wrong model) - target, so (target - exact) = (derivative of the error) - r
        target = float(jacobian.trace()) - second
        assert target == pytest.approx(kappa * float(error.detach().square().sum()), rel=1e-6, abs=1e-9)
        excess[2].append(target)
        slope = torch.autograd.functional.jacobian(
            lambda y, s=step: torch.autograd.functional.jacobian(
                lambda u: s * torch.sin(u.flip(1) + 0.5 * u), y, create_graph=True
            )[0, :, 0].trace(),
            x_t,
        )[0]
        excess[3].append(float((slope - third).norm()))
    for order, values in excess.items():
        assert math.log2(values[0] / values[1]) == pytest.approx(2.0, abs=0.1), order


def linear(seed=0):
    """A Gaussian with correlated elements, whose exact data prediction is linear in x."""
    covariance = [[1.0, 0.8], [0.8, 1.0]]
    return Gaussian(VPLinear(), [0.0, 0.0], covariance), torch.tensor(covariance, dtype=torch.float64)


@pytest.mark.parametrize(("probes", "biased"), [(1, True), (2, False), (4, False)])
def test_one_probe_is_biased_and_two_are_not(probes, biased):
    """At the exact model of correlated data the second-order term has no gradient in the mean, unless its one probe is squared."""
    _, covariance = linear()
    schedule, t = VPLinear(), 0.3
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64))
    weights = gain.clone().requires_grad_()
    data = torch.linalg.cholesky(covariance) @ torch.randn(
        2, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    only = dataclasses.replace(schedule, t_start=t + 1e-9, t_end=t - 1e-9)
    objective = HighOrderLoss(DenoisingLoss(only, "data"), second=1.0, probes=probes)
    loss, info = objective(lambda x, time: x @ weights.T, {"x": data.T}, torch.Generator().manual_seed(1))
    first = DenoisingLoss(only, "data")(lambda x, time: x @ weights.T, {"x": data.T}, torch.Generator().manual_seed(1))[0]
    (gradient,) = torch.autograd.grad(loss - first, weights)
    # d/dW of sigma^2 / d * 2 sum_{i != j} sym(W)_ij^2, the bias of one probe
    off = gain - torch.diag(torch.diag(gain))
    bias = sigma**2 / 2 * 4 * off
    assert torch.allclose(
        gradient, bias if biased else torch.zeros_like(bias), atol=0.01 * float(bias.abs().max()) * (2 if biased else 1)
    )
    assert float(bias.abs().max()) > 0.05
    assert info["first"] == pytest.approx(float(first.detach()), rel=1e-9)


def test_terms_are_those_of_i_dode():
    """0.1 / d * w * (sigma h - alpha (d - |v - v_hat|^2))^2 with the same weight as the first order, written here in the velocity."""
    schedule = VPLinear()
    x_0 = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W = 0.3 * torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    network = lambda x, time: torch.tanh(x @ W.T)  # noqa: E731
    objective = HighOrderLoss(DenoisingLoss(schedule, "velocity", "noise", "lambda"), second=0.1, probes=1)
    loss, info = objective(network, {"x": x_0}, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    given = objective.draw_whole({"x": x_0}, generator)
    e = given.pop("drawn signs")[:, 0]
    assert set(e.unique().tolist()) == {-1, 1}
    drawn = objective.first.prepare(given, generator)
    alpha, sigma = (torch.as_tensor(v) for v in (schedule.alpha(drawn.t), schedule.sigma(drawn.t)))
    output = network(drawn.x_t, drawn.time)
    h = ((1 - output**2) * (e.double() @ W.T) * e).sum(1)
    square = (drawn.target - output).square().sum(1)
    w = torch.as_tensor(drawn.weight)
    first = (w * square).mean() / 3
    second = (w * (sigma * h - alpha * (3 - square)) ** 2).mean() / 3
    assert info["first"] == pytest.approx(float(first), rel=1e-10)
    assert info["second"] == pytest.approx(float(second), rel=1e-10)
    assert float(loss.detach()) == pytest.approx(float(first + 0.1 * second), rel=1e-10)


def test_fine_tuning_lowers_the_second_order_error():
    """After the same further steps from one start, with and without the second order: its divergence is nearer the exact one."""
    schedule = VPLinear()
    exact = mixture(schedule)
    data = {"x": exact.draw(4096, 0)}

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(
                torch.nn.Linear(4, 48), torch.nn.Tanh(), torch.nn.Linear(48, 48), torch.nn.Tanh(), torch.nn.Linear(48, 2)
            )

        def forward(self, x, time):
            return self.body(torch.cat([x, time[:, None], time[:, None] ** 2], 1))

    first = DenoisingLoss(schedule, "velocity", times="low_discrepancy")
    torch.manual_seed(0)
    start = Network().double()
    fit(first, start, data, steps=400, batch_size=256, learning_rate=5e-3, ema=())
    errors = {}
    for name, objective in (("first", first), ("default", HighOrderLoss(first)), ("second", HighOrderLoss(first, second=1.0))):
        network = Network().double()
        network.load_state_dict(start.state_dict())
        fit(objective, network, data, steps=300, batch_size=256, learning_rate=2e-3, ema=())
        errors[name] = divergence_error(network, exact, schedule)
    assert errors["second"] < 0.95 * errors["first"], errors
    assert 0.97 * errors["first"] < errors["default"] < 0.99 * errors["first"], errors


def divergence_error(network, exact, schedule):
    """Root mean square error of tr dD/dx at noisy states."""
    t = np.linspace(0.05, 0.95, 400)
    alpha, sigma = (torch.as_tensor(v)[:, None] for v in (schedule.alpha(t), schedule.sigma(t)))
    x = alpha * exact.draw(400, 1) + sigma * torch.randn(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def trace(function):
        y = x.clone().requires_grad_()
        output = function(y)
        return sum(torch.autograd.grad(output[:, i].sum(), y, retain_graph=True)[0][:, i] for i in range(2))

    mine = trace(lambda y: alpha * y - sigma * network(y, torch.as_tensor(t)))
    return float((mine - trace(lambda y: exact(y, t))).square().mean().sqrt())


def test_a_constant_network_has_no_derivatives():
    objective = HighOrderLoss(DenoisingLoss(VPLinear(), "data"), third=1.0)
    bias = torch.zeros(3, requires_grad=True)
    loss, info = objective(lambda x, time: bias.expand_as(x), {"x": torch.ones(4, 3)}, torch.Generator().manual_seed(0))
    loss.backward()
    assert torch.isfinite(loss)
    assert info["second"] > 0.0  # kappa |z|^2 is not matched


def test_wrong_options():
    first = DenoisingLoss(VPLinear(), "data")
    for wrong in ({"second": 0.0}, {"second": -1.0}, {"third": float("nan")}):
        with pytest.raises(ValueError, match="coefficients of at least 0"):
            HighOrderLoss(first, **wrong)
    with pytest.raises(ValueError, match="at least 1 probe"):
        HighOrderLoss(first, probes=0)
    assert Residuals._fields == ("first", "second", "third")
