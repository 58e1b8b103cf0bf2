r"""Restart: go through an interval of noise levels several times, back up by noise and down again by the ODE.

Source: "Restart Sampling for Improving Generative Processes" (arXiv 2306.14878, section 3.1). With $\varrho = \sigma/\alpha$,
$y = x/\alpha$ and an interval $[\varrho_\text{low}, \varrho_\text{high}]$, the state at the low end becomes one at the high end,

$$ y_\text{high} = y_\text{low} + S_\text{noise} \sqrt{\varrho_\text{high}^2 - \varrho_\text{low}^2}\;\xi , $$

from which the ODE is solved down again, on a grid of its own. The noise contracts what errors earlier steps made, as churn does, but in a
few jumps, between which the solver is one of the ODE.

The noise of a jump is tied to its number: no two are alike, and runs with other numbers of calls have the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.errors import GridError
from fewstep.grids import GridRule, Karras
from fewstep.plan import Interval, Row
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver, Wrapper

__all__ = ["Restart"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Restart(Wrapper):
    """A solver of the ODE that goes through intervals of noise levels several times.

    Args:
        solver: of the ODE; the paper's is `EDMHeun`.
        intervals: of each (low, high, steps, times): noise levels sigma / alpha, moved to the nearest of the grid's; how many steps go
            down, spaced as Karras' grid; and how often.
        s_noise: positive; deviation of the added noise relative to what was.

    Raises:
        ValueError: for a value outside its range.
        GridError: when planning, if the calls do not pay for the restarts, or the grid has no two levels for an interval.

    Note:
        The calls of a plan are those of the grid's steps and of all restarts. A method that remembers forgets at every jump.

    Example:
        >>> from fewstep.schedules import EDM
        >>> from fewstep.solvers.edm import EDMHeun
        >>> solver = Restart(EDMHeun(), [(0.1, 2.0, 3, 2)])
        >>> plan = solver.plan(EDM(), nfe=27, grid="karras", final="zero")
        >>> plan.nfe, sum(row.noise is not None for row in plan.rows)
        (27, 2)
    """

    source: ClassVar[str] = "Restart Sampling for Improving Generative Processes, arXiv 2306.14878"

    solver: Solver
    intervals: Sequence[tuple[float, float, int, int]]
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "intervals", tuple(map(_checked, self.intervals)))
        if not (math.isfinite(self.s_noise) and self.s_noise > 0.0):
            raise ValueError(f"s_noise must be positive, got {self.s_noise:g}.")

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        jumps, first = self._jumps(schedule, times), 0
        spent = [count - jumps[k].calls if k in jumps else count for k, count in enumerate(calls)]
        made = 0
        for k, jump in sorted(jumps.items()):
            paths = [(times[first : k + 2], spent[first : k + 1]), *[(jump.times, jump.shares)] * jump.repeats]
            for last, (path, shares) in enumerate(paths, start=1):
                rows = list(self._plain(schedule, path, shares))
                if last < len(paths):
                    rows[-1] = self._raised(schedule, rows[-1], jump, made)
                    made += 1
                yield from rows
            first = k + 1
        yield from self._plain(schedule, times[first:], spent[first:])

    def _plain(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        for row in self.solver.rows(schedule, times, calls) if len(calls) else ():
            if row.noise is not None:
                raise ValueError(
                    f"Restart is for solvers of the ODE, but {type(self.solver).__name__} draws noise as it was given."
                )
            yield row

    def _raised(self, schedule: NoiseSchedule, row: Row, jump: _Jump, made: int) -> Row:
        """The row, and the jump from the low end of the interval to its high end."""
        alpha, sigma = schedule.alpha(jump.times[[0, -1]]).tolist(), schedule.sigma(jump.times[[0, -1]]).tolist()
        rise = alpha[0] / alpha[1]
        scale = self.s_noise * math.sqrt((sigma[0] - rise * sigma[1]) * (sigma[0] + rise * sigma[1]))
        return dataclasses.replace(
            row,
            carry=tuple(rise * c for c in row.carry),
            weights=tuple(rise * w for w in row.weights),
            offset=rise * row.offset,
            noise=Interval(scale, 2.0 * made, 2.0 * made + 1.0),
        )

    def _steps(
        self, schedule: NoiseSchedule, nfe: int | None, grid: str | GridRule | ArrayLike, start: float | None, final: str
    ) -> tuple[Floats, list[int]]:
        cost = sum(times * sum(self.solver.most(steps)) for _, _, steps, times in self.intervals)
        if nfe is not None and nfe <= cost:
            raise GridError(f"the restarts alone take {cost} calls, but nfe={nfe}. Ask for more calls, or restart less.")
        times, calls = self.solver._steps(schedule, None if nfe is None else nfe - cost, grid, start, final)
        for k, jump in self._jumps(schedule, times).items():
            calls[k] += jump.calls
        return times, calls

    def _jumps(self, schedule: NoiseSchedule, times: Floats) -> dict[int, _Jump]:
        """The restarts, by the step of the grid after which they come."""
        lams, jumps = schedule.lam(times), {}
        for low, high, steps, count in self.intervals:
            lower, upper = (int(np.argmin(np.abs(lams + math.log(level)))) for level in (low, high))
            if upper >= lower or lower - 1 in jumps or not np.isfinite(lams[[lower, upper]]).all():
                raise GridError(f"the grid has no two levels near {low:g} and {high:g} for a restart, or another one ends there.")
            path = Karras()(schedule, steps, float(times[upper]), float(times[lower]))
            path[[0, -1]] = times[[upper, lower]]
            jumps[lower - 1] = _Jump(path, tuple(self.solver.most(steps)), count)
        return jumps


class _Jump(NamedTuple):
    """Restarts of one interval: the times of the way down, the calls of its steps, and how often it is gone."""

    times: Floats
    shares: tuple[int, ...]
    repeats: int

    @property
    def calls(self) -> int:
        return self.repeats * sum(self.shares)


def _checked(interval: Any) -> tuple[float, float, int, int]:
    low, high, steps, times = interval
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"an interval needs noise levels 0 < low < high, got {low:g} and {high:g}.")
    if any(type(count) is not int or count < 1 for count in (steps, times)):
        raise ValueError(f"an interval needs whole numbers of steps and times, at least 1, got {steps!r} and {times!r}.")
    return float(low), float(high), steps, times
