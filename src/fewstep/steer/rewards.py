"""Rewards by name, for the command line and for tests of methods: functions ``reward(x, **cond) -> "batch"`` of clean samples.

- ``ink``: how much of a picture is bright, from 0 to 1: the mean of (x + 1) / 2.
- ``classifier``: log-probability of the class that was asked for, by the shipped classifier of digits; ``classifier:3``: of class 3.
- ``contrast``: standard deviation of a picture's pixels.
- ``package.module:function``: a function of your own, by its import path.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from fewstep.errors import UnknownNameError
from fewstep.evaluate.features import CLASSIFIER
from fewstep.models import SmallClassifier, read_classifier

__all__ = ["REWARDS", "Classified", "contrast", "ink", "make_reward"]

Reward = Callable[..., Tensor]


def ink(x: Tensor, **cond: Any) -> Tensor:
    """How bright pictures in [-1, 1] are, 0 to 1: ``"batch"``.

    Example:
        >>> import torch
        >>> ink(torch.zeros(2, 1, 8, 8)).tolist()
        [0.5, 0.5]
    """
    return (0.5 * (x.clamp(-1.0, 1.0) + 1.0)).flatten(1).mean(1)


def contrast(x: Tensor, **cond: Any) -> Tensor:
    """Standard deviation of the pixels of each picture: ``"batch"``."""
    return x.flatten(1).std(1)


class Classified:
    """Log-probability of a class by the shipped classifier of digits.

    Args:
        label: the class; None for the one that was asked for, the condition ``label``.

    Raises:
        ValueError: for a class that there is not.

    Example:
        >>> import torch
        >>> Classified(3)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2])
    """

    def __init__(self, label: int | None = None):
        if label is not None and not 0 <= label < 10:
            raise ValueError(f"the classifier of digits knows the classes 0 to 9, not {label}.")
        self.label = label

    def __repr__(self) -> str:
        return f"Classified({self.label})"

    def __call__(self, x: Tensor, *, label: Tensor | None = None, **cond: Any) -> Tensor:
        if tuple(x.shape[1:]) != SmallClassifier.shape:
            raise ValueError(f"the classifier of digits sees samples of shape {SmallClassifier.shape}, got {tuple(x.shape[1:])}.")
        if self.label is None and label is None:
            raise ValueError("no class was asked for: give the condition label, or a reward like classifier:3.")
        logits = _network()(x.float().clamp(-1.0, 1.0)).log_softmax(1).to(x.dtype)
        if self.label is not None:
            return logits[:, self.label]
        assert label is not None
        return logits.gather(1, label[:, None])[:, 0]


@functools.cache
def _network() -> SmallClassifier:
    return read_classifier(CLASSIFIER)[0].eval().requires_grad_(False)


REWARDS: dict[str, Callable[[], Reward]] = {"ink": lambda: ink, "contrast": lambda: contrast, "classifier": Classified}
"""Name -> what makes the reward."""


def make_reward(name: str) -> Reward:
    """A reward by its name, or by the import path ``package.module:function``.

    Raises:
        UnknownNameError: for a name that there is not.
        ValueError: for a path that leads to no function.

    Example:
        >>> make_reward("classifier:3")
        Classified(3)
    """
    if name in REWARDS:
        return REWARDS[name]()
    head, _, tail = name.partition(":")
    if head == "classifier" and tail.isdigit():
        return Classified(int(tail))
    if not tail:
        raise UnknownNameError("reward", name, [*REWARDS, "classifier:LABEL", "package.module:function"])
    try:
        found: Any = getattr(importlib.import_module(head), tail)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no reward {name}: {error}. It is found by its import path, package.module:function.") from error
    if not callable(found):
        raise ValueError(
            f"{name} is no function but a {type(found).__name__}; a reward is reward(x, **cond) -> one number a sample."
        )
    return cast(Reward, found)
