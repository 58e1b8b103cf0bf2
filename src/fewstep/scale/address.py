"""Addresses of clusters, looked at before Ray is: at a wrong one Ray tries for a minute and a half without a word."""

from __future__ import annotations

import os
import re
import socket

from fewstep.errors import FewstepError

__all__ = ["check_address"]

AUTO = "auto"
"""The cluster of this machine, or that of the variable RAY_ADDRESS; Ray looks for it, and says at once if there is none."""
CLIENT, CLIENT_PORT = "ray://", 10001
"""What begins the address of a server for clients outside the cluster, and its port where none is given."""
SECONDS = 5.0
"""Within which something must listen."""
SETTINGS = b"\x04"
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + SETTINGS + bytes(5)
"""What begins a connection of HTTP/2, over which gRPC runs, with a frame of settings that has none; the answer is such a frame."""
FORM = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\[\]:/\s]+)(?::(?P<port>\d{1,5}))?")


def check_address(address: str, *, seconds: float = SECONDS) -> None:
    """Refuse an address that no cluster can have.

    Args:
        address: ``"host:port"``, ``"ray://host:port"`` or ``"auto"``.
        seconds: within which something must listen there.

    Raises:
        ValueError: for anything else.
        FewstepError: if nothing listens there.

    Example:
        >>> check_address("10.0.0.7")
        Traceback (most recent call last):
        ...
        ValueError: the address of a Ray cluster is host:port, ray://host:port or auto, not '10.0.0.7'.
    """
    told = address
    if address == AUTO:
        address = os.environ.get("RAY_ADDRESS", AUTO) or AUTO
        told = f"{address} (the variable RAY_ADDRESS)"
        if address == AUTO:
            return
    client = address.startswith(CLIENT)
    match = FORM.fullmatch(address.removeprefix(CLIENT))
    port = match and (match["port"] or (CLIENT_PORT if client else None))
    if match is None or port is None or not 0 < int(port) < 65536:
        raise ValueError(f"the address of a Ray cluster is host:port, ray://host:port or auto, not {told!r}.")
    try:
        speaks = _speaks_its_protocol(match["host"].strip("[]"), int(port), seconds)
    except (OSError, UnicodeError) as error:
        why = f"no answer within {seconds:g} s" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or error
        raise FewstepError(f"there is no Ray cluster at {told}: {why}.") from error
    if not speaks:
        raise FewstepError(f"there is no Ray cluster at {told}: what listens there, perhaps its dashboard, is something else.")


def _speaks_its_protocol(host: str, port: int, seconds: float) -> bool:
    """Whether what listens there says what every server of gRPC does; under TLS it is not asked."""
    with socket.create_connection((host, port), timeout=seconds) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return True
        connection.sendall(HELLO)
        with connection.makefile("rb") as answer:
            frame = answer.read(9)
    return frame[3:4] == SETTINGS
