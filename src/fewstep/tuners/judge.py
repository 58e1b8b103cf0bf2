"""What searches compare: the loss of a plan, on some paths while searching, on all of them among the finalists."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fewstep.tuners.paths import Paths
from fewstep.tuners.task import distances

__all__ = ["Judge", "Objective", "Runs", "mean_error"]

Objective = Callable[[Tensor], float]
SHARE = 0.75
"""Of the paths to fit to, so many are searched on."""


def mean_error(samples: Tensor, exact: Tensor) -> float:
    """The mean of the samples' distances from the exact ones, inf if one is not finite.

    The mean of the squares is decided by the few samples that end in another mode, and a search on few paths then fits to these.

    Example:
        >>> import torch
        >>> mean_error(torch.tensor([[4.0], [0.0], [0.0], [0.0]]), torch.zeros(4, 1))
        1.0
    """
    each = distances(samples, exact)
    return float(each.mean()) if np.isfinite(each).all() else math.inf


class Runs(Protocol):
    """What makes samples of what is searched: a `fewstep.tuners.task.Task` of plans, others of other things."""

    @property
    def fit(self) -> Paths:
        """The paths to search on."""
        ...

    def run(self, plan: Any, paths: Paths) -> Tensor:
        """The samples ``"batch *shape"`` of the paths' noise."""
        ...


@dataclass
class Judge:
    """Compares plans, or what else is run: on three quarters of a task's paths to fit to while searching, on all of them among the
    finalists.

    The best of many noisy figures is too good (the winner's curse), so the last choice is made with noise that the search did not see.
    With that noise alone it was worse: there is little of it.

    Args:
        task: its paths to fit to are divided.
        objective: of samples ``"batch *shape"``, less is better; the distance from the exact ones when left out.
        evaluations: how many plans may be judged while searching.

    Attributes:
        losses: what was tried while searching, and its loss.
    """

    task: Runs
    objective: Objective | None
    evaluations: int

    def __post_init__(self) -> None:
        if self.evaluations < 1:
            raise ValueError(f"a search needs at least 1 evaluation, got {self.evaluations}.")
        self.seen = self.task.fit.take(slice(max(1, round(SHARE * self.task.fit.count))))
        self.losses: dict[Any, float] = {}

    @property
    def left(self) -> int:
        """Plans that may still be judged."""
        return self.evaluations - len(self.losses)

    def __call__(self, key: Hashable, plan: Callable[[], Any]) -> float:
        """The loss while searching, of what `key` stands for; inf when there is no evaluation left for it."""
        if key not in self.losses:
            if not self.left:
                return math.inf
            self.losses[key] = self.loss(plan(), self.seen)
        return self.losses[key]

    def samples(self, key: Hashable, plan: Callable[[], Any]) -> Tensor:
        """The samples of what `key` stands for, which is one evaluation, on the paths of the search."""
        samples = self.task.run(plan(), self.seen)
        self.losses[key] = self.of(samples, self.seen)
        return samples

    def best(self, count: int) -> list[Any]:
        """The keys of the least losses, the least first."""
        return sorted(self.losses, key=lambda key: self.losses[key])[:count]

    def loss(self, plan: Any, paths: Paths) -> float:
        """Of the samples that a plan makes."""
        return self.of(self.task.run(plan, paths), paths)

    def of(self, samples: Tensor, paths: Paths) -> float:
        """The loss of samples."""
        return mean_error(samples, paths.target) if self.objective is None else float(self.objective(samples))

    def decide(self, plans: dict[Any, Any]) -> tuple[Any, float]:
        """The key of the best plan on all the paths, and its loss."""
        losses = {key: self.loss(plan, self.task.fit) for key, plan in plans.items()}
        key = min(losses, key=lambda key: losses[key])
        return key, losses[key]
