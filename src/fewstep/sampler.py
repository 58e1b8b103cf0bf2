"""The loop. There is one, and it runs every plan.

Everything a step needs is computed before the loop: numbers stay Python floats, array coefficients go to the device once. Inside there is
the network call and one linear combination of stored tensors. Nothing in the loop depends on the solver or reads from the device.

What is not affine is a named hook, see `Hooks`.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.denoisers import check_conditions
from fewstep.errors import NetworkError, PlanError
from fewstep.identity import check_identity
from fewstep.noise import BrownianPath, check_seeds
from fewstep.plan import Entry, Plan, Row, StartTransform

__all__ = ["Hooks", "Step", "Trajectory", "advance", "check_fit", "open_memory", "prepare", "sample", "steps_of", "transform_start"]

DenoiserLike = Callable[..., Tensor]
Factor = float | Tensor
Terms = tuple[tuple[bool, int, Factor | None], ...]
"""(is it a stored output?, how many steps back, factor); None is a factor of 1 of the first term."""


@dataclass(frozen=True)
class Hooks:
    """What a run may do besides the plan. Every hook is optional; none may read from the device if the loop is to stay free of stalls.

    Args:
        time: ``(i, t, x) -> t``: another time for call i, a number or one per sample.
        denoiser: ``(i) -> denoiser``: another denoiser for call i, e.g. a thinner sub-network.
        prediction: ``(i, t, d) -> d``: a transform of the data prediction, e.g. clipping or dynamic thresholding.
        state: ``(i, t, x) -> x``: a change of state i + 1, at noise level t, after it was computed, e.g. the blend of inpainting.
        resample: ``(i, x) -> index or None``: a choice ``"batch"`` of which samples go on after step i. Stored states and predictions
        follow. Conditions stay with their place in the batch, so samples that change places must share them; so does the noise of later
        steps, so copies of a sample part again.
    """

    time: Callable[[int, float, Tensor], Any] | None = None
    denoiser: Callable[[int], DenoiserLike] | None = None
    prediction: Callable[[int, float, Tensor], Tensor] | None = None
    state: Callable[[int, float, Tensor], Tensor] | None = None
    resample: Callable[[int, Tensor], Tensor | None] | None = None


class Trajectory(NamedTuple):
    """A run with everything on the way.

    Attributes:
        samples: ``"batch *shape"``, the last state.
        times: ``"N+1"``, the noise level of every state.
        states: ``"N+1 batch *shape"``.
        predictions: ``"N batch *shape"``, the data predictions.
    """

    samples: Tensor
    times: np.ndarray
    states: Tensor
    predictions: Tensor


class Step(NamedTuple):
    """A row of a plan, ready for the loop."""

    tau: float
    gains: Terms | None
    terms: Terms
    offset: Factor | None
    noise: tuple[Factor, float, float] | None


def sample(
    denoiser: DenoiserLike,
    noise: Tensor,
    plan: Plan,
    *,
    cond: Mapping[str, Any] | None = None,
    seeds: Iterable[int] | Tensor | None = None,
    progress: bool = False,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
    hooks: Hooks | None = None,
    trajectory: bool = False,
    check: bool = True,
) -> Any:
    """Run a plan.

    Args:
        denoiser: ``D(x, t, **cond)`` -> data prediction of x's shape, in new memory at every call (a replayed CUDA graph needs a
            ``.clone()``); see `fewstep.Denoiser`.
        noise: ``Float[Tensor, "batch *shape"]``, x_T at the scale of the plan's first time (`fewstep.draw_noise`). Its dtype is the
            working precision; half precision is run, and returned, in float32, because round-off in the state is never undone.
        plan: made by a solver or a tuner, for the denoiser's noise schedule.
        cond: conditions, handed to every call.
        seeds: one whole number a sample, for stochastic plans. Sample i depends on its own noise and seed only.
        progress: show a bar on standard error.
        callback: called after every step with (i, tau_i, state i + 1, data prediction i). To change anything use `hooks`.
        hooks: see `Hooks`.
        trajectory: return a `Trajectory` instead of the samples.
        check: refuse predictions written over one another, and look once, after the last call, whether the samples are finite; if not,
            find the call that went wrong by running again. That look is the only read from the device; ``check=False`` leaves both out
            (for graph capture).

    Returns:
        ``Float[Tensor, "batch *shape"]``, the samples; a `Trajectory` if asked for.

    Raises:
        PlanError: if the plan was made for another schedule, its arrays or the model for another sample shape, or seeds are missing or
            wrong.
        NetworkError: if the network returns another shape or values that are not finite; names the call and its time.

    Example:
        >>> import torch, fewstep as fs
        >>> schedule = fs.schedules.EDM()
        >>> plan = fs.solvers.DDIM().plan(schedule, nfe=4, grid="karras", final="zero")
        >>> den = fs.Denoiser(lambda x, t: torch.zeros_like(x), schedule, predicts="data")
        >>> fs.sample(den, 80 * torch.ones(1, 2), plan).tolist()
        [[0.0, 0.0]]
    """
    x = _checked_noise(noise)
    if not torch.compiler.is_compiling():  # what is traced is checked before; see `fewstep.export`
        check_fit(denoiser, plan, x, seeds)
    conditions = dict(cond or {})
    check_conditions(denoiser, conditions, x.shape[0])
    hooks = hooks or Hooks()
    steps = prepare(plan, x)
    path = BrownianPath(check_seeds(seeds, len(x)), x.shape[1:]) if plan.stochastic and seeds is not None else None
    x = transform_start(plan, x)
    states, outputs = open_memory(plan, x)
    record: tuple[list[Tensor], list[Tensor]] | None = ([x], []) if trajectory else None
    memory = (0, 0)
    for i, step in enumerate(_with_bar(steps, progress)):
        x = states[0]
        time = step.tau if hooks.time is None else hooks.time(i, step.tau, x)
        network = denoiser if hooks.denoiser is None else hooks.denoiser(i)
        try:
            d = network(x, time, **conditions)
        except NetworkError as error:
            raise NetworkError(f"call {i + 1} of {plan.nfe}: {error}") from error
        if not isinstance(d, Tensor):
            raise NetworkError(
                f"call {i + 1} of {plan.nfe}, t={step.tau:.6g}: the denoiser returned {type(d).__name__}, not a tensor."
            )
        if d.shape != x.shape:
            raise NetworkError(f"call {i + 1} of {plan.nfe}, t={step.tau:.6g}: the denoiser returned {_shapes(d, x)}.")
        if check:
            memory = _check_memory(i, d, memory)
        if hooks.prediction is not None:
            d = hooks.prediction(i, step.tau, d)
            _check_hook("prediction", i, d.shape, x.shape)
        x = advance(step, states, outputs, d, None if step.noise is None or path is None else _normal(path, step.noise, x))
        if hooks.state is not None:
            x = hooks.state(i, float(plan.grid[i + 1]), x)
            _check_hook("state", i, x.shape, states[0].shape)
        states.appendleft(x)
        if hooks.resample is not None and (chosen := hooks.resample(i, x)) is not None:
            _check_hook("resample", i, chosen.shape, x.shape[:1])
            states, outputs = _choose(states, chosen), _choose(outputs, chosen)
        if record is not None:
            record[0].append(states[0])
            record[1].append(d)
        if callback is not None:
            callback(i, step.tau, states[0], d)
    if check and not bool(torch.isfinite(states[0]).all()):
        _blame(denoiser, noise, plan, conditions, seeds, hooks)
    if record is not None:
        return Trajectory(states[0], plan.grid, torch.stack(record[0]), torch.stack(record[1]))
    return states[0]


# ---- before the loop ---------------------------------------------------------------------------------------------------------------


def _checked_noise(noise: Tensor) -> Tensor:
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        kind = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"noise must be a floating-point tensor (batch, *shape), got {kind}.")
    if noise.ndim < 2:
        raise PlanError(f"noise must have a batch dimension and at least one more, got shape {tuple(noise.shape)}.")
    return noise if noise.dtype in (torch.float32, torch.float64) else noise.float()


def check_fit(denoiser: DenoiserLike, plan: Plan, x: Tensor, seeds: Iterable[int] | Tensor | None) -> None:
    """Refuse a plan of another schedule or model than the denoiser's, noise of another shape than the model's, and missing seeds.

    Raises:
        PlanError, TypeError: otherwise.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a fewstep.Plan, got {type(plan).__name__}. Make one with fewstep.make_plan or solver.plan.")
    schedule = getattr(denoiser, "schedule", None)
    if schedule is not None and not schedule.same_noise(plan.schedule):
        raise PlanError(
            f"the plan was made for {_brief(plan.schedule)}, but the denoiser has {_brief(schedule)}. Plan for its schedule."
        )
    wanted = getattr(getattr(denoiser, "info", None), "shape", None)
    if wanted is not None and tuple(x.shape[1:]) != tuple(wanted):
        raise PlanError(f"the noise has samples of shape {tuple(x.shape[1:])}, but the model takes {tuple(wanted)}.")
    inner: Any = denoiser
    while inner is not None:
        serves = inspect.getattr_static(inner, "check_plan", None)  # a denoiser that was made for one plan, perhaps within another
        if serves is not None:
            inner.check_plan(plan)
        inner = getattr(inner, "denoiser", None)
    if "tuned" in plan.provenance:
        check_identity(plan.provenance["tuned"]["model"], denoiser, plan.nfe)
    if plan.stochastic and seeds is None:
        raise PlanError("this plan draws noise: pass seeds=, one whole number a sample.")


