r"""Time grids: where the states of a sampler stand. The first time is the noisiest; lambda strictly increases along a grid.

A *rule* is a small callable that places n + 1 times between two finite ends; `make_grid` is the one door through which grids enter:
it finds the ends, applies the rule, puts the exact ends back and checks the result. A list of times of your own is taken unmodified.

Ends. alpha = 0 at the start and sigma = 0 at the end are legal. Rules that need a finite lambda or a finite sigma / alpha work on the
range of `FINITE_LAM` there: the end itself keeps its exact place, the other nodes lie within the range.

Sources: `Karras` from "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364, eq. 5); `BetaTime` from "Beta
Sampling is All You Need" (arXiv 2407.12173), `Beta` the variant in libraries; `DMN` from "Accelerating Diffusion Sampling with
Optimized Time Steps" (arXiv 2402.17376); the shift of `Shifted` as in `Flow`; `Lambda` from "DPM-Solver" (arXiv 2206.00927); `Power`
from DEIS (arXiv 2204.13902); the discrete spacings and the trailing rule from "Common Diffusion Noise Schedules and Sample Steps are
Flawed" (arXiv 2305.08891); the tables of `AlignYourSteps` from "Align Your Steps" (arXiv 2404.14507).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fewstep.errors import GridError, MissingExtraError, UnknownNameError
from fewstep.numerics import gauss_legendre
from fewstep.schedules import FromAlphasCumprod, FromBetas, NoiseSchedule

__all__ = [
    "DMN",
    "FINITE_LAM",
    "AlignYourSteps",
    "Beta",
    "BetaTime",
    "GridRule",
    "Karras",
    "Lambda",
    "Leading",
    "Linspace",
    "Logistic",
    "Power",
    "Shifted",
    "Trailing",
    "check_grid",
    "dmn_bound",
    "grid_names",
    "make_grid",
]

Floats = NDArray[np.float64]
GridRule = Callable[[NoiseSchedule, int, float, float], Floats]
"""``rule(schedule, nfe, t_start, t_end)`` -> times ``"nfe+1"``, noisiest first, both ends finite in lambda."""

DMN_POINTS = 12
"""Quadrature points a step in the bound of `DMN`."""
DMN_SOFT = 1e-3
"""How far kinks of the bound are rounded off in the search, as a share of its average term."""
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
    """sigma/alpha at the quantiles of a Beta distribution, as diffusers' ``use_beta_sigmas``. Needs SciPy.

    The paper has the quantiles in time: see `BetaTime`.
    """

    a: float = 0.6
    b: float = 0.6

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        low, high = _finite_lams(schedule, t_start, t_end)
        noisiest, cleanest = math.exp(-low), math.exp(-high)
        return schedule.t_of_lam(-np.log(cleanest + (noisiest - cleanest) * _beta_quantiles(nfe, self.a, self.b)))


@dataclass(frozen=True)
class BetaTime:
    """Times at the quantiles of a Beta distribution, which crowds both ends: the paper's "beta sampling". Needs SciPy.

    Args:
        a, b: of the distribution, 0.6 in the paper; 1 is uniform in time.
    """

    a: float = 0.6
    b: float = 0.6

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        return t_end + (t_start - t_end) * _beta_quantiles(nfe, self.a, self.b)


@dataclass(frozen=True)
class Shifted:
    """Uniform in time, then shifted towards the noise: t <- k t / (1 + (k - 1) t), for times in [0, 1].

    For a `Flow` schedule of shift 1 this is the grid of a model that wants a shift; a schedule with a shift of its own has it already in
    its alpha and sigma, and wants the grid "time".

    Example:
        >>> from fewstep.schedules import Flow
        >>> Shifted.of_tokens(4096).shift.__round__(3)  # Flux at 1024 x 1024
        3.158
        >>> make_grid(Shifted(3.0), Flow(t_end=0.0), 4).round(12).tolist()
        [1.0, 0.9, 0.75, 0.5, 0.0]
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        if not self.shift > 0.0:
            raise GridError(f"the shift of a grid must be positive, got {self.shift:g}.")

    @classmethod
    def of_tokens(cls, tokens: int, *, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)) -> Shifted:
        """The shift of a model whose shift depends on the resolution: log k is linear in the number of tokens.

        Args:
            tokens: patches of the image (for Flux, a 16th of its height times a 16th of its width).
            low, high: two pairs of tokens and log k; the defaults are Flux's.
        """
        slope = (high[1] - low[1]) / (high[0] - low[0])
        return cls(math.exp(low[1] + slope * (tokens - low[0])))

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
"""Published sigma/alpha of the ten calls. The eleventh node is the end: sigma = 0, or, to interpolate, that of the schedule."""


