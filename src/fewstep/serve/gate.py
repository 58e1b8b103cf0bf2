"""What every request passes before the server looks at it: token, size of the body, time, whether the server still takes requests.

A plain ASGI layer, so that a client that goes away is noticed behind it.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from fewstep.serve.settings import Settings

__all__ = ["Gate", "Watch"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = ("/", "/health", "/ready", "/openapi.json")
"""Paths that need no token; and the files of the page."""
PAGE = "/page/"
WORK = ("/samples", "/samples/stream")
"""Paths that a server which is told to stop refuses."""
GRACE = 5.0
"""Seconds after the time-out of a request in which its answer must be on its way, or the connection is closed."""
BODY_SECONDS = 10.0
SAFETY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
)

log = logging.getLogger("fewstep.serve")


class Watch(Protocol):
    """What the gate asks of the server, and tells it."""

    @property
    def draining(self) -> bool:
        """Whether requests for samples are refused, because the server ends."""
        ...

    def enter(self, client: str) -> bool:
        """A request for samples comes; False if its client has too many."""
        ...

    def leave(self, client: str) -> None:
        """It is over."""
        ...

    def answered(self, path: str, method: str, status: int) -> None:
        """An answer begins."""
        ...


class Gate:
    """Lets a request through to `app`, or answers it.

    Args:
        app: an ASGI application.
        settings: limits and token.
        watch: the server behind it.
    """

    def __init__(self, app: Any, settings: Settings, watch: Watch):
        self.app, self.settings, self.watch = app, settings, watch

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, method, begun = scope["path"].removeprefix(scope.get("root_path", "")), scope["method"], False

        async def told(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self.watch.answered(path, method, message["status"])
                message = {**message, "headers": [*message.get("headers", ()), *SAFETY]}
            await send(message)

        within = self.settings.timeout + BODY_SECONDS + GRACE
        work = asyncio.ensure_future(self._let_through(scope, receive, told, path))
        try:
            done, _ = await asyncio.wait({work}, timeout=within)
        finally:
            if not work.done():
                work.cancel()
        if done:
            await work
            return
        await asyncio.wait({work}, timeout=GRACE)
        log.warning("an answer to %s was not taken within %g s and is broken off", path.encode("ascii", "replace").decode(), within)
        if not begun:
            await _answer(told, 504, "the answer took too long.")

    async def _let_through(self, scope: Message, receive: Receive, send: Send, path: str) -> None:
        if not self._known(scope, path):
            await _answer(
                send, 401, "give the token of this server as Authorization: Bearer TOKEN.", {"www-authenticate": "Bearer"}
            )
            return
        body, status, why = await self._body(scope, receive)
        if body is None:
            await _answer(send, status, why, {"connection": "close"})
            return
        if scope["method"] != "POST" or path not in WORK:
            await self.app(scope, _replayed(body, receive), send)
            return
        if self.watch.draining:
            await _answer(
                send,
                503,
                "the server is about to end and takes no more requests.",
                {"retry-after": str(max(1, math.ceil(self.settings.drain)))},
            )
            return
        client = (scope.get("client") or ("", 0))[0]
        if not self.watch.enter(client):
            why = f"{self.settings.per_client} of your requests are running, as many as this server allows: wait for one of them."
            await _answer(send, 429, why, {"retry-after": "1"})
            return
        try:
            await self.app(scope, _replayed(body, receive), send)
        finally:
            self.watch.leave(client)

    def _known(self, scope: Message, path: str) -> bool:
        token = self.settings.token
        if token is None or path in OPEN or path.startswith(PAGE):
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, rest = given.partition(b" ")
        return hmac.compare_digest(rest.strip(), token.encode()) and scheme.lower() == b"bearer"

    async def _body(self, scope: Message, receive: Receive) -> tuple[bytes | None, int, str]:
        """The body, or None with the status and the reason to refuse it."""
        most, pieces, size = self.settings.body, [], 0
        large = f"a request has at most {most} bytes."
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if said.isdigit() and int(said[:20]) > most:
            return None, 413, large
        loop = asyncio.get_running_loop()
        until = loop.time() + BODY_SECONDS
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - loop.time()))
            except asyncio.TimeoutError:
                return None, 408, f"the body did not come within {BODY_SECONDS:g} s."
            if message["type"] != "http.request":
                return b"", 0, ""  # the client went away: nobody reads the answer
            size += len(message.get("body", b""))
            if size > most:
                return None, 413, large
            pieces.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(pieces), 0, ""


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body again, then what comes after it: that the client went away."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


async def _answer(send: Send, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
    body = json.dumps({"detail": detail}).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    head += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
