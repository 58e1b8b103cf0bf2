"""What is asked of an engine, and what stands for the answer until it is there.

A `Request` is a plan, seeds and conditions; a `Ticket` is what `fewstep.serve.Engine.submit` returns at once. Tickets may be used from any
thread, by as many as like.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.plan import Plan

__all__ = ["CancelledError", "EngineClosedError", "Preview", "QueueFullError", "Request", "Ticket", "kind_of"]

logger = logging.getLogger("fewstep.serve")
numbers = itertools.count()


class QueueFullError(FewstepError, RuntimeError):
    """As many samples wait as may wait. Try again later."""


class EngineClosedError(FewstepError, RuntimeError):
    """The engine was closed, or its thread has ended by an error."""


@dataclass(frozen=True)
class Request:
    """Samples to be made.

    Args:
        plan: for the denoiser's schedule.
        seeds: one whole number a sample: the noise is ``draw_noise(shape, seeds, plan)``, and so is that of stochastic plans.
        cond: conditions as for `fewstep.sample`. Tensors and arrays whose first dimension is the number of samples, inside dictionaries,
            lists and tuples too, have one row a sample; what else there is, is shared by all of them.
        guidance: scale w of classifier-free guidance, 1 for none. Another needs the engine's null conditions, and takes two rows a
            sample (one if it is 0).
        previews: deliver the data prediction after every so many calls; 0 for never.
        kind: the queue in which it waits, for schedulers that have some; left out, made from the number of calls (`kind_of`).
        keep: how many previews the ticket keeps, the newest; left out, all.
    """

    plan: Plan
    seeds: Sequence[int]
    cond: Mapping[str, Any] = field(default_factory=dict)
    guidance: float = 1.0
    previews: int = 0
    kind: str = ""
    keep: int | None = None


class Preview(NamedTuple):
    """What a request looks like on the way.

    Attributes:
        call: how many calls were made, of `calls`.
        samples: ``"batch *shape"``, the data predictions of that call, on the host.
    """

    call: int
    calls: int
    samples: Tensor


def kind_of(calls: int) -> str:
    """The queue of requests that name none: those whose numbers of calls have the same next power of two wait together.

    Example:
        >>> [kind_of(calls) for calls in (1, 4, 5, 50)]
        ['1 call', '3-4 calls', '5-8 calls', '33-64 calls']
    """
    high = 1 << (calls - 1).bit_length()
    if high <= 2:
        return "1 call" if high == 1 else "2 calls"
    return f"{high // 2 + 1}-{high} calls"


class Ticket:
    """The answer to one request, there or not.

    Attributes:
        request: what was asked.
        number: of the ticket, larger for later ones.
        submitted, ended: `time.monotonic` then; None for what was not yet.
    """

    def __init__(self, request: Request, ended: Callable[[Ticket], Any] | None = None):
        self.request = request
        self._ended = ended  # the engine's books, which are right before anybody sees the end
        self.number = next(numbers)
        self.submitted = time.monotonic()
        self.ended: float | None = None
        self._changed = threading.Condition()
        self._state = "waiting"
        self._samples: Tensor | None = None
        self._error: Exception | None = None
        self._previews: deque[Preview] = deque(maxlen=request.keep)
        self._shown = 0
        self._callbacks: list[Callable[[Ticket], Any]] = []

    def __repr__(self) -> str:
        return f"Ticket({self.number}, {self._state}, {self.request.plan!r}, {len(self.request.seeds)} samples)"

    @property
    def state(self) -> str:
        """``"waiting"``, ``"running"``, ``"finished"``, ``"failed"`` or ``"cancelled"``."""
        return self._state

    def done(self) -> bool:
        """Whether nothing will change any more."""
        return self._state in ("finished", "failed", "cancelled")

    def result(self, timeout: float | None = None) -> Tensor:
        """The samples ``"batch *shape"``, on the host; waits for them.

        Raises:
            NetworkError: if the network failed on this request.
            EngineClosedError: if the engine's thread ended by an error.
            CancelledError: if it was cancelled.
            TimeoutError: if it is not there after `timeout` seconds; it goes on.
        """
        with self._changed:
            if not self._changed.wait_for(self.done, timeout):
                raise TimeoutError(
                    f"the samples are not there after {timeout:g} s; they are {self._state}. Wait longer, or cancel."
                )
        if self._state == "cancelled":
            raise CancelledError(f"request {self.number} was cancelled.")
        if self._error is not None:
            raise self._error
        assert self._samples is not None
        return self._samples

    def cancel(self) -> bool:
        """Give it up: its rows are free at the next call. Returns False if it was done already."""
        return self._end("cancelled")

    def previews(self, timeout: float | None = None) -> Iterator[Preview]:
        """The previews from the first on that is kept, as they come; ends with the request, however that ends. May be called more than
        once.

        Raises:
            TimeoutError: if the next one takes more than `timeout` seconds.
        """
        place = 0
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._shown > place or self.done(), timeout):  # noqa: B023
                    raise TimeoutError(f"no preview within {timeout:g} s. Wait longer, or cancel.")
                if self._shown <= place:
                    return
                gone = self._shown - len(self._previews)
                place = max(place, gone)
                preview = self._previews[place - gone]
            place += 1
            yield preview

    def add_done_callback(self, fn: Callable[[Ticket], Any]) -> None:
        """Call ``fn(ticket)`` when it is done, in the thread that ends it, or now if it is. It must be quick: an engine may wait for it."""
        with self._changed:
            if not self.done():
                self._callbacks.append(fn)
                return
        self._tell(fn)

    # ---- for the engine ------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """It has rows for the first time."""
        with self._changed:
            if self._state == "waiting":
                self._state = "running"

    def finish(self, samples: Tensor) -> bool:
        """The samples are there. Returns False if it was done already."""
        return self._end("finished", samples=samples)

    def fail(self, error: Exception) -> bool:
        """There will be no samples. Returns False if it was done already."""
        return self._end("failed", error=error)

    def show(self, preview: Preview) -> None:
        """One more preview."""
        with self._changed:
            if not self.done():
                self._previews.append(preview)
                self._shown += 1
                self._changed.notify_all()

    def _end(self, state: str, *, samples: Tensor | None = None, error: Exception | None = None) -> bool:
        with self._changed:
            if self.done():
                return False
            self._samples, self._error, self.ended = samples, error, time.monotonic()
            self._state = state
            if self._ended is not None:
                self._ended(self)
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for fn in callbacks:
            self._tell(fn)
        return True

    def _tell(self, fn: Callable[[Ticket], Any]) -> None:
        try:
            fn(self)
        except Exception:
            logger.exception("a callback of %r failed", self)
