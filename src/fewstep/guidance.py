r"""Guidance: functions from denoiser to denoiser.

`ClassifierFree` extrapolates from the unconditional to the conditional data prediction,

$$ D_w(x, t \mid c) = D(x, t \mid \varnothing) + w \, \bigl( D(x, t \mid c) - D(x, t \mid \varnothing) \bigr), $$

so w = 1 is the conditional model, w = 0 the unconditional one. ("Classifier-Free Diffusion Guidance", arXiv 2207.12598, writes the noise
predictions with $w' = w - 1$ in eq. 6; both forms are the same map, because the weights of the two predictions add up to 1.) It may be
limited to an interval of noise levels, outside which the conditional model is used alone ("Applying Guidance in a Limited Interval
Improves Sample and Distribution Quality in Diffusion Models", arXiv 2404.07724).

`Distilled` is for networks that learnt the guided prediction and take w as a condition ("On Distillation of Guided Diffusion Models", arXiv
2210.03142).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.denoisers import Around, ModelInfo
from fewstep.schedules import NoiseSchedule

__all__ = ["ClassifierFree", "Distilled", "check_null", "null_like"]

Time = float | Tensor | NDArray[np.float64]


class ClassifierFree:
    """A denoiser with classifier-free guidance.

    Args:
        denoiser: ``D(x, t, **cond)`` with a ``schedule``.
        guidance_scale: w, finite; 1 means none.
        null: for every condition to be guided, its name and the value that stands for "no condition": a number, or a tensor of the
            shape of one sample's condition or of the whole batch's. The other conditions go to both halves of the pair unchanged.
        interval: (t_low, t_high), times of the schedule. Guidance acts where t_low < t <= t_high; elsewhere the conditional model is
            called alone. For an interval of sigma / alpha, as in the paper, ``t = schedule.t_of_lam(-log(sigma / alpha))``.
        batched: make one call on the pair, put together along the batch. Tensors among the conditions whose first dimension is
            the batch are put together as well, inside dictionaries, lists and tuples too; what else there is, is passed on as it is. A
            guided condition given as a number becomes a vector ``"batch"``. Otherwise two calls are made: half the memory.

    Attributes:
        schedule: that of the denoiser.
        calls: how many predictions have been made; a guided pair counts as one.
        guidance: the settings as JSON values, for the provenance of what is made with them.

    Raises:
        ValueError: for a scale that is not finite, a reversed interval, an empty `null`.
        TypeError: for a null that is neither a number nor a tensor.

    Example:
        >>> from fewstep.exact import GaussianMixture
        >>> from fewstep.schedules import Flow
        >>> exact = GaussianMixture(Flow(), [[-1.0], [1.0]], 0.01)
        >>> guided = ClassifierFree(exact, 1.5, {"label": -1})
        >>> guided(torch.zeros(2, 1), 1.0, label=torch.tensor([0, 1])).tolist(), guided.calls, exact.calls
        ([[-1.5], [1.5]], 1, 1)
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        guidance_scale: float,
        null: Mapping[str, float | Tensor],
        *,
        interval: tuple[float, float] | None = None,
        batched: bool = True,
    ):
        schedule = getattr(denoiser, "schedule", None)
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"{type(denoiser).__name__} has no noise schedule. Wrap the network in fewstep.Denoiser first.")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {guidance_scale}.")
        self.denoiser = denoiser
        self.schedule = schedule
        self.guidance_scale = float(guidance_scale)
        self.null = check_null(null)
        self.interval = None if interval is None else _checked_interval(interval)
        self.batched = batched
        self.calls = 0
        self._moved: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __repr__(self) -> str:
        within = "" if self.interval is None else f", interval={self.interval}"
        return f"ClassifierFree({self.denoiser!r}, guidance_scale={self.guidance_scale:g}, null={sorted(self.null)}{within})"

    @property
    def guidance(self) -> dict[str, Any]:
        """The settings as JSON values. A tensor is told by its shape and a digest of its numbers."""
        return {
            "kind": "classifier-free",
            "guidance_scale": self.guidance_scale,
            "null": {name: _described(value) for name, value in self.null.items()},
            "interval": None if self.interval is None else list(self.interval),
        }

    def with_scale(self, guidance_scale: float) -> ClassifierFree:
        """The same guidance of the same denoiser, with another scale."""
        return ClassifierFree(self.denoiser, guidance_scale, self.null, interval=self.interval, batched=self.batched)

    @property
    def info(self) -> ModelInfo:
        """What is known of the model."""
        return self.denoiser.info  # type: ignore[attr-defined]

    @property
    def jumps(self) -> tuple[float, ...]:
        """Times at which the prediction jumps: the ends of the interval. `fewstep.reference` ends its steps there."""
        return (*getattr(self.denoiser, "jumps", ()), *(self.interval or ()))

    def __call__(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """The guided data prediction.

        Args:
            x: ``Float[Tensor, "batch *shape"]``.
            t: a time, or one per sample ``"batch"``.
            **cond: the conditions, those of `null` among them.

        Raises:
            ValueError: if a condition of `null` is missing, or its shape does not fit.
        """
        missing = sorted(self.null.keys() - cond.keys())
        if missing:
            raise ValueError(
                f"guidance needs the condition {missing[0]!r}, whose null was given, but got {sorted(cond) or 'no condition'}. "
                f"Pass it, or leave it out of null."
            )
        self.calls += 1
        each = isinstance(t, (Tensor, np.ndarray)) and t.ndim > 0
        if self.guidance_scale == 1.0 or not (each or self._inside(t)):
            return self.denoiser(x, t, **cond)
        without = {name: self._null_like(name, cond[name], len(x)) for name in self.null}
        if self.guidance_scale == 0.0 and not (each and self.interval):
            return self.denoiser(x, t, **{**cond, **without})
        free, conditional = self._pair(x, t, cond, without)
        guided = torch.add(free, conditional - free, alpha=self.guidance_scale)
        if not each or self.interval is None:
            return guided
        times = torch.as_tensor(t, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        low, high = self.interval
        return torch.where((low < times) & (times <= high), guided, conditional)

    def _inside(self, t: Time) -> bool:
        return self.interval is None or self.interval[0] < float(t) <= self.interval[1]

    def _pair(self, x: Tensor, t: Time, cond: dict[str, Any], without: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The unconditional and the conditional prediction."""
        if not self.batched:
            return self.denoiser(x, t, **{**cond, **without}), self.denoiser(x, t, **cond)
        batch = len(x)
        both = {name: _doubled(value, batch) for name, value in cond.items() if name not in without}
        for name, value in without.items():
            both[name] = torch.cat([_vector(name, value, x), _vector(name, cond[name], x)])
        twice = self.denoiser(torch.cat([x, x]), _doubled(t, batch), **both)
        return twice[:batch], twice[batch:]

    def _null_like(self, name: str, value: Any, batch: int) -> Any:
        """The null of a condition, in the form in which the condition came."""
        null = self.null[name]
        on = self._null_on(name, null, value) if isinstance(null, Tensor) and isinstance(value, Tensor) else null
        return null_like(name, on, value, batch)

    def _null_on(self, name: str, null: Tensor, value: Tensor) -> Tensor:
        """The null on the condition's device and in its precision, moved there once."""
        key = (name, value.device, value.dtype)
        if key not in self._moved:
            self._moved[key] = null.to(value.device, value.dtype)
        return self._moved[key]


class Distilled(Around):
    """A network that takes the guidance scale as a condition, at one scale.

    Args:
        denoiser: ``D(x, t, **cond)`` with a ``schedule``, which takes the condition ``guidance``, ``"batch"``.
        guidance_scale: w, finite.

    Attributes:
        schedule: that of the denoiser.
        guidance: the settings as JSON values.

    Raises:
        ValueError: for a scale that is not finite.
    """

    def __init__(self, denoiser: Callable[..., Tensor], guidance_scale: float):
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {guidance_scale}.")
        super().__init__(denoiser)
        self.guidance_scale = float(guidance_scale)

    def __repr__(self) -> str:
        return f"Distilled({self.denoiser!r}, guidance_scale={self.guidance_scale:g})"

    @property
    def guidance(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {"kind": "distilled", "guidance_scale": self.guidance_scale}

    def __call__(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """The data prediction ``"batch *shape"`` under this scale."""
        return self.denoiser(x, t, **cond, guidance=x.new_full((len(x),), self.guidance_scale, dtype=torch.float32))


def null_like(name: str, null: float | Tensor, value: Any, batch: int) -> Any:
    """The null of a condition in the form of its value, a tensor for one sample or for a batch.

    Raises:
        ValueError: if their shapes do not fit.

    Example:
        >>> null_like("label", 10, torch.tensor([3, 4]), 2).tolist()
        [10, 10]
    """
    if not isinstance(value, Tensor):
        return null
    if not isinstance(null, Tensor):
        return torch.full_like(value, null)
    if null.shape == value.shape:
        return null
    if value.ndim and len(value) == batch and null.shape == value.shape[1:]:
        return null.expand_as(value)
    raise ValueError(
        f"the null of {name!r} has shape {tuple(null.shape)}, but the condition {tuple(value.shape)}. "
        f"Give it the shape of one sample's condition or of the batch's."
    )


def check_null(null: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
    """The values that stand for "no condition", by the names of the conditions.

    Raises:
        ValueError: if there are none.
        TypeError: for a value that is neither a number nor a tensor.
    """
    if not null:
        raise ValueError("null is empty, so there is nothing to guide. Give the null value of a condition, e.g. {'label': 1000}.")
    for name, value in null.items():
        if not isinstance(value, (int, float, Tensor)):
            raise TypeError(f"the null of {name!r} must be a number or a tensor, got {type(value).__name__}.")
    return dict(null)


def _checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = (float(time) for time in interval)
    if not low < high:
        raise ValueError(f"interval must be (t_low, t_high) with t_low < t_high, got ({low:g}, {high:g}).")
    return low, high


def _doubled(value: Any, batch: int) -> Any:
    """Put together with itself along the batch, where it has one."""
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.ndim and len(value) == batch else value
    if isinstance(value, np.ndarray):
        return np.concatenate([value, value]) if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {key: _doubled(item, batch) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_doubled(item, batch) for item in value)
    return value


def _vector(name: str, value: Any, x: Tensor) -> Tensor:
    """A guided condition with its batch: ``"batch ..."``."""
    if isinstance(value, Tensor) and value.ndim and len(value) == len(x):
        return value
    if isinstance(value, (int, float)):
        return torch.full((len(x),), value, device=x.device, dtype=torch.int64 if isinstance(value, int) else x.dtype)
    what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"the condition {name!r} is {what}, which cannot be put together with its null for a batch of {len(x)}. "
        f"Give it one entry a sample, or use batched=False."
    )


def _described(value: float | Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    numbers = np.ascontiguousarray(value.detach().cpu().double().numpy())
    return {"shape": list(value.shape), "sha256": hashlib.sha256(numbers.tobytes()).hexdigest()}
