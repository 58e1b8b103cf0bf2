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

__all__ = ["CHALLENGED", "Mined", "challenged", "mined", "steadied"]

Floats = NDArray[np.float64]
MINED_WEIGHT = 0.2
"""Of a mined path in the polish: those are the rare ones, and the plan is for all."""
CHALLENGED = 3
"""Candidates that are challenged together."""
MINING, CHALLENGE = 1, 2
"""Streams of noise."""
ASTRAY = 10.0
"""A sample is astray whose error under either plan is more than so many of the larger median."""
STEADY = 4.0
"""So many samples that are astray are taken for granted, shared by two plans as their medians are, before those that were seen."""


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
    by, and the validation noise: a few samples in the wrong mode decide these errors, so the more noise the better; and of what they add
    only as much counts as so few can tell, see `steadied`.

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
    base, known = task.untuned(candidates[0].plan.nfe), task.held_out
    noise, cond = task.draw.stream(CHALLENGE, base.plan.nfe)(pool)
    plans = [base.plan, *(candidate.plan for candidate in candidates)]
    runs = [sample(task.denoiser, noise, plan, cond=cond, check=False) for plan in plans]
    apart = np.max([_between(runs[0], run) for run in runs[1:]], axis=0)
    rows = _farthest(apart, count)
    picked = torch.from_numpy(rows).to(noise.device)
    target = task.trace(noise[picked], take_rows(cond, picked)).target
    held_out = [task.run(plan, known) for plan in plans]
    near = np.max([_between(held_out[0], run) for run in held_out[1:]], axis=0) <= apart[rows].min()
    share = len(rows) / pool if near.any() else 1.0
    fresh = np.full(len(rows), share / len(rows))
    shares = known.shares / known.shares.sum()
    of_known = shares * known.count / pool
    if near.any():
        of_known = of_known + (1.0 - share) * np.where(near, shares, 0.0) / shares[near].sum()
    weights = np.concatenate([fresh, of_known]) * pool / (pool + known.count)
    squares = [
        np.concatenate([distances(run[picked], target), distances(held, known.target)]) ** 2
        for run, held in zip(runs, held_out, strict=True)
    ]
    return [
        steadied(mine, squares[0], weights, (candidate.errors.median, base.errors.median))
        for mine, candidate in zip(squares[1:], candidates, strict=True)
    ]


def steadied(mine: Floats, untuned: Floats, weights: Floats, medians: tuple[float, float]) -> tuple[float, float]:
    r"""Root mean square errors of two plans, of which samples that went astray add what is likely, not what happened.

    One sample in the wrong mode can outweigh a thousand that are right, and which of two plans one sample befalls is chance: it does so
    where the exact path passes near a border, and there about in proportion to a plan's error. So with k samples astray under either plan,
    what these add is shared between the plans as it was seen with weight k / (k + 4), and as the plans' medians are with the rest.

    Args:
        mine: ``"batch"``: squared errors of a plan.
        untuned: ``"batch"``: of the other, on the same noise.
        weights: ``"batch"``: of the samples, with the sum 1.
        medians: of the errors of both.

    Returns:
        both errors; infinite where one is not finite.

    Example:
        >>> errors = np.full(100, 0.25), np.full(100, 1.0)
        >>> errors[0][0] = 400.0
        >>> [round(error, 2) for error in steadied(*errors, np.full(100, 0.01), (0.5, 1.0))]
        [1.45, 1.77]
    """
    each = np.stack([mine, untuned])
    means = each @ weights
    if np.isfinite(means).all() and sum(medians) > 0.0:
        astray = each.max(0) > (ASTRAY * max(medians)) ** 2
        seen, found = int(astray.sum()), each[:, astray] @ weights[astray]
        expected = found.sum() * np.array(medians) / sum(medians)
        means = each[:, ~astray] @ weights[~astray] + (seen * found + STEADY * expected) / (seen + STEADY)
    first, second = (math.sqrt(mean) if math.isfinite(mean) else math.inf for mean in means.tolist())
    return first, second


def _between(first: Tensor, second: Tensor) -> Floats:
    """``"batch"``: distances of samples; inf where one is not finite."""
    return np.nan_to_num(distances(first, second), nan=math.inf, posinf=math.inf)


def _farthest(apart: Floats, count: int) -> NDArray[np.intp]:
    """The rows of the greatest distances."""
    return np.argsort(-apart, kind="stable")[:count]