def _brief(schedule: object) -> str:
    text = repr(schedule)
    return text if len(text) < 120 else f"{text[:100]}..."


def prepare(plan: Plan, x: Tensor) -> list[Step]:
    """The steps of a plan, for states like x. Those of a plan without arrays are the same on every device, and kept with it."""
    known = plan.prepared.get(x.dtype)
    if known is None:
        known = steps_of(plan, x)
        if not any(isinstance(entry, np.ndarray) for row in plan.rows for entry in row.entries):
            plan.prepared[x.dtype] = known
    return known


def steps_of(plan: Plan, x: Tensor) -> list[Step]:
    """The steps of a plan in the precision of x ``"batch *shape"``, arrays on its device; made anew."""
    return [_prepare(row, x) for row in plan.rows]


def _prepare(row: Row, x: Tensor) -> Step:
    gains = None
    if row.memory or not (_is_number(row.state_gain, 0.0) and _is_number(row.output_gain, 1.0)):
        own = [(False, 0, row.state_gain), (True, 0, row.output_gain)]
        own = own[::-1] if _is_number(row.output_gain, 1.0) else own
        gains = _terms([*own, *((True, k, r) for k, r in enumerate(row.memory, start=1))], x)
    terms = [(False, k, c) for k, c in enumerate(row.carry)] + [(True, k, w) for k, w in enumerate(row.weights)]
    offset = None if isinstance(row.offset, float) and row.offset == 0.0 else _factor(row.offset, x)
    noise = None if row.noise is None else (_factor(row.noise.scale, x), row.noise.begin, row.noise.end)
    return Step(row.tau, gains, _terms(terms, x), offset, noise)


