"""Conditions of several requests in one network call.

Conditions are a tree of dictionaries, lists and tuples. A leaf has one row a sample, then the leaves of several requests are put together,
or it is shared by the samples of its request, then only requests whose shared leaves are equal can be in one call. `key` tells which can.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Rows", "key", "mark", "merge", "take"]

READ = 4096
"""A shared tensor on the host with at most so many elements is told by its numbers, others by which object they are."""


class Rows(NamedTuple):
    """A leaf with one row a sample."""

    value: Any


def mark(value: Any, count: int, device: torch.device) -> Any:
    """The tree with leaves of one row a sample as `Rows`, tensors on the device. A tensor that is there already stays the same object, by
    which `key` knows a large one that several requests share.

    Example:
        >>> mark({"label": torch.tensor([1, 2]), "scale": 3.0}, 2, torch.device("cpu"))
        {'label': Rows(value=tensor([1, 2])), 'scale': 3.0}
    """
    if isinstance(value, Mapping):
        return {name: mark(item, count, device) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mark(item, count, device) for item in value)
    if isinstance(value, (Tensor, np.ndarray)):
        there = _moved(value, device) if isinstance(value, Tensor) else value
        return Rows(there) if value.ndim and len(value) == count else there
    return value


def _moved(value: Tensor, device: torch.device) -> Tensor:
    there = value.device.type == device.type and device.index in (None, value.device.index)
    return value if there and not value.requires_grad else value.detach().to(device)


def key(tree: Any) -> Hashable:
    """Equal for trees that `merge` can put together.

    Example:
        >>> cpu = torch.device("cpu")
        >>> one, two = (mark({"label": torch.arange(n)}, n, cpu) for n in (1, 2))
        >>> key(one) == key(two), key(one) == key(mark({"label": torch.zeros(1)}, 1, cpu))
        (True, False)
    """
    if isinstance(tree, Rows):
        return "rows", type(tree.value).__name__, tuple(tree.value.shape[1:]), str(tree.value.dtype)
    if isinstance(tree, dict):
        return "mapping", tuple((name, key(tree[name])) for name in sorted(tree, key=str))
    if type(tree) in (list, tuple):
        return type(tree).__name__, tuple(map(key, tree))
    if isinstance(tree, Tensor) and tree.device.type == "cpu" and tree.numel() <= READ:
        return "tensor", tuple(tree.shape), str(tree.dtype), repr(tree.tolist())
    if isinstance(tree, (bool, int, float, str, bytes, type(None))):
        return type(tree).__name__, tree
    return "object", id(tree)  # which the request keeps alive


def take(tree: Any, low: int, high: int) -> Any:
    """The tree of samples low to high - 1 of a request."""
    if isinstance(tree, Rows):
        return Rows(tree.value[low:high])
    if isinstance(tree, dict):
        return {name: take(item, low, high) for name, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(take(item, low, high) for item in tree)
    return tree


def merge(trees: Sequence[Any]) -> Any:
    """Trees of equal `key`, put together sample by sample, as the network takes them.

    Example:
        >>> cpu = torch.device("cpu")
        >>> merge([mark({"label": torch.tensor(labels)}, len(labels), cpu) for labels in ([1, 2], [7])])
        {'label': tensor([1, 2, 7])}
    """
    first = trees[0]
    if isinstance(first, Rows):
        if len(trees) == 1:
            return first.value
        values = [tree.value for tree in trees]
        return torch.cat(values) if isinstance(first.value, Tensor) else np.concatenate(values)
    if isinstance(first, dict):
        return {name: merge([tree[name] for tree in trees]) for name in first}
    if type(first) in (list, tuple):
        return type(first)(merge([tree[k] for tree in trees]) for k in range(len(first)))
    return first
