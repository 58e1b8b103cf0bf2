r"""The probability-flow ODE, solved to a requested tolerance: what a few-step sampler should have given. `reference` and its inverse.

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
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.errors import FewstepError, GridError, NetworkError
from fewstep.exact import widest_dtype
from fewstep.schedules import NoiseSchedule

__all__ = ["Reference", "ToleranceError", "invert", "reference"]

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
        tol: largest error of a sample: root mean square over its elements, relative to max(1, root mean square of the sample).
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
