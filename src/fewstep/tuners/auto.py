"""`tune`: plans made for one model, validated on noise and conditions that nothing was fitted to, never worse than an untuned one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.artefacts import json_value
from fewstep.errors import FewstepError, UnknownNameError
from fewstep.identity import identity
from fewstep.plan import Plan
from fewstep.sampler import sample
from fewstep.schedules import NoiseSchedule
from fewstep.solvers import make_plan
from fewstep.tuners.checkpoint import Checkpoint
from fewstep.tuners.learned import Learned
from fewstep.tuners.paths import Paths, take_rows, trace_paths
from fewstep.tuners.task import FINALISTS, GRIDS, SCREENED, UNTUNED, Candidate, Counted, Task
from fewstep.version import __version__

__all__ = ["Effort", "Tuned", "estimate", "tune"]

Floats = NDArray[np.float64]
SLOW = 1e-4
"""Seconds of an evaluation (one sample, one call) from which a network counts as slow, and less is spent on it by default."""
SENSITIVITY_CALLS = 6
PATH_FILES = ("fit", "held-out")
FIT_UNIFORM, HELD_OUT_UNIFORM = 0.3, 0.5
"""Share of the noises that are chosen with equal probability: the more, the less the weights differ."""
PERTURBATION = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Relative size of the change of the noise that shows how much a sample depends on it, by the precision of the state."""


@dataclass(frozen=True)
class Effort:
    """How much is spent.

    Args:
        trajectories: exact paths that plans are fitted to.
        held_out: exact paths that they are validated on.
        pool: noises among which the paths to fit to are chosen, as a multiple of `trajectories`.
        reference_calls: network calls of an exact path.
        trials, trial_paths, polish, robust: see `Learned`.
    """

    trajectories: int = 88
    held_out: int = 128
    pool: int = 4
    reference_calls: int = 64
    trials: int = 14
    trial_paths: int = 40
    polish: int = 2
    robust: tuple[float, ...] = (10.0,)

    def __post_init__(self) -> None:
        if self.trajectories < 1 or self.held_out < 2 or self.pool < 1 or self.reference_calls < 8:
            raise ValueError(
                f"tuning needs at least 1 trajectory, 2 held-out ones, a pool of 1 and 8 reference calls, got {self.trajectories}, "
                f"{self.held_out}, {self.pool} and {self.reference_calls}."
            )

    def scaled(self, factor: float) -> Effort:
        """As much more or less, in trajectories and trials."""
        return replace(
            self,
            trajectories=max(16, round(factor * self.trajectories)),
            held_out=max(32, round(factor * self.held_out)),
            trials=round(min(factor, 4.0) * self.trials),
            trial_paths=max(16, round(factor * self.trial_paths)),
            polish=max(1, round(min(factor, 5.0) * self.polish)),
        )


