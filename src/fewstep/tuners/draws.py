"""Noise to tune on: drawn like that which was given, and chosen where samples depend on it most."""

from __future__ import annotations

import copy
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.sampler import sample
from fewstep.solvers import make_plan
from fewstep.tuners.paths import arrays_of, join_rows, take_rows
from fewstep.tuners.task import Counted

__all__ = ["SENSITIVITY_CALLS", "Chosen", "Draws", "seconds_of", "sensitive"]

Floats = NDArray[np.float64]
STREAM = 0x66657773
SENSITIVITY_CALLS = 6
PERTURBATION = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Relative size of the change of the noise that shows how much a sample depends on it, by the precision of the state."""


class Draws:
    """Noise like that which was given, and conditions among those which were given. What was given comes first."""

    def __init__(self, denoiser: Counted, noise: Tensor | None, cond: dict[str, Any], seed: int):
        schedule = denoiser.schedule
        shape = getattr(denoiser.info, "shape", None)
        if noise is None and shape is None:
            raise ValueError("tune needs noise=, as the denoiser does not say the shape of its samples.")
        self.scale = float(schedule.sigma(schedule.t_start))
        if noise is None:
            self.given = torch.empty(0, *(shape or ()), device=denoiser.device)
        else:
            self.given = noise.detach().float() if noise.dtype in (torch.float16, torch.bfloat16) else noise.detach()
        self.cond, self.seed, self.random = cond, seed, np.random.default_rng([seed, STREAM])
        if noise is not None:
            _check_noise(noise, self.scale)
        self.rows = 0
        for name, value in cond.items():
            for array in arrays_of(value):
                wanted = self.rows or (len(array) if noise is None else len(noise))
                if len(array) != wanted:
                    raise ValueError(f"the condition {name!r} has {len(array)} entries for {wanted} noises.")
                self.rows = wanted

    def stream(self, *numbers: int) -> Draws:
        """Noise and conditions that have nothing to do with these: the same for the same numbers, whatever was drawn before."""
        other = copy.copy(self)
        other.random = np.random.default_rng([self.seed, STREAM, *numbers])
        return other

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
        return torch.cat([self.given, noise]), {name: join_rows(value, cond[name]) for name, value in self.cond.items()}


def _check_noise(noise: Tensor, scale: float) -> None:
    if noise.ndim < 2 or not len(noise) or not noise.is_floating_point() or not bool(torch.isfinite(noise).all()):
        raise ValueError(f'noise must be a finite real tensor "batch *shape", got {noise.dtype} of shape {tuple(noise.shape)}.')
    spread = float(noise.double().square().mean().sqrt()) / scale
    if not 0.5 < spread < 2.0:
        raise ValueError(f"the noise has {spread:.3g} times the scale {scale:g} of the schedule's start. See fewstep.draw_noise.")


def seconds_of(denoiser: Counted, draw: Draws) -> float:
    """Seconds of one evaluation, in a block of the size that is used."""
    count = min(denoiser.block, 64)
    noise = draw.scale * torch.ones(count, *draw.given.shape[1:]).to(draw.given)
    cond = take_rows(draw.cond, torch.arange(count) % draw.rows if draw.rows else slice(None))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        denoiser(noise, denoiser.schedule.t_start, **cond)
        if noise.is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / len(noise))
    return min(times)


class Chosen(NamedTuple):
    """Noises, their conditions, and how many noises of the pool each stands for."""

    noise: Tensor
    cond: dict[str, Any]
    weights: Floats


def sensitive(denoiser: Counted, draw: Draws, pool: tuple[Tensor, dict[str, Any]], count: int, *, uniform: float) -> Chosen:
    """About `count` noises of a pool, with a probability in proportion to how far a sample moves when its noise moves a little, in a random
    direction, under a plan of few calls; mixed with equal probabilities by the share `uniform`.
    """
    noise, cond = pool
    if len(noise) <= count:
        return Chosen(noise, cond, np.ones(len(noise)))
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
    return Chosen(noise[picked], take_rows(cond, picked), 1.0 / chances[rows])
