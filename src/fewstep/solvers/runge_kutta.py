r"""Explicit Runge-Kutta methods on the probability-flow ODE, in the variable that straightens it: the rho-RK of DEIS, and rectified-flow
Euler, Heun, midpoint and RK4 in the velocity, on every schedule.

Sources: "Fast Sampling of Diffusion Models with Exponential Integrator" (arXiv 2204.13902, section 3.3 and appendix) for rho-RK; "Flow
Straight and Fast" (arXiv 2209.03003, eq. 1) and "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv
2403.03206) for the flow; the tableaux, by name, from E. Hairer, S. P. Norsett, G. Wanner, "Solving Ordinary Differential Equations I".
Divided by a scale, the state moves along the prediction itself:

| prediction f | scale | clock u | |
| --- | --- | --- | --- |
| noise $\varepsilon$ | $\alpha$ | $\rho = \sigma / \alpha$ | $d(x/\alpha)/d\rho = \varepsilon$ |
| flow $\varepsilon - x_0$ | $\alpha + \sigma$ | $s = \sigma / (\alpha + \sigma)$ | $d(x/(\alpha+\sigma))/ds = \varepsilon - x_0$ |

For the rectified-flow schedule the second scale is 1 and the clock is sigma. Stage j of a step from u to u + k lies at u + c_j k, that
is, at the time at which the schedule has this noise level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UnknownNameError
from fewstep.plan import Row
from fewstep.predictions import data_coefficients
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver

__all__ = ["FlowRK", "RhoRK"]

Floats = NDArray[np.float64]


class Tableau(NamedTuple):
    """An explicit method: a has one row a stage after the first, b the weights of the step."""

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    @property
    def c(self) -> tuple[float, ...]:
        return (0.0, *(math.fsum(row) for row in self.a))


TABLEAUX = {
    "euler": Tableau(1, (), (1.0,)),
    "heun": Tableau(2, ((1.0,),), (1 / 2, 1 / 2)),
    "midpoint": Tableau(2, ((1 / 2,),), (0.0, 1.0)),
    "kutta3": Tableau(3, ((1 / 2,), (-1.0, 2.0)), (1 / 6, 4 / 6, 1 / 6)),
    "heun3": Tableau(3, ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "ralston3": Tableau(3, ((1 / 2,), (0.0, 3 / 4)), (2 / 9, 3 / 9, 4 / 9)),
    "houwen3": Tableau(3, ((8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0.0, 3 / 4)),
    "ssprk3": Tableau(3, ((1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 4 / 6)),
    "rk4": Tableau(4, ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 2 / 6, 2 / 6, 1 / 6)),
}
"""The methods by name. DEIS's code calls them 1euler, 2heun, 3kutta, 3heun, 3ral, 3vdh, 3ssprk and 4rk, and has no midpoint."""
SHORTER = {1: "euler", 2: "heun", 3: "kutta3"}
"""What a step does that is paid fewer calls than the method has stages."""


