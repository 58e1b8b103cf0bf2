"""Who does which block: the policy, without clocks, processes or network, so that Ray and a simulation run the same code.

Work is a set of numbered blocks, each of which may be done twice without harm. The coordinator is told what happens (a worker joined, a
block is finished, a worker died) and says what is to be done next.

- Blocks are given out in order, the lowest first, so that what is written together is finished together.
- A worker has up to `depth` blocks: it does the first and need not wait for the next one.
- When nothing is left to give out, idle workers take over blocks that others have not begun, and do again those that take longer than
  `patience` times the median: the backup tasks of "MapReduce: simplified data processing on large clusters" (OSDI 2004, section 3.6).
  The first result counts.
- The blocks of a worker that died go back. The one that it was doing may be why: after `most_deaths` deaths it is named in an error.
"""

from __future__ import annotations

import heapq
import statistics
from collections import Counter, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from fewstep.errors import FewstepError

__all__ = ["BlockError", "Coordinator"]

REMEMBERED = 101
"""The median is of so many durations, the last ones."""


class BlockError(FewstepError, RuntimeError):
    """A block on which one worker after the other died."""


@dataclass
class _Worker:
    """Blocks in the order in which they are done, and when the first was begun."""

    blocks: deque[int] = field(default_factory=deque)
    since: float = 0.0


