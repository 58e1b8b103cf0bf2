r"""DDIM, and its stochastic family up to DDPM's ancestral sampling.

Source: "Denoising Diffusion Implicit Models" (arXiv 2010.02502, eq. 12 and 16). With $h = \lambda_t - \lambda_s$:

$$ c = \eta\,\sigma_t \sqrt{1 - e^{-2h}}, \qquad
   x_t = \alpha_t D + \sqrt{\sigma_t^2 - c^2}\;\frac{x_s - \alpha_s D}{\sigma_s} + c\,\xi . $$

For a variance-preserving schedule c is the paper's $\eta \sqrt{(\sigma_t^2/\sigma_s^2)(1 - \alpha_s^2/\alpha_t^2)}$; in this form it is the
posterior deviation of every Gaussian schedule. eta = 0 is DDIM, the first-order exponential integrator of the probability-flow ODE;
eta = 1 is the ancestral sampling of DDPM (arXiv 2006.11239, eq. 6-7 with the smaller variance), which is also first-order
SDE-DPM-Solver++.
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
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver

__all__ = ["DDIM"]


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM (eta = 0) to DDPM (eta = 1).

    Args:
        eta: 0 to 1, how much of the posterior's noise is drawn.

    Raises:
        ValueError: for an eta outside [0, 1].

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> DDIM().plan(VPLinear(), nfe=2, grid="lambda").stochastic, DDIM(eta=1.0).plan(VPLinear(), nfe=2, grid="lambda").stochastic
        (False, True)
    """

    source: ClassVar[str] = "Denoising Diffusion Implicit Models, arXiv 2010.02502"

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta:g}.")

    @property
    def claimed_order(self) -> int:
        return 1

    def rows(self, schedule: NoiseSchedule, times: NDArray[np.float64], calls: Sequence[int]) -> Iterator[Row]:
        lam, alpha, sigma = schedule.lam(times).tolist(), schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
        for i, t in enumerate(times[:-1].tolist()):
            h = lam[i + 1] - lam[i]
            fresh = self.eta**2 * -math.expm1(-2.0 * h) if self.eta else 0.0  # (c / sigma_t)^2
            carry = math.sqrt(1.0 - fresh) * sigma[i + 1] / sigma[i]
            noise = None
            if fresh > 0.0 and sigma[i + 1] > 0.0:
                noise = Interval(math.sqrt(fresh) * sigma[i + 1], *(noise_clock(lam[j], self.eta**2) for j in (i, i + 1)))
            yield Row(t, (carry,), (alpha[i + 1] - alpha[i] * carry,), noise=noise)
