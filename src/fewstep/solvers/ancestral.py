r"""Ancestral steps: solve the ODE to below the next noise level, and add noise to reach it.

Sources: "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239, eq. 6-7) for how far below; the steps are those of K. Crowson's
k-diffusion, which joins them with Euler's method, DPM-Solver-2 (arXiv 2206.00927, algorithm 1) and DPM-Solver++(2S) (arXiv 2211.01095,
algorithm 1), and of ComfyUI for flows. With $\varrho = \sigma/\alpha$ and $y = x/\alpha$, a step from $\varrho$ to $\varrho'$ solves the
ODE $dy/d\varrho = (y - D)/\varrho$ down to $\varrho_\downarrow$, and

$$ y' = y_\downarrow + S_\text{noise} \sqrt{\varrho'^2 - \varrho_\downarrow^2}\;\xi, \qquad
   \varrho_\downarrow^2 = \varrho'^2 \left( 1 - \eta^2 \left( 1 - \varrho'^2/\varrho^2 \right) \right) . $$

For flows $\sigma_\downarrow = \sigma' (1 + \eta\,(\sigma'/\sigma - 1))$ takes the place of the last equation, with $\sigma$ that of
$\alpha + \sigma = 1$. The ODE's step is Euler's, which is DDIM, or of second order with a second call at
$m = \sqrt{\varrho \varrho_\downarrow}$: with D and D' the data predictions at both places,

$$ y_m = \frac{m}{\varrho}\, y + \left( 1 - \frac{m}{\varrho} \right) D, \qquad
   y_\downarrow = y + (\varrho_\downarrow - \varrho) \frac{y_m - D'}{m} \quad\text{(DPM2)}, \qquad
   y_\downarrow = \frac{\varrho_\downarrow}{\varrho}\, y + \left( 1 - \frac{\varrho_\downarrow}{\varrho} \right) D' \quad\text{(2S)}. $$

No noise is drawn inside a step, so as solvers of a stochastic equation these are of order 1, in the drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.numerics import noise_clock
from fewstep.plan import Interval, Row
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver

__all__ = ["DPM2Ancestral", "DPMPP2SAncestral", "EulerAncestral", "FlowAncestral"]

Floats = NDArray[np.float64]
SAME = 1e-12
"""Relative difference below which a place inside a step is its end."""


@dataclass(frozen=True)
class _Ancestral(Solver):
    """The options of all."""

    eta: float = 1.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta:g}.")
        if not (math.isfinite(self.s_noise) and self.s_noise > 0.0):
            raise ValueError(f"s_noise must be positive, got {self.s_noise:g}.")

    @property
    def claimed_order(self) -> int:
        return 1


@dataclass(frozen=True)
class EulerAncestral(_Ancestral):
    """Euler's method with ancestral steps ("Euler a"). With s_noise = 1 it is `DDIM` with the same eta.

    Args:
        eta: 0 to 1, how far below the next level a step goes, and so how much noise is drawn; 0 none, 1 as DDPM.
        s_noise: positive; deviation of the added noise relative to what was.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> from fewstep.schedules import EDM
        >>> EulerAncestral(s_noise=1.003).plan(EDM(), nfe=20, grid="karras").stochastic
        True
    """

    source: ClassVar[str] = "Denoising Diffusion Probabilistic Models, arXiv 2006.11239"

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        steps = _Steps(schedule, times, self)
        return (steps.euler(k, steps.fresh(k)) for k in range(len(calls)))


@dataclass(frozen=True)
class FlowAncestral(_Ancestral):
    """Euler's method with ancestral steps in the sigma of flows ("Euler a" of rectified flow), on every schedule.

    Args:
        eta, s_noise: as of `EulerAncestral`. The same eta draws another share of noise.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> from fewstep.schedules import Flow
        >>> plan = FlowAncestral().plan(Flow(t_end=0.0), nfe=2, grid="time")
        >>> round(plan.rows[0].noise.scale, 4), plan.rows[1].noise
        (0.4714, None)
    """

    source: ClassVar[str] = "Flow Straight and Fast, arXiv 2209.03003"

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        steps = _Steps(schedule, times, self, rate=self.eta)
        return (steps.euler(k, steps.fresh_of_flow(k)) for k in range(len(calls)))


class _SecondOrder(_Ancestral):
    """A second call inside every step, but for those from alpha = 0 or into sigma = 0."""

    cost: ClassVar[str] = "2 calls a step"
    of_noise: ClassVar[bool]

    @property
    def claimed_order(self) -> int:
        return 1 if self.eta else 2

    @property
    def stages(self) -> int:
        return 2

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        steps = _Steps(schedule, times, self)
        for k, count in enumerate(calls):
            yield from steps.second_order(k, of_noise=self.of_noise) if count == 2 else (steps.euler(k, steps.fresh(k)),)


@dataclass(frozen=True)
class DPM2Ancestral(_SecondOrder):
    """DPM-Solver-2 with ancestral steps ("DPM2 a"): two calls a step, and one for a step from alpha = 0 or into sigma = 0.

    Args:
        eta, s_noise: as of `EulerAncestral`; eta = 0 is `DPMSolverSinglestep` of order 2.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> DPM2Ancestral().plan(VPLinear(), nfe=10, grid="lambda").nfe
        10
    """

    source: ClassVar[str] = "DPM-Solver, arXiv 2206.00927"
    of_noise: ClassVar[bool] = True


@dataclass(frozen=True)
class DPMPP2SAncestral(_SecondOrder):
    """DPM-Solver++(2S) with ancestral steps ("DPM++ 2S a"): two calls a step, and one for a step from alpha = 0 or into sigma = 0.

    Args:
        eta, s_noise: as of `EulerAncestral`; eta = 0 is `DPMSolverPPSinglestep` of order 2.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> plan = DPMPP2SAncestral().plan(VPLinear(), nfe=10, grid="lambda")
        >>> [row.noise is not None for row in plan.rows[:4]]
        [False, True, False, True]
    """

    source: ClassVar[str] = "DPM-Solver++, arXiv 2211.01095"
    of_noise: ClassVar[bool] = False


class _Inside(NamedTuple):
    """The state inside a step: its time, alpha and sigma."""

    t: float
    alpha: float
    sigma: float


class _Steps:
    """The steps between the times of a grid. `fresh` is the share of the variance at the end of a step that is drawn.

    `rate` is that of the noise's clock, of the equation that short steps solve; left out, eta squared.
    """

    def __init__(self, schedule: NoiseSchedule, times: Floats, options: _Ancestral, rate: float | None = None):
        self.schedule, self.options, self.times = schedule, options, times.tolist()
        self.rate = options.eta**2 if rate is None else rate
        self.lam, self.alpha, self.sigma = (f(times).tolist() for f in (schedule.lam, schedule.alpha, schedule.sigma))

    def fresh(self, k: int) -> float:
        return self.options.eta**2 * -math.expm1(-2.0 * (self.lam[k + 1] - self.lam[k])) if self.options.eta else 0.0

    def fresh_of_flow(self, k: int) -> float:
        begin, end = (self.sigma[j] / (self.alpha[j] + self.sigma[j]) for j in (k, k + 1))
        short = self.options.eta * (1.0 - end / begin)
        gone = short / (1.0 - end * (1.0 - short))  # 1 - rho_down / rho'
        return gone * (2.0 - gone)

    def euler(self, k: int, fresh: float) -> Row:
        carry = math.sqrt(1.0 - fresh) * self.sigma[k + 1] / self.sigma[k]
        return Row(self.times[k], (carry,), (self.alpha[k + 1] - self.alpha[k] * carry,), noise=self._noise(k, fresh))

    def second_order(self, k: int, *, of_noise: bool) -> Iterator[Row]:
        fresh, alpha = self.fresh(k), self.alpha[k + 1]
        down = self.lam[k + 1] - self.lam[k] - 0.5 * math.log1p(-fresh)  # the step of the ODE in lambda
        inside = self._inside(k, 0.5 * down)
        half = inside.sigma / self.sigma[k]
        yield Row(self.times[k], (half,), (inside.alpha - self.alpha[k] * half,))
        if of_noise:  # y + (rho_down - rho) (y_m - D') / m
            change = alpha * (math.exp(-0.5 * down) - math.exp(0.5 * down))
            carry, weights = (change / inside.alpha, alpha / self.alpha[k]), (-change,)
        else:
            whole = math.sqrt(1.0 - fresh) * self.sigma[k + 1] / self.sigma[k]
            carry, weights = (0.0, whole), (alpha - self.alpha[k] * whole,)
        yield Row(inside.t, carry, weights, noise=self._noise(k, fresh))

    def _inside(self, k: int, h: float) -> _Inside:
        """At h in lambda from the begin of step k. At eta = 1 that is the end of the step."""
        t = float(self.schedule.t_of_lam(self.lam[k] + h))
        if math.isclose(h, self.lam[k + 1] - self.lam[k], rel_tol=SAME):
            t = self.times[k + 1]
        return _Inside(t, float(self.schedule.alpha(t)), float(self.schedule.sigma(t)))

    def _noise(self, k: int, fresh: float) -> Interval | None:
        if fresh == 0.0 or self.sigma[k + 1] == 0.0:
            return None
        scale = self.options.s_noise * math.sqrt(fresh) * self.sigma[k + 1]
        return Interval(scale, *(noise_clock(self.lam[j], self.rate) for j in (k, k + 1)))
