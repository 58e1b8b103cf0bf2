r"""Recipes searched for a model: all decisions of a solver, for every step, by evolution against a predictor.

Source: "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models" (arXiv 2312.07243, section 4: S^3, the
multi-stage search with a predictor), whose released code has the evolution but not the predictor. A stage is

1. evaluate candidates: the loss of the samples of each recipe (`fewstep.recipes.Recipe`), which costs network calls;
2. fit a predictor to the logarithms of all losses so far;
3. evolve a population for some generations, judged by the predictor alone, which costs none;
4. the best of it, and some at random, are the candidates of the next stage.

In the end the times and relaxations of the best two are polished (`fewstep.tuners.relaxations`), which the paper does not do.

The decisions: times, orders, predictions, starts, the points of derivatives, relaxations, correctors, and an analytic first step, which
leaves a call for another step. The mean of the data that such a step needs is read off the exact paths.

Not as there. The predictor is a Gaussian process on the plan that a recipe makes (steps in lambda, dense coefficients) instead of a network
on the decisions: recipes that differ in words and make the same plan are then the same, and a few dozen evaluations suffice. The loss is
the distance from exact samples instead of a Frechet distance. The search starts from published solvers. Finalists are compared with noise
that the search did not see.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import FewstepError, MissingExtraError
from fewstep.grids import make_grid
from fewstep.plan import Plan
from fewstep.recipes import Derivative, Move, Recipe, Update
from fewstep.solvers import Mixed
from fewstep.tuners.judge import Judge, Objective
from fewstep.tuners.relaxations import polished
from fewstep.tuners.task import GRIDS, Candidate, Task
from fewstep.tuners.times import Steps, finite_ends

__all__ = ["SearchedRecipe", "recipe", "search_recipe"]

Floats = NDArray[np.float64]
FIRST_SHARE = 0.3
"""Of the evaluations, in the first stage."""
STAGES = 8
"""After the first."""
PARENTS, BRED, GENERATIONS = 24, 100, 8
"""Recipes that a generation comes from, its size, and the generations of a stage."""
AT_RANDOM = 0.15
"""Share of a stage's candidates that the predictor has no say in."""
POLISH, POLISHED = 0.4, 2
"""Share of the evaluations that polish the best recipes; how many recipes."""
MOST_POLISH = 0.6
"""The most that the polish takes of the evaluations after the first stage."""
FAILED = 1e6
"""What counts as the residual where there is no finite one."""
FINALISTS = 8
CROSSING = 0.4
"""Probability that a recipe has two parents."""
ANEW, RELAXED = 0.05, 0.6
"""Probabilities that a step is decided anew, and that a relaxation moves."""
TIME_CHANGE, TIME_SPREAD = 0.6, 0.5
"""Probability that the times move; the largest standard deviation of the logarithms of their steps."""
FIRST_CHANGE = 0.05
"""Probability of another first step."""
ORDERS = (0.2, 0.4, 0.3, 0.1)
"""Probabilities of orders 1 to 4, those of the authors' code; of a corrector and of a low-order estimate, 1/2."""
EARLIER_START = 0.1
"""Probability that a step is single-step."""
RELAXATION_SPREAD = 0.3
"""The largest standard deviation of the coefficient of a linear relaxation."""
ATTEMPTS = 20
"""How often a mutation that is no recipe, or has no plan here, is drawn anew."""
WORST = 0.9
"""Losses above this quantile are taken for it by the predictor: how bad the bad ones are says nothing."""


class SearchedRecipe(NamedTuple):
    """What a search of recipes found.

    Attributes:
        recipe: with its times.
        mean: of the data, for an analytic first step.
        plan: of both.
        loss: on all the paths to fit to.
        tried: how many recipes were judged in the search.
    """

    recipe: Recipe
    mean: Floats
    plan: Plan
    loss: float
    tried: int


