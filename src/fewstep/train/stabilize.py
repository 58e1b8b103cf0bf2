r"""Terms that steady an adversarial game, for any discriminator loss: `R1`, `DiscriminatorController`, `BrownianMotionController`.

A discriminator gives logits D of real samples and of fake ones; `judge` calls it, and a *stabilizer* is a function of the outcome, a scalar
that is added to the discriminator's loss (which is minimised):

    judged = judge(discriminator, real, fake)
    loss = softplus(judged.fake_logits).mean() + softplus(-judged.real_logits).mean() + R1(1.0)(judged, generator)

What they do is seen in the Dirac-GAN ("Which Training Methods for GANs do actually Converge?", arXiv 1801.04406): data at a point c, the
generator's sample at $\theta$, $D(x) = \phi x$. With the linear loss of WGAN, $(\phi, \theta - c)$ circles its equilibrium for ever. A term
of damping k makes it $\dot\phi = -k\phi - (\theta - c),\ \dot\theta = \phi$, which decays at the real part of
$(-k \pm \sqrt{k^2 - 4})/2$. For c = 1 the damping is k/8 for `DiscriminatorController`'s probabilities, 2k for its logits and $\gamma$ for
`R1`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.errors import UnknownNameError

__all__ = ["R1", "BrownianMotionController", "DiscriminatorController", "Judged", "Stabilizer", "judge"]


@dataclass(frozen=True)
class Judged:
    """What a discriminator said.

    Attributes:
        real, fake: the samples, ``"batch *shape"`` and ``"batch_2 *shape"``; the real ones with gradients, for penalties on them.
        real_logits, fake_logits: the logits, ``"batch"`` and ``"batch_2"``, before any sigmoid.
    """

    real: Tensor
    fake: Tensor
    real_logits: Tensor
    fake_logits: Tensor


class Stabilizer(Protocol):
    """A term of the discriminator's loss, ``""``."""

    def __call__(self, judged: Judged, generator: torch.Generator, /) -> Tensor: ...


def judge(discriminator: Callable[..., Tensor], real: Tensor, fake: Tensor) -> Judged:
    """Call a discriminator on both.

    Args:
        discriminator: ``(samples, which) -> logits "batch"``, which being 0 for real samples and 1 for fake ones; a network of one
            argument may be given as ``lambda x, which: network(x)``.
        real, fake: samples. The fake ones without gradients: this is not the generator's turn.

    Example:
        >>> judged = judge(lambda x, which: 2.0 * x[:, 0], torch.ones(3, 1), torch.zeros(2, 1))
        >>> judged.real_logits.tolist(), judged.fake_logits.tolist()
        ([2.0, 2.0, 2.0], [0.0, 0.0])
    """
    real, fake = real.detach().requires_grad_(True), fake.detach()
    return Judged(real, fake, discriminator(real, 0), discriminator(fake, 1))


