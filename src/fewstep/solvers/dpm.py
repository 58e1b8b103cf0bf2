r"""DPM-Solver++ multistep, ODE and SDE form, of order 1, 2 and 3.

Source: "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models" (arXiv 2211.01095; eq. 8 and algorithm 2 for the
ODE, eq. 16-18 for the SDE). The data prediction is interpolated in lambda by a polynomial m through its last p values, and the rest is
integrated exactly. With $h = \lambda_t - \lambda_s$, $\eta \ge 0$ (0: probability-flow ODE, 1: reverse SDE) and $z = (1 + \eta) h$:

$$ x_t = \frac{\sigma_t}{\sigma_s} e^{-\eta h} x_s + \alpha_t \int_0^1 z\,e^{-z(1-u)}\, m(\lambda_s + u h)\,du
         + \sigma_t \sqrt{1 - e^{-2\eta h}}\;\xi . $$

First-order steps are written without logarithms, so alpha_s = 0 and sigma_t = 0 are legal. Next to an infinite lambda a step is first
order, and that node stays out of later histories.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UnknownNameError
from fewstep.numerics import decaying_moments, exponential_weights, lagrange_polynomials, noise_clock
from fewstep.plan import Interval, Row
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver

__all__ = ["DPMSolverPP"]


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++ multistep ("2M" at order 2, "3M" at order 3).

    Args:
        order: 1, 2 or 3. The first steps have as many stored values as there are, so they are of lower order.
        variant: of every second-order step. ``"midpoint"`` is the published 2M; ``"taylor"`` integrates the linear interpolant exactly
            (``"heun"`` in some libraries). Both are of order 2; their errors differ at a given number of calls.
        eta: 0 the probability-flow ODE; 1 the reverse SDE (SDE-DPM-Solver++); any value of at least 0 has the same marginals.
        lower_order_final: in plans of fewer than this many calls, the last steps drop to order 2 and 1. The authors' code has 10; 0 never
            does. Steps into sigma = 0 are first order in any case.
        compat: ``"exact"``, or ``"official"`` for the published third-order step.

    Raises:
        ValueError: for an order, variant, eta or compat that does not exist.

    Note:
        The first step of a multistep method has one stored value and is of order 1, which would cap the third order at 2 wherever the
        data prediction already changes at the start. At order 3 that step is therefore corrected when the second prediction is known
        (by the interpolant through both, as UniC does, arXiv 2302.04867), at no call.

        The authors' code, and the libraries that follow it, leave out a factor 2 in the second difference of the third-order step,
        which then converges at order 2. The default is the step that converges at order 3; ``compat="official"`` reproduces the
        published one, start included.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> DPMSolverPP(order=3).plan(VPLinear(), nfe=8, grid="lambda").nfe
        8
    """

    source: ClassVar[str] = "DPM-Solver++, arXiv 2211.01095"

    order: int = 2
    variant: str = "midpoint"
    eta: float = 0.0
    lower_order_final: int = 0
    compat: str = "exact"

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order not in (1, 2, 3):
            raise ValueError(f"DPM-Solver++ has orders 1, 2 and 3, got {self.order!r}.")
        if not 0.0 <= self.eta <= 10.0:
            raise ValueError(f"eta must lie in [0, 10], got {self.eta:g}.")
        if self.variant not in ("midpoint", "taylor"):
            raise UnknownNameError("variant", self.variant, ("midpoint", "taylor"))
        if self.compat not in ("exact", "official"):
            raise UnknownNameError("compat", self.compat, ("exact", "official"))

    @property
    def claimed_order(self) -> int:
        return 2 if self.compat == "official" else self.order

    def rows(self, schedule: NoiseSchedule, times: NDArray[np.float64], calls: Sequence[int]) -> Iterator[Row]:
        lam, alpha, sigma = schedule.lam(times), schedule.alpha(times), schedule.sigma(times)
        nfe, first = len(times) - 1, int(np.isinf(lam[0]))
        for i in range(nfe):
            h = float(lam[i + 1] - lam[i])
            z, decay = (1.0 + self.eta) * h, math.exp(-self.eta * h) if self.eta else 1.0
            carry = float(sigma[i + 1] / sigma[i]) * decay
            if math.isinf(h):  # first order without logarithms: the same numbers, finite at both ends
                weights = np.array([alpha[i + 1] - alpha[i] * carry])
            else:
                order = min(self.order, i - first + 1, nfe - i if nfe < self.lower_order_final else self.order)
                nodes = (lam[i + 1 - order : i + 1][::-1] - lam[i]) / h
                weights = alpha[i + 1] * self._weights(nodes, z)
                if i == first + 1 and order > 1:
                    weights = weights + carry * self._correction(alpha, lam, first)
            noise = None
            if self.eta and sigma[i + 1] > 0.0:
                scale = float(sigma[i + 1]) * math.sqrt(-math.expm1(-2.0 * self.eta * h))
                noise = Interval(scale, *(noise_clock(float(lam[j]), self.eta) for j in (i, i + 1)))
            yield Row(float(times[i]), (carry,), tuple(weights.tolist()), noise=noise)

    def _correction(self, alpha: NDArray[np.float64], lam: NDArray[np.float64], first: int) -> NDArray[np.float64]:
        """What the first step lacks, known once the second prediction is there: weights of the newest two predictions."""
        if self.order < 3 or self.compat == "official":
            return np.zeros(2)
        z = (1.0 + self.eta) * float(lam[first + 1] - lam[first])
        return alpha[first + 1] * (exponential_weights([1.0, 0.0], z) - [0.0, -math.expm1(-z)])

    def _weights(self, nodes: NDArray[np.float64], z: float) -> NDArray[np.float64]:
        """Weights of the stored predictions over alpha_t, newest first; `nodes` in units of the step."""
        if len(nodes) == 2 and self.variant == "midpoint":
            slope = 0.5 / -nodes[1]
            return -math.expm1(-z) * np.array([1.0 + slope, -slope])
        if len(nodes) == 3 and self.compat == "official":
            return lagrange_polynomials(nodes) @ (decaying_moments(z, 3) * [1.0, 1.0, 0.5])
        return exponential_weights(nodes, z)
