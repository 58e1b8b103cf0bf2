r"""States that distillation trains on: where they start, at which times they stand, how they are noised. All in alpha and sigma.

Times are drawn by a fraction u in [0, 1] of the way from `t_end` to `t_start`, along the schedule's own time; along $\sigma^{1/7}$ where
the time is sigma itself (EDM), as the published code does. `call_times` are the times of a student of K calls: u = 1, (K-1)/K, ..., 1/K;
of a table, those of whole indices, rounded down as published: 999, 749, 499, 249.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.denoisers import innermost
from fewstep.distill.method import RESERVED
from fewstep.schedules import EDM, FromAlphasCumprod, FromBetas, NoiseSchedule

__all__ = ["call_times", "column", "conditions", "draw_fractions", "noised", "randn", "start_noise", "time_of", "whole_times"]

Floats = NDArray[np.float64]
RHO = 7.0
SLACK = 1e-6
"""What is missing from a whole index by rounding."""


def time_of(schedule: NoiseSchedule, u: Any) -> Floats:
    """The time at a fraction u of the way from t_end to t_start.

    Example:
        >>> from fewstep.schedules import Flow
        >>> time_of(Flow(t_end=0.0), [0.25, 1.0]).tolist()
        [0.25, 1.0]
    """
    u = np.asarray(u, np.float64)
    if isinstance(schedule, EDM):
        low, high = schedule.t_end ** (1.0 / RHO), schedule.t_start ** (1.0 / RHO)
        return (low + u * (high - low)) ** RHO
    return schedule.t_end + u * (schedule.t_start - schedule.t_end)


def call_times(schedule: NoiseSchedule, calls: int) -> tuple[float, ...]:
    """The times at which a student of so many calls is called, noisiest first.

    Example:
        >>> from fewstep.schedules import FromBetas
        >>> table = FromBetas([0.01] * 1000)
        >>> table.network_time(np.array(call_times(table, 4))).tolist()
        [999.0, 749.0, 499.0, 249.0]
    """
    return whole_times(schedule, time_of(schedule, np.arange(calls, 0, -1) / calls))


def whole_times(schedule: NoiseSchedule, times: Any) -> tuple[float, ...]:
    """The times of whole indices, rounded down, of a table; of other schedules the times as they are."""
    times = np.asarray(times, np.float64)
    if isinstance(schedule, (FromBetas, FromAlphasCumprod)):
        count = len(schedule.betas if isinstance(schedule, FromBetas) else schedule.alphas_cumprod)
        times = (np.maximum(np.floor(times * count - 1.0 + SLACK), 0.0) + 1.0) / count
    return tuple(times.tolist())


def conditions(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the networks are told."""
    return {name: value for name, value in batch.items() if name not in RESERVED}


def start_noise(teacher: object, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Noise of unit variance, ``"batch *shape"``: what the batch holds as ``"noise"``, or drawn.

    Raises:
        ValueError: if nothing says the shape of a sample.
    """
    if "noise" in batch:
        return batch["noise"]
    first = next(iter(batch.values()))
    if "x" in batch:
        return randn(batch["x"], generator)
    shape = getattr(innermost(teacher, "info"), "shape", None)
    if shape is None:
        raise ValueError(
            "nothing says the shape of a sample: give the teacher's denoiser info=ModelInfo(shape=...), or put noise of unit variance "
            'into the batches as "noise".'
        )
    return torch.randn((len(first), *shape), generator=generator, device=generator.device).to(first.device)


def randn(x: Tensor, generator: torch.Generator) -> Tensor:
    """Noise like x, from a generator."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)


def draw_fractions(count: int, low: Any, high: Any, generator: torch.Generator) -> Floats:
    """Uniform between two numbers, or between those of each sample, float64 ``"count"``."""
    u = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device).cpu().numpy()
    return np.asarray(low) + u * (np.asarray(high) - np.asarray(low))


def column(values: Any, x: Tensor) -> Tensor:
    """Numbers ``"batch"`` in x's precision, to be multiplied with x."""
    return torch.as_tensor(np.asarray(values, np.float64)).to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def noised(schedule: NoiseSchedule, x_0: Tensor, t: Floats, noise: Tensor) -> Tensor:
    """Clean samples, noised to a time of each: alpha x_0 + sigma eps."""
    return column(schedule.alpha(t), x_0) * x_0 + column(schedule.sigma(t), x_0) * noise