@dataclass(frozen=True)
class R1:
    r"""The gradient penalty on real samples: $\frac{\gamma}{2} E \|\nabla_x D(x)\|^2$ ("Which Training Methods for GANs do actually
    Converge?", arXiv 1801.04406, eq. 9).

    Args:
        gamma: its weight, positive; depends on the size of samples: 10 in the paper for images, less for small ones.

    Note:
        It differentiates twice. Where the attention of a device has no second derivative, choose the plain one.

    Example:
        >>> judged = judge(lambda x, which: 3.0 * x[:, 0], torch.ones(4, 1), torch.zeros(4, 1))
        >>> R1(2.0)(judged, torch.Generator()).item()
        9.0
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, gamma=self.gamma)

    def __call__(self, judged: Judged, generator: torch.Generator) -> Tensor:
        (gradient,) = torch.autograd.grad(judged.real_logits.sum(), judged.real, create_graph=True)
        return 0.5 * self.gamma * gradient.square().flatten(1).sum(1).mean()


@dataclass(frozen=True)
class DiscriminatorController:
    r"""The controller of C-GAIL ("C-GAIL: Stabilizing Generative Adversarial Imitation Learning with Control Theory", arXiv 2402.16349).

    $\frac{k}{2}\big(E_{real}\,(D - \tfrac12)^2 + E_{fake}\,(D - \tfrac12)^2\big)$ of the probabilities D, as in the paper, or
    $\frac{k}{2}\big(E_{real}\,l^2 + E_{fake}\,l^2\big)$ of the logits l, which does not vanish where the sigmoid saturates.

    Args:
        k: its weight, positive.
        form: ``"probability"`` or ``"logit"``.

    Note:
        It pulls a discriminator that tells right from wrong towards one that does not. Lower k, or end it, when that costs quality.

    Example:
        >>> judged = judge(lambda x, which: x[:, 0], torch.zeros(4, 1), torch.ones(4, 1))
        >>> DiscriminatorController(2.0, form="logit")(judged, torch.Generator()).item()
        1.0
    """

    k: float = 1.0
    form: str = "probability"

    def __post_init__(self) -> None:
        _check_positive(self, k=self.k)
        if self.form not in FORMS:
            raise UnknownNameError("form of the controller", self.form, FORMS)

    def __call__(self, judged: Judged, generator: torch.Generator) -> Tensor:
        deviation = FORMS[self.form]
        return 0.5 * self.k * (deviation(judged.real_logits).square().mean() + deviation(judged.fake_logits).square().mean())


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": lambda logits: logits.sigmoid() - 0.5,
    "logit": lambda logits: logits,
}
"""Name -> how far a logit is from saying nothing."""


@dataclass(frozen=True)
class BrownianMotionController:
    r"""Noise that is larger the larger the logits are ("Stabilizing GANs' Training with Brownian Motion
    Controller", arXiv 2306.10468).

    In the Dirac-GAN with $X = (\phi, \theta - c)$ the controlled game is
    $dX = f(X)\,dt + \rho_1 X\,dB_1 + \rho_2 |X|^\beta X\,dB_2$, and $|X|$ decays almost surely. For a real discriminator the term, of which
    this is minus the paper's (there the objective is maximised), is

    $$ -\tfrac{\rho_1}{2}\, E D(x)^2\, B_1 - \big(\tfrac{\rho_2}{4}\, E D(x)^4 + \tfrac{\rho_2}{2}\, E D(\tilde x)^2\, E D(x)^2\big) B_2 $$

    with real x, fake $\tilde x$, and two normal numbers B in every step.

    Args:
        rho_1, rho_2: at least 0; 0.1 and 0.01 are the paper's best.
        mean, deviation: of the numbers B. With a mean below 0 this is a deterministic decay of the logits, whatever the noise.

    Note:
        Nothing uses it unless it is asked for. The decay is that of the *median*: for $f$ that turns only, and $\rho_2 = 0$,
        $|X(t)| = |X(0)|\, e^{-\rho_1^2 t/2 + \rho_1 B(t)}$ exactly, so that $E|X|^2$ *grows* as $e^{\rho_1^2 t}$: a heavy tail, in which
        single runs explode. There is no theorem for networks; optimizers that rescale gradients, as Adam does, change the law; and steps of
        plain gradient descent of size h add h/2 to the exponent, so $\rho_1^2 > h$ is needed for any decay at all. `R1` and
        `DiscriminatorController` are better first choices.

    Example:
        >>> judged = judge(lambda x, which: x[:, 0], torch.ones(4, 1), torch.ones(4, 1))
        >>> round(BrownianMotionController(0.2, 0.0, mean=-1.0, deviation=0.0)(judged, torch.Generator()).item(), 6)
        0.1
    """

    rho_1: float = 0.1
    rho_2: float = 0.01
    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self) -> None:
        values = {"rho_1": self.rho_1, "rho_2": self.rho_2, "deviation": self.deviation}
        if not all(math.isfinite(value) and value >= 0.0 for value in values.values()) or not math.isfinite(self.mean):
            told = ", ".join(f"{name}={value}" for name, value in values.items())
            raise ValueError(f"BrownianMotionController needs numbers of at least 0, got {told}, mean={self.mean}.")

    def __call__(self, judged: Judged, generator: torch.Generator) -> Tensor:
        real, fake = judged.real_logits, judged.fake_logits
        drawn = torch.randn(2, generator=generator, dtype=real.dtype, device=generator.device).to(real.device)
        first, second = self.mean + self.deviation * drawn
        square = real.square().mean()
        quartic = 0.25 * real.pow(4).mean() + 0.5 * fake.square().mean() * square
        return -0.5 * self.rho_1 * square * first - self.rho_2 * quartic * second


def _check_positive(owner: object, **values: Any) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"{type(owner).__name__} needs a positive {name}, got {value}.")
