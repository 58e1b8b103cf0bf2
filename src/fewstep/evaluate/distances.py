r"""How far two sets of samples are apart as distributions, with an interval, a floor and a test.

Every distance sees two sets of vectors, ``"n d"`` and ``"m d"``: pixels, or features of a network (`fewstep.evaluate.features`).

- `Frechet`: $|m_1 - m_2|^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1 C_2)^{1/2})$ of the means and covariances, the squared Wasserstein-2
  distance of the Gaussians that have them; FID with Inception's features ("GANs Trained by a Two Time-Scale Update Rule", arXiv
  1706.08500, eq. 6). Too large by about 1/n.
- `KID`: squared maximum mean discrepancy with the kernel $(x \cdot y / d + 1)^3$ ("Demystifying MMD GANs", arXiv 1801.01401, section 4),
  over all pairs rather than over blocks. Unbiased for independent draws, so it can be negative.
- `MMD`: the same with a sum of Gaussian kernels ("A Kernel Two-Sample Test", JMLR 13, 2012, eq. 3). Unbiased likewise.
- `SlicedWasserstein`: root of the mean over random directions of the squared Wasserstein-2 distance of the projections ("Sliced and Radon
  Wasserstein Barycenters of Measures", JMIV 51, 2015), exact in every direction.
- `Wasserstein`: the exact Wasserstein-2 distance, by an optimal assignment of sets of equal size and an optimal transport of others, also
  of weighted points (`wasserstein_of_points`). For sets of up to about a thousand, draws of a mixture among them. Too large by about
  $n^{-1/d}$, which is much.

A figure of a finite set says little alone: two sets from *one* distribution are some way apart too. `measure` therefore adds three things.

*Interval.* Where the figure of other sets of the same sizes from the same two distributions would lie: every set is drawn anew from itself
with replacement, and the spread of the results around their mean is put around the figure. (Around their mean, because repeated
draws add a bias of their own. The interval is for the expected figure *at these sizes*, not for infinite sets.)

*Floor and test.* Both sets are thrown together and parted at random into sets of the same sizes. The mean of these distances is the floor:
what sets of these sizes show if nothing distinguishes them. The share of them that is at least as large as the figure, p, is
an exact test of that ("Permutation Tests", Good, 2000): under equal distributions p <= 0.05 happens to 5 % of independent draws.

*Groups.* Sets with a fixed number of samples of every class are more alike than independent draws; what holds for independent draws
would be far too wide for them (for features of a classifier, several times). Given the classes, all of this is done within each.

All of it is decided by one seed. Optimal assignments need SciPy, optimal transports POT (``pip install "fewstep[evaluate]"``).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fewstep.errors import MissingExtraError, UnknownNameError

__all__ = [
    "DISTANCES",
    "KID",
    "MMD",
    "Distance",
    "Excess",
    "Frechet",
    "Measured",
    "SlicedWasserstein",
    "Wasserstein",
    "excess",
    "frechet_of_gaussians",
    "make_distances",
    "measure",
    "wasserstein_of_points",
]

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
FEW = 100
"""Sets of fewer samples than this are told apart only if they differ much."""
Statistic = Callable[[Counts, Counts], float]
"""The distance of two sets that are given as how often each member of a pool is in them."""
Vectors = Tensor | Floats
Groups = tuple[ArrayLike | Tensor, ArrayLike | Tensor]
MOST_PIVOTS = 10_000_000
"""Of the network simplex; a set of a thousand takes some ten thousand."""


class Distance(abc.ABC):
    """Interface of the distances: ``distance(x, y)`` is one number.

    Attributes:
        name: how reports and the command line call it.
        title: how a table's heading calls it.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    def __call__(self, x: Vectors, y: Vectors) -> float:
        """The distance of the sets x ``"n *shape"`` and y ``"m *shape"``.

        Raises:
            ValueError: if the shapes do not fit, a set has fewer than two samples, or a value is not finite.
        """
        pool, n = _pool(x, y)
        return self.bind(pool, n)(*_membership(len(pool), n))

    @abc.abstractmethod
    def bind(self, pool: Floats, n: int) -> Statistic:
        """Prepare for many sets out of one pool ``"n+m d"``, whose first n are x and whose others are y."""


