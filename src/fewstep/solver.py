"""What a solver is: a small frozen dataclass of options that turns a noise schedule and a time grid into a `Plan`.

A solver knows no network, no tensor and no device. A multistep solver only says what its rows are; the grid, the checks and the provenance
are made here.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.artefacts import json_value
from fewstep.grids import GridRule, make_grid
from fewstep.plan import Plan, Row
from fewstep.schedules import NoiseSchedule
from fewstep.version import __version__

__all__ = ["Solver"]

Floats = NDArray[np.float64]


class Solver(abc.ABC):
    """Interface of every solver whose outer states are the nodes of its grid.

    Attributes:
        source: the paper, for the command line's list.
        cost: how many network calls a step takes, in words.
    """

    source: ClassVar[str]
    cost: ClassVar[str] = "1 call a step"

    @property
    @abc.abstractmethod
    def claimed_order(self) -> int:
        """Order of convergence to the probability-flow ODE on a finite interval; of the drift, for stochastic solvers."""

    @abc.abstractmethod
    def rows(self, schedule: NoiseSchedule, times: Floats) -> Iterator[Row]:
        """The rows of the plan on a checked grid ``"N+1"``."""

    def plan(
        self,
        schedule: NoiseSchedule,
        nfe: int | None = None,
        grid: str | GridRule | ArrayLike = "auto",
        *,
        start: float | None = None,
        final: str = "t_end",
    ) -> Plan:
        """Plan a run.

        Args:
            schedule: noise schedule of the model.
            nfe: number of network calls; may be left out if `grid` is a list of times.
            grid: a name (`fewstep.grids.grid_names`), a rule, or a list of nfe + 1 times.
            start: time to start from, for partly noised states; ``schedule.t_start`` when left out.
            final: ``"t_end"``: the state at ``schedule.t_end``; ``"zero"``: at sigma = 0, with the same number of calls.

        Raises:
            GridError: if the grid, `nfe`, `start` and `final` do not fit each other or the schedule.
            UnknownNameError: for an unknown grid or final.
        """
        times = make_grid(grid, schedule, nfe, start=start, final=final)
        return Plan(schedule, times, tuple(self.rows(schedule, times)), provenance=self._provenance(grid, start, final))

    def _provenance(self, grid: Any, start: float | None, final: str) -> dict[str, Any]:
        options = json_value(dataclasses.asdict(self))  # type: ignore[call-overload]
        named = grid if isinstance(grid, str) else repr(grid) if callable(grid) else "own"
        return {
            "solver": {"name": type(self).__name__, "options": options},
            "grid": named,
            "final": final,
            "start": start,
            "fewstep": __version__,
        }