def search_recipe(
    task: Task, nfe: int, *, evaluations: int = 300, seed: int | None = None, objective: Objective | None = None
) -> SearchedRecipe:
    """A recipe for a model and a number of calls.

    Args:
        task: the model, with exact paths; see `fewstep.tuners.preparation.prepare`.
        nfe: number of network calls.
        evaluations: how many recipes are judged. Each costs `nfe` calls on three quarters of the task's paths to fit to.
        seed: of the search; the task's when left out.
        objective: of samples ``"batch *shape"``, less is better; the distance from the exact ones when left out.

    Raises:
        ValueError: for no evaluations.
        MissingExtraError: without scikit-learn.

    Example:
        >>> import fewstep as fs
        >>> from fewstep.tuners import Effort
        >>> from fewstep.tuners.preparation import prepare
        >>> from fewstep.tuners.draws import Draws
        >>> from fewstep.tuners.task import Counted
        >>> exact = fs.exact.GaussianMixture(fs.schedules.VPLinear(), [[-1.0, 0.0], [1.0, 0.5]], 0.05)
        >>> counted = Counted(exact, 256)
        >>> draws = Draws(counted, fs.draw_noise((2,), range(32)), {}, 0)
        >>> task = prepare(counted, draws, Effort(trajectories=32, held_out=16, pool=1), final="t_end", seed=0)
        >>> search_recipe(task, 3, evaluations=60).plan.nfe
        3
    """
    judge = Judge(task, objective, evaluations)
    breeder = _Breeder(task, nfe, task.seed if seed is None else seed)
    candidates = breeder.published()
    while len(candidates) < evaluations * FIRST_SHARE:
        candidates.append(breeder.bred(candidates))
    most = int(MOST_POLISH * max(0, evaluations - len(candidates)))
    polish = min(round(POLISH * evaluations), most) if objective is None else 0
    batch = math.ceil((evaluations * (1.0 - FIRST_SHARE) - polish) / STAGES)
    while judge.left > polish and any(found not in judge.losses for found in candidates):
        for found in candidates:
            judge(found, lambda found=found: breeder.plan(found))
        task.report(f"recipes: {len(judge.losses)} of {evaluations} trials, loss {judge.losses[judge.best(1)[0]]:.4g}")
        candidates = breeder.evolved(judge, min(batch, judge.left - polish)) if judge.left > polish else []
    begun = judge.best(POLISHED) if polish else []
    for k, found in enumerate(begun, start=1):
        spare = polish * (POLISHED - k) // POLISHED
        polished(lambda each, spare=spare: breeder.residuals(each, judge, spare), found, task.schedule)
    chosen, loss = judge.decide({found: breeder.plan(found) for found in [*begun, *judge.best(FINALISTS)]})
    return SearchedRecipe(chosen, breeder.mean, breeder.plan(chosen), loss, len(judge.losses))


def recipe(task: Task, nfe: int, effort: object) -> Iterator[Candidate]:
    """The recipe that the search finds."""
    yield task.judge("recipe", search_recipe(task, nfe).plan)


