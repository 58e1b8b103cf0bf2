"""Where the batches of a distillation come from: data, conditions alone, or what the teacher itself draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.distill.high_frequency import teacher_pairs
from fewstep.distill.method import Method
from fewstep.distill.networks import device_of
from fewstep.identity import digest_of
from fewstep.noise import draw_noise
from fewstep.sampler import sample
from fewstep.solvers import DPMSolverPP

__all__ = ["shape_of", "source_of", "teacher_samples"]

PAIR_SEED = 2**32
"""Seeds of pairs that are drawn begin here: no others do."""


def shape_of(teacher: Any) -> tuple[int, ...]:
    """The shape of a sample.

    Raises:
        ValueError: if the teacher does not say it.
    """
    shape = getattr(getattr(teacher, "info", None), "shape", None) or getattr(teacher, "shape", None)
    if shape is None:
        raise ValueError("the teacher does not say the shape of its samples: give it info=ModelInfo(shape=...).")
    return tuple(shape)


def source_of(method: Method, name: str, data: Any, conditions: Mapping[str, Tensor] | None, teacher: Any, seed: int) -> Any:
    """What `fewstep.train.fit` draws batches from.

    Args:
        method: the method.
        name: of the method.
        data, conditions: one of them, or none.
        teacher: the denoiser, which draws pairs for a method that learns from them, if there are no data.
        seed: of the noise of pairs.

    Raises:
        ValueError: if data are missing, or both are given.
    """
    if data is not None and conditions is not None:
        raise ValueError("give one of data and conditions: what of data is not 'x' or 'noise' are conditions already.")
    pairs = getattr(method, "pairs", None)
    if pairs is not None and data is None:
        return _pairs(teacher, pairs, method.pair_calls, dict(conditions or {}), seed)  # type: ignore[attr-defined]
    if method.needs_data:
        if data is None:
            raise ValueError(
                f"{name} learns from clean data: pass data={{'x': ...}}, with conditions beside it, or data=teacher_samples(teacher, ...)."
            )
        return data
    if isinstance(data, Mapping) and not {"x", "noise"} & data.keys():
        data, conditions = None, data
    if data is not None:
        return data
    known = dict(conditions or {})
    lengths = {key: len(value) for key, value in known.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"conditions need one equal first dimension of at least 1, got {lengths}.")
    return _Conditions(known, shape_of(teacher))


@dataclass(frozen=True)
class _Conditions:
    """Batches of conditions for methods without data; ``"x"`` says how many samples there are, and of what shape."""

    conditions: dict[str, Tensor]
    shape: tuple[int, ...]

    def __call__(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = min((len(values) for values in self.conditions.values()), default=1)
        rows = torch.randint(size, (count,), generator=generator)
        drawn = {name: values[rows.to(values.device)] for name, values in self.conditions.items()}
        return {"x": torch.zeros(count, *self.shape), **drawn}

    def told(self) -> dict[str, Any]:
        """For comparison with those of a checkpoint."""
        return {"conditions": digest_of(self.conditions)[:16], "shape": list(self.shape)}


def _pairs(teacher: Any, count: int, calls: int, cond: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Pairs of the teacher, with the conditions in turn."""
    plan = DPMSolverPP(order=2).plan(teacher.schedule, calls, "auto", final="zero")
    chosen = {name: value[torch.arange(count, device=value.device) % len(value)] for name, value in cond.items()}
    first = PAIR_SEED + seed * count
    return teacher_pairs(teacher, range(first, first + count), plan, cond=chosen, shape=shape_of(teacher))


@torch.no_grad()
def teacher_samples(
    teacher: Callable[..., Tensor],
    seeds: Sequence[int],
    cond: Mapping[str, Tensor] | None = None,
    *,
    nfe: int = 32,
    block: int = 256,
) -> dict[str, Tensor]:
    """Data made by the teacher itself, for methods that need data where there are none: ``{"x": ..., **cond}``.

    Args:
        teacher: the denoiser, which says the shape of a sample.
        seeds: one a sample.
        cond: conditions, one entry a sample.
        nfe: calls a sample, of second-order DPM-Solver++.
        block: the most samples of a network call.

    Example:
        >>> import fewstep as fs
        >>> data = teacher_samples(fs.load("digits"), range(4), {"label": torch.arange(4)}, nfe=2)
        >>> data["x"].shape, sorted(data)
        (torch.Size([4, 1, 8, 8]), ['label', 'x'])
    """
    shape, device = shape_of(teacher), device_of(teacher)
    plan = DPMSolverPP(order=2).plan(teacher.schedule, nfe, "auto", final="zero")  # type: ignore[attr-defined]
    given = {name: value.to(device) for name, value in (cond or {}).items()}
    made, seeds = [], list(seeds)
    for first in range(0, len(seeds), block):
        rows = slice(first, first + block)
        noise = draw_noise(shape, seeds[rows], plan, device=device)
        made.append(sample(teacher, noise, plan, cond={name: value[rows] for name, value in given.items()}))
    return {"x": torch.cat(made), **given}
