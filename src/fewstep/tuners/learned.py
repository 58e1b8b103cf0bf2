r"""Plans fitted to a model: every coefficient and every time chosen so that the samples come out right.

A plan of N calls is a few dozen numbers. Given exact paths $x^*(t)$ of some noises (`Paths`), they are fitted in three stages, with forward
calls of the network only:

1. *Closed form.* With the times fixed, a row is a linear least-squares problem. Row i is fitted to
   $z_{i+1} = c_i z_i + \sum_{j \le i} w_{ij} d_j \approx x^*(t_{i+1})$, with the states z that the rows before it made, so it also mends
   what they did wrong. The unknowns are written as differences from a solver's row (the Adams method in the flow velocity) on the basis
   $z_i, d_i, d_i - d_{i-1}, d_{i-1} - d_{i-2}, \dots$, scaled to equal size, and drawn to zero by a small ridge.
2. *Times.* The steps between them, as fractions of the interval in lambda, are searched with CMA-ES, each trial judged by what stage 1
   makes of it.
3. *Polish.* All coefficients and the times handed to the network are improved together, on the error of the samples alone, by damped
   Gauss-Newton steps (Levenberg-Marquardt). The Jacobian has a column for every number of the plan, made by a finite difference: the
   rest of the run again with this number changed.

Errors are not squared as they are but capped, see `fewstep.tuners.objectives`. On a pool of other noise the polished plan is then compared
with an untuned one; where they are farthest apart, exact paths are traced and added, and the polish is repeated: a few dozen paths hold
none of the rare noises on which a fitted plan goes wrong (`fewstep.tuners.hard`). After that the last row is fitted once more with weights
of its own for every channel or element, and, as another candidate, the distance between all samples and all exact samples is made smaller
(`Matched`).

The noises that are fitted to are chosen where a small change of the noise makes a large change of the sample (`fewstep.tuners.draws`):
samples that lie between modes are few, make most of the root mean square error, and tell most about what a plan does wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.errors import UnknownNameError
from fewstep.grids import make_grid
from fewstep.plan import Plan
from fewstep.solvers import Adams
from fewstep.tuners.hard import mined
from fewstep.tuners.numbers import Numbers, combined, flat
from fewstep.tuners.paths import Paths
from fewstep.tuners.polish import Polisher, damped, differences, from_differences
from fewstep.tuners.task import GRIDS, Task, distances
from fewstep.tuners.times import Steps, finite_ends

__all__ = ["Learned"]

Floats = NDArray[np.float64]
PATHS_A_WEIGHT = 16
"""The fewest paths for every weight of an element's own: from fewer they learn the paths by heart."""
ROUNDS = 3
"""How often hard noise is sought and the polish repeated, if the plan is still worse than an untuned one on it."""
MINED_ROBUST = 3.0
"""The scale of the loss, in units of that before, once samples in the wrong mode were added: they count more then."""


@dataclass(frozen=True)
class Learned:
    """The three stages and how long each may take.

    Args:
        trials: of times in stage 2; 0 leaves it out.
        trial_paths: the paths that a trial is made on; the rows on the best times are fitted to all.
        polish: the most Jacobians; 0 leaves stage 3 out.
        ridge: how strongly rows are drawn to the solver's, relative to the mean square of every term.
        entries: ``"channel"``, ``"element"``, both or none: after the polish the last row is fitted once more in closed form, with weights
            for every channel, or for every element if there are 16 paths for each weight. Other rows keep one number for all: their
            states are what the polish has made room for.
        matched: after the polish, with the Jacobian at hand, go on towards a smaller distance between all samples and all exact ones.
        hard: exact paths that are added after a first polish, of the noises on which it went wrong (`fewstep.tuners.hard`), for another;
            0 leaves that out.
        hard_pool: noises among which they are sought.
        robust: scales s of Cauchy's loss, in medians of the samples' errors: the polish is made with each, always from the searched times.
    """

    trials: int = 100
    trial_paths: int = 256
    polish: int = 4
    ridge: float = 1e-8
    robust: tuple[float, ...] = (10.0,)
    hard: int = 0
    hard_pool: int = 384
    entries: tuple[str, ...] = ("channel", "element")
    matched: bool = True

    def __post_init__(self) -> None:
        if min(self.trials, self.polish, self.hard) < 0 or self.hard > self.hard_pool:
            raise ValueError(
                f"trials, polish and hard are counts, the last at most hard_pool, got {self.trials}, {self.polish}, {self.hard} of "
                f"{self.hard_pool}."
            )
        for name in self.entries:
            if name not in ("channel", "element"):
                raise UnknownNameError("entry", name, ("channel", "element"))
        if not (self.ridge > 0.0 and self.robust and min(self.robust) > 0.0):
            raise ValueError(f"ridge and robust must be positive, got {self.ridge:g} and {self.robust}.")

    def stages(self, task: Task, nfe: int, start: Numbers | None = None, told: str = "start") -> Iterator[tuple[str, Numbers]]:
        """The numbers after every stage: of all three, or of the polish alone if there are numbers to start from, and how they are told."""
        if start is not None:
            if self.polish:
                yield from self._polished(task, start.pooled, f"{told}, polish")
            return
        fitter, some = _Fitter(task, task.fit, self), _Fitter(task, task.fit.take(slice(self.trial_paths)), self)
        begun, loss = min((some.closed_form(times) for times in _grids(task, nfe)), key=lambda found: found[1])
        numbers, _ = fitter.closed_form(begun.times)
        yield "closed form", numbers
        if self.trials and nfe > 1:
            numbers, _ = fitter.closed_form(some.search(begun, loss).times)
            yield "times", numbers
        if self.polish:
            yield from self._polished(task, numbers, "polish")

    def _polished(self, task: Task, numbers: Numbers, stage: str) -> Iterator[tuple[str, Numbers]]:
        for robust in self.robust:
            told, polisher = f"{stage}, s = {robust:g} medians", Polisher(task, task.fit)
            polished, jacobian = polisher.paired(numbers, self.polish, robust)
            yield told, polished
            for turn in range(ROUNDS if self.hard else 0):
                found = mined(task, polished.plan(task.schedule, {}), pool=self.hard_pool, count=self.hard, turn=turn)
                if turn and not found.led_astray:
                    break
                polisher, jacobian = polisher.with_paths(found.paths, polished, jacobian)
                polished, jacobian = polisher.paired(polished, 1, MINED_ROBUST * robust, jacobian)
                told += ", mined" if not turn else " again"
                yield told, polished
            for name, groups in self._groups(task, len(polished.rows[-1]), polisher.paths.count):
                yield f"{told}, last row per {name}", polisher.last_row(polished, robust, groups)
            if self.matched and jacobian is not None:
                yield f"{told}, matched", polisher.matched(polished, jacobian, robust, task.features)

    def _groups(self, task: Task, weights: int, count: int) -> Iterator[tuple[str, NDArray[np.intp]]]:
        """The ways to part the elements of a sample that were asked for: the number of the group of every element."""
        shape = tuple(task.fit.noise.shape[1:])
        elements = np.arange(math.prod(shape))
        if "channel" in self.entries and len(shape) > 1 and shape[0] > 1:
            yield "channel", elements // math.prod(shape[1:])
        if "element" in self.entries and len(elements) > 1 and count >= PATHS_A_WEIGHT * weights:
            yield "element", elements


