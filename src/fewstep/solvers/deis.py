r"""DEIS: exponential Adams-Bashforth multistep in a chosen time variable, and iPNDM.

Source: "Fast Sampling of Diffusion Models with Exponential Integrator" (arXiv 2204.13902: tAB-DEIS, rhoAB-DEIS
and iPNDM). With $\rho = \sigma/\alpha$ the probability-flow ODE reads

$$ \frac{x_t}{\alpha_t} = \frac{x_s}{\alpha_s} + \int_{\rho_s}^{\rho_t} \varepsilon\,d\rho
   \;\approx\; \frac{x_s}{\alpha_s} + \sum_j C_j\,\varepsilon_j, \qquad
   C_j = \int_{\rho_s}^{\rho_t} \prod_{k \ne j} \frac{u - u_k}{u_j - u_k}\,d\rho : $$

the noise prediction is replaced by the polynomial through its last values in the variable u, which is t (tAB), $\rho$ ($\rho$AB) or
$\log\rho = -\lambda$ (log-$\rho$AB). The last two integrals have closed forms; the first is a Gauss-Legendre sum in lambda, exact to
rounding.

iPNDM is the transfer of DDIM with the average of the last values that Adams-Bashforth takes on *equal* steps, whatever the grid; see
also "Pseudo Numerical Methods for Diffusion Models on Manifolds" (arXiv 2202.09778, eq. 9 and 12).

Order 1 of both is DDIM. The Runge-Kutta kinds of DEIS are in `fewstep.solvers.runge_kutta`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UnknownNameError
from fewstep.multistep import trapezoidal_end
from fewstep.numerics import EQUAL_STEPS, exponential_weights, lagrange_polynomials
from fewstep.plan import Row
from fewstep.schedules import FromAlphasCumprod, FromBetas, NoiseSchedule
from fewstep.solver import Solver, check_order

__all__ = ["DEIS", "IPNDM"]

Floats = NDArray[np.float64]

VARIABLES = ("t", "rho", "logrho")
POINTS, PANEL = 20, 1.0
"""Gauss-Legendre points on a panel, and the greatest length of a panel in lambda. The nearest singularities of t(lambda) on the shipped
schedules lie pi / 2 from the real axis, so the rule errs by less than 1e-30 before rounding."""


@dataclass(frozen=True)
class DEIS(Solver):
    """DEIS multistep: tAB, rhoAB and log-rhoAB.

    Args:
        order: 1 to 4, how many stored values a step uses: the paper's r plus 1. The first steps use as many as there are.
        variable: the u of the interpolation: ``"t"``, the schedule's own time, as the paper recommends; ``"rho"``; or ``"logrho"``.
        compat: ``"exact"``, or ``"official"`` for the published start.

    Raises:
        ValueError: for an order that does not exist.
        UnknownNameError: for a variable or compat that does not exist.

    Note:
        The first step of a multistep method has one stored value and is of order 1, which caps the order of the whole at 2 wherever the
        noise prediction already changes at the start. From order 3 that step is therefore corrected when the second prediction is known
        (by the trapezoidal rule in the velocity eps - x_0), at no call. That is enough for order 3; the fourth order shows where the
        prediction hardly changes at the start, as it does when sampling starts in noise. ``compat="official"`` leaves the correction
        out. The authors' code takes four values, ``order=4``, by default.

        On a table of a discrete-time model t(lambda) has a kink at every entry; the quadrature is cut there.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> plan = DEIS(order=3).plan(VPLinear(), nfe=6)
        >>> [len(row.weights) for row in plan.rows]
        [1, 2, 3, 3, 3, 3]
    """

    source: ClassVar[str] = "DEIS, arXiv 2204.13902"

    order: int = 3
    variable: str = "t"
    compat: str = "exact"

    def __post_init__(self) -> None:
        check_order(self.order, (1, 2, 3, 4), "DEIS has orders 1 to 4")
        if self.variable not in VARIABLES:
            raise UnknownNameError("variable", self.variable, VARIABLES)
        if self.compat not in ("exact", "official"):
            raise UnknownNameError("compat", self.compat, ("exact", "official"))

    @property
    def claimed_order(self) -> int:
        return min(self.order, 3 if self.compat == "exact" else 2)

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        lam, alpha, sigma = schedule.lam(times), schedule.alpha(times), schedule.sigma(times)
        first = int(np.isinf(lam[0]))
        for i, t in enumerate(times[:-1].tolist()):
            if np.isinf(lam[i : i + 2]).any():
                yield _first_order(t, alpha[i : i + 2], sigma[i : i + 2])
                continue
            nodes = np.arange(i, max(i - self.order, first - 1), -1)
            carry = np.array([alpha[i + 1] / alpha[i]])
            weights = self._weights(schedule, times, lam, i, nodes) * sigma[i + 1]
            if i == first + 1 and self.order > 2 and self.compat == "exact":
                states, outputs = trapezoidal_end("noise", alpha[first : i + 1], sigma[first : i + 1])
                weights[:2] += carry * outputs
                carry = carry * states
            yield Row(t, tuple(carry.tolist()), tuple(weights.tolist()), 1.0 / float(sigma[i]), float(-alpha[i] / sigma[i]))

    def _weights(self, schedule: NoiseSchedule, times: Floats, lam: Floats, i: int, nodes: NDArray[np.intp]) -> Floats:
        """Weights over sigma_t of the values at `nodes` in the step from i to i + 1."""
        h = float(lam[i + 1] - lam[i])
        if self.variable == "logrho":
            return exponential_weights((lam[nodes] - lam[i]) / h, -h)
        if self.variable == "rho":
            places = np.expm1(lam[i] - lam[nodes]) / math.expm1(-h)
            return -math.expm1(h) * (lagrange_polynomials(places) @ (1.0 / np.arange(1, len(nodes) + 1)))
        lams, measure = _quadrature(lam[i], lam[i + 1], _kinks(schedule))
        step = times[i + 1] - times[i]
        places, knots = (schedule.t_of_lam(lams) - times[i]) / step, (times[nodes] - times[i]) / step
        return -np.array([(measure * _lagrange(places, knots, j)).sum() for j in range(len(nodes))])


@dataclass(frozen=True)
class IPNDM(Solver):
    """iPNDM: DDIM with an average of the last noise predictions.

    Args:
        order: 1 to 4, how many stored values a step uses. The first steps use as many as there are, as published.

    Raises:
        ValueError: for an order that does not exist.

    Note:
        The weights are those of equal steps in rho. On any smooth grid that makes order 2; on a grid uniform in rho, and only there, the
        order is that of the weights.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> len(IPNDM().plan(VPLinear(), nfe=10).rows[-1].weights)
        4
    """

    source: ClassVar[str] = "DEIS, arXiv 2204.13902; PNDM, arXiv 2202.09778"

    order: int = 4

    def __post_init__(self) -> None:
        check_order(self.order, tuple(EQUAL_STEPS), "iPNDM has orders 1 to 4")

    @property
    def claimed_order(self) -> int:
        return min(self.order, 2)

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        lam, alpha, sigma = schedule.lam(times), schedule.alpha(times), schedule.sigma(times)
        first = int(np.isinf(lam[0]))
        for i, t in enumerate(times[:-1].tolist()):
            if np.isinf(lam[i : i + 2]).any():
                yield _first_order(t, alpha[i : i + 2], sigma[i : i + 2])
                continue
            transfer = float(sigma[i + 1]) * -math.expm1(lam[i + 1] - lam[i])
            weights = tuple(transfer * weight for weight in EQUAL_STEPS[min(self.order, i - first + 1)])
            yield Row(t, (float(alpha[i + 1] / alpha[i]),), weights, 1.0 / float(sigma[i]), float(-alpha[i] / sigma[i]))


def _first_order(t: float, alpha: Floats, sigma: Floats) -> Row:
    """A step from or to an infinite lambda, which stores nothing that a later step uses."""
    carry = float(sigma[1] / sigma[0])
    return Row(t, (carry,), (float(alpha[1] - alpha[0] * carry),))


def _kinks(schedule: NoiseSchedule) -> Floats:
    """The lambdas, ascending, at which t(lambda) is not smooth."""
    if isinstance(schedule, FromAlphasCumprod):
        count = len(schedule.alphas_cumprod)
    elif isinstance(schedule, FromBetas):
        count = len(schedule.betas)
    else:
        return np.zeros(0)
    return schedule.lam(np.arange(count, 0, -1) / count)


def _quadrature(begin: float, end: float, kinks: Floats) -> tuple[Floats, Floats]:
    """Points in lambda and weights for integrals of exp(end - lambda) from begin to end, on panels that end at the kinks. On the way
    back, where the end is the lower one, the weights are negative.
    """
    inside = kinks[(kinks > min(begin, end)) & (kinks < max(begin, end))]
    edges = np.union1d(np.linspace(begin, end, 1 + math.ceil(abs(end - begin) / PANEL)), inside)
    edges = edges if begin < end else edges[::-1]
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    half, middle = 0.5 * np.diff(edges)[:, None], 0.5 * (edges[1:] + edges[:-1])[:, None]
    lams = (middle + half * nodes).ravel()
    return lams, (half * weights).ravel() * np.exp(end - lams)


def _lagrange(places: Floats, knots: Floats, j: int) -> Floats:
    """The Lagrange polynomial that is 1 at knot j and 0 at the others."""
    others = np.delete(knots, j)
    return np.prod((places[:, None] - others) / (knots[j] - others), axis=1)
