"""`tune`: plans made for one model, validated on noise and conditions that nothing was fitted to, never worse than an untuned one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.denoisers import check_conditions
from fewstep.errors import MissingExtraError, UnknownNameError
from fewstep.plan import Plan
from fewstep.tuners.checkpoint import Checkpoint, Spending, check_savable
from fewstep.tuners.compensation import compensation_candidates
from fewstep.tuners.draws import Draws, seconds_of
from fewstep.tuners.effort import AGAIN, PRICES, Effort, estimate, suitable
from fewstep.tuners.learned import Learned
from fewstep.tuners.numbers import Numbers
from fewstep.tuners.preparation import checked_denoiser, checked_starts, prepare, probe
from fewstep.tuners.progress import Bar
from fewstep.tuners.result import Tuned, best_of, ratio_of, settled, summarised
from fewstep.tuners.search import recipe
from fewstep.tuners.statistics import statistics_candidates
from fewstep.tuners.task import Candidate, Counted, Task
from fewstep.tuners.teleport import teleport_candidates
from fewstep.tuners.timesteps import timesteps

__all__ = ["METHODS", "Tuned", "tune"]

ENOUGH = 0.8
"""Other methods are tried if the first leaves more than this of the untuned plan's error."""
APART = "name a method, such as learned, and give an effort or trajectories, or leave the parallel run out"
FAR = 0.6
"""All three stages of learning are made if a polish from a given plan leaves more than this of the untuned plan's error."""


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
    evaluations: int | None = None,
    starts: Mapping[int, Plan] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
    map: Callable[..., Iterable[Any]] | None = None,  # noqa: A002  what it is called everywhere else
) -> Tuned:
    """Make plans for a model that are better than any untuned one.

    Exact paths of some noises are computed once, plans are fitted to them for every number of calls, and validated on other noise, with
    conditions drawn anew, beside a set of untuned solvers on several grids. The best on the validation noise is returned, in errors and in
    the sliced Wasserstein distance of the distributions: an untuned one if nothing tuned beats it in both.

    Args:
        denoiser: ``D(x, t, **cond)`` with a schedule; guided or not. The plan serves this model under this guidance only, and says so
            when it is run with another.
        nfe: number of network calls, or several.
        noise: ``"batch *shape"``, starting noise at the scale of the schedule's start, which plans are fitted to. More is drawn as
            needed, and so is the validation noise. It may be left out if the denoiser's info says the shape.
        method: ``"learned"``: all numbers of the plan, see `Learned`; ``"closed-form"``: its first stage only, which takes seconds;
            ``"statistics"``: DPM-Solver-v3 with the model's statistics; ``"compensation"``: DC-Solver's ratios; ``"timesteps"``: the
            times of a solver; ``"recipe"``: all its decisions; ``"teleport"``: the noisy part in closed form; ``"auto"``: one after the
            other, ``"learned"`` first, because it gains most; the others only where it leaves more than 0.8 of the untuned plan's
            error, or while a budget lasts.
        cond: conditions of the noise, one entry a sample; rows of them are drawn with every noise that is drawn.
        seed: of everything that is drawn.
        final: ``"t_end"``: the plan ends at the schedule's t_end; ``"zero"``: at sigma = 0.
        effort: how much to spend. Left out, it depends on the network: less for one that takes over 0.1 ms a sample and call.
        block: the most samples of a network call.
        minutes: spend about as long, by the speed of the network as it is measured; instead of `effort`.
        evaluations: spend about so many network evaluations (one sample, one call); instead of both.
        starts: number of calls -> a plan to start learning from, such as the one of another guidance scale or of the model before
            fine-tuning: it is polished, and searched anew only if that gains little. Read by `"learned"` and `"auto"` alone.
        features: from samples to vectors ``"batch size"``, such as `fewstep.evaluate.digit_features`: where the distributions of samples
            are compared; the samples themselves when left out.
        checkpoint: a folder that keeps what is finished: the exact paths, and every number of calls. The same call goes on from there.
        progress: show a bar on standard error, with the last validated error.
        report: called with a line about what goes on, e.g. ``print``.
        map: runs a function on every number of calls and gives the results in order, e.g. `fewstep.scale.RayMap`, which does so in
            parallel, with the same plans; one after the other when left out. Not for ``"auto"``, which goes by what was spent before,
            nor for a budget of minutes or evaluations, of which every number of calls gets what the ones before left.

    Returns:
        `Tuned`: plans, candidates and a report.

    Raises:
        UnknownNameError: for a method that does not exist.
        ValueError: for a budget that does not suffice for anything, a number of calls below 1,
            noise of another scale than the start's, or conditions that do not fit it.
        ArtefactError: if the checkpoint is of another run.
        FewstepError: if the denoiser has no schedule, or the network fails.

    Example:
        >>> import torch, fewstep as fs
        >>> exact = fs.exact.GaussianMixture(fs.schedules.VPLinear(), [[-1.0, 0.0], [1.0, 0.5]], 0.05)
        >>> noise = fs.draw_noise((2,), range(64), dtype=torch.float64)
        >>> effort = Effort(trajectories=64, held_out=32, pool=1, trials=20, polish=3)
        >>> tuned = tune(exact, nfe=4, noise=noise, effort=effort)
        >>> tuned.plan.nfe, tuned.report["plans"]["4"]["ratio"] < 0.5
        (4, True)
    """
    if method not in METHODS:
        raise UnknownNameError("method of tuning", method, METHODS)
    calls = _numbers_of_calls(nfe)
    if sum(given is not None for given in (minutes, evaluations, effort)) > 1:
        raise ValueError("give minutes, evaluations or effort, not several of them.")
    if effort is not None and not isinstance(effort, Effort):
        raise TypeError(f"effort must be a fewstep.tuners.Effort, got {effort!r:.80}.")
    if map is not None and (method == "auto" or minutes is not None or evaluations is not None):
        why = 'method "auto" goes' if method == "auto" else "a budget of minutes or evaluations is shared out"
        raise ValueError(f"{why} by what the numbers of calls before have spent, so they cannot run in parallel: {APART}.")
    counted = Counted(checked_denoiser(denoiser, final), block)
    draw = Draws(counted, noise, dict(cond or {}), seed)
    check_conditions(denoiser, draw.cond, draw.rows or 1)
    kept, starts = None, checked_starts(starts or {}, counted.schedule, final)
    if checkpoint is not None:
        check_savable(draw.cond)
        told = {"method": method, "final": final, "seed": seed, "minutes": minutes, "evaluations": evaluations}
        told |= {"effort": effort and asdict(effort), "features": features is not None}
        told |= {"starts": {str(n): plan.digest for n, plan in starts.items()}}
        given = Checkpoint.key_of(noise=draw.given, cond=Checkpoint.key_of(**draw.cond), says=probe(counted, draw))
        kept = Checkpoint(Path(checkpoint), Checkpoint.key_of_run(denoiser, given=given, **told))
    seconds = seconds_of(counted, draw)
    spending = kept.spending() if kept else None
    if spending is None:
        budget = evaluations if minutes is None else round(60.0 * minutes / seconds)
        spending = Spending(effort or suitable(seconds, calls, draw.given.shape[1:], budget, method), budget)
    if kept:
        kept.save_spending(spending)
    counted.evaluations = spending.evaluations
    shape = draw.given.shape[1:]
    total, memory = estimate(spending.effort, calls, shape, method)
    with Bar(counted, spending.budget or total, shown=progress, report=report) as bar:
        left = max(0, (spending.budget or total) - spending.evaluations)
        bar.say(f"about {left} evaluations, {left * seconds / 60.0:.1f} minutes and {memory / 1e6:.0f} MB")
        task = prepare(counted, draw, spending.effort, final=final, seed=seed, kept=kept, report=bar.say)
        task.began -= spending.seconds
        task.starts.update(starts)
        task.features = features
        if kept:
            kept.save_spending(_spent(task, spending))
        return _run(task, calls, method, spending, kept, map)


