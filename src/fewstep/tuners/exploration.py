r"""Pure exploration: which of some configurations is best for each of several tasks, in few evaluations.

`pick` has four ways. Two spend a *budget*:

- ``"uniform"``: every configuration is measured as often.
- ``"successive-halving"``: rounds of equal cost; after each the worse half goes (Karnin, Koren and Somekh, "Almost optimal exploration in
  multi-armed bandits", ICML 2013; here a configuration keeps its measurements of earlier rounds).

Two stop by themselves with a given *confidence*, and take the reward of configuration x in task m for linear, $x^T \theta_m$ plus noise:

- ``"single-design"``: every phase t measures by the design that is best for the differences of what is left, until differences of
  $2^{-t}$ are seen, and drops what is worse by more (Fiez, Jain, Jamieson and Ratliff, "Sequential experimental design for transductive
  linear bandits", arXiv 1906.08399). It measures once more for every arm of the design, which is the most that rounding can cost.
- ``"double-design"``: DouExpDes (Du, Huang and Sun, "Multi-task representation learning for pure exploration in linear bandits",
  arXiv 2302.04441). The tasks share $\theta_m = B w_m$ with B of few columns. Every phase first measures by an E-optimal design in all
  tasks and takes B as the leading eigenvectors of $Z = \frac{1}{M T} \sum_{m,j} \hat\theta_{m,j} \hat\theta_{m,j}^T - \sigma^2 X^+
  (X^+)^T$, the mean of outer products less what noise adds to it, and then goes on as above in the few dimensions of $B^T x$.

The number of measurements in the theorem for B is far beyond any use. Here phase t has as many batches as make the first-order error of
B half of $2^{-t}$ if the $\theta_m$ are about 1 long and spread evenly over the columns, $4^{t+1} \sigma^2 d k \|X^+\|^2 / M$ times
`sample_scale`, kept from phase to phase; so the confidence of ``"double-design"`` is that of a known B, and heuristic. And it measures for
B only where that is expected to pay: where it costs less than the share $1 - k / d$ of what the phase costs without. Measured against each
other: ``benchmarks/exploration.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.errors import UnknownNameError
from fewstep.tuners.designs import e_design, g_design, rounded, support

__all__ = ["EXPLORATIONS", "Picked", "halvings", "leading_subspace", "pick"]

Floats = NDArray[np.float64]
Task = Callable[[int, int], ArrayLike]
"""(configuration, count) -> so many independent rewards; more is better."""
EXPLORATIONS = ("double-design", "single-design", "successive-halving", "uniform")
BATCH_SHARE = 4
"""The E-optimal batch has so many measurements a dimension."""
MOST_PHASES = 40
MOST_DIRECTIONS = 2000
DESIGN_STEPS = 200


@dataclass(frozen=True)
class Picked:
    """What was found.

    Attributes:
        best: the configuration of every task.
        evaluations: measurements in all.
        phases: of the designs, rounds of the halving.
        subspace: B of ``"double-design"``, ``"d k"``, as last measured; None if that never paid, and of the others.
    """

    best: tuple[int, ...]
    evaluations: int
    phases: int
    subspace: Floats | None = None


def pick(
    configurations: ArrayLike,
    tasks: Sequence[Task],
    method: str = "double-design",
    *,
    confidence: float | None = None,
    noise: float | None = None,
    rank: int | None = None,
    sample_scale: float = 0.1,
    epsilon: float = 0.0,
    budget: int | None = None,
) -> Picked:
    """Find the best configuration for every task.

    Args:
        configurations: ``"n d"``: features of each; ``numpy.eye(n)`` where nothing is known about them.
        tasks: measure.
        method: see `fewstep.tuners.exploration`.
        confidence: of the designs: that all answers are right, up to `epsilon`.
        noise: of the designs: standard deviation of a reward, or more.
        rank: of ``"double-design"``: columns of B.
        sample_scale: of ``"double-design"``: measurements for B; 0.1 took the fewest that did not cost answers in the benchmark.
        epsilon: of the designs: differences below this are not looked for; without it, two equal best ones would never be told apart.
        budget: of ``"successive-halving"`` and ``"uniform"``: measurements of each task.

    Raises:
        UnknownNameError: for a method that does not exist.
        ValueError: for what the method needs and has not, or has and does not need; for features that do not span their space.

    Example:
        >>> chance = np.random.default_rng(0)
        >>> def task(k, count):
        ...     return [0.0, 0.3, 1.0][k] + 0.1 * chance.standard_normal(count)
        >>> pick(np.eye(3), [task], "single-design", confidence=0.95, noise=0.1).best
        (2,)
        >>> pick(np.eye(3), [task], "successive-halving", budget=12).best
        (2,)
    """
    arms = np.asarray(configurations, np.float64)
    if method not in EXPLORATIONS:
        raise UnknownNameError("method of exploration", method, EXPLORATIONS)
    if arms.ndim != 2 or len(arms) < 2 or not np.isfinite(arms).all() or not tasks:
        raise ValueError(f"pick needs at least 2 configurations (n, d) and a task, got shape {arms.shape} and {len(tasks)} tasks.")
    given = {"confidence": confidence, "noise": noise, "rank": rank, "budget": budget}
    needed = {"double-design": {"confidence", "noise", "rank"}, "single-design": {"confidence", "noise"}}.get(method, {"budget"})
    wrong = sorted(name for name, value in given.items() if (value is not None) != (name in needed))
    if wrong:
        raise ValueError(f"{method} needs {' and '.join(sorted(needed))} and nothing else; wrong: {', '.join(wrong)}.")
    if budget is not None:
        return _pick_within(len(arms), tasks, method, budget)
    assert confidence is not None
    assert noise is not None
    if not (0.0 < confidence < 1.0 and noise > 0.0 and epsilon >= 0.0 and sample_scale > 0.0):
        raise ValueError("confidence must be within (0, 1), noise and sample_scale positive, epsilon at least 0.")
    if rank is not None and not 1 <= rank <= arms.shape[1]:
        raise ValueError(f"rank must be within 1 and the {arms.shape[1]} features, got {rank}.")
    return _Elimination(arms, tasks, 1.0 - confidence, noise, epsilon).run(rank, sample_scale)


# ---- within a budget -----------------------------------------------------------------------------------------------------------------


def halvings(count: int) -> int:
    """Rounds until one of `count` is left, the worse half going every time.

    Example:
        >>> halvings(5)
        3
    """
    return max(1, math.ceil(math.log2(count)))


def _pick_within(count: int, tasks: Sequence[Task], method: str, budget: int) -> Picked:
    rounds = 1 if method == "uniform" else halvings(count)
    if budget < count * rounds:
        raise ValueError(f"{method} of {count} configurations needs a budget of at least {count * rounds}, got {budget}.")
    best, spent = [], 0
    for task in tasks:
        alive, sums, counts = list(range(count)), np.zeros(count), np.zeros(count)
        for _ in range(rounds):
            each = budget // (rounds * len(alive))
            for k in alive:
                sums[k] += np.sum(_rewards(task, k, each))
                counts[k] += each
                spent += each
            alive.sort(key=lambda k: -sums[k] / counts[k])
            alive = alive[: 1 if method == "uniform" else math.ceil(len(alive) / 2)]
        best.append(alive[0])
    return Picked(tuple(best), spent, rounds)


def _rewards(task: Task, configuration: int, count: int) -> Floats:
    rewards = np.asarray(task(configuration, count), np.float64)
    if rewards.shape != (count,) or not np.isfinite(rewards).all():
        raise ValueError(f"a task has to return {count} finite rewards, got shape {rewards.shape}.")
    return rewards


# ---- with a confidence ---------------------------------------------------------------------------------------------------------------


def leading_subspace(estimates: Floats, noise_part: Floats, rank: int) -> Floats:
    """The leading eigenvectors ``"d k"`` of the mean of outer products less what noise adds.

    Args:
        estimates: ``"m d"``: estimates of the tasks' parameters, each with the same covariance.
        noise_part: ``"d d"``: that covariance.
        rank: k.
    """
    second = estimates.T @ estimates / len(estimates) - noise_part
    return np.linalg.eigh(second)[1][:, ::-1][:, :rank]


@dataclass(frozen=True)
class _Measurement:
    """How often to measure each configuration, as a share, for one task in one phase; the features it is for; and how often in all."""

    seen: Floats
    design: Floats
    count: int


class _Elimination:
    """Phases of measuring and dropping."""

    def __init__(self, arms: Floats, tasks: Sequence[Task], risk: float, noise: float, epsilon: float):
        self.arms, self.tasks, self.risk, self.noise, self.epsilon = arms, tasks, risk, noise, epsilon
        self.spent = 0

    def run(self, rank: int | None, sample_scale: float) -> Picked:
        alive = {m: list(range(len(self.arms))) for m in range(len(self.tasks))}
        shared = None if rank is None else _Shared(self, rank, sample_scale)
        whole = np.linalg.svd(self.arms, full_matrices=False)[2].T  # a basis of what the arms span
        for phase in range(1, MOST_PHASES + 1):
            gap = max(2.0**-phase, 0.5 * self.epsilon)
            open_tasks = [m for m, left in alive.items() if len(left) > 1]
            measured = {m: self._measurement(alive[m], self.arms @ whole, gap, phase) for m in open_tasks}
            if shared is not None and shared.pays(phase, sum(planned.count for planned in measured.values())):
                seen = self.arms @ shared.basis(phase)
                measured = {m: self._measurement(alive[m], seen, gap, phase) for m in open_tasks}
            for m in open_tasks:
                means = self._estimates(self.tasks[m], measured[m])
                order = sorted(alive[m], key=lambda k: -means[k])
                alive[m] = [k for k in order if means[order[0]] - means[k] <= gap]
            if gap <= 0.5 * self.epsilon or all(len(left) == 1 for left in alive.values()):
                best = tuple(left[0] for left in alive.values())
                return Picked(best, self.spent, phase, None if shared is None else shared.found)
        raise ValueError(f"after {MOST_PHASES} phases some configurations are still equal: give epsilon.")

    def _measurement(self, alive: list[int], seen: Floats, gap: float, phase: int) -> _Measurement:
        """What shows differences among those alive to `gap`, with the confidence over all pairs, tasks and phases."""
        left = seen[alive]
        pairs = np.array([a - b for a, b in itertools.combinations(left, 2)])
        if len(pairs) > MOST_DIRECTIONS:  # a difference is at most twice the greatest one from the centre
            pairs = 2.0 * (left - left.mean(0))
        design, worst = g_design(seen, pairs, iterations=DESIGN_STEPS)
        union = len(self.arms) ** 2 * len(self.tasks) * phase * (phase + 1) / self.risk
        count = math.ceil(2.0 * self.noise**2 * worst * math.log(union) / gap**2)
        return _Measurement(seen, design, count + support(design))  # so many more that rounding takes nothing off

    def _estimates(self, task: Task, planned: _Measurement) -> Floats:
        """Estimated rewards of all configurations by least squares."""
        counts = rounded(planned.design, planned.count)
        rows = np.flatnonzero(counts)
        averages = np.array([_rewards(task, int(k), int(counts[k])).mean() for k in rows])
        self.spent += planned.count
        weights = np.sqrt(counts[rows].astype(np.float64))
        found = np.linalg.lstsq(weights[:, None] * planned.seen[rows], weights * averages, rcond=None)[0]
        return planned.seen @ found


class _Shared:
    """What all tasks share, from the same batch of measurements in each, phase after phase."""

    def __init__(self, parent: _Elimination, rank: int, sample_scale: float):
        self.parent, self.rank, self.sample_scale = parent, rank, sample_scale
        arms = parent.arms
        design = e_design(arms)
        self.counts = rounded(design, max(BATCH_SHARE * arms.shape[1], support(design)))
        self.rows = np.flatnonzero(self.counts)
        weights = np.sqrt(self.counts[self.rows].astype(np.float64))
        self.inverse = np.linalg.pinv(weights[:, None] * arms[self.rows])  # d rows, of averages times weights
        self.weights = weights
        self.sums, self.batches = np.zeros((len(parent.tasks), len(self.rows))), 0
        self.found: Floats | None = None

    def _more(self, phase: int) -> int:
        """Batches that are missing."""
        parent = self.parent
        amplified = float(np.linalg.norm(self.inverse, 2)) ** 2 * parent.arms.shape[1] * self.rank
        wanted = self.sample_scale * parent.noise**2 * amplified * 4.0 ** (phase + 1) / len(parent.tasks)
        return max(0, max(1, math.ceil(wanted)) - self.batches)

    def pays(self, phase: int, without: int) -> bool:
        """Whether to measure for B is expected to cost less than it saves, of the measurements of a phase without it."""
        price = self._more(phase) * int(self.counts.sum()) * len(self.parent.tasks)
        return price < (1.0 - self.rank / self.parent.arms.shape[1]) * without

    def basis(self, phase: int) -> Floats:
        """B after this phase's measurements."""
        parent, more = self.parent, self._more(phase)
        if more:
            for m, task in enumerate(parent.tasks):
                for place, k in enumerate(self.rows):
                    count = more * int(self.counts[k])
                    self.sums[m, place] += _rewards(task, int(k), count).sum() / self.counts[k]
                    parent.spent += count
            self.batches += more
        estimates = (self.weights * self.sums / self.batches) @ self.inverse.T
        self.found = leading_subspace(estimates, parent.noise**2 / self.batches * self.inverse @ self.inverse.T, self.rank)
        return self.found
