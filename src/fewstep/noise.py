r"""Noise that depends on a sample's seed and on nothing else: not on the batch, the workers, the order or the number of steps.

`draw_noise` makes the starting noise, `add_noise` a partly noised start from clean data. `BrownianPath` gives the noise of stochastic
plans: the increments of one Brownian motion W a sample over intervals of a clock $u \ge 0$, so plans with different numbers of steps
follow the same path. W is drawn lazily: the clock is cut into octaves $[2^k, 2^{k+1})$, whose increments are independent draws, and inside
an octave by bisection with Brownian bridges ("Virtual Brownian Tree", arXiv 2001.01328, section 4).

Every draw is a pure function of (seed, place in the tree, element): a counter-based generator, SplitMix64's finaliser (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) applied to counter and key, and the Box-Muller transform. It is
written here because it must draw for thousands of seeds at once and stay the same whatever the version of a library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.errors import PlanError
from fewstep.plan import Plan

__all__ = ["BrownianPath", "add_noise", "check_seeds", "draw_noise"]

Floats = NDArray[np.float64]
DEPTH = 14
"""Levels of bisection inside an octave: times closer than a 16,000th of an octave share one bridge."""
LOWEST_OCTAVE = -80
"""The clock below 2^-80 is one interval."""
START, OCTAVE, BRIDGE, LEAF = range(4)  # what a draw is for
GOLDEN, MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def check_seeds(seeds: Iterable[int] | Tensor, count: int | None = None) -> list[int]:
    """The seeds as a list of integers of at least 0, as many as `count`.

    Raises:
        TypeError, ValueError: otherwise.
    """
    if isinstance(seeds, (int, np.integer)):
        raise TypeError(f"seeds must be one whole number a sample, e.g. range({seeds}, {seeds} + batch), got the number {seeds}.")
    values = seeds.tolist() if isinstance(seeds, Tensor) else list(seeds)
    if not all(isinstance(seed, (int, np.integer)) and not isinstance(seed, bool) for seed in values):
        raise TypeError("seeds must be whole numbers, one a sample.")
    if any(seed < 0 for seed in values):
        raise ValueError(f"seeds must be at least 0, got {min(values)}.")
    if count is not None and len(values) != count:
        raise ValueError(f"there are {len(values)} seeds for {count} samples. Pass one seed a sample.")
    return [int(seed) for seed in values]


def draw_noise(
    shape: Sequence[int],
    seeds: Iterable[int] | Tensor,
    plan: Plan | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Starting noise, one independent draw a seed.

    Args:
        shape: shape of one sample, without the batch.
        seeds: one whole number a sample.
        plan: scales the noise to sigma of the plan's start; without it the noise has unit variance.
        dtype, device: of the result. The values are the same on every device up to rounding to `dtype`.

    Returns:
        ``"batch *shape"``.

    Example:
        >>> import torch
        >>> a, b = draw_noise((2, 2), [7, 8]), draw_noise((2, 2), [8])
        >>> torch.equal(a[1:], b)
        True
    """
    if any(not isinstance(size, (int, np.integer)) or size < 1 for size in shape):
        raise ValueError(f"the shape of a sample must be whole numbers of at least 1, got {tuple(shape)}.")
    scale = 1.0 if plan is None else float(plan.schedule.sigma(plan.noise_time))
    return torch.from_numpy(scale * normals(check_seeds(seeds), (START,), shape)).to(dtype).to(device)


def add_noise(x_0: Tensor, seeds: Iterable[int] | Tensor, plan: Plan) -> Tensor:
    """Clean data, noised to where a plan starts: alpha x_0 + sigma eps, for image-to-image.

    Plan from the noise level you want (``solver.plan(..., start=t)``): all calls are then spent between there and the end. eps is what
    `draw_noise` gives for the same seeds.

    Args:
        x_0: ``"batch *shape"``, clean data.
        seeds: one whole number a sample.
        plan: says the noise level.

    Returns:
        ``"batch *shape"`` in x_0's precision, on its device.

    Example:
        >>> import torch, fewstep as fs
        >>> plan = fs.make_plan("dpmpp_2m", fs.schedules.Flow(), nfe=4, start=0.6)
        >>> x = add_noise(torch.ones(2, 3), [0, 1], plan)
        >>> torch.allclose(x, 0.4 + draw_noise((3,), [0, 1], plan))
        True
    """
    if not isinstance(x_0, Tensor) or not x_0.is_floating_point() or x_0.ndim < 2:
        kind = f"{x_0.dtype} {tuple(x_0.shape)}" if isinstance(x_0, Tensor) else type(x_0).__name__
        raise TypeError(f"x_0 must be a floating-point tensor (batch, *shape), got {kind}.")
    noise = draw_noise(x_0.shape[1:], check_seeds(seeds, len(x_0)), plan, dtype=x_0.dtype, device=x_0.device)
    return float(plan.schedule.alpha(plan.noise_time)) * x_0 + noise


