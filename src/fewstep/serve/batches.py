"""Continuous batching at the level of network calls: the turns of an engine, without its thread.

A sampling run of N calls is N visits to the network, and between two of them it is nothing but a few tensors. So every call is put together
anew, from whatever samples are to be served: of different requests, plans, numbers of calls, guidance, and places in their plans. A request
that ends leaves its rows to another at the next call. Each sample is advanced by its own row of its own plan
(`fewstep.sampler.advance`), so it is the sample that it would be alone.

The device is not waited for before the next call is put together: on a CUDA device one call is under way while the next is prepared, and
what is read from a call, one flag a row that says whether it is finite, previews and finished samples, is copied behind it and looked at
when it has ended. That wait also keeps the host from running ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import NetworkError
from fewstep.serve.calls import Flight, NewMemory, fail, predict, rows_of
from fewstep.serve.schedulers import Scheduler
from fewstep.serve.transfer import to_host
from fewstep.serve.work import Job, Piece

__all__ = ["Batches"]

MEMORY = 1.0 - 1.0 / 64
"""Share of what was known of the pace that is kept at every call."""


class Batches:
    """Jobs, and the calls made for them. For one thread.

    Args:
        denoiser: ``D(x, t, **cond)`` -> data prediction, for a time or one a row.
        shape: of one sample.
        rows: of a call at most.
        scheduler: whose samples take part in the next call.
        dtype, device: of the states.
        clock: seconds.
        record: for a device that works by itself, marks the end of what it was given so far, and returns what has a ``synchronize()`` that
            waits for it; left out, a CUDA event on CUDA devices, and None elsewhere: a call is over when it returns.
        ahead: calls that may be under way while another is prepared; left out, 1 where the device works by itself, else 0.

    Attributes:
        calls, evaluations: network calls so far, and their rows.
        retries: calls that raised and were made again, request by request.
        busy: seconds of all calls.
        pace: rows a second of the last calls, older ones forgotten at the rate of `MEMORY`; 0.0 before the first is over.
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        shape: Sequence[int],
        rows: int,
        scheduler: Scheduler,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
        record: Callable[[], Any] | None = None,
        ahead: int | None = None,
    ):
        self.denoiser, self.shape, self.rows, self.scheduler = NewMemory(denoiser), tuple(shape), rows, scheduler
        self.dtype, self.device, self.clock = dtype, torch.device(device), clock
        self._record = self._cuda_event if record is None and self.device.type == "cuda" else record
        self.ahead = int(self._record is not None) if ahead is None else ahead
        self.calls = self.evaluations = self.retries = 0
        self.busy = self.pace = 0.0
        self._recent = 0.0, 0.0
        self.pieces: list[Piece] = []
        self._flights: list[Flight] = []
        self._landed = -float("inf")

    def add(self, job: Job) -> None:
        """One more request, later than those before."""
        self.pieces.append(Piece(job, 0, len(job.seeds)))

    @property
    def jobs(self) -> list[Job]:
        """Those with samples that are not handed out yet."""
        held = [piece.job for piece in self.pieces] + [job for flight in self._flights for job, _, _ in flight.samples]
        return list(dict.fromkeys(held))

    def running(self) -> dict[str, int]:
        """Samples by ``"waiting"`` for their first call, and ``"running"``; and the rows that they still need, ``"left"``."""
        pieces = list(self.pieces)
        begun = sum(piece.samples for piece in pieces if piece.states is not None)
        left = sum(piece.samples * piece.cost * piece.remaining for piece in pieces)
        return {"waiting": sum(piece.samples for piece in pieces) - begun, "running": begun, "left": left}

    def turn(self) -> bool:
        """One network call, if there is work. Returns whether there may be more."""
        self.pieces = [piece for piece in self.pieces if not piece.job.ticket.done()]
        if self.pieces:
            self._serve()
        while len(self._flights) > (self.ahead if self.pieces else 0):
            self._land()
        return bool(self.pieces)

    # ---- one call ------------------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        flight = Flight(self.clock())
        chosen, flight.choice = self._choose()
        for piece in set(self.pieces).difference(chosen):
            piece.let_go()
        chosen = [piece for piece in chosen if self._begun(piece)]
        for pieces, predictions, finite in self._predict(chosen):
            self.calls += 1
            self.evaluations += len(finite)
            flight.finite.append(to_host(finite))
            flight.rows += [(piece.job, count, piece.call) for piece, count in rows_of(pieces)]
            for piece, d in zip(pieces, predictions, strict=True):
                self._step(piece, d, flight)
        flight.event = None if self._record is None else self._record()
        self._flights.append(flight)

    def _cuda_event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _choose(self) -> tuple[list[Piece], Any]:
        """The pieces of the next call; what fits only in part is split."""
        order, choice = self.scheduler.arrange(self.pieces, self.rows)
        compatible = self.pieces[order[0]].job.compatible
        room, chosen, rest = self.rows, [], {}
        for place in order:
            piece = self.pieces[place]
            if piece.job.compatible != compatible:
                continue
            fit = min(piece.samples, room // piece.cost)
            if 0 < fit < piece.samples:
                piece, rest[place] = piece.split(fit)
                self.pieces[place] = piece
            if fit:
                chosen.append(piece)
                room -= fit * piece.cost
            if not room:
                break
        for place in sorted(rest, reverse=True):
            self.pieces.insert(place + 1, rest[place])
        return chosen, choice

    def _begun(self, piece: Piece) -> bool:
        """Whether the piece has its noise, or could be given it."""
        if piece.states is not None:
            return True
        try:
            piece.begin(self.shape, self.dtype, self.device)
        except Exception as error:  # noqa: BLE001  of one request, for example its noise has no room: the others go on
            piece.job.ticket.fail(error)
            return False
        return True

    def _predict(self, pieces: list[Piece]) -> list[tuple[list[Piece], list[Tensor], Tensor]]:
        """Predictions by one call; if that raises, by one for each request, and those that raise again fail."""
        jobs = list(dict.fromkeys(piece.job for piece in pieces))
        if not jobs:
            return []
        try:
            return [(pieces, *predict(self.denoiser, pieces))]
        except Exception as error:  # noqa: BLE001  whatever a network raises
            if len(jobs) == 1:
                what = str(error) if isinstance(error, NetworkError) else f"the network raised {type(error).__name__}: {error}"
                fail(jobs[0], pieces[0].call, what.rstrip("."), error)
                return []
        self.retries += 1
        return [found for job in jobs for found in self._predict([piece for piece in pieces if piece.job is job])]

    def _step(self, piece: Piece, d: Tensor, flight: Flight) -> None:
        """One step of a plan; an error in it is its request's alone."""
        if piece.job.ticket.done():
            return
        call = piece.call
        try:
            self._advance(piece, d, flight)
        except Exception as error:  # noqa: BLE001  for example no room for its noise
            fail(piece.job, call, f"the step after it raised {type(error).__name__}: {error}".rstrip("."), error)

    def _advance(self, piece: Piece, d: Tensor, flight: Flight) -> None:
        x = piece.advance(d)
        if flight.choice is not None and piece.kind == flight.choice.kind:
            flight.work += piece.samples / piece.calls
        previews = piece.job.ticket.request.previews
        if previews and piece.call % previews == 0:
            flight.previews.append((piece.job, piece.call, piece.low, to_host(d)))
        if not piece.remaining:
            flight.samples.append((piece.job, piece.low, to_host(x)))
            self.pieces.remove(piece)

    def _land(self) -> None:
        flight = self._flights.pop(0)
        flight.land()
        now = self.clock()
        seconds = now - max(flight.begun, self._landed)
        self._landed = now
        self.busy += seconds
        rows, spent = self._recent
        self._recent = MEMORY * rows + sum(count for _, count, _ in flight.rows), MEMORY * spent + seconds
        self.pace = self._recent[0] / self._recent[1] if self._recent[1] > 0.0 else 0.0
        if flight.choice is not None and seconds > 0.0:
            self.scheduler.observe(flight.choice, flight.work / seconds)
