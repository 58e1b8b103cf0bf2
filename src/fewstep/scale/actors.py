"""Blocks drawn by actors of Ray, and trials run by its tasks: the only file that imports Ray.

An actor opens the model once and fixes its threads. The `Coordinator` says what each does; here are only its eyes and hands. An actor
that dies is replaced; one that does not answer is not waited for, because others do its blocks again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fewstep.errors import FewstepError, MissingExtraError
from fewstep.scale.address import check_address
from fewstep.scale.coordinator import Coordinator
from fewstep.scale.job import Drawer, Job
from fewstep.scale.run import Tally

__all__ = ["RayEngine", "cores_of_nodes", "import_ray", "ray_session"]

MOST_STILLBORN = 20
"""Workers that may die one after the other before any of them has opened the model."""

STARTS = 3
"""Times that a session is tried to be started."""

NOT_PRINTED = "A worker died or was killed while executing a task"
"""What begins a page that Ray prints to standard output, whatever it is told of logging; that a worker was lost is told by us."""


def import_ray() -> Any:
    """The library, without the page that it prints on every worker that dies, unless the environment says otherwise.

    Raises:
        MissingExtraError: if it is not installed.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", NOT_PRINTED)  # read when Ray is imported for the first time
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("Ray", "scale", "Work on several processes or machines") from error
    return ray


@contextmanager
def ray_session(address: str | None, cores: int) -> Iterator[Any]:
    """Ray, connected within it: the session that is there, else the cluster of the address, else one of this machine alone.

    Args:
        address: of a cluster, see `fewstep.scale.address.check_address`; None: a new session on this machine, which goes with this
            context.
        cores: that a new session shall offer at least.

    Raises:
        ValueError, FewstepError: for an address where no cluster is.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        _start_here(ray, num_cpus=max(cores, os.cpu_count() or 1), include_dashboard=False, **quiet)
    else:
        check_address(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            why = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0]
            raise FewstepError(f"no connection to a Ray cluster at {address}: {why}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def cores_of_nodes(ray: Any, threads: int) -> list[int]:
    """The processor cores of every machine of the cluster.

    Raises:
        FewstepError: if none of them has as many as a worker has threads.
    """
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if max(cores, default=0) < threads:
        raise FewstepError(f"the cluster has no worker with {threads} processor cores: give fewer threads.")
    return cores


def _start_here(ray: Any, **options: Any) -> None:
    """A session of this machine alone. Where the machine is busy, Ray's own limit of half a minute may be too short: it is tried again."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    for left in reversed(range(STARTS)):
        try:
            ray.init(address="local", **options)
        except Exception as error:  # noqa: PERF203  Ray has no class of its own for this
            ray.shutdown()
            if not left or "timed out" not in str(error):
                raise
        else:
            return


class _Artist:
    """What an actor is: a drawer with its process."""

    def __init__(self, job: Job):
        self.job = job
        self.drawer: Drawer | None = None

    def ready(self) -> int:
        """Open the model; the number of the process. An error here is the model's own, and told as such."""
        self.drawer = Drawer(self.job)
        return os.getpid()

    def draw(self, block: int) -> bytes:
        """A block as members of a tar file."""
        assert self.drawer is not None, "draw before ready"
        return self.drawer(block)


