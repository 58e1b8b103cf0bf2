"""How much tuning spends, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fewstep.tuners.draws import SENSITIVITY_CALLS
from fewstep.tuners.hard import CHALLENGED
from fewstep.tuners.task import FINALISTS, GRIDS, SCREENED, UNTUNED

__all__ = ["PRICES", "Effort", "estimate", "suitable", "validation_cost"]

FIRST_SHARE = 0.7
"""Of a budget, for the method that ``"auto"`` tries first."""
SLOW = 1e-4
"""Seconds of an evaluation (one sample, one call) from which a network counts as slow, and less is spent on it by default."""


@dataclass(frozen=True)
class Effort:
    """How much is spent.

    Args:
        trajectories: exact paths that plans are fitted to.
        held_out: exact paths that they are validated on.
        pool: noises among which paths are chosen, as a multiple of `trajectories` and of `held_out`.
        reference_calls: network calls of an exact path.
        hard_pool: noises among which those are sought on which a plan goes wrong, once to mend it and once to judge it.
        hard: exact paths of the worst of them, each time.
        trials, trial_paths, polish, robust: see `Learned`.
    """

    trajectories: int = 64
    held_out: int = 160
    pool: int = 4
    reference_calls: int = 64
    hard_pool: int = 384
    hard: int = 32
    trials: int = 14
    trial_paths: int = 40
    polish: int = 1
    robust: tuple[float, ...] = (10.0,)

    def __post_init__(self) -> None:
        if self.trajectories < 1 or self.held_out < 2 or self.pool < 1 or self.reference_calls < 8:
            raise ValueError(
                f"tuning needs at least 1 trajectory, 2 held-out ones, a pool of 1 and 8 reference calls, got {self.trajectories}, "
                f"{self.held_out}, {self.pool} and {self.reference_calls}."
            )
        if not 0 < self.hard <= self.hard_pool:
            raise ValueError(f"hard must be at least 1 and at most hard_pool, got {self.hard} of {self.hard_pool}.")

    def scaled(self, factor: float) -> Effort:
        """As much more or less, in trajectories and trials."""
        return replace(
            self,
            trajectories=max(8, round(factor * self.trajectories)),
            held_out=max(32, round(factor * self.held_out)),
            hard_pool=max(64, round(factor * self.hard_pool)),
            hard=max(8, round(factor * self.hard)),
            trials=round(min(factor, 4.0) * self.trials),
            trial_paths=max(8, round(factor * self.trial_paths)),
            polish=max(1, round(min(factor, 5.0) * self.polish)),
        )


SPENDING = (16.0, 8.0, 4.0, 2.0, 1.5, 1.0, 0.75, 0.5, 0.25)
SLOW_EFFORT = Effort()
FAST_EFFORT = Effort(
    trajectories=1024,
    held_out=2048,
    pool=32,
    reference_calls=128,
    hard_pool=8192,
    hard=256,
    trials=100,
    trial_paths=512,
    polish=15,
    robust=(3.0, 30.0),
)


def suitable(seconds: float, nfe: Sequence[int], shape: Sequence[int], budget: int | None, method: str = "auto") -> Effort:
    """How much to spend on a network of this speed, within a budget of evaluations if one is given, of which ``"auto"`` leaves a share
    to later methods.

    Raises:
        ValueError: for a budget that does not suffice; the message says what does.
    """
    share = FIRST_SHARE if method == "auto" else 1.0
    if budget is None:
        return FAST_EFFORT if seconds < SLOW else SLOW_EFFORT
    for factor in SPENDING:
        effort = SLOW_EFFORT.scaled(factor)
        if estimate(effort, nfe, shape, method)[0] <= share * budget:
            return effort
    least = math.ceil(estimate(SLOW_EFFORT.scaled(SPENDING[-1]), nfe, shape, method)[0] / share)
    raise ValueError(
        f"{budget} evaluations, {budget * seconds / 60.0:.2g} minutes here, do not suffice: the least takes about {least}, "
        f"{least * seconds / 60.0:.2g} minutes. Ask for that{', or for fewer numbers of calls' if len(nfe) > 1 else ''}."
    )


def estimate(effort: Effort, nfe: Sequence[int], shape: Sequence[int], method: str = "auto") -> tuple[int, int]:
    """About how many evaluations (one sample, one call) tuning takes, and how many bytes of memory in single precision.

    Of ``"auto"`` it is what its first method takes.
    """
    size, price = int(np.prod(shape)), PRICES[FIRST if method == "auto" else method]
    total = _path_cost(effort) * effort.trajectories + validation_cost(effort, nfe) + sum(price(effort, n) for n in nfe)
    columns, polished = max(n * (n + 3) // 2 + n for n in nfe), effort.trajectories + effort.hard
    paths = effort.trajectories * 2 * effort.reference_calls + effort.held_out * 5
    return total, 4 * size * (paths + 3 * polished * columns)  # the Jacobian, weighted, and a copy


def validation_cost(effort: Effort, nfe: Sequence[int]) -> int:
    """About how many evaluations it takes to find the best untuned settings, and to judge a few plans beside them."""
    screened = len(UNTUNED) * len(GRIDS) * SCREENED + (FINALISTS + 2) * effort.held_out
    return _path_cost(effort) * effort.held_out + sum(n * screened + _challenged(effort, n) for n in nfe)


def _path_cost(effort: Effort) -> int:
    """Of an exact path, and of choosing its noise."""
    return effort.reference_calls * 9 // 8 + 2 * SENSITIVITY_CALLS * effort.pool


def _closed_form(effort: Effort, n: int) -> int:
    return n * (len(GRIDS) * effort.trial_paths + effort.trajectories + effort.held_out)


def _learned(effort: Effort, n: int) -> int:
    return _closed_form(effort, n) + n * (effort.trials * effort.trial_paths + effort.trajectories) + _polished(effort, n)


def _polished(effort: Effort, n: int) -> int:
    columns, calls = sum((i + 2) * (n - 1 - i) + (n - i) for i in range(n)), effort.reference_calls * 9 // 8
    polished = effort.trajectories * effort.polish * (columns + 9 * n) + (effort.trajectories + effort.hard) * 18 * n
    polished += effort.hard * (columns + calls) + 2 * n * effort.hard_pool
    return len(effort.robust) * (polished + 4 * n * effort.held_out)


def _challenged(effort: Effort, n: int) -> int:
    return n * (CHALLENGED + 1) * (effort.hard_pool + effort.held_out) + effort.hard * effort.reference_calls * 9 // 8


AGAIN = "learned once more"
"""The polish that is made from the untuned plan where all else that was learned is refused."""
PRICES: dict[str, Callable[[Effort, int], int]] = {
    "learned": _learned,
    AGAIN: lambda effort, n: _polished(effort, n) + _challenged(effort, n),
    "closed-form": _closed_form,
    "compensation": lambda effort, n: n * (3000 + 4 * effort.held_out),
    "statistics": lambda effort, n: 100 * min(256, effort.trajectories) + n * (800 + 4 * effort.held_out),
    "teleport": lambda effort, n: n * (3000 + 4 * effort.held_out),
    "recipe": lambda effort, n: n * 300 * effort.trajectories,
    "timesteps": lambda effort, n: n * (330 * effort.trajectories + 2 * effort.held_out),
}
"""About how many evaluations a method takes for a number of calls, by its name."""
FIRST = "learned"
"""What ``"auto"`` begins with."""