def _terms(terms: list[tuple[bool, int, Entry]], x: Tensor) -> Terms:
    used = [(stored, k, _factor(f, x)) for stored, k, f in terms if not (isinstance(f, float) and f == 0.0)]
    if not used or not isinstance(used[0][2], float):
        return tuple(used)
    if len(used) > 1 and used[0][2] == 1.0 and isinstance(used[1][2], float):
        return ((*used[0][:2], None), *used[1:])  # x + b y: one operation
    # a 0-dimensional tensor on the host: half the dispatch of a number, the same product
    return ((*used[0][:2], torch.tensor(used[0][2], dtype=x.dtype, device="cpu")), *used[1:])


def _is_number(entry: Entry, value: float) -> bool:
    return isinstance(entry, (float, int)) and entry == value


def _factor(entry: Entry, x: Tensor) -> Factor:
    """The entry as the loop uses it: a float, or a tensor in x's precision on x's device."""
    if isinstance(entry, (float, int)):
        return float(entry)
    try:
        fits = np.broadcast_shapes(entry.shape, tuple(x.shape[1:])) == tuple(x.shape[1:])
    except ValueError:
        fits = False
    if not fits:
        raise PlanError(
            f"the plan has coefficients of shape {entry.shape}, which do not fit samples of shape {tuple(x.shape[1:])}: they are of every "
            f"element, so the plan serves samples of the size that it was made for. Take that size, or plan or tune for this one."
        )
    return torch.from_numpy(entry.copy()).to(x.dtype).to(x.device)


def transform_start(plan: Plan, x: Tensor) -> Tensor:
    """z_0, what the plan makes of x_T: x_T itself without a start transform."""
    return x if plan.start is None else _transform(plan.start, x)


def _transform(start: StartTransform, x: Tensor) -> Tensor:
    moved = x * _factor(start.scale, x) + _factor(start.shift, x)
    if start.basis is None or start.gains is None:
        return moved
    if start.basis.shape[1:] != tuple(x.shape[1:]):
        raise PlanError(f"the plan's start was made for samples of shape {start.basis.shape[1:]}, not {tuple(x.shape[1:])}.")
    basis = torch.from_numpy(start.basis.reshape(len(start.gains), -1).copy()).to(x.dtype).to(x.device)
    gains = torch.from_numpy(start.gains.copy()).to(x.dtype).to(x.device)
    return moved + ((x.flatten(1) @ basis.T) * gains @ basis).reshape(x.shape)


def _output_reach(plan: Plan) -> int:
    return max(1, *(max(len(row.weights), len(row.memory) + 1) for row in plan.rows))


