r"""PNDM: Adams-Bashforth and Runge-Kutta weights of equal steps on the noise prediction, with DDIM's step in between ("PLMS").

Source: "Pseudo Numerical Methods for Diffusion Models on Manifolds" (arXiv 2202.09778, eq. 9 and 11-13, algorithm 2). With
$\varrho = \sigma/\alpha$ and $y = x/\alpha$, DDIM's step with any noise $\varepsilon$ is the paper's transfer,
$\phi(y, \varepsilon, t, t') = y + (\varrho_{t'} - \varrho_t)\,\varepsilon$. A step takes for $\varepsilon$ a mean of predictions: of those
at the begins of the newest steps,

$$ \tfrac12 (3 e_0 - e_1), \qquad \tfrac1{12} (23 e_0 - 16 e_1 + 5 e_2), \qquad \tfrac1{24} (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) ; $$

the first steps, with too few of them, from calls inside the step: Heun's method, or the classical one of Runge and Kutta with two calls in
the middle in t.

The weights are those of equal steps, which $\varrho$ does not make: the mean of a product is not the product of the means. That leaves
order 2, whatever the weights, as the paper says. Next to an infinite lambda a step is first order on the data prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import GridError, UnknownNameError
from fewstep.numerics import EQUAL_STEPS
from fewstep.plan import Row
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver, check_order

__all__ = ["PNDM"]

Floats = NDArray[np.float64]
STAGES = {
    1: ((1.0,),),
    2: ((1.0,), (1 / 2, 1 / 2)),
    4: ((1.0,), (0.0, 1.0), (0.0, 0.0, 1.0), (1 / 6, 2 / 6, 2 / 6, 1 / 6)),
}
"""Of a step with so many calls: the weights of the predictions in the state after each, oldest first."""
PLACES = {1: (), 2: (1.0,), 4: (0.5, 0.5, 1.0)}
"""Where the states after the calls but the last lie, in t."""
STARTS = {"heun": 2, "runge_kutta": 4}
"""Calls of a step at the start."""


@dataclass(frozen=True)
class PNDM(Solver):
    """PNDM, or PLMS: one call a step, but for the start.

    Args:
        order: 2, 3 or 4: how many predictions the weights are on. The order of convergence is 2.
        startup: ``"heun"``: the first step takes two calls, and the next ones as many predictions as there are; ``"runge_kutta"``: the
            first `order` - 1 steps take four.

    Raises:
        ValueError: for another order.
        UnknownNameError: for another startup.

    Note:
        F-PNDM of the paper is ``order=4, startup="runge_kutta"``, S-PNDM ``order=2, startup="heun"``. Pipelines of Stable Diffusion run
        the default. `IPNDM` has no start at all.

        n calls make n - 1 steps, or n - 9 with Runge and Kutta's start; a grid has the times of the steps.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> PNDM().plan(VPLinear(), nfe=5, grid="time").tau.round(2).tolist()
        [1.0, 0.75, 0.75, 0.5, 0.25]
    """

    source: ClassVar[str] = "Pseudo Numerical Methods for Diffusion Models on Manifolds, arXiv 2202.09778"
    cost: ClassVar[str] = "1 call a step, 2 or 4 in the first"

    order: int = 4
    startup: str = "heun"

    def __post_init__(self) -> None:
        check_order(self.order, (2, 3, 4), "PNDM has weights on 2, 3 or 4 predictions")
        if self.startup not in STARTS:
            raise UnknownNameError("startup", self.startup, STARTS)

    @property
    def claimed_order(self) -> int:
        return 2

    @property
    def stages(self) -> int:
        return STARTS[self.startup]

    @property
    def even(self) -> bool:
        return True

    def most(self, steps: int) -> list[int]:
        first = min(steps, 1 if self.startup == "heun" else self.order - 1)
        return [self.stages] * first + [1] * (steps - first)

    def split(self, budget: int) -> list[int]:
        """As many steps of the start as are paid for, and steps of one call."""
        size = self.stages if budget >= self.stages else 2
        first = min(budget // size, 1 if self.startup == "heun" else self.order - 1)
        return [size] * first + [1] * (budget - size * first)

    def _shares(self, schedule: NoiseSchedule, times: Floats, nfe: int | None) -> list[int]:
        calls = super()._shares(schedule, times, nfe)
        if any(count not in STAGES for count in calls):
            raise GridError(f"steps of PNDM take 1, 2 or 4 calls, but nfe={nfe} leaves 3 for one of them.")
        return calls

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        begins: list[int] = []  # the calls at the begins of the steps that can be remembered
        made = 0
        single = self.single_call(schedule.lam(times))
        for k, count in enumerate(calls):
            begin, end = float(times[k]), float(times[k + 1])
            if single[k : k + 2].any():
                yield _first_order(schedule, begin, end)
            else:
                begins.append(made)
                if count == 1:
                    yield self._adams(schedule, begin, end, made, begins)
                else:
                    yield from _runge_kutta(schedule, begin, end, count)
            made += count

    def _adams(self, schedule: NoiseSchedule, begin: float, end: float, call: int, begins: Sequence[int]) -> Row:
        newest = begins[: -self.order - 1 : -1]
        weights = np.zeros(call - newest[-1] + 1)
        weights[[call - made for made in newest]] = EQUAL_STEPS[len(newest)]
        return _row(schedule, begin, (begin, end), (), weights.tolist())


def _runge_kutta(schedule: NoiseSchedule, begin: float, end: float, count: int) -> Iterator[Row]:
    inner = [begin + place * (end - begin) for place in PLACES[count]]
    for m, (t, after) in enumerate(zip([begin, *inner], [*inner, end], strict=True)):
        yield _row(schedule, t, (begin, after), [0.0] * m, STAGES[count][m][::-1])


def _row(schedule: NoiseSchedule, t: float, step: tuple[float, float], skipped: Sequence[float], mean: Sequence[float]) -> Row:
    """A call at t, and the transfer over a step from the state before the skipped ones, with a mean of noise predictions."""
    (alpha, alpha_end), (sigma, sigma_end) = schedule.alpha(step).tolist(), schedule.sigma(step).tolist()
    length = sigma_end - sigma * alpha_end / alpha
    gains = float(1.0 / schedule.sigma(t)), float(-schedule.alpha(t) / schedule.sigma(t))
    return Row(t, (*skipped, alpha_end / alpha), tuple(length * w for w in mean), *gains)


def _first_order(schedule: NoiseSchedule, begin: float, end: float) -> Row:
    (alpha, alpha_end), (sigma, sigma_end) = schedule.alpha([begin, end]).tolist(), schedule.sigma([begin, end]).tolist()
    carry = sigma_end / sigma
    return Row(begin, (carry,), (alpha_end - alpha * carry,))
