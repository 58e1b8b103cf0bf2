r"""A denoiser is a function ``D(x, t, **cond)`` that predicts the clean data $x_0$ from a noisy state $x_t$.

`Denoiser` wraps a network together with its noise schedule and with what it predicts. Everything that is particular to one network ends
here: its time convention, its precision, its kind of prediction. Solvers, plans and the loop see data predictions only.

`Clipped` and `DynamicThreshold` take a denoiser and return one whose prediction stays in the range of the data: static and dynamic
thresholding ("Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding", Imagen, arXiv 2205.11487, section 2.3). For
models of pixels; latents have no range.
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import NetworkError, PlanError
from fewstep.predictions import check_prediction, data_coefficients
from fewstep.schedules import FromAlphasCumprod, FromBetas, NoiseSchedule

__all__ = ["Around", "Clipped", "Denoiser", "DynamicThreshold", "ModelInfo", "check_conditions", "innermost", "without_limits"]

REMEMBERED_TIMES = 4096
"""How many times a denoiser remembers the coefficients of, so that a loop computes none."""
LARGEST_QUANTILE = 2**24
"""`torch.quantile` refuses more elements than this."""

Time = float | Tensor | np.ndarray


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model beside its network: filled in by `fewstep.load`, all of it optional.

    Attributes:
        name: how to call it in messages.
        shape: shape of one sample, without the batch.
        data_range: lowest and highest value of clean data.
        conditions: for every condition the network takes, its name and ``{"classes": n, "null": label}``; without a null, one
            must be given.
        embeddings: names of the conditions, tensors with one entry a sample, without which the network cannot be called: those of prompts.
        fingerprint: digest of the weights, for the provenance of what is computed with them.
        extra: anything else its configuration says.
    """

    name: str = "network"
    shape: tuple[int, ...] | None = None
    data_range: tuple[float, float] | None = None
    conditions: dict[str, dict[str, int]] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
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
        if integer_time and network_time is None and not isinstance(schedule, (FromBetas, FromAlphasCumprod)):
            raise ValueError(
                f"integer_time rounds the network's time, but {type(schedule).__name__} has times like 0.5. Pass network_time= as well, "
                f"e.g. lambda t: 1000 * t - 1, or use a schedule with a table."
            )
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
        return torch.addcmul(self._call(x, network_time, cond, float(times.max())) * b, x, a)  # rounds as with one time for all

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


# ---- thresholding ------------------------------------------------------------------------------------------------------------------


class Around:
    """A denoiser around another: what it does not have itself, such as the schedule, calls, jumps, guidance and info, is the other's."""

    def __init__(self, denoiser: Callable[..., Tensor]):
        if not callable(denoiser):
            raise TypeError(f"denoiser must be callable as denoiser(x, t, **cond), got {type(denoiser).__name__}.")
        self.denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "denoiser":  # what copies and pickles ask before there is a denoiser
            raise AttributeError(name)
        return getattr(self.denoiser, name)


def innermost(denoiser: object, name: str) -> Any:
    """An attribute of a denoiser or, where it has none of that name, of the one that it is around, and so on; None if there is none.

    Example:
        >>> import fewstep as fs
        >>> innermost(fs.guidance.ClassifierFree(fs.load("digits"), 3.0, {"label": 10}), "predicts")
        'velocity'
    """
    while not hasattr(denoiser, name) and hasattr(denoiser, "denoiser"):
        denoiser = denoiser.denoiser  # type: ignore[attr-defined]
    return getattr(denoiser, name, None)