# ---- in the loop -------------------------------------------------------------------------------------------------------------------


def open_memory(plan: Plan, x: Tensor) -> tuple[deque[Tensor], deque[Tensor]]:
    """What a run remembers, newest first: the states, so far x alone, and the stored outputs, none yet."""
    reach = max(len(row.carry) for row in plan.rows)
    return deque([x], max(1, reach)), deque(maxlen=_output_reach(plan))


def advance(step: Step, states: deque[Tensor], outputs: deque[Tensor], d: Tensor, xi: Tensor | None = None) -> Tensor:
    """One row of a plan: store what call i gave, and return the next state, in new memory. It is not among the states yet.

    Args:
        step: of `prepare`.
        states, outputs: of `open_memory`.
        d: ``"batch *shape"``, the data prediction at ``states[0]``.
        xi: the normal noise of a row that has some.
    """
    outputs.appendleft(d)
    if step.gains is not None:
        outputs[0] = _combine(step.gains, states, outputs)
    x = _combine(step.terms, states, outputs)
    if step.offset is not None:
        x = x + step.offset
    return x if xi is None or step.noise is None else x + step.noise[0] * xi


def _combine(terms: Terms, states: deque[Tensor], outputs: deque[Tensor]) -> Tensor:
    """A linear combination of stored tensors. The first term makes the result, the others are added in place."""
    total: Tensor | None = None
    one: Tensor | None = None  # a first term of factor 1, which joins the second
    for stored, k, factor in terms:
        source = outputs[k] if stored else states[k]
        if total is None:
            if factor is None:
                one = source
            else:
                total = torch.mul(source, factor) if one is None else torch.add(one, source, alpha=factor)  # type: ignore[arg-type]
        elif isinstance(factor, (float, int)):
            total.add_(source, alpha=factor)
        else:
            total.addcmul_(source, factor)  # type: ignore[arg-type]
    return torch.zeros_like(states[0]) if total is None else total


def _normal(path: BrownianPath, noise: tuple[Factor, float, float], x: Tensor) -> Tensor:
    _, begin, end = noise
    return torch.from_numpy(path.normalised(begin, end)).to(x.dtype).to(x.device, non_blocking=True)


def _check_memory(i: int, d: Tensor, before: tuple[int, int]) -> tuple[int, int]:
    """Refuse a prediction that was written over the one before, which is still needed. Nothing is read: only addresses are compared."""
    place = d.data_ptr(), 0 if d.is_inference() else d._version
    if place[0] == before[0] != 0 and place[1] != before[1]:
        raise NetworkError(
            f"call {i + 1} wrote its output over that of call {i}, which is needed. Return a new tensor each time: output.clone()."
        )
    return place


def _check_hook(name: str, i: int, shape: torch.Size, wanted: torch.Size) -> None:
    if shape != wanted:
        raise PlanError(f"the hook {name!r} returned shape {tuple(shape)} at call {i + 1}; it must keep {tuple(wanted)}.")


def _choose(memory: deque[Tensor], chosen: Tensor) -> deque[Tensor]:
    return deque((tensor[chosen] for tensor in memory), memory.maxlen)


def _with_bar(steps: list[Step], progress: bool) -> Iterable[Step]:
    if not progress:
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc="sampling", unit="call", leave=False)


# ---- after the loop ----------------------------------------------------------------------------------------------------------------


def _shapes(d: Tensor, x: Tensor) -> str:
    return f"shape {tuple(d.shape)} for a state of shape {tuple(x.shape)}"


def _blame(denoiser: DenoiserLike, noise: Tensor, plan: Plan, cond: dict[str, Any], seeds: Any, hooks: Hooks) -> None:
    """Run again, looking at every call, and raise for the first that is not finite."""

    def look(i: int, t: float, x: Tensor, d: Tensor) -> None:
        for what, value in (("the network's prediction", d), ("the state", x)):
            bad = ~torch.isfinite(value).flatten(1).all(1)
            if bad.any():
                rows = bad.nonzero().flatten().tolist()
                which = f"sample {rows[0]}" if len(rows) == 1 else f"{len(rows)} of {len(bad)} samples"
                raise NetworkError(f"call {i + 1} of {plan.nfe}, t={t:.6g}: {what} is not finite (NaN or infinity) in {which}.")

    if not bool(torch.isfinite(noise).all()):
        raise PlanError("the noise is not finite: it holds NaN or infinity.")
    sample(denoiser, noise, plan, cond=cond, seeds=seeds, callback=look, hooks=hooks, check=False)
    raise NetworkError("the samples are not finite, but a second run is: the network does not give the same result twice.")
