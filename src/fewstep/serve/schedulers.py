"""Whose samples get the rows of the next network call?

A *scheduler* puts the work in an order, and the call is filled from its front. First come, first served and the shortest remaining first
look at samples; the others choose a *queue*, the samples of one kind, by a policy of `fewstep.serve.queues`, and serve each queue in order
of arrival. How its words map:

- A slot is one network call. The queue that the policy chooses gets its rows first; rows that it cannot fill go to the others in order of
  arrival, so no row is idle while there is work.
- Work is measured in samples: of a sample that needs N calls, each call is 1/N. The backlog Q of a queue is the work left in it, and the
  service S what one slot did for the queue that was chosen, over the seconds the call took, for calls differ.
- Max-weight takes for S what the call would do: how much work of that queue fits its rows. That a call of one queue takes longer than
  one of another, it does not know; SoftMW and SSMW see it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fewstep.errors import UnknownNameError
from fewstep.serve.queues import SSMW, Choice, MaxWeight, Policy, Queue, SoftMW

__all__ = ["SCHEDULERS", "Arrangement", "ByKind", "FirstInFirstOut", "Scheduler", "ShortestRemaining", "Work", "make_scheduler"]


class Work(Protocol):
    """Some samples of one request that have made as many calls.

    Attributes:
        kind: its queue.
        arrival: number of the request, in order of arrival.
        samples: how many.
        cost: rows a sample in a network call, 1 or 2.
        calls: that each makes in all.
        remaining: calls that each has still to make.
    """

    @property
    def kind(self) -> str: ...
    @property
    def arrival(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def cost(self) -> int: ...
    @property
    def calls(self) -> int: ...
    @property
    def remaining(self) -> int: ...


class Arrangement(NamedTuple):
    """The order of work for one call.

    Attributes:
        works: as places in what was given, most urgent first.
        choice: the queue that a policy chose, for `Scheduler.observe`; None if none did.
    """

    works: list[int]
    choice: Choice | None = None


class Scheduler(abc.ABC):
    """Orders work for every network call. Not for several threads."""

    @abc.abstractmethod
    def arrange(self, works: Sequence[Work], rows: int) -> Arrangement:
        """The order for a call of `rows` rows. The works, at least one, are in order of arrival."""

    def observe(self, choice: Choice, service: float) -> None:  # noqa: B027  most learn nothing
        """What one call did for the chosen queue, in samples a second."""


class FirstInFirstOut(Scheduler):
    """In order of arrival. Nobody waits for ever; short requests wait behind long ones."""

    def arrange(self, works: Sequence[Work], rows: int) -> Arrangement:
        return Arrangement(list(range(len(works))))


class ShortestRemaining(Scheduler):
    """Those that have the fewest calls left first. The least mean latency; under overload long requests wait for ever."""

    def arrange(self, works: Sequence[Work], rows: int) -> Arrangement:
        return Arrangement(sorted(range(len(works)), key=lambda place: works[place].remaining))


@dataclass
class ByKind(Scheduler):
    """A queue is chosen by a policy and gets the rows first; see the module.

    Args:
        policy: e.g. ``SSMW(window=500)``.
    """

    policy: Policy

    def arrange(self, works: Sequence[Work], rows: int) -> Arrangement:
        choice = self.policy.choose(queues_of(works, rows))
        first = [place for place, work in enumerate(works) if work.kind == choice.kind]
        return Arrangement([*first, *(place for place, work in enumerate(works) if work.kind != choice.kind)], choice)

    def observe(self, choice: Choice, service: float) -> None:
        self.policy.observe(choice, service)


def queues_of(works: Sequence[Work], rows: int) -> dict[str, Queue]:
    """The queues: the work left in each, and the work that one call could do for it."""
    left: dict[str, float] = {}
    done: dict[str, float] = {}
    free: dict[str, int] = {}
    for work in works:
        left[work.kind] = left.get(work.kind, 0.0) + work.samples * work.remaining / work.calls
        room = free.get(work.kind, rows)
        fit = min(work.samples, room // work.cost)
        free[work.kind] = room - fit * work.cost
        done[work.kind] = done.get(work.kind, 0.0) + fit / work.calls
    return {kind: Queue(left[kind], done[kind]) for kind in left}


SCHEDULERS: dict[str, Callable[[], Scheduler]] = {
    "fifo": FirstInFirstOut,
    "shortest-remaining": ShortestRemaining,
    "maxweight": lambda: ByKind(MaxWeight()),
    "softmw": lambda: ByKind(SoftMW()),
    "ssmw": lambda: ByKind(SSMW()),
}
"""The schedulers by the names that `fewstep.serve.Engine` takes."""


def make_scheduler(scheduler: str | Scheduler) -> Scheduler:
    """The scheduler of a name; one that is an object already stays as it is.

    Raises:
        UnknownNameError: for a name that is not in `SCHEDULERS`.
        TypeError: for anything else.

    Example:
        >>> type(make_scheduler("ssmw").policy).__name__
        'SSMW'
    """
    if isinstance(scheduler, Scheduler):
        return scheduler
    if not isinstance(scheduler, str):
        raise TypeError(f"a scheduler is a name or a fewstep.serve.Scheduler, got {type(scheduler).__name__}.")
    if scheduler not in SCHEDULERS:
        raise UnknownNameError("scheduler", scheduler, SCHEDULERS)
    return SCHEDULERS[scheduler]()