def _grids(task: Task, nfe: int) -> list[Floats]:
    """Where the search may begin."""
    return [make_grid(grid, task.schedule, nfe, final=task.final) for grid in GRIDS]


class _Fitter:
    """The first two stages on some paths of a task."""

    def __init__(self, task: Task, paths: Paths, options: Learned):
        self.task, self.paths, self.options = task, paths, options
        self.denoiser, self.schedule = task.denoiser, task.schedule

    # ---- closed form ---------------------------------------------------------------------------------------------------------------

    def closed_form(self, times: Floats) -> tuple[Numbers, float]:
        """The rows on these times ``"N+1"``, and the loss of the samples they make."""
        paths, count = self.paths, len(times) - 1
        state, outputs, rows = paths.noise, [], []
        for i, prior in enumerate(self._prior(times)):
            outputs.append(self.denoiser(state, float(times[i]), **paths.cond))
            target = paths.target if i == count - 1 else paths.at(float(times[i + 1]))
            rows.append(_least_squares([state, *reversed(outputs)], target, prior, self.options.ridge))
            state = combined(rows[-1], state, outputs)
        return Numbers(times[:-1].copy(), float(times[-1]), tuple(rows)), self._loss(state)

    def _prior(self, times: Floats) -> list[Floats]:
        """A solver's rows on these times, in the same form."""
        plan = Adams(order=2, prediction="flow", corrector="none").plan(self.schedule, grid=times, final=self.task.final)
        plan = Plan.from_dense(plan.dense(), self.schedule, plan.grid, tau=plan.tau)
        return [np.array([*row.carry, *row.weights], np.float64) for row in plan.rows]

    def _loss(self, samples: Tensor) -> float:
        """What the search compares: the mean of the roots of the samples' errors, squared. It is tolerant of outliers and has no scale."""
        each = distances(samples, self.paths.target)
        return float(np.sqrt(each).mean() ** 2) if np.isfinite(each).all() else math.inf

    # ---- times ---------------------------------------------------------------------------------------------------------------------

    def search(self, numbers: Numbers, loss: float) -> Numbers:
        """Better times than those, by CMA-ES over the logarithms of the steps in lambda."""
        steps = Steps(self.schedule, numbers.times, finite_ends(self.schedule, self.paths.times))
        options = {"trials": self.options.trials, "seed": self.task.seed, "report": self.task.report}
        return steps.search(self.closed_form, (numbers, loss), **options)[0]


def _least_squares(terms: list[Tensor], target: Tensor, prior: Floats, ridge: float) -> Floats:
    """The weights of z, d_i, ..., d_0 that come nearest to the target, drawn to the prior on the basis of differences."""
    columns = [flat(term).reshape(-1) for term in terms]
    known = np.zeros(len(terms))
    known[: len(prior)] = prior[: len(terms)]
    residual = flat(target).reshape(-1) - sum(float(weight) * term for weight, term in zip(known, columns, strict=True) if weight)
    basis = torch.stack(differences(columns))
    matrix, gradient = (basis @ basis.T).cpu().numpy(), (basis @ residual).cpu().numpy()
    if not (np.isfinite(matrix).all() and np.isfinite(gradient).all()):
        return known  # the trial is lost: its samples are not finite either
    return known + from_differences(damped(matrix, gradient, ridge))