class Coordinator:
    """Gives blocks to workers.

    Args:
        blocks: their numbers.
        depth: blocks that a worker may have at a time.
        copies: workers that may have the same block; 1: nothing is done again while its worker lives.
        patience: a block that takes so many times the median may be done again elsewhere.
        most_deaths: a block is given up after so many workers died on it.

    Attributes:
        repeated: copies that were given out.
        deaths: workers that died.

    Raises:
        ValueError: for numbers below 1.

    Example:
        >>> work = Coordinator([0, 1], depth=1)
        >>> work.joined("a"), work.assign(now=0.0)
        (None, [('a', 0)])
        >>> work.died("a"), work.joined("b"), work.assign(now=1.0)
        ([0], None, [('b', 0)])
        >>> work.finished("b", 0, now=2.0), work.assign(now=2.0), work.finished("b", 1, now=3.0), work.done
        (True, [('b', 1)], True, True)
    """

    def __init__(
        self, blocks: Iterable[int], *, depth: int = 2, copies: int = 2, patience: float = 2.0, most_deaths: int = 3
    ) -> None:
        if min(depth, copies, most_deaths) < 1 or patience < 1.0:
            raise ValueError("depth, copies, most_deaths and patience must be at least 1.")
        self._pending = sorted(set(blocks))
        self._open = set(self._pending)
        self._workers: dict[Hashable, _Worker] = {}
        self._hungry: list[dict[Hashable, None]] = [{} for _ in range(depth)]  # by how many blocks a worker has
        self._holders: dict[int, list[Hashable]] = {}
        self._killed: Counter[int] = Counter()
        self._durations: deque[float] = deque(maxlen=REMEMBERED)
        self._depth, self._copies, self._patience, self._most_deaths = depth, copies, patience, most_deaths
        self.repeated = self.deaths = 0

    @property
    def done(self) -> bool:
        """Whether every block is finished."""
        return not self._open

    @property
    def left(self) -> int:
        """How many blocks are not."""
        return len(self._open)

    def joined(self, worker: Hashable) -> None:
        """A worker is ready for blocks."""
        if worker in self._workers:
            raise ValueError(f"the worker {worker!r} has joined already.")
        self._workers[worker] = _Worker()
        self._hungry[0][worker] = None

    def died(self, worker: Hashable) -> list[int]:
        """A worker is gone.

        Returns:
            its blocks that have to be done again, nobody else having them.

        Raises:
            BlockError: if as many workers died on the block that it was doing as may.
        """
        self.deaths += 1
        gone = self._workers.pop(worker, None)
        if gone is None:
            return []
        for level in self._hungry:
            level.pop(worker, None)
        lost = []
        for place, block in enumerate(gone.blocks):
            self._holders[block].remove(worker)
            if block not in self._open:
                continue
            self._killed[block] += place == 0
            if not self._holders[block]:
                heapq.heappush(self._pending, block)
                lost.append(block)
        for block in gone.blocks:
            if self._killed[block] >= self._most_deaths and block in self._open:
                raise BlockError(f"block {block} was given up: {self._killed[block]} workers died while they did it.")
        return lost

    def finished(self, worker: Hashable, block: int, now: float) -> bool:
        """A worker has done a block.

        Returns:
            whether this is the first result of it, the one to keep.
        """
        mine = self._workers.get(worker)
        if mine is not None and block in mine.blocks:
            if mine.blocks[0] == block:
                self._durations.append(now - mine.since)
                mine.since = now
            mine.blocks.remove(block)
            self._holders[block].remove(worker)
            self._place(worker)
        first = block in self._open
        self._open.discard(block)
        return first

    def lost(self, worker: Hashable, block: int) -> None:
        """A result could not be fetched although its worker lives: the block has to be done again."""
        mine = self._workers.get(worker)
        if mine is not None and block in mine.blocks:
            mine.blocks.remove(block)
            self._holders[block].remove(worker)
            self._place(worker)
        if block in self._open and not self._holders.get(block):
            heapq.heappush(self._pending, block)

    def assign(self, now: float) -> list[tuple[Hashable, int]]:
        """What workers shall do next: (worker, block)."""
        given = []
        for level in self._hungry:
            while level and (block := self._next()) is not None:
                given.append((self._give(next(iter(level)), block, now), block))
        if self._copies > 1 and self._hungry[0] and not self._pending:
            given += self._again(now)
        return given

    def wake(self, now: float) -> float | None:
        """Seconds until `assign` may have more to say although nothing has happened; None if that cannot be."""
        if not self._hungry[0] or self._pending or self._copies < 2 or not self._durations:
            return None
        limit = self._patience * statistics.median(self._durations)
        late = [w.since + limit - now for w in self._workers.values() if w.blocks and self._repeatable(w.blocks[0])]
        return max(0.0, min(late)) if late else None

    def _next(self) -> int | None:
        while self._pending:
            block = heapq.heappop(self._pending)
            if block in self._open:
                return block
        return None

    def _repeatable(self, block: int) -> bool:
        return block in self._open and len(self._holders[block]) < self._copies

    def _again(self, now: float) -> list[tuple[Hashable, int]]:
        """Blocks of others for idle workers: those that wait first, then those that take long, the longest first."""
        waiting = [b for w in self._workers.values() for b in list(w.blocks)[1:] if self._repeatable(b)]
        late: list[tuple[float, int]] = []
        if self._durations:
            limit = self._patience * statistics.median(self._durations)
            busy = [w for w in self._workers.values() if w.blocks and self._repeatable(w.blocks[0])]
            late = sorted((w.since, w.blocks[0]) for w in busy if now - w.since >= limit)
        given = []
        for block in dict.fromkeys([*sorted(waiting), *(block for _, block in late)]):
            taker = next((w for w in self._hungry[0] if w not in self._holders[block]), None)
            if taker is None:
                break
            given.append((self._give(taker, block, now), block))
            self.repeated += 1
        return given

    def _give(self, worker: Hashable, block: int, now: float) -> Hashable:
        mine = self._workers[worker]
        if not mine.blocks:
            mine.since = now
        mine.blocks.append(block)
        self._holders.setdefault(block, []).append(worker)
        self._place(worker)
        return worker

    def _place(self, worker: Hashable) -> None:
        """Put a worker among those with as many blocks."""
        for level in self._hungry:
            level.pop(worker, None)
        if (count := len(self._workers[worker].blocks)) < self._depth:
            self._hungry[count][worker] = None
