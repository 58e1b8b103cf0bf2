r"""When workers that train on their own average their parameters: rules, and the volume they cost.

Local SGD: K workers start a *round* with equal parameters, do H steps each on data of their own, and average. A rule gives H for the round
that starts after t of T steps, from t and from $\eta_t$, the learning rate of the round's first step. H changes at averages only, and the
last round is cut, so that step T ends with an average:

| rule | H | source |
| --- | --- | --- |
| `QSR` | $\max(H_\text{base}, \lfloor(\alpha/\eta_t)^2\rfloor)$, Quadratic Synchronization Rule | arXiv 2310.14423, eq. 2 |
| `InversePower` | the same with another power; 1 and 3 are the paper's comparisons | the same, section 2 |
| `ConstantH` | constant | arXiv 1805.09767 |
| `PostLocal` | 1 up to a step, another rule from there on | arXiv 1808.07217 |

An average moves as many bytes as one all-reduce of the gradient, which data-parallel training does every step: the relative volume is
rounds / T.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = [
    "QSR",
    "CommunicationVolume",
    "ConstantH",
    "InversePower",
    "PostLocal",
    "Synchronization",
    "communication_volume",
    "warmup_cosine",
]

SMALLEST_RATE = 1e-12
"""Learning rates are at least this before they divide: a cosine ends at 0, and the end of training cuts the round anyway."""
LARGEST_POWER = 10.0


class Synchronization(abc.ABC):
    """A rule for the number of local steps.

    Attributes:
        total_steps: steps of the whole run; the last one ends with an average.
    """

    total_steps: int

    @abc.abstractmethod
    def wanted(self, step: int, learning_rate: float) -> int:
        """H before the last round is cut."""

    def period(self, step: int, learning_rate: float) -> int:
        """H of the round that starts after `step` steps.

        Args:
            step: steps done, 0 at the start.
            learning_rate: that of the round's first step.

        Returns:
            at least 1, and no more than is left of `total_steps`; beyond them, 1.

        Raises:
            ValueError: if the learning rate is negative or not finite.

        Example:
            >>> QSR(alpha=0.0175, h_base=4, warmup_steps=10_000, total_steps=93_600).period(60_000, 0.0025)
            49
        """
        if not (math.isfinite(learning_rate) and learning_rate >= 0.0):
            raise ValueError(f"a synchronization rule needs a learning rate that is finite and not negative, got {learning_rate}.")
        return max(1, min(self.wanted(step, learning_rate), self.total_steps - step))


@dataclass(frozen=True)
class ConstantH(Synchronization):
    """An average every `h` steps. With h = 1 and SGD, with or without momentum, this is data-parallel training.

    Args:
        h: steps of a round.
        total_steps: steps of the run.

    Example:
        >>> rule = ConstantH(4, total_steps=10)
        >>> [rule.period(step, 0.1) for step in (0, 4, 8)]
        [4, 4, 2]
    """

    h: int
    total_steps: int

    def __post_init__(self) -> None:
        _check_counts(h=(self.h, 1), total_steps=(self.total_steps, 1))

    def wanted(self, step: int, learning_rate: float) -> int:
        return self.h


@dataclass(frozen=True)
class QSR(Synchronization):
    r"""The Quadratic Synchronization Rule, $H = \max(H_\text{base}, \lfloor(\alpha/\eta)^2\rfloor)$ after the warm-up.

    Args:
        alpha: the learning rate at which H would be 1. To be tuned: the paper searches 0.015 to 0.02 for AdamW, 0.2 to 0.3 for SGD.
        h_base: smallest H.
        warmup_steps: steps with `h_warmup`.
        total_steps: steps of the run.
        h_warmup: H during the warm-up; None is `h_base`, as in the paper's runs.

    Note:
        In the authors' code the power is 1 unless ``--power 2`` is given, and H of the warm-up is an option of its own. Parameters are
        compared in double precision as they are: 0.3 / 0.1 is less than 3, so its square gives H = 8.

    Example:
        >>> rule = QSR(alpha=0.2, h_base=2, warmup_steps=5, total_steps=100)
        >>> [rule.period(0, 0.01), rule.period(10, 0.8), rule.period(50, 0.05), rule.period(90, 0.05)]
        [2, 2, 16, 10]
    """

    alpha: float
    h_base: int
    warmup_steps: int
    total_steps: int
    h_warmup: int | None = None

    def __post_init__(self) -> None:
        _check_power(self)

    def wanted(self, step: int, learning_rate: float) -> int:
        return _inverse_power(self, 2.0, step, learning_rate)


@dataclass(frozen=True)
class InversePower(Synchronization):
    r"""$H = \max(H_\text{base}, \lfloor(\alpha/\eta)^p\rfloor)$: what `QSR` is compared with, p = 1 and p = 3.

    Args:
        power: p.
        alpha, h_base, warmup_steps, total_steps, h_warmup: as in `QSR`.

    Example:
        >>> InversePower(3.0, alpha=0.2, h_base=2, warmup_steps=0, total_steps=1000).period(50, 0.05)
        64
    """

    power: float
    alpha: float
    h_base: int
    warmup_steps: int
    total_steps: int
    h_warmup: int | None = None

    def __post_init__(self) -> None:
        _check_power(self)
        if not 0.0 < self.power <= LARGEST_POWER:
            raise ValueError(f"InversePower needs a power above 0, at most {LARGEST_POWER:g}, got {self.power}.")

    def wanted(self, step: int, learning_rate: float) -> int:
        return _inverse_power(self, self.power, step, learning_rate)


@dataclass(frozen=True)
class PostLocal(Synchronization):
    """An average every step up to `switch_step`, then another rule: early local steps slow the descent.

    Args:
        switch_step: the first step after which the other rule may choose.
        after: the rule from there on.

    Example:
        >>> rule = PostLocal(2, ConstantH(4, total_steps=10))
        >>> [rule.period(step, 0.1) for step in (0, 1, 2, 6)]
        [1, 1, 4, 4]
    """

    switch_step: int
    after: Synchronization

    def __post_init__(self) -> None:
        _check_counts(switch_step=(self.switch_step, 0))

    @property
    def total_steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.after.total_steps

    def wanted(self, step: int, learning_rate: float) -> int:
        return 1 if step < self.switch_step else self.after.wanted(step, learning_rate)


def _inverse_power(rule: QSR | InversePower, power: float, step: int, learning_rate: float) -> int:
    if step < rule.warmup_steps:
        return rule.h_base if rule.h_warmup is None else rule.h_warmup
    quotient = (rule.alpha / max(learning_rate, SMALLEST_RATE)) ** power
    return max(rule.h_base, math.floor(min(quotient, float(rule.total_steps))))


def _check_power(rule: QSR | InversePower) -> None:
    if not (math.isfinite(rule.alpha) and rule.alpha >= 0.0):
        raise ValueError(f"{type(rule).__name__} needs an alpha that is finite and not negative, got {rule.alpha}.")
    warmup = {} if rule.h_warmup is None else {"h_warmup": (rule.h_warmup, 1)}
    _check_counts(h_base=(rule.h_base, 1), warmup_steps=(rule.warmup_steps, 0), total_steps=(rule.total_steps, 1), **warmup)


def _check_counts(**counts: tuple[int, int]) -> None:
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


# ---- the volume, before a run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CommunicationVolume:
    """What a rule will communicate.

    Attributes:
        periods: H of every round; their sum is the number of steps.
    """

    periods: tuple[int, ...]

    @property
    def steps(self) -> int:
        return sum(self.periods)

    @property
    def rounds(self) -> int:
        return len(self.periods)

    @property
    def relative(self) -> float:
        """Rounds per step: the share of what data-parallel training moves."""
        return self.rounds / self.steps

    def payload_bytes(self, elements: int, element_size: int = 4) -> int:
        """Bytes that every worker hands to the collectives in the run.

        Args:
            elements: numbers in the model, plus those of averaged optimizer states.
            element_size: 4; 8 for parameters in double precision.
        """
        return self.rounds * elements * element_size

    def show(self, elements: int, workers: int, element_size: int = 4) -> str:
        """The volume in words; "on the wire" is that of a ring all-reduce, 2 (K - 1) / K times the payload.

        Example:
            >>> print(communication_volume(ConstantH(4, 10), [0.1] * 10).show(1_000_000, workers=4))
            10 steps, 3 rounds of 2 to 4 steps: 30.0000 % of data-parallel training
            payload per worker: 12 MB, data-parallel 40 MB; on the wire with 4 workers: 18 MB, data-parallel 60 MB
        """
        payload, parallel = self.payload_bytes(elements, element_size), self.steps * elements * element_size
        wire = 2.0 * (workers - 1) / workers
        return (
            f"{self.steps} steps, {self.rounds} rounds of {min(self.periods)} to {max(self.periods)} steps: "
            f"{100.0 * self.relative:.4f} % of data-parallel training\n"
            f"payload per worker: {_bytes(payload)}, data-parallel {_bytes(parallel)}; "
            f"on the wire with {workers} workers: {_bytes(wire * payload)}, data-parallel {_bytes(wire * parallel)}"
        )


def communication_volume(
    sync: Synchronization, learning_rates: Sequence[float] | Callable[[int], float], total_steps: int | None = None
) -> CommunicationVolume:
    """Plan the rounds of a run, without running it.

    Args:
        sync: the rule.
        learning_rates: of every step, or a function of the number of steps done before it; one that has ``total_steps``, as that of
            `warmup_cosine`, must be of as many.
        total_steps: of the run; the rule knows them, so this is only checked against the rule.

    Raises:
        ValueError: if the numbers of steps differ.

    Example:
        >>> rates = warmup_cosine(0.008, total_steps=93_600, warmup_steps=10_000)    # ViT-B in the paper, 300 epochs
        >>> plan = communication_volume(QSR(0.0175, 4, 10_000, 93_600), rates)
        >>> plan.rounds, plan.relative
        (9711, 0.10375)
    """
    total = sync.total_steps if total_steps is None else total_steps
    if total != sync.total_steps:
        raise ValueError(f"the rule was made for {sync.total_steps} steps, not for {total}; make it with total_steps={total}.")
    if isinstance(learning_rates, Sequence) and len(learning_rates) != total:
        raise ValueError(f"a run of {total} steps needs as many learning rates, got {len(learning_rates)}.")
    if (theirs := getattr(learning_rates, "total_steps", total)) != total:
        raise ValueError(f"the learning rates are those of {theirs} steps, the rule's of {total}; make both with one total_steps.")
    rate = learning_rates if callable(learning_rates) else learning_rates.__getitem__
    periods: list[int] = []
    step = 0
    while step < total:
        periods.append(sync.period(step, float(rate(step))))
        step += periods[-1]
    return CommunicationVolume(tuple(periods))


def warmup_cosine(peak: float, *, total_steps: int, warmup_steps: int = 0) -> Callable[[int], float]:
    """The learning rates of the paper: linear up to `peak`, then half a cosine over what is left.

    Returns:
        a function of the number of steps done, which `communication_volume` can ask for its ``total_steps``.

    Example:
        >>> rate = warmup_cosine(1.0, total_steps=12, warmup_steps=2)
        >>> [round(rate(step), 3) for step in (0, 1, 2, 7)]
        [0.5, 1.0, 1.0, 0.5]
    """
    return _WarmupCosine(peak, total_steps, warmup_steps)


@dataclass(frozen=True)
class _WarmupCosine:
    peak: float
    total_steps: int
    warmup_steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return 0.5 * self.peak * (1.0 + math.cos(math.pi * share))


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g} B"
