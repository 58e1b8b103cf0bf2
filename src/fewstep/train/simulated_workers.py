"""K workers in one process: Local SGD without a second process, for experiments and tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fewstep.train.groups import Fill, WorkerGroup

__all__ = ["SimulatedWorkers"]


class SimulatedWorkers(WorkerGroup):
    """K workers in one process. They take turns: K calls of ``step()`` are one step of all, with the learning rate of the first.

    Before each call the model holds the parameters of the worker whose turn it is, `current`. Buffers, such as the running statistics of
    batch normalisation, are shared.

    Args:
        count: K.

    Example:
        >>> from fewstep.train import ConstantH, LocalOptimizer
        >>> x = torch.zeros(1, requires_grad=True)
        >>> workers = SimulatedWorkers(2)
        >>> optimizer = LocalOptimizer(torch.optim.SGD([x], lr=0.5), ConstantH(2, total_steps=2), workers)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     ((x - (1.0, 3.0)[workers.current]) ** 2 / 2).sum().backward()
        ...     optimizer.step()
        >>> x.item()                              # the mean of 0.75 and 2.25
        1.5
    """

    real = False

    def __init__(self, count: int):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"SimulatedWorkers needs a whole number of at least 1, got {count!r}.")
        self.count, self.current = count, 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.weights: list[list[Tensor]] = []
        self.states: list[dict[Tensor, Any]] = []
        self.rates: list[Any] = []

    @property
    def size(self) -> int:
        return self.count

    @property
    def index(self) -> int:
        return self.current

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        if self.optimizer is not None:
            raise ValueError("these SimulatedWorkers belong to another optimizer; make new ones.")
        self.optimizer = optimizer
        self.weights = [[p.detach().clone() for p in self._parameters()] for _ in range(self.count)]
        self.states = [
            {p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()} for p, kept in optimizer.state.items()}
            for _ in range(self.count)
        ]

    def total(self, fill: Fill) -> tuple[list[Tensor], int]:
        sums: list[Tensor] = []

        def add() -> None:
            tensors = fill()
            sums[:] = [a + b for a, b in zip(sums, tensors, strict=True)] if sums else tensors

        self.each(add)
        return sums, 1

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        groups = self._optimizer().param_groups
        given = [group["lr"] for group in groups]
        self.rates = given if self.current == 0 or not self.rates else self.rates
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate in zip(groups, given, strict=True):
                group["lr"] = rate

    def advance(self) -> bool:
        self._enter((self.current + 1) % self.count)
        return self.current == 0

    def each(self, act: Callable[[], None]) -> None:
        for _ in range(self.count):
            act()
            self._enter((self.current + 1) % self.count)

    def state(self) -> list[dict[str, Any]]:
        """The turn; then, a worker after another, parameters and states of each."""
        self._enter(self.current)
        entries: list[dict[str, Any]] = [{"current": self.current, **{f"rate {i}": float(r) for i, r in enumerate(self.rates)}}]
        for weights, states in zip(self.weights, self.states, strict=True):
            pairs = zip(self._parameters(), weights, strict=True)
            entries += [{"weight": w.clone(), **{f"state {k}": v for k, v in states.get(p, {}).items()}} for p, w in pairs]
        return entries

    def restore(self, state: list[dict[str, Any]]) -> None:
        parameters = self._parameters()
        if len(state) != 1 + self.count * len(parameters):
            raise ValueError(
                f"a state of {self.count} simulated workers has {1 + self.count * len(parameters)} entries, got {len(state)}."
            )
        turn, entries = state[0], iter(state[1:])
        for weights, states in zip(self.weights, self.states, strict=True):
            for parameter, weight in zip(parameters, weights, strict=True):
                entry = dict(next(entries))
                weight.copy_(entry.pop("weight"))
                kept = {name.removeprefix("state "): _like(value, parameter) for name, value in entry.items()}
                states.pop(parameter, None)
                states.update({parameter: kept} if kept else {})
        self.rates = [turn[f"rate {i}"] for i in range(len(turn) - 1)]
        self.current = int(turn["current"])
        self._load()

    def _enter(self, worker: int) -> None:
        """Put the current worker's parameters and states away, and take out another's."""
        state = self._optimizer().state
        for weight, parameter in zip(self.weights[self.current], self._parameters(), strict=True):
            weight.copy_(parameter.detach())
        self.states[self.current] = dict(state)
        if worker != self.current:
            self.current = worker
            self._load()

    @torch.no_grad()
    def _load(self) -> None:
        state = self._optimizer().state
        for weight, parameter in zip(self.weights[self.current], self._parameters(), strict=True):
            parameter.copy_(weight)
        state.clear()
        state.update(self.states[self.current])

    def _optimizer(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None, "attach() comes first"
        return self.optimizer

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer().param_groups for parameter in group["params"]]


def _like(value: Any, parameter: Tensor) -> Any:
    """A restored state, on the parameter's device unless it is a scalar, as optimizers keep their count of steps."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)