@dataclass(frozen=True)
class Frechet(Distance):
    """Frechet distance, in the features' units squared.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((4000, 2))
        >>> round(Frechet()(x, x + [3.0, 0.0]), 6)
        9.0
    """

    name: ClassVar[str] = "frechet"
    title: ClassVar[str] = "Frechet"

    def bind(self, pool: Floats, n: int) -> Statistic:
        centred = pool - pool.mean(0)
        if centred.shape[1] > len(centred):  # a rotation of the features; those beyond the rank are 0
            left, singular, _ = np.linalg.svd(centred, full_matrices=False)
            centred = left * singular

        def statistic(a: Counts, b: Counts) -> float:
            return frechet_of_gaussians(*_moments(centred, a), *_moments(centred, b))

        return statistic


def frechet_of_gaussians(mean_1: Floats, covariance_1: Floats, mean_2: Floats, covariance_2: Floats) -> float:
    """The squared Wasserstein-2 distance of two Gaussians: means ``"d"``, covariances ``"d d"``, singular ones included.

    Example:
        >>> frechet_of_gaussians(np.zeros(2), np.eye(2), np.ones(2), 4 * np.eye(2))
        4.0
    """
    values, vectors = np.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(values.clip(0.0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_2 @ root).clip(0.0)).sum()
    squared = np.square(mean_1 - mean_2).sum() + np.trace(covariance_1) + np.trace(covariance_2) - 2.0 * cross
    return max(0.0, float(squared))


@dataclass(frozen=True)
class KID(Distance):
    """Squared maximum mean discrepancy with the cubic kernel, unbiased, without units.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((100, 2))
        >>> abs(KID()(x[:50], x[50:])) < 1.0 < KID()(x, x + [3.0, 0.0])
        True
    """

    name: ClassVar[str] = "kid"
    title: ClassVar[str] = "KID"

    def bind(self, pool: Floats, n: int) -> Statistic:
        return _discrepancy((pool @ pool.T / pool.shape[1] + 1.0) ** 3)


@dataclass(frozen=True)
class MMD(Distance):
    """Squared maximum mean discrepancy with the mean of Gaussian kernels, unbiased, between about 0 and 2.

    Args:
        widths: of the kernels exp(-|x - y|^2 / (2 w^2)), as multiples of the median distance of two samples, from whichever set.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((100, 2))
        >>> MMD()(x, x + 1000.0) > 0.5, abs(MMD()(x[:50], x[50:])) < 0.05
        (True, True)
    """

    name: ClassVar[str] = "mmd"
    title: ClassVar[str] = "MMD"

    widths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)

    def bind(self, pool: Floats, n: int) -> Statistic:
        squares = _squared_distances(pool)
        # of both sets together: a width that knew which set is which would spoil the test
        median = float(np.median(squares[np.triu_indices(len(pool), 1)]))
        if median <= 0.0:
            raise ValueError("MMD needs sets in which most samples differ: their median distance is 0.")
        kernels = (np.exp(-squares / (2.0 * width**2 * median)) for width in self.widths)
        return _discrepancy(sum(kernels, start=np.zeros_like(squares)) / len(self.widths))


@dataclass(frozen=True)
class SlicedWasserstein(Distance):
    """Sliced Wasserstein-2 distance, in the features' units.

    Args:
        directions: how many random directions.
        seed: of the directions.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((100, 1))
        >>> round(SlicedWasserstein()(x, x + 3.0), 6)
        3.0
    """

    name: ClassVar[str] = "sliced_wasserstein"
    title: ClassVar[str] = "sliced W2"

    directions: int = 256
    seed: int = 0

    def bind(self, pool: Floats, n: int) -> Statistic:
        directions = np.random.default_rng(self.seed).standard_normal((pool.shape[1], self.directions))
        projected = (pool @ (directions / np.linalg.norm(directions, axis=0))).T  # directions members
        order = projected.argsort(1)
        ranked = np.take_along_axis(projected, order, 1)
        levels, taken, given = _coupling(n, len(pool) - n)

        def statistic(a: Counts, b: Counts) -> float:
            first = np.repeat(ranked.ravel(), a[order].ravel()).reshape(self.directions, n)
            second = np.repeat(ranked.ravel(), b[order].ravel()).reshape(self.directions, len(pool) - n)
            if n == len(pool) - n:
                return float(np.sqrt(np.square(first - second).mean()))
            return float(np.sqrt((np.square(first[:, taken] - second[:, given]) * levels).sum(1).mean()))

        return statistic


