"""Waiting for samples without holding a thread, and answering: at once, or as events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from typing import Any

from fewstep.errors import MissingExtraError
from fewstep.serve.messages import SamplesAsk, StreamAsk
from fewstep.serve.served import npy_of, png_of
from fewstep.serve.service import Claim, RefusedError, Running, Service

try:
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
except ImportError as error:
    raise MissingExtraError("FastAPI", "serve", "The server") from error

__all__ = ["Events", "answer"]

BEAT = 10.0
"""Seconds between signs of life in a stream that has nothing to say."""
GONE = 499
"""Status of an answer that nobody reads, as proxies write it into their logs."""

log = logging.getLogger("fewstep.serve")


class Wait:
    """What a request waits for: its samples, the client's leave, the end of its time.

    Args:
        running: the request.
        receive: of its connection.
        until: the end of its time, on the event loop's clock.
    """

    def __init__(self, running: Running, receive: Any, until: float):
        self._loop = asyncio.get_running_loop()
        self._until = until
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._gone = asyncio.ensure_future(_disconnected(receive))
        running.ticket.add_done_callback(lambda _: self.from_thread(_settle, self._done))

    def from_thread(self, act: Any, *arguments: Any) -> None:
        """Have the event loop call something."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(act, *arguments)

    async def end(self, *others: asyncio.Future[Any], within: float = math.inf) -> str:
        """``"done"``, ``"gone"`` or ``"late"``; ``""`` if one of the others came first, or nothing within so many seconds."""
        left = self._until - self._loop.time()
        await asyncio.wait(
            {self._done, self._gone, *others}, timeout=max(0.0, min(left, within)), return_when=asyncio.FIRST_COMPLETED
        )
        if self._gone.done():
            return "gone"
        if self._done.done():
            return "done"
        return "late" if self._loop.time() >= self._until else ""

    def close(self) -> None:
        """Stop watching the connection."""
        self._gone.cancel()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _late(service: Service) -> RefusedError:
    return RefusedError(504, f"not done within {service.settings.timeout:g} s: the request is cancelled.")


async def answer(service: Service, ask: SamplesAsk, request: Request) -> Response:
    """The samples in one answer.

    Raises:
        RefusedError: if there are none.
    """
    claim, until = Claim(), asyncio.get_running_loop().time() + service.settings.timeout
    try:
        running = await run_in_threadpool(service.submit, claim, ask)
        wait = Wait(running, request.receive, until)
        try:
            end = await wait.end()
        finally:
            wait.close()
        if end == "gone":
            return Response(status_code=GONE)
        if end == "late":
            raise _late(service)
        return await run_in_threadpool(_written, service, ask, claim.own, running)
    finally:
        service.forget(claim)


def _written(service: Service, ask: SamplesAsk, own: str, running: Running) -> Response:
    """The answer in the form that was asked for."""
    samples, model = service.samples(own, running), service.model
    if ask.format == "json":
        return JSONResponse(service.pictures(own, running, samples).model_dump())
    head = {"x-fewstep-id": own, "x-fewstep-plan": running.plan.digest, "x-fewstep-calls": str(running.plan.nfe)}
    if ask.format == "png" and model.pictures:
        return Response(png_of(model.shown(samples), model.data_range), media_type="image/png", headers=head)
    return Response(npy_of(samples), media_type="application/x-npy", headers=head)


class Events(Response):
    """Samples as server-sent events.

    Args:
        service: the engine behind the server.
        ask: what is asked for.
    """

    def __init__(self, service: Service, ask: StreamAsk):
        super().__init__()
        self.service, self.ask, self.claim = service, ask, Claim()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        until = asyncio.get_running_loop().time() + self.service.settings.timeout
        try:
            running = await run_in_threadpool(self.service.submit, self.claim, self.ask, self.ask.previews)
            head = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            await self._run(running, Wait(running, receive, until), send)
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.service.forget(self.claim)

    async def _run(self, running: Running, wait: Wait, send: Any) -> None:
        told = {"id": self.claim.own, "nfe": running.plan.nfe, "plan": running.plan.digest, "samples": len(running.seeds)}
        latest: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        try:
            await _tell(send, "accepted", told)
            if self.ask.previews:
                self.service.watch(running, lambda preview: wait.from_thread(_replace, latest, preview))
            end = await self._until_end(wait, latest, send)
        finally:
            wait.close()
        if end == "gone":
            return
        await _tell(send, *await self._ending(end, running))

    async def _ending(self, end: str, running: Running) -> tuple[str, dict[str, Any]]:
        """The last event."""
        try:
            if end == "late":
                raise _late(self.service)
            samples = await run_in_threadpool(self.service.samples, self.claim.own, running)
            pictures = await run_in_threadpool(self.service.pictures, self.claim.own, running, samples)
        except RefusedError as refusal:
            return "failed", {"status": refusal.status, "detail": refusal.detail}
        except Exception as error:
            log.exception("a stream failed; %s", self.claim.own, exc_info=error)
            told = f"the server failed on this request; its id in the log is {self.claim.own}."
            return "failed", {"status": 500, "detail": told}
        return "done", pictures.model_dump()

    async def _until_end(self, wait: Wait, latest: asyncio.Queue[dict[str, Any]], send: Any) -> str:
        """Send previews until the samples are done, the client is gone, or it is late."""
        while True:
            preview = asyncio.ensure_future(latest.get())
            try:
                end = await wait.end(preview, within=BEAT)
                if end:
                    return end
                if preview.done():
                    await _tell(send, "preview", preview.result())
                else:
                    await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
            finally:
                preview.cancel()


def _replace(latest: asyncio.Queue[dict[str, Any]], preview: dict[str, Any]) -> None:
    """Keep the newest preview alone: a client that reads slowly misses some."""
    while not latest.empty():
        latest.get_nowait()
    latest.put_nowait(preview)


async def _tell(send: Any, name: str, data: dict[str, Any]) -> None:
    text = f"event: {name}\ndata: {json.dumps(data)}\n\n"
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
