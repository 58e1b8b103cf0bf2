r"""Sampling from consistency models in several steps: each predicts clean data and draws their noise anew, all of it or a share.

Sources: "Consistency Models" (arXiv 2303.01469, algorithm 1); "Latent Consistency Models" (arXiv 2310.04378, section 4 for the boundary
conditions); "Trajectory Consistency Distillation" (arXiv 2402.19159, "strategic stochastic sampling"). With D the network's data
prediction at the state $x$ of time $t$, the next time $t'$ and fresh noise $\xi$:

$$ x' = \alpha_{t'} \left( c_\text{out} D + c_\text{skip}\, x \right) + \sigma_{t'}\, \xi $$

for LCM, with $c_\text{skip} = 0$ and $c_\text{out} = 1$, or those of the paper:
$c_\text{skip} = \sigma_d^2 / (u^2 + \sigma_d^2)$ and $c_\text{out} = u / \sqrt{u^2 + \sigma_d^2}$, where u is what the network is told
of the time, scaled, and $\sigma_d = 0.5$. TCD goes down by DDIM to a time $s$ with $(1 - \gamma)$ of what the network would be told at
$t'$, and from there up to $t'$ by noise:

$$ x_s = \alpha_s D + \sigma_s \frac{x - \alpha_t D}{\sigma_t}, \qquad
   x' = \frac{\alpha_{t'}}{\alpha_s} x_s + \sqrt{\sigma_{t'}^2 - \frac{\alpha_{t'}^2}{\alpha_s^2} \sigma_s^2}\;\xi . $$

Left out: the noise level $\epsilon$ at which the first paper's networks end, which it takes off the noise that it draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.numerics import noise_clock
from fewstep.plan import Interval, Row
from fewstep.schedules import FromAlphasCumprod, FromBetas, NoiseSchedule
from fewstep.solver import Solver

__all__ = ["LCM", "TCD"]

Floats = NDArray[np.float64]
SIGMA_DATA = 0.5
"""The data's deviation in the boundary conditions of latent consistency models."""
NEAR = 1e-3
"""How far from a whole index counts as that index: levels that come from single precision are not exact."""


@dataclass(frozen=True)
class LCM(Solver):
    """Predict clean data, and noise them to the next level: for consistency models, which are trained to predict the end of the ODE.

    Args:
        timestep_scaling: the scale of the network's time in the boundary conditions of latent consistency models, which are trained
            with 10; None for a network whose prediction is taken as it is.

    Raises:
        ValueError: for a scale that is not positive.

    Note:
        With the posterior mean that a diffusion model predicts, samples are too smooth, however many the calls: the mean of what the
        noise hides is noised again as if it were data.

        This is the limit of the first-order SDE-DPM-Solver++ for an infinite eta, so its order is that of the drift in this limit.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> [row.carry for row in LCM().plan(VPLinear(), nfe=2, grid="time", final="zero").rows]
        [(), ()]
    """

    source: ClassVar[str] = "Latent Consistency Models, arXiv 2310.04378"

    timestep_scaling: float | None = None

    def __post_init__(self) -> None:
        if self.timestep_scaling is not None and not 0.0 < self.timestep_scaling < math.inf:
            raise ValueError(f"timestep_scaling must be positive, got {self.timestep_scaling:g}.")

    @property
    def claimed_order(self) -> int:
        return 1

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        lam, alpha, sigma = schedule.lam(times).tolist(), schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
        for i, t in enumerate(times[:-1].tolist()):
            skip, out = self._boundary(schedule, t)
            noise = _fresh(lam, i, sigma[i + 1])
            yield Row(t, (alpha[i + 1] * skip,), (alpha[i + 1] * out,), noise=noise)

    def _boundary(self, schedule: NoiseSchedule, t: float) -> tuple[float, float]:
        """c_skip and c_out."""
        if self.timestep_scaling is None:
            return 0.0, 1.0
        u = self.timestep_scaling * float(schedule.network_time(t))
        square = u**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / square, u / math.sqrt(square)


@dataclass(frozen=True)
class TCD(Solver):
    """Go down beyond the next level by DDIM, and up to it by noise: for networks of trajectory consistency distillation.

    Args:
        gamma: 0 to 1, the share of the network's time by which a step goes down too far. 0 is DDIM; 1 draws all noise anew, as `LCM`
            does, from the least noisy level that the network knows.

    Raises:
        ValueError: for a gamma outside [0, 1].

    Note:
        The network's time is the index of a table where the schedule has one, and then a whole number is gone down to, the one below.

    Example:
        >>> from fewstep.schedules import Flow
        >>> plan = TCD(gamma=0.3).plan(Flow(t_end=0.0), nfe=4, grid="time")
        >>> [None if row.noise is None else round(row.noise.scale, 3) for row in plan.rows]
        [0.697, 0.421, 0.193, None]
    """

    source: ClassVar[str] = "Trajectory Consistency Distillation, arXiv 2402.19159"

    gamma: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma must lie in [0, 1], got {self.gamma:g}.")

    @property
    def claimed_order(self) -> int:
        return 1

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        lam, alpha, sigma = schedule.lam(times).tolist(), schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
        for i, t in enumerate(times[:-1].tolist()):
            kept = self._kept(schedule, float(times[i + 1]))
            carry = kept * sigma[i + 1] / sigma[i]
            noise = _fresh(lam, i, math.sqrt(1.0 - kept**2) * sigma[i + 1])
            yield Row(t, (carry,), (alpha[i + 1] - alpha[i] * carry,), noise=noise)

    def _kept(self, schedule: NoiseSchedule, t: float) -> float:
        """The share of the noise at this time that is not drawn anew: sigma / alpha at s over that at t."""
        first, now = schedule.network_time([0.0, t]).tolist()
        told, near = (1.0 - self.gamma) * now, 0.0
        if isinstance(schedule, (FromBetas, FromAlphasCumprod)):
            told, near = max(0, math.floor(told + NEAR)), NEAR
        if self.gamma == 0.0 or told >= now - near:  # at or below the first entry
            return 1.0
        s = (told - first) / (float(schedule.network_time(1.0)) - first)
        alpha, sigma = schedule.alpha([s, t]).tolist(), schedule.sigma([s, t]).tolist()
        return sigma[0] * alpha[1] / (alpha[0] * sigma[1])


def _fresh(lam: Sequence[float], i: int, scale: float) -> Interval | None:
    """The noise of step i, independent of that of the others."""
    return Interval(scale, *(noise_clock(lam[j], 1.0) for j in (i, i + 1))) if scale > 0.0 else None
