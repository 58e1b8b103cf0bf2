"""Targets for `fewstep.steer.optimize_noise`: losses of clean samples, ``"batch *shape" -> "batch"``, differentiable.

Any function that does the same may stand in: a pitch, a caption's similarity, the loudness of a decoded latent.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.evaluate.features import CLASSIFIER
from fewstep.models import SmallClassifier, read_classifier

__all__ = ["TARGETS", "ClassTarget", "IntensityTarget", "MaskedPixels"]


@dataclass(frozen=True, eq=False)
class MaskedPixels:
    """Pixels that are given: the mean squared difference where the mask is 1. Inpainting is the rest of the picture.

    Args:
        values: ``"*shape"`` or ``"batch *shape"``, in the model's range.
        mask: that broadcasts to ``"*shape"``, 1 where pixels are given.

    Raises:
        ValueError: for a mask that is nowhere 1, or does not fit.

    Example:
        >>> mask = torch.tensor([1.0, 0.0])
        >>> MaskedPixels(torch.tensor([0.5, 9.0]), mask)(torch.zeros(1, 2)).tolist()
        [0.25]
    """

    values: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        try:
            whole = torch.broadcast_to(self.mask, self.values.shape)
        except RuntimeError:
            raise ValueError(f"a mask of shape {tuple(self.mask.shape)} does not fit values {tuple(self.values.shape)}.") from None
        if not bool((whole > 0).any()):
            raise ValueError("the mask is nowhere 1, so no pixel is given.")

    def __call__(self, x: Tensor) -> Tensor:
        values = self.values.to(x)
        mask = torch.broadcast_to(self.mask.to(x), x.shape)
        return ((x - values).square() * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


@dataclass(frozen=True, eq=False)
class ClassTarget:
    """A class: the cross-entropy of a classifier.

    Args:
        label: the class; a number, or one a sample ``"batch"``.
        classifier: ``samples -> logits "batch classes"``; None for the shipped one of digits.

    Example:
        >>> ClassTarget(3)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2])
    """

    label: int | Tensor
    classifier: Any = field(default=None, repr=False)

    def __call__(self, x: Tensor) -> Tensor:
        if self.classifier is None and tuple(x.shape[1:]) != SmallClassifier.shape:
            raise ValueError(f"the classifier of digits sees samples of shape {SmallClassifier.shape}, got {tuple(x.shape[1:])}.")
        logits = _digits()(x.float()) if self.classifier is None else self.classifier(x)
        label = torch.as_tensor(self.label, device=x.device).expand(len(x))
        return functional.cross_entropy(logits, label, reduction="none").to(x.dtype)


@functools.cache
def _digits() -> nn.Module:
    return read_classifier(CLASSIFIER)[0].eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class IntensityTarget:
    """A curve of mean intensity: along one axis of a sample, the mean over all others is to be this; as loudness over time in music.

    Args:
        curve: ``"length"``, or one number for all of it.
        axis: of a sample, without the batch: 1 for the rows of a picture, 2 for its columns; or of the bands of a spectrum.
        tolerance: differences up to this cost nothing.

    Raises:
        ValueError: for a negative tolerance.

    Example:
        >>> IntensityTarget(torch.tensor([0.0, 1.0]), axis=1)(torch.zeros(1, 1, 2, 2)).tolist()
        [0.5]
    """

    curve: Tensor = field(repr=False)
    axis: int = 1
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not self.tolerance >= 0.0:
            raise ValueError(f"the tolerance must be at least 0, got {self.tolerance}.")

    def __call__(self, x: Tensor) -> Tensor:
        axis = self.axis % (x.ndim - 1) + 1
        others = [k for k in range(1, x.ndim) if k != axis]
        found = x.mean(others) if others else x
        difference = (found - self.curve.to(x).expand(found.shape)).abs()
        return (difference - self.tolerance).clamp(min=0.0).square().mean(1)


TARGETS = {"inpaint": MaskedPixels, "class": ClassTarget, "intensity": IntensityTarget}
"""Name -> target, for the command line."""
