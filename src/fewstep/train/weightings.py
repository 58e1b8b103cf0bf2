r"""Weights of the noise levels in the denoising loss: one table, the same objective whatever the network predicts.

A weighting is a function $w_\text{data}(\alpha, \sigma)$, the weight of the squared error of the *data* prediction. A network whose data
error is $b$ times its own error ($x_0 = a\,x_t + b\,f$, `fewstep.predictions`) has the weight $b^2 w_\text{data}$, so that

$$ b^2 w_\text{data}\,|f_\theta - f|^2 = w_\text{data}\,|D_\theta - x_0|^2 $$

is one number, with one gradient, for every kind of prediction. With $\mathrm{SNR} = \alpha^2/\sigma^2$:

| weighting | $w_\text{data}$ | of the noise | of the velocity (VP) | source |
| --- | --- | --- | --- | --- |
| `constant` | $b^{-2}$: the network's own kind | | | |
| `noise`, `data`, `velocity`, `flow`, `score` | $b_\text{kind}^{-2}$: the loss of that kind | | | |
| `debiased` | $\sqrt{\mathrm{SNR}}$ | $\sigma/\alpha$ | $\alpha\sigma$ | arXiv 2310.08442 |
| `min_snr` | $\min(\mathrm{SNR}, 5)$ | $\min(1, 5/\mathrm{SNR})$ | $\min(\mathrm{SNR}, 5)/(1+\mathrm{SNR})$ | arXiv 2303.09556 |
| `soft_min_snr` | $4\,\mathrm{SNR}/(\mathrm{SNR}+4)$ | $4/(\mathrm{SNR}+4)$ | | arXiv 2401.11605 |
| `p2` | $\mathrm{SNR}/(1+\mathrm{SNR})$ | $1/(1+\mathrm{SNR})$ | $\mathrm{SNR}/(1+\mathrm{SNR})^2$ | arXiv 2204.00227 |
| `edm` | $\mathrm{SNR} + 1/\sigma_\text{data}^2$ | | | arXiv 2206.00364, table 1 |

In this order: "Debias the Training of Diffusion Models"; "Efficient Diffusion Training via Min-SNR Weighting Strategy"; "Scalable
High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers"; "Perception Prioritized Training of Diffusion Models";
"Elucidating the Design Space of Diffusion-Based Generative Models".

Debiased estimation is the geometric mean of the losses of noise and of data. For the straight path its weight of the flow is
$\sigma\alpha = t(1-t)$. `edm` is the plain loss of EDM's preconditioned network. `noise` on times uniform in lambda is the bound of the
likelihood (`fewstep.likelihood`).

Note:
    The debiased authors' code uses $1/\sqrt{\mathrm{SNR}}$ whatever the network predicts, which is their scheme only for the noise.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UnknownNameError
from fewstep.predictions import PREDICTIONS, check_prediction, data_coefficients

__all__ = [
    "EDM",
    "P2",
    "WEIGHTINGS",
    "Constant",
    "Debiased",
    "LossOf",
    "MinSNR",
    "SoftMinSNR",
    "Weighting",
    "make_weighting",
]

Floats = NDArray[np.float64]


class Weighting(abc.ABC):
    """Interface: a weight for every noise level."""

    @abc.abstractmethod
    def weight(self, predicts: str, alpha: Floats, sigma: Floats) -> Floats:
        """The weight of the squared error of a network of this kind.

        Args:
            predicts: what the network predicts.
            alpha, sigma: float64, of one shape.
        """


@dataclass(frozen=True)
class Constant(Weighting):
    """1, whatever the network predicts. The only weighting that is another objective for every kind."""

    def weight(self, predicts: str, alpha: Floats, sigma: Floats) -> Floats:
        check_prediction(predicts)
        return np.ones_like(alpha)


@dataclass(frozen=True)
class LossOf(Weighting):
    """The plain loss that a network of another kind would be trained with.

    Example:
        >>> LossOf("noise").weight("data", np.array([0.6]), np.array([0.8])).round(4).tolist()  # SNR
        [0.5625]
    """

    kind: str

    def __post_init__(self) -> None:
        check_prediction(self.kind)

    def weight(self, predicts: str, alpha: Floats, sigma: Floats) -> Floats:
        return (_error(predicts, alpha, sigma) / _error(self.kind, alpha, sigma)) ** 2


class _OfSNR(Weighting):
    """A weighting that is a function of the signal-to-noise ratio.

    At alpha = 0 it is 0 or finite, except for networks that predict the noise, whose data error is infinite there. At sigma = 0 the
    ratio is infinite, and only `MinSNR` and `SoftMinSNR` are finite: draw times at which sigma > 0, as schedules end at by default.
    """

    def weight(self, predicts: str, alpha: Floats, sigma: Floats) -> Floats:
        return _error(predicts, alpha, sigma) ** 2 * self._of_data(alpha, sigma)

    @abc.abstractmethod
    def _of_data(self, alpha: Floats, sigma: Floats) -> Floats:
        """The weight of the data prediction."""


@dataclass(frozen=True)
class Debiased(_OfSNR):
    """Debiased estimation: sqrt(SNR) for data.

    Example:
        >>> alpha, sigma = np.array([0.6]), np.array([0.8])
        >>> [Debiased().weight(kind, alpha, sigma).round(4).tolist() for kind in ("data", "noise", "velocity")]
        [[0.75], [1.3333], [0.48]]
    """

    def _of_data(self, alpha: Floats, sigma: Floats) -> Floats:
        return alpha / sigma


@dataclass(frozen=True)
class MinSNR(_OfSNR):
    """min(SNR, gamma) for data; 5 is the paper's gamma."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_positive(self)

    def _of_data(self, alpha: Floats, sigma: Floats) -> Floats:
        return np.minimum((alpha / sigma) ** 2, self.gamma)


