"""A cluster that is not there: the `Coordinator` against simulated workers, some slow, some failing.

A discrete-event simulation. Blocks take gamma-distributed times; a worker may be slow for good, a block may hang for a while, a worker may
fail at any moment (an exponential time between failures) and comes back after a restart; the coordinator itself takes a time for every
message, one after the other. What gives out the blocks is the same class that gives them to actors of Ray.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from fewstep.scale.coordinator import Coordinator

__all__ = ["Cluster", "Outcome", "simulate"]

TICK = 1e-6
"""Nothing is looked at again sooner."""


@dataclass(frozen=True)
class Cluster:
    """What is simulated. Times in seconds.

    Args:
        workers: how many.
        block_seconds: mean time of a block on a worker that is not slow.
        spread: standard deviation of that time over its mean.
        slow, slowdown: share of workers that take so many times as long.
        hangs, hang_seconds: share of blocks that take so much longer, e.g. because the network or another user is in the way.
        failure_seconds: mean time between failures of one worker; inf: none.
        restart_seconds: from a failure to the replacement's readiness, and of the first start.
        message_seconds: what the coordinator takes for one message.

    Raises:
        ValueError: for numbers that mean nothing.
    """

    workers: int = 1000
    block_seconds: float = 1.0
    spread: float = 0.1
    slow: float = 0.0
    slowdown: float = 5.0
    hangs: float = 0.0
    hang_seconds: float = 60.0
    failure_seconds: float = np.inf
    restart_seconds: float = 10.0
    message_seconds: float = 0.0

    def __post_init__(self) -> None:
        positive = min(self.workers, self.block_seconds, self.slowdown, self.failure_seconds) > 0
        known = min(self.spread, self.restart_seconds, self.message_seconds, self.hang_seconds) >= 0
        if not (positive and known and 0 <= self.slow <= 1 and 0 <= self.hangs <= 1):
            raise ValueError(f"times must be positive and shares within [0, 1], got {self}.")


@dataclass(frozen=True)
class Outcome:
    """What happened.

    Attributes:
        seconds: until the last block was finished.
        ideal_seconds: with the same workers, slow ones as slow, but without failures, hangs, messages and an uneven end.
        blocks: different ones that were finished.
        kept: results that counted; equal to `blocks`, and to what was asked for, if nothing was lost or doubled.
        deaths: workers that failed.
        repeated: copies that were given out.
        wasted: share of the workers' busy seconds whose result did not count.
    """

    seconds: float
    ideal_seconds: float
    blocks: int
    kept: int
    deaths: int
    repeated: int
    wasted: float

    @property
    def efficiency(self) -> float:
        """The ideal time over the one it took."""
        return self.ideal_seconds / self.seconds


class _Simulation:
    """Events in the order of their times. A worker's number is new after every restart."""

    def __init__(self, cluster: Cluster, work: Coordinator, seed: int):
        self.cluster, self.work, self.random = cluster, work, np.random.default_rng(seed)
        self.events: list[tuple[float, int, str, int, int]] = []
        self.count = 0
        self.slots: dict[Hashable, int] = {}  # worker -> its place in the cluster
        self.queues: dict[Hashable, list[int]] = {}
        self.began: dict[Hashable, float] = {}
        self.slow = self.random.random(cluster.workers) < cluster.slow
        self.free_at, self.now = 0.0, 0.0
        self.took: dict[tuple[Hashable, int], float] = {}
        self.busy, self.useful = 0.0, 0.0
        self.kept: set[int] = set()
        self.counted = 0
        self.look_at = np.inf

    def later(self, time: float, what: str, worker: int, block: int = -1) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, self.count, what, worker, block))

    def heard(self, time: float) -> float:
        """When the coordinator has read a message that comes now: it reads one after the other."""
        self.free_at = max(self.free_at, time) + self.cluster.message_seconds
        return self.free_at

    def hire(self, slot: int, time: float) -> None:
        """A worker, ready after its start; it is known when it will fail."""
        worker = self.count
        self.slots[worker] = slot
        ready = time + self.cluster.restart_seconds
        self.later(ready, "up", worker)
        if np.isfinite(self.cluster.failure_seconds):
            self.later(ready + self.random.exponential(self.cluster.failure_seconds), "fails", worker)

    def seconds_of_block(self, worker: Hashable) -> float:
        cluster = self.cluster
        seconds = cluster.block_seconds
        if cluster.spread:
            shape = cluster.spread**-2
            seconds *= self.random.gamma(shape, 1.0 / shape)
        seconds *= cluster.slowdown if self.slow[self.slots[worker]] else 1.0
        return seconds + (cluster.hang_seconds if self.random.random() < cluster.hangs else 0.0)

    def start_next(self, worker: int, time: float) -> None:
        """Begin the first block of a worker's queue."""
        if self.queues[worker]:
            self.began[worker] = time
            self.later(time + self.seconds_of_block(worker), "done", worker, self.queues[worker][0])

    def give_out(self) -> None:
        for worker, block in self.work.assign(self.now):
            queue = self.queues[worker]
            queue.append(block)
            if len(queue) == 1:
                self.start_next(worker, self.now)  # type: ignore[arg-type]

    def run(self) -> float:
        for slot in range(self.cluster.workers):
            self.hire(slot, 0.0)
        last = 0.0
        while not self.work.done:
            time, _, what, worker, block = heapq.heappop(self.events)
            if worker not in self.slots and what != "look":
                continue  # it failed in the meantime
            if what == "up":
                self.later(self.heard(time), "ready", worker)
                continue
            if what == "done":  # the worker goes on at once; the coordinator hears of it
                self.queues[worker].pop(0)
                self.took[worker, block] = time - self.began.pop(worker)
                self.busy += self.took[worker, block]
                self.later(self.heard(time), "told", worker, block)
                self.start_next(worker, time)
                continue
            self.now = time
            if what == "ready":
                self.queues[worker] = []
                self.work.joined(worker)
            elif what == "told":
                took = self.took.pop((worker, block))
                if self.work.finished(worker, block, time):
                    self.kept.add(block)
                    self.counted, self.useful, last = self.counted + 1, self.useful + took, time
            elif what == "fails":
                self.fail(worker, time)
            self.give_out()
            self.look_again()
        self.busy += sum(last - began for began in self.began.values() if began < last)
        return last

    def look_again(self) -> None:
        """At the time that the coordinator asks for, once."""
        wait = self.work.wake(self.now)
        if self.look_at <= self.now:
            self.look_at = np.inf
        if wait is not None and self.now + wait < self.look_at:
            self.look_at = self.now + max(wait, TICK)
            self.later(self.look_at, "look", -1)

    def fail(self, worker: int, time: float) -> None:
        if worker in self.began:
            self.busy += time - self.began.pop(worker)
        slot = self.slots.pop(worker)
        if self.queues.pop(worker, None) is not None:
            self.work.died(worker)
        self.hire(slot, time)


def simulate(cluster: Cluster, blocks: int, *, depth: int = 2, copies: int = 2, patience: float = 2.0, seed: int = 0) -> Outcome:
    """Do so many blocks.

    Args:
        cluster: what is simulated.
        blocks: how many.
        depth, copies, patience: as of `Coordinator`. A failure here never comes from a block, so no block is given up.
        seed: of everything that is drawn.

    Example:
        >>> even = simulate(Cluster(workers=4, spread=0.0, restart_seconds=0.0), 40)
        >>> even.seconds, even.efficiency, even.kept
        (10.0, 1.0, 40)
    """
    work = Coordinator(range(blocks), depth=depth, copies=copies, patience=patience, most_deaths=blocks + 10**9)
    simulation = _Simulation(cluster, work, seed)
    seconds = simulation.run()
    speed = float(np.where(simulation.slow, 1.0 / cluster.slowdown, 1.0).sum())
    ideal = cluster.restart_seconds + blocks * cluster.block_seconds / speed
    wasted = max(0.0, 1.0 - simulation.useful / simulation.busy)
    return Outcome(seconds, ideal, len(simulation.kept), simulation.counted, work.deaths, work.repeated, wasted)
