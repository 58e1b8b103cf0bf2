"""An engine keeps one model on its device and makes the samples of many requests together; see `fewstep.serve.batches` for how."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.denoisers import check_conditions, innermost
from fewstep.errors import PlanError
from fewstep.guidance import ClassifierFree, check_null, null_like
from fewstep.noise import check_seeds
from fewstep.plan import Plan
from fewstep.sampler import Step, check_fit, prepare, transform_start
from fewstep.serve.batches import Batches
from fewstep.serve.conditions import key, mark
from fewstep.serve.requests import EngineClosedError, QueueFullError, Request, Ticket, kind_of
from fewstep.serve.schedulers import Scheduler, make_scheduler
from fewstep.serve.statistics import Statistics
from fewstep.serve.work import Job

__all__ = ["Engine"]

logger = logging.getLogger("fewstep.serve")
REMEMBERED_PLANS = 64
"""Of so many plans that were used last the steps are kept, their arrays on the device."""
REMEMBERED_SCALES = 16
"""With so many scales of guidance a plan is known to fit."""
REMEMBERED_LATENCIES = 4096


class Engine:
    """One model on one device, and a thread that makes its network calls. All methods may be used from any thread.

    Args:
        denoiser: ``D(x, t, **cond)`` -> data prediction of x's shape, in new memory at every call, for a time or a vector ``"batch"`` of
            times on the host; see `fewstep.Denoiser`. Nobody else should use it meanwhile.
        shape: of one sample, without the batch.
        null: for requests with guidance, names of conditions with the values that stand for none, as for
            `fewstep.guidance.ClassifierFree`.
        rows: of a network call at most. Larger requests run in pieces.
        scheduler: ``"fifo"``, ``"shortest-remaining"``, ``"maxweight"``, ``"softmw"``, ``"ssmw"``, or a
            `fewstep.serve.schedulers.Scheduler`.
        waiting: how many samples may be unfinished beyond `rows` of them.
        device, dtype: of the states. Left out, the device is that of the network's parameters, or the host; float32.

    Raises:
        ValueError: for a shape, rows, waiting or dtype that cannot be.
        UnknownNameError: for an unknown scheduler.

    Example:
        >>> import fewstep as fs
        >>> from fewstep.exact import Gaussian
        >>> exact = Gaussian(fs.schedules.Flow(), [0.0, 1.0], 0.01)
        >>> plans = [fs.make_plan("ddim", exact.schedule, nfe=n, final="zero") for n in (2, 5)]
        >>> with Engine(exact, (2,), rows=8) as engine:
        ...     tickets = [engine.submit(Request(plan, seeds=range(3))) for plan in plans]
        ...     samples = [ticket.result() for ticket in tickets]
        >>> [tuple(x.shape) for x in samples], engine.statistics().finished
        ([(3, 2), (3, 2)], 2)
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        shape: Sequence[int],
        *,
        null: Mapping[str, float | Tensor] | None = None,
        rows: int = 64,
        scheduler: str | Scheduler = "fifo",
        waiting: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.denoiser = denoiser
        self.shape = _checked_shape(shape)
        self.null = None if null is None else check_null(null)
        self.rows, self.waiting = _at_least("rows", rows, 1), _at_least("waiting", waiting, 0)
        self.dtype = torch.float32 if dtype is None else dtype
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is that of the states, float32 or float64, got {dtype}. The network may have another.")
        self.device = _device_of(denoiser) if device is None else torch.device(device)
        self.scheduler = make_scheduler(scheduler)
        self._batches = Batches(denoiser, self.shape, self.rows, self.scheduler, dtype=self.dtype, device=self.device)
        self._lock = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._unfinished: dict[Ticket, int] = {}
        self._arrivals = 0
        self._closing = False
        self._broken: BaseException | None = None
        self._ends: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=REMEMBERED_LATENCIES)
        self._plans: OrderedDict[int, tuple[Plan, list[Step], set[float]]] = OrderedDict()
        self._made = self._moved = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="fewstep-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(drain=kind is None)

    def submit(self, request: Request) -> Ticket:
        """Ask for samples. Returns at once.

        Raises:
            PlanError: if the plan is of another schedule, model or shape than the engine's, or a condition is none of the model's.
            ValueError, TypeError: for seeds, guidance, previews or conditions that cannot be.
            QueueFullError: if too many samples are unfinished.
            EngineClosedError: after `close`.
        """
        seeds = check_seeds(request.seeds)
        self._check_numbers(request, len(seeds))
        self.check_room(len(seeds))  # before any work is done for it, and again after
        steps = self._steps(request)
        conditional, free = self._conditions(request, len(seeds))
        ticket = Ticket(request, self._ended)
        with self._lock:
            self._admit(len(seeds))
            self._arrivals += 1
            if not self._unfinished:  # it was idle, not stuck
                self._moved = time.monotonic()
            kind = request.kind or kind_of(request.plan.nfe)
            self._inbox.append(Job(ticket, steps, seeds, conditional, free, kind, self._arrivals))
            self._unfinished[ticket] = len(seeds)
            self._lock.notify_all()
        return ticket

    def check_room(self, count: int) -> None:
        """Refuse so many samples now, as `submit` would, before work is done for them.

        Raises:
            QueueFullError: if too many samples are unfinished.
            EngineClosedError: after `close`.
        """
        with self._lock:
            self._admit(count)

    def close(self, *, drain: bool, timeout: float | None = None) -> bool:
        """Take no more requests, and end the thread.

        Args:
            drain: finish what was submitted, instead of cancelling it.
            timeout: seconds after which the rest is cancelled, and then as many again for the network call that is under way.

        Returns:
            whether the thread has ended.
        """
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if threading.current_thread() is self._thread:  # from a callback: it ends after this turn
            if not drain:
                self._cancel_all()
            return False
        if drain:
            self._thread.join(timeout)
        self._cancel_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether it takes requests: not after `close`, nor after its thread has ended by an error."""
        return self._thread.is_alive() and not self._closing and self._broken is None

    def stalled(self) -> float:
        """Seconds since the end of the last network call, or since work came, while there is work; 0.0 while there is none."""
        return time.monotonic() - self._moved if self._unfinished else 0.0

    def statistics(self) -> Statistics:
        """What was done so far."""
        batches = self._batches
        with self._lock:
            ends, latencies = self._ends.copy(), np.array(self._latencies)
            inbox = sum(len(job.seeds) for job in self._inbox)
            left = sum(len(job.seeds) * job.cost * job.plan.nfe for job in self._inbox)
        held = batches.running()
        told = {f"p{q}": float(np.percentile(latencies, q)) for q in (50, 90, 99)} if len(latencies) else {}
        return Statistics(
            seconds=time.monotonic() - self._made,
            calls=batches.calls,
            rows=batches.evaluations,
            retries=batches.retries,
            busy=batches.busy,
            utilisation=batches.evaluations / (batches.calls * self.rows) if batches.calls else 0.0,
            left=held["left"] + left,
            pace=batches.pace,
            waiting=held["waiting"] + inbox,
            running=held["running"],
            finished=ends["finished"],
            failed=ends["failed"],
            cancelled=ends["cancelled"],
            rejected=ends["rejected"],
            latencies={**told, "mean": float(latencies.mean()), "most": float(latencies.max())} if told else {},
        )

    # ---- what is asked -------------------------------------------------------------------------------------------------------------

    def _check_numbers(self, request: Request, count: int) -> None:
        if not count:
            raise ValueError("there are no seeds, so no samples to make. Pass one seed a sample.")
        if count > self.rows + self.waiting:
            raise ValueError(
                f"{count} samples in one request never fit {self.rows} rows and {self.waiting} waiting. Ask for fewer."
            )
        if not math.isfinite(request.guidance):
            raise ValueError(f"guidance must be finite, got {request.guidance}.")
        if request.guidance != 1.0 and self.null is None:
            raise ValueError(f"guidance {request.guidance:g} needs the values for no condition: make the engine with null=.")
        if request.guidance not in (0.0, 1.0) and self.rows < 2:
            raise ValueError("guidance takes two rows a sample, but the engine has rows=1.")
        if not isinstance(request.previews, int) or request.previews < 0:
            raise ValueError(f"previews is a whole number of calls, 0 for none, got {request.previews!r}.")
        if request.keep is not None:
            _at_least("keep", request.keep, 1)

    def _admit(self, count: int) -> None:
        if self._broken is not None:
            raise EngineClosedError(f"the engine's thread ended by {type(self._broken).__name__}: {self._broken}") from self._broken
        if self._closing:
            raise EngineClosedError("the engine is closed and takes no more requests.")
        held = sum(self._unfinished.values())
        if held + count > self.rows + self.waiting:
            self._ends["rejected"] += 1
            raise QueueFullError(f"{held} samples are unfinished, and {self.rows + self.waiting} may be. Try again later.")

    def _steps(self, request: Request) -> list[Step]:
        """The plan's steps, on the device, checked."""
        plan, scale = request.plan, float(request.guidance)
        with self._lock:
            known = self._plans.get(id(plan))
            if known is not None and scale in known[2]:
                self._plans.move_to_end(id(plan))
                return known[1]
        self._check_told(plan)
        like = torch.empty((0, *self.shape), dtype=self.dtype, device=self.device)
        check_fit(self._guided(scale), plan, like, request.seeds)
        transform_start(plan, like)
        steps = prepare(plan, like) if known is None else known[1]
        with self._lock:
            scales = set() if known is None or len(known[2]) >= REMEMBERED_SCALES else known[2]
            self._plans[id(plan)] = (plan, steps, scales | {scale})
            while len(self._plans) > REMEMBERED_PLANS:
                self._plans.popitem(last=False)
        return steps

    def _check_told(self, plan: Plan) -> None:
        """Refuse a plan of another number of calls than the denoiser's network is told, where it is told one."""
        told = getattr(innermost(self.denoiser, "network"), "told_calls", None)
        if told not in (None, plan.nfe) and innermost(self.denoiser, "conditions_of") is None:
            raise PlanError(
                f"this denoiser is that of a student which is told that it makes {told} calls, but the plan makes {plan.nfe}. "
                f"Make the engine with fewstep.serve.served_student(student), which tells each request its own number."
            )

    def _guided(self, scale: float) -> Callable[..., Any]:
        return self.denoiser if scale == 1.0 or self.null is None else ClassifierFree(self.denoiser, scale, self.null)

    def _conditions(self, request: Request, count: int) -> tuple[Any, Any]:
        """Conditions of the conditional prediction and of the one without, as trees; None for what is not asked for."""
        cond = dict(request.cond)
        check_conditions(self.denoiser, cond, count)
        own = innermost(self.denoiser, "conditions_of")  # such as the number of calls, for a student that is told it
        cond |= {} if own is None else own(request.plan)
        given = mark(cond, count, self.device)
        if request.guidance == 1.0 or self.null is None:
            return given, None
        if missing := sorted(self.null.keys() - cond.keys()):
            raise ValueError(f"guidance needs the condition {missing[0]!r}, but got {sorted(cond) or 'no condition'}. Pass it.")
        if request.guidance != 0.0:
            cond |= {name: self._with_batch(name, cond[name], count) for name in self.null}
            given |= mark({name: cond[name] for name in self.null}, count, self.device)
        nulls = {name: _null(name, null, cond[name], count) for name, null in self.null.items()}
        free = given | mark(nulls, count, self.device)
        if request.guidance == 0.0:
            return None, free
        if key(given) != key(free):
            raise ValueError("the null conditions have another shape or type than the conditions. Give both the same.")
        return given, free

    def _with_batch(self, name: str, value: Any, count: int) -> Tensor:
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            return value
        if isinstance(value, (int, float)):
            return torch.full((count,), value, dtype=torch.int64 if isinstance(value, int) else self.dtype)
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the condition {name!r} is {what}, which cannot be guided. Give it one entry a sample ({count}).")

    def _ended(self, ticket: Ticket) -> None:
        """A request is done: by the thread, or cancelled by anybody."""
        with self._lock:
            self._unfinished.pop(ticket, None)
            self._ends[ticket.state] += 1
            if ticket.state == "finished" and ticket.ended is not None:
                self._latencies.append(ticket.ended - ticket.submitted)

    def _cancel_all(self) -> None:
        with self._lock:
            tickets = list(self._unfinished)
        for ticket in tickets:
            ticket.cancel()

    # ---- the thread ----------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._wait_for_work():
                    self._batches.turn()
                    self._moved = time.monotonic()
        except BaseException as error:
            logger.exception("the engine's thread ended by an error")
            self._broken = error
        finally:
            self._leave()

    def _wait_for_work(self) -> bool:
        """Take what was submitted; wait if there is nothing to do. Returns whether to go on."""
        with self._lock:
            while not (self._inbox or self._batches.jobs or self._closing):
                self._lock.wait()
            while self._inbox:
                self._batches.add(self._inbox.popleft())
        return bool(self._batches.jobs) or not self._closing

    def _leave(self) -> None:
        with self._lock:
            self._closing = True
            tickets = list(self._unfinished)
        for ticket in tickets:
            ticket.fail(EngineClosedError(f"the engine's thread ended by an error: {self._broken}"))


def _null(name: str, null: float | Tensor, value: Any, count: int) -> Any:
    return null_like(
        name, null.to(value.device, value.dtype) if isinstance(null, Tensor) and isinstance(value, Tensor) else null, value, count
    )


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape)
    if not sizes or any(not isinstance(size, (int, np.integer)) or size < 1 for size in sizes):
        raise ValueError(f"the shape of a sample must be whole numbers of at least 1, without the batch, got {sizes}.")
    return tuple(int(size) for size in sizes)


def _at_least(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return value


def _device_of(denoiser: object) -> torch.device:
    network = innermost(denoiser, "network")
    if isinstance(network, torch.nn.Module):
        for tensor in network.parameters():
            return tensor.device
    return torch.device("cpu")
