r"""Who averages: groups of workers that sum tensors, and what happens when one of them is lost.

A sum over a group is a transaction: either every worker that goes on has all of it, or none has and nothing was changed.

| group | workers | one is lost |
| --- | --- | --- |
| `FixedGroup` | a process group of `torch.distributed` | reported: `WorkerLostError` in every other, after `timeout` at the latest |
| `ElasticGroup` | processes that share a key-value store | survived: the others form a new group and repeat the sum |
| `SimulatedWorkers` | K in one process, which take turns | (no) |

*How the elastic group agrees.* A collective that fails does so on some workers and may succeed on others, which must not go on with another
average. So a sum counts when all have it: each adds one to a counter in the store, and whoever makes the counter full writes "commit";
whoever fails, or waits too long, writes "abort"; the first to take the ticket of that sum writes, the others read. After "abort" every
survivor signs in for the next generation, for as long as `patience`; the list is then closed, in the same way, and whoever is not on it
stops. The store (`torch.distributed.TCPStore` in the launcher, or `FileStore`) is the one part that must live.
"""

from __future__ import annotations

import abc
import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.errors import FewstepError

__all__ = ["ElasticGroup", "FixedGroup", "WorkerGroup", "WorkerLostError"]

Fill = Callable[[], list[Tensor]]
"""Makes the tensors that this worker contributes; called again when a sum is repeated."""
POLL = 0.02
"""Seconds between looks at the list of survivors."""
LIMIT = 3600.0 * 24.0 * 7.0


class WorkerLostError(FewstepError, RuntimeError):
    """Workers were lost, or this one was given up by the others; the parameters are those of before the synchronisation."""


class WorkerGroup(abc.ABC):
    """Workers that can sum."""

    real: bool = True
    """Whether the workers are processes, and not one process that plays them in turn."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """How many there are now."""

    @property
    @abc.abstractmethod
    def index(self) -> int:
        """Which of them this one is, from 0."""

    @abc.abstractmethod
    def total(self, fill: Fill) -> tuple[list[Tensor], int]:
        """The sums over all workers of what `fill` gives, and how often it had to be tried.

        Raises:
            WorkerLostError: if it cannot be had.
        """

    def attach(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 - most have nothing to do
        """Told once, by the optimizer that uses the group."""

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Around one step of one worker."""
        yield

    def advance(self) -> bool:
        """After a step: have all workers done it?"""
        return True

    def each(self, act: Callable[[], None]) -> None:
        """Do something as every worker that this process is."""
        act()

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint needs beside the optimizer's own state: dictionaries of numbers and tensors."""
        return []

    def restore(self, state: list[dict[str, Any]]) -> None:
        """The inverse of `state`."""
        if state:
            raise ValueError(f"this state is one of simulated workers, and does not fit a {type(self).__name__}.")


