"""What an engine has done, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Statistics"]


@dataclass(frozen=True)
class Statistics:
    """What an engine has done since it was made.

    Attributes:
        seconds: since then.
        calls, rows: network calls, and their rows: evaluations of the network for one sample.
        retries: calls that raised, and were made again request by request.
        busy: seconds of network calls, each from its begin, or the end of the one before, to its end.
        utilisation: rows over what the calls could have held; 0 before the first.
        left: rows of network calls that unfinished requests still need.
        pace: rows a second of the last calls; 0 before the first is over.
        waiting, running: samples, those that have not made a call and those that have.
        finished, failed, cancelled, rejected: requests; those rejected met a full queue.
        latencies: ``"mean"``, ``"p50"``, ``"p90"``, ``"p99"`` and ``"most"``, seconds from submission to the samples, of the last 4096
            finished requests; empty before the first.
    """

    seconds: float
    calls: int
    rows: int
    retries: int
    busy: float
    utilisation: float
    left: int
    pace: float
    waiting: int
    running: int
    finished: int
    failed: int
    cancelled: int
    rejected: int
    latencies: Mapping[str, float]
