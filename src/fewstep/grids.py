r"""Time grids: where the states of a sampler stand. The first time is the noisiest; lambda strictly increases along a grid.

A *rule* is a small callable that places n + 1 times between two finite ends; `make_grid` is the one door through which grids enter:
it finds the ends, applies the rule, puts the exact ends back and checks the result. A list of times of your own is taken unmodified.

Ends. alpha = 0 at the start and sigma = 0 at the end are legal. Rules that need a finite lambda or a finite sigma / alpha work on the
range of `FINITE_LAM` there: the end itself keeps its exact place, the other nodes lie within the range.

Sources: `Karras` from "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364, eq. 5); `Beta` from "Beta
Sampling is All You Need" (arXiv 2407.12173); `Lambda` from "DPM-Solver" (arXiv 2206.00927); `Power` from DEIS (arXiv 2204.13902);
the discrete spacings and the trailing rule from "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891);
the tables of `AlignYourSteps` from "Align Your Steps" (arXiv 2404.14507).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.errors import GridError, MissingExtraError, UnknownNameError
from fewstep.schedules import EDM, Flow, FromAlphasCumprod, FromBetas, NoiseSchedule, VPCosine

__all__ = [
    "FINITE_LAM",
    "AlignYourSteps",
    "Auto",
    "Beta",
    "GridRule",
    "Karras",
    "Lambda",
    "Leading",
    "Linspace",
    "Power",
    "Shifted",
    "Trailing",
    "check_grid",
    "grid_names",
    "make_grid",
]

Floats = NDArray[np.float64]
GridRule = Callable[[NoiseSchedule, int, float, float], Floats]
"""``rule(schedule, nfe, t_start, t_end)`` -> times ``"nfe+1"``, noisiest first, both ends finite in lambda."""

FINITE_LAM = (-5.1, 6.2)
"""Where rules that need finite values stop when an end of the schedule has none: alpha/sigma = 0.006 and sigma/alpha = 0.002."""


@dataclass(frozen=True)
class Power:
    """Equally spaced in t^(1/power): 1 is uniform in time, 2 quadratic, crowding the clean end as the power grows.

    With ``mirrored`` the crowding is at the noisy end (the "reverse quadratic" grid of arXiv 2312.07243).

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> Power(2.0)(VPLinear(), 2, 1.0, 0.0).tolist()
        [1.0, 0.25, 0.0]
    """

    power: float = 1.0
    mirrored: bool = False

    def __post_init__(self) -> None:
        if not self.power > 0.0:
            raise GridError(f"the power of a grid must be positive, got {self.power:g}.")

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        if self.mirrored:
            plain = Power(self.power)(schedule, nfe, t_start, t_end)
            return (t_start + t_end) - plain[::-1]
        return np.linspace(t_start ** (1.0 / self.power), t_end ** (1.0 / self.power), nfe + 1) ** self.power


@dataclass(frozen=True)
class Lambda:
    """Equally spaced in lambda ("logSNR", "exponential")."""

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        low, high = _finite_lams(schedule, t_start, t_end)
        return schedule.t_of_lam(np.linspace(low, high, nfe + 1))


@dataclass(frozen=True)
class Karras:
    """Equally spaced in (sigma/alpha)^(1/rho)."""

    rho: float = 7.0

    def __post_init__(self) -> None:
        if not self.rho > 0.0:
            raise GridError(f"rho must be positive, got {self.rho:g}.")

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        low, high = _finite_lams(schedule, t_start, t_end)
        roots = np.linspace(math.exp(-low / self.rho), math.exp(-high / self.rho), nfe + 1)
        return schedule.t_of_lam(-self.rho * np.log(roots))


@dataclass(frozen=True)
class Beta:
    """sigma/alpha at the quantiles of a Beta distribution. Needs SciPy."""

    a: float = 0.6
    b: float = 0.6

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        try:
            from scipy.stats import beta
        except ImportError as error:
            raise MissingExtraError("scipy", "tune", "the beta grid") from error
        low, high = _finite_lams(schedule, t_start, t_end)
        noisiest, cleanest = math.exp(-low), math.exp(-high)
        quantiles = beta.ppf(1.0 - np.arange(nfe + 1) / nfe, self.a, self.b)
        return schedule.t_of_lam(-np.log(cleanest + (noisiest - cleanest) * quantiles))


@dataclass(frozen=True)
class Shifted:
    """Uniform in time, then shifted towards the noise: t <- k t / (1 + (k - 1) t), for times in [0, 1]."""

    shift: float = 3.0

    def __post_init__(self) -> None:
        if not self.shift > 0.0:
            raise GridError(f"the shift of a grid must be positive, got {self.shift:g}.")

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        if t_start > 1.0:
            raise GridError(f"a shifted grid needs times in [0, 1], but sampling starts at t={t_start:g}.")
        back = [t / (self.shift - (self.shift - 1.0) * t) for t in (t_start, t_end)]
        times = np.linspace(back[0], back[1], nfe + 1)
        return self.shift * times / (1.0 + (self.shift - 1.0) * times)


@dataclass(frozen=True)
class Linspace:
    """For tables: indices round(linspace(0, N - 1, nfe + 1)), both ends included."""

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        count, last = _table(schedule, t_start)
        return _times_of(np.rint(np.linspace(0, last, nfe + 1))[::-1], count)


@dataclass(frozen=True)
class Trailing:
    """For tables: indices round(N - k N / nfe) - 1: evenly spaced and starting at the noisiest entry."""

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        count, last = _table(schedule, t_start)
        indices = np.rint((last + 1) * (1.0 - np.arange(nfe) / nfe)) - 1
        return np.append(_times_of(indices, count), t_end)


@dataclass(frozen=True)
class Leading:
    """For tables: multiples of N // nfe plus an offset, as old pipelines do. Does *not* start at the noisiest entry."""

    offset: int = 1

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        count, last = _table(schedule, t_start)
        indices = np.arange(nfe)[::-1] * ((last + 1) // nfe) + self.offset
        return np.append(_times_of(np.minimum(indices, last), count), t_end)


AYS_SIGMAS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
}
"""Published sigma/alpha of the ten calls; the eleventh node is sigma = 0."""


