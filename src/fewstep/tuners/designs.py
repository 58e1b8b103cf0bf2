r"""Which arms to measure, and how often: optimal designs of linear experiments, and rounding to whole numbers.

An arm is a vector x, a design a distribution $\lambda$ over arms, its information $A(\lambda) = \sum_x \lambda_x x x^T$. With N
measurements the least squares estimate of $v^T \theta$ has the variance $\sigma^2 v^T A^{-1} v / N$.

- `e_design` makes the worst direction as good as possible: it maximises the least eigenvalue of A. It is the limit of Kiefer's criteria
  $\mathrm{tr} A^{-p}$. Each is solved from the one before: by a step of the multiplicative iteration $\lambda_x \propto \lambda_x
  (x^T A^{-p-1} x)^{1/(p+1)}$ (Yu, "Monotonic convergence of a general algorithm for computing optimal designs", arXiv 0905.2646), then by
  exponentiated gradients with a step that adapts. p is doubled until the bound that $W = A^{-p-1}$ gives, $\max_x x^T W x /
  \mathrm{tr} W$, is as near as asked for.
- `g_design` minimises the greatest variance over some directions by the Frank-Wolfe algorithm with decreasing steps. For the arms
  themselves as directions the optimum is the dimension (Kiefer and Wolfowitz, "The equivalence of two extremum problems", 1960).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["e_design", "g_design", "information", "rounded", "support", "variances"]

Floats = NDArray[np.float64]
LARGEST_POWER = 1 << 14
TINY = 1e-12
LEAST_WEIGHT = 1e-6
"""Arms of less weight are not measured."""


def information(arms: Floats, design: Floats) -> Floats:
    """A of a design, ``"d d"``."""
    return arms.T @ (design[:, None] * arms)


def variances(arms: Floats, design: Floats, directions: Floats) -> Floats:
    """$v^T A^{-1} v$ for every direction v ``"m d"``."""
    return np.einsum("md,dm->m", directions, np.linalg.solve(information(arms, design), directions.T))


def e_design(arms: Floats, *, tol: float = 1e-3, iterations: int = 300) -> Floats:
    """The design with the greatest least eigenvalue.

    Args:
        arms: ``"n d"``, which span all d dimensions.
        tol: stop when the least eigenvalue is within this share of the bound on it.
        iterations: for every power p at most.

    Returns:
        ``"n"``: the weights, which sum to 1.

    Raises:
        ValueError: if the arms do not span the space.

    Example:
        >>> e_design(np.diag([1.0, 2.0])).round(3).tolist()  # inversely as the squared lengths
        [0.8, 0.2]
    """
    if (rank := np.linalg.matrix_rank(arms)) < arms.shape[1]:
        raise ValueError(f"{len(arms)} arms span {rank} of {arms.shape[1]} dimensions: give more, or fewer features.")
    design, best, least, bound = np.full(len(arms), 1.0 / len(arms)), np.full(len(arms), 1.0 / len(arms)), 0.0, np.inf
    power = 1
    while power <= LARGEST_POWER and least < (1.0 - tol) * bound:
        design = _start(arms, design, power)
        value, gains, eigenvalue, above = _soft(arms, design, power)
        size = 1.0
        for _ in range(iterations):
            if eigenvalue > least:
                best, least = design, eigenvalue
            bound = min(bound, above)
            if least >= (1.0 - tol) * bound or size < 1e-6:
                break
            trial = design * np.exp(size * (gains - gains.max()))
            trial /= trial.sum()
            found = _soft(arms, trial, power)
            if found[0] > value:
                design, (value, gains, eigenvalue, above), size = trial, found, 1.5 * size
            else:
                size *= 0.5
        power *= 2
    return best


def _soft(arms: Floats, design: Floats, power: int) -> tuple[float, Floats, float, float]:
    """-(1/p) log tr A^-p; its gradient; the least eigenvalue, and the bound on that of any design by the dual."""
    values, vectors = np.linalg.eigh(information(arms, design))
    if values[0] <= 0.0:
        return -np.inf, np.zeros(len(arms)), 0.0, np.inf
    shares = (values[0] / values) ** power
    seen = (arms @ vectors) ** 2
    value = float(np.log(values[0]) - np.log(shares.sum()) / power)
    weights = shares / values  # of W, up to a factor
    above = float((seen @ weights).max() / weights.sum())
    return value, seen @ weights / shares.sum(), float(values[0]), above


def _start(arms: Floats, design: Floats, power: int) -> Floats:
    """One step of the multiplicative iteration, which alone solves arms along axes."""
    values, vectors = np.linalg.eigh(information(arms, design))
    seen = (arms @ vectors) ** 2 @ (values[0] / values) ** (power + 1)
    changed = design * np.maximum(seen, 1e-300) ** (1.0 / (power + 1))
    return changed / changed.sum()


def g_design(arms: Floats, directions: Floats, *, iterations: int = 1000, tol: float = 1e-2) -> tuple[Floats, float]:
    r"""The design with the least greatest variance over directions, and that variance.

    Args:
        arms: ``"n d"``.
        directions: ``"m d"`` within the span of the arms.
        iterations: at most.
        tol: stop when the variance is within this share of the bound $\max_v v^T A^{-1} v \le \max_x (v^T A^{-1} x)^2 / v^T A^{-1} v$ of
            a direction alone.

    Example:
        >>> design, worst = g_design(np.eye(3), np.eye(3))
        >>> design.round(2).tolist(), round(worst, 2)
        ([0.33, 0.33, 0.33], 3.0)
    """
    design = np.full(len(arms), 1.0 / len(arms))
    best, least = design, np.inf
    ridge = TINY * max(1.0, float((arms**2).sum(1).max())) * np.eye(arms.shape[1])
    for step in range(iterations):
        solved = np.linalg.solve(information(arms, design) + ridge, directions.T)  # d m
        every = np.einsum("md,dm->m", directions, solved)
        worst = int(np.argmax(every))
        if every[worst] < least:
            best, least = design, float(every[worst])
        gains = (arms @ solved[:, worst]) ** 2
        if gains.max() <= (1.0 + tol) * every[worst]:  # then this direction alone allows no less: Elfving's bound
            break
        size = 1.0 / (step + len(arms))
        design = (1.0 - size) * design
        design[int(np.argmax(gains))] += size
    return best, least


def support(design: Floats) -> int:
    """How many arms a design measures.

    Example:
        >>> support(np.array([0.5, 0.5, 0.0]))
        2
    """
    return int((design > LEAST_WEIGHT).sum())


def rounded(design: Floats, count: int) -> NDArray[np.int64]:
    r"""How often each arm is measured, `count` in all: the efficient rounding of Pukelsheim and Rieder (Biometrika 79, 1992).

    Every arm of the design has at least one; arms of weight below 1e-6 have none. An arm of weight $\lambda_x$ has at least
    $(N - p) \lambda_x$ of N measurements where p arms have any, so N + p of them have no greater variance than the design says for N.

    Raises:
        ValueError: if there are fewer measurements than arms in the design.

    Example:
        >>> rounded(np.array([0.5, 0.3, 0.2]), 4).tolist()
        [2, 1, 1]
    """
    rows = np.flatnonzero(design > LEAST_WEIGHT)
    if count < len(rows):
        raise ValueError(f"{count} measurements are fewer than the {len(rows)} arms of the design.")
    weights = design[rows] / design[rows].sum()
    counts = np.maximum(1, np.ceil((count - 0.5 * len(rows)) * weights)).astype(np.int64)
    while counts.sum() > count:
        over = np.where(counts > 1, (counts - 1) / weights, -np.inf)
        counts[int(np.argmax(over))] -= 1
    while counts.sum() < count:
        counts[int(np.argmin(counts / weights))] += 1
    result = np.zeros(len(design), np.int64)
    result[rows] = counts
    return result