def _numbers_of_calls(nfe: int | Sequence[int]) -> list[int]:
    """In increasing order, each once."""
    try:
        given = np.atleast_1d(np.asarray(nfe))
        calls = sorted({int(n) for n in given.tolist()})
        fine = given.ndim == 1 and given.dtype.kind in "iuf" and calls == sorted(set(given.tolist()))
    except (TypeError, ValueError, OverflowError):
        calls, fine = [], False
    if not fine or not calls or calls[0] < 1:
        raise ValueError(f"nfe must be one or several whole numbers of at least 1, got {nfe!r:.80}.")
    return calls


def _run(
    task: Task,
    calls: list[int],
    method: str,
    spending: Spending,
    kept: Checkpoint | None,
    mapped: Callable[..., Iterable[Any]] | None,
) -> Tuned:
    candidates, counted = {}, task.denoiser
    if mapped is not None:
        candidates = {n: finished for n in calls if kept and (finished := kept.candidates(n))}
        missing = [n for n in calls if n not in candidates]
        alone = replace(task, report=_silent)
        for n, (found, spent) in zip(missing, mapped(partial(_alone, alone, method, spending.effort), missing), strict=True):
            candidates[n] = found
            counted.evaluations += spent
            task.report(f"{n} calls: {best_of(found).name}, error {best_of(found).errors.rms:.4g}")
            if kept:
                kept.save_candidates(n, found)
                kept.save_spending(_spent(task, spending))
        return summarised(task, {n: candidates[n] for n in calls}, method, spending.effort)
    for n in calls:
        finished = kept.candidates(n) if kept else None
        left = None
        if spending.budget is not None:
            left = (spending.budget - counted.evaluations) * n // sum(m for m in calls if m >= n)
        candidates[n] = finished or _candidates(task, n, method, spending.effort, left)
        if kept and not finished:
            kept.save_candidates(n, candidates[n])
            kept.save_spending(_spent(task, spending))
    return summarised(task, candidates, method, spending.effort)


