"""Times as numbers that a search may change freely: the logarithms of their steps in lambda, and a search of them by CMA-ES."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import MissingExtraError
from fewstep.grids import FINITE_LAM
from fewstep.schedules import NoiseSchedule

__all__ = ["Steps", "finite_ends"]

T = TypeVar("T")
Floats = NDArray[np.float64]
SHORTEST = 1e-4
"""The shortest step a search begins with, as a fraction of the interval in lambda."""
SPREAD = 0.3
"""Standard deviation of the first trials, in the logarithms."""


def finite_ends(schedule: NoiseSchedule, times: Floats) -> tuple[float, float]:
    """Lambda at the first and the last time, or where rules stop if it is infinite there."""
    low, high = (float(lam) for lam in schedule.lam(times[[0, -1]]))
    low = low if math.isfinite(low) else min(FINITE_LAM[0], high - 1.0)
    return low, high if math.isfinite(high) else max(FINITE_LAM[1], low + 1.0)


class Steps:
    """Times as the logarithms of their steps in lambda, within the finite part of the interval.

    Args:
        schedule: noise schedule.
        times: ``"N+1"``, where a search begins; the ends are kept.
        lams: the finite part of the interval in lambda, see `finite_ends`.

    Example:
        >>> from fewstep.schedules import EDM
        >>> times = np.array([80.0, 5.0, 0.5, 0.002])
        >>> steps = Steps(EDM(), times, finite_ends(EDM(), times))
        >>> steps.times(steps.logs).round(3).tolist()
        [80.0, 5.0, 0.5, 0.002]
    """

    def __init__(self, schedule: NoiseSchedule, times: Floats, lams: tuple[float, float]):
        self.schedule, self.ends = schedule, times[[0, -1]]
        self.low, self.high = lams
        steps = np.diff(np.clip(schedule.lam(times), self.low, self.high))
        self.logs = np.log(np.maximum(steps, SHORTEST * (self.high - self.low)))

    def times(self, logs: Floats) -> Floats:
        """``"N+1"``."""
        steps = np.exp(logs - logs.max())
        lams = self.low + (self.high - self.low) * np.cumsum(steps)[:-1] / steps.sum()
        return np.concatenate([self.ends[:1], self.schedule.t_of_lam(lams), self.ends[1:]])

    def search(
        self,
        judge: Callable[[Floats], tuple[T, float]],
        best: tuple[T, float],
        *,
        trials: int,
        seed: int,
        report: Callable[[str], None],
    ) -> tuple[T, float]:
        """Better times, by CMA-ES ("The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772).

        Args:
            judge: what times ``"N+1"`` make, and its loss.
            best: what the first times make, and its loss.
            trials: how many calls of `judge`, up to a whole number of generations.
            seed: of the trials.
            report: called with a line after every generation.

        Returns:
            the best of all, the first included.

        Raises:
            MissingExtraError: without the package cmaes.
        """
        try:
            from cmaes import CMA
        except ImportError as error:
            raise MissingExtraError("cmaes", "tune", "Searching times") from error
        search, tried = CMA(mean=self.logs, sigma=SPREAD, seed=seed), 0
        while tried < trials and not search.should_stop():
            found = []
            for _ in range(search.population_size):
                logs = search.ask()
                judged = judge(self.times(logs))
                found.append((logs, judged[1] if math.isfinite(judged[1]) else 1e300))
                best = min(best, judged, key=lambda pair: pair[1])
            search.tell(found)
            tried += len(found)
            report(f"times: {tried} of {trials} trials, loss {best[1]:.4g}")
        return best
