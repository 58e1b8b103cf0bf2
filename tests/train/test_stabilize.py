"""Dirac-GANs: data at 1, a sample at theta, D(x) = phi x. What unsteadied circles for ever, a term brings to rest at the rate of theory."""

import cmath
import math

import numpy as np
import pytest
import torch

from fewstep.errors import UnknownNameError
from fewstep.train.stabilize import R1, BrownianMotionController, DiscriminatorController, judge

POINT = torch.ones(1, 1, dtype=torch.float64)
GENERATOR = torch.Generator()


def slope(state, stabilizer):
    """d(phi, theta)/dt of the game with the linear loss, by the terms as they are used in training."""
    phi, theta = (value.clone().requires_grad_(True) for value in state)
    judged = judge(lambda x, which: phi * x[:, 0], POINT, theta.reshape(1, 1))
    loss = judged.fake_logits.mean() - judged.real_logits.mean()
    if stabilizer is not None:
        loss = loss + stabilizer(judged, GENERATOR)
    (up,) = torch.autograd.grad(loss, phi)
    (right,) = torch.autograd.grad(-phi.detach() * theta, theta)
    return torch.stack([-up, -right])


def runge_kutta(stabilizer, seconds, h=0.05, start=(0.02, 1.02)):
    """The game's path, ``"steps 2"``, relative to its equilibrium."""
    state, path = torch.tensor(start, dtype=torch.float64), []
    for _ in range(round(seconds / h)):
        k1 = slope(state, stabilizer)
        k2 = slope(state + 0.5 * h * k1, stabilizer)
        k3 = slope(state + 0.5 * h * k2, stabilizer)
        k4 = slope(state + h * k3, stabilizer)
        state = state + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        path.append(state - torch.tensor([0.0, 1.0], dtype=torch.float64))
    return torch.stack(path)


# damping in phi' = -d phi - (theta - 1), theta' = phi
DAMPING = [
    (DiscriminatorController(k=4.0), 0.5),
    (DiscriminatorController(k=8.0), 1.0),
    (DiscriminatorController(k=16.0), 2.0),
    (DiscriminatorController(k=24.0), 3.0),
    (DiscriminatorController(k=0.5, form="logit"), 1.0),
    (R1(gamma=0.5), 0.5),
]


@pytest.mark.parametrize(("stabilizer", "damping"), DAMPING, ids=[repr(stabilizer) for stabilizer, _ in DAMPING])
def test_eigenvalues_at_the_equilibrium(stabilizer, damping):
    rest = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert slope(rest, stabilizer).abs().max() == 0.0
    h = 1e-5
    jacobian = torch.stack(
        [(slope(rest + h * e, stabilizer) - slope(rest - h * e, stabilizer)) / (2 * h) for e in torch.eye(2).double()], 1
    )
    theory = sorted([(-damping + sign * cmath.sqrt(damping**2 - 4.0)) / 2.0 for sign in (1, -1)], key=lambda z: (z.real, z.imag))
    found = sorted(torch.linalg.eigvals(jacobian).tolist(), key=lambda z: (z.real, z.imag))
    np.testing.assert_allclose(
        found, theory, atol=1e-4 if damping == 2.0 else 1e-8
    )  # a double eigenvalue is a square root of errors


@pytest.mark.parametrize(("stabilizer", "damping"), DAMPING[:2], ids=[repr(stabilizer) for stabilizer, _ in DAMPING[:2]])
def test_the_path_decays_at_the_eigenvalue(stabilizer, damping):
    turn = 4.0 * math.pi / math.sqrt(4.0 - damping**2)  # after a turn of the eigenvalue's phase the state is the first one, shrunk
    path = runge_kutta(stabilizer, round(turn / 0.05) * 0.05)
    start = torch.tensor([0.02, 0.02]).double().norm()
    assert math.log(path[-1].norm() / start) / turn == pytest.approx(-damping / 2.0, rel=0.05)


def test_without_a_term_it_circles():
    path = runge_kutta(None, seconds=20.0)
    assert path[-1].norm() == pytest.approx(0.02 * math.sqrt(2.0), rel=1e-6)


def test_probabilities_saturate_and_logits_do_not():
    judged = judge(lambda x, which: 20.0 * x[:, 0], POINT, POINT)
    grads = [
        torch.autograd.grad(term(judged, GENERATOR), judged.real, retain_graph=True)[0].item()
        for term in (DiscriminatorController(1.0), DiscriminatorController(1.0, form="logit"))
    ]
    assert grads[0] < 1e-6
    assert grads[1] == 400.0  # l dl/dx


