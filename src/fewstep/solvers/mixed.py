r"""Recipes of the unified sampling framework (USF): every decision of a solver, made for every step by itself.

Source: "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models" (arXiv 2312.07243, section 3), and its
official code. A step goes from an earlier state x_s to the next time t by a Taylor polynomial of a prediction g in lambda,

$$ x_t = c\, x_s + e + \sum_{k=0}^{p-1} E_k\, g^{(k)}_s , $$

with the prediction (noise, data, or that of DPM-Solver-v3) and so c, e and E_k, the order p, the *start* s, and for every derivative the
evaluations that estimate it and a *relaxation*, a factor 1 + O(h) on the first derivative. A corrector is a second such step to the same
time, with the evaluation made there among its points. With an *analytic first step* the first evaluation is no network call: the data
prediction is zero or a mean of the data.

DDIM, DPM-Solver++ 2M, UniPC, DPM-Solver-v3 and their single-step relatives are such recipes. This file runs a recipe; to search one is a
tuner's work. Of the authors' search space one decision is missing: their scaling of a U-Net's skip connections, which changes the
network and is no part of a solver.

A step from or to an infinite lambda is first order on the data prediction and not corrected; a node at infinite lambda is left out of
the points of other steps, and with it the derivatives that then have too few.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.artefacts import json_value
from fewstep.errors import GridError, PlanError
from fewstep.grids import GridRule, make_grid
from fewstep.multistep import taylor_weights
from fewstep.numerics import decaying_moments
from fewstep.plan import Entry, Row, StartTransform
from fewstep.recipes import Move, Recipe, Update
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver
from fewstep.statistics import ModelStatistics

__all__ = ["Mixed"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Mixed(Solver):
    """The solver that follows a recipe.

    Args:
        recipe: see `fewstep.recipes.Recipe`. Its times, if it has any, are the grid; a grid given to `plan` takes their place.
        statistics: for steps with the prediction ``"v3"``.
        mean: for ``first="mean"``: of the data, a number or an array over one sample's shape.

    Raises:
        ValueError: if the recipe needs statistics or a mean and there is none.
        GridError: when planning, if the number of calls or of times is not the recipe's.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> Mixed(Recipe.multistep(5, order=3, corrector=1)).plan(VPLinear(), nfe=5, grid="time").nfe
        5
    """

    source: ClassVar[str] = "USF, arXiv 2312.07243"

    recipe: Recipe
    statistics: ModelStatistics | None = None
    mean: float | Floats | None = None

    def __post_init__(self) -> None:
        if self.statistics is None and any(move.prediction == "v3" for move in self.recipe.moves):
            raise ValueError("the recipe has steps with the prediction 'v3': pass statistics=.")
        if self.mean is None and self.recipe.first == "mean":
            raise ValueError("the recipe starts from the mean of the data: pass mean=.")

    def options(self) -> dict[str, Any]:
        statistics = None if self.statistics is None else self.statistics.digest
        mean = None if self.mean is None else np.asarray(self.mean).tolist()
        return json_value({"recipe": dataclasses.asdict(self.recipe), "statistics": statistics, "mean": mean})

    @property
    def stages(self) -> int:
        """2 if a step calls again at its corrected end."""
        return 1 + any(move.again for move in self.recipe.moves)

    @property
    def claimed_order(self) -> int:
        """What the least accurate step would have if all were like it: a lower bound, 1 for multistep recipes with their first step."""
        updates = [move.predictor if move.corrector is None else move.corrector for move in self.recipe.moves]
        return max(1, min(_local_order(update) for update in updates) - 1)

    def start_transform(self, schedule: NoiseSchedule, times: Floats, start: float | None) -> StartTransform | None:
        if self.recipe.first == "network":
            return None
        scale, shift = _Run(self, schedule, times).analytic_start()
        return StartTransform(scale, shift, time=float(times[0]))

    def _steps(
        self, schedule: NoiseSchedule, nfe: int | None, grid: str | GridRule | ArrayLike, start: float | None, final: str
    ) -> tuple[Floats, list[int]]:
        count = len(self.recipe.moves)
        if nfe is not None and nfe != self.recipe.nfe:
            raise GridError(f"the recipe makes {self.recipe.nfe} network calls, but nfe={nfe}. Leave nfe out, or fit it.")
        if isinstance(grid, str) and grid == "auto" and self.recipe.times is not None:
            grid = self.recipe.times
        own = not isinstance(grid, str) and not callable(grid)
        times = make_grid(grid, schedule, None if own else count, start=start, final=final)
        if len(times) != count + 1:
            raise GridError(f"the recipe has {count} steps, so its grid has {count + 1} times, not {len(times)}.")
        return times, [1] * count

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        return _Run(self, schedule, times).rows()


def _local_order(update: Update) -> int:
    """Power of h in the error of one step: of the Taylor polynomial cut off, of its estimated derivatives, of the relaxation."""
    errors = [update.order + 1]
    for derivative in update.derivatives:
        errors.append(len(derivative.points) + 2)
        errors.append(update.order + 1 if derivative.relaxation == "none" else 3)
    return min(errors)


Term = tuple[str, int]
Affine = dict[Term, Entry]
"""A sum of states ("z", j) that the network saw, of its outputs ("d", j), and of a constant ("1", 0), each times an entry."""


def _sum(*parts: tuple[Entry, Affine]) -> Affine:
    total: Affine = {}
    for factor, affine in parts:
        for term, entry in affine.items():
            total[term] = total.get(term, 0.0) + factor * entry
    return {term: entry for term, entry in total.items() if np.any(entry)}


class _Run:
    """A recipe on a grid: states and outputs as affine sums, and the rows that follow from them."""

    def __init__(self, solver: Mixed, schedule: NoiseSchedule, times: Floats):
        self.recipe, self.statistics, self.times = solver.recipe, solver.statistics, times
        self.lam, self.alpha, self.sigma = (f(times).tolist() for f in (schedule.lam, schedule.alpha, schedule.sigma))
        if self.statistics is not None:
            self.statistics.check(schedule, np.array([lam for lam in self.lam if math.isfinite(lam)]))
        self.calls = 0
        self.states: list[Affine] = []  # x of every node, corrected
        self.seen: list[Affine] = []  # the state of which `data` is the prediction
        self.data: list[Affine] = []
        if self.recipe.first == "network":
            self._call()
            return
        mean: Affine = {} if solver.mean is None or self.recipe.first == "zero" else {("1", 0): solver.mean}
        self.states.append({("x", 0): 1.0})
        self.seen.append({("x", 0): 1.0})
        self.data.append(mean)

    def analytic_start(self) -> tuple[Entry, Entry]:
        """What the first step makes of x_T: the first state that the network sees, scale and shift."""
        first = self._update(self.recipe.moves[0], self.recipe.moves[0].predictor, 1)
        return first.get(("x", 0), 0.0), first.get(("1", 0), 0.0)

    def rows(self) -> Iterator[Row]:
        for target, move in enumerate(self.recipe.moves, start=1):
            if self.calls:
                predicted = self._update(move, move.predictor, target)
                yield self._row(target - 1, predicted)
            else:
                self._undo_start(*self.analytic_start())
                predicted: Affine = {("z", 0): 1.0}
            if target == len(self.recipe.moves):
                return
            self._call()
            if move.corrector is not None:
                yield from self._correct(move, move.corrector, target, predicted)

    def _correct(self, move: Move, corrector: Update, target: int, predicted: Affine) -> Iterator[Row]:
        if math.isinf(self.lam[target - corrector.start]):
            if move.again:
                raise PlanError(
                    f"step {target - 1} starts at infinite lambda and is not corrected, but the recipe calls again there."
                )
            return
        corrected = self._update(move, corrector, target)
        self.states[target] = _sum((1.0, self.seen[target]), (1.0, corrected), (-1.0, predicted))
        if move.again:
            yield self._row(target, self.states[target])
            for nodes in (self.states, self.seen, self.data):
                nodes.pop()
            self._call()

    def _call(self) -> None:
        """A network call on a new state: a new node."""
        self.states.append({("z", self.calls): 1.0})
        self.seen.append({("z", self.calls): 1.0})
        self.data.append({("d", self.calls): 1.0})
        self.calls += 1

    def _undo_start(self, scale: Entry, shift: Entry) -> None:
        """x_T in terms of z_0, the state after the analytic step."""
        if np.any(np.asarray(scale) == 0.0):
            raise PlanError("an analytic first step into sigma = 0 leaves nothing for the network to do.")
        back = _sum((1.0 / scale, {("z", 0): 1.0}), (-shift / scale, {("1", 0): 1.0}))
        self.states[0], self.seen[0] = back, back

    def _row(self, node: int, following: Affine) -> Row:
        """The row of the newest call, at this node."""
        newest = self.calls - 1
        z, d = ([j for kind, j in following if kind == name] for name in ("z", "d"))
        carry = tuple(following.get(("z", j), 0.0) for j in range(newest, min(z, default=newest) - 1, -1))
        weights = tuple(following.get(("d", j), 0.0) for j in range(newest, min(d, default=newest) - 1, -1))
        return Row(float(self.times[node]), carry, weights, offset=following.get(("1", 0), 0.0))

    def _update(self, move: Move, update: Update, target: int) -> Affine:
        """The state at the target node, by one Taylor step from what is known."""
        newest = len(self.states) - 1
        s = newest - update.start
        h = self.lam[target] - self.lam[s]
        if math.isinf(h):
            carry = self.sigma[target] / self.sigma[s]
            return _sum((carry, self.states[s]), (self.alpha[target] - self.alpha[s] * carry, self.data[s]))
        used, derivatives, factor = [s], [], 1.0
        for k, derivative in enumerate(update.derivatives, start=1):
            near = [newest - point for point in derivative.points if math.isfinite(self.lam[newest - point])]
            if len(near) < k:
                break
            if k == 1:
                factor = derivative.factor(h, -1.0 if move.prediction == "data" else 1.0)
            used += [node for node in near if node not in used]
            derivatives.append([used.index(node) for node in near])
        carry, moments, offset, maps = self._form(move.prediction, s, target, used, len(derivatives) + 1)
        if derivatives:
            moments[1] = factor * moments[1]
        weights = taylor_weights(moments, [self.lam[node] - self.lam[s] for node in used], derivatives)
        offset = offset + sum(w * v for w, (_, v) in zip(weights, maps, strict=True))
        parts = [(w * u, self._quantity(move.prediction, node)) for w, (u, _), node in zip(weights, maps, used, strict=True)]
        return _sum((carry, self.states[s]), *parts, (offset, {("1", 0): 1.0}))

    def _form(
        self, prediction: str, s: int, target: int, used: list[int], count: int
    ) -> tuple[Entry, list[Entry], Entry, list[tuple[Entry, Entry]]]:
        """c, the E_k, e, and u and v of g = u f + v for the used nodes."""
        lam, alpha, sigma = self.lam, self.alpha, self.sigma
        if prediction == "v3":
            assert self.statistics is not None
            found = self.statistics.integrals(lam[s], lam[target], count=count)
            decay = np.exp(-found.L)
            scale = -alpha[target] * decay
            maps: list[tuple[Entry, Entry]] = [self.statistics.align(lam[node], lam[s]) for node in used]
            moments: list[Entry] = [scale * moment for moment in found.moments]
            return alpha[target] / alpha[s] * decay, moments, scale * found.forcing, maps
        h = lam[target] - lam[s]
        kept, scale, sign = (sigma, alpha[target], 1.0) if prediction == "data" else (alpha, sigma[target], -1.0)
        powers = [scale * m * h**k / math.factorial(k) for k, m in enumerate(decaying_moments(sign * h, count).tolist())]
        return kept[target] / kept[s], [*powers], 0.0, [(1.0, 0.0)] * len(used)

    def _quantity(self, prediction: str, node: int) -> Affine:
        """The prediction at a node, which the network made of the state that it saw."""
        if prediction == "data":
            return self.data[node]
        if prediction == "noise":
            return _sum((1.0 / self.sigma[node], self.seen[node]), (-self.alpha[node] / self.sigma[node], self.data[node]))
        assert self.statistics is not None
        gain = (1.0 - self.statistics.at(self.lam[node])) / self.alpha[node]
        return _sum((gain, self.seen[node]), (-1.0, self.data[node]))
