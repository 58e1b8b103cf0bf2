r"""Dequantization: from a density of continuous states to a bound of the probability of discrete data.

Data take the values $c_k = c_0 + k\Delta$, k = 0 .. levels - 1. A diffusion model has a density $p_t$ of states at its last noise level,
where $x_t = \alpha x_0 + \sigma\varepsilon$, not probabilities of levels. With any distribution $q(z \mid c)$ of states

$$ \log P(c) \ge E_q\big[\log p_t(z) + \log P(c \mid z) - \log q(z \mid c)\big] , $$

and the logarithm of the mean of K such weights is a tighter bound (importance-weighted; "Importance Weighted Autoencoders", arXiv
1509.00519). One of these gives the states:

| | $q(z \mid c)$ | $P(c \mid z)$ |
| --- | --- | --- |
| `Uniform` | $z = \alpha\,(c + \Delta u)$, u uniform on [-1/2, 1/2) | 1: z lies in the bin of c |
| `TruncatedNormal` | $z = \alpha c + \sigma u$, u standard normal, cut off at $\tau = \alpha\Delta / 2\sigma$ | 1: z lies in the bin of c |
| `Variational` | $z = \alpha c + \sigma u$, u standard normal | softmax over the levels of $-(z - \alpha c_k)^2 / 2\sigma^2$ |

With the first two $P(c)$ is the integral of $p_t$ over the scaled bin, so the probabilities of all data add up to at most 1. The truncated
normal is what noising makes of data, which is what the model has learnt; the uniform one is a law that no noising makes, and costs much
where $\sigma$ is not about as large as $\Delta$.

Sources: "Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs" (i-DODE, arXiv 2305.03935) for the truncated normal;
"Variational Diffusion Models" (arXiv 2107.00630) for P(c | z).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UnknownNameError
from fewstep.noise import check_seeds, normals

__all__ = ["DEQUANTIZATIONS", "Dequantization", "Levels", "TruncatedNormal", "Uniform", "Variational", "make_dequantization"]

DEQUANTIZE = 0x0DE9
"""Key of the random numbers, apart from those of starting noise."""
OFF_LEVEL = 1e-3
"""How far data may lie from a level, in bins."""


@dataclass(frozen=True)
class Levels:
    """The values that data take: equally spaced, from low to high, both included.

    Args:
        count: how many, at least 2. Bytes have 256, the shipped digits 17.
        low, high: the first and the last.

    Raises:
        ValueError: for fewer than 2, or an empty range.

    Example:
        >>> Levels(17).width, Levels(256, -255 / 256, 255 / 256).width == 2 / 256
        (0.125, True)
    """

    count: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 2 or not self.low < self.high:
            raise ValueError(f"data have at least 2 levels from low to high, got {self.count} from {self.low:g} to {self.high:g}.")

    @property
    def width(self) -> float:
        """Distance of two levels."""
        return (self.high - self.low) / (self.count - 1)

    def index(self, x: Tensor) -> Tensor:
        """Which level every element is: int64 ``"batch *shape"``.

        Raises:
            ValueError: if an element is none.
        """
        place = (x.double() - self.low) / self.width
        nearest = place.round()
        off = float((place - nearest).abs().max())
        if not off <= OFF_LEVEL or float(nearest.min()) < 0 or float(nearest.max()) > self.count - 1:
            raise ValueError(
                f"the data lie between {float(x.min()):.6g} and {float(x.max()):.6g}, up to {off:.2g} bins from the nearest of "
                f"{self.count} levels from {self.low:g} to {self.high:g}. Pass the levels that they take (--levels)."
            )
        return nearest.long()

    def values(self, index: Tensor) -> Tensor:
        """The values of levels, float64."""
        return self.low + self.width * index.double()


class Dequantization(abc.ABC):
    """Interface: how discrete data become states, and at what price."""

    @abc.abstractmethod
    def draw(self, levels: Levels, index: Tensor, u: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        r"""States of data, and what is added to their log density.

        Args:
            levels: the values of the data.
            index: int64 ``"batch *shape"``, which level.
            u: float64 ``"batch *shape"``, uniform on (0, 1).
            alpha, sigma: of the noise level at which the model's density is known.

        Returns:
            z ``"batch *shape"``, and $\log P(c \mid z) - \log q(z \mid c)$ ``"batch"``, both float64.
        """


@dataclass(frozen=True)
class Uniform(Dequantization):
    """Spread over the bin."""

    def draw(self, levels: Levels, index: Tensor, u: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        z = alpha * (levels.values(index) + levels.width * (u - 0.5))
        return z, torch.full((len(z),), z[0].numel() * math.log(alpha * levels.width), dtype=z.dtype, device=z.device)


@dataclass(frozen=True)
class TruncatedNormal(Dequantization):
    """The model's own noise, cut off at the edges of the bin.

    Example:
        >>> index, u = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[0.5]], dtype=torch.float64)
        >>> z, price = TruncatedNormal().draw(Levels(256), index, u, 1.0, 0.001)
        >>> z.tolist(), bool(abs(price + math.log(1 / (0.001 * math.sqrt(2 * math.pi)))) < 1e-3)
        ([[-1.0]], True)
    """

    def draw(self, levels: Levels, index: Tensor, u: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        tau = 0.5 * alpha * levels.width / sigma
        mass, below = math.erf(tau / math.sqrt(2.0)), 0.5 * math.erfc(tau / math.sqrt(2.0))
        # the smaller half of the normal is inverted, where nothing cancels
        half = torch.special.ndtri(below + mass * torch.minimum(u, 1.0 - u)).clamp(-tau, tau)
        normal = torch.where(u < 0.5, half, -half)
        z = alpha * levels.values(index) + sigma * normal
        log_q = -0.5 * normal.square() - math.log(sigma * mass * math.sqrt(2.0 * math.pi))
        return z, -log_q.flatten(1).sum(1)

    @staticmethod
    def entropy(levels: Levels, alpha: float, sigma: float) -> float:
        """Of one element, in nats: the mean of -log q in closed form."""
        tau = 0.5 * alpha * levels.width / sigma
        mass = math.erf(tau / math.sqrt(2.0))
        tail = tau * math.exp(-0.5 * tau * tau) / (math.sqrt(2.0 * math.pi) * mass)
        return 0.5 * (1.0 + math.log(2.0 * math.pi * sigma**2)) + math.log(mass) - tail


@dataclass(frozen=True)
class Variational(Dequantization):
    """The model's own noise, and the posterior of the levels as a decoder, as in variational diffusion models."""

    def draw(self, levels: Levels, index: Tensor, u: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        normal = torch.special.ndtri(u)
        z = alpha * levels.values(index) + sigma * normal
        every = alpha * levels.values(torch.arange(levels.count, device=index.device))
        away = -0.5 * ((z[..., None] - every) / sigma).square()
        log_p = away.gather(-1, index[..., None])[..., 0] - away.logsumexp(-1)
        log_q = -0.5 * normal.square() - math.log(sigma * math.sqrt(2.0 * math.pi))
        return z, (log_p - log_q).flatten(1).sum(1)


DEQUANTIZATIONS: dict[str, Dequantization] = {
    "truncated_normal": TruncatedNormal(),
    "uniform": Uniform(),
    "variational": Variational(),
}
"""Name -> dequantization."""


def make_dequantization(dequantization: str | Dequantization) -> Dequantization:
    """The dequantization of a name; one is returned as it is.

    Raises:
        UnknownNameError: for a name that is not in `DEQUANTIZATIONS`.

    Example:
        >>> make_dequantization("uniform")
        Uniform()
    """
    if isinstance(dequantization, Dequantization):
        return dequantization
    if dequantization not in DEQUANTIZATIONS:
        raise UnknownNameError("dequantization", dequantization, DEQUANTIZATIONS)
    return DEQUANTIZATIONS[dequantization]


def draw_uniform(shape: Sequence[int], seeds: Sequence[int], draw: int) -> Tensor:
    """Numbers uniform on (0, 1), float64 ``"batch *shape"``, a function of each seed and of the number of the draw."""
    normal = torch.from_numpy(np.ascontiguousarray(normals(check_seeds(seeds), (DEQUANTIZE, draw), shape)))
    tiny = 2.0**-53
    return torch.special.ndtr(normal).clamp(tiny, 1.0 - tiny)
