r"""Noise schedules: the functions alpha and sigma of $x_t = \alpha_t x_0 + \sigma_t \varepsilon$, and their inverse.

Notation. $\lambda = \log(\alpha/\sigma)$ is *half* the log signal-to-noise ratio and strictly decreases in t. Every function takes a number
or an array and returns float64; everything is written so that nothing cancels (`expm1`, `log1p`, `logaddexp`). $\alpha = 0$ and
$\sigma = 0$ are legal: lambda is minus or plus infinity there.

A schedule knows nothing of steps, networks or devices. `t_start` and `t_end` are where sampling starts and ends when nobody says
otherwise, in the schedule's own time.

Sources: VP-linear and VE from "Score-Based Generative Modeling through Stochastic Differential Equations" (arXiv 2011.13456);
VP-cosine from "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672, eq. 17); EDM from "Elucidating the Design Space
of Diffusion-Based Generative Models" (arXiv 2206.00364); inverses and the interpolation of tables from "DPM-Solver" (arXiv 2206.00927,
appendix D); flow from "Flow Straight and Fast" (arXiv 2209.03003) with the shift of "Scaling Rectified Flow Transformers for
High-Resolution Image Synthesis" (arXiv 2403.03206, eq. 23).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.errors import UnknownNameError

__all__ = ["EDM", "Flow", "FromAlphasCumprod", "FromBetas", "NoiseSchedule", "VPCosine", "VPLinear", "from_config"]

Floats = NDArray[np.float64]
SHOWN = 8
"""A table with more entries is not printed whole."""


def _floats(value: ArrayLike) -> Floats:
    if hasattr(value, "detach"):  # a tensor: of any precision, on any device
        value = value.detach().cpu().double().numpy()  # type: ignore[union-attr]
    return np.asarray(value, np.float64)


def _log(value: Floats) -> Floats:
    with np.errstate(divide="ignore"):  # the logarithm of an exact zero is minus infinity, on purpose
        return np.log(value)


class NoiseSchedule(abc.ABC):
    """Interface: alpha, sigma and lambda as functions of t, the inverse of lambda, and the usual ends of sampling."""

    t_start: float
    t_end: float

    @property
    def domain(self) -> tuple[float, float]:
        """Lowest and highest time at which the schedule is defined."""
        return 0.0, 1.0

    @abc.abstractmethod
    def log_alpha(self, t: ArrayLike) -> Floats:
        """Natural logarithm of alpha; minus infinity where alpha is 0."""

    @abc.abstractmethod
    def log_sigma(self, t: ArrayLike) -> Floats:
        """Natural logarithm of sigma; minus infinity where sigma is 0."""

    @abc.abstractmethod
    def t_of_lam(self, lam: ArrayLike) -> Floats:
        """The time of a given lambda; plus and minus infinity map to the times of sigma = 0 and alpha = 0."""

    def alpha(self, t: ArrayLike) -> Floats:
        """Scale of the data at time t. float64 NumPy, of a tensor too: ``torch.as_tensor(schedule.alpha(t), dtype=x.dtype)`` goes back."""
        return np.exp(self.log_alpha(t))

    def sigma(self, t: ArrayLike) -> Floats:
        """Standard deviation of the noise at time t, as NumPy; see `alpha`."""
        return np.exp(self.log_sigma(t))

    def lam(self, t: ArrayLike) -> Floats:
        """lambda(t) = log(alpha / sigma), half the log signal-to-noise ratio."""
        return self.log_alpha(t) - self.log_sigma(t)

    @property
    def t_zero(self) -> float:
        """The time at which sigma is 0."""
        return float(self.t_of_lam(math.inf))

    def network_time(self, t: ArrayLike) -> Floats:
        """What a network trained on this schedule expects as its time. The schedule's own time, except for tables."""
        return _floats(t)

    def config(self) -> dict[str, Any]:
        """The schedule as JSON values; `from_config` is the inverse."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"kind": type(self).__name__, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}

    def inside(self, t: ArrayLike) -> NDArray[np.bool_]:
        """Which of the times are finite and in the domain, but for rounding."""
        low, high = self.domain
        t, dust = _floats(t), 1e-6 * (high - low if math.isfinite(high) else 1.0)
        return np.isfinite(t) & (t >= low - dust) & (t <= high + dust)

    def same_noise(self, other: NoiseSchedule) -> bool:
        """Whether both give the same alpha and sigma at every time; the ends of sampling may differ."""
        mine, theirs = self.config(), other.config()
        return all(mine.get(k) == theirs.get(k) for k in (mine.keys() | theirs.keys()) - {"t_start", "t_end"})

    def _check_ends(self) -> None:
        for name, t in (("t_start", self.t_start), ("t_end", self.t_end)):
            if not self.inside(t):
                low, high = self.domain
                raise ValueError(f"{type(self).__name__} is defined for times from {low:.6g} to {high:g}, got {name}={t:g}.")
        noise = self.lam([self.t_start, self.t_end])
        if not (noise[0] < noise[1]):  # NaN included
            raise ValueError(
                f"{type(self).__name__} needs t_start noisier than t_end, got t_start={self.t_start:g} (lambda {noise[0]:.4g}) "
                f"and t_end={self.t_end:g} (lambda {noise[1]:.4g})."
            )


@dataclass(frozen=True)
class VPLinear(NoiseSchedule):
    r"""Variance-preserving schedule with $\beta(t)$ linear on [0, 1]: $\log\alpha = -t^2(\beta_1-\beta_0)/4 - t\beta_0/2$.

    Args:
        beta_min, beta_max: $\beta_0$ and $\beta_1$, per unit of time.
        t_start, t_end: the ends of sampling, in (0, 1].

    Example:
        >>> schedule = VPLinear()
        >>> float(schedule.alpha(0.5)).__round__(6), float(schedule.t_of_lam(schedule.lam(0.5))).__round__(12)
        (0.281183, 0.5)
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_start: float = 1.0
    t_end: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 < self.beta_min <= self.beta_max:
            raise ValueError(f"VPLinear needs 0 < beta_min <= beta_max, got {self.beta_min:g} and {self.beta_max:g}.")
        self._check_ends()

    def log_alpha(self, t: ArrayLike) -> Floats:
        t = _floats(t)
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def log_sigma(self, t: ArrayLike) -> Floats:
        return 0.5 * _log(-np.expm1(2.0 * self.log_alpha(t)))

    def t_of_lam(self, lam: ArrayLike) -> Floats:
        twice = np.logaddexp(0.0, -2.0 * _floats(lam))  # = -2 log alpha
        slope = self.beta_max - self.beta_min
        with np.errstate(invalid="ignore"):
            t = 2.0 * twice / (np.sqrt(self.beta_min**2 + 2.0 * slope * twice) + self.beta_min)
        return np.where(np.isinf(twice), math.inf, t)