@dataclass(frozen=True)
class Wasserstein(Distance):
    """Exact Wasserstein-2 distance, in the features' units.

    Sets of equal size need SciPy, others POT.

    Raises:
        MissingExtraError: if that library is not installed.
        RuntimeError: if an optimal transport was not found, which takes sets of many thousands.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((50, 2))
        >>> round(Wasserstein()(x, x[::-1] + [3.0, 4.0]), 6)
        5.0
    """

    name: ClassVar[str] = "wasserstein"
    title: ClassVar[str] = "exact W2"

    def bind(self, pool: Floats, n: int) -> Statistic:
        squares = _squared_distances(pool)
        if 2 * n != len(pool):
            return lambda a, b: math.sqrt(_transport(a / n, b / (len(pool) - n), squares))
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError as error:
            raise MissingExtraError("SciPy", "evaluate", "The exact Wasserstein distance") from error

        def statistic(a: Counts, b: Counts) -> float:
            rows, columns = (np.repeat(np.arange(len(pool)), counts) for counts in (a, b))
            costs = squares[np.ix_(rows, columns)]
            return math.sqrt(float(costs[linear_sum_assignment(costs)].mean()))

        return statistic


def wasserstein_of_points(x: Vectors, y: Vectors, x_weights: Vectors | None = None, y_weights: Vectors | None = None) -> float:
    """Exact Wasserstein-2 distance of two discrete distributions, e.g. of mixtures whose components are points. Needs POT.

    Args:
        x, y: points ``"n *shape"`` and ``"m *shape"``.
        x_weights, y_weights: ``"n"`` and ``"m"``, at least 0, in any unit; equal ones when left out.

    Raises:
        ValueError: if shapes do not fit, a value is not finite, a weight is negative, or all weights of a set are 0.
        MissingExtraError: if POT is not installed.

    Example:
        >>> round(wasserstein_of_points([[0.0], [1.0]], [[0.0], [2.0]], [1.0, 3.0]), 6)  # half goes 1 far, a quarter from 1 to 0
        0.866025
    """
    pool, n = _pool(x, y)
    weights = np.zeros((2, len(pool)))
    weights[0, :n], weights[1, n:] = _weights(x_weights, n), _weights(y_weights, len(pool) - n)
    return math.sqrt(_transport(weights[0], weights[1], _squared_distances(pool)))


def _weights(given: Vectors | None, count: int) -> Floats:
    """Weights ``"n"`` whose sum is 1."""
    if given is None:
        return np.full(count, 1.0 / count)
    weights = given.detach().cpu().double().numpy() if isinstance(given, Tensor) else np.asarray(given, np.float64)
    if weights.shape != (count,) or not np.isfinite(weights).all() or weights.min() < 0.0 or weights.max() == 0.0:
        raise ValueError(f"weights must be {count} finite numbers of at least 0, not all 0, got {weights}.")
    return weights / weights.sum()


def _transport(a: Floats, b: Floats, costs: Floats) -> float:
    """The least cost of bringing the masses a to the masses b, ``"N"`` each with sum 1, at costs ``"N N"``."""
    try:
        import ot
    except ImportError as error:
        raise MissingExtraError(
            "POT", "evaluate", "The exact Wasserstein distance of sets of unequal size or with weights"
        ) from error
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    cost, log = ot.emd2(a[rows], b[columns], costs[np.ix_(rows, columns)], numItermax=MOST_PIVOTS, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"no optimal transport of {len(rows)} to {len(columns)} points was found: {log['warning']}")
    return max(0.0, float(cost))