@dataclass(frozen=True)
class AlignYourSteps:
    """The published ten-step tables; other numbers of calls interpolate log sigma linearly, as the authors do.

    Args:
        table: ``"sd15"``, ``"sdxl"`` or ``"svd"``. The ends are those of the schedule; entries beyond them are left out.

    Note: for n calls the table's ten nodes are resampled at n points and the last node, the end, follows; so ten calls give exactly the
    published table when the schedule starts where the table does.
    """

    table: str = "sd15"

    def __post_init__(self) -> None:
        if self.table not in AYS_SIGMAS:
            raise UnknownNameError("Align-Your-Steps table", self.table, AYS_SIGMAS)

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        low, high = _finite_lams(schedule, t_start, t_end)
        inner = [-math.log(sigma) for sigma in AYS_SIGMAS[self.table][1:]]
        knots = np.array([low, *(lam for lam in inner if low < lam < high)])
        lams = np.interp(np.linspace(0.0, 1.0, nfe), np.linspace(0.0, 1.0, len(knots)), knots)
        return np.append(schedule.t_of_lam(lams), t_end)


@dataclass(frozen=True)
class Auto:
    """The rule that served best, untuned, on each family of schedules at few calls.

    Quadratic in time for VP-linear and for tables, uniform in lambda for EDM, uniform in time for VP-cosine up to 8 calls and quadratic
    beyond, uniform in time for flow.
    """

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        rule: GridRule = Power(2.0)
        if isinstance(schedule, EDM):
            rule = Lambda()
        elif isinstance(schedule, Flow) or (isinstance(schedule, VPCosine) and nfe <= 8):
            rule = Power(1.0)
        return rule(schedule, nfe, t_start, t_end)


RULES: dict[str, GridRule] = {
    "auto": Auto(),
    "ays_sd15": AlignYourSteps("sd15"),
    "ays_sdxl": AlignYourSteps("sdxl"),
    "ays_svd": AlignYourSteps("svd"),
    "beta": Beta(),
    "karras": Karras(),
    "lambda": Lambda(),
    "leading": Leading(),
    "linspace": Linspace(),
    "quadratic": Power(2.0),
    "reverse_quadratic": Power(2.0, mirrored=True),
    "shifted": Shifted(),
    "time": Power(1.0),
    "trailing": Trailing(),
}
FINALS = ("t_end", "zero")


def grid_names() -> list[str]:
    """The names that ``grid=`` takes."""
    return sorted(RULES)


def make_grid(
    grid: str | GridRule | ArrayLike,
    schedule: NoiseSchedule,
    nfe: int | None = None,
    *,
    start: float | None = None,
    final: str = "t_end",
) -> Floats:
    """The times of the outer states of a sampler with `nfe` calls.

    Args:
        grid: a name (`grid_names`), a rule, or a list of times. A list is taken unmodified; its length fixes the number of calls, and
            it ends where it ends: ``final="zero"`` demands that its last time has sigma = 0.
        schedule: noise schedule.
        nfe: number of network calls; may be left out with a list.
        start: the first time, for starting from a partly noised state; ``schedule.t_start`` when left out.
        final: ``"t_end"`` ends at ``schedule.t_end``; ``"zero"`` replaces that node by the time of sigma = 0, with the same calls.

    Returns:
        float64 ``"nfe+1"``, noisiest first.

    Raises:
        GridError: if the grid does not strictly decrease in noise, does not fit `nfe` or `start`, or the rule does not fit the schedule.
        UnknownNameError: for a name that does not exist.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> make_grid("lambda", VPLinear(), 4).round(3).tolist()
        [1.0, 0.722, 0.305, 0.032, 0.001]
    """
    if final not in FINALS:
        raise UnknownNameError("final", final, FINALS)
    if not isinstance(grid, str) and not callable(grid):
        return _own_grid(grid, schedule, nfe, start, final)
    if isinstance(nfe, bool) or not isinstance(nfe, (int, np.integer)) or nfe < 1:
        raise GridError(f"the number of network calls must be a whole number of at least 1, got nfe={nfe!r}.")
    if isinstance(grid, str):
        if grid not in RULES:
            raise UnknownNameError("grid", grid, RULES)
        grid = RULES[grid]
    t_start, t_end = float(schedule.t_start if start is None else start), float(schedule.t_end)
    if not schedule.inside(t_start):
        low, high = schedule.domain
        raise GridError(f"{type(schedule).__name__} is defined for times from {low:.6g} to {high:g}, got start={t_start:g}.")
    if not schedule.lam(t_start) < schedule.lam(t_end):
        raise GridError(
            f"sampling must start noisier than it ends, got start={t_start:g} and the schedule's t_end={t_end:g}. "
            f"Pass a start between {t_end:g} and {float(schedule.t_start):g}."
        )
    times = np.array(grid(schedule, int(nfe), t_start, t_end), np.float64)
    if times.shape != (nfe + 1,):
        raise GridError(f"the grid rule returned shape {times.shape} for nfe={nfe}; it must return {(nfe + 1,)}.")
    if not isinstance(grid, (Leading, Linspace, Trailing)):
        times[0] = t_start
    times[-1] = t_end if final == "t_end" else schedule.t_zero
    return check_grid(times, schedule)


