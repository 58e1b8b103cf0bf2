r"""The numbers of a recipe, its times and the relaxations of its steps, made better with all decisions as they are.

A relaxation multiplies the first derivative of a step by $1 + c\,h$. With the logarithms of the steps in lambda these are a dozen numbers,
and a run tells much more of them than its loss: how every element of every sample moves. So a Jacobian of forward differences, one run a
number, and damped Gauss-Newton steps gain in 50 runs what evolution gains in hundreds. Residuals enter as $\log(1 + r^2 / s^2)$: a sample
that ends in another mode is not brought back by a small change, and should not decide about the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import MissingExtraError
from fewstep.recipes import Derivative, Move, Recipe, Update
from fewstep.schedules import NoiseSchedule
from fewstep.tuners.times import Steps, finite_ends

__all__ = ["Relaxations", "polished"]

Floats = NDArray[np.float64]
STEP = 1e-3
"""Of the differences."""
ROBUST = 3.0
"""The scale s of the residuals, in medians of theirs at the start."""


class Relaxations:
    """The logarithms of a recipe's steps in lambda, and one coefficient for every first derivative.

    Args:
        recipe: with its times.
        schedule: noise schedule.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> recipe = replace(Recipe.multistep(2, relaxation="bh2"), times=(1.0, 0.4, 0.001))
        >>> numbers = Relaxations(recipe, VPLinear())
        >>> len(numbers.values), [len(move.predictor.derivatives) for move in numbers.recipe(numbers.values).moves]
        (3, [0, 1])
    """

    def __init__(self, recipe: Recipe, schedule: NoiseSchedule):
        times = np.array(recipe.times)
        self.start, self.ends = recipe, finite_ends(schedule, times)
        self.steps = Steps(schedule, times, self.ends)
        lams = np.clip(schedule.lam(times), *self.ends)
        coefficients = [
            _coefficient(update, move.prediction, lams[i + 1] - lams[newest - update.start])
            for i, move in enumerate(recipe.moves)
            for newest, update in ((i, move.predictor), (i + 1, move.corrector))
            if update is not None and update.derivatives
        ]
        self.values: Floats = np.array([*self.steps.logs, *coefficients])

    def recipe(self, values: Floats) -> Recipe:
        """The recipe with other numbers."""
        count = len(self.steps.logs)
        coefficients = iter(values[count:].tolist())
        moves = tuple(self._move(move, coefficients.__next__) for move in self.start.moves)
        return replace(self.start, moves=moves, times=tuple(self.steps.times(values[:count]).tolist()))

    def _move(self, move: Move, coefficient: Callable[[], float]) -> Move:
        predictor = _relaxed(move.predictor, coefficient)
        return replace(
            move, predictor=predictor, corrector=None if move.corrector is None else _relaxed(move.corrector, coefficient)
        )


def polished(residuals: Callable[[Recipe], Floats | None], recipe: Recipe, schedule: NoiseSchedule) -> None:
    """Try better numbers of a recipe.

    Args:
        residuals: of a recipe's samples, of all elements; None when no more are to be had. It remembers what it was asked for.
        recipe: with its times.
        schedule: noise schedule.

    Raises:
        MissingExtraError: without SciPy.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise MissingExtraError("SciPy", "tune", "Polishing recipes") from error
    numbers, here = Relaxations(recipe, schedule), dict[bytes, Floats]()

    def at(values: Floats) -> Floats:
        found = residuals(numbers.recipe(values))
        if found is None:
            raise _SpentError
        here[values.tobytes()] = found
        return found

    def jacobian(values: Floats) -> Floats:
        base = here[values.tobytes()]
        return np.stack([(at(values + change) - base) / STEP for change in STEP * np.eye(len(values))], axis=1)

    try:
        scale = ROBUST * float(np.median(np.abs(at(numbers.values))))
        derivatives: Any = jacobian  # the stubs know of names only
        least_squares(at, numbers.values, derivatives, loss="cauchy", f_scale=scale)
    except _SpentError:
        return


class _SpentError(Exception):
    """There are no more evaluations."""


def _coefficient(update: Update, prediction: str, h: float) -> float:
    """Of the linear relaxation that is as the one there is, in a step of length h."""
    derivative = update.derivatives[0]
    return (derivative.factor(h, -1.0 if prediction == "data" else 1.0) - 1.0) / h if math.isfinite(h) and h != 0.0 else 0.0


def _relaxed(update: Update, coefficient: Callable[[], float]) -> Update:
    if not update.derivatives:
        return update
    first, *others = update.derivatives
    return replace(update, derivatives=(Derivative(first.points, "linear", coefficient()), *others))
