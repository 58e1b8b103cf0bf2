r"""Adams methods on the probability-flow ODE: LMS (Adams-Bashforth) and the predictor-corrector pair (Adams-Bashforth-Moulton).

Sources: k-diffusion's linear multistep sampler ("LMS"), which is Adams-Bashforth with variable steps in sigma of the variance-exploding
form (K. Crowson, github.com/crowsonkb/k-diffusion, 2022; its derivative is that of "Elucidating the Design Space of Diffusion-Based
Generative Models", arXiv 2206.00364, eq. 3); E. Hairer, S. P. Norsett, G. Wanner, "Solving Ordinary Differential Equations I", section
III.5, eq. 5.1-5.9, for variable steps and the pair in PEC mode. Divided by a scale, the state moves along the prediction f itself,

$$ \frac{x_t}{S_t} = \frac{x_s}{S_s} + \int_{u_s}^{u_t} f\,du, $$

with f the noise prediction, S = alpha and u = sigma / alpha, or f the flow $d\,\varepsilon - x_0$ between data and noise of standard
deviation d, $S = \alpha + \sigma / d$ and $u = (\sigma / d) / S$. f is replaced by the polynomial in u through its last values, and that is
integrated exactly. (With d = 1 the flow is that of rectified flow.)

The corrector goes over the step again once the prediction at its end is known, with that value as one more node; the prediction is not
made again at the corrected state, so it costs no call. The last step stays as predicted.
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
from fewstep.numerics import lagrange_polynomials, padded_sum
from fewstep.plan import Row
from fewstep.predictions import data_coefficients
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver, check_order

__all__ = ["Adams"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Adams(Solver):
    """Adams-Bashforth multistep ("LMS"), with or without the Adams-Moulton corrector.

    Args:
        order: 1 to 4, how many stored values the predictor uses. The first steps use as many as there are.
        prediction: ``"noise"``: in sigma / alpha, as k-diffusion's LMS; ``"flow"``: in the velocity of rectified flow.
        corrector: ``"none"``, as k-diffusion's LMS; ``"start"``, of the first step only; ``"every"``, of every step but the last.
        data_std: d, the standard deviation of the data as the flow sees it; with ``prediction="flow"`` only.

    Raises:
        ValueError: for an order that does not exist, or a standard deviation that is not positive, or not 1 with ``prediction="noise"``.
        UnknownNameError: for a prediction or corrector that does not exist.

    Note:
        The first step has one stored value and is of order 1, which caps the order of the whole at 2 wherever the prediction already
        changes at the start. Corrected, it is of order 2, which makes room for the third order of the whole, but not for the fourth. It
        is corrected in the velocity, whatever the prediction: near alpha = 0 the slope of the noise prediction in sigma / alpha is steep,
        and a corrector in that variable overshoots. With the corrector on every step the order is one more than that of the predictor,
        within these limits.

        ``Adams(prediction="noise")`` takes the same steps as DEIS in rho.

    Example:
        >>> from fewstep.schedules import EDM
        >>> plan = Adams(order=3).plan(EDM(), nfe=5, grid="karras")
        >>> [len(row.weights) for row in plan.rows]
        [1, 2, 3, 3, 3]
    """

    source: ClassVar[str] = "LMS of k-diffusion; Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, III.5"

    order: int = 3
    prediction: str = "noise"
    corrector: str = "start"
    data_std: float = 1.0

    def __post_init__(self) -> None:
        check_order(self.order, (1, 2, 3, 4), "Adams has orders 1 to 4")
        if self.prediction not in ("noise", "flow"):
            raise UnknownNameError("prediction", self.prediction, ("noise", "flow"))
        if self.corrector not in ("none", "start", "every"):
            raise UnknownNameError("corrector", self.corrector, ("none", "start", "every"))
        if not 0.0 < self.data_std < math.inf or (self.prediction == "noise" and self.data_std != 1.0):
            raise ValueError(f"data_std must be positive, and belongs to the flow, got {self.data_std:g} with {self.prediction!r}.")

    @property
    def claimed_order(self) -> int:
        gained = self.corrector == "every"
        return min(self.order + gained, 2 if self.corrector == "none" else 3)

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        lam, alpha, sigma = schedule.lam(times), schedule.alpha(times), schedule.sigma(times) / self.data_std
        scale = alpha if self.prediction == "noise" else alpha + sigma
        first = int(np.isinf(lam[0]) and self.prediction == "noise")
        clock = np.append(np.full(first, np.nan), sigma[first:] / scale[first:])
        for i, t in enumerate(times[:-1].tolist()):
            if i < first or math.isinf(lam[i + 1]):
                carry = float(sigma[i + 1] / sigma[i])
                yield Row(t, (carry,), (float(alpha[i + 1] - alpha[i] * carry),))
                continue
            nodes = np.arange(i, max(i - self.order, first - 1), -1)
            carry = np.array([scale[i + 1] / scale[i]])
            weights = scale[i + 1] * self._weights(clock, i, nodes)
            if i == first + 1 and self.corrector != "none":
                states, outputs = trapezoidal_end(self.prediction, alpha[first : i + 1], sigma[first : i + 1])
                weights, carry = padded_sum(weights, carry * outputs), carry * states
            elif i > first + 1 and self.corrector == "every":
                weights = padded_sum(weights, scale[i + 1] * self._correction(clock, i, first))
            a, b = data_coefficients(self.prediction, float(alpha[i]), float(sigma[i]))
            yield Row(t, tuple(carry.tolist()), tuple(weights.tolist()), -a / b, 1.0 / b)

    def _weights(self, clock: Floats, i: int, nodes: NDArray[np.intp]) -> Floats:
        """Weights over the scale of the values at `nodes` in the step from i to i + 1."""
        length = clock[i + 1] - clock[i]
        basis = lagrange_polynomials((clock[nodes] - clock[i]) / length)
        return length * (basis @ (1.0 / np.arange(1, len(nodes) + 1)))

    def _correction(self, clock: Floats, i: int, first: int) -> Floats:
        """What the step from i - 1 to i lacks, known once value i is there: weights over the scale, newest first."""
        used = np.arange(i - 1, max(i - 1 - self.order, first - 1), -1)
        better = self._weights(clock, i - 1, np.append(i, used))
        return better - np.append(0.0, self._weights(clock, i - 1, used))