@dataclass(frozen=True)
class VPCosine(NoiseSchedule):
    r"""Variance-preserving cosine schedule: $\alpha = \cos(\frac{t+s}{1+s}\frac{\pi}{2}) / \cos(\frac{s}{1+s}\frac{\pi}{2})$.

    alpha(1) is exactly 0. The usual start is 0.9946, as in DPM-Solver's code, where alpha is about 0.009.

    Example:
        >>> schedule = VPCosine(t_start=1.0)
        >>> float(schedule.alpha(1.0)), float(schedule.sigma(1.0)), float(schedule.sigma(0.0))
        (0.0, 1.0, 0.0)
    """

    s: float = 0.008
    t_start: float = 0.9946
    t_end: float = 1e-3

    def __post_init__(self) -> None:
        if not self.s >= 0.0:
            raise ValueError(f"VPCosine needs s >= 0, got {self.s:g}.")
        self._check_ends()

    @property
    def _angle0(self) -> float:
        return 0.5 * math.pi * self.s / (1.0 + self.s)

    def _angles(self, t: ArrayLike) -> tuple[Floats, Floats]:
        """The distance of the angle from its value at t = 0, and from pi / 2; both exact where they vanish."""
        t, rate = _floats(t), 0.5 * math.pi / (1.0 + self.s)
        return rate * t, rate * (1.0 - t)

    def log_alpha(self, t: ArrayLike) -> Floats:
        _, to_end = self._angles(t)
        return _log(np.sin(to_end)) - math.log(math.cos(self._angle0))

    def log_sigma(self, t: ArrayLike) -> Floats:
        # 1 - alpha^2 = (cos^2 a0 - cos^2 a) / cos^2 a0 = sin(a - a0) sin(a + a0) / cos^2 a0
        gone, _ = self._angles(t)
        return 0.5 * _log(np.sin(gone) * np.sin(gone + 2.0 * self._angle0)) - math.log(math.cos(self._angle0))

    def t_of_lam(self, lam: ArrayLike) -> Floats:
        # sigma / alpha = e^{-lam} and (alpha cos a0)^2 = cos^2 a give sin^2 a = (e^{-2 lam} + sin^2 a0) / (1 + e^{-2 lam})
        lam = _floats(lam)
        cos0, sin0 = math.cos(self._angle0), math.sin(self._angle0)
        alpha = np.exp(-0.5 * np.logaddexp(0.0, -2.0 * lam))
        sigma = np.exp(-0.5 * np.logaddexp(0.0, 2.0 * lam))
        # sin(a - a0) with cos a = alpha cos a0, sin a = sqrt(sigma^2 cos^2 a0 + sin^2 a0), without cancellation
        sine = np.hypot(sigma * cos0, sin0)
        difference = sigma**2 * cos0 / (sine + sin0 * alpha) if self.s else sigma * np.ones_like(lam)
        angle = np.arctan2(difference, cos0 * alpha * cos0 + sine * sin0)
        return angle * (1.0 + self.s) / (0.5 * math.pi)