def test_the_penalty_of_a_known_gradient():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    judged = judge(lambda x, which: (x**2).sum(1), x, x)
    assert R1(0.5)(judged, GENERATOR).item() == pytest.approx(0.25 * (4.0 * x.square().sum(1)).mean().item(), rel=1e-12)


# ---- Brownian motion ---------------------------------------------------------------------------------------------------------------


def controlled(rho, seconds, runs, h, seed=0):
    """Runs of the Dirac-WGAN, X' = (-y, x) rotated, with noise rho X dB: Euler-Maruyama; log |X(T)| / |X(0)|, ``"runs"``."""
    random = np.random.default_rng(seed)
    x = np.tile([1.0, 1.0], (runs, 1))
    log = np.zeros(runs)
    for _ in range(round(seconds / h)):
        turn = np.stack([-x[:, 1], x[:, 0]], 1)
        # the turn exactly, so that Euler's +h/2 in the exponent does not add to it
        drift = math.cos(h) * x + math.sin(h) * turn
        x = drift * (1.0 + rho * math.sqrt(h) * random.standard_normal(runs))[:, None]
        size = np.linalg.norm(x, axis=1)
        log += np.log(size)
        x /= size[:, None]
    return log - math.log(math.sqrt(2.0))


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_brownian_control_decays_in_the_median_only(rho):
    seconds = 20.0
    log = controlled(rho, seconds, runs=1000, h=0.005)
    assert np.median(log) / seconds == pytest.approx(-(rho**2) / 2.0, rel=0.1)
    second_moment, median_square = np.mean(np.exp(2.0 * log)), np.exp(2.0 * np.median(log))
    assert second_moment > 10.0 * median_square  # the heavy tail that the docstring speaks of


def test_uncontrolled_noise_free_turns_neither_decay_nor_grow():
    assert abs(controlled(0.0, 20.0, runs=1, h=0.01)[0]) < 1e-9


def test_euler_steps_need_more_noise_than_their_size():
    """Plain gradient descent of step h on the turning game adds h/2 to the exponent."""
    h, rho, steps = 0.04, 0.1, 5000
    random = np.random.default_rng(0)
    log = np.zeros(400)
    x = np.tile([1.0, 0.0], (400, 1))
    for _ in range(steps):
        x = x + h * np.stack([-x[:, 1], x[:, 0]], 1) + rho * math.sqrt(h) * x * random.standard_normal((400, 1))
        size = np.linalg.norm(x, axis=1, keepdims=True)
        log += np.log(size[:, 0])
        x /= size
    assert np.median(log) / (steps * h) == pytest.approx(h / 2.0 - rho**2 / 2.0, rel=0.1)
    assert np.median(log) > 0.0


def test_the_term_is_that_of_the_dirac_game():
    """Its gradient by phi is -rho_1 phi B_1 at c = 1: the noise that the theory puts on phi."""
    phi = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    judged = judge(lambda x, which: phi * x[:, 0], POINT, 0.5 * POINT)
    drawn = torch.randn(2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    term = BrownianMotionController(0.7, 0.2)(judged, torch.Generator().manual_seed(5))
    (found,) = torch.autograd.grad(term, phi)
    quartic = 0.3**3 + 2.0 * 0.25 * 0.3**3
    assert found.item() == pytest.approx(-0.7 * 0.3 * drawn[0].item() - 0.2 * quartic * drawn[1].item(), rel=1e-12)


def test_the_term_has_no_mean():
    judged = judge(lambda x, which: x[:, 0], POINT, POINT)
    generator = torch.Generator().manual_seed(0)
    terms = torch.stack([BrownianMotionController(1.0, 1.0)(judged, generator).detach() for _ in range(2000)])
    assert abs(terms.mean()) < 4.0 * terms.std() / math.sqrt(2000)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: R1(0.0), ValueError, "positive gamma"),
        (lambda: DiscriminatorController(-1.0), ValueError, "positive k"),
        (lambda: DiscriminatorController(form="logits"), UnknownNameError, "logit"),
        (lambda: BrownianMotionController(rho_1=-0.1), ValueError, "at least 0"),
    ],
)
def test_options_that_make_no_sense(make, error, message):
    with pytest.raises(error, match=message):
        make()
