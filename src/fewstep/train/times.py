r"""At which times a network is trained: distributions, and importance sampling that leaves the objective as it is.

A distribution of times is its quantile function, $t = Q(u)$ with $u$ uniform on [0, 1). The loss is the mean over $u$,

$$ L = \int_0^1 w(t)\,e(t)\,\mathrm du, \qquad t = Q(u), $$

with the weight $w$ and the mean squared error $e$ at that time.

| name | $Q(u)$ | source |
| --- | --- | --- |
| `uniform` | $t_\text{end} + u\,(t_\text{start} - t_\text{end})$, independent draws | |
| `low_discrepancy` | the same; one random offset a batch, then equal gaps: less variance in the mean | arXiv 2107.00630, app. I.1 |
| `logit_normal` | logistic function of a normal: more of the middle | arXiv 2403.03206, section 3.1 |
| `lambda` | equal in lambda, low discrepancy: with the weighting `noise` the bound of the likelihood | arXiv 2107.00630 |
| `log_normal` | $\log(\sigma/\alpha)$ normal with mean -1.2 and deviation 1.2, cut off at the ends | EDM, arXiv 2206.00364, table 1 |

*Importance sampling* draws $u$ with another density $p$ and multiplies the loss by $1/p$: the mean is the same, its variance

$$ \int \frac{w^2\,E[e^2]}{p}\,\mathrm du - L^2 $$

is least for $p \propto w \sqrt{E[e^2]}$. `ImportanceTimes` has a density that is constant on bins of $u$, so it is drawn from, and
corrected for, exactly, whatever the bins. i-DODE ("Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs", arXiv
2305.03935, section 4.2) takes the velocity's error as constant: `importance_of_weight`. In closed form, under the likelihood's weight,
that is $\log\sigma$ uniform for variance-preserving schedules, and $\log\sigma - \sigma$ uniform for the straight path.
`measured_importance` measures the error.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.errors import UnknownNameError
from fewstep.schedules import NoiseSchedule

__all__ = [
    "TIMES",
    "ImportanceTimes",
    "LambdaTimes",
    "LogNormalTimes",
    "LogitNormalTimes",
    "LowDiscrepancy",
    "Times",
    "UniformTimes",
    "make_times",
]

Floats = NDArray[np.float64]
SMALLEST_U = 2.0**-53
"""u as an argument of the normal quantile, which is infinite at 0 and 1, stays so far away from them."""


class Times(abc.ABC):
    """Interface: a distribution of times."""

    @abc.abstractmethod
    def at(self, schedule: NoiseSchedule, u: Floats) -> tuple[Floats, Floats]:
        """The times of the quantiles u, and what their loss is multiplied with.

        Args:
            schedule: whose `t_start` and `t_end` are the ends.
            u: float64 ``"count"`` in [0, 1).
        """

    def units(self, count: int, generator: torch.Generator) -> Tensor:
        """The quantiles of one batch, float64 ``"count"``: independent and uniform."""
        return torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)

    def draw(self, schedule: NoiseSchedule, count: int, generator: torch.Generator) -> tuple[Floats, Floats]:
        """The times of one batch, float64 ``"count"``, and what their loss is multiplied with.

        Example:
            >>> from fewstep.schedules import Flow
            >>> t, factor = TIMES["low_discrepancy"].draw(Flow(t_end=0.0), 4, torch.Generator().manual_seed(0))
            >>> np.diff(np.sort(t)).round(9).tolist(), factor.tolist()
            ([0.25, 0.25, 0.25], [1.0, 1.0, 1.0, 1.0])
        """
        return self.at(schedule, self.units(count, generator).cpu().numpy())


@dataclass(frozen=True)
class UniformTimes(Times):
    """Uniform in the schedule's own time."""

    def at(self, schedule: NoiseSchedule, u: Floats) -> tuple[Floats, Floats]:
        return schedule.t_end + u * (schedule.t_start - schedule.t_end), np.ones_like(u)


@dataclass(frozen=True)
class LogitNormalTimes(Times):
    """The logistic function of a normal number of this mean and standard deviation, between the ends."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_normal(self.mean, self.std)

    def at(self, schedule: NoiseSchedule, u: Floats) -> tuple[Floats, Floats]:
        share = torch.from_numpy(self.mean + self.std * _normal_quantile(u)).sigmoid().numpy()
        return schedule.t_end + share * (schedule.t_start - schedule.t_end), np.ones_like(u)


@dataclass(frozen=True)
class LambdaTimes(Times):
    """Uniform in lambda between the ends, both of which must be finite.

    Raises:
        ValueError: when drawn from, if lambda is infinite at an end.
    """

    def at(self, schedule: NoiseSchedule, u: Floats) -> tuple[Floats, Floats]:
        low, high = lambda_range(schedule)
        return _between(schedule, schedule.t_of_lam(low + u * (high - low))), np.ones_like(u)


@dataclass(frozen=True)
class LogNormalTimes(Times):
    """log(sigma / alpha) normal, cut off at the ends; the values are EDM's for data of standard deviation 0.5."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_normal(self.mean, self.std)

    def at(self, schedule: NoiseSchedule, u: Floats) -> tuple[Floats, Floats]:
        noisy, clean = schedule.lam(
            [schedule.t_start, schedule.t_end]
        )  # of log(sigma / alpha) = -lambda these are the high and low end
        low, high = (_normal_cdf((-lam - self.mean) / self.std) for lam in (clean, noisy))
        ratio = self.mean + self.std * _normal_quantile(low + u * (high - low))
        return _between(schedule, schedule.t_of_lam(-ratio)), np.ones_like(u)