class FixedGroup(WorkerGroup):
    """The workers of a process group of `torch.distributed`, with a time limit of our own.

    Args:
        process_group: the group, or None for all processes.
        timeout: seconds after which a worker that does not answer counts as lost.

    Raises:
        ValueError: if `torch.distributed` is not initialised.

    Note:
        The limit needs a group of our own with the same processes, which is made here: all of them must get here.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, timeout: float = 300.0):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "torch.distributed is not initialised. Call torch.distributed.init_process_group in every worker first, or pass "
                "process_group=ElasticGroup(...) or process_group=SimulatedWorkers(...)."
            )
        self.timeout = _seconds("timeout", timeout)
        ranks = dist.get_process_group_ranks(dist.group.WORLD if process_group is None else process_group)
        self.group: Any = dist.new_group(ranks, timeout=timedelta(seconds=timeout), use_local_synchronization=True)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def index(self) -> int:
        return dist.get_rank(self.group)

    def total(self, fill: Fill) -> tuple[list[Tensor], int]:
        device = (
            torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(self.group) == "nccl" else torch.device("cpu")
        )
        tensors = [tensor.to(device) for tensor in fill()]
        try:
            for work in [dist.all_reduce(tensor, group=self.group, async_op=True) for tensor in tensors]:
                assert work is not None
                work.wait()
        except RuntimeError as error:
            raise WorkerLostError(
                f"a synchronisation of {self.size} workers failed: one was lost, or did not come within {self.timeout:g} s. The "
                f"parameters are as before it. Start all again from their checkpoints, or use ElasticGroup to go on without it. ({error})"
            ) from error
        return tensors, 1


class ElasticGroup(WorkerGroup):
    """Processes that share a key-value store, and go on when some of them are lost. Sums are made by gloo, on the CPU.

    A process that was killed is noticed at once, one that hangs after `patience`. The survivors wait as long again for those of them that
    are still computing. So a loss costs between one and four times `patience`, never more. Every worker must reach every synchronisation
    within `patience` of the first: leave room for what one of them does alone, such as an evaluation.

    Args:
        store: a `torch.distributed.Store` that all workers reach and that lives as long as the run, with no keys of an earlier run.
        rank: which worker this is, from 0.
        size: how many there are at the start.
        patience: seconds.
        fewest: with fewer workers the run ends, with an error.
        start: seconds that the first waits for the last at the start.

    Raises:
        WorkerLostError: if not all workers come to the start.
        ValueError: for numbers that make no sense, or a store that was used before.

    Note:
        No new workers are taken in on the way, nor a lost one that comes back: that is told, and its process should end.
    """

    def __init__(self, store: Any, rank: int, size: int, patience: float = 60.0, fewest: int = 1, start: float = 600.0):
        if not 0 <= rank < size or not 1 <= fewest <= size:
            raise ValueError(f"ElasticGroup needs 0 <= rank < size and 1 <= fewest <= size, got {rank}, {size} and {fewest}.")
        self.store, self.rank, self.fewest = store, rank, fewest
        self.patience, start = _seconds("patience", patience), _seconds("start", start)
        self.members = list(range(size))
        self.generation = self.transaction = 0
        self.group: Any = None
        with self._store_errors():
            self._assemble(start)
            self._connected()

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def index(self) -> int:
        return self.members.index(self.rank)

    def total(self, fill: Fill) -> tuple[list[Tensor], int]:
        attempts = 0
        with self._store_errors():
            while True:
                attempts += 1
                tensors = [tensor.cpu() for tensor in fill()]
                if self._committed(f"sum {self.transaction} of generation {self.generation}", tensors):
                    self.transaction += 1
                    return tensors, attempts
                self._regroup()

    def _assemble(self, seconds: float) -> None:
        """Wait until all workers are there."""
        end, come = time.monotonic() + seconds, self.store.add("assembled", 1)
        while come < self.size:
            if time.monotonic() > end:
                raise WorkerLostError(f"only {come} of {self.size} workers came to the start within {seconds:g} s.")
            time.sleep(POLL)
            come = self.store.add("assembled", 0)
        if come > self.size:
            raise ValueError(
                f"{come} workers came to the start of {self.size}: the store has keys of an earlier run; make a new one."
            )

    def _committed(self, key: str, tensors: list[Tensor]) -> bool:
        """Sum in place; whether all members have the result."""
        given_up = self.store.check([f"{key}/ticket"])  # before we came: without us it cannot have been committed
        if given_up or not self._sum(tensors):
            self._decision(key, lambda: "abort")
            return False
        if self.store.add(f"{key}/done", 1) == self.size:
            return self._decision(key, lambda: "commit") == "commit"
        with contextlib.suppress(RuntimeError):  # nobody decided in time: we do
            self._wait(f"{key}/decision")
        return self._decision(key, lambda: "abort") == "commit"

    def _sum(self, tensors: list[Tensor]) -> bool:
        try:
            group = self._connected()
            for work in [group.allreduce([tensor]) for tensor in tensors]:
                work.wait()
        except RuntimeError:
            self.group = None  # closes our ends, so that those who wait for us learn of it at once
            return False
        return True

    def _decision(self, key: str, proposal: Callable[[], str]) -> str:
        """What the first to ask proposed."""
        if self.store.add(f"{key}/ticket", 1) == 1:
            decision = proposal()
            self.store.set(f"{key}/decision", decision)
            return decision
        self._wait(f"{key}/decision")
        return self.store.get(f"{key}/decision").decode()

    def _regroup(self) -> None:
        """Sign in for the next generation, and find out who is in it."""
        self.group, self.generation = None, self.generation + 1
        key = f"generation {self.generation}"
        self.store.set(f"{key}/worker {self.rank}", "here")
        end = time.monotonic() + self.patience
        while time.monotonic() < end and not self.store.check([f"{key}/ticket"]) and self._signed(key) != self.members:
            time.sleep(POLL)
        before, self.members = self.members, json.loads(self._decision(key, lambda: json.dumps(self._signed(key))))
        lost = sorted(set(before) - set(self.members))
        if self.rank not in self.members:
            raise WorkerLostError(f"worker {self.rank} came too late: the others went on without it. Its parameters are as before.")
        if self.size < self.fewest:
            raise WorkerLostError(f"workers {lost} were lost; {self.size} are left, fewer than fewest={self.fewest}.")
        told = f"workers {lost} were lost; {self.size} go on" if lost else "a connection was lost and made again; all go on"
        warnings.warn(f"{told}, from the last average.", RuntimeWarning, stacklevel=2)

    def _signed(self, key: str) -> list[int]:
        """Which members have signed in so far."""
        return [rank for rank in self.members if self.store.check([f"{key}/worker {rank}"])]

    def _connected(self) -> Any:
        """The process group of this generation; made when it is first needed."""
        if self.group is None:
            store = dist.PrefixStore(f"connections {self.generation}", self.store)  # pyright: ignore[reportPrivateImportUsage]
            self.group = dist.ProcessGroupGloo(store, self.index, self.size, timedelta(seconds=self.patience))
        return self.group

    def _wait(self, key: str) -> None:
        self.store.wait([key], timedelta(seconds=self.patience))

    @contextlib.contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, WorkerLostError):
                raise
            raise WorkerLostError(
                f"worker {self.rank} cannot reach the store or the others within {self.patience:g} s: {error}. The parameters are as "
                "before. Start all again from their checkpoints."
            ) from error


def _seconds(name: str, value: float) -> float:
    if not 0.0 < value <= LIMIT:
        raise ValueError(f"{name} is a number of seconds above 0, at most {LIMIT:g}, got {value}.")
    return float(value)
