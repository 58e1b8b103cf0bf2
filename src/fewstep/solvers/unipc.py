r"""UniPC: the unified predictor-corrector of any order.

Source: "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models" (arXiv 2302.04867,
section 3, algorithms 1 and 2), and its official code. The model's prediction m is interpolated in lambda by the
polynomial through its last p values and integrated exactly, $h = \lambda_t - \lambda_s$:

$$ x_t = \frac{\sigma_t}{\sigma_s} x_s + \alpha_t \int_0^1 h\,e^{-h(1-u)}\,m(\lambda_s + uh)\,du \quad\text{(data)}, \qquad
   x_t = \frac{\alpha_t}{\alpha_s} x_s - \sigma_t \int_0^1 h\,e^{h(1-u)}\,m(\lambda_s + uh)\,du \quad\text{(noise)}. $$

That is the predictor, UniP-p. The next call evaluates the model at the predicted state, and the corrector, UniC-p, repeats the
step with that value as one more node at $\lambda_t$: one more order at no call, for the value is kept and not evaluated again.

The paper solves $R\rho = b$ and scales by a free function B(h), which cancels. It shows only in two *shortcuts*, where the code
puts $\rho = 1/2$ instead of solving: in the predictor of order 2 and in the corrector of order 1, with $B = h$ (``"bh1"``) or
$B = e^{h} - 1$ (``"bh2"``), h negative for data predictions. Both are of the same order as the exact weights.

First-order steps are written without logarithms, so alpha_s = 0 and sigma_t = 0 are legal. Next to an infinite lambda a step is first
order and not corrected, and that node stays out of later histories.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UnknownNameError
from fewstep.multistep import Multistep, Step
from fewstep.numerics import exponential_weights
from fewstep.schedules import NoiseSchedule
from fewstep.solver import check_order

__all__ = ["UniPC"]

HIGHEST_ORDER = 6


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniPC-p, and with ``corrector=False`` the predictor UniP-p alone.

    Args:
        order: p, 1 to 6: how many stored values the predictor uses. The first steps have as many as there are.
        corrector: whether steps are corrected. The last step never is: it would cost a call.
        corrector_skip: steps that are not corrected, counted from 0. The authors suggest the first ones under strong guidance.
        shortcut: ``"bh1"``, ``"bh2"`` or ``"none"``, see above. The authors' advice: bh1 unguided, bh2 guided. With ``"none"`` it is what
            the paper calls the varying-coefficient variant.
        prediction: ``"data"`` or ``"noise"``, what is interpolated; the network may predict anything.
        lower_order_final: the last steps drop to orders p-1, ..., 1, as the authors' code does in every plan.

    Raises:
        ValueError: for an order, shortcut or prediction that does not exist, or steps to skip where nothing is corrected.

    Note:
        The corrected steps have a local error of order p + 2. The first step is an exception: its predictor is of order 1, the model is
        evaluated there, and that value is never replaced. So order 3 is the most that holds wherever the prediction already changes at
        the start. Where it hardly does, as at the noisy end of a long interval, UniPC-p is seen to converge at order p + 1.

        With ``lower_order_final``, the default of the authors' code, the last step is of order 1 and the whole of order 2. The default here
        keeps the order that the paper claims. At 5 to 20 calls the lowered order is often the smaller error all the same: on a mixture of
        Gaussians 0.09 to 0.64 times that of the default on the grid ``"auto"``, 0.6 to 5 times on ``"lambda"``.

        The correction of the first step overshoots where predictions weigh the more the nearer they are to its end, so with
        ``prediction="noise"`` from near alpha = 0, and on the way back from near sigma = 0 with ``"data"``. ``"bh1"`` damps that,
        ``"bh2"`` and ``"none"`` do not. ``corrector_skip=(0,)`` avoids it.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> UniPC(order=2).plan(VPLinear(), nfe=6, grid="lambda").nfe
        6
    """

    source: ClassVar[str] = "UniPC, arXiv 2302.04867"

    order: int = 3
    corrector: bool = True
    corrector_skip: tuple[int, ...] = ()
    shortcut: str = "bh1"
    prediction: str = "data"
    lower_order_final: bool = False

    def __post_init__(self) -> None:
        check_order(self.order, range(1, HIGHEST_ORDER + 1), f"UniPC has orders 1 to {HIGHEST_ORDER}")
        if self.shortcut not in ("bh1", "bh2", "none"):
            raise UnknownNameError("shortcut", self.shortcut, ("bh1", "bh2", "none"))
        if self.prediction not in ("data", "noise"):
            raise UnknownNameError("prediction", self.prediction, ("data", "noise"))
        object.__setattr__(self, "corrector_skip", tuple(self.corrector_skip))
        if self.corrector_skip and not self.corrector:
            raise ValueError("corrector_skip names steps that are not corrected, but corrector=False corrects none. Leave it out.")
        if any(step < 0 for step in self.corrector_skip):
            raise ValueError(f"steps are counted from 0, but corrector_skip holds {min(self.corrector_skip)}.")

    @property
    def claimed_order(self) -> int:
        start = 3 if self.corrector and 0 not in self.corrector_skip else 2
        return min(self.order + self.corrector, start, 2 if self.lower_order_final else start)

    def steps(self, schedule: NoiseSchedule, times: NDArray[np.float64]) -> Iterator[Step]:
        lam, alpha, sigma = schedule.lam(times), schedule.alpha(times), schedule.sigma(times)
        data = self.prediction == "data"
        kept, scale = (sigma, alpha) if data else (alpha, sigma)
        nfe, first = len(times) - 1, int(np.isinf(lam[0]))
        correction: NDArray[np.float64] = np.zeros(0)
        for i in range(nfe):
            h = float(lam[i + 1] - lam[i])
            if math.isinf(h):  # first order on the data prediction, without logarithms: finite at both ends
                carry = float(sigma[i + 1] / sigma[i])
                yield Step(float(times[i]), carry, (float(alpha[i + 1] - alpha[i] * carry),))
                continue
            order = min(self.order, i - first + 1, nfe - i if self.lower_order_final else self.order)
            nodes, z = (lam[i + 1 - order : i + 1][::-1] - lam[i]) / h, h if data else -h
            weights = scale[i + 1] * self._predictor(nodes, z)
            yield Step(
                float(times[i]),
                float(kept[i + 1] / kept[i]),
                tuple(weights.tolist()),
                state_gain=0.0 if data else float(1.0 / sigma[i]),
                output_gain=1.0 if data else float(-alpha[i] / sigma[i]),
                stores=self.prediction,
                correction=tuple(correction.tolist()),
            )
            correction = np.zeros(0)
            if self.corrector and i not in self.corrector_skip:
                correction = scale[i + 1] * self._corrector(nodes, z) - [0.0, *weights]

    def _predictor(self, nodes: NDArray[np.float64], z: float) -> NDArray[np.float64]:
        """Weights of the stored values over the scale, newest first."""
        if len(nodes) == 2 and self.shortcut != "none":
            slope = 0.5 * self._b(z) / nodes[1]
            return np.array([-math.expm1(-z) + slope, -slope])
        return exponential_weights(nodes, z)

    def _corrector(self, nodes: NDArray[np.float64], z: float) -> NDArray[np.float64]:
        """The same with the value at the end of the step, which comes first."""
        if len(nodes) == 1 and self.shortcut != "none":
            half = 0.5 * self._b(z)
            return np.array([-half, -math.expm1(-z) + half])
        return exponential_weights([1.0, *nodes], z)

    def _b(self, z: float) -> float:
        return -z if self.shortcut == "bh1" else math.expm1(-z)