class _Breeder:
    """Makes recipes, and plans of them.

    Args:
        task: schedule, end and mean of the data.
        nfe: calls of every recipe.
        seed: of what is drawn.
    """

    def __init__(self, task: Task, nfe: int, seed: int):
        self.task, self.nfe, self.schedule = task, nfe, task.schedule
        self.random = np.random.default_rng(seed)
        self.mean: Floats = task.fit.predictions[0].double().mean(0).cpu().numpy()
        self.plans: dict[Recipe, Plan] = {}

    def plan(self, found: Recipe) -> Plan:
        """Of a recipe.

        Raises:
            FewstepError: if it has none here.
        """
        if found not in self.plans:
            self.plans[found] = Mixed(found, mean=self.mean).plan(self.schedule, final=self.task.final)
        return self.plans[found]

    def residuals(self, found: Recipe, judge: Judge, spare: int) -> Floats | None:
        """Of all elements of the samples of a recipe that is tried; None if no more than some evaluations are left."""
        if judge.left <= spare:
            return None
        if not self._valid(found):
            return np.full(judge.seen.target.numel(), FAILED)
        samples = judge.samples(found, lambda: self.plan(found))
        return np.nan_to_num(
            (samples - judge.seen.target).double().flatten().cpu().numpy(), nan=FAILED, posinf=FAILED, neginf=FAILED
        )

    def features(self, found: Recipe) -> Floats:
        """What the predictor sees of a recipe: the steps in lambda and the dense coefficients of its plan, per unit of signal."""
        plan = self.plan(found)
        dense, signal = plan.dense(), np.maximum(self.schedule.alpha(plan.grid[1:]), 1e-6)
        lams = np.clip(self.schedule.lam(plan.grid), *finite_ends(self.schedule, plan.grid))
        weights = [np.mean(entry) for i, row in enumerate(dense.B[1:]) for entry in row[: i + 1] / signal[i]]
        return np.array([*lams[:-1], *np.log(np.maximum(np.diff(lams), 1e-6)), *weights])

    # ---- recipes -------------------------------------------------------------------------------------------------------------------

    def published(self) -> list[Recipe]:
        """Published multistep solvers on several grids, as they are and with an analytic first step."""
        options = [{"order": 2, "relaxation": "bh2"}, {"order": 3}, {"order": 2, "corrector": 1}]
        options += [{"order": p, "prediction": "noise"} for p in (2, 3)]
        made = []
        for first, steps in (("network", self.nfe), ("mean", self.nfe + 1)):
            for grid in GRIDS:
                times = tuple(make_grid(grid, self.schedule, steps, final=self.task.final).tolist())
                made += [replace(Recipe.multistep(steps, **chosen), times=times, first=first) for chosen in options]
        return [found for found in dict.fromkeys(made) if self._valid(found)]

    def bred(self, parents: list[Recipe]) -> Recipe:
        """A mutation of one of the parents, or of a crossover of two."""
        for _ in range(ATTEMPTS):
            try:
                found = self._one(parents)
                if self.random.random() < CROSSING:
                    found = self._crossed(found, self._one(parents))
                found = self._mutated(found)
            except ValueError:  # it uses what is not there
                continue
            if self._valid(found):
                return found
        return self._one(parents)

    def evolved(self, judge: Judge, count: int) -> list[Recipe]:
        """New candidates: the best of some generations by the predictor, and some at random."""
        predict = _predictor([self.features(found) for found in judge.losses], list(judge.losses.values()))
        begun, told = judge.best(PARENTS), dict[Recipe, float]()
        parents = begun
        for _ in range(GENERATIONS):
            bred = dict.fromkeys(self.bred(parents) for _ in range(BRED))
            new = [found for found in bred if found not in judge.losses and found not in told]
            if new:
                told.update(zip(new, predict([self.features(found) for found in new]).tolist(), strict=True))
            parents = [*sorted(told, key=lambda found: told[found])[:PARENTS], *begun]
        free = round(AT_RANDOM * count)
        best = sorted(told, key=lambda found: told[found])[: count - free]
        return [*best, *(self.bred(begun) for _ in range(free))]

    def _valid(self, found: Recipe) -> bool:
        """Whether it has a plan here."""
        try:
            return bool(np.isfinite(self.features(found)).all())
        except FewstepError:
            return False

    def _one(self, parents: list[Recipe]) -> Recipe:
        return parents[self.random.integers(len(parents))]

    def _crossed(self, first: Recipe, second: Recipe) -> Recipe:
        """Every step from one or the other, and the times of one of them."""
        if len(first.moves) != len(second.moves):
            return first
        mine = self.random.random(len(first.moves)) < 0.5
        moves = tuple(a if own else b for a, b, own in zip(first.moves, second.moves, mine, strict=True))
        return replace(self._one([first, second]), moves=moves)

    def _mutated(self, found: Recipe) -> Recipe:
        if self.random.random() < FIRST_CHANGE:
            found = self._other_first(found)
        scale = 10.0 ** -self.random.random()
        moves = [self._changed(move, i, i == len(found.moves) - 1, scale) for i, move in enumerate(found.moves)]
        return replace(found, moves=tuple(moves), times=self._moved(np.array(found.times), scale))

    def _moved(self, times: Floats, scale: float) -> tuple[float, ...]:
        if len(times) == 2 or self.random.random() >= TIME_CHANGE:
            return tuple(times.tolist())
        steps = Steps(self.schedule, times, finite_ends(self.schedule, times))
        moved = steps.times(steps.logs + scale * TIME_SPREAD * self.random.standard_normal(len(steps.logs)))
        return tuple(moved.tolist())

    def _other_first(self, found: Recipe) -> Recipe:
        """With an analytic first step and one step more, or without."""
        times = np.array(found.times)
        if found.first != "network":
            return replace(found, moves=found.moves[1:], times=tuple(np.delete(times, 1).tolist()), first="network")
        low, high = finite_ends(self.schedule, times)
        lams = np.clip(self.schedule.lam(times[:2]), low, high)
        between = float(self.schedule.t_of_lam(lams.mean()))
        first = ("zero", "mean")[self.random.integers(2)]
        return replace(found, moves=(Move(Update()), *found.moves), times=tuple(np.insert(times, 1, between).tolist()), first=first)

    def _changed(self, move: Move, i: int, last: bool, scale: float) -> Move:
        """The step, decided anew or with its relaxations moved."""
        if self.random.random() < ANEW:
            return self._decided(i, last)
        corrector = None if move.corrector is None else self._relaxed(move.corrector, scale)
        return replace(move, predictor=self._relaxed(move.predictor, scale), corrector=corrector)

    def _decided(self, i: int, last: bool) -> Move:
        start = int(self.random.integers(i + 1)) if self.random.random() < EARLIER_START else 0
        predictor = self._through([k for k in range(i + 1) if k != start], start)
        corrector = None
        if not last and self.random.random() < 0.5:
            points = [0, *range(2, i + 2)]
            corrector = self._through(points, 1, least=2)
        return Move(predictor, ("data", "noise")[self.random.integers(2)], corrector)

    def _through(self, points: list[int], start: int, least: int = 1) -> Update:
        """A step of some order through the first of these points."""
        order = min(max(least, 1 + int(self.random.choice(len(ORDERS), p=ORDERS))), 1 + len(points))
        return Update.through(points[: order - 1], start, pseudo=self.random.random() < 0.5)

    def _relaxed(self, update: Update, scale: float) -> Update:
        """The step with its first derivative relaxed otherwise, perhaps."""
        if not update.derivatives or self.random.random() >= RELAXED:
            return update
        old, *others = update.derivatives
        coefficient = old.coefficient + scale * RELAXATION_SPREAD * float(self.random.standard_normal())
        return replace(update, derivatives=(Derivative(old.points, "linear", coefficient), *others))


def _predictor(features: list[Floats], losses: list[float]) -> Callable[[list[Floats]], Floats]:
    """A Gaussian process of the logarithm of the loss (of the loss itself, if some are negative): its mean less its standard deviation."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "tune", "Searching recipes") from error
    target = np.log(losses) if min(losses) > 0.0 else np.array(losses)
    target = np.minimum(target, np.quantile(target[np.isfinite(target)], WORST))
    kernel = ConstantKernel() * Matern(5.0, (0.3, 100.0), nu=2.5) + WhiteKernel(1e-2, (1e-6, 1.0))
    process = make_pipeline(StandardScaler(), GaussianProcessRegressor(kernel, normalize_y=True, random_state=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a scale at its bound does no harm
        process.fit(np.array(features), target)

    def predict(new: list[Floats]) -> Floats:
        mean, spread = process.predict(np.array(new), return_std=True)
        return mean - spread

    return predict