def _silent(line: str) -> None:
    """What a task elsewhere reports to."""


def _alone(task: Task, method: str, effort: Effort, nfe: int) -> tuple[list[Candidate], int]:
    """The candidates of one number of calls, and the evaluations that they took, by a task that shares nothing with others."""
    own = Counted(task.denoiser.denoiser, task.denoiser.block)
    task = replace(task, denoiser=own, draw=copy.copy(task.draw), kept={}, _untuned={}, _squares={})
    return _candidates(task, nfe, method, effort, None), own.evaluations


def _spent(task: Task, spending: Spending) -> Spending:
    return replace(spending, evaluations=task.denoiser.evaluations, seconds=time.perf_counter() - task.began)


def closed_form(task: Task, nfe: int, effort: Effort) -> Iterator[Candidate]:
    """The first stage of `Learned`."""
    return _learned(task, nfe, Learned(trials=0, trial_paths=effort.trial_paths, polish=0))


def learned(task: Task, nfe: int, effort: Effort) -> Iterator[Candidate]:
    """The three stages of `Learned`; if there is a plan to start from, its polish, and the three stages if that gains little."""
    start, found = task.starts.get(nfe), []
    if start is not None:
        for candidate in _learned(task, nfe, _options(effort), Numbers.of(start)):
            found.append(candidate)
            yield candidate
    if not found or min(candidate.errors.rms for candidate in found) > FAR * task.untuned(nfe).errors.rms:
        yield from _learned(task, nfe, _options(effort))


def once_more(task: Task, nfe: int, effort: Effort) -> Iterator[Candidate]:
    """The polish of `Learned` from the best untuned plan, whose times differ from those that were searched: what the one leads astray,
    the other may not.
    """
    return _learned(task, nfe, _options(effort), Numbers.of(task.untuned(nfe).plan), "untuned")


def _options(effort: Effort) -> Learned:
    told = asdict(effort)
    return Learned(**{name: told[name] for name in ("trials", "trial_paths", "polish", "robust", "hard", "hard_pool")})


def _learned(task: Task, nfe: int, options: Learned, start: Numbers | None = None, told: str = "start") -> Iterator[Candidate]:
    for stage, numbers in options.stages(task, nfe, start, told):
        made_by = {"solver": {"name": "learned", "options": {**asdict(options), "stage": stage}}, "grid": "learned"}
        yield task.judge(f"learned: {stage}", numbers.plan(task.schedule, made_by))


MAKERS: dict[str, Callable[[Task, int, Effort], Iterator[Candidate]]] = {
    "learned": learned,
    "closed-form": closed_form,
    "statistics": statistics_candidates,
    "compensation": compensation_candidates,
    "timesteps": timesteps,
    "recipe": recipe,
    "teleport": teleport_candidates,
}
"""What makes candidates, by the name of the method."""
METHODS = ("auto", *MAKERS)
"""What can be asked for."""
OTHERS = ("compensation", "statistics", "teleport", "recipe", "timesteps")
"""What ``"auto"`` tries after ``"learned"``, in the order of what they are expected to gain for their price."""


def _candidates(task: Task, nfe: int, method: str, effort: Effort, budget: int | None) -> list[Candidate]:
    """The best untuned plan, then what the method makes, or all of them, challenged."""
    begun = task.denoiser.evaluations
    base = task.untuned(nfe)
    task.report(f"{nfe} calls: {base.name} is the best untuned setting, error {base.errors.rms:.4g}")
    found = [base]
    for name in ("learned", *OTHERS) if method == "auto" else (method,):
        if len(found) > 1:
            spent, price = task.denoiser.evaluations - begun, PRICES[name](effort, nfe)
            enough = ratio_of(found) <= ENOUGH or price > spent
            if enough if budget is None else spent + price > budget:
                continue
        try:
            found = settled(task, _told(task, found, MAKERS[name](task, nfe, effort)), effort)
        except MissingExtraError as error:
            if method != "auto" or name == "learned":
                raise
            task.report(f"{nfe} calls: {name} is left out. {error}")
            continue
        if name == "learned" and not best_of(found).tuned and effort.polish:
            spent, price = task.denoiser.evaluations - begun, PRICES[AGAIN](effort, nfe)
            if budget is None or spent + price <= budget:
                task.report(f"{nfe} calls: learned once more, from {base.name}")
                found = settled(task, _told(task, found, once_more(task, nfe, effort)), effort)
    return found


def _told(task: Task, found: list[Candidate], more: Iterator[Candidate]) -> list[Candidate]:
    """With those candidates too."""
    found = [*found]
    for candidate in more:
        task.report(f"{candidate.plan.nfe} calls: {candidate.name}, error {candidate.errors.rms:.4g}")
        found.append(candidate)
    return found