@dataclass(frozen=True)
class AlignYourSteps:
    """The published ten-step tables; other numbers of calls interpolate log sigma linearly between all eleven nodes, as the authors do.

    Args:
        table: ``"sd15"``, ``"sdxl"`` or ``"svd"``. The ends are those of the schedule; entries beyond them are left out.

    Note: ten calls give exactly the published table when the schedule starts where the table does. The authors interpolate towards
    sigma = 0.029 (Stable Diffusion's cleanest entry) or 0.002 (Stable Video Diffusion) and then put 0 in its place: so it is here with
    ``final="zero"`` and a schedule that ends there.

    Example:
        >>> from fewstep.schedules import EDM
        >>> make_grid("ays_svd", EDM(sigma_max=700.0, sigma_min=0.002), 5, final="zero").round(3).tolist()
        [700.0, 15.886, 4.248, 0.981, 0.173, 0.0]
    """

    table: str = "sd15"

    def __post_init__(self) -> None:
        if self.table not in AYS_SIGMAS:
            raise UnknownNameError("Align-Your-Steps table", self.table, AYS_SIGMAS)

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        low, high = _finite_lams(schedule, t_start, t_end)
        inner = [-math.log(sigma) for sigma in AYS_SIGMAS[self.table][1:]]
        knots = np.array([low, *(lam for lam in inner if low < lam < high), high])
        return schedule.t_of_lam(np.interp(np.linspace(0.0, 1.0, nfe + 1), np.linspace(0.0, 1.0, len(knots)), knots))


@dataclass(frozen=True)
class DMN:
    r"""Lambdas that minimise a bound on the error of a multistep solver, whatever the model ("DM-NonUniform"). Needs SciPy.

    The weight of the data prediction at node n in step s of an exponential Adams method is, up to a common factor, $c_{sn}$, the integral
    of $e^\lambda$ times the Lagrange polynomial of the node over the step. If the error of a prediction is proportional to
    $\sigma^p / \alpha$, that of the sample is at most the sum over steps of $(\sum_n c_{sn}^2 \sigma_n^{2p} / \alpha_n^2)^{1/2}$ (within a
    step errors are taken as independent). It depends on the lambdas alone; alpha and sigma are those of the
    variance-preserving schedule of equal lambda.

    Args:
        order: of the solver, 1 to 3; the first and last steps are of lower order.
        power: p. The authors' code has 2, and recommends 1 for models of pixels.
        apart: how many of the first steps count for themselves; None for all. For the others the paper adds up what the steps give to a
            node *with sign* before the absolute value: $\sum_n |\sum_s c_{sn}|\, \sigma_n^p / \alpha_n$. The authors' code has 3 and 0.

    Note: with signs the minimum is a grid that relies on the steps' cancelling each other, not one with small errors; the authors' grids
    are where their search happens to stop on the way there. Without, there is one minimum and every start leads to it. Order 2 and
    power 1 did best in our measurements, see the page of the grids. Results are remembered.

    Example:
        >>> from fewstep.schedules import EDM
        >>> make_grid("dmn", EDM(), 4).round(2).tolist()
        [80.0, 2.46, 0.68, 0.09, 0.0]
    """

    order: int = 2
    power: float = 1.0
    apart: int | None = None

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise GridError(f"the solver of a DMN grid has order 1, 2 or 3, not {self.order!r}.")
        if not (math.isfinite(self.power) and self.power >= 0.0):
            raise GridError(f"the power of a DMN grid must be at least 0, got {self.power:g}.")

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        ends = _finite_lams(schedule, t_start, t_end)
        return schedule.t_of_lam(np.array(_least_bound(*ends, nfe, self)))


