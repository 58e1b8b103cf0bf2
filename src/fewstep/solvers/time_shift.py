r"""Time shift: every sample's network call at the time whose noise level its state really has, as a hook of the loop.

Source: "Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps" (arXiv 2305.15583, the Time-Shift Sampler).
After a step to time t, the variance v over the elements of a sample is compared with that of the marginals in a window around t,

$$ t_s = \operatorname*{argmin}_{|\tau - t| \le w/2} \left| v - m(\tau) \right|, \qquad
   m(\tau) = \sigma_\tau^2 \;\text{(the paper)} \quad\text{or}\quad m(\tau) = \alpha_\tau^2 V + \sigma_\tau^2 , $$

and the network is called with $t_s$. The paper's criterion leaves out the variance V of the data, so it is biased by $\alpha^2 V$: data of
unit variance keep v = 1 at all times, and the argmin sits at the noisy edge of the window. The second criterion puts it right, and says
nothing at all where $V = 1$ and the schedule preserves variance.

Only the time handed to the network moves, and the prediction is converted with alpha and sigma of that time; the steps are those of the
plan. (The authors' code does so for DEIS. For PNDM it changes the end of the step instead, and for DPM-Solver it measures the variance
of network outputs rather than of the state.)

The variance over d elements of noise has a relative standard error of $\sqrt{2/d}$: 18 % at 64 elements, 2.6 % at 3,072.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.schedules import NoiseSchedule

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TimeShift"]

Floats = NDArray[np.float64]
CANDIDATES = 129
"""Times that are compared in a window."""
FEWEST_ELEMENTS = 64
"""Below, the variance over a sample's elements says next to nothing of its noise level."""
FLAT = 1e-6
"""Relative change of the criterion over a window below which it tells no times apart."""


@dataclass(frozen=True)
class TimeShift:
    """A hook for ``Hooks(time=...)``: ``(i, t, x)`` -> the time of call i, one per sample.

    Args:
        schedule: the model's noise schedule.
        window: w, in the schedule's time, centred at t. 0 shifts nothing. (Published windows count steps of a table of 1,000: 0.01 for
            10.)
        cutoff: no shift at this time and cleaner ones. (Published: 0.3 to 0.9, for a table 300 to 900.)
        data_variance: V, the mean over the data of the variance over a sample's elements, for the corrected criterion; None for the
            paper's.

    Raises:
        ValueError: for a negative window or variance; when running, for samples of fewer than 64 elements.

    Note:
        The first call is never shifted, as in the authors' code. The variances are read from the device once a call, because times are.

    Example:
        >>> import torch, fewstep as fs
        >>> schedule = fs.schedules.VPLinear()
        >>> shift = TimeShift(schedule, window=0.1, data_variance=0.25)
        >>> x = float(schedule.sigma(0.48)) * fs.draw_noise((64, 64), [0], dtype=torch.float64)  # less noise than at 0.5
        >>> bool(0.45 <= shift(1, 0.5, x)[0] < 0.5)
        True
    """

    source: ClassVar[str] = (
        "Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps, arXiv 2305.15583"
    )

    schedule: NoiseSchedule
    window: float
    cutoff: float = 0.0
    data_variance: float | None = None

    def __post_init__(self) -> None:
        if not self.window >= 0.0:
            raise ValueError(f"the window of a time shift must be at least 0, got {self.window:g}.")
        if self.data_variance is not None and not self.data_variance >= 0.0:
            raise ValueError(f"the variance of the data must be at least 0, got {self.data_variance:g}.")

    def __call__(self, i: int, t: float, x: Tensor) -> float | Floats:
        """The time for call i whose state x ``"batch *shape"`` belongs to time t: t itself, or float64 ``"batch"``."""
        elements = x[0].numel() if len(x) else FEWEST_ELEMENTS
        if elements < FEWEST_ELEMENTS:
            raise ValueError(
                f"a time shift estimates the noise level from the variance over a sample's elements; with {elements} of them "
                f"that is no estimate. It needs at least {FEWEST_ELEMENTS}."
            )
        if i == 0 or self.window == 0.0 or t <= self.cutoff:
            return t
        times, variances = self._candidates(t)
        if np.ptp(variances) <= FLAT * variances.max():
            return t
        found = x.flatten(1).var(1).detach().cpu().double().numpy()
        return times[np.abs(found[:, None] - variances).argmin(1)]

    def _candidates(self, t: float) -> tuple[Floats, Floats]:
        """Times of the window, the nearest to t first, and the variance of the marginal at each."""
        return _marginals(self.schedule, self.window, t, self.data_variance or 0.0)


@lru_cache(maxsize=1024)
def _marginals(schedule: NoiseSchedule, window: float, t: float, data_variance: float) -> tuple[Floats, Floats]:
    low, high = sorted((schedule.t_start, schedule.t_end))
    offsets = np.linspace(-0.5, 0.5, CANDIDATES)
    times = np.clip(t + window * offsets[np.argsort(np.abs(offsets), kind="stable")], min(low, t), max(high, t))
    return times, schedule.alpha(times) ** 2 * data_variance + schedule.sigma(times) ** 2