@dataclass(frozen=True)
class LowDiscrepancy(Times):
    """The times of another distribution at quantiles with equal gaps and one random offset a batch.

    Example:
        >>> from fewstep.schedules import EDM
        >>> schedule = EDM(sigma_min=math.exp(-2.0), sigma_max=math.exp(2.0))
        >>> t, _ = LowDiscrepancy(LambdaTimes()).draw(schedule, 4, torch.Generator().manual_seed(0))
        >>> np.diff(np.sort(np.log(t))).round(12).tolist()
        [1.0, 1.0, 1.0]
    """

    times: Times

    def at(self, schedule: NoiseSchedule, u: Floats) -> tuple[Floats, Floats]:
        return self.times.at(schedule, u)

    def units(self, count: int, generator: torch.Generator) -> Tensor:
        offset = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
        return (offset + torch.arange(count, dtype=torch.float64, device=generator.device) / count) % 1.0


@dataclass(frozen=True)
class ImportanceTimes(Times):
    """Importance sampling of another distribution: the mean of the loss is that of `base`, its variance another.

    The quantiles of `base` are cut into bins of equal width; `masses` says how often each is visited.

    Args:
        base: the distribution that the objective is the mean over.
        masses: positive, one a bin of base's quantiles; they are used as if they added up to 1.

    Raises:
        ValueError: for a mass that is not positive.

    Example:
        >>> from fewstep.schedules import Flow
        >>> times = ImportanceTimes(UniformTimes(), (3.0, 1.0))
        >>> t, factor = times.at(Flow(t_end=0.0), np.array([0.375, 0.875]))
        >>> t.tolist(), factor.round(6).tolist()
        ([0.25, 0.75], [0.666667, 2.0])
    """

    base: Times
    masses: tuple[float, ...]

    def __post_init__(self) -> None:
        masses = tuple(float(mass) for mass in self.masses)
        if not masses or not all(0.0 < mass < math.inf for mass in masses):
            raise ValueError(
                f"importance sampling needs positive masses, one a bin, got {len(masses)}, the least {min(masses, default=0.0)}."
            )
        object.__setattr__(self, "masses", masses)

    def at(self, schedule: NoiseSchedule, u: Floats) -> tuple[Floats, Floats]:
        share = np.asarray(self.masses) / math.fsum(self.masses)
        bins = len(share)
        before = np.concatenate([[0.0], np.cumsum(share)])
        which = np.clip(np.searchsorted(before, u, side="right") - 1, 0, bins - 1)
        inside = np.clip((u - before[which]) / share[which], 0.0, 1.0 - SMALLEST_U)
        t, factor = self.base.at(schedule, (which + inside) / bins)
        return t, factor / (bins * share[which])


def lambda_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """Lambda at the noisy and at the clean end of a schedule.

    Raises:
        ValueError: if one is infinite.
    """
    low, high = (float(lam) for lam in schedule.lam([schedule.t_start, schedule.t_end]))
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(
            f"lambda runs from {low:.4g} to {high:.4g} between the ends of {type(schedule).__name__}, and must be finite here. "
            f"Give the schedule a t_start where alpha > 0 and a t_end where sigma > 0."
        )
    return low, high


def _between(schedule: NoiseSchedule, t: Floats) -> Floats:
    """Rounding may leave the ends by a little."""
    low, high = sorted((schedule.t_start, schedule.t_end))
    return np.clip(t, low, high)


def _normal_quantile(u: Floats) -> Floats:
    return torch.special.ndtri(torch.from_numpy(np.clip(u, SMALLEST_U, 1.0 - SMALLEST_U))).numpy()


def _normal_cdf(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2.0))


def _check_normal(mean: float, std: float) -> None:
    if not (math.isfinite(mean) and 0.0 < std < math.inf):
        raise ValueError(f"a normal distribution needs a finite mean and a positive standard deviation, got {mean:g} and {std:g}.")


TIMES: dict[str, Times] = {
    "uniform": UniformTimes(),
    "low_discrepancy": LowDiscrepancy(UniformTimes()),
    "logit_normal": LogitNormalTimes(),
    "lambda": LowDiscrepancy(LambdaTimes()),
    "log_normal": LogNormalTimes(),
}
"""Name -> distribution."""


def make_times(times: str | Times) -> Times:
    """The distribution of a name; a distribution is returned as it is.

    Raises:
        UnknownNameError: for a name that is not in `TIMES`.

    Example:
        >>> make_times("uniform"), make_times(LogitNormalTimes(std=0.5))
        (UniformTimes(), LogitNormalTimes(mean=0.0, std=0.5))
    """
    if isinstance(times, Times):
        return times
    if times not in TIMES:
        raise UnknownNameError("distribution of times", times, TIMES)
    return TIMES[times]
