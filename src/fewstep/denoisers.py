r"""A denoiser is a function ``D(x, t, **cond)`` that predicts the clean data $x_0$ from a noisy state $x_t$.

`Denoiser` wraps a network together with its noise schedule and with what it predicts. Everything that is particular to one network ends
here: its time convention, its precision, its kind of prediction. Solvers, plans and the loop see data predictions only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import NetworkError
from fewstep.predictions import check_prediction, data_coefficients
from fewstep.schedules import NoiseSchedule

__all__ = ["Denoiser", "ModelInfo"]

REMEMBERED_TIMES = 4096
"""How many times a denoiser remembers the coefficients of, so that a loop computes none."""

Time = float | Tensor | np.ndarray


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model beside its network: filled in by `fewstep.load`, all of it optional.

    Attributes:
        name: how to call it in messages.
        shape: shape of one sample, without the batch.
        data_range: lowest and highest value of clean data.
        conditions: for every condition the network takes, its name and ``{"classes": n, "null": label}``.
        fingerprint: digest of the weights, for the provenance of what is computed with them.
        extra: anything else its configuration says.
    """

    name: str = "network"
    shape: tuple[int, ...] | None = None
    data_range: tuple[float, float] | None = None
    conditions: dict[str, dict[str, int]] = field(default_factory=dict)
    fingerprint: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Denoiser:
    """A network, its noise schedule and what it predicts, as a function from (x, t) to the data prediction.

    Args:
        network: any callable ``network(x, time, **cond)`` that returns a tensor of x's shape. ``time`` is a vector ``"batch"``.
        schedule: the noise schedule it was trained on.
        predicts: ``"noise"``, ``"data"``, ``"velocity"``, ``"flow"`` or ``"score"``; see `fewstep.predictions`.
        network_time: maps the schedule's time (float64 array) to the time the network was trained on. Left out, it is
            ``schedule.network_time``: t itself for continuous schedules, the index into the table for discrete ones.
        integer_time: round the network's time to the nearest integer and pass it as int64 (networks with a table of embeddings).
        scalar_time: pass a 0-dimensional time instead of a vector (not for per-sample times).
        network_dtype: precision the network runs in. Left out, it is that of the network's parameters, if it has any. The state keeps
            its own precision, and so does the time, which a half-precision network gets in float32.
        info: what else is known of the model.

    Attributes:
        calls: how many times the network has been called so far.

    Example:
        >>> import torch
        >>> from fewstep.schedules import EDM
        >>> denoiser = Denoiser(lambda x, time: x / (1 + time[:, None] ** 2), EDM(), predicts="data")
        >>> denoiser(torch.ones(3, 2), 2.0)[0].tolist(), denoiser.calls
        ([0.20000000298023224, 0.20000000298023224], 1)
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        schedule: NoiseSchedule,
        predicts: str = "noise",
        *,
        network_time: Callable[[np.ndarray], Any] | None = None,
        integer_time: bool = False,
        scalar_time: bool = False,
        network_dtype: torch.dtype | None = None,
        info: ModelInfo | None = None,
    ):
        if not callable(network):
            raise TypeError(f"network must be callable as network(x, time, **cond), got {type(network).__name__}.")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a fewstep.schedules schedule, got {type(schedule).__name__}.")
        self.network = network
        self.schedule = schedule
        self.predicts = check_prediction(predicts)
        self.network_time = schedule.network_time if network_time is None else network_time
        self.integer_time = integer_time
        self.scalar_time = scalar_time
        self.network_dtype = _parameter_dtype(network) if network_dtype is None else network_dtype
        self.info = ModelInfo() if info is None else info
        self.calls = 0
        self._remembered: dict[float, tuple[float, float, float]] = {}

    def __repr__(self) -> str:
        return f"Denoiser({self.info.name}, {self.schedule!r}, predicts={self.predicts!r})"

    def __call__(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """Predict the clean data.

        Args:
            x: ``Float[Tensor, "batch *shape"]``, the noisy states.
            t: time in the schedule's own unit; a number, or one per sample ``"batch"`` (then read on the host).
            **cond: handed to the network as they are.

        Returns:
            ``Float[Tensor, "batch *shape"]`` in x's precision.

        Raises:
            NetworkError: if the network's output does not have x's shape, or is no tensor.
            ValueError: for a noise or score prediction at a time where alpha is 0, which does not determine the data.
        """
        if isinstance(t, (Tensor, np.ndarray)) and t.ndim:
            return self._convert_each(x, t, cond)
        a, b, time = self._coefficients(float(t))
        output = self._call(x, self._time_like(x, time), cond, float(t))
        if a == 0.0:
            return output if b == 1.0 else output * b
        return torch.mul(output, b).add_(x, alpha=a)

    def _coefficients(self, t: float) -> tuple[float, float, float]:
        known = self._remembered.get(t)
        if known is None:
            alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
            if alpha == 0.0 and self.predicts in ("noise", "score"):
                raise ValueError(
                    f"at t={t:g} alpha is 0, where a {self.predicts} prediction says nothing about the data. Start later "
                    f"(t_start or start=), or use a network that predicts data, velocity or flow."
                )
            time = float(self.network_time(np.asarray(t)))
            known = (*data_coefficients(self.predicts, alpha, sigma), time)
            if len(self._remembered) >= REMEMBERED_TIMES:
                self._remembered.clear()
            self._remembered[t] = known
        return known

    def _time_like(self, x: Tensor, time: float) -> Tensor:
        shape = () if self.scalar_time else (x.shape[0],)
        if self.integer_time:
            return x.new_full(shape, round(time), dtype=torch.int64)
        return x.new_full(shape, time, dtype=self._time_dtype(x))

    def _time_dtype(self, x: Tensor) -> torch.dtype:
        """float32 for float32 and half-precision networks; x's own precision where the network has none."""
        return x.dtype if self.network_dtype is None else torch.promote_types(self.network_dtype, torch.float32)

    def _convert_each(self, x: Tensor, t: Tensor | np.ndarray, cond: dict[str, Any]) -> Tensor:
        times = t.detach().cpu().double().numpy() if isinstance(t, Tensor) else np.asarray(t, np.float64)
        if times.shape != (x.shape[0],):
            raise ValueError(f"t must be one number or one per sample ({x.shape[0]},), got shape {tuple(times.shape)}.")
        rows = np.array([self._coefficients(float(time)) for time in times])
        network_time = torch.as_tensor(np.rint(rows[:, 2]) if self.integer_time else rows[:, 2])
        network_time = network_time.to(torch.int64 if self.integer_time else self._time_dtype(x)).to(x.device)
        a, b = (torch.as_tensor(rows[:, k]).to(x.dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1)) for k in (0, 1))
        return a * x + b * self._call(x, network_time, cond, float(times.max()))

    def _call(self, x: Tensor, time: Tensor, cond: dict[str, Any], t: float) -> Tensor:
        self.calls += 1
        dtype = self.network_dtype
        output = self.network(x if dtype is None or dtype is x.dtype else x.to(dtype), time, **cond)
        if not isinstance(output, Tensor):
            raise NetworkError(f"the network returned {type(output).__name__} at t={t:.6g}, not a tensor. Wrap it so that it does.")
        if output.shape != x.shape:
            raise NetworkError(
                f"the network returned shape {tuple(output.shape)} at t={t:.6g}, but its input has shape {tuple(x.shape)}."
            )
        return output if output.dtype is x.dtype else output.to(x.dtype)


def _parameter_dtype(network: object) -> torch.dtype | None:
    if isinstance(network, torch.nn.Module):
        for parameter in network.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return None
