"""One network call for samples of different requests, and what is still on its way from the device afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import NetworkError
from fewstep.serve.conditions import merge
from fewstep.serve.queues import Choice
from fewstep.serve.work import Job, Piece

__all__ = ["Flight", "NewMemory", "fail", "predict", "rows_of"]


def predict(denoiser: Callable[..., Any], pieces: Sequence[Piece]) -> tuple[list[Tensor], Tensor]:
    """Data predictions of pieces whose conditions are compatible, by one call.

    The rows are those of the conditional predictions, then those without conditions. If all times are equal the denoiser gets one number,
    as in `fewstep.sample`, otherwise one a row, on the host.

    Returns:
        for every piece its data prediction ``"batch *shape"``, guided if it is to be; and whether each row of the call is finite, piece by
        piece as `rows_of` says, still on the device.

    Raises:
        NetworkError: if the denoiser returns no tensor, or one of another shape.
    """
    parts = [(piece, tree) for trees in ("conditional", "free") for piece in pieces if (tree := getattr(piece, trees)) is not None]
    x = parts[0][0].state if len(parts) == 1 else torch.cat([piece.state for piece, _ in parts])
    d = denoiser(x, _times([piece for piece, _ in parts]), **merge([tree for _, tree in parts]))
    if not isinstance(d, Tensor):
        raise NetworkError(f"the denoiser returned {type(d).__name__}, not a tensor.")
    if d.shape != x.shape:
        raise NetworkError(f"the denoiser returned shape {tuple(d.shape)} for a state of shape {tuple(x.shape)}.")
    rows = d.split([piece.samples for piece, _ in parts])
    found: dict[int, list[Tensor]] = {}
    for (piece, _), part in zip(parts, rows, strict=True):
        found.setdefault(id(piece), []).append(part)
    return [_guided(found[id(piece)], piece.job.guidance) for piece in pieces], torch.isfinite(d).flatten(1).all(1)


def _times(pieces: Sequence[Piece]) -> float | Tensor:
    times = [piece.time for piece in pieces]
    if len(set(times)) == 1:
        return times[0]
    return torch.tensor(times, dtype=torch.float64).repeat_interleave(torch.tensor([piece.samples for piece in pieces]))


def _guided(predictions: list[Tensor], scale: float) -> Tensor:
    if len(predictions) == 1:
        return predictions[0]
    conditional, free = predictions
    return torch.add(free, conditional - free, alpha=scale)


class NewMemory:
    """A denoiser whose predictions are checked to be in new memory: what it returns is kept by requests whose next steps need it.

    Raises:
        NetworkError: if a prediction was written over the one before. Nothing is read: addresses are compared.
    """

    def __init__(self, denoiser: Callable[..., Any]):
        self.denoiser = denoiser
        self._last: tuple[Tensor, int] | None = None

    def __call__(self, x: Tensor, t: float | Tensor, **cond: Any) -> Any:
        d = self.denoiser(x, t, **cond)
        if isinstance(d, Tensor):
            last, self._last = self._last, (d, _version(d))  # the tensor is kept, so that its address is not another's
            if last is not None and last[0].data_ptr() == d.data_ptr() != 0 and last[1] != _version(d):
                raise NetworkError(
                    "the output was written over that of the call before, which is needed. Return a new tensor: clone it"
                )
        return d


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def rows_of(pieces: Sequence[Piece]) -> list[tuple[Piece, int]]:
    """Whose the rows of a call are, in order: pieces, and how many."""
    return [(piece, piece.samples) for trees in ("conditional", "free") for piece in pieces if getattr(piece, trees) is not None]


@dataclass(eq=False)
class Flight:
    """A call that was started on the device, and what is to be done when it has ended.

    Attributes:
        finite: whether each row was finite; `rows` says whose and which call it was.
        samples: finished ones: (job, number of the first, samples).
        previews: (job, calls made, number of the first sample, data predictions).
        choice: of a policy, with the work that was done for that queue.
        begun: the clock before the call.
    """

    begun: float
    rows: list[tuple[Job, int, int]] = field(default_factory=list)  # job, how many rows, which call
    finite: list[Tensor] = field(default_factory=list)
    samples: list[tuple[Job, int, Tensor]] = field(default_factory=list)
    previews: list[tuple[Job, int, int, Tensor]] = field(default_factory=list)
    choice: Choice | None = None
    work: float = 0.0
    event: Any = None

    def land(self) -> None:
        """Wait for the end of the call, fail whose rows were not finite, and hand out what is there."""
        if self.event is not None:
            self.event.synchronize()
        finite = torch.cat(self.finite).tolist() if self.finite else []
        begin = 0
        for job, count, call in self.rows:
            if not all(finite[begin : begin + count]):
                fail(job, call, "the network's prediction is not finite (NaN or infinity)")
            begin += count
        for job, call, low, predictions in self.previews:
            job.show(call, low, predictions)
        for job, low, samples in self.samples:
            if not job.ticket.done():
                job.deliver(low, samples)


def fail(job: Job, call: int, what: str, cause: Exception | None = None) -> None:
    """The request of a job failed at a call."""
    error = NetworkError(f"call {call + 1} of {job.plan.nfe}, t={job.steps[call].tau:.6g}: {what}.")
    error.__cause__ = cause
    job.ticket.fail(error)
