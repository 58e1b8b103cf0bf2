r"""Objectives of second and third order for fine-tuning: they teach a network's derivatives, whose errors bound the likelihood of the ODE.

A diffusion ODE's likelihood depends on the divergence of its field, which the denoising loss does not see. With the posterior of
$x_0$ given $x_t$, its mean $D$, covariance $C$ and third central moment, and $\kappa = \alpha/\sigma^2$,

$$ \nabla D = \kappa\,C, \qquad \nabla \operatorname{tr} \nabla D = \kappa^2\,E\big[\,|x_0 - D|^2 (x_0 - D) \,\big|\, x_t\big] , $$

because the posterior is an exponential family with natural parameter $\kappa x_t$, whose cumulants are derivatives of one another. With
the network's own $\hat D$ (no gradient) in place of $D$, $z = x_0 - \hat D$, the residuals are

$$ r_2 = \operatorname{tr}\nabla D_\theta - \kappa\,|z|^2 , $$

$$ r_3 = \nabla\operatorname{tr}\nabla D_\theta - \kappa^2|z|^2 z + \kappa\,(\operatorname{tr}\nabla\hat D + 2\,\nabla\hat D)\,z . $$

They are *error-bounded*: with a first-order error $\delta = \hat D - D$ the minimiser of $E\,r_2^2$ is off by $\kappa|\delta|^2$, not by
$\delta$; that of $E\,|r_3|^2$ by products of $\delta$ with errors of $\nabla\hat D$, and by $\kappa^2|\delta|^3$. For the velocity,
$v = (\alpha x_t - D)/\sigma$ when $\alpha^2 + \sigma^2 = 1$, $r_2$ is i-DODE's
$-[\sigma \operatorname{tr}\nabla v_\theta - \alpha(d - |v - \hat v|^2)]$; for $F = (\varepsilon - x_0)/\sqrt2$ on the straight path theirs
is $-r_2/\sqrt2$.

The loss, with $w$ the weight of the data prediction (`fewstep.train.weightings`) and d elements a sample, is

$$ \frac{w}{d}|z_\theta|^2 + c_2\,\frac{\sigma^2 w}{d}\,r_2^2 + c_3\,\frac{\sigma^4 w}{d^2}\,|r_3|^2 , $$

which for both of i-DODE's paths is theirs, with $c_2 = 0.1$.

Traces are Hutchinson's: $h_k = e_k^T \nabla D_\theta\, e_k$ with random signs $e_k$. One probe, squared, is *not* an estimate of the
squared trace: $E\,(h - c)^2 = (\operatorname{tr} - c)^2 + 2\sum_{i \ne j} (\nabla D)_{ij}^2$ for a symmetric matrix, so its minimiser has
its off-diagonal derivatives pulled to zero. From two probes on, the products $(h_k - c)(h_l - c)$, $k \ne l$, are averaged, which is
unbiased.

Sources: "Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs" (i-DODE, arXiv 2305.03935) for the second order;
"Maximum Likelihood Training for Score-Based Diffusion ODEs by High-Order Denoising Score Matching" (arXiv 2206.08265, theorems 2 and 3)
for both and their bounds. There: matrices and scores; here: traces, and the data prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.predictions import data_coefficients
from fewstep.train.losses import DenoisingLoss, Noised, column

__all__ = ["HighOrderLoss", "Residuals", "residuals"]

SIGNS = "drawn signs"
"""Entry of a batch with the probes that were drawn for it."""


class Residuals(NamedTuple):
    """What the objectives square.

    Attributes:
        first: ``"batch *shape"``, x_0 minus the data prediction, with its gradient.
        second: ``"probes batch"``, r_2 with the trace of every probe.
        third: ``"probes batch *shape"``, r_3; empty if it was not asked for.
    """

    first: Tensor
    second: Tensor
    third: Tensor


@dataclass(frozen=True)
class HighOrderLoss:
    """The denoising loss with the error-bounded objectives of second and third order, for fine-tuning a trained network.

    The network is differentiated twice for the second order, three times for the third, the gradient of the loss included; attention must
    run in a form that can be (``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``). Run it in float32: bfloat16 rounds derivatives away.

    Args:
        first: the denoising loss, with the schedule, the weighting and the times of all.
        second: c_2; 0.1 is i-DODE's.
        third: c_3; 0 leaves the third order out.
        probes: of Hutchinson's trace; 2 or more are unbiased, 1 is i-DODE's, with the bias of the module's notes. Each costs one
            derivative of the network for the second order, and two for the third.

    Raises:
        ValueError: for a negative coefficient, both 0, or no probe.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> network = torch.nn.Linear(3, 3)
        >>> objective = HighOrderLoss(DenoisingLoss(VPLinear(), "velocity"), third=0.1)
        >>> loss, info = objective(lambda x, time: network(x), {"x": torch.ones(8, 3)}, torch.Generator().manual_seed(0))
        >>> sorted(info)
        ['first', 'second', 'third']
    """

    first: DenoisingLoss
    second: float = 0.1
    third: float = 0.0
    probes: int = 2

    def __post_init__(self) -> None:
        if not (0.0 <= self.second < float("inf") and 0.0 <= self.third < float("inf")) or self.second == self.third == 0.0:
            raise ValueError(
                f"HighOrderLoss needs coefficients of at least 0, and one above, got second={self.second} and third={self.third}. "
                f"Without either, use DenoisingLoss."
            )
        if self.probes < 1:
            raise ValueError(f"HighOrderLoss needs at least 1 probe, got {self.probes}.")

    def __call__(
        self, model: Callable[..., Tensor], batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, as `DenoisingLoss`; info has the terms before their coefficients."""
        given = dict(batch if SIGNS in batch else self.draw_whole(batch, generator))
        signs = given.pop(SIGNS)
        noised = self.first.prepare(given, generator)
        signs = signs.to(noised.x_t).transpose(0, 1)
        found = residuals(self.first, model, noised, signs, third=self.third > 0.0)
        _, b = data_coefficients(self.first.predicts, *self._levels(noised))
        sigma, d = self._levels(noised)[1], noised.x_t[0].numel()
        of_data = noised.weight / b**2
        terms = {
            "first": torch.as_tensor(of_data / d).to(found.first) * found.first.square().flatten(1).sum(1),
            "second": torch.as_tensor(sigma**2 * of_data / d).to(found.first) * _square(found.second[..., None]),
            "third": torch.as_tensor(sigma**4 * of_data / d**2).to(found.first) * _square(found.third.flatten(2)),
        }
        means = {name: term.mean() for name, term in terms.items() if name != "third" or self.third}
        loss = means["first"] + self.second * means["second"] + (self.third * means["third"] if self.third else 0.0)
        return loss, {name: mean.detach() for name, mean in means.items()}

    def draw_whole(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Everything random of one batch, as `DenoisingLoss.draw_whole`, and the probes."""
        drawn = self.first.draw_whole(batch, generator)
        shape = (len(batch["x"]), self.probes, *batch["x"].shape[1:])
        coins = torch.randint(2, shape, generator=generator, device=generator.device, dtype=torch.int8)
        return {**drawn, SIGNS: (2 * coins - 1).to(batch["x"].device)}

    def _levels(self, noised: Noised) -> tuple:
        return self.first.schedule.alpha(noised.t), self.first.schedule.sigma(noised.t)


def residuals(
    objective: DenoisingLoss, model: Callable[..., Tensor], noised: Noised, signs: Tensor | Sequence[Tensor], *, third: bool = True
) -> Residuals:
    """The residuals of first, second and third order, with their gradients.

    Args:
        objective: says the schedule and what the network predicts.
        model: the network, called as ``model(x_t, time, **cond)``.
        noised: a batch of `DenoisingLoss.prepare`.
        signs: ``"probes batch *shape"``, Hutchinson's probes. Unit vectors times the root of d, one after the other, make the mean over
            the probes exact.
        third: whether r_3 is wanted.
    """
    alpha, sigma = objective.schedule.alpha(noised.t), objective.schedule.sigma(noised.t)
    x = noised.x_t.detach().requires_grad_()
    a, b = (column(value, x) for value in data_coefficients(objective.predicts, alpha, sigma))
    with torch.enable_grad():
        data = a * x + b * noised.output(model, x)
        kappa = column(alpha / sigma**2, x)
        z = (noised.x_0 - data).detach()
        square = _each(z * z)
        traces = [_each(_pull(data, x, sign) * sign) for sign in signs]
        second = torch.stack([(trace - kappa * square).reshape(-1) for trace in traces])
        if not third:
            return Residuals(noised.x_0 - data, second, x.new_zeros(len(signs), len(x), 0))
        turned = _pull(data, x, z).detach()
        targets = [kappa * (kappa * square * z - trace.detach() * z - 2.0 * turned) for trace in traces]
        slopes = [_pull(trace, x, torch.ones_like(trace)) for trace in traces]
        return Residuals(noised.x_0 - data, second, torch.stack([s - c for s, c in zip(slopes, targets, strict=True)]))


def _pull(output: Tensor, x: Tensor, vector: Tensor) -> Tensor:
    """The derivative of <vector, output> in x, itself differentiable; 0 where the output does not depend on x."""
    if not output.requires_grad:
        return torch.zeros_like(x)
    found = torch.autograd.grad(output, x, vector, create_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if found is None else found


def _each(values: Tensor) -> Tensor:
    """The sum over a sample's elements, to broadcast with it: ``"batch 1 ..."``."""
    return values.flatten(1).sum(1).reshape(-1, *[1] * (values.ndim - 1))


def _square(residual: Tensor) -> Tensor:
    """The squared length of the mean of residuals ``"probes batch n"``, without bias if there are several: ``"batch"``."""
    probes = len(residual)
    squares = residual.square().sum((0, 2))
    return squares if probes == 1 else (residual.sum(0).square().sum(1) - squares) / (probes * (probes - 1))
