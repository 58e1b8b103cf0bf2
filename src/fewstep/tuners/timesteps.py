r"""The times of a given solver, searched for a model.

Source: "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model Acceleration" (arXiv
2309.10438, algorithm 1) and its official code, for `evolved`. A candidate is a set of distinct entries of a table of times. Each
generation keeps the best, mutates them (every entry replaced with probability 1/4 by one that is not in use), crosses pairs of them (every
entry from one parent or the other) and fills up with random candidates. Not as there:

- Candidates are compared by the distance of their samples from the exact ones of the same noise (or by any function of the samples), which
  ranks them with a few dozen samples; the paper's Frechet distance needs thousands, and its noise is larger than the differences ranked.
- The best few are compared once more, with noise that the search did not see among it: the best of many noisy figures is too good (the
  winner's curse).
- A crossover that has an entry twice gets a random one instead. In the code it may keep it, and the candidate silently has fewer steps.
- Candidates start from several grids, not only from the uniform one, and most mutations move an entry to a near one; in the paper, to any.
- The table is that of the model if it has discrete times, else uniform in lambda. The first and the last time stay where they are.

`continuous` searches the logarithms of the steps in lambda with CMA-ES instead, for the same price.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UnknownNameError
from fewstep.grids import make_grid
from fewstep.schedules import FromAlphasCumprod, FromBetas
from fewstep.solver import Solver
from fewstep.tuners.judge import Judge, Objective
from fewstep.tuners.task import GRIDS, UNTUNED, Candidate, Task
from fewstep.tuners.times import Steps, finite_ends

__all__ = ["SearchedTimes", "search_times", "timesteps"]

Floats = NDArray[np.float64]
Genes = tuple[int, ...]
Loss = Callable[[Floats], float]

TABLE = 1000
"""Times that a candidate of the evolution chooses from, where the model has no table of its own."""
FINALISTS = 8
GENERATIONS = 8
KEPT, MUTATED, CROSSED = 0.2, 0.5, 0.2
"""Shares of a population: parents, their mutations, their crossovers: the paper's 10, 25 and 10 of 50. The rest is random."""
CHANGE = 0.25
"""Probability that an entry mutates."""
NEAR, REACH = 0.7, 0.03
"""Probability that it moves to a near entry, not to any; standard deviation of that move, in tables."""
ATTEMPTS = 10
"""How often a candidate that was tried before is drawn anew."""


class SearchedTimes(NamedTuple):
    """What a search of times found.

    Attributes:
        times: ``"N+1"``.
        loss: on all the paths to fit to.
        tried: how many times were judged in the search.
    """

    times: Floats
    loss: float
    tried: int


def search_times(
    task: Task,
    nfe: int,
    solver: Solver,
    *,
    method: str = "evolution",
    evaluations: int = 200,
    seed: int | None = None,
    objective: Objective | None = None,
) -> SearchedTimes:
    """Times for a solver, a model and a number of calls.

    Args:
        task: the model, with exact paths; see `fewstep.tuners.preparation.prepare`.
        nfe: number of network calls.
        solver: with one call a step.
        method: ``"evolution"`` or ``"continuous"``.
        evaluations: how many candidates are judged. Each costs `nfe` calls on three quarters of the task's paths to fit to.
        seed: of the search; the task's when left out.
        objective: of samples ``"batch *shape"``, less is better; the distance from the exact ones when left out.

    Raises:
        UnknownNameError: for a method that does not exist.
        ValueError: for a solver of several calls a step, or no evaluations.
        MissingExtraError: for ``"continuous"`` without the package cmaes.

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
        >>> search_times(task, 3, fs.solvers.DPMSolverPP(), evaluations=40).times.shape
        (4,)
    """
    if method not in SEARCHES:
        raise UnknownNameError("search of times", method, SEARCHES)
    if solver.stages != 1:
        raise ValueError(f"times are searched for solvers of one call a step, not for {solver!r}.")
    judge = Judge(task, objective, evaluations)

    def plan(times: Any) -> Any:
        return solver.plan(task.schedule, grid=times, final=task.final)

    def loss(times: Floats) -> float:
        return judge(tuple(times.tolist()), lambda: plan(times))

    grids = [make_grid(grid, task.schedule, nfe, final=task.final) for grid in GRIDS]
    begun = sorted(grids, key=loss)
    if nfe > 1:
        SEARCHES[method](task, begun, loss, lambda: judge.left, task.seed if seed is None else seed)
    times, final = judge.decide({times: plan(times) for times in judge.best(FINALISTS)})
    return SearchedTimes(np.array(times), final, len(judge.losses))


def timesteps(task: Task, nfe: int, effort: object) -> Iterator[Candidate]:
    """Both searches, for the untuned solver that is best on the paths to fit to."""
    judge = Judge(task, None, len(UNTUNED) * len(GRIDS))
    for name, solver in UNTUNED.items():
        for grid in GRIDS:
            judge((name, grid), lambda solver=solver, grid=grid: solver.plan(task.schedule, nfe, grid, final=task.final))
    name = judge.best(1)[0][0]
    for method in SEARCHES:
        found = search_times(task, nfe, UNTUNED[name], method=method)
        yield task.judge(f"timesteps: {method}, {name}", UNTUNED[name].plan(task.schedule, grid=found.times, final=task.final))


