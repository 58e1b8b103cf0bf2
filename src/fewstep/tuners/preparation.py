"""What a tuning run begins with: a denoiser and plans that fit, noise drawn and chosen, and exact paths."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError, UnknownNameError
from fewstep.plan import Plan
from fewstep.schedules import NoiseSchedule
from fewstep.tuners.checkpoint import Checkpoint
from fewstep.tuners.draws import Draws, sensitive
from fewstep.tuners.effort import Effort
from fewstep.tuners.numbers import Numbers
from fewstep.tuners.paths import Paths, take_rows, trace_paths
from fewstep.tuners.task import Counted, Task
from fewstep.tuners.times import finite_ends

__all__ = ["checked_denoiser", "checked_starts", "prepare", "probe"]

FIT_UNIFORM, HELD_OUT_UNIFORM = 0.3, 0.5
"""Share of the noises that are chosen with equal probability: the more, the less the weights differ."""
PATH_FILES = ("fit", "held-out")
LARGEST_PIECE = 2**27
"""Bytes of the states of exact paths of which the ends alone are kept, and which are traced at a time."""


def prepare(
    counted: Counted,
    draw: Draws,
    effort: Effort,
    *,
    final: str,
    seed: int,
    kept: Checkpoint | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Task:
    """The task that all methods share: noise drawn and chosen, exact paths computed, or taken from a checkpoint."""
    began, schedule = time.perf_counter(), counted.schedule
    fit, held_out = (kept.paths(name, schedule, draw.given) if kept else None for name in PATH_FILES)
    if fit is None or held_out is None:
        fit, held_out = _traced(counted, draw, effort, final, report)
        if kept:
            kept.save_paths(PATH_FILES[0], fit)
            kept.save_paths(PATH_FILES[1], held_out)
    return Task(counted, schedule, fit, held_out, final, seed, draw, effort.reference_calls, report, began)


def _traced(counted: Counted, draw: Draws, effort: Effort, final: str, say: Callable[[str], None]) -> tuple[Paths, Paths]:
    """The exact paths to fit to, and those to validate on."""
    fit = sensitive(counted, draw, draw.pool(effort.pool * effort.trajectories), effort.trajectories, uniform=FIT_UNIFORM)
    held_out = sensitive(counted, draw, draw(effort.pool * effort.held_out), effort.held_out, uniform=HELD_OUT_UNIFORM)
    say(
        f"exact paths of {len(fit.noise)} noises to fit to and {len(held_out.noise)} to validate on, {effort.reference_calls} calls each"
    )
    options = {"calls": effort.reference_calls, "final": final}
    paths = trace_paths(counted, fit.noise, counted.schedule, cond=fit.cond, **options)
    piece = max(1, LARGEST_PIECE // (held_out.noise[0].numel() * held_out.noise.element_size() * effort.reference_calls))
    pieces = []
    for part in (slice(begin, begin + piece) for begin in range(0, len(held_out.noise), piece)):
        whole = trace_paths(counted, held_out.noise[part], counted.schedule, cond=take_rows(held_out.cond, part), **options)
        pieces.append(whole.ends())
    error = math.sqrt(sum(each.error**2 for each in pieces) / len(pieces))
    return paths, replace(reduce(Paths.joined, pieces), weights=held_out.weights, error=error)


def checked_denoiser(denoiser: Callable[..., Tensor], final: str) -> Callable[..., Tensor]:
    """Refuse what is no denoiser with a schedule, and ends that do not exist."""
    if not isinstance(getattr(denoiser, "schedule", None), NoiseSchedule):
        raise FewstepError("tune needs a denoiser with a noise schedule: wrap the network in fewstep.Denoiser.")
    if final not in ("t_end", "zero"):
        raise UnknownNameError("final", final, ("t_end", "zero"))
    return denoiser


def checked_starts(starts: Mapping[int, Plan], schedule: NoiseSchedule, final: str) -> dict[int, Plan]:
    """Refuse plans that learning cannot start from."""
    if not isinstance(starts, Mapping):
        raise TypeError(f"starts maps numbers of calls to plans, e.g. {{6: plan}}, got {type(starts).__name__}.")
    for nfe, plan in starts.items():
        Numbers.of(plan)
        end = 0.0 if final == "zero" else float(schedule.sigma(schedule.t_end))
        if plan.nfe != nfe or not schedule.same_noise(plan.schedule) or not math.isclose(float(schedule.sigma(plan.grid[-1])), end):
            raise ValueError(f"starts: the plan for {nfe} calls has {plan.nfe}, another noise schedule or another end.")
    return dict(starts)


def probe(counted: Counted, draw: Draws) -> Tensor:
    """A few predictions, which tell models without a fingerprint apart."""
    x = draw.scale * torch.linspace(-1.0, 1.0, 2 * math.prod(draw.given.shape[1:])).reshape(2, *draw.given.shape[1:]).to(draw.given)
    cond = take_rows(draw.cond, torch.arange(2) % draw.rows if draw.rows else slice(None))
    schedule = counted.schedule
    middle = float(schedule.t_of_lam(np.mean(finite_ends(schedule, np.array([schedule.t_start, schedule.t_end])))))
    return torch.stack([counted(x, t, **cond) for t in (schedule.t_start, middle)])
