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
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.artefacts import json_value
from fewstep.errors import GridError, PlanError, UnknownNameError
from fewstep.grids import GridRule, make_grid
from fewstep.multistep import taylor_weights
from fewstep.numerics import decaying_moments
from fewstep.plan import Entry, Plan, Row, StartTransform
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver
from fewstep.statistics import ModelStatistics

__all__ = ["Derivative", "Mixed", "Move", "Recipe", "Update"]

Floats = NDArray[np.float64]
HIGHEST_ORDER = 6
PREDICTIONS = ("data", "noise", "v3")
RELAXATIONS = ("none", "linear", "bh1", "bh2", "half_exp", "minus_half_exp")
FIRSTS = ("network", "zero", "mean")


@dataclass(frozen=True)
class Derivative:
    """How a derivative at the start of a step is estimated: that of the polynomial through the start and these points.

    Args:
        points: evaluations, counted back from the newest, which is 0. At least as many as the number of the derivative; fewer than
            the order of the step needs is a low-order estimate ("pseudo").
        relaxation: factor on a first derivative. With z = h for noise and v3 and -h for data: ``"bh1"`` z^2/2 over (e^z - 1 - z),
            ``"bh2"`` z (e^z - 1)/2 over the same, ``"half_exp"`` and ``"minus_half_exp"`` 1 + and 1 - (e^z - 1)/2; ``"linear"``
            1 + coefficient h.
        coefficient: of the linear relaxation.
    """

    points: tuple[int, ...]
    relaxation: str = "none"
    coefficient: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple(self.points))
        if len(set(self.points)) != len(self.points) or any(point < 0 for point in self.points):
            raise ValueError(f"the points of a derivative are different numbers from 0 on, got {self.points}.")
        if self.relaxation not in RELAXATIONS:
            raise UnknownNameError("relaxation", self.relaxation, RELAXATIONS)

    def factor(self, h: float, sign: float) -> float:
        """The relaxation of a step of length h; sign is -1 for data."""
        z = sign * h
        if self.relaxation == "linear":
            return 1.0 + self.coefficient * h
        if self.relaxation in ("bh1", "bh2"):
            exact = -float(decaying_moments(-z, 2)[1])  # (e^z - 1 - z) / z
            return 0.5 * (z if self.relaxation == "bh1" else math.expm1(z)) / exact
        half = 0.5 * math.expm1(z)
        return {"none": 1.0, "half_exp": 1.0 + half, "minus_half_exp": 1.0 - half}[self.relaxation]


@dataclass(frozen=True)
class Update:
    """One Taylor step.

    Args:
        derivatives: of g, the first first; the order of the step is one more than there are.
        start: from which state, counted back like the points: 0 is a multistep predictor, 1 and on a single-step method, or a corrector.
    """

    derivatives: tuple[Derivative, ...] = ()
    start: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "derivatives", tuple(self.derivatives))
        if self.start < 0 or len(self.derivatives) >= HIGHEST_ORDER:
            raise ValueError(
                f"a step has a start from 0 on and at most order {HIGHEST_ORDER}, got {self.start} and {len(self.derivatives) + 1}."
            )
        for k, derivative in enumerate(self.derivatives, start=1):
            if len(derivative.points) < k or self.start in derivative.points:
                raise ValueError(f"derivative {k} needs {k} points besides the start {self.start}, got {derivative.points}.")
            if k > 1 and derivative.relaxation != "none":
                raise ValueError(f"only a first derivative is relaxed, but derivative {k} has {derivative.relaxation!r}.")

    @property
    def order(self) -> int:
        """Of the Taylor polynomial."""
        return len(self.derivatives) + 1

    @property
    def reach(self) -> int:
        """How many evaluations it needs."""
        return 1 + max([self.start, *(point for derivative in self.derivatives for point in derivative.points)])

    @classmethod
    def through(cls, points: Sequence[int], start: int = 0, *, relaxation: str = "none", pseudo: bool = False) -> Update:
        """Every derivative from all the points, or, pseudo, the k-th from the first k."""
        count = len(points)
        kinds = [relaxation, *["none"] * count][:count]
        used = [tuple(points[:k] if pseudo else points) for k in range(1, count + 1)]
        return cls(tuple(Derivative(near, kind) for near, kind in zip(used, kinds, strict=True)), start)


@dataclass(frozen=True)
class Move:
    """The step to the next time.

    Args:
        predictor: from what is known before.
        prediction: ``"data"``, ``"noise"`` or ``"v3"``, of predictor and corrector.
        corrector: from what is known when the network has seen the predicted state; that evaluation is point 0.
        again: whether the network is called once more, on the corrected state (the "implicit" corrector). Costs a call.
    """

    predictor: Update
    prediction: str = "data"
    corrector: Update | None = None
    again: bool = False

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise UnknownNameError("prediction", self.prediction, PREDICTIONS)
        if self.corrector is not None and self.corrector.start < 1:
            raise ValueError("a corrector starts before the evaluation at its end, which is 0: its start is 1 or more.")
        if self.again and self.corrector is None:
            raise ValueError("again=True calls the network on the corrected state, but there is no corrector.")


