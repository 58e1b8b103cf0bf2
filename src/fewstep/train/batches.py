"""The batches of a training run: which rows step s has, and which part of them belongs to one piece of the step.

Data are tensors or a sequence of rows, from which every epoch takes each row once in a new random order; or a function that draws a batch.
The batch of a step is decided for all processes together, and cut: pieces have different rows, whoever works them out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.train.randomness import make_generator

__all__ = ["Batch", "Batches", "Data", "Rows"]

Batch = Mapping[str, Tensor]


@runtime_checkable
class Rows(Protocol):
    """Data that are read when they are needed: ``len(data)`` rows, and ``data[rows]``, a batch of those that a tensor of indices names."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Batch: ...


Data = Mapping[str, Tensor] | Rows | Callable[[int, torch.Generator], Batch]


class Batches:
    """The batches of one run.

    Args:
        data: tensors of equal first dimension, `Rows`, or a function ``(batch_size, generator) -> batch``.
        size: samples in a step.
        seed: of the order of the rows, and of what the function draws.
    """

    def __init__(self, data: Data, size: int, seed: int):
        self.data: Any = _check(data)
        self.size, self.seed = size, seed

    def piece(self, step: int, first: int, last: int) -> dict[str, Tensor]:
        """Samples first to last - 1 of the batch of a step. A function draws the whole batch for it."""
        if isinstance(self.data, Mapping):
            rows = self._rows(step, len(next(iter(self.data.values()))))[first:last]
            return {name: values[rows] for name, values in self.data.items()}
        if not callable(self.data):
            return dict(self.data[self._rows(step, len(self.data))[first:last]])
        whole: Any = self.data(self.size, make_generator(self.seed, "data", step))
        return {name: values[first:last] for name, values in whole.items()}

    def not_finite(self, step: int) -> str | None:
        """The name of a tensor in the batch of a step that has values which are not finite, if there is one."""
        whole = self.piece(step, 0, self.size)
        return next((name for name, v in whole.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())), None)

    def told(self) -> Any:
        """The data as JSON values, for comparison with those of a checkpoint."""
        if isinstance(self.data, Mapping):
            return {name: [str(value.dtype), *value.shape] for name, value in self.data.items()}
        told = self.data.told if hasattr(self.data, "told") else None  # type: ignore[union-attr]
        if told is not None:
            return told()
        name = getattr(self.data, "__qualname__", type(self.data).__qualname__)
        return name if callable(self.data) else [name, len(self.data)]

    def _rows(self, step: int, count: int) -> Tensor:
        return rows_of(count, self.size, self.seed, step)


def rows_of(count: int, size: int, seed: int, step: int) -> Tensor:
    """Rows of one batch: the s-th piece of one shuffle of all rows after another.

    Example:
        >>> sorted(torch.cat([rows_of(6, 2, 0, step) for step in (1, 2, 3)]).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    first, last = (step - 1) * size, step * size
    epochs = range(first // count, (last - 1) // count + 1)
    order = torch.cat([_shuffle(count, seed, epoch) for epoch in epochs])
    return order[first - epochs.start * count :][:size]


@functools.lru_cache(maxsize=4)
def _shuffle(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=make_generator(seed, "shuffle", epoch))


def _check(data: Any) -> Any:
    if callable(data):
        return data
    wanted = "data must map names to tensors of equal length, be a sequence of rows, or a function (batch_size, generator) -> batch"
    if type(data).__module__ == "numpy":
        raise TypeError(f'{wanted}; got a NumPy array: pass {{"x": torch.from_numpy(data)}}.')
    if isinstance(data, Tensor):
        raise TypeError(f'{wanted}; got a tensor: pass {{"x": data}}.')
    if not isinstance(data, Mapping):
        if isinstance(data, Rows) and not isinstance(data, (Tensor, str, list, tuple)):
            if not len(data):
                raise ValueError("the data have no rows.")
            return data
        raise ValueError(f"{wanted}; got {type(data).__name__}.")
    for name, value in data.items():
        if type(value).__module__ == "numpy":
            raise TypeError(f"{wanted}; {name!r} is a NumPy array: pass torch.from_numpy(...).")
    if not data or not all(isinstance(value, Tensor) and value.ndim for value in data.values()):
        raise ValueError(f"{wanted}.")
    lengths = {name: len(value) for name, value in data.items()}
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        raise ValueError(f"the tensors of data must have one equal first dimension of at least 1, got {lengths}.")
    return data
