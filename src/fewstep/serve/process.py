"""A server as a process: it listens, and when it is told to stop it answers what it has begun and ends.

On SIGTERM or Ctrl-C new requests for samples are refused (503, and ``/ready`` says so), those that run have ``Settings.drain`` seconds,
then the rest is cancelled. A second signal ends the wait.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from fewstep.errors import FewstepError, MissingExtraError

__all__ = ["listen", "serve"]

MOST_CONNECTIONS = 1000
WAYS = {
    errno.EADDRINUSE: "Take any port that is free with --port 0.",
    errno.EACCES: "Take a port above 1023 with --port.",
}
OTHER_WAY = "Listen on this machine alone with --host 127.0.0.1."
"""What to do about a host and a port that cannot be had: one way each."""
LAST_SECONDS = 5
"""What connections have to take their last bytes."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: a name or an address.
        port: 0 for any that is free.

    Raises:
        FewstepError: if it cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or 0
        why = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise FewstepError(f"cannot listen on {host}, port {port}: {why}. {WAYS.get(number, OTHER_WAY)}") from error


def serve(app: Any, listening: socket.socket, *, started: Callable[[], None] | None = None) -> bool:
    """Serve an application of `fewstep.serve.http.make_app` until a signal comes. To be called in the main thread.

    Args:
        app: the application.
        listening: see `listen`; it is closed in the end.
        started: called when requests are answered.

    Returns:
        whether all that had begun was answered.

    Raises:
        MissingExtraError: if uvicorn is not installed.
        FewstepError: if the server did not start, or ended by itself.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("uvicorn", "serve", "The server") from error
    service, told = app.state.service, threading.Event()
    config = uvicorn.Config(
        app,
        log_level="error",  # not a line for everything that is no HTTP
        access_log=False,
        lifespan="off",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=LAST_SECONDS,
        server_header=False,
        proxy_headers=False,  # an address is that of the connection, not what a header says
    )
    server = uvicorn.Server(config)
    before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    ends: list[BaseException | None] = []

    def run() -> None:
        try:
            server.run(sockets=[listening])
            ends.append(None)
        except BaseException as error:  # noqa: BLE001  told by the main thread
            ends.append(error)
        told.set()

    thread = threading.Thread(target=run, name="fewstep-http")  # signals stay with us
    try:
        thread.start()
        while not server.started:
            if ends:
                raise FewstepError("the server did not start; what it wrote says why.") from ends[0]
            time.sleep(0.01)
        if started is not None:
            started()
        told.wait()
        if ends:
            raise FewstepError(f"the server ended by itself, by {type(ends[0]).__name__}: {ends[0]}.") from ends[0]
        told.clear()
        return _drained(service, told)
    finally:
        server.should_exit = True
        thread.join()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _drained(service: Any, told: threading.Event) -> bool:
    """Wait for what runs, as long as the settings allow and no other signal comes; cancel the rest."""
    service.draining = True
    pause, left = 0.05, service.settings.drain
    while left > 0.0 and not service.drain(pause) and not told.is_set():
        left -= pause
    if service.drain(0.0):
        return True
    service.cancel_all()
    service.drain(LAST_SECONDS)
    return False
