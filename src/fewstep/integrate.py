r"""The probability-flow ODE, solved to a requested tolerance: what a few-step sampler should have given. `reference` and its inverse;
and `adaptive`, sampling with a step size that each sample sets for itself.

Notation. With $\phi = \operatorname{atan2}(\sigma, \alpha)$ and the normalised state $u = x / \sqrt{\alpha^2 + \sigma^2}$ the marginals are
those of $\cos\phi\, x_0 + \sin\phi\, \varepsilon$, whatever the schedule, and the ODE is (arXiv 2011.13456, eq. 13, in this variable)

$$ \frac{du}{d\phi} = \frac{\cos\phi\, u - D(x, t)}{\sin\phi}. $$

It is regular at alpha = 0, where $\phi = \pi/2$. We integrate in $q = \sqrt\phi$, $du/dq = 2q\, du/d\phi$, which spends fewer calls than
phi, lambda or log tan(phi/2) on variance-preserving, variance-exploding and flow schedules alike. An end at sigma = 0 is approached to
an angle of at most the tolerance; from there the step of first order, $x = \alpha D$, is exact but for a fraction of that angle.

Steps are those of the pair 5(4) of Dormand and Prince, "A family of embedded Runge-Kutta formulae", J. Comput. Appl. Math. 6 (1980), in the
form of Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", table II.5.2. Up to an accuracy of about $10^{-8}$ it needs
fewer calls than their pair of order 8, and a network's rounding disturbs it less.

The tolerance is a global one. A local tolerance bounds the error that each step commits, not what becomes of it later. So the ODE is
solved twice, the second time with a smaller local tolerance; the difference estimates the error of the *first* solution, and the second is
returned. Is the estimate too large, the local tolerance shrinks further.

`adaptive` is another method for another purpose: samples at a tolerance that the eye does not see, as cheaply as may be, with the
error control of DPM-Solver-12 and -23 ("DPM-Solver", arXiv 2206.00927, appendix C; the error measure from "Gotta Go Fast When
Generating Data with Score-Based Models", arXiv 2105.14080).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fewstep.errors import FewstepError, GridError, NetworkError, UnknownNameError
from fewstep.exact import widest_dtype
from fewstep.grids import FINITE_LAM
from fewstep.schedules import NoiseSchedule

__all__ = ["Adaptive", "Reference", "ToleranceError", "adaptive", "invert", "reference"]

Floats = NDArray[np.float64]

STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""Weights of the slopes in every stage after the first; the last row is the step of order 5. The nodes are the sums of the rows."""
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Weights of the slopes in the difference between the steps of order 5 and 4."""

FIRST = 1.0
"""First local tolerance, as a multiple of the global one. (Smooth problems reach a tenth of it.)"""
TIGHTEN = 5.0
"""The local tolerance of the next solution is smaller at least by this factor, and at most by its fourth power."""
SMALLEST_ANGLE = 1e-11
"""Nearest approach to sigma = 0 in the angle phi; below, tables of a discrete model resolve no time."""
STALLED = 10
"""A solution that needs this many times the calls of the one before is not converging: the network's rounding limits it."""
COARSE, PATIENCE = 1e-6, 6
"""Above this local tolerance a chaotic field may part two solutions for a while, so the error may fail to fall this often; below, twice."""

FEW = 4
"""So few steps between two places may have been set by the places."""
BESIDE = 1e-11
"""Relative distance in q at which steps end before and begin after a jump of the denoiser."""

SHORTEST = 1e-10
"""Shortest step in lambda of `adaptive`."""
SERIES = 0.1
"""Below this |z| `_moment` is summed as a series."""

DenoiserLike = Callable[..., Tensor]


class ToleranceError(FewstepError, RuntimeError):
    """The ODE could not be solved to the requested tolerance; the message says what was reached and how to get on.

    Attributes:
        error: the last estimate of the error, infinite if there is none.
        nfe: calls spent.
    """

    def __init__(self, message: str, error: float, nfe: int):
        super().__init__(message)
        self.error = error
        self.nfe = nfe