@dataclass(frozen=True)
class RayEngine:
    """Draws blocks in actors of Ray.

    Args:
        workers: how many; 0: as many as the cluster has processor cores for, one for every ``job.threads``.
        address: of a cluster; None: this machine.
        depth, copies, patience, most_deaths: as of `Coordinator`.
        told: called with "ready" or "died" and the process number of a worker.

    Raises:
        ValueError: for a negative number of workers.
    """

    workers: int = 0
    address: str | None = None
    depth: int = 2
    copies: int = 2
    patience: float = 2.0
    most_deaths: int = 3
    told: Callable[[str, int], None] | None = None

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}.")

    def run(self, job: Job, drawer: Drawer, blocks: Sequence[int], keep: Callable[[int, bytes], None]) -> Tally:
        """See `fewstep.scale.run.Engine`.

        Raises:
            BlockError: if one worker after the other dies on the same block.
            FewstepError: if the cluster has no room for a worker, or workers die before they have opened the model.
        """
        with ray_session(self.address, self.workers * job.threads) as ray:
            room = sum(cores // job.threads for cores in cores_of_nodes(ray, job.threads))
            workers = min(self.workers or room, len(blocks))
            work = Coordinator(blocks, depth=self.depth, copies=self.copies, patience=self.patience, most_deaths=self.most_deaths)
            company = _Company(ray, ray.put(job), job, self.told)
            try:
                for _ in range(workers):
                    company.hire()
                while not work.done:
                    for worker, block in work.assign(time.monotonic()):
                        company.give(worker, block)
                    for worker, block, content in company.listen(work.wake(time.monotonic())):
                        _heard(work, company, worker, block, content, keep)
            finally:
                company.dismiss()
            return Tally(workers, work.deaths, work.repeated)


def _heard(work: Coordinator, company: _Company, worker: Any, block: int | None, content: Any, keep: Any) -> None:
    """Tell the coordinator, and keep a block that is new."""
    if content is _DEAD:
        if worker in company.actors:
            company.bury(worker)
            work.died(worker)
            company.hire()
    elif content is _LOST and block is not None:
        work.lost(worker, block)
    elif block is None:
        work.joined(worker)
    elif work.finished(worker, block, time.monotonic()):
        keep(block, content)


_DEAD, _LOST = object(), object()


class _Company:
    """The actors, and what they were asked for."""

    def __init__(self, ray: Any, job: Any, about: Job, told: Callable[[str, int], None] | None):
        self.ray, self.job, self.told = ray, job, told
        on_gpu = about.device.startswith("cuda")
        self._make = ray.remote(_Artist).options(num_cpus=about.threads, num_gpus=int(on_gpu), max_restarts=0)
        self.actors: dict[int, Any] = {}
        self._processes: dict[int, int] = {}
        self._asked: dict[Any, tuple[int, int | None]] = {}
        self._hired = self._stillborn = 0

    def hire(self) -> None:
        """One more worker; it is heard of when it is ready."""
        worker, self._hired = self._hired, self._hired + 1
        self.actors[worker] = self._make.remote(self.job)
        self._asked[self.actors[worker].ready.remote()] = worker, None

    def give(self, worker: Any, block: int) -> None:
        """Ask a worker for a block."""
        self._asked[self.actors[worker].draw.remote(block)] = worker, block

    def bury(self, worker: int) -> None:
        """Forget a worker that died."""
        del self.actors[worker]
        self._stillborn = 0 if worker in self._processes else self._stillborn + 1
        if self._stillborn >= MOST_STILLBORN:
            raise FewstepError(
                f"{self._stillborn} workers died one after the other before the model was open: is there memory for it?"
            )
        if worker in self._processes:
            self._tell("died", self._processes.pop(worker))
        self._asked = {ref: (other, block) for ref, (other, block) in self._asked.items() if other != worker}

    def listen(self, timeout: float | None) -> list[tuple[int, int | None, Any]]:
        """Who answered what: (worker, block or None for being ready, content). Waits for one answer at least, or the time-out."""
        errors = self.ray.exceptions
        found, _ = self.ray.wait(list(self._asked), num_returns=1, timeout=timeout)
        heard = []
        for ref in found:
            worker, block = self._asked.pop(ref)
            content: Any
            try:
                content = self.ray.get(ref)
            except errors.RayTaskError as error:  # of the model, not of the machine: it would come again
                raise error.as_instanceof_cause() from error
            except errors.ObjectLostError:
                content = _LOST
            except (errors.RayActorError, errors.WorkerCrashedError):
                content = _DEAD
            if block is None and content is not _DEAD:
                self._processes[worker] = content
                self._stillborn = 0
                self._tell("ready", content)
            heard.append((worker, block, content))
        return heard

    def dismiss(self) -> None:
        """End all workers, whatever they do."""
        for actor in self.actors.values():
            self.ray.kill(actor)

    def _tell(self, what: str, process: int) -> None:
        if self.told is not None:
            self.told(what, process)