def check_grid(grid: ArrayLike, schedule: NoiseSchedule) -> Floats:
    """The grid as a float64 array, if it is one: at least 2 times, strictly decreasing in noise.

    Raises:
        GridError: otherwise, naming the pair of nodes that is wrong.
    """
    times = np.array(grid, np.float64)
    if times.ndim != 1 or len(times) < 2:
        raise GridError(f"a grid must be one dimension of at least 2 times, got shape {times.shape}.")
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        lams = schedule.lam(times)
    outside = ~schedule.inside(times) | np.isnan(lams)
    if outside.any():
        bad, (low, high) = int(np.argmax(outside)), schedule.domain
        raise GridError(f"grid[{bad}]={times[bad]:g} is not a time of {type(schedule).__name__}, which has {low:.6g} to {high:g}.")
    rising = lams[1:] > lams[:-1]
    if not rising.all():
        i = int(np.argmin(rising))
        what = "repeats" if times[i] == times[i + 1] else "does not decrease in noise"
        raise GridError(
            f"the grid {what}: grid[{i}]={times[i]:.8g} and grid[{i + 1}]={times[i + 1]:.8g}. "
            f"Give the noisiest time first, each time once{'' if len(times) < 20 else ', or ask for fewer calls'}."
        )
    return times


def _own_grid(grid: ArrayLike, schedule: NoiseSchedule, nfe: int | None, start: float | None, final: str) -> Floats:
    times = check_grid(_to_numpy(grid), schedule)
    if nfe is not None and nfe != len(times) - 1:
        raise GridError(
            f"a grid of {len(times)} times makes {len(times) - 1} network calls, but nfe={nfe}. Leave nfe out, or fit it."
        )
    if start is not None and start != times[0]:
        raise GridError(f"the grid starts at {times[0]:g}, but start={start:g}. Leave start out, or fit it.")
    if final == "zero" and float(schedule.sigma(times[-1])) != 0.0:
        raise GridError(
            f'final="zero" needs a grid whose last time has sigma = 0, but yours ends at {times[-1]:g} with sigma='
            f"{float(schedule.sigma(times[-1])):.4g}. Put {schedule.t_zero:g} at its end, or leave final out."
        )
    return times


def _to_numpy(grid: ArrayLike) -> Floats:
    if hasattr(grid, "detach"):  # a tensor, on any device
        grid = grid.detach().cpu().double().numpy()  # type: ignore[union-attr]
    try:
        return np.asarray(grid, np.float64)
    except (TypeError, ValueError) as error:
        raise GridError(f"a grid must be a name, a rule or a list of numbers, got {type(grid).__name__}.") from error


def _finite_lams(schedule: NoiseSchedule, t_start: float, t_end: float) -> tuple[float, float]:
    low, high = (float(lam) for lam in schedule.lam([t_start, t_end]))
    if math.isinf(low):
        low = FINITE_LAM[0] if high > FINITE_LAM[0] else high - 1.0
    if math.isinf(high):
        high = FINITE_LAM[1] if low < FINITE_LAM[1] else low + 1.0
    return low, high


def _table(schedule: NoiseSchedule, t_start: float) -> tuple[int, int]:
    """Number of entries of a discrete schedule, and the index of its first time."""
    tables: Sequence[float] | None = None
    if isinstance(schedule, FromBetas):
        tables = schedule.betas
    elif isinstance(schedule, FromAlphasCumprod):
        tables = schedule.alphas_cumprod
    if tables is None:
        raise GridError(
            f"this grid counts the entries of a discrete-time table; {type(schedule).__name__} has none. Use time or lambda."
        )
    return len(tables), int(round(t_start * len(tables) - 1))


def _times_of(indices: Floats, count: int) -> Floats:
    return (indices + 1.0) / count
