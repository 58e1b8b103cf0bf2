"""Recipes of the unified sampling framework (USF): every decision of a solver, for every step, as plain data.

Source: "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models" (arXiv 2312.07243, section 3), and its
official code. `fewstep.solvers.Mixed` turns a recipe into a plan and says what the decisions mean; a search makes recipes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.errors import UnknownNameError
from fewstep.numerics import decaying_moments

__all__ = ["Derivative", "Move", "Recipe", "Update"]

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
