"""Between HTTP and the engine: a message becomes a request of the engine, what comes back becomes pictures, and nobody is forgotten.

Every request has an id that only its sender learns. `Service.submit` gives it to the engine, `Service.forget` ends it, whatever became of
it: a client that goes away, a time-out and an error all end there, and what has not finished is cancelled.
"""

from __future__ import annotations

import base64
import logging
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fewstep.errors import FewstepError, NetworkError, PlanError, UnknownNameError
from fewstep.plan import Plan
from fewstep.serve.messages import Ask, ModelCard, Nodes, Pictures
from fewstep.serve.metrics import Metrics
from fewstep.serve.requests import EngineClosedError, QueueFullError, Request
from fewstep.serve.served import PlanShelf, ServedModel, npy_of, pngs_of, short_line
from fewstep.serve.settings import Settings

__all__ = ["Claim", "RefusedError", "Running", "Service"]

NFE, SOLVER, GRID, FINAL = 10, "auto", "auto", "zero"
LONGEST_PAUSE = 60
"""Seconds that a client is told to wait at most when the queue is full."""

log = logging.getLogger("fewstep.serve")


class RefusedError(Exception):
    """A request that gets no samples: the status and one line why."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None):
        super().__init__(detail)
        self.status, self.detail, self.headers = status, short_line(detail), headers or {}


@dataclass
class Running:
    """A request that the engine has."""

    plan: Plan
    seeds: list[int]
    ticket: Any
    began: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Claim:
    """What a request is told by: its id, and whether it is over. A request may be over while a thread still submits it."""

    own: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    over: bool = False


class Service:
    """An engine behind a server.

    Args:
        engine: see `fewstep.serve.Engine`.
        model: what requests are translated with.
        settings: plans, token and limits.
        metrics: where figures go.

    Attributes:
        draining: whether requests for samples are refused, because the server ends.

    Raises:
        PlanError: for a plan of another noise schedule than the model's.
    """

    def __init__(self, engine: Any, model: ServedModel, settings: Settings, metrics: Metrics):
        for name, plan in settings.plans.items():
            if not model.denoiser.schedule.same_noise(plan.schedule):
                raise PlanError(f"the plan {name!r} was made for another noise schedule than that of {model.info.name}.")
        self.engine, self.model, self.settings, self.metrics = engine, model, settings, metrics
        self.draining = False
        self.routes: frozenset[str] = frozenset()
        self._shelf = PlanShelf(model.denoiser.schedule)
        self._running: dict[str, Running] = {}
        self._clients: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._watched = 0
        self._streams = ThreadPoolExecutor(settings.streams, "fewstep-previews")

    @property
    def state(self) -> Literal["alive", "dead", "stalled"]:
        """Of the engine: dead if its thread has ended, stalled if it has work and has not moved for as long as the settings allow."""
        if not self.engine.alive:
            return "dead"
        return "stalled" if self.engine.stalled() > self.settings.stall else "alive"

    @property
    def alive(self) -> bool:
        """Whether the engine runs what it is given."""
        return self.state == "alive"

    # ---- what is served --------------------------------------------------------------------------------------------------------------

    def card(self, solvers: list[str], grids: list[str]) -> ModelCard:
        """What is served, and the limits."""
        model, settings = self.model, self.settings
        known = model.classes
        return ModelCard(
            name=model.info.name,
            shape=list(model.info.shape),
            pictures=model.pictures,
            classes=None if known is None else known["classes"],
            needs_class=known is not None and "null" not in known,
            prompts=model.takes_prompts,
            guidance=model.null is not None or model.distilled,
            solvers=solvers,
            grids=grids,
            plans={name: plan.nfe for name, plan in settings.plans.items()},
            limits={"samples": settings.samples, "calls": settings.calls, "seconds": settings.timeout, "bytes": settings.body},
        )

    def plan_of(self, ask: Any) -> Plan:
        """The plan that is asked for, by its name or by what it is made of.

        Raises:
            RefusedError: 422, if there is none.
        """
        parts = {name: getattr(ask, name) for name in ("nfe", "solver", "grid", "final")}
        try:
            if ask.plan is not None:
                if ask.plan not in self.settings.plans:
                    raise UnknownNameError("plan", ask.plan, self.settings.plans)
                if given := [name for name, value in parts.items() if value is not None]:
                    raise PlanError(f"plan and {given[0]} contradict each other: a plan runs as it was made. Leave one out.")
                plan = self.settings.plans[ask.plan]
            else:
                nfe = NFE if parts["nfe"] is None else parts["nfe"]
                self._check_calls(nfe)
                plan = self._shelf(parts["solver"] or SOLVER, parts["grid"] or GRID, parts["final"] or FINAL, nfe)
        except (FewstepError, ValueError) as error:
            raise RefusedError(422, str(error)) from error
        self._check_calls(plan.nfe)
        return plan

    def _check_calls(self, nfe: int) -> None:
        if nfe > self.settings.calls:
            raise RefusedError(422, f"a sample has at most {self.settings.calls} calls here, got {nfe}.")

    def nodes(self, plan: Plan) -> Nodes:
        """A plan as it is drawn."""
        with np.errstate(divide="ignore"):
            lam, alpha, sigma = plan.schedule.lam(plan.grid), plan.schedule.alpha(plan.grid), plan.schedule.sigma(plan.grid)
        return Nodes(
            nfe=plan.nfe,
            digest=plan.digest,
            stochastic=plan.stochastic,
            grid=plan.grid.tolist(),
            tau=plan.tau.tolist(),
            lam=[value if math.isfinite(value) else None for value in np.asarray(lam).tolist()],
            alpha=np.asarray(alpha).tolist(),
            sigma=np.asarray(sigma).tolist(),
            text=plan.show(),
        )

    # ---- one request -----------------------------------------------------------------------------------------------------------------

    def submit(self, claim: Claim, ask: Ask, previews: int = 0) -> Running:
        """Give a request to the engine under the claim that it will be forgotten by.

        Raises:
            RefusedError: 422 for what cannot be, 503 when the queue is full.
        """
        plan, seeds = self.plan_of(ask), self._seeds(ask)
        try:
            self.engine.check_room(len(seeds))  # before a text is encoded
            cond = self.model.conditions(len(seeds), ask.label, ask.prompt, ask.guidance)
            scale = 1.0 if self.model.distilled else ask.guidance
            ticket = self.engine.submit(Request(plan, seeds, cond, scale, previews, keep=1))
        except QueueFullError as error:
            raise RefusedError(503, str(error), {"retry-after": str(self.pause(len(seeds)))}) from error
        except EngineClosedError as error:
            raise self._ended() from error
        except (FewstepError, ValueError, TypeError) as error:
            raise RefusedError(422, str(error)) from error
        running = Running(plan, seeds, ticket)
        with self._changed:
            if not claim.over:
                self._running[claim.own] = running
                return running
        ticket.cancel()
        self.metrics.ended(plan.nfe, "cancelled", samples=0, seconds=0.0)
        raise RefusedError(409, "the request was cancelled.")

    def _seeds(self, ask: Ask) -> list[int]:
        if ask.seeds is not None and (ask.seed is not None or ask.count is not None):
            raise RefusedError(422, "seeds stand for seed and count: leave these out.")
        first, count = ask.seed or 0, 1 if ask.count is None else ask.count
        seeds = list(range(first, first + count)) if ask.seeds is None else ask.seeds
        if len(seeds) > self.settings.samples:
            raise RefusedError(422, f"a request has at most {self.settings.samples} samples here, got {len(seeds)}.")
        return seeds

    def pause(self, count: int) -> int:
        """Seconds after which a full queue has probably room for so many samples: the work of as many as must go, at the pace of the last
        network calls. Before the first call is over, as long as the oldest request has waited. At least 1, at most `LONGEST_PAUSE`.
        """
        now, held = time.monotonic(), self.engine.statistics()
        there = held.waiting + held.running
        over = min(there, max(1, there + count - self.engine.rows - self.engine.waiting))
        with self._changed:
            oldest = min((running.began for running in self._running.values()), default=now)
        seconds = held.left * over / (max(1, there) * held.pace) if held.pace else now - oldest
        return min(LONGEST_PAUSE, max(1, math.ceil(seconds)))

    def cancel(self, own: str) -> bool:
        """Cancel the request of this id; False if there is none."""
        with self._changed:
            running = self._running.get(own)
        if running is None:
            return False
        running.ticket.cancel()
        return True

    def cancel_all(self) -> None:
        """Cancel every request."""
        with self._changed:
            running = list(self._running.values())
        for each in running:
            each.ticket.cancel()

    def forget(self, claim: Claim) -> None:
        """The request is over, for whatever reason: what has not finished is cancelled, and it is counted."""
        with self._changed:
            claim.over = True
            running = self._running.pop(claim.own, None)
        if running is None:
            return
        running.ticket.cancel()
        end = "cancelled" if not running.ticket.done() else running.ticket.state
        seconds = time.monotonic() - running.began
        self.metrics.ended(running.plan.nfe, end, samples=len(running.seeds), seconds=seconds)

    def samples(self, own: str, running: Running) -> Tensor:
        """The samples of a request that is done.

        Raises:
            RefusedError: 500 if the network failed for it, 409 if it was cancelled, 503 if that was because the server ends.
        """
        if running.ticket.state == "cancelled":
            raise RefusedError(503, "the server ended.") if self.draining else RefusedError(409, "the request was cancelled.")
        try:
            return running.ticket.result(0)
        except EngineClosedError as error:
            raise self._ended() from error
        except NetworkError as error:
            log.warning("request %s failed: %s", own, error)
            raise RefusedError(
                500, f"the network failed for this request, and for no other; its id in the log is {own}."
            ) from error

    def _ended(self) -> RefusedError:
        return RefusedError(503, "the engine of this server has ended.")

    def pictures(self, own: str, running: Running, samples: Tensor) -> Pictures:
        """Samples as JSON."""
        images = pngs_of(self.model.shown(samples), self.model.data_range) if self.model.pictures else None
        npy = None if images is not None else base64.b64encode(npy_of(samples)).decode()
        return Pictures(id=own, seeds=running.seeds, nfe=running.plan.nfe, plan=running.plan.digest, images=images, npy=npy)

    def watch(self, running: Running, tell: Callable[[dict[str, Any]], None]) -> None:
        """Have a thread tell the newest preview of a request, as they come. If all threads are taken, it gets none."""
        with self._changed:
            if self._watched >= self.settings.streams:
                return
            self._watched += 1
        try:
            self._streams.submit(self._told_previews, running, tell).add_done_callback(self._unwatch)
        except RuntimeError:  # after `close`
            self._unwatch(None)

    def _unwatch(self, told: Future[None] | None) -> None:
        with self._changed:
            self._watched -= 1
        if told is not None and not told.cancelled() and (error := told.exception()) is not None:
            log.error("previews of a request could not be shown", exc_info=error)

    def _told_previews(self, running: Running, tell: Callable[[dict[str, Any]], None]) -> None:
        for preview in running.ticket.previews():
            if running.ticket.done():  # nobody looks at it any more
                return
            images = pngs_of(self.model.shown(preview.samples), self.model.data_range) if self.model.pictures else None
            npy = None if images is not None else base64.b64encode(npy_of(preview.samples)).decode()
            tell({"call": preview.call, "nfe": preview.calls, "images": images, "npy": npy})

    def close(self) -> None:
        """Take no more previews. The engine is closed by who made it."""
        self._streams.shutdown(wait=False, cancel_futures=True)

    # ---- coming and going, as `fewstep.serve.gate.Watch` -------------------------------------------------------------------------------

    def enter(self, client: str) -> bool:
        """A request for samples comes; False if its client has too many."""
        with self._changed:
            if self.settings.per_client and self._clients[client] >= self.settings.per_client:
                return False
            self._clients[client] += 1
            self.metrics.open.inc()
            return True

    def leave(self, client: str) -> None:
        """It is over."""
        with self._changed:
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]
            self.metrics.open.dec()
            self._changed.notify_all()

    def answered(self, path: str, method: str, status: int) -> None:
        """An answer begins."""
        route = path if path in self.routes else "/samples/{id}" if path.startswith("/samples/") else "other"
        self.metrics.answered(route, method, status)

    def drain(self, seconds: float) -> bool:
        """Take no more requests, and wait until those that run are answered; False if some still run after so many seconds."""
        self.draining = True
        with self._changed:
            return self._changed.wait_for(lambda: not self._clients, seconds)