SPENDING = (16.0, 8.0, 4.0, 2.0, 1.5, 1.0, 0.75, 0.5, 0.25)
SLOW_EFFORT = Effort()
FAST_EFFORT = Effort(
    trajectories=1024, held_out=512, pool=8, reference_calls=128, trials=100, trial_paths=512, polish=15, robust=(3.0, 30.0)
)


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        plans: number of calls -> the best plan.
        candidates: number of calls -> everything that was validated, in the order in which it was tried; the first is the best
            untuned solver and grid.
        report: JSON values: the model, options, costs, and the errors of every candidate.
    """

    plans: dict[int, Plan]
    candidates: dict[int, list[Candidate]]
    report: dict[str, Any]

    @property
    def plan(self) -> Plan:
        """The plan, if one number of calls was asked for.

        Raises:
            ValueError: if there are several.
        """
        if len(self.plans) != 1:
            raise ValueError(f"there are plans for {sorted(self.plans)} calls: take one from .plans.")
        return next(iter(self.plans.values()))


def tune(
    denoiser: Callable[..., Tensor],
    *,
    nfe: int | Sequence[int],
    noise: Tensor | None = None,
    method: str = "auto",
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    final: str = "t_end",
    effort: Effort | None = None,
    block: int = 256,
    minutes: float | None = None,
    checkpoint: str | PathLike[str] | None = None,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
) -> Tuned:
    """Make plans for a model that are better than any untuned one.

    Exact paths of some noises are computed once, plans are fitted to them for every number of calls, and validated on other noise, with
    conditions drawn anew, beside a set of untuned solvers on several grids. The best on the validation noise is returned: an untuned one if
    nothing tuned beats it.

    Args:
        denoiser: ``D(x, t, **cond)`` with a schedule; guided or not. The plan serves this model under this guidance only, and says so
            when it is run with another.
        nfe: number of network calls, or several.
        noise: ``"batch *shape"``, starting noise at the scale of the schedule's start, which plans are fitted to. More is drawn as
            needed, and so is the validation noise. It may be left out if the denoiser's info says the shape.
        method: ``"auto"`` or ``"learned"``; see `METHODS`.
        cond: conditions of the noise, one entry a sample; rows of them are drawn with every noise that is drawn.
        seed: of everything that is drawn.
        final: ``"t_end"``: the plan ends at the schedule's t_end; ``"zero"``: at sigma = 0.
        effort: how much to spend. Left out, it depends on the network: less for one that takes over 0.1 ms a sample and call.
        block: the most samples of a network call.
        minutes: spend about as long, by the speed of the network as it is measured; instead of `effort`.
        checkpoint: a folder that keeps what is finished: the exact paths, and every number of calls. The same call goes on from there.
        progress: show a bar on standard error, with the last validated error.
        report: called with a line about what goes on, e.g. ``print``.

    Returns:
        `Tuned`: plans, candidates and a report.

    Raises:
        UnknownNameError: for a method that does not exist.
        ValueError: for minutes that do not suffice for anything, a number of calls below 1,
            noise of another scale than the start's, or conditions that do not fit it.
        ArtefactError: if the checkpoint is of another run.
        FewstepError: if the denoiser has no schedule, or the network fails.

    Example:
        >>> import fewstep as fs
        >>> exact = fs.exact.GaussianMixture(fs.schedules.VPLinear(), [[-1.0, 0.0], [1.0, 0.5]], 0.05)
        >>> noise = fs.draw_noise((2,), range(64), dtype=torch.float64)
        >>> effort = Effort(trajectories=64, held_out=32, pool=1, trials=20, polish=3)
        >>> tuned = tune(exact, nfe=4, noise=noise, effort=effort)
        >>> tuned.plan.nfe, tuned.report["plans"]["4"]["ratio"] < 0.5
        (4, True)
    """
    if method not in METHODS:
        raise UnknownNameError("method of tuning", method, METHODS)
    calls = sorted({nfe} if isinstance(nfe, int) else set(nfe))
    if not calls or calls[0] < 1:
        raise ValueError(f"nfe must be at least 1, got {nfe}.")
    if minutes is not None and effort is not None:
        raise ValueError("give minutes or effort, not both.")
    counted = Counted(_checked_denoiser(denoiser, final), block)
    draw = _Draws(counted, noise, dict(cond or {}), seed)
    effort = effort or _suitable(_seconds(counted, draw), calls, draw.given.shape[1:], minutes)
    total, memory = estimate(effort, calls, draw.given.shape[1:])
    with _Bar(counted, total, progress, report) as bar:
        bar.say(f"about {total} evaluations and {memory / 1e6:.0f} MB")
        return _run(counted, draw, calls, method, effort, final, seed, checkpoint, bar.say)


def _run(
    counted: Counted,
    draw: _Draws,
    calls: list[int],
    method: str,
    effort: Effort,
    final: str,
    seed: int,
    checkpoint: str | PathLike[str] | None,
    say: Callable[[str], None],
) -> Tuned:
    task, kept = prepare(counted, draw, effort, final=final, seed=seed, checkpoint=checkpoint, report=say)
    candidates = {}
    for n in calls:
        finished = kept.candidates(n) if kept else None
        candidates[n] = finished or list(_candidates(task, n, METHODS[method], effort))
        if kept and not finished:
            kept.save_candidates(n, candidates[n])
    return _tuned(task, candidates, counted.denoiser, method, effort)


def learned(task: Task, nfe: int, effort: Effort) -> Iterator[Candidate]:
    """The three stages of `Learned`."""
    options = Learned(trials=effort.trials, trial_paths=effort.trial_paths, polish=effort.polish, robust=effort.robust)
    for stage, numbers in options.stages(task, nfe):
        made_by = {"solver": {"name": "learned", "options": {**asdict(options), "stage": stage}}, "grid": "learned"}
        yield task.judge(f"learned: {stage}", numbers.plan(task.schedule, made_by))


METHODS: dict[str, tuple[Callable[[Task, int, Effort], Iterator[Candidate]], ...]] = {
    "auto": (learned,),
    "learned": (learned,),
}
"""What can be asked for, in the order in which it is tried."""


def _candidates(task: Task, nfe: int, methods: Sequence[Any], effort: Effort) -> Iterator[Candidate]:
    """The best untuned plan, then what the methods make."""
    base = task.untuned(nfe)
    task.report(f"{nfe} calls: {base.name} is the best untuned setting, error {base.errors.rms:.4g}")
    yield base
    for make in methods:
        for candidate in make(task, nfe, effort):
            task.report(f"{nfe} calls: {candidate.name}, error {candidate.errors.rms:.4g}")
            yield candidate


def _best(tried: list[Candidate]) -> Candidate:
    """Of those whose root mean square error is not above the untuned plan's, the one with the least product of it and the median error: the
    former hangs on a few samples that end in another mode.
    """
    base = tried[0]
    fair = [candidate for candidate in tried if candidate.errors.rms <= base.errors.rms]
    return min(fair, key=lambda candidate: candidate.errors.rms * candidate.errors.median)


def _tuned(task: Task, candidates: dict[int, list[Candidate]], denoiser: Any, method: str, effort: Effort) -> Tuned:
    """The best of the candidates, with what is known of how they came about."""
    model, plans, told = identity(denoiser), {}, {}
    for nfe, tried in candidates.items():
        best, base = _best(tried), tried[0]
        validation = {"rms": best.errors.rms, "median": best.errors.median, "untuned": base.name, "untuned_rms": base.errors.rms}
        plans[nfe] = best.plan
        if best.tuned:
            made = {"model": model, "method": best.name, "seed": task.seed, "effort": asdict(effort), "validation": validation}
            cost = {"evaluations": task.denoiser.evaluations, "seconds": round(time.perf_counter() - task.began, 1)}
            provenance = {
                **json_value(best.plan.provenance),
                "final": task.final,
                "fewstep": __version__,
                "tuned": {**made, **cost},
            }
            plans[nfe] = replace(best.plan, provenance=provenance)
        tries = [{"name": c.name, "tuned": c.tuned, **asdict(c.errors)} for c in tried]
        told[str(nfe)] = {"best": best.name, "ratio": best.errors.rms / base.errors.rms, **validation, "candidates": tries}
    report = {
        "model": model,
        "schedule": task.schedule.config(),
        "method": method,
        "final": task.final,
        "seed": task.seed,
        "effort": asdict(effort),
        "reference_error": task.held_out.error,
        "evaluations": task.denoiser.evaluations,
        "seconds": round(time.perf_counter() - task.began, 1),
        "plans": told,
    }
    return Tuned(plans, candidates, report)


# ---- noise and exact paths ---------------------------------------------------------------------------------------------------------


def prepare(
    counted: Counted,
    draw: _Draws,
    effort: Effort,
    *,
    final: str,
    seed: int,
    checkpoint: str | PathLike[str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Task, Checkpoint | None]:
    """The task that all methods share: noise drawn and chosen, exact paths computed, or taken from a checkpoint."""
    began, schedule, denoiser = time.perf_counter(), counted.schedule, counted.denoiser
    kept = None
    if checkpoint is not None:
        told = {"model": identity(denoiser), "schedule": schedule.config(), "final": final, "seed": seed, "effort": asdict(effort)}
        kept = Checkpoint(Path(checkpoint), Checkpoint.key_of(noise=draw.given, **told))
    fit, held_out = (kept.paths(name, schedule, draw.given) if kept else None for name in PATH_FILES)
    if fit is None or held_out is None:
        fit, held_out = _traced(counted, draw, effort, final, report)
        if kept:
            kept.save_paths(PATH_FILES[0], fit)
            kept.save_paths(PATH_FILES[1], held_out)
    return Task(counted, schedule, fit, held_out, final, seed, report, began), kept


def _checked_denoiser(denoiser: Callable[..., Tensor], final: str) -> Callable[..., Tensor]:
    if not isinstance(getattr(denoiser, "schedule", None), NoiseSchedule):
        raise FewstepError("tune needs a denoiser with a noise schedule: wrap the network in fewstep.Denoiser.")
    if final not in ("t_end", "zero"):
        raise UnknownNameError("final", final, ("t_end", "zero"))
    return denoiser


def _suitable(seconds: float, nfe: Sequence[int], shape: Sequence[int], minutes: float | None) -> Effort:
    """How much to spend on a network of this speed, in this time if one is given."""
    if minutes is None:
        return FAST_EFFORT if seconds < SLOW else SLOW_EFFORT
    for factor in SPENDING:
        effort = SLOW_EFFORT.scaled(factor)
        if estimate(effort, nfe, shape)[0] * seconds <= 60.0 * minutes:
            return effort
    least = estimate(SLOW_EFFORT.scaled(SPENDING[-1]), nfe, shape)[0] * seconds / 60.0
    raise ValueError(f"{minutes:g} minutes do not suffice: the least takes about {least:.1f} here. Ask for fewer numbers of calls.")


class _Bar:
    """A progress bar over evaluations, and the lines that a caller wants to hear."""

    def __init__(self, counted: Counted, total: int, shown: bool, report: Callable[[str], None] | None):
        from tqdm import tqdm

        pause = 0.1 if sys.stderr.isatty() else 10.0
        self.counted, self.report = counted, report
        self.bar = tqdm(total=total, disable=not shown, desc="tuning", unit="evaluation", unit_scale=True, mininterval=pause)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def say(self, line: str) -> None:
        self.bar.total = max(self.bar.total, self.counted.evaluations)
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(self.counted.evaluations - self.bar.n)
        if self.report:
            self.report(line)


def _traced(counted: Counted, draw: _Draws, effort: Effort, final: str, say: Callable[[str], None]) -> tuple[Paths, Paths]:
    """The exact paths to fit to, and those to validate on."""
    fit = _sensitive(counted, draw, draw.pool(effort.pool * effort.trajectories), effort.trajectories, uniform=FIT_UNIFORM)
    held_out = _sensitive(counted, draw, draw(effort.pool * effort.held_out), effort.held_out, uniform=HELD_OUT_UNIFORM)
    say(
        f"exact paths of {len(fit.noise)} noises to fit to and {len(held_out.noise)} to validate on, {effort.reference_calls} calls each"
    )
    options = {"calls": effort.reference_calls, "final": final}
    paths = [trace_paths(counted, chosen.noise, counted.schedule, cond=chosen.cond, **options) for chosen in (fit, held_out)]
    return paths[0], replace(paths[1], weights=held_out.weights)


def estimate(effort: Effort, nfe: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    """About how many evaluations (one sample, one call) tuning takes, and how many bytes of memory in single precision."""
    paths, size = effort.trajectories + effort.held_out, int(np.prod(shape))
    total = paths * (effort.reference_calls * 9 // 8 + 2 * SENSITIVITY_CALLS * effort.pool)
    for n in nfe:
        columns = sum((i + 2) * (n - 1 - i) + (n - i) for i in range(n))
        screened = len(UNTUNED) * len(GRIDS) * SCREENED + (FINALISTS + 2 + len(effort.robust)) * effort.held_out
        fitted = (effort.trials + len(GRIDS)) * effort.trial_paths + 2 * effort.trajectories
        polished = len(effort.robust) * effort.polish * effort.trajectories * (columns + 6 * n)
        total += n * (screened + fitted) + polished
    columns = max(n * (n + 3) // 2 + n for n in nfe)
    return total, paths * size * 8 * effort.reference_calls + effort.trajectories * size * 8 * columns


class _Draws:
    """Noise like that which was given, and conditions among those which were given. What was given comes first."""

    def __init__(self, denoiser: Counted, noise: Tensor | None, cond: dict[str, Any], seed: int):
        schedule = denoiser.schedule
        shape = getattr(denoiser.info, "shape", None)
        if noise is None and shape is None:
            raise ValueError("tune needs noise=, as the denoiser does not say the shape of its samples.")
        self.scale = float(schedule.sigma(schedule.t_start))
        self.given = torch.empty(0, *(shape or ())) if noise is None else noise.detach()
        self.cond, self.random = cond, np.random.default_rng([seed, 0x66657773])
        if noise is not None:
            _check_noise(noise, self.scale)
        for name, value in cond.items():
            if isinstance(value, Tensor) and value.ndim and noise is not None and len(value) != len(noise):
                raise ValueError(f"the condition {name!r} has {len(value)} entries for {len(noise)} noises.")
        self.rows = next((len(value) for value in cond.values() if isinstance(value, Tensor) and value.ndim), 0)

    def __call__(self, count: int) -> tuple[Tensor, dict[str, Any]]:
        """Fresh noise ``"count *shape"`` with conditions."""
        numbers = torch.from_numpy(self.random.standard_normal((count, *self.given.shape[1:])))
        noise = (self.scale * numbers).to(self.given)
        rows = torch.from_numpy(self.random.integers(self.rows, size=count)) if self.rows else slice(None)
        return noise, take_rows(self.cond, rows)

    def pool(self, count: int) -> tuple[Tensor, dict[str, Any]]:
        """What was given, and as much fresh noise as is missing."""
        missing = max(0, count - len(self.given))
        if not missing:
            return self.given, self.cond
        noise, cond = self(missing)
        if not len(self.given):
            return noise, cond
        joined = {n: torch.cat([v, cond[n]]) if isinstance(v, Tensor) and v.ndim else v for n, v in self.cond.items()}
        return torch.cat([self.given, noise]), joined


def _check_noise(noise: Tensor, scale: float) -> None:
    if noise.ndim < 2 or not len(noise) or not noise.is_floating_point() or not bool(torch.isfinite(noise).all()):
        raise ValueError(f'noise must be a finite real tensor "batch *shape", got {noise.dtype} of shape {tuple(noise.shape)}.')
    spread = float(noise.double().square().mean().sqrt()) / scale
    if not 0.5 < spread < 2.0:
        raise ValueError(f"the noise has {spread:.3g} times the scale {scale:g} of the schedule's start. See fewstep.draw_noise.")


def _seconds(denoiser: Counted, draw: _Draws) -> float:
    """Seconds of one evaluation, in a block of the size that is used."""
    noise, cond = draw(min(denoiser.block, 64))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        denoiser(noise, denoiser.schedule.t_start, **cond)
        if noise.is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / len(noise))
    return min(times)


class _Chosen(NamedTuple):
    """Noises, their conditions, and how many noises of the pool each stands for."""

    noise: Tensor
    cond: dict[str, Any]
    weights: Floats


def _sensitive(denoiser: Counted, draw: _Draws, pool: tuple[Tensor, dict[str, Any]], count: int, *, uniform: float) -> _Chosen:
    """About `count` noises of a pool, with a probability in proportion to how far a sample moves when its noise moves a little, in a random
    direction, under a plan of few calls; mixed with equal probabilities by the share `uniform`.
    """
    noise, cond = pool
    if len(noise) <= count:
        return _Chosen(noise, cond, np.ones(len(noise)))
    plan = make_plan("auto", denoiser.schedule, SENSITIVITY_CALLS)
    direction = torch.from_numpy(draw.random.standard_normal(tuple(noise.shape))).to(noise) * draw.scale
    size = PERTURBATION.get(noise.dtype, PERTURBATION[torch.float32])
    moved = sample(denoiser, noise + size * direction, plan, cond=cond) - sample(denoiser, noise, plan, cond=cond)
    moves = moved.double().reshape(len(noise), -1).square().mean(1).sqrt().cpu().numpy()
    chances = uniform / len(noise) + (1.0 - uniform) * moves / moves.sum()
    for _ in range(len(noise)):  # those above 1 are certain, and the others share what is left
        certain = count * chances >= 1.0
        scaled = np.where(certain, 1.0 / count, chances * (1.0 - certain.sum() / count) / chances[~certain].sum())
        if np.allclose(scaled, chances):
            break
        chances = scaled
    chances = np.minimum(count * chances, 1.0)
    places = np.cumsum(chances) + draw.random.uniform()  # systematic: one at every whole number that is passed
    rows = np.flatnonzero(np.floor(places) > np.floor(places - chances))
    picked = torch.from_numpy(rows).to(noise.device)
    return _Chosen(noise[picked], take_rows(cond, picked), 1.0 / chances[rows])