def continuous(task: Task, begun: list[Floats], loss: Loss, left: Callable[[], int], seed: int) -> None:
    """Search by CMA-ES, from the best of the grids."""
    steps = Steps(task.schedule, begun[0], finite_ends(task.schedule, begun[0]))
    first = (begun[0], loss(begun[0]))
    steps.search(lambda times: (times, loss(times)), first, trials=left(), seed=seed, report=task.report)


# ---- evolution ---------------------------------------------------------------------------------------------------------------------


def evolution(task: Task, begun: list[Floats], loss: Loss, left: Callable[[], int], seed: int) -> None:
    """Search by AutoDiffusion's evolution over a table of times."""
    breeder = _Breeder(_table(task, begun[0]), begun[0], seed)
    size = max(4, left() // GENERATIONS)
    population = breeder.first([breeder.nearest(times) for times in begun], size)
    losses: dict[Genes, float] = {}
    while left() > 0:
        population = [genes for genes in population if genes not in losses]
        losses |= {genes: loss(breeder.times(genes)) for genes in population}
        if len(losses) >= math.comb(len(breeder.table), breeder.count):
            return  # all there are
        ranked = sorted(losses, key=lambda genes: losses[genes])
        task.report(f"times: {left()} trials left, loss {losses[ranked[0]]:.4g}")
        population = breeder.next(ranked[: max(2, round(KEPT * size))], size, losses)


def _table(task: Task, times: Floats) -> Floats:
    """What a candidate chooses from, between the first and the last: the times of a discrete-time model, else times uniform in lambda."""
    schedule = task.schedule
    if isinstance(schedule, (FromAlphasCumprod, FromBetas)):
        count = len(schedule.betas if isinstance(schedule, FromBetas) else schedule.alphas_cumprod)
        table = np.arange(count, 0, -1) / count
    else:
        table = schedule.t_of_lam(np.linspace(*finite_ends(schedule, times), TABLE + 2)[1:-1])
    lams, ends = schedule.lam(table), schedule.lam(times[[0, -1]])
    return table[(lams > ends[0]) & (lams < ends[1])]


class _Breeder:
    """Makes candidates: increasing tuples of distinct places in a table.

    Args:
        table: times, noisiest first.
        times: ``"N+1"``: their ends are those of every candidate, their number its number.
        seed: of what is drawn.
    """

    def __init__(self, table: Floats, times: Floats, seed: int):
        self.table, self.ends, self.count = table, times[[0, -1]], len(times) - 2
        if len(table) < self.count:
            raise ValueError(f"{self.count + 1} calls need {self.count} times between the ends, but the model has {len(table)}.")
        self.random = np.random.default_rng(seed)

    def times(self, genes: Genes) -> Floats:
        """``"N+1"``."""
        return np.concatenate([self.ends[:1], self.table[list(genes)], self.ends[1:]])

    def nearest(self, times: Floats) -> Genes:
        """The candidate nearest to a grid."""
        places = [int(np.abs(self.table - t).argmin()) for t in times[1:-1]]
        return self._filled(set(places))

    def first(self, grids: list[Genes], size: int) -> list[Genes]:
        """The grids, half as many mutations of them as there are candidates, and random ones."""
        mutants = [self._mutated(grids[k % len(grids)]) for k in range(round(MUTATED * size))]
        return self._distinct([*grids, *mutants], size, {})

    def next(self, parents: list[Genes], size: int, tried: dict[Genes, float]) -> list[Genes]:
        """Mutations of the parents, crossovers of two of them, and random candidates, none of them tried."""
        mutants = [self._new(lambda: self._mutated(self._one(parents)), tried) for _ in range(round(MUTATED * size))]
        children = [
            self._new(lambda: self._crossed(self._one(parents), self._one(parents)), tried) for _ in range(round(CROSSED * size))
        ]
        return self._distinct([*mutants, *children], size, tried)

    def _distinct(self, candidates: list[Genes], size: int, tried: dict[Genes, float]) -> list[Genes]:
        """Those not tried, each once, and random ones to make up the number."""
        new = [genes for genes in dict.fromkeys(candidates) if genes not in tried]
        return list(dict.fromkeys([*new, *(self._filled(set()) for _ in range(size - len(new)))]))

    def _new(self, draw: Callable[[], Genes], tried: dict[Genes, float]) -> Genes:
        genes = draw()
        for _ in range(ATTEMPTS):
            if genes not in tried:
                break
            genes = draw()
        return genes

    def _one(self, parents: list[Genes]) -> Genes:
        return parents[self.random.integers(len(parents))]

    def _mutated(self, genes: Genes) -> Genes:
        """Every entry replaced with probability `CHANGE`."""
        places = set(genes)
        for gene in genes:
            if self.random.random() < CHANGE:
                moved = gene + round(REACH * len(self.table) * self.random.standard_normal())
                near = self.random.random() < NEAR and 0 <= moved < len(self.table) and moved not in places
                places.discard(gene)
                places |= {moved} if near else set()
        return self._filled(places)

    def _crossed(self, first: Genes, second: Genes) -> Genes:
        """Entry by entry from one or the other."""
        mine = self.random.random(self.count) < 0.5
        return self._filled({a if own else b for a, b, own in zip(first, second, mine, strict=True)})

    def _filled(self, places: set[int]) -> Genes:
        """The places, and random ones in the stead of those that are missing."""
        places = set(places)
        while len(places) < self.count:
            places.add(int(self.random.integers(len(self.table))))
        return tuple(sorted(places))


SEARCHES = {"evolution": evolution, "continuous": continuous}
