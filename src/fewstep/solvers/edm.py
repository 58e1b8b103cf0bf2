r"""The samplers of EDM: Heun's method and Euler's, with or without churn, on every noise schedule.

Source: "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364, algorithm 2, and algorithm 1 for the
deterministic part). With the paper's noise level $\sigma/\alpha$, written $\varrho$ here, and $y = x/\alpha$, the probability-flow ODE is
$dy/d\varrho = (y - D)/\varrho$ on every schedule. A step from $\varrho$ to $\varrho'$ first adds noise,

$$ \hat\varrho = (1 + \gamma)\,\varrho, \qquad \hat y = y + \sqrt{\hat\varrho^2 - \varrho^2}\; S_\text{noise}\, \xi, \qquad
   \gamma = \min(S_\text{churn}/K, \sqrt 2 - 1) \;\text{ if }\; S_\text{tmin} \le \varrho \le S_\text{tmax}, \;\text{ else } 0, $$

where K is the number of steps, and then solves the ODE from $\hat\varrho$: by Euler's method
$y_p = \hat y + (\varrho' - \hat\varrho)\, s$ with the slope $s = (\hat y - D)/\hat\varrho$, which is DDIM, or by Heun's, which calls the
network a second time at $(y_p, \varrho')$ and takes the mean of both slopes. In data predictions $D$ and $D'$ that is
$y' = y_p + \tfrac12 (\hat\varrho/\varrho' - 1)(D' - D)$.

Left out: other second-order methods (the family with a parameter alpha in the paper's appendix D), and its time and scale functions
other than the schedule's own.
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

__all__ = ["EDMEuler", "EDMHeun"]

Floats = NDArray[np.float64]
LARGEST_GAMMA = math.sqrt(2.0) - 1.0


@dataclass(frozen=True)
class _EDM(Solver):
    """The options of both."""

    source: ClassVar[str] = "Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364"

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float | None = None
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.s_churn) and self.s_churn >= 0.0):
            raise ValueError(f"s_churn must be at least 0, got {self.s_churn:g}.")
        highest = math.inf if self.s_tmax is None else self.s_tmax
        if not 0.0 <= self.s_tmin <= highest:
            raise ValueError(
                f"s_tmin and s_tmax are noise levels sigma / alpha with 0 <= s_tmin <= s_tmax, got {self.s_tmin:g} and {highest:g}."
            )
        if not (math.isfinite(self.s_noise) and self.s_noise > 0.0):
            raise ValueError(f"s_noise must be positive, got {self.s_noise:g}.")

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        yield from _rows(schedule, times, calls, _churn(schedule, times, self))


@dataclass(frozen=True)
class EDMHeun(_EDM):
    """Heun's method of EDM: two calls a step, and one for a step from an infinite or to a zero noise level, or when calls run out.

    Args:
        s_churn: S_churn, at least 0; how much noise is added in all, spread over the steps. 0: deterministic.
        s_tmin, s_tmax: noise is added where sigma / alpha lies between them; without s_tmax there is no upper bound.
        s_noise: S_noise, positive; deviation of the added noise relative to what was, slightly over 1 against a network that removes
            too much.

    Raises:
        ValueError: for a value outside its range.

    Note:
        The paper's settings for ImageNet-64: s_churn 40, s_tmin 0.05, s_tmax 50, s_noise 1.003, with 256 steps (511 calls); for CIFAR-10
        30, 0.01, 1 and 1.007.

        The first step adds no noise: a state that is drawn at the plan's first noise level has all it needs. Nor does any step go to
        a noise level above the schedule's start, or the plan's if that is noisier, where the network was not trained. With the paper's
        s_tmax neither comes up.

        As the solver of a stochastic equation a step adds first and solves then, which is of order 1 in the drift.

    Example:
        >>> from fewstep.schedules import EDM
        >>> plan = EDMHeun(s_churn=40, s_tmin=0.05, s_tmax=50, s_noise=1.003).plan(EDM(), nfe=35, grid="karras", final="zero")
        >>> plan.nfe, plan.stochastic
        (35, True)
    """

    cost: ClassVar[str] = "2 calls a step"

    @property
    def claimed_order(self) -> int:
        return 1 if self.s_churn else 2

    @property
    def stages(self) -> int:
        return 2


@dataclass(frozen=True)
class EDMEuler(_EDM):
    """Euler's method of EDM: one call a step; DDIM if nothing is added.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: as of `EDMHeun`.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> from fewstep.schedules import EDM
        >>> EDMEuler().plan(EDM(), nfe=6, grid="karras").nfe
        6
    """

    @property
    def claimed_order(self) -> int:
        return 1


class _Level(NamedTuple):
    """A state from which a step begins, after its noise is added, or in which the run ends."""

    t: float
    alpha: float
    sigma: float
    noise: Interval | None


def _churn(schedule: NoiseSchedule, times: Floats, options: _EDM) -> list[_Level]:
    """The level from which every step begins, and that of the end."""
    lam, steps = schedule.lam(times).tolist(), len(times) - 1
    noisiest = min(lam[0], float(schedule.lam(schedule.t_start)))
    gamma, s_tmax = min(options.s_churn / steps, LARGEST_GAMMA), math.inf if options.s_tmax is None else options.s_tmax
    levels = []
    for k, t in enumerate(times.tolist()):
        grows = min(math.log1p(gamma), lam[k] - noisiest)  # of log(sigma / alpha)
        if not (0 < k < steps and grows > 0.0 and options.s_tmin <= math.exp(-lam[k]) <= s_tmax):
            levels.append(_Level(t, float(schedule.alpha(t)), float(schedule.sigma(t)), None))
            continue
        t = float(schedule.t_of_lam(lam[k] - grows))
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        # alpha^ sqrt(rho^^2 - rho^2) = sigma^ sqrt(1 - (rho / rho^)^2); independent over steps, in the clock of the reverse SDE
        scale = options.s_noise * sigma * math.sqrt(-math.expm1(-2.0 * grows))
        levels.append(_Level(t, alpha, sigma, Interval(scale, *(noise_clock(lam[j], 1.0) for j in (k - 1, k)))))
    return levels


def _rows(schedule: NoiseSchedule, times: Floats, calls: Sequence[int], levels: list[_Level]) -> Iterator[Row]:
    """The noise of a step is added at the end of the step before it, so that the network sees what the row says."""
    for k, count in enumerate(calls):
        begin, end, t = levels[k], levels[k + 1], float(times[k + 1])
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))  # where the step ends, before the next adds noise
        rise = end.alpha / alpha
        carry = sigma / begin.sigma
        weight = alpha - begin.alpha * carry
        if count == 1:
            yield Row(begin.t, (rise * carry,), (rise * weight,), noise=end.noise)
            continue
        yield Row(begin.t, (carry,), (weight,))
        mend = 0.5 * end.alpha * (begin.sigma / begin.alpha * alpha / sigma - 1.0)
        yield Row(t, (rise,), (mend, -mend), noise=end.noise)