@dataclass(frozen=True)
class Recipe:
    """All decisions of one run. Plain data: `to_json` and `from_json` are inverse.

    Args:
        moves: one a step.
        times: ``len(moves) + 1`` times, noisiest first; without them a plan says the grid.
        first: ``"network"``, or an analytic first evaluation: ``"zero"``, no data at all, so the noise is the state over sigma;
            ``"mean"``, the mean of the data. It saves a call.

    Raises:
        ValueError: if a step uses evaluations that are not there yet, or the last one would need a call for its corrector.

    Example:
        >>> recipe = Recipe.multistep(4, order=2, relaxation="bh2")  # DPM-Solver++ 2M
        >>> Recipe.from_json(recipe.to_json()) == recipe, recipe.nfe
        (True, 4)
    """

    moves: tuple[Move, ...]
    times: tuple[float, ...] | None = None
    first: str = "network"

    def __post_init__(self) -> None:
        object.__setattr__(self, "moves", tuple(self.moves))
        if self.times is not None:
            object.__setattr__(self, "times", tuple(float(t) for t in self.times))
            if len(self.times) != len(self.moves) + 1:
                raise ValueError(f"{len(self.moves)} steps have {len(self.moves) + 1} times, got {len(self.times)}.")
        if self.first not in FIRSTS:
            raise UnknownNameError("first step", self.first, FIRSTS)
        if len(self.moves) < 1 + (self.first != "network"):
            raise ValueError("a recipe needs a step that calls the network.")
        if self.moves[-1].corrector is not None:
            raise ValueError("the last step has a corrector, which would cost a call at the end. Leave it out.")
        for i, move in enumerate(self.moves):
            for update, known in ((move.predictor, i + 1), (move.corrector, i + 2)):
                if update is not None and update.reach > known:
                    raise ValueError(f"step {i} uses {update.reach} evaluations, but only {known} exist by then.")

    @property
    def nfe(self) -> int:
        """Number of network calls."""
        return len(self.moves) + sum(move.again for move in self.moves) - (self.first != "network")

    @classmethod
    def multistep(
        cls,
        steps: int,
        *,
        order: int = 2,
        prediction: str = "data",
        relaxation: str = "none",
        corrector: int | None = None,
        corrector_relaxation: str = "none",
        pseudo: bool = False,
        corrector_pseudo: bool = False,
        lower_order_final: bool = False,
        infinite_start: bool = False,
    ) -> Recipe:
        """The recipe of a multistep solver.

        Args:
            steps: how many.
            order: of the predictor; the first steps have fewer evaluations.
            prediction: of every step.
            relaxation, corrector_relaxation: of second-order updates. UniPC with the shortcut bh1 has ``"bh1"`` for both.
            corrector: its order over the predictor's: 1 is UniPC, 0 DPM-Solver-v3's; None for no corrector.
            pseudo, corrector_pseudo: low-order estimates, as in DPM-Solver-v3.
            lower_order_final: the last steps drop to orders p-1, ..., 1.
            infinite_start: the grid starts at alpha = 0, so the first evaluation serves the first step only.
        """
        moves = []
        for i in range(steps):
            usable = max(i + 1 - infinite_start, 1)
            p = min(order, usable, steps - i if lower_order_final else order)
            predictor = Update.through(range(1, p), relaxation=relaxation if p == 2 else "none", pseudo=pseudo)
            q = 0 if corrector is None or i == steps - 1 or i < infinite_start else p + corrector
            points = [0, *range(2, q)]
            relaxed = corrector_relaxation if q == 2 else "none"
            corrects = Update.through(points, 1, relaxation=relaxed, pseudo=corrector_pseudo) if q > 1 else None
            moves.append(Move(predictor, prediction, corrects))
        return cls(tuple(moves))

    @classmethod
    def singlestep(cls, steps: int, *, order: int = 2, prediction: str = "data", relaxation: str = "none") -> Recipe:
        """The recipe of a single-step solver: blocks of `order` steps, all from the state at the block's begin.

        Args:
            steps: how many, inner ones included; an odd rest is a block of lower order.
            order, prediction, relaxation: as of `multistep`.
        """
        moves = []
        for i in range(steps):
            inner = i % order
            points = range(inner)[::-1]  # the inner evaluations, those nearest to the begin first
            moves.append(Move(Update.through(points, inner, relaxation=relaxation if inner == 1 else "none"), prediction))
        return cls(tuple(moves))

    def to_json(self) -> str:
        """The recipe as JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            ValueError: if it is none.
        """

        def update(value: Any) -> Update:
            return Update(tuple(Derivative(**{**d, "points": tuple(d["points"])}) for d in value["derivatives"]), value["start"])

        try:
            value = json.loads(text)
            moves = [
                Move(
                    update(move["predictor"]),
                    move["prediction"],
                    None if move["corrector"] is None else update(move["corrector"]),
                    move["again"],
                )
                for move in value["moves"]
            ]
            return cls(tuple(moves), None if value["times"] is None else tuple(value["times"]), value["first"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no recipe: {type(error).__name__}: {error}.") from error


@dataclass(frozen=True)
class Mixed(Solver):
    """The solver that follows a recipe.

    Args:
        recipe: see `Recipe`. Its times, if it has any, are the grid; a grid given to `plan` takes their place.
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
    def claimed_order(self) -> int:
        """What the least accurate step would have if all were like it: a lower bound, 1 for multistep recipes with their first step."""
        updates = [move.predictor if move.corrector is None else move.corrector for move in self.recipe.moves]
        return max(1, min(_local_order(update) for update in updates) - 1)

    def plan(
        self,
        schedule: NoiseSchedule,
        nfe: int | None = None,
        grid: str | GridRule | ArrayLike = "auto",
        *,
        start: float | None = None,
        final: str = "t_end",
    ) -> Plan:
        plan = super().plan(schedule, nfe, grid, start=start, final=final)
        if self.recipe.first == "network":
            return plan
        times, _ = self._steps(schedule, nfe, grid, start, final)
        scale, shift = _Run(self, schedule, times).analytic_start()
        return dataclasses.replace(plan, start=StartTransform(scale, shift, time=float(times[0])))

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
