r"""Scalar numerics of exponential integrators: phi functions, Gauss-Legendre rules, Lagrange bases. Host float64, no torch.

Notation. With $z \ge 0$ the *decaying moments* are

$$ M_k(z) = \int_0^1 z\,e^{-z(1-u)}\,u^k\,du, \qquad M_0 = 1 - e^{-z}, \qquad M_k = 1 - \tfrac{k}{z} M_{k-1}, $$

and the phi functions of exponential integrators (Hochbruck and Ostermann, "Exponential integrators", Acta Numerica 19, 2010,
eq. 2.10-2.11) are

$$ \varphi_0(z) = e^z, \qquad \varphi_{k}(z) = \int_0^1 e^{(1-u)z} \frac{u^{k-1}}{(k-1)!}\,du, \qquad
   \varphi_{k+1}(z) = \frac{\varphi_k(z) - 1/k!}{z}. $$

They are related by $M_k(z) = k!\,z\,\varphi_{k+1}(-z)$. The upward recursion cancels for small $|z|$; there a series is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "EQUAL_STEPS",
    "decaying_moments",
    "exponential_weights",
    "gauss_legendre",
    "lagrange_integrals",
    "lagrange_polynomials",
    "noise_clock",
    "padded_sum",
    "phi",
]

Floats = NDArray[np.float64]

EQUAL_STEPS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
"""Adams-Bashforth weights on equal steps, newest first."""
SERIES_TERMS = 40
"""Enough terms for full double precision of the series at `SERIES_BELOW`."""
SERIES_BELOW = 2.0
"""Below this |z| the phi functions are summed as a series; above it the recursion loses at most a few units in the last place."""


def phi(k: int, z: float) -> float:
    r"""The phi function $\varphi_k(z)$.

    Args:
        k: index, at least 0.
        z: any finite real number.

    Raises:
        ValueError: if `k` is negative or `z` is not finite.

    Example:
        >>> phi(1, 0.0), round(phi(1, 1.0), 12)
        (1.0, 1.718281828459)
    """
    if k < 0 or not math.isfinite(z):
        raise ValueError(f"phi needs an index of at least 0 and a finite argument, got k={k}, z={z}.")
    if abs(z) < SERIES_BELOW + k:
        return math.fsum(z**j / math.factorial(j + k) for j in range(SERIES_TERMS + 4 * k))
    value = math.exp(z)
    for j in range(k):
        value = (value - 1.0 / math.factorial(j)) / z
    return value


def decaying_moments(z: float, count: int) -> Floats:
    r"""The moments $M_0(z), \dots, M_{count-1}(z)$ of the decaying exponential on the unit interval.

    Args:
        z: any finite number, negative for an exponential that grows; infinity is legal and gives ones (all the weight sits at u = 1).
        count: how many.

    Example:
        >>> decaying_moments(1.0, 2).round(6).tolist()
        [0.632121, 0.367879]
    """
    if math.isinf(z):
        return np.ones(count)
    if -SERIES_BELOW - count < z <= 0.0:  # M_k = -sum_{j >= 1} |z|^j k! / (j + k)!
        terms = range(1, SERIES_TERMS + 4 * count)
        return np.array([-math.fsum((-z) ** j / math.prod(range(k + 1, j + k + 1)) for j in terms) for k in range(count)])
    if 0.0 < z < SERIES_BELOW + count:
        # the power series of e^{-z(1-u)} alternates; Kummer's transformation makes every term positive:
        # M_k = z e^{-z} sum_j z^j / (j! (j + k + 1))
        terms = [math.exp(-z) * z ** (j + 1) / math.factorial(j) for j in range(SERIES_TERMS + 4 * count)]
        return np.array([math.fsum(term / (j + k + 1) for j, term in enumerate(terms)) for k in range(count)])
    moments = [-math.expm1(-z)]
    for k in range(1, count):
        moments.append(1.0 - k / z * moments[-1])
    return np.array(moments)


def gauss_legendre(low: float, high: float, points: int = 32) -> tuple[Floats, Floats]:
    """Nodes and weights of the Gauss-Legendre rule on [low, high], exact for polynomials of degree 2 points - 1.

    Example:
        >>> nodes, weights = gauss_legendre(0.0, 2.0, 4)
        >>> round(float(weights @ nodes**3), 12)
        4.0
    """
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return 0.5 * (high - low) * nodes + 0.5 * (high + low), 0.5 * (high - low) * weights


def lagrange_polynomials(nodes: Sequence[float] | Floats) -> Floats:
    """Monomial coefficients of the Lagrange basis.

    Returns:
        float64 array ``"n n"``: row j holds the coefficients of l_j, constant term first; l_j is 1 at node j and 0 at the others.

    Raises:
        ValueError: if two nodes coincide.

    Example:
        >>> lagrange_polynomials([0.0, -1.0]).tolist()
        [[1.0, 1.0], [0.0, -1.0]]
    """
    points = [float(node) for node in nodes]
    if len(set(points)) != len(points):
        raise ValueError(f"Lagrange nodes must differ, got {points}.")
    rows = []
    for j, p in enumerate(points):
        others = points[:j] + points[j + 1 :]
        scale = math.prod(p - q for q in others)
        rows.append(np.polynomial.polynomial.polyfromroots(others) / scale if others else np.ones(1))
    return np.array(rows) + 0.0  # + 0.0 turns -0.0 into 0.0


def lagrange_integrals(
    nodes: Sequence[float] | Floats, low: float, high: float, weight: Callable[[Floats], Floats], points: int = 32
) -> Floats:
    """Integrals of weight(u) l_j(u) over [low, high] for the Lagrange basis on `nodes`, by Gauss-Legendre quadrature.

    Args:
        nodes: ``"n"``, distinct.
        low, high: the interval.
        weight: vectorised function of the quadrature points.
        points: size of the rule.

    Returns:
        float64 array ``"n"``.

    Example:
        >>> lagrange_integrals([-1.0], -1.0, 0.0, np.exp).round(12).tolist()
        [0.632120558829]
    """
    u, w = gauss_legendre(low, high, points)
    return lagrange_polynomials(nodes) @ (u[None, :] ** np.arange(len(nodes))[:, None] @ (w * weight(u)))


def exponential_weights(nodes: Sequence[float] | Floats, z: float) -> Floats:
    r"""Weights of stored values in one step of an exponential multistep method.

    The integrals $\int_0^1 z e^{-z(1-u)} l_j(u)\,du$ of the Lagrange basis on `nodes`, exact to rounding.

    Args:
        nodes: ``"n"``, where the values lie in units of the step: 0 is its begin, 1 its end, the past is negative.
        z: the step times the decay rate; negative for noise predictions, whose weight grows along the step.

    Example:
        >>> exponential_weights([0.0], 1.0).round(6).tolist()
        [0.632121]
    """
    return lagrange_polynomials(nodes) @ decaying_moments(z, len(nodes))


def noise_clock(lam: float, rate: float) -> float:
    r"""The clock in which a reverse SDE's noise is Brownian: $e^{2 r \lambda}$ up to an affine map.

    The noise a solver adds over a step has the variance of the increments of $e^{2 r \lambda}$, so steps that follow the same path must
    share this clock. For a small rate that function is almost constant, and its steps would be lost in rounding; here it is
    $1 + (e^{2 r (\lambda + 20)} - 1) / 2 r$ from $\lambda = -20$ on, and $e^{\lambda + 20}$ below.

    Args:
        lam: lambda, minus infinity included.
        rate: r > 0; for the reverse SDE of strength eta it is eta, for DDIM's eta it is eta squared.

    Example:
        >>> noise_clock(float("-inf"), 1.0), noise_clock(-20.0, 1.0), noise_clock(-19.0, 1e-12) < noise_clock(-18.9, 1e-12)
        (0.0, 1.0, True)
    """
    above = lam + 20.0
    return math.exp(above) if above < 0.0 else 1.0 + math.expm1(2.0 * rate * above) / (2.0 * rate)


def padded_sum(a: Floats, b: Floats) -> Floats:
    """The sum of two vectors, the shorter continued by zeros.

    Example:
        >>> padded_sum(np.array([1.0, 2.0]), np.array([3.0])).tolist()
        [4.0, 2.0]
    """
    total = np.zeros(max(len(a), len(b)))
    total[: len(a)] += a
    total[: len(b)] += b
    return total