@dataclass(frozen=True)
class _RungeKutta(Solver):
    """A method by name, on the ODE of one prediction."""

    cost: ClassVar[str] = "1 to 4 calls a step, by kind"
    prediction: ClassVar[str]

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in TABLEAUX:
            raise UnknownNameError("kind", self.kind, TABLEAUX)

    @property
    def claimed_order(self) -> int:
        return TABLEAUX[self.kind].order

    @property
    def stages(self) -> int:
        return len(TABLEAUX[self.kind].b)

    def split(self, budget: int) -> list[int]:
        """The fewest steps, as equal as can be in calls, the longer ones first: a last step of one call would lower the order."""
        steps = -(-budget // self.stages)
        return [budget // steps + (k < budget % steps) for k in range(steps)] if steps else []

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        return _rows(schedule, times, calls, self.prediction, self.kind)


@dataclass(frozen=True)
class RhoRK(_RungeKutta):
    """Runge-Kutta in rho = sigma / alpha on the noise prediction ("rho-RK" of DEIS).

    Args:
        kind: ``"euler"`` (which is DDIM), ``"heun"``, ``"midpoint"``, ``"kutta3"``, ``"heun3"``, ``"ralston3"``, ``"houwen3"``,
            ``"ssprk3"`` or ``"rk4"``.

    Raises:
        UnknownNameError: for another kind.

    Note:
        A budget of n calls makes n / stages steps, rounded up; the last steps have one stage less if n is no multiple, and the order
        that goes with it (Heun for 2 stages, Kutta's third-order method for 3).

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> plan = RhoRK("heun").plan(VPLinear(), nfe=5)
        >>> plan.nfe, bool(plan.tau[1] == plan.tau[2])
        (5, True)
    """

    source: ClassVar[str] = "DEIS, arXiv 2204.13902"
    prediction: ClassVar[str] = "noise"

    kind: str = "kutta3"


@dataclass(frozen=True)
class FlowRK(_RungeKutta):
    """Rectified-flow Euler, Heun, midpoint or RK4: Runge-Kutta on the velocity eps - x_0, whatever the schedule.

    Args:
        kind: ``"euler"`` (which is DDIM), ``"heun"``, ``"midpoint"`` or ``"rk4"``, and the third-order methods of `RhoRK`.

    Raises:
        UnknownNameError: for another kind.

    Note:
        The budget is spent as by `RhoRK`. The velocity is regular at alpha = 0, so a step from pure noise has all its stages; a step
        into sigma = 0 is first order.

    Example:
        >>> from fewstep.schedules import Flow
        >>> [round(t, 3) for t in FlowRK("midpoint").plan(Flow(t_end=0.0), nfe=5, grid="time").tau.tolist()]
        [1.0, 0.8, 0.6, 0.4, 0.2]
    """

    source: ClassVar[str] = "Flow Straight and Fast, arXiv 2209.03003"
    prediction: ClassVar[str] = "flow"

    kind: str = "heun"

    def single_call(self, lams: Floats) -> NDArray[np.bool_]:
        return lams == math.inf


def _rows(schedule: NoiseSchedule, times: Floats, calls: Sequence[int], prediction: str, kind: str) -> Iterator[Row]:
    for k, count in enumerate(calls):
        begin, end = float(times[k]), float(times[k + 1])
        if count == 1:
            yield _euler(schedule, begin, end)
            continue
        tableau = TABLEAUX[kind if count == len(TABLEAUX[kind].b) else SHORTER[count]]
        stages = [begin, *_stages(schedule, begin, end, prediction, tableau.c[1:]), end]
        (scale, clock), taus = _straight(schedule, np.array(stages), prediction), stages[:-1]
        for m, (tau, weights) in enumerate(zip(taus, [*tableau.a, tableau.b], strict=True)):
            carry = float(scale[m + 1] / scale[0])
            length = float(scale[m + 1] * (clock[-1] - clock[0]))
            a, b = data_coefficients(prediction, float(schedule.alpha(tau)), float(schedule.sigma(tau)))
            yield Row(tau, (*[0.0] * m, carry), tuple(length * w for w in reversed(weights)), -a / b, 1.0 / b)


def _euler(schedule: NoiseSchedule, begin: float, end: float) -> Row:
    """A step of one call, in a form that is exact at alpha = 0 and sigma = 0."""
    (alpha, alpha_end), (sigma, sigma_end) = schedule.alpha([begin, end]).tolist(), schedule.sigma([begin, end]).tolist()
    return Row(begin, (sigma_end / sigma,), (alpha_end - alpha * sigma_end / sigma,))


def _straight(schedule: NoiseSchedule, times: Floats, prediction: str) -> tuple[Floats, Floats]:
    """Scale and clock in which the ODE's slope is the prediction."""
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    scale = alpha if prediction == "noise" else alpha + sigma
    return scale, sigma / scale


def _stages(schedule: NoiseSchedule, begin: float, end: float, prediction: str, places: Sequence[float]) -> list[float]:
    """Times of the stages of a step, which lie at `places` of its clock."""
    _, (low, high) = _straight(schedule, np.array([begin, end]), prediction)
    clock = low + np.array(places) * (high - low)
    lam = -np.log(clock) if prediction == "noise" else np.log1p(-clock) - np.log(clock)
    return [end if c == 1.0 else t for c, t in zip(places, schedule.t_of_lam(lam).tolist(), strict=True)]
