"""Requests on their way through an engine: `Job`, one request, and `Piece`, some of its samples that have made as many calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import NetworkError
from fewstep.noise import BrownianPath, draw_noise
from fewstep.sampler import Step, advance, open_memory, transform_start
from fewstep.serve.conditions import key, take
from fewstep.serve.requests import Preview, Ticket
from fewstep.serve.transfer import to_device

__all__ = ["Job", "Piece"]


@dataclass(eq=False)
class Job:
    """One request, checked.

    Args:
        ticket: where its result goes.
        steps: of `fewstep.sampler.prepare`.
        seeds: one a sample.
        conditional, free: conditions as `fewstep.serve.conditions.mark` gives them, and the same with nulls; None where the network is not
            asked for that prediction.
        kind: its queue.
        arrival: number in order of arrival.
    """

    ticket: Ticket
    steps: list[Step]
    seeds: list[int]
    conditional: Any
    free: Any
    kind: str
    arrival: int
    compatible: Hashable = field(init=False)
    """Jobs for which this is equal can be in one network call."""

    def __post_init__(self) -> None:
        self.plan = self.ticket.request.plan
        self.guidance = float(self.ticket.request.guidance)
        self.compatible = key(self.free if self.conditional is None else self.conditional)
        self._noise: Tensor | None = None
        self._begun = 0
        self._parts: dict[int, Tensor] = {}
        self._shown: dict[int, dict[int, Tensor]] = {}

    @property
    def cost(self) -> int:
        """Rows a sample."""
        return (self.conditional is not None) + (self.free is not None)

    def start(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """z_0 of samples low to high - 1, asked for once. Made for all at once, as `fewstep.sample` does, and kept until all are begun."""
        if self._noise is None:
            noise = draw_noise(shape, self.seeds, self.plan, dtype=dtype)
            self._noise = transform_start(self.plan, to_device(noise, device))
        x = self._noise[low:high]
        self._begun += high - low
        if self._begun == len(self.seeds):
            self._noise = None
        return x

    def deliver(self, low: int, samples: Tensor) -> None:
        """Finished samples from number `low` on, on the host. The last ones end the request."""
        bad = ~torch.isfinite(samples).flatten(1).all(1)
        if bool(bad.any()):
            which = low + int(bad.nonzero()[0])
            self.ticket.fail(
                NetworkError(f"the samples are not finite (NaN or infinity), first sample {which}, after the last call.")
            )
            return
        self._parts[low] = samples
        if sum(map(len, self._parts.values())) == len(self.seeds):
            self.ticket.finish(joined(self._parts))

    def show(self, call: int, low: int, predictions: Tensor) -> None:
        """Data predictions of the samples from number `low` on. A preview is shown when all samples have made that call."""
        parts = self._shown.setdefault(call, {})
        parts[low] = predictions
        if sum(map(len, parts.values())) == len(self.seeds):
            self.ticket.show(Preview(call, self.plan.nfe, joined(self._shown.pop(call))))


def joined(parts: dict[int, Tensor]) -> Tensor:
    """Parts in order of their first sample."""
    ordered = [parts[low] for low in sorted(parts)]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered)


class Piece:
    """Samples low to high - 1 of a job, which have made `call` calls: what the loop of `fewstep.sample` remembers between two calls.

    Attributes:
        states, outputs: of `fewstep.sampler.open_memory`; None before its first call.
    """

    def __init__(self, job: Job, low: int, high: int):
        self.job, self.low, self.high, self.call = job, low, high, 0
        self.kind, self.arrival, self.cost, self.calls = job.kind, job.arrival, job.cost, job.plan.nfe
        self.conditional, self.free = take(job.conditional, low, high), take(job.free, low, high)
        self.states: deque[Tensor] | None = None
        self.outputs: deque[Tensor] = deque()
        self._path: BrownianPath | None = None

    @property
    def samples(self) -> int:
        """How many."""
        return self.high - self.low

    @property
    def remaining(self) -> int:
        """Calls still to make."""
        return self.calls - self.call

    @property
    def time(self) -> float:
        """Of the next call."""
        return self.job.steps[self.call].tau

    @property
    def state(self) -> Tensor:
        """The newest, ``"batch *shape"``."""
        assert self.states is not None
        return self.states[0]

    def begin(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Before the first call: the noise."""
        x = self.job.start(self.low, self.high, shape, dtype, device)
        self.states, self.outputs = open_memory(self.job.plan, x)
        if self.job.plan.stochastic:
            self._path = BrownianPath(self.job.seeds[self.low : self.high], shape)
        self.job.ticket.begin()

    def split(self, count: int) -> tuple[Piece, Piece]:
        """Its first `count` samples, and the others."""
        return self._part(0, count), self._part(count, self.samples)

    def _part(self, low: int, high: int) -> Piece:
        part = Piece(self.job, self.low + low, self.low + high)
        part.call = self.call
        if self.states is not None:
            part.states = deque((state[low:high] for state in self.states), self.states.maxlen)
            part.outputs = deque((output[low:high] for output in self.outputs), self.outputs.maxlen)
        if self._path is not None:
            part._path = BrownianPath(self._path.seeds[low:high], self._path.shape)
        return part

    def let_go(self) -> None:
        """Left out of a call: what it holds is copied where it keeps the memory of more than twice as much alive, as the predictions of
        all rows of its last call.
        """
        for held in (self.states or (), self.outputs):
            for place, tensor in enumerate(held):
                if tensor.untyped_storage().nbytes() > 2 * tensor.numel() * tensor.element_size():
                    held[place] = tensor.clone()  # type: ignore[index]  # an empty tuple has no place

    def advance(self, d: Tensor) -> Tensor:
        """One step of the plan with the data prediction; returns the new state."""
        assert self.states is not None
        step = self.job.steps[self.call]
        xi = None
        if step.noise is not None and self._path is not None:
            normal = torch.from_numpy(self._path.normalised(step.noise[1], step.noise[2]))
            xi = to_device(normal.to(d.dtype), d.device)
        x = advance(step, self.states, self.outputs, d, xi)
        self.states.appendleft(x)
        self.call += 1
        return x