DISTANCES: dict[str, Distance] = {d.name: d for d in (Frechet(), KID(), MMD(), SlicedWasserstein(), Wasserstein())}
"""Name -> the distance with its default options."""


def make_distances(names: str | Iterable[str]) -> list[Distance]:
    """Distances by their names, which may be one text with commas.

    Raises:
        UnknownNameError: for an unknown name, with the nearest one.

    Example:
        >>> [distance.title for distance in make_distances("kid,mmd")]
        ['KID', 'MMD']
    """
    wanted = names.split(",") if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in DISTANCES:
            raise UnknownNameError("distance", name, DISTANCES)
    return [DISTANCES[name] for name in wanted]


# ---- figures with intervals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A distance with what is needed to judge it; see the module's text.

    Attributes:
        distance: its name.
        value: the figure.
        low, high: interval of the expected figure at these sizes.
        level: of the interval.
        floor: mean distance of sets of these sizes that nothing distinguishes.
        floor_high: the value that 95 % of those do not exceed.
        p: of the permutation test; small if the distributions differ.
        sizes: of the two sets.
        resamples: how many were drawn for the interval, and again for the floor.
        seed: that decided them.
        groups: within how many groups they were drawn.
    """

    distance: str
    value: float
    low: float
    high: float
    level: float
    floor: float
    floor_high: float
    p: float
    sizes: tuple[int, int]
    resamples: int
    seed: int
    groups: int = 1

    @property
    def weak(self) -> bool:
        """Whether the sets are not told apart but so small that this says little."""
        return self.p > 0.05 and min(self.sizes) < FEW

    def __str__(self) -> str:
        told = "told apart" if self.p <= 0.05 else "not told apart"
        sizes = f"{self.sizes[0]} and {self.sizes[1]} samples{', which are few' if self.weak else ''}"
        return (
            f"{DISTANCES[self.distance].title} {self.value:.4g} [{self.low:.4g}, {self.high:.4g}], floor {self.floor:.4g} "
            f"(95 % below {self.floor_high:.4g}), p = {self.p:.3g}: {told} with {sizes}"
        )


def measure(
    x: Vectors,
    y: Vectors,
    distances: str | Iterable[str] | Sequence[Distance] = ("frechet", "kid", "mmd", "sliced_wasserstein"),
    *,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
    groups: Groups | None = None,
    after: Callable[[], Any] | None = None,
) -> list[Measured]:
    """Distances of two independent sets, each with interval, floor and test.

    Args:
        x: ``"n *shape"``; the samples to judge.
        y: ``"m *shape"``; what they are compared with.
        distances: names, or distances with options of their own.
        resamples: how many sets are drawn for the interval, and how many for the floor and the test; p is at least 1 / (resamples + 1).
        level: of the interval.
        seed: of both.
        groups: whole numbers ``"n"`` and ``"m"``, e.g. classes, if the number of samples of every group was fixed beforehand.
        after: called after each of the 2 * resamples evaluations of every distance, for progress.

    Raises:
        ValueError: if the sets or the options make no sense, or both sets are the same samples.

    Example:
        >>> draw = np.random.default_rng(0).standard_normal
        >>> same, shifted = (measure(draw((200, 4)) + s, draw((200, 4)), ["mmd"])[0] for s in (0.0, 0.5))
        >>> same.p > 0.05, shifted.p < 0.01, shifted.low > shifted.floor_high
        (True, True, True)
    """
    if resamples < 20 or not 0.5 <= level < 1.0:
        raise ValueError(f"resamples must be at least 20 and level within [0.5, 1), got {resamples} and {level:g}.")
    pool, n = _pool(x, y)
    if 2 * n == len(pool) and np.array_equal(pool[:n], pool[n:]):
        raise ValueError("both sets are the same samples; a distance of distributions needs sets that were drawn independently.")
    given = [distances] if isinstance(distances, str) else list(distances)
    chosen = [d for item in given for d in ([item] if isinstance(item, Distance) else make_distances(item))]
    members = _Members(len(pool), n, groups)
    return [_measure(distance, pool, members, resamples, level, seed, after or (lambda: None)) for distance in chosen]


def _measure(
    distance: Distance, pool: Floats, members: _Members, resamples: int, level: float, seed: int, after: Callable[[], Any]
) -> Measured:
    n = members.n
    statistic = distance.bind(pool, n)
    value = statistic(*_membership(len(pool), n))
    generator = np.random.default_rng(seed)

    def evaluate(sets: tuple[Counts, Counts]) -> float:
        after()
        return statistic(*sets)

    drawn = np.array([evaluate(members.redrawn(generator)) for _ in range(resamples)])
    parted = np.array([evaluate(members.parted(generator)) for _ in range(resamples)])
    low, high = _around(value, drawn, level)
    lowest = -math.inf if isinstance(distance, (KID, MMD)) else 0.0
    return Measured(
        distance=distance.name,
        value=value,
        low=max(low, lowest),
        high=high,
        level=level,
        floor=float(parted.mean()),
        floor_high=float(np.quantile(parted, 0.95)),
        p=float((1 + (parted >= value).sum()) / (resamples + 1)),
        sizes=(n, len(pool) - n),
        resamples=resamples,
        seed=seed,
        groups=len(members.groups),
    )


@dataclass(frozen=True)
class Excess:
    """How much farther from y a set is than another that shares its noise.

    Attributes:
        value: distance of x from y.
        low, high: interval of `value` at these sizes.
        excess: `value` minus the distance of the twin set from y.
        excess_low, excess_high: interval of `excess`. If it holds 0, these sizes do not tell the two sets apart by this distance.
    """

    value: float
    low: float
    high: float
    excess: float
    excess_low: float
    excess_high: float


def excess(
    x: Vectors,
    twin: Vectors,
    y: Vectors,
    distance: Distance,
    *,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
    groups: Groups | None = None,
) -> Excess:
    """How much farther x is from y than its twin is: member i of both comes from the same noise, y is independent of them.

    The twin is what x would be without its fault, so its distance from y is the floor, and because the two are drawn anew together,
    chance cancels from their difference.

    Args:
        x, twin: ``"n *shape"`` each.
        y: ``"m *shape"``.
        distance: which one.
        resamples, level, seed, groups: as of `measure`.

    Example:
        >>> draw = np.random.default_rng(0).standard_normal
        >>> twin, y = draw((200, 4)), draw((300, 4))
        >>> found = excess(twin + 0.1, twin, y, SlicedWasserstein())
        >>> found.excess < 0.1 < found.value
        True
    """
    if len(x) != len(twin):
        raise ValueError(f"the set and its twin must be equally large, got {len(x)} and {len(twin)}.")
    pools = [_pool(first, y) for first in (x, twin)]
    n, total = pools[0][1], len(pools[0][0])
    statistics = [distance.bind(pool, n) for pool, _ in pools]
    sets, generator = _membership(total, n), np.random.default_rng(seed)
    value, floor = (statistic(*sets) for statistic in statistics)
    members = _Members(total, n, groups)
    draws = [members.redrawn(generator) for _ in range(resamples)]
    drawn = np.array([[statistic(*draw) for statistic in statistics] for draw in draws])
    return Excess(
        value, *_around(value, drawn[:, 0], level), value - floor, *_around(value - floor, drawn[:, 0] - drawn[:, 1], level)
    )


def _around(value: float, drawn: Floats, level: float) -> tuple[float, float]:
    """The spread of what was drawn, around the figure instead of around its mean."""
    low, high = np.quantile(drawn - drawn.mean(), [0.5 * (1.0 - level), 0.5 * (1.0 + level)])
    return value + float(low), value + float(high)


def _membership(total: int, n: int) -> tuple[Counts, Counts]:
    first = (np.arange(total) < n).astype(np.int64)
    return first, 1 - first


class _Members:
    """Draws of new sets out of a pool whose first n members are the first set, within groups."""

    def __init__(self, total: int, n: int, groups: Groups | None):
        names = np.zeros(total, np.int64)
        if groups is not None:
            parts = [part.detach().cpu().numpy() if isinstance(part, Tensor) else np.asarray(part) for part in groups]
            if [part.shape for part in parts] != [(n,), (total - n,)]:
                raise ValueError(
                    f"groups must be one number a sample, ({n},) and ({total - n},), got {[part.shape for part in parts]}."
                )
            names = np.concatenate(parts)
        self.total, self.n = total, n
        places = np.arange(total)
        self.groups = [(places[(names == g) & (places < n)], places[(names == g) & (places >= n)]) for g in np.unique(names)]

    def redrawn(self, generator: np.random.Generator) -> tuple[Counts, Counts]:
        """Both sets drawn from themselves with replacement."""
        sides = ([generator.choice(group[side], len(group[side])) for group in self.groups if len(group[side])] for side in (0, 1))
        first, second = (np.bincount(np.concatenate(side), minlength=self.total) for side in sides)
        return first, second

    def parted(self, generator: np.random.Generator) -> tuple[Counts, Counts]:
        """All of them parted at random."""
        first = np.zeros(self.total, np.int64)
        for one, other in self.groups:
            first[generator.permutation(np.concatenate([one, other]))[: len(one)]] = 1
        return first, 1 - first


# ---- sets and sums -----------------------------------------------------------------------------------------------------------------


def _pool(x: Vectors, y: Vectors) -> tuple[Floats, int]:
    """Both sets as one ``"n+m d"``, and n."""
    first, second = (_vectors(value) for value in (x, y))
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"the sets must have samples of one size, got {first.shape[1]} and {second.shape[1]} numbers a sample.")
    return np.concatenate([first, second]), len(first)


def _vectors(value: Vectors) -> Floats:
    array = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float64)
    if array.ndim < 2 or len(array) < 2:
        raise ValueError(f"a set must be samples (n, *shape), at least 2, got shape {array.shape}.")
    flat = array.reshape(len(array), -1)
    if not np.isfinite(flat).all():
        raise ValueError(f"{int((~np.isfinite(flat).all(1)).sum())} of {len(flat)} samples are not finite.")
    return flat


def _moments(members: Floats, counts: Counts) -> tuple[Floats, Floats]:
    """Mean ``"d"`` and unbiased covariance ``"d d"`` of a set."""
    inside = np.flatnonzero(counts)
    rows, weights, size = members[inside], counts[inside, None].astype(np.float64), int(counts.sum())
    mean = (weights * rows).sum(0) / size
    shifted = rows - mean
    return mean, (weights * shifted).T @ shifted / (size - 1)


def _discrepancy(kernel: Floats) -> Statistic:
    """Unbiased squared maximum mean discrepancy; a member that was drawn twice makes no pair with itself."""
    diagonal = np.diagonal(kernel)

    def within(counts: NDArray[np.float64], product: Floats) -> float:
        return float((counts @ product - counts**2 @ diagonal) / (counts.sum() ** 2 - (counts**2).sum()))

    def statistic(a: Counts, b: Counts) -> float:
        first, second = a.astype(np.float64), b.astype(np.float64)
        by_first, by_second = kernel @ first, kernel @ second
        cross = float(second @ by_first) / float(first.sum() * second.sum())
        return within(first, by_first) + within(second, by_second) - 2.0 * cross

    return statistic


def _squared_distances(pool: Floats) -> Floats:
    """All squared distances ``"N N"``, by products of what is centred, with no negative ones."""
    centred = pool - pool.mean(0)
    norms = np.square(centred).sum(1)
    squares = (norms[:, None] + norms - 2.0 * (centred @ centred.T)).clip(0.0)
    np.fill_diagonal(squares, 0.0)
    return squares


def _coupling(n: int, m: int) -> tuple[Floats, Counts, Counts]:
    """The optimal coupling of sorted sets of n and m: how much mass goes from which to which."""
    ends = np.unique(np.concatenate([np.arange(1, n + 1) * m, np.arange(1, m + 1) * n]))  # in units of 1 / (n m)
    begins = np.concatenate([[0], ends[:-1]])
    return (ends - begins) / (n * m), begins // m, begins // n
