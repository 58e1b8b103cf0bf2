"""What a method of preference learning is, and what its parts share: rewards, labels of pairs, the loss of a pair.

A *policy* is a denoiser whose network is trained; the *reference* is the denoiser that it began as, which stays as it is. A method gives
`fewstep.train.fit` an objective of both. A *reward* is a function of clean samples and conditions, ``reward(x, **cond)``, that gives a
number a sample, ``"batch"``, larger for better ones; or several, ``"batch k"``, of which none is traded for another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.plan import Plan
from fewstep.train.watched import weights_of

__all__ = [
    "RESERVED",
    "BradleyTerry",
    "Dominance",
    "Labels",
    "Policy",
    "PreferenceMethod",
    "Reward",
    "checked",
    "clipped",
    "conditions_of",
    "pair_loss",
    "told_of",
]

Denoiser = Callable[..., Tensor]
Reward = Callable[..., Tensor]
RESERVED = ("x", "worse", "row")
"""Names in a batch that are no conditions: clean data, worse ones, and what counts the samples of a model without conditions."""


@dataclass(frozen=True)
class Policy:
    """What an objective works with.

    Args:
        denoiser: the policy, ``D(x, t, **cond)``, with gradients; its network is the one that is trained.
        reference: what it began as.
        plan: how both are sampled.
        shape: of one sample.
        reward: of clean samples; None if the method needs none.
        like: a tensor on the network's device, in the precision of the states.
    """

    denoiser: Denoiser
    reference: Denoiser
    plan: Plan
    shape: tuple[int, ...]
    reward: Reward | None
    like: Tensor


class PreferenceMethod(Protocol):
    """A frozen dataclass with a method's options."""

    @property
    def needs_reward(self) -> bool:
        """Whether it asks a reward."""
        ...

    @property
    def needs_data(self) -> bool:
        """Whether batches must hold clean data ``"x"``; if not, they hold conditions."""
        ...

    def objective(self, policy: Policy) -> Any:
        """What `fewstep.train.fit` trains the policy's network by; see `fewstep.train.Objective`."""
        ...


class Labels(Protocol):
    """Which of two samples is preferred."""

    def __call__(self, first: Tensor, second: Tensor, generator: torch.Generator, /) -> Tensor:
        """+1 where the first is, -1 where the second is, 0 where neither: ``"batch"`` of rewards ``"batch"`` or ``"batch k"``."""
        ...


@dataclass(frozen=True)
class Dominance:
    """The sample that is better in one reward and worse in none. Without such a one there is no preference, and nothing is learnt.

    Example:
        >>> first, second = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> Dominance()(first, second, torch.Generator()).tolist()
        [1.0, 0.0]
    """

    def __call__(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        difference = (first - second).reshape(len(first), -1)
        better, worse = (difference > 0).any(1), (difference < 0).any(1)
        return (better & ~worse).to(first.dtype) - (worse & ~better).to(first.dtype)


@dataclass(frozen=True)
class BradleyTerry:
    r"""Draws the preferred one: the first with probability $1 / (1 + e^{-(R_1 - R_2) / T})$, as people are modelled.

    With such labels the loss of pairs has, for one step, the optimum $p_\text{ref}\, e^{d R / (T \beta)} / Z$, of samples with
    d elements, for log-densities here are means over them; with those of `Dominance`, which are always
    right, it has none, and only clipping ends the way.

    Args:
        temperature: T, in units of the reward.

    Raises:
        ValueError: unless it is positive.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(f"the temperature of labels must be positive, got {self.temperature:g}.")

    def __call__(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        if first.ndim != 1:
            raise ValueError(
                f"labels of Bradley and Terry are drawn by one reward, a number a sample; got shape {tuple(first.shape)}."
            )
        chance = torch.rand(first.shape, generator=generator, dtype=torch.float64).to(first)
        return 2.0 * (chance < ((first - second) / self.temperature).sigmoid()).to(first.dtype) - 1.0


def conditions_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the networks are told."""
    return {name: value for name, value in batch.items() if name not in RESERVED}


def clipped(log_r: Tensor, clip: float | None) -> Tensor:
    """Log of the ratio r clipped to [1 - clip, 1 + clip]; beyond, there is no gradient.

    Example:
        >>> clipped(torch.tensor([0.05, 1.0]), 0.1).exp().round(decimals=3).tolist()
        [1.0509999990463257, 1.100000023841858]
    """
    return log_r if clip is None else log_r.clamp(math.log1p(-clip), math.log1p(clip))


def checked(found: Any, count: int, what: str) -> Tensor:
    """What a reward or a score gave, if it is finite floating-point numbers, one a sample or several a sample.

    Raises:
        ValueError: otherwise.
    """
    wanted = f"{what} must give one floating-point number a sample, a tensor of shape ({count},)"
    if not isinstance(found, Tensor) or not found.is_floating_point():
        kind = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{wanted}; this one gave {kind}. Cast it: .float().")
    if found.ndim not in (1, 2) or len(found) != count:
        raise ValueError(f"{wanted}; this one gave shape {tuple(found.shape)}. Take the mean over all but the first dimension.")
    if not bool(found.isfinite().all()):
        raise ValueError(f"{wanted}; {int((~found.isfinite()).sum())} of {found.numel()} were not finite.")
    return found


def told_of(function: Any) -> str:
    """What a checkpoint calls a function, a reward or a score: its name or its repr; of a network the digest of its weights as well.

    Example:
        >>> told_of(pair_loss), told_of(nn.Linear(1, 1).requires_grad_(False))[:7]
        ('pair_loss', 'Linear ')
    """
    if isinstance(function, nn.Module):
        return f"{type(function).__name__} {weights_of(function)[:12]}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(getattr(function, "__qualname__", None) or repr(function)))


def pair_loss(margin: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta margin), each; a margin is the clipped log r of the preferred minus that of the other."""
    return -functional.logsigmoid(beta * margin)


def check_pair_options(beta: float, clip: float | None) -> None:
    """Refuse a beta of 0 and a clip outside (0, 1).

    Raises:
        ValueError: otherwise.
    """
    if not beta or (clip is not None and not 0.0 < clip < 1.0):
        raise ValueError(f"beta must not be 0, and clip must lie in (0, 1) or be None; got {beta} and {clip}.")


def beyond(log_r: Tensor, clip: float | None) -> Tensor:
    """The share of ratios that are clipped, and so have no gradient."""
    return log_r.new_zeros(()) if clip is None else share(clipped(log_r.detach(), clip) != log_r.detach())


def share(mask: Tensor) -> Tensor:
    """How many of a mask are true, as a fraction."""
    return mask.to(torch.get_default_dtype()).mean()