class Reference(Tensor):
    """A tensor with an estimate of its own error. What is computed from it, copies included, is a plain tensor.

    Attributes:
        error: estimated error of the worst sample (float): the root mean square over a sample's elements, relative to
            max(1, root mean square of the sample); with several times, the worst of them.
        errors: the same for every sample, float64 ``"batch"`` on the CPU.
        nfe: calls that were needed, all solutions together.
    """

    error: float
    errors: Tensor
    nfe: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def plain(self) -> Tensor:
        """The numbers alone."""
        return self.as_subclass(Tensor)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Reference(error={self.error:.2g}, nfe={self.nfe})\n{self.plain()!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.plain().__deepcopy__(memo)

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.plain().__reduce_ex__(proto)


def reference(
    denoiser: DenoiserLike,
    noise: Tensor,
    schedule: NoiseSchedule,
    *,
    tol: float = 1e-6,
    t_start: float | None = None,
    t_end: float | None = None,
    times: ArrayLike | Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    max_calls: int = 20_000,
) -> Reference:
    """The solution of the probability-flow ODE, from noise to data, to a global tolerance.

    The state is float64 where the device has it, and so is what the denoiser sees; `fewstep.Denoiser` passes it on in its network's
    precision. A network in float32 reaches 1e-6, often 1e-7; one in half precision does not. No gradients are recorded.

    The step size follows the worst sample of the batch. A sample therefore depends on which others are there, but within the tolerance.

    Args:
        denoiser: ``D(x, t, **cond)`` -> data prediction of x's shape. If it has ``jumps``, times at which it jumps, as guidance in an
            interval does, steps end there.
        noise: ``"batch *shape"``, the state at t_start.
        schedule: the denoiser's noise schedule.
        tol: largest error of a sample: root mean square over its elements, relative to max(1, root mean square of the sample). A
            trained network in float32 takes hundreds of calls for 1e-3, thousands for 1e-5, and may never reach 1e-6.
        t_start: where to begin, `schedule.t_start` when left out; alpha may be 0.
        t_end: where to end, `schedule.t_end` when left out; sigma may be 0.
        times: ``"times"``, decreasing, from t_start to t_end at most: return the solution at all of these instead of at t_end. Each
            is the end of a step; nothing is interpolated.
        cond: conditions, handed to every call.
        max_calls: how many calls may be spent.

    Returns:
        `Reference`, a tensor ``"batch *shape"``, or ``"times batch *shape"``, of the noise's precision with its own ``error``.

    Raises:
        ToleranceError: if the tolerance cannot be reached, or not with so many calls.
        NetworkError: if the network returns values that are not finite.
        GridError: if the times do not decrease, or lie outside.
        ValueError: if the tolerance is not positive or finer than the noise's precision, or the denoiser has another schedule.

    Example:
        >>> from fewstep.exact import Gaussian
        >>> from fewstep.schedules import EDM
        >>> exact = Gaussian(EDM(), [1.0, -1.0], 0.25)
        >>> x = reference(exact, 80 * torch.ones(1, 2, dtype=torch.float64), EDM(), t_end=0.0)
        >>> bool((x - exact.solution(80 * torch.ones(1, 2, dtype=torch.float64), 80.0, 0.0)).abs().max() < 1e-6), x.error < 1e-6
        (True, True)
    """
    begin = schedule.t_start if t_start is None else float(t_start)
    if times is None:
        stops = [schedule.t_end if t_end is None else float(t_end)]
        _check_order(schedule, [begin, *stops])
    else:
        stops = _checked_times(times)
        _check_order(schedule, stops)
        _check_within(schedule, stops, begin, t_end)
    solution = _solve(_Problem(denoiser, schedule, dict(cond or {}), begin, stops), noise, tol, max_calls)
    return solution if times is not None else _reference(solution.plain()[0], solution.errors, solution.nfe)


def invert(
    denoiser: DenoiserLike,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    tol: float = 1e-6,
    t_from: float | None = None,
    t_to: float | None = None,
    cond: Mapping[str, Any] | None = None,
    max_calls: int = 20_000,
) -> Reference:
    """The same ODE backwards, from data to noise: the noise that `reference` turns into x.

    Args:
        denoiser: ``D(x, t, **cond)`` -> data prediction of x's shape.
        x: ``"batch *shape"``, the state at t_from.
        schedule: the denoiser's noise schedule.
        tol: largest error of a sample of the *noise*, measured as in `reference`.
        t_from: the time of x, `schedule.t_end` when left out: x is a state with that little noise, as samples that end there are.
            Where sigma is 0 the slope is a limit of 0 / 0, so integration begins at the tiny angle of the module's notes with
            x_t = alpha x_0, right to first order. This needs data with a smooth density.
        t_to: where to end, `schedule.t_start` when left out.
        cond, max_calls: as for `reference`.

    Returns:
        `Reference`, a tensor ``"batch *shape"``, the state at t_to.

    Raises:
        ToleranceError, NetworkError, GridError, ValueError: as `reference`.

    Example:
        >>> from fewstep.exact import Gaussian
        >>> from fewstep.schedules import VPLinear
        >>> exact = Gaussian(VPLinear(), [1.0, -1.0], 0.25)
        >>> x = torch.tensor([[1.5, -2.0]], dtype=torch.float64)
        >>> noise = invert(exact, x, VPLinear())
        >>> bool((noise - exact.solution(x, 1e-3, 1.0)).abs().max() < 1e-6)
        True
    """
    begin = schedule.t_end if t_from is None else float(t_from)
    end = schedule.t_start if t_to is None else float(t_to)
    _check_order(schedule, [end, begin])
    solution = _solve(_Problem(denoiser, schedule, dict(cond or {}), begin, [end]), x, tol, max_calls)
    return _reference(solution.plain()[0], solution.errors, solution.nfe)


class Adaptive(NamedTuple):
    """Samples of `adaptive`, and how they were reached.

    Attributes:
        samples: ``"batch *shape"``, the states at the end.
        nfe: calls of the network, each on the whole batch.
        calls: int64 ``"batch"``, what every sample alone would have needed.
        rejected: int64 ``"batch"``, steps of every sample that were tried and taken back.
        grids: for every sample the accepted times, from the start to the end.
    """

    samples: Tensor
    nfe: int
    calls: NDArray[np.int64]
    rejected: NDArray[np.int64]
    grids: list[Floats]

    def __repr__(self) -> str:
        calls = f"{self.calls.min()} to {self.calls.max()}" if len(self.calls) else "no"
        return (
            f"Adaptive({len(self.samples)} samples, nfe={self.nfe}, {calls} calls a sample, {self.rejected.sum()} steps rejected)"
        )


@torch.no_grad()
def adaptive(
    denoiser: DenoiserLike,
    noise: Tensor,
    schedule: NoiseSchedule,
    *,
    order: int = 3,
    predicts: str = "noise",
    rtol: float = 0.05,
    atol: float = 0.0078,
    first_step: float = 0.05,
    safety: float = 0.9,
    growth: float = 5.0,
    together: bool = False,
    t_start: float | None = None,
    t_end: float | None = None,
    cond: Mapping[str, Any] | None = None,
    max_calls: int = 10_000,
) -> Adaptive:
    r"""Sample with a step size that follows the error: DPM-Solver-12 or DPM-Solver-23, every sample with steps of its own.

    A step of order p is compared with one of order p - 1 that costs no further call. Both are states of the same noise level; divided by
    $\sqrt{\alpha^2 + \sigma^2}$ there they are u and $u_\text{low}$. With $\delta = \max(a, r \max(|u_\text{low}|, |u_\text{before}|))$
    the error E is the root mean square of $(u - u_\text{low}) / \delta$ over a sample's elements. The step is accepted if $E \le 1$, and
    $h \leftarrow \min(\theta h E^{-1/p}, \lambda_\text{end} - \lambda)$. A sample therefore does not depend on the others in its batch,
    as it does where the worst sets the step for all.

    Args:
        denoiser: ``D(x, t, **cond)`` -> data prediction of x's shape; called with one time a sample, float64 ``"batch"`` on the host.
        noise: ``Float[Tensor, "batch *shape"]``, the states at t_start. Half precision is run, and returned, in float32.
        schedule: the denoiser's noise schedule.
        order: 2 for DPM-Solver-12, 3 for DPM-Solver-23.
        predicts: ``"noise"``, as published, or ``"data"`` for the steps of DPM-Solver++.
        rtol, atol: r and a; the default of a is two grey levels of an image in [-1, 1] (1 / 128).
        first_step: the first h, in lambda.
        safety: theta, below 1.
        growth: the most by which a step may grow over the one before; the authors have no limit (infinity).
        together: one step size for the batch, that of its worst sample, and one time a call: for networks that take no other, and as
            the authors' code does.
        t_start: where to begin, `schedule.t_start` when left out. Where alpha is 0 the first step is one of order 1, to the noise level of
            ``grids.FINITE_LAM``, without control of its error.
        t_end: where to end, `schedule.t_end` when left out. Where sigma is 0 the last step is one of order 1, likewise.
        cond: conditions, handed to every call.
        max_calls: how many calls may be spent.

    Returns:
        `Adaptive`: samples, calls, the accepted times. Samples that have arrived wait, unchanged, until all have. No gradients are
        recorded, and every step reads the errors from the device.

    Note:
        For variance-preserving schedules the division changes nothing and E is the published one. For others, states that are many times
        as large as the data would let errors pass that are as large as the data.

        A rejected step is tried again from the prediction that is known, so it costs p - 1 calls.

    Raises:
        ToleranceError: if the calls are spent, or the steps shrink to nothing.
        NetworkError: if the network returns another shape or values that are not finite.
        GridError: if t_end is not cleaner than t_start.
        ValueError: for an option outside its range, or a denoiser with another schedule.
        UnknownNameError: for another prediction.

    Example:
        >>> from fewstep.exact import Gaussian
        >>> from fewstep.schedules import VPLinear
        >>> exact = Gaussian(VPLinear(), [1.0, -1.0], 0.25)
        >>> run = adaptive(exact, torch.ones(2, 2, dtype=torch.float64), VPLinear(), rtol=1e-3, atol=1e-3)
        >>> bool((run.samples - exact.solution(torch.ones(2, 2, dtype=torch.float64), 1.0, 1e-3)).abs().max() < 1e-3)
        True
        >>> run.nfe == max(run.calls.tolist()), run.grids[0][[0, -1]].tolist()
        (True, [1.0, 0.001])
    """
    _check_adaptive(order, rtol, atol, first_step, safety, growth)
    begin = float(schedule.t_start if t_start is None else t_start)
    end = float(schedule.t_end if t_end is None else t_end)
    _check_order(schedule, [begin, end])
    _check_problem(_Problem(denoiser, schedule, {}, begin, [end]), noise, 1.0)
    x = noise.detach() if noise.dtype in (torch.float32, torch.float64) else noise.detach().float()
    pair = _Pair(denoiser, schedule, dict(cond or {}), (begin, end), order, predicts, max_calls)
    x = x if pair.begin == begin else pair.plain_step(x, begin, pair.begin)
    x, tries = _adapt(pair, x, 1 if together else len(x), first_step, _Control(rtol, atol, safety, growth))
    x = x if pair.end == end else pair.plain_step(x, pair.end, end)
    ends = int(pair.begin != begin) + int(pair.end != end)
    grids = [np.array([begin, *grid, end][int(pair.begin == begin) : len(grid) + 1 + int(pair.end != end)]) for grid in tries.grids]
    calls = ends + order * np.array([len(grid) - 1 for grid in tries.grids]) + (order - 1) * tries.rejected
    share = len(x) // len(grids)  # of all samples, if they go together
    return Adaptive(
        x, pair.calls, calls.repeat(share), tries.rejected.repeat(share), [grid for grid in grids for _ in range(share)]
    )


class _Problem(NamedTuple):
    """What to solve: from time `begin` to each of `stops` in turn."""

    denoiser: DenoiserLike
    schedule: NoiseSchedule
    cond: dict[str, Any]
    begin: float
    stops: list[float]


class _Place(NamedTuple):
    """A place on the path where a step ends.

    Attributes:
        q: where.
        t: the time to hand to the network; None for that of q.
        scale: x / u, or None if the state here is not asked for.
        clean: whether this stands for sigma = 0.
    """

    q: float
    t: float | None = None
    scale: float | None = None
    clean: bool = False


class _Run(NamedTuple):
    """One solution: the states ``"times batch *shape"``, the calls it took, and the steps to every place on the way."""

    states: Tensor
    calls: int
    steps: list[int]


class _GiveUp(Exception):  # noqa: N818
    """A signal between the functions of this file: the budget of one solution is spent, or its step has shrunk to nothing."""


class _Field:
    """du/dq. Counts its calls, and gives up when the budget is spent."""

    def __init__(self, problem: _Problem, budget: float):
        self.denoiser, self.schedule, self.cond = problem.denoiser, problem.schedule, problem.cond
        self.budget = budget
        self.calls = 0

    def __call__(self, q: float, u: Tensor, t: float | None = None) -> Tensor:
        if self.calls >= self.budget:
            raise _GiveUp("the calls allowed are spent")
        self.calls += 1
        angle = q * q
        if t is None:
            t = float(self.schedule.t_of_lam(-math.log(math.tan(angle))))
        d = self.denoiser(u * _scale(self.schedule, t), t, **self.cond)
        if d.shape != u.shape:
            raise NetworkError(f"the denoiser returned shape {tuple(d.shape)} at t={t:.6g} for states of shape {tuple(u.shape)}.")
        return torch.sub(math.cos(angle) * u, d.to(u.dtype)).mul_(2.0 * q / math.sin(angle))


@torch.no_grad()
def _solve(problem: _Problem, x: Tensor, tol: float, max_calls: int) -> Reference:
    """Solutions with ever smaller local tolerances, until two agree: ``"times batch *shape"``."""
    _check_problem(problem, x, tol)
    state = x.detach().to(widest_dtype(x.device))
    local, used, error, stalls = FIRST * tol, 0, math.inf, 0
    last: _Run | None = None
    while True:
        left = max_calls - used
        stalled = math.inf if last is None else STALLED * last.calls
        field = _Field(problem, min(left, stalled))
        try:
            run = _integrate(field, problem, state, local, None if last is None else last.steps)
        except _GiveUp as reason:
            rounding = field.calls == stalled < left
            why = (
                f"the next solution takes over {STALLED} times the calls, as one limited by rounding does"
                if rounding
                else str(reason)
            )
            raise _failure(why, tol, error, used + field.calls) from None
        used += run.calls
        if last is not None:
            errors = _errors(run.states, last.states)
            worst = float(errors.max())
            if worst <= tol:
                return _reference(run.states.to(x.dtype), errors, used)
            stalls = stalls + 1 if worst > 0.5 * error else 0
            error = min(error, worst)
            if stalls == (PATIENCE if local > COARSE else 2):
                raise _failure("the estimate of the error no longer falls", tol, error, used)
            local *= min(1.0, max(TIGHTEN**-3, TIGHTEN * 0.5 * tol / worst))
        local /= TIGHTEN
        last = run


def _integrate(field: _Field, problem: _Problem, x: Tensor, local: float, before: list[int] | None) -> _Run:
    """One solution, with steps whose estimated error is at most `local`.

    Args:
        field: the slope.
        problem: what to solve.
        x: the state at the begin.
        local: tolerance of a step.
        before: how many steps the previous solution took to every place. Where these were so few that the places, not the tolerance,
            set their length, this solution takes one more, or both would be the same and their difference would say nothing.
    """
    begin, places = _place(problem.schedule, problem.begin, local), _places(problem, local)
    q, u, slope = begin.q, x / float(begin.scale or 1.0), None
    step = abs(places[-1].q - q) * local**0.2
    states, steps = [], []
    for i, place in enumerate(places):
        longest = abs(place.q - q) / (before[i] + 1) if before and before[i] <= FEW else math.inf
        steps.append(0)
        while q != place.q:
            slope = field(q, u, begin.t) if slope is None else slope
            target = _next_place(q, place, min(step, 1.000001 * longest))
            new, new_slope, error = _step(field, q, u, slope, target)
            h, factor = abs(target.q - q), _factor(error / local)
            if error <= local:
                q, u, slope = target.q, new, new_slope
                steps[-1] += 1
                # a step that was cut short says nothing against the longer one that was planned
                step = max(step, h * factor) if factor > 1.0 else h * factor
            else:
                step = h * min(factor, 0.9)
                _check_step(step, error, field.schedule, q)
        if place.scale is not None:
            states.append(x if slope is None else place.scale * (_data(q, u, slope) if place.clean else u))
    return _Run(torch.stack(states), field.calls, steps)


def _next_place(q: float, place: _Place, step: float) -> _Place:
    """The end of the next step on the way to `place`. No sliver is left over: what is less than two steps is halved."""
    left = place.q - q
    if abs(left) <= step:
        return place
    return _Place(q + math.copysign(min(step, 0.5 * abs(left)) if abs(left) < 2.0 * step else step, left))


def _factor(ratio: float) -> float:
    """By how much to change a step whose error is this multiple of the tolerance."""
    if not math.isfinite(ratio):
        return 0.2
    return min(5.0, max(0.2, 0.9 * ratio**-0.2)) if ratio > 0.0 else 5.0


def _step(field: _Field, q: float, u: Tensor, slope: Tensor, target: _Place) -> tuple[Tensor, Tensor, float]:
    """The state at the target, the slope there, and the estimated error, that of the worst sample."""
    h = target.q - q
    slopes, new = [slope], u
    for row in STAGES:
        new = _combine(u, row, slopes, h)
        node, t = (target.q, target.t) if len(slopes) >= 5 else (q + sum(row) * h, None)
        slopes.append(field(node, new, t))
    difference = _combine(torch.zeros_like(u), ERROR, slopes, h)
    scale = torch.maximum(_rms(u), _rms(new)).clamp_min(1.0)
    return new, slopes[-1], float((_rms(difference) / scale).max())


def _combine(u: Tensor, weights: Sequence[float], slopes: list[Tensor], h: float) -> Tensor:
    """The sum of u and h (weights . slopes)."""
    total = u.clone()
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            total.add_(slope, alpha=h * weight)
    return total


def _data(q: float, u: Tensor, slope: Tensor) -> Tensor:
    """The data prediction from which the slope was made."""
    return math.cos(q * q) * u - (math.sin(q * q) / (2.0 * q)) * slope


def _scale(schedule: NoiseSchedule, t: float) -> float:
    return math.hypot(float(schedule.alpha(t)), float(schedule.sigma(t)))


def _place(schedule: NoiseSchedule, t: float, local: float) -> _Place:
    """Where t lies; sigma = 0 is replaced by the nearest angle that the local tolerance asks for."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    if sigma == 0.0:
        return _Place(math.sqrt(max(local, SMALLEST_ANGLE)), None, alpha, clean=True)
    return _Place(math.sqrt(math.atan2(sigma, alpha)), t, math.hypot(alpha, sigma))


def _places(problem: _Problem, local: float) -> list[_Place]:
    """The stops in order, with a place on either side of every time at which the denoiser jumps."""
    begin = _place(problem.schedule, problem.begin, local).q
    stops = [_place(problem.schedule, t, local) for t in problem.stops]
    low, high = sorted((problem.begin, problem.stops[-1]))
    jumps = [_place(problem.schedule, t, local).q for t in getattr(problem.denoiser, "jumps", ()) if low < t < high]
    sides = [q * side for q in jumps for side in (1.0 - BESIDE, 1.0 + BESIDE)]
    between = [_Place(q) for q in sides if 0.0 < (q - begin) / (stops[-1].q - begin) < 1.0]
    return sorted(stops + between, key=lambda place: abs(place.q - begin))


def _rms(u: Tensor) -> Tensor:
    """Root mean square of every sample, ``"batch"``."""
    return u.reshape(len(u), -1).square().mean(1).sqrt()


def _errors(new: Tensor, old: Tensor) -> Tensor:
    """The difference of two solutions ``"times batch *shape"``, relative, the worst time of every sample: float64 ``"batch"``."""
    each = [_rms(a - b) / _rms(a).clamp_min(1.0) for a, b in zip(new, old, strict=True)]
    return torch.stack(each).amax(0).cpu().double()


def _reference(states: Tensor, errors: Tensor, nfe: int) -> Reference:
    result = states.as_subclass(Reference)
    result.error, result.errors, result.nfe = float(errors.max()), errors, nfe
    return result


def _failure(reason: str, tol: float, error: float, nfe: int) -> ToleranceError:
    reached = f"an estimated error of {error:.2g} was reached" if error < math.inf else "no estimate of the error was reached"
    return ToleranceError(
        f"the tolerance {tol:.2g} was not reached in {nfe} calls: {reason}; {reached}. Ask for less (tol=), allow more calls "
        f"(max_calls=), or run the network in float64: the rounding of a float32 network limits the error to 1e-7 or 1e-6, that of a "
        f"half-precision one to somewhere from 1e-4 to 1e-2.",
        error,
        nfe,
    )


def _check_step(step: float, error: float, schedule: NoiseSchedule, q: float) -> None:
    if step > 1e-13:
        return
    if math.isfinite(error):
        raise _GiveUp("the steps became too small")
    t = float(schedule.t_of_lam(-math.log(math.tan(q * q))))
    raise NetworkError(f"the denoiser returns values that are not finite near t={t:.6g}.")


def _check_problem(problem: _Problem, x: Tensor, tol: float) -> None:
    if not x.is_floating_point() or x.ndim < 1 or not x.numel():
        raise ValueError(f'the state must be a floating-point tensor "batch *shape" with a sample, got {x.dtype} {tuple(x.shape)}.')
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the state is not finite: it holds NaN or infinity.")
    finest = 0.25 * torch.finfo(x.dtype).eps
    if not finest <= tol < math.inf:
        raise ValueError(f"tol must be at least {finest:.1g}, which is what {x.dtype} holds, got {tol:g}. Pass a state in float64.")
    trained = getattr(problem.denoiser, "schedule", None)
    if isinstance(trained, NoiseSchedule) and not trained.same_noise(problem.schedule):
        raise ValueError(f"the denoiser has the noise schedule {trained!r}, not {problem.schedule!r}. Pass denoiser.schedule.")


def _checked_times(times: ArrayLike | Tensor) -> list[float]:
    values = times.detach().cpu().double().numpy() if isinstance(times, Tensor) else np.asarray(times, np.float64)
    if values.ndim != 1 or not len(values):
        raise GridError(f"times must be one dimension of at least one time, got shape {values.shape}.")
    return values.tolist()


# ---- adaptive ------------------------------------------------------------------------------------------------------------------------


class _Control(NamedTuple):
    rtol: float
    atol: float
    safety: float
    growth: float


class _Tries(NamedTuple):
    """The accepted times and the number of rejected steps of every sample, or of all together."""

    grids: list[list[float]]
    rejected: NDArray[np.int64]


class _Level(NamedTuple):
    """Noise levels, one a sample or one for all."""

    lam: Floats
    t: Floats
    alpha: Floats
    sigma: Floats


class _Pair:
    """A step of DPM-Solver and the step of one order less that it contains. Counts its calls."""

    def __init__(
        self,
        denoiser: DenoiserLike,
        schedule: NoiseSchedule,
        cond: dict[str, Any],
        ends: tuple[float, float],
        order: int,
        predicts: str,
        max_calls: int,
    ):
        if predicts not in ("noise", "data"):
            raise UnknownNameError("prediction of adaptive", predicts, ("noise", "data"))
        self.denoiser, self.schedule, self.cond = denoiser, schedule, cond
        self.order, self.of_noise = order, predicts == "noise"
        self.max_calls = max_calls
        self.calls = 0
        low, high = (float(lam) for lam in schedule.lam(list(ends)))
        self.low = low if math.isfinite(low) else min(FINITE_LAM[0], high - 1.0)
        self.high = high if math.isfinite(high) else max(FINITE_LAM[1], self.low + 1.0)
        self.begin = ends[0] if self.low == low else float(schedule.t_of_lam(self.low))
        self.end = ends[1] if self.high == high else float(schedule.t_of_lam(self.high))

    def level(self, lam: Floats) -> _Level:
        t = self.schedule.t_of_lam(lam)
        t = np.where(lam == self.low, self.begin, np.where(lam == self.high, self.end, t))
        return _Level(lam, t, self.schedule.alpha(t), self.schedule.sigma(t))

    def plain_step(self, x: Tensor, s: float, t: float) -> Tensor:
        """First order, without logarithms, for all samples."""
        d = self._call(x, s)
        carry = float(self.schedule.sigma(t)) / float(self.schedule.sigma(s))
        return carry * x + (float(self.schedule.alpha(t)) - float(self.schedule.alpha(s)) * carry) * d

    @staticmethod
    def normalised(x: Tensor, at: _Level) -> Tensor:
        return x / _column(np.hypot(at.alpha, at.sigma), x)

    def predict(self, x: Tensor, at: _Level) -> Tensor:
        """The prediction of the kind that steps are made of."""
        d = self._call(x, float(at.t[0]) if len(at.t) < len(x) else at.t)
        return (x - _column(at.alpha, x) * d) / _column(at.sigma, x) if self.of_noise else d

    def step(self, x: Tensor, o: Tensor, a: _Level, b: _Level) -> tuple[Tensor, Tensor]:
        """The states at b, of the lower and of the higher order, from those at a and their predictions."""
        r = 1.0 / self.order
        inner = self.level(a.lam + r * (b.lam - a.lam))
        change = self.predict(self._first(x, o, a, inner), inner) - o
        plain = self._first(x, o, a, b)
        second = plain + _column(self._scale(b) * -np.expm1(-self._z(a, b)) / (2.0 * r), x) * change
        if self.order == 2:
            return plain, second
        inner = self.level(a.lam + 2.0 * r * (b.lam - a.lam))
        at_two_thirds = self._first(x, o, a, inner) + _column(2.0 * self._scale(inner) * _moment(self._z(a, inner)), x) * change
        change = self.predict(at_two_thirds, inner) - o
        return second, plain + _column(1.5 * self._scale(b) * _moment(self._z(a, b)), x) * change

    def _first(self, x: Tensor, o: Tensor, a: _Level, b: _Level) -> Tensor:
        carry = b.alpha / a.alpha if self.of_noise else b.sigma / a.sigma
        return _column(carry, x) * x + _column(self._scale(b) * -np.expm1(-self._z(a, b)), x) * o

    def _scale(self, b: _Level) -> Floats:
        return b.sigma if self.of_noise else b.alpha

    def _z(self, a: _Level, b: _Level) -> Floats:
        return a.lam - b.lam if self.of_noise else b.lam - a.lam

    def _call(self, x: Tensor, t: float | Floats) -> Tensor:
        if self.calls >= self.max_calls:
            raise _unfinished(f"the {self.max_calls} calls allowed are spent", self.calls)
        self.calls += 1
        d = self.denoiser(x, t, **self.cond)
        if d.shape != x.shape:
            at = float(np.max(t))
            raise NetworkError(f"the denoiser returned shape {tuple(d.shape)} at t={at:.6g} for states of shape {tuple(x.shape)}.")
        return d


def _adapt(pair: _Pair, x: Tensor, count: int, first_step: float, control: _Control) -> tuple[Tensor, _Tries]:
    """From the pair's first noise level to its last, with `count` step sizes: one a sample or one for all."""
    lam, h = np.full(count, pair.low), np.full(count, min(first_step, pair.high - pair.low))
    tries = _Tries([[pair.begin] for _ in range(count)], np.zeros(count, np.int64))
    before, o, moved = pair.normalised(x, pair.level(lam)), x, True
    while (lam < pair.high).any():
        a = pair.level(lam)
        b = pair.level(np.where(h >= pair.high - lam, pair.high, lam + h))
        o = pair.predict(x, a) if moved else o
        low, high = pair.step(x, o, a, b)
        low, change = pair.normalised(low, b), pair.normalised(high - low, b)
        errors = _step_errors(change, low, before, control)
        errors = errors.max(keepdims=True) if count < len(x) else errors
        under_way = lam < pair.high
        accepted = under_way & (errors <= 1.0)
        tries.rejected[under_way & ~accepted] += 1
        for k in np.flatnonzero(accepted):
            tries.grids[k].append(float(b.t[k]))
        taken = _column(accepted, x).bool()
        x, before, moved = torch.where(taken, high, x), torch.where(taken, low, before), bool(accepted.any())
        lam = np.where(accepted, b.lam, lam)
        h = np.minimum(h * _change(errors, pair.order, control), pair.high - lam)
        short = under_way & (h < np.minimum(SHORTEST, pair.high - lam))
        if short.any():
            _shrunk(pair, float(errors[short].max()), float(a.t[short][0]))
    return x, tries


def _step_errors(change: Tensor, low: Tensor, before: Tensor, control: _Control) -> Floats:
    """The error of every sample in units of what is allowed, ``"batch"``; infinite where it is not a number."""
    allowed = (control.rtol * torch.maximum(low.abs(), before.abs())).clamp_min(control.atol)
    errors = _rms(change / allowed).cpu().double().numpy()
    return np.where(np.isnan(errors), math.inf, errors)


def _change(errors: Floats, order: int, control: _Control) -> Floats:
    """By how much to change the steps."""
    tamed = np.clip(errors, 1e-200, 1e200)
    return np.where(np.isinf(errors), 0.2, np.minimum(control.growth, control.safety * tamed ** (-1.0 / order)))


def _moment(z: Floats) -> Floats:
    """1 - (1 - e^{-z}) / z: the integral of z e^{-z(1-u)} u over [0, 1]."""
    series = -sum((-z) ** j / math.factorial(j + 1) for j in range(1, 12))
    safe = np.where(np.abs(z) < SERIES, 1.0, z)
    return np.where(np.abs(z) < SERIES, series, 1.0 + np.expm1(-safe) / safe)


def _column(values: NDArray[Any], x: Tensor) -> Tensor:
    """One number a sample, or one for all, to multiply x with."""
    return torch.from_numpy(np.asarray(values, np.float64)).to(x.dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def _shrunk(pair: _Pair, error: float, t: float) -> None:
    if math.isinf(error):
        raise NetworkError(f"the denoiser returns values that are not finite near t={t:.6g}.")
    raise _unfinished(f"the steps became too small near t={t:.6g}", pair.calls)


def _unfinished(reason: str, nfe: int) -> ToleranceError:
    message = (
        f"adaptive sampling did not reach its end in {nfe} calls: {reason}. Ask for less (rtol=, atol=) or allow more (max_calls=)."
    )
    return ToleranceError(message, math.inf, nfe)


def _check_adaptive(order: int, rtol: float, atol: float, first_step: float, safety: float, growth: float) -> None:
    if order not in (2, 3):
        raise ValueError(f"adaptive has orders 2 and 3, got {order!r}.")
    if not (0.0 <= rtol < math.inf and 0.0 < atol < math.inf):
        raise ValueError(f"rtol must be at least 0 and atol positive, got rtol={rtol:g} and atol={atol:g}.")
    if not (0.0 < first_step < math.inf and 0.0 < safety < 1.0):
        raise ValueError(f"first_step must be positive and safety between 0 and 1, got {first_step:g} and {safety:g}.")
    if not growth > 1.0:
        raise ValueError(f"growth must be over 1, or no step ever grows, got {growth:g}.")


# ---- checks --------------------------------------------------------------------------------------------------------------------------


def _check_order(schedule: NoiseSchedule, times: Sequence[float]) -> None:
    noise = schedule.lam(list(times))
    if not (noise[1:] > noise[:-1]).all():  # NaN included
        i = int(np.argmin(noise[1:] > noise[:-1]))
        raise GridError(f"times must strictly decrease in noise, but {times[i]:.6g} and {times[i + 1]:.6g} do not.")


def _check_within(schedule: NoiseSchedule, times: Sequence[float], begin: float, end: float | None) -> None:
    noise = schedule.lam([begin, times[0]])
    if noise[1] < noise[0]:
        raise GridError(f"times begin at {times[0]:.6g}, before the start {begin:.6g}. Pass t_start.")
    if end is not None and schedule.lam(times[-1]) > schedule.lam(end):
        raise GridError(f"times end at {times[-1]:.6g}, beyond t_end={end:.6g}.")