class BrownianPath:
    """One Brownian motion a sample.

    Args:
        seeds: one whole number a sample.
        shape: shape of one sample.

    Example:
        >>> path = BrownianPath([3], (2,))
        >>> whole, first, second = path.increment(1.0, 4.0), path.increment(1.0, 2.5), path.increment(2.5, 4.0)
        >>> bool(np.allclose(whole, first + second))
        True
    """

    def __init__(self, seeds: Iterable[int] | Tensor, shape: Sequence[int]):
        self.seeds = check_seeds(seeds)
        self.shape = tuple(shape)
        self._last: tuple[float, Floats] | None = None

    def increment(self, begin: float, end: float) -> Floats:
        """W(end) - W(begin): ``"batch *shape"``, variance end - begin."""
        if not 0.0 <= begin < end < math.inf:
            raise PlanError(f"a noise interval needs 0 <= begin < end, got {begin:g} and {end:g}.")
        (low, at_low), (high, at_high) = _octave(begin), _octave(end)
        into_low, into_high = self._inside(low, at_low), self._inside(high, at_high)
        whole = sum((self._whole(k) for k in range(low, high)), start=np.zeros((len(self.seeds), *self.shape)))
        return whole + into_high - into_low

    def normalised(self, begin: float, end: float) -> Floats:
        """The increment divided by its standard deviation."""
        return self.increment(begin, end) / math.sqrt(end - begin)

    def _whole(self, octave: int) -> Floats:
        return math.sqrt(_width(octave)) * self._draw(OCTAVE, octave, 0, 0)

    def _inside(self, octave: int, place: float) -> Floats:
        """W at a place in [0, 1) of an octave, minus W at the octave's begin. The last place asked for is remembered."""
        key = octave + place
        if self._last is None or self._last[0] != key:
            self._last = (key, math.sqrt(_width(octave)) * self._bridge(octave, place))
        return self._last[1]

    def _bridge(self, octave: int, place: float) -> Floats:
        low, high = 0.0, 1.0
        at_low: Floats = np.zeros((len(self.seeds), *self.shape))
        if place == 0.0:
            return at_low
        at_high = self._draw(OCTAVE, octave, 0, 0)
        for level in range(DEPTH):
            middle = 0.5 * (low + high)
            index = int(low * 2**level)
            at_middle = 0.5 * (at_low + at_high) + 0.5 * math.sqrt(high - low) * self._draw(BRIDGE, octave, level, index)
            if place == middle:
                return at_middle
            low, at_low, high, at_high = (low, at_low, middle, at_middle) if place < middle else (middle, at_middle, high, at_high)
        share = (place - low) / (high - low)
        spread = math.sqrt((high - low) * share * (1.0 - share))
        return at_low + share * (at_high - at_low) + spread * self._draw(LEAF, octave, DEPTH, int(low * 2**DEPTH))

    def _draw(self, purpose: int, octave: int, level: int, index: int) -> Floats:
        return normals(self.seeds, (purpose, octave - LOWEST_OCTAVE + 1, level, index), self.shape)


def normals(seeds: Sequence[int], key: Sequence[int], shape: Sequence[int]) -> Floats:
    """Standard normal numbers ``"batch *shape"``, a pure function of each seed, the key and the place in the shape.

    Example:
        >>> both, one = normals([1, 2], (0,), (3,)), normals([2], (0,), (3,))
        >>> bool((both[1:] == one).all())
        True
    """
    count = math.prod(shape)
    first = np.array([seed & MASK for seed in seeds], np.uint64)
    second = np.array([seed >> 64 & MASK for seed in seeds], np.uint64)
    for part in key:  # two words of key a seed, so that no two streams share a window
        first = _mix(first + np.uint64((part * GOLDEN + 1) & MASK))
        second = _mix(second ^ first)
    counters = _mix(np.arange((count + 1) // 2, dtype=np.uint64) * np.uint64(GOLDEN))
    words = _mix(_mix(counters[None, :] ^ first[:, None]) + second[:, None])
    radius = np.sqrt(-2.0 * np.log(((words >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32))
    angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * math.pi * 2.0**-32)
    pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs[:, :count].reshape(len(first), *shape)


def _mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser; wraps around on purpose."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _octave(u: float) -> tuple[int, float]:
    """The octave of a clock time and the place in [0, 1) inside it."""
    if u < 2.0**LOWEST_OCTAVE:
        return LOWEST_OCTAVE - 1, u / 2.0**LOWEST_OCTAVE
    mantissa, exponent = math.frexp(u)  # u = mantissa 2^exponent, mantissa in [1/2, 1)
    return exponent - 1, 2.0 * mantissa - 1.0


def _width(octave: int) -> float:
    return 2.0 ** max(octave, LOWEST_OCTAVE)