@dataclass(frozen=True)
class Logistic:
    r"""Most nodes where data of the usual scale take shape: a density in lambda that is logistic, with a uniform share.

    $$ F(\lambda) = (1 - q)\, S\!\left(\frac{\lambda - c}{w}\right) + q\, \lambda, \qquad S(z) = \frac{1}{1 + e^{-z}}, $$

    each part scaled to run from 0 to 1 between the ends, and the nodes at equal steps of F. The prediction of data of standard deviation
    1/2 to 1 changes most where sigma / alpha is of that size, large pictures' somewhat before; at the ends it hardly changes, and a grid
    that is uniform in lambda wastes steps there. The defaults are a compromise between Gaussian mixtures and the two models that come
    along, found by a search with `Adams` on few samples of them (``python benchmarks/auto.py`` measures the result on other mixtures and
    other samples); this is the grid "auto".

    Args:
        center, width: c and w, in lambda.
        uniform: q, the share that is uniform in lambda, from 0 to 1.

    Raises:
        ValueError: for a width that is not positive, or a share outside [0, 1].

    Example:
        >>> from fewstep.schedules import EDM
        >>> Logistic()(EDM(), 6, 80.0, 0.002).round(3).tolist()
        [80.0, 8.018, 2.608, 1.052, 0.409, 0.11, 0.002]
    """

    center: float = -0.2
    width: float = 1.3
    uniform: float = 0.13

    def __post_init__(self) -> None:
        if not (math.isfinite(self.center) and 0.0 < self.width < math.inf and 0.0 <= self.uniform <= 1.0):
            raise ValueError(f"Logistic needs a finite center, a positive width and a share in [0, 1], got {self}.")

    def __call__(self, schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        low, high = _finite_lams(schedule, t_start, t_end)
        fine = np.linspace(low, high, 4097)
        shape = 0.5 * np.tanh(0.5 * (fine - self.center) / self.width)  # a logistic curve, but for a constant
        curved, even = (shape - shape[0]) / (shape[-1] - shape[0]), (fine - low) / (high - low)
        share = (1.0 - self.uniform) * curved + self.uniform * even
        return schedule.t_of_lam(np.interp(np.linspace(0.0, 1.0, nfe + 1), share, fine))


RULES: dict[str, GridRule] = {
    "auto": Logistic(),
    "ays_sd15": AlignYourSteps("sd15"),
    "ays_sdxl": AlignYourSteps("sdxl"),
    "ays_svd": AlignYourSteps("svd"),
    "beta": Beta(),
    "beta_time": BetaTime(),
    "dmn": DMN(),
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


def check_grid_name(name: str) -> None:
    """Refuse what is no name of a grid.

    Raises:
        UnknownNameError: for a name that does not exist, with the nearest one.

    Example:
        >>> check_grid_name("karras")
    """
    if name not in RULES:
        raise UnknownNameError("grid", name, RULES)


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
        check_grid_name(grid)
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


def _beta_quantiles(nfe: int, a: float, b: float) -> Floats:
    """Quantiles ``"nfe+1"`` of the Beta distribution, from 1 to 0."""
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise MissingExtraError("scipy", "tune", "the beta grid") from error
    return np.asarray(beta.ppf(1.0 - np.arange(nfe + 1) / nfe, a, b), np.float64)


def dmn_bound(lams: ArrayLike, rule: DMN) -> float:
    """The bound that `DMN` minimises, of any lambdas ``"nfe+1"``.

    Example:
        >>> round(dmn_bound([0.0, 1.0], DMN(order=1, power=0.0)), 6)  # (e - 1) / alpha
        2.430017
    """
    return float(_dmn_bound(torch.as_tensor(np.asarray(lams, np.float64)), rule, 0.0))


def _dmn_bound(lams: torch.Tensor, rule: DMN, soft: float) -> torch.Tensor:
    """The bound; the absolute values of sums with sign are rounded off at `soft`."""
    nfe = len(lams) - 1
    errors = torch.exp(-0.5 * rule.power * torch.logaddexp(torch.zeros_like(lams), 2.0 * lams)) * torch.sqrt(
        1.0 + torch.exp(-2.0 * lams)
    )
    orders = np.minimum(rule.order, np.minimum(np.arange(nfe) + 1, nfe - np.arange(nfe)))
    apart = np.arange(nfe) < (nfe if rule.apart is None else max(rule.apart, 1))
    apart[-1] = True
    nodes, weights = (torch.from_numpy(values) for values in gauss_legendre(0.0, 1.0, DMN_POINTS))
    total, sums = lams.new_zeros(()), lams.new_zeros(nfe)
    for k in np.unique(orders).tolist():
        steps = np.flatnonzero(orders == k)
        places = torch.from_numpy(steps[:, None] - np.arange(k))
        known, begin, end = lams[places], lams[steps], lams[steps + 1]
        u = begin[:, None] + (end - begin)[:, None] * nodes
        growth = (end - begin)[:, None] * weights * torch.exp(u)
        columns = []
        for j in range(k):
            basis = growth
            for i in set(range(k)) - {j}:
                basis = basis * (u - known[:, i, None]) / (known[:, j] - known[:, i])[:, None]
            columns.append(errors[places[:, j]] * basis.sum(1))
        terms, own = torch.stack(columns, 1), torch.from_numpy(apart[steps])
        total = total + terms[own].square().sum(1).sqrt().sum()
        sums = sums.index_add(0, places[~own].flatten(), terms[~own].flatten())
    return total if apart.all() else total + torch.sqrt(sums.square() + soft**2).sum()


@lru_cache(maxsize=4096)
def _least_bound(low: float, high: float, nfe: int, rule: DMN) -> tuple[float, ...]:
    """The lambdas of the least bound. The gaps are positive by construction: the softmax of free numbers."""
    first = np.linspace(low, high, nfe + 1)
    if nfe == 1:
        return low, high
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise MissingExtraError("scipy", "tune", "the DMN grid") from error
    soft = DMN_SOFT * dmn_bound(first, rule) / nfe

    def lams(free: torch.Tensor) -> torch.Tensor:
        return torch.cat([free.new_full((1,), low), low + (high - low) * torch.cumsum(torch.softmax(free, 0), 0)])

    def value_and_slope(free: Floats) -> tuple[float, Floats]:
        point = torch.from_numpy(free.copy()).requires_grad_()
        with torch.enable_grad():
            value = torch.log(_dmn_bound(lams(point), rule, soft))
            (slope,) = torch.autograd.grad(value, point)
        return float(value.detach()), slope.numpy()

    found = minimize(value_and_slope, np.zeros(nfe), jac=True, method="L-BFGS-B", bounds=[(-9.0, 9.0)] * nfe).x
    return low, *lams(torch.from_numpy(found))[1:-1].tolist(), high