@dataclass(frozen=True)
class EDM(NoiseSchedule):
    """Variance-exploding schedule in EDM's convention: alpha = 1 and sigma = t.

    Args:
        sigma_min, sigma_max: the usual ends of sampling.
        t_start, t_end: other ends, if wanted; `sigma_max` and `sigma_min` when left out.

    Example:
        >>> float(EDM().lam(1.0)), EDM().t_start
        (0.0, 80.0)
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    t_start: float = None  # type: ignore[assignment]
    t_end: float = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "t_start", self.sigma_max if self.t_start is None else self.t_start)
        object.__setattr__(self, "t_end", self.sigma_min if self.t_end is None else self.t_end)
        self._check_ends()

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, math.inf

    def log_alpha(self, t: ArrayLike) -> Floats:
        return np.zeros_like(_floats(t))

    def log_sigma(self, t: ArrayLike) -> Floats:
        return _log(_floats(t))

    def t_of_lam(self, lam: ArrayLike) -> Floats:
        return np.exp(-_floats(lam))

    def same_noise(self, other: NoiseSchedule) -> bool:
        return isinstance(other, EDM)


@dataclass(frozen=True)
class Flow(NoiseSchedule):
    r"""Rectified flow: $\alpha = 1 - s$, $\sigma = s$ with the shifted time $s = k t / (1 + (k - 1) t)$.

    alpha(1) = 0 and sigma(0) = 0 exactly. A network that was trained on the *shifted* time wants ``network_time=schedule.sigma``
    (times 1000 for SD3 and Flux) when it is wrapped.

    Args:
        shift: $k$, positive; 1 is the plain straight path.
        t_start, t_end: the ends of sampling, in unshifted time.

    Example:
        >>> float(Flow(shift=3.0).sigma(0.5)), float(Flow().alpha(1.0))
        (0.75, 0.0)
    """

    shift: float = 1.0
    t_start: float = 1.0
    t_end: float = 1e-3

    def __post_init__(self) -> None:
        if not self.shift > 0.0:
            raise ValueError(f"Flow needs a positive shift, got {self.shift:g}.")
        self._check_ends()

    def _log_denominator(self, t: Floats) -> Floats:
        return np.log1p((self.shift - 1.0) * t)

    def log_alpha(self, t: ArrayLike) -> Floats:
        t = _floats(t)
        return _log(1.0 - t) - self._log_denominator(t)

    def log_sigma(self, t: ArrayLike) -> Floats:
        t = _floats(t)
        return _log(t) + math.log(self.shift) - self._log_denominator(t)

    def t_of_lam(self, lam: ArrayLike) -> Floats:
        # lam = log((1 - t) / (shift t))
        lam = _floats(lam) + math.log(self.shift)
        return np.exp(-np.logaddexp(0.0, lam))

    def alpha(self, t: ArrayLike) -> Floats:
        t = _floats(t)
        return (1.0 - t) / (1.0 + (self.shift - 1.0) * t)

    def sigma(self, t: ArrayLike) -> Floats:
        t = _floats(t)
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)


@dataclass(frozen=True)
class FromAlphasCumprod(NoiseSchedule):
    r"""A discrete-time model's table $\bar\alpha_n$, n = 0..N-1, made continuous.

    $\log\alpha$ is piecewise linear over $t_n = (n + 1)/N$ and extrapolated linearly outside (DPM-Solver, arXiv 2206.00927, appendix D.2).
    A last entry of exactly 0 (zero terminal signal-to-noise ratio) is legal: the last interval is then linear in alpha itself.

    Args:
        alphas_cumprod: ``"N"``, strictly decreasing, in [0, 1).
        t_start: 1 when left out, the last entry of the table.
        t_end: 1/N when left out, the first entry of the table. sigma = 0 lies beyond it, at `t_zero`.

    Example:
        >>> schedule = FromAlphasCumprod([0.99, 0.9, 0.5, 0.1])
        >>> float(schedule.alpha(0.75)).__round__(6), float(schedule.network_time(0.75))
        (0.707107, 2.0)
    """

    alphas_cumprod: Sequence[float]
    t_start: float = None  # type: ignore[assignment]
    t_end: float = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        table = np.asarray(self.alphas_cumprod, np.float64)
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"a table of alphas_cumprod needs at least 2 entries in one dimension, got shape {table.shape}.")
        if not (np.isfinite(table).all() and table[0] < 1.0 and table[-1] >= 0.0 and (np.diff(table) < 0.0).all()):
            raise ValueError("alphas_cumprod must strictly decrease within [0, 1), the least noisy entry first.")
        object.__setattr__(self, "alphas_cumprod", tuple(table.tolist()))
        object.__setattr__(self, "t_start", 1.0 if self.t_start is None else self.t_start)
        object.__setattr__(self, "t_end", 1.0 / len(table) if self.t_end is None else self.t_end)
        self._check_ends()

    def __repr__(self) -> str:
        return _table_repr(self, "alphas_cumprod", self.alphas_cumprod)

    @property
    def domain(self) -> tuple[float, float]:
        return float(self._knots[0][0]), 1.0

    def same_noise(self, other: NoiseSchedule) -> bool:
        return _same_table(self, other)

    @cached_property
    def _knots(self) -> tuple[Floats, Floats]:
        """Times and log alpha of the finite entries, with the linear extrapolation to log alpha = 0 put in front."""
        table = np.asarray(self.alphas_cumprod)
        count = len(table)
        times, logs = (np.arange(count) + 1.0) / count, 0.5 * _log(table)
        slope = (logs[1] - logs[0]) * count if np.isfinite(logs[1]) else logs[0] * count
        zero = times[0] - logs[0] / slope
        keep = np.isfinite(logs)
        return np.concatenate([[zero], times[keep]]), np.concatenate([[0.0], logs[keep]])

    @property
    def _ends_in_zero(self) -> bool:
        return self.alphas_cumprod[-1] == 0.0

    def log_alpha(self, t: ArrayLike) -> Floats:
        t = _floats(t)
        times, logs = self._knots
        slope = (logs[-1] - logs[-2]) / (times[-1] - times[-2])
        inside = np.interp(t, times, logs)
        if self._ends_in_zero:
            left = np.clip((1.0 - t) / (1.0 - times[-1]), 0.0, 1.0)
            return np.where(t > times[-1], logs[-1] + _log(left), inside)
        return np.where(t > times[-1], logs[-1] + slope * (t - times[-1]), inside)

    def log_sigma(self, t: ArrayLike) -> Floats:
        return 0.5 * _log(-np.expm1(2.0 * self.log_alpha(t)))

    def t_of_lam(self, lam: ArrayLike) -> Floats:
        log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * _floats(lam))
        times, logs = self._knots
        inside = np.interp(log_alpha, logs[::-1], times[::-1])
        if self._ends_in_zero:
            beyond = 1.0 - (1.0 - times[-1]) * np.exp(log_alpha - logs[-1])
        else:
            slope = (logs[-1] - logs[-2]) / (times[-1] - times[-2])
            with np.errstate(invalid="ignore"):
                beyond = times[-1] + (log_alpha - logs[-1]) / slope
        return np.where(log_alpha < logs[-1], beyond, inside)

    def network_time(self, t: ArrayLike) -> Floats:
        """The (fractional) index into the table: N t - 1, from 0 to N - 1."""
        index = _floats(t) * len(self.alphas_cumprod) - 1.0
        nearest = np.rint(index)
        return np.where(np.abs(index - nearest) < 1e-9 * len(self.alphas_cumprod), nearest, index)


@dataclass(frozen=True)
class FromBetas(NoiseSchedule):
    r"""A discrete-time model's table of $\beta_n$, with $\bar\alpha_n = \prod_{m \le n} (1 - \beta_m)$; else as `FromAlphasCumprod`.

    Example:
        >>> import numpy as np
        >>> schedule = FromBetas(np.linspace(1e-4, 0.02, 1000))
        >>> float(schedule.alpha(1.0)).__round__(6)
        0.006353
    """

    betas: Sequence[float]
    t_start: float = None  # type: ignore[assignment]
    t_end: float = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        betas = np.asarray(self.betas, np.float64)
        if betas.ndim != 1 or not ((betas > 0.0) & (betas <= 1.0)).all():
            raise ValueError(f"betas must be one dimension of numbers in (0, 1], got shape {betas.shape}.")
        object.__setattr__(self, "betas", tuple(betas.tolist()))
        object.__setattr__(self, "t_start", self._table.t_start if self.t_start is None else self.t_start)
        object.__setattr__(self, "t_end", self._table.t_end if self.t_end is None else self.t_end)
        self._check_ends()

    def __repr__(self) -> str:
        return _table_repr(self, "betas", self.betas)

    @property
    def domain(self) -> tuple[float, float]:
        return self._table.domain

    def same_noise(self, other: NoiseSchedule) -> bool:
        return _same_table(self, other)

    @cached_property
    def _table(self) -> FromAlphasCumprod:
        return FromAlphasCumprod(np.cumprod(1.0 - np.asarray(self.betas)).tolist())

    def log_alpha(self, t: ArrayLike) -> Floats:
        return self._table.log_alpha(t)

    def log_sigma(self, t: ArrayLike) -> Floats:
        return self._table.log_sigma(t)

    def t_of_lam(self, lam: ArrayLike) -> Floats:
        return self._table.t_of_lam(lam)

    def network_time(self, t: ArrayLike) -> Floats:
        return self._table.network_time(t)


def _table_repr(schedule: NoiseSchedule, name: str, table: Sequence[float]) -> str:
    """With the ends of a long table only."""
    shown = repr(table) if len(table) <= SHOWN else f"<{len(table)} from {table[0]:.6g} to {table[-1]:.6g}>"
    return f"{type(schedule).__name__}({name}={shown}, t_start={schedule.t_start!r}, t_end={schedule.t_end!r})"


def _same_table(a: NoiseSchedule, b: NoiseSchedule) -> bool:
    """Whether both are tables with the same entries, up to the rounding between a table of betas and one of their products."""
    tables = [s._table if isinstance(s, FromBetas) else s for s in (a, b)]
    first, second = (np.asarray(s.alphas_cumprod) if isinstance(s, FromAlphasCumprod) else None for s in tables)
    return (
        first is not None and second is not None and first.shape == second.shape and np.allclose(first, second, rtol=1e-9, atol=0.0)
    )


KINDS: dict[str, type[NoiseSchedule]] = {cls.__name__: cls for cls in (VPLinear, VPCosine, EDM, Flow, FromBetas, FromAlphasCumprod)}


def from_config(config: dict[str, Any]) -> NoiseSchedule:
    """The schedule that `NoiseSchedule.config` described.

    Raises:
        UnknownNameError: for a kind that does not exist.
        ValueError: for options that the kind does not take.

    Example:
        >>> from_config(Flow(shift=3.0).config()) == Flow(shift=3.0)
        True
    """
    options = dict(config)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise UnknownNameError("noise schedule", kind, KINDS)
    fields = {f.name for f in dataclasses.fields(KINDS[kind])}  # type: ignore[arg-type]
    if extra := options.keys() - fields:
        raise ValueError(f"{kind} takes {', '.join(sorted(fields))}, not {', '.join(sorted(extra))}.")
    return KINDS[kind](**options)
