"""`RayMap`: a function on many arguments, side by side, with the results in order and to the bit those of the built-in ``map``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fewstep.scale.actors import cores_of_nodes, ray_session

__all__ = ["RayMap", "reserved"]

AHEAD = 2
"""Calls a worker that are handed out at a time."""


@dataclass(frozen=True)
class RayMap:
    """Runs independent trials in workers of Ray.

    Every worker has as many processor threads as this process, because matrix libraries round differently with other numbers. A trial
    whose worker dies is run again. No more than a few results wait in memory.

    Args:
        workers: how many at a time; 0: as many as the cluster has processor cores for.
        address: of a cluster; None: this machine.
        retries: times that a trial is run again after its worker died; -1: without end.

    Raises:
        ValueError: for a negative number of workers.
        FewstepError: when it is called, if no machine has as many cores as this process has threads.
    """

    workers: int = 0
    address: str | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}.")

    def __call__(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        """Like ``map(function, *arguments)``. An error of the function is raised where its result would be."""
        threads = torch.get_num_threads()
        with ray_session(self.address, self.workers * threads) as ray:
            nodes = cores_of_nodes(ray, threads)
            cpus = reserved(nodes, self.workers, threads)
            room = sum(cores // cpus for cores in nodes)
            limit = self.workers if 0 < self.workers < room else AHEAD * room
            run = ray.remote(_trial).options(num_cpus=cpus, max_retries=self.retries)
            shared, waiting = ray.put(function), deque()
            for given in zip(*arguments, strict=False):
                waiting.append(run.remote(shared, threads, *given))
                if len(waiting) >= limit:
                    yield _result(ray, waiting.popleft())
            while waiting:
                yield _result(ray, waiting.popleft())


def reserved(nodes: Sequence[int], workers: int, threads: int) -> int:
    """Processor cores that a call reserves, so that no more than so many run at a time: the most that leave room for all of them.

    Args:
        nodes: the cores of every machine; a call runs on one.
        workers: how many at a time; 0: as many as there is room for.
        threads: cores that a call needs.

    Example:
        >>> reserved([16], 2, 1), reserved([16, 16, 16, 16], 2, 1), reserved([16, 4], 2, 1), reserved([2], 9, 1)
        (8, 16, 8, 1)
    """
    if not workers:
        return threads
    return next((cpus for cpus in range(max(nodes), threads, -1) if sum(cores // cpus for cores in nodes) >= workers), threads)


def _trial(function: Callable[..., Any], threads: int, *given: Any) -> Any:
    torch.set_num_threads(threads)
    return function(*given)


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from error