@dataclass(frozen=True)
class SoftMinSNR(_OfSNR):
    """SNR gamma / (SNR + gamma) for data, half of min-SNR where that has its corner; 4 is the paper's gamma."""

    gamma: float = 4.0

    def __post_init__(self) -> None:
        _check_positive(self)

    def _of_data(self, alpha: Floats, sigma: Floats) -> Floats:
        return self.gamma * alpha**2 / (alpha**2 + self.gamma * sigma**2)


@dataclass(frozen=True)
class P2(_OfSNR):
    """SNR / (k + SNR)^gamma for data; k = gamma = 1 are the paper's values."""

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self)

    def _of_data(self, alpha: Floats, sigma: Floats) -> Floats:
        return (alpha / sigma) ** 2 / (self.k + (alpha / sigma) ** 2) ** self.gamma


@dataclass(frozen=True)
class EDM(_OfSNR):
    """SNR + 1 / sigma_data^2 for data, which weights EDM's preconditioned output with 1. Its times are ``"log_normal"``."""

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _check_positive(self)

    def _of_data(self, alpha: Floats, sigma: Floats) -> Floats:
        return (alpha / sigma) ** 2 + self.sigma_data**-2


def _error(predicts: str, alpha: Floats, sigma: Floats) -> Floats:
    """b: the error of the data for an error 1 of the prediction."""
    return data_coefficients(predicts, alpha, sigma)[1]


def _check_positive(weighting: Any) -> None:
    values = vars(weighting)
    if not all(0.0 < value < float("inf") for value in values.values()):
        raise ValueError(f"{type(weighting).__name__} needs positive numbers, got {values}.")


WEIGHTINGS: dict[str, Weighting] = {
    "constant": Constant(),
    **{kind: LossOf(kind) for kind in PREDICTIONS},
    "debiased": Debiased(),
    "min_snr": MinSNR(),
    "soft_min_snr": SoftMinSNR(),
    "p2": P2(),
    "edm": EDM(),
}
"""Name -> weighting with its paper's values."""


def make_weighting(weighting: str | Weighting) -> Weighting:
    """The weighting of a name; a weighting is returned as it is.

    Raises:
        UnknownNameError: for a name that is not in `WEIGHTINGS`.

    Example:
        >>> make_weighting("min_snr"), make_weighting(MinSNR(gamma=1.0))
        (MinSNR(gamma=5.0), MinSNR(gamma=1.0))
    """
    if isinstance(weighting, Weighting):
        return weighting
    if weighting not in WEIGHTINGS:
        raise UnknownNameError("weighting", weighting, WEIGHTINGS)
    return WEIGHTINGS[weighting]
