"""What a solver is: a small frozen dataclass of options that turns a noise schedule and a time grid into a `Plan`.

A solver knows no network, no tensor and no device. It only says what its rows are; the grid, how a budget of calls is spent on its steps,
the checks and the provenance are made here.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.artefacts import json_value
from fewstep.errors import GridError
from fewstep.grids import GridRule, Lambda, make_grid
from fewstep.plan import Plan, Row, StartTransform
from fewstep.schedules import NoiseSchedule
from fewstep.version import __version__

__all__ = ["Solver", "Wrapper", "check_order", "per_call"]

Floats = NDArray[np.float64]


class Solver(abc.ABC):
    """Interface of every solver.

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

    @property
    def stages(self) -> int:
        """The most calls a step takes: 1 for multistep methods. See `single_call` for the exceptions."""
        return 1

    def split(self, budget: int) -> list[int]:
        """How single-step methods spend `budget` calls on steps between finite lambdas: the calls of every step."""
        return [self.stages] * (budget // self.stages) + [budget % self.stages] * (budget % self.stages > 0)

    @property
    def even(self) -> bool:
        """Whether a grid spaces the steps, of which some take more calls than others; else it spaces the calls."""
        return False

    def most(self, steps: int) -> list[int]:
        """The calls that each of so many steps between finite lambdas can take."""
        return [self.stages] * steps

    def spent(self, budget: int, lams: Floats) -> list[int]:
        """The calls of every step if there are `budget` in all, from the first to the last of these lambdas."""
        ends = self.single_call(lams[[0, -1]])
        first = int(ends[0])
        last = int(ends[1]) if budget > 1 else 0
        return [1] * first + self.split(budget - first - last) + [1] * last

    def single_call(self, lams: Floats) -> NDArray[np.bool_]:
        """At which lambdas a step that begins or ends there takes one call: the infinite ones."""
        return np.isinf(lams)

    @abc.abstractmethod
    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        """The rows of the plan on a checked grid ``"K+1"``, ``calls[k]`` of them for step k (all 1 for a multistep method).

        Every row's tau is the time of its state's noise level.
        """

    def start_transform(self, schedule: NoiseSchedule, times: Floats, start: float | None) -> StartTransform | None:
        """What the plan makes of x_T before the first row, on a checked grid; `start` is that of `plan`. None: nothing."""
        return None

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
            grid: a name (`fewstep.grids.grid_names`), a rule, or a list of the times of the outer states: nfe + 1 for a multistep method.
                A single-step method places its inner stages between them, as many as `nfe` pays for, the early steps first.
            start: time to start from, for partly noised states; ``schedule.t_start`` when left out.
            final: ``"t_end"``: the state at ``schedule.t_end``; ``"zero"``: at sigma = 0, with the same number of calls.

        Raises:
            GridError: if the grid, `nfe`, `start` and `final` do not fit each other or the schedule.
            UnknownNameError: for an unknown grid or final.
        """
        start = None if start is None else float(start)
        times, calls = self._steps(schedule, nfe, grid, start, final)
        rows = tuple(self.rows(schedule, times, calls))
        levels = [row.tau for row in rows]
        first = self.start_transform(schedule, times, start)
        return Plan(schedule, np.array([*levels, times[-1]]), rows, first, self._provenance(grid, start, final))

    def inverse_plan(
        self,
        schedule: NoiseSchedule,
        nfe: int | None = None,
        grid: str | GridRule | ArrayLike = "auto",
        *,
        start: float | None = None,
    ) -> Plan:
        """Plan the way back: the ODE from data to noise, over the times of `plan` in reverse ("DDIM inversion" and its higher orders).

        Run it with `fewstep.sample` on data; what comes out is the noise, up to the error of the solver, and `plan` leads back.
        `fewstep.invert` solves the same ODE to a tolerance instead.

        Args:
            schedule, nfe, grid, start: as of `plan`: `start` is the noisiest time, which this plan ends at.

        Raises:
            GridError: also if sigma is 0 at the end of the data, where the noise in them is not determined.
            ValueError: for a stochastic solver, or one that transforms the noise before the first call.

        Example:
            >>> from fewstep.schedules import VPLinear
            >>> from fewstep.solvers.ddim import DDIM
            >>> plan = DDIM().inverse_plan(VPLinear(), nfe=10, grid="lambda")
            >>> float(plan.grid[0]), float(plan.grid[-1])
            (0.001, 1.0)
        """
        times, calls = self._steps(schedule, nfe, grid, start, "t_end")
        if float(schedule.sigma(times[-1])) == 0.0:
            raise GridError(
                f"the way back cannot begin at sigma = 0 (t={times[-1]:g}): clean data say nothing of the noise. Give the schedule a "
                f"t_end of a little noise, or a list of times that ends with one."
            )
        if any(row.noise is not None for row in self.rows(schedule, times, calls)):
            raise ValueError(f"{type(self).__name__} draws noise as it was given, so there is no way back.")
        if self.start_transform(schedule, times, start) is not None:
            raise ValueError(
                f"{type(self).__name__} transforms the noise before the first call, and a way back would have to undo that after the "
                f"last. Plan the way back with a solver that starts with a call."
            )
        times = times[::-1].copy()
        calls = self._shares(schedule, times, sum(calls)) if self.even else calls[::-1]
        rows = tuple(self.rows(schedule, times, calls))
        made_with = {**self._provenance(grid, start, "t_end"), "inverse": True}
        return Plan(schedule, np.array([*(row.tau for row in rows), times[-1]]), rows, provenance=made_with)

    def _steps(
        self, schedule: NoiseSchedule, nfe: int | None, grid: str | GridRule | ArrayLike, start: float | None, final: str
    ) -> tuple[Floats, list[int]]:
        """The times of the outer states, and the calls of every step between them."""
        if self.stages == 1:
            times = make_grid(grid, schedule, nfe, start=start, final=final)
            return times, [1] * (len(times) - 1)
        if not isinstance(grid, str) and not callable(grid):
            times = make_grid(grid, schedule, start=start, final=final)
            return times, self._shares(schedule, times, nfe)
        fine = make_grid(grid, schedule, nfe, start=start, final=final)
        calls = self.spent(len(fine) - 1, schedule.lam(fine))
        if self.even or grid in ("lambda", Lambda()):  # the steps, not the calls, are equally long
            return make_grid(grid, schedule, len(calls), start=start, final=final), calls
        return fine[[0, *np.cumsum(calls)]], calls

    def _shares(self, schedule: NoiseSchedule, times: Floats, nfe: int | None) -> list[int]:
        """The calls of every step of an explicit grid."""
        ends = self.single_call(schedule.lam(times))
        single = ends[:-1] | ends[1:]
        most = [1] * len(single)
        for k, calls in zip(np.flatnonzero(~single).tolist(), self.most(int((~single).sum())), strict=True):
            most[k] = calls
        if nfe is None:
            return most
        if not len(most) <= nfe <= sum(most):
            raise GridError(
                f"a grid of {len(most)} steps takes {len(most)} to {sum(most)} calls with {type(self).__name__}, but nfe={nfe}."
            )
        calls = [1] * len(most)
        for k, limit in enumerate(most):
            calls[k] += min(limit - 1, nfe - sum(calls))
        return calls

    def options(self) -> dict[str, Any]:
        """The options as JSON values, for the provenance: a wrapped solver with its own, an artefact by its digest."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: _option(value) for name, value in values.items()}

    def described(self) -> dict[str, Any]:
        """Name and options, as a plan's provenance has them."""
        return {"name": type(self).__name__, "options": self.options()}

    def _provenance(self, grid: Any, start: float | None, final: str) -> dict[str, Any]:
        named = grid if isinstance(grid, str) else repr(grid) if callable(grid) else "own"
        return {
            "solver": self.described(),
            "grid": named,
            "final": final,
            "start": start,
            "fewstep": __version__,
        }


class Wrapper(Solver):
    """Interface of solvers that change the rows, or the start, of another one and leave the rest of its planning as it is."""

    solver: Solver

    @property
    def claimed_order(self) -> int:
        return self.solver.claimed_order

    @property
    def stages(self) -> int:
        return self.solver.stages

    def split(self, budget: int) -> list[int]:
        return self.solver.split(budget)

    @property
    def even(self) -> bool:
        return self.solver.even

    def most(self, steps: int) -> list[int]:
        return self.solver.most(steps)

    def single_call(self, lams: Floats) -> NDArray[np.bool_]:
        return self.solver.single_call(lams)

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        return self.solver.rows(schedule, times, calls)

    def start_transform(self, schedule: NoiseSchedule, times: Floats, start: float | None) -> StartTransform | None:
        return self.solver.start_transform(schedule, times, start)

    def _steps(
        self, schedule: NoiseSchedule, nfe: int | None, grid: str | GridRule | ArrayLike, start: float | None, final: str
    ) -> tuple[Floats, list[int]]:
        return self.solver._steps(schedule, nfe, grid, start, final)


def check_order(order: Any, orders: Sequence[int], message: str) -> None:
    """Refuse an order that is not one of `orders`, or no int: 2.0 and True are none.

    Raises:
        ValueError: `message`, and what was given.

    Example:
        >>> check_order(2, (1, 2), "Heun has orders 1 and 2")
    """
    if type(order) is not int or order not in orders:
        raise ValueError(f"{message}, got {order!r}.")


def per_call(value: Any, what: str) -> float | tuple[float, ...]:
    """An option that is one number for all calls, or a sequence with one for each.

    Raises:
        TypeError: for anything else; `what` names the option.

    Example:
        >>> per_call([1, 2], "a scale"), per_call(1, "a scale")
        ((1.0, 2.0), 1.0)
    """
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iuf" or numbers.ndim > 1:
        raise TypeError(f"{what} must be a number, or a sequence of numbers, got {value!r:.80}.")
    return float(numbers) if numbers.ndim == 0 else tuple(numbers.astype(np.float64).tolist())


def _option(value: Any) -> Any:
    if isinstance(value, Solver):
        return value.described()
    digest = getattr(value, "digest", None)
    return json_value(value) if digest is None else digest