class _Limited(Around, abc.ABC):
    """A denoiser around another, the prediction of which it limits."""

    def __call__(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return self._limit(self.denoiser(x, t, **cond))

    def with_scale(self, guidance_scale: float) -> Any:
        """The same limits around the denoiser with guidance of another scale.

        Raises:
            TypeError: if it has no guidance.
        """
        if not hasattr(self.denoiser, "with_scale"):
            raise TypeError(f"{self.denoiser!r} has no guidance, whose scale could be another.")
        changed = copy.copy(self)
        changed.denoiser = self.denoiser.with_scale(guidance_scale)  # type: ignore[attr-defined]
        return changed

    @property
    @abc.abstractmethod
    def limits(self) -> dict[str, Any]:
        """What tells these limits from others, as JSON values."""

    @abc.abstractmethod
    def _limit(self, d: Tensor) -> Tensor:
        """The limited data prediction, ``"batch *shape"``."""


def without_limits(denoiser: Any) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """A denoiser without the limits around it, and these limits, as a function of a data prediction.

    Example:
        >>> from fewstep.schedules import EDM
        >>> inner, limit = without_limits(Clipped(Denoiser(lambda x, time: 2.0 * x, EDM(), predicts="data")))
        >>> inner(torch.ones(1, 1), 1.0).tolist(), limit(torch.full((1, 1), 2.0)).tolist()
        ([[2.0]], [[1.0]])
    """
    found: list[_Limited] = []
    while isinstance(denoiser, _Limited):
        found.append(denoiser)
        denoiser = denoiser.denoiser

    def limit(d: Tensor) -> Tensor:
        for each in reversed(found):
            d = each._limit(d)
        return d

    return denoiser, limit


class Clipped(_Limited):
    """Static thresholding: the data prediction clipped to the range of the data.

    Args:
        denoiser: ``D(x, t, **cond)``.
        low, high: the range.

    Raises:
        ValueError: if low is not less than high.

    Example:
        >>> from fewstep.schedules import EDM
        >>> denoiser = Clipped(Denoiser(lambda x, time: 2.0 * x, EDM(), predicts="data"))
        >>> denoiser(torch.tensor([[0.25, 3.0]]), 1.0).tolist(), denoiser.schedule.t_start
        ([[0.5, 1.0]], 80.0)
    """

    def __init__(self, denoiser: Callable[..., Tensor], low: float = -1.0, high: float = 1.0):
        super().__init__(denoiser)
        if not low < high:
            raise ValueError(f"low must be less than high, got {low:g} and {high:g}.")
        self.low, self.high = float(low), float(high)

    def __repr__(self) -> str:
        return f"Clipped({self.denoiser!r}, {self.low:g}, {self.high:g})"

    @property
    def limits(self) -> dict[str, Any]:
        """What tells these limits from others, as JSON values."""
        return {"kind": "clipped", "low": self.low, "high": self.high}

    def _limit(self, d: Tensor) -> Tensor:
        return d.clamp(self.low, self.high)


class DynamicThreshold(_Limited):
    """Dynamic thresholding: of every sample, s is a quantile of the absolute values of its data prediction, at least `limit`; the
    prediction is clipped to [-s, s] and scaled to [-limit, limit].

    Where few values leave the range this is clipping; where many do, as with strong guidance, the sample is scaled instead.

    Args:
        denoiser: ``D(x, t, **cond)``.
        quantile: 0.995 is the value of Imagen's readers; the paper names none.
        limit: data lie in [-limit, limit].
        ceiling: the largest s, if any; what lies beyond is clipped away. With ``ceiling=limit`` this is `Clipped`, and so is the
            default of diffusers.

    Raises:
        ValueError: for a quantile outside [0, 1], or a ceiling below a positive limit.

    Example:
        >>> from fewstep.schedules import EDM
        >>> denoiser = DynamicThreshold(Denoiser(lambda x, time: 2.0 * x, EDM(), predicts="data"), quantile=1.0)
        >>> denoiser(torch.tensor([[0.25, 1.0], [0.25, 0.5]]), 1.0).tolist()
        [[0.25, 1.0], [0.5, 1.0]]
    """

    def __init__(self, denoiser: Callable[..., Tensor], quantile: float = 0.995, *, limit: float = 1.0, ceiling: float = math.inf):
        super().__init__(denoiser)
        if not 0.0 <= quantile <= 1.0:
            raise ValueError(f"the quantile must lie in [0, 1], got {quantile:g}.")
        if not 0.0 < limit <= ceiling:
            raise ValueError(f"the limit must be positive and the ceiling at least that, got {limit:g} and {ceiling:g}.")
        self.quantile, self.limit, self.ceiling = float(quantile), float(limit), float(ceiling)

    def __repr__(self) -> str:
        return f"DynamicThreshold({self.denoiser!r}, {self.quantile:g}, limit={self.limit:g}, ceiling={self.ceiling:g})"

    @property
    def limits(self) -> dict[str, Any]:
        """What tells these limits from others, as JSON values."""
        ceiling = self.ceiling if math.isfinite(self.ceiling) else None
        return {"kind": "dynamic threshold", "quantile": self.quantile, "limit": self.limit, "ceiling": ceiling}

    def _limit(self, d: Tensor) -> Tensor:
        flat = d.flatten(1)
        s = _quantile(flat.abs().to(torch.promote_types(d.dtype, torch.float32)), self.quantile)
        s = s.clamp(self.limit, self.ceiling).to(d.dtype)[:, None]
        return (torch.maximum(torch.minimum(flat, s), -s) * (self.limit / s)).reshape(d.shape)


def _quantile(values: Tensor, q: float) -> Tensor:
    """The quantile of every row ``"batch n"``, interpolated linearly, whatever the number of elements."""
    if values.numel() <= LARGEST_QUANTILE:
        return torch.quantile(values, q, dim=1)
    place = q * (values.shape[1] - 1)
    below = math.floor(place)
    low = values.kthvalue(below + 1, dim=1).values
    high = values.kthvalue(min(below + 2, values.shape[1]), dim=1).values
    return torch.lerp(low, high, place - below)


def check_conditions(denoiser: object, cond: Mapping[str, Any], count: int) -> None:
    """Conditions that a model says it takes: their names, one whole number or embedding a sample, and, where that reads no device, the
    range of numbers.

    Raises:
        PlanError: for a condition that the model does not have or cannot take.
    """
    info = getattr(denoiser, "info", None)
    if getattr(info, "embeddings", ()):
        _check_embeddings(denoiser, info.embeddings, cond, count)  # type: ignore[union-attr]
    known = getattr(info, "conditions", None)
    if not known:
        return
    for name, value in cond.items():
        if name not in known:
            raise PlanError(f"this model has no condition {name!r}; it takes {', '.join(map(repr, known))}.")
        if isinstance(value, int):
            _check_range(name, torch.tensor(value), known[name])
        if not isinstance(value, Tensor) or value.is_floating_point() or value.shape not in ((), (count,)):
            raise PlanError(
                f"the condition {name!r} must be a tensor of {count} whole numbers, one a sample, for example "
                f"{_tensor_like(value, count)}; got {_told_condition(value)}."
            )
        if value.device.type == "cpu":
            _check_range(name, value, known[name])


def _check_embeddings(denoiser: object, names: tuple[str, ...], cond: Mapping[str, Any], count: int) -> None:
    takes = f"this model takes {', '.join(map(repr, names))}, a tensor with one entry a sample" + (
        "" if len(names) == 1 else " each"
    )
    if innermost(denoiser, "takes_prompts"):
        takes += "; cond, null = den.encode(prompts) makes them, of one prompt a sample"
    if missing := [name for name in names if name not in cond]:
        got = ", ".join(map(repr, cond)) or "no conditions"
        raise PlanError(f"got {got}, but {missing[0]!r} must be given: {takes}.")
    for name in names:
        if not isinstance(cond[name], Tensor) or not cond[name].ndim:
            raise PlanError(f"the condition {name!r} is {_told_condition(cond[name])}: {takes}.")
        if len(cond[name]) != count:
            many = f"{count} sample{'s' * (count != 1)}, but {name!r} for {len(cond[name])}"
            raise PlanError(f"{many}: give as many of both. {takes[0].upper()}{takes[1:]}.")


def _check_range(name: str, value: Tensor, known: Mapping[str, int]) -> None:
    wrong = value[(value < 0) | (value > known.get("null", known["classes"] - 1))]
    if len(wrong):
        null = f"; {known['null']} stands for none" if "null" in known else ""
        raise PlanError(f"the condition {name!r} cannot be {int(wrong[0])}: it has {known['classes']} classes, from 0{null}.")


def _told_condition(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, int) else type(value).__name__


def _tensor_like(value: object, count: int) -> str:
    """How to write what was probably meant."""
    if isinstance(value, (list, tuple)) and len(value) == count:
        return "torch.tensor([...])"
    return f"torch.full(({count},), {value if isinstance(value, int) else 0})"
