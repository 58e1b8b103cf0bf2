"""Noise on which a plan goes wrong, found without exact paths: where its samples are far from those of an untuned plan.

A plan that was fitted to some dozens of paths can be far better than any untuned one on nearly all noise, and lead one sample in a
hundred to another mode: that one then makes most of the root mean square error, and no validation set of a few hundred paths holds
enough of its kind. Two plans that are both near the exact solution are near each other, so where they are not, one of them is wrong. To
compare them on a large pool costs two runs of few calls; only where they differ most are exact paths needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.plan import Plan
from fewstep.sampler import sample
from fewstep.tuners.paths import Paths, take_rows
from fewstep.tuners.task import Candidate, Task, distances

__all__ = ["CHALLENGED", "Mined", "challenged", "mined"]

Floats = NDArray[np.float64]
MINED_WEIGHT = 0.2
"""Of a mined path in the polish: those are the rare ones, and the plan is for all."""
CHALLENGED = 3
"""Candidates that are challenged together."""
MINING, CHALLENGE = 1, 2
"""Streams of noise."""


class Mined(NamedTuple):
    """Exact paths, and whether the plan that they were sought for has a larger mean squared error on them than the best untuned one."""

    paths: Paths
    led_astray: bool


def mined(task: Task, plan: Plan, *, pool: int, count: int, turn: int = 0) -> Mined:
    """Exact paths of the `count` noises of a pool, another one every turn, on which the plan is farthest from the best untuned one."""
    noise, cond = task.draw.stream(MINING, plan.nfe, turn)(pool)
    runs = [sample(task.denoiser, noise, each, cond=cond, check=False) for each in (task.untuned(plan.nfe).plan, plan)]
    picked = torch.from_numpy(_farthest(_between(*runs), count)).to(noise.device)
    paths = replace(task.trace(noise[picked], take_rows(cond, picked)), weights=np.full(len(picked), MINED_WEIGHT))
    untuned, mine = ((distances(run[picked], paths.target) ** 2).mean() for run in runs)
    return Mined(paths, not mine <= untuned)  # also where samples are not finite


def challenged(task: Task, candidates: Sequence[Candidate], *, pool: int, count: int) -> list[tuple[float, float]]:
    """The root mean square errors of candidates and of the best untuned plan, over a pool of noise that nothing was fitted to or chosen
    by, and the validation noise: a few samples in the wrong mode decide these errors, so the more noise the better.

    Exact paths are traced for the `count` noises of the pool on which any candidate is farthest from the untuned plan; what lies nearer
    is estimated from those validation paths on which they are as near.

    Args:
        task: the model.
        candidates: for one number of calls.
        pool: how many noises.
        count: how many exact paths.

    Returns:
        for every candidate its error, and the untuned plan's on the same noise.
    """
    base = task.untuned(candidates[0].plan.nfe)
    noise, cond = task.draw.stream(CHALLENGE, base.plan.nfe)(pool)
    plans = [base.plan, *(candidate.plan for candidate in candidates)]
    runs = [sample(task.denoiser, noise, plan, cond=cond, check=False) for plan in plans]
    apart = np.max([_between(runs[0], run) for run in runs[1:]], axis=0)
    rows = _farthest(apart, count)
    picked = torch.from_numpy(rows).to(noise.device)
    target = task.trace(noise[picked], take_rows(cond, picked)).target
    held_out = [task.run(plan, task.held_out) for plan in plans]
    near = np.max([_between(held_out[0], run) for run in held_out[1:]], axis=0) <= apart[rows].min()
    share = len(rows) / pool if near.any() else 1.0

    def error(k: int) -> float:
        known = distances(held_out[k], task.held_out.target) ** 2
        fresh = float(np.mean(distances(runs[k][picked], target) ** 2))
        if near.any():
            fresh = share * fresh + (1.0 - share) * float(np.average(known[near], weights=task.held_out.shares[near]))
        known = float(np.average(known, weights=task.held_out.shares))
        mean = (pool * fresh + task.held_out.count * known) / (pool + task.held_out.count)
        return math.sqrt(mean) if math.isfinite(mean) else math.inf

    return [(error(k), error(0)) for k in range(1, len(plans))]


def _between(first: Tensor, second: Tensor) -> Floats:
    """``"batch"``: distances of samples; inf where one is not finite."""
    return np.nan_to_num(distances(first, second), nan=math.inf, posinf=math.inf)


def _farthest(apart: Floats, count: int) -> NDArray[np.intp]:
    """The rows of the greatest distances."""
    return np.argsort(-apart, kind="stable")[:count]
