"""Figures of the server for Prometheus, one registry a server.

Every label takes few values, whatever requests hold: a path is a route of the server or "other".
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from fewstep.denoisers import Around
from fewstep.errors import MissingExtraError
from fewstep.serve.requests import kind_of

__all__ = ["Metrics", "Watched"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")


class Metrics:
    """Counters, histograms and gauges, and their text.

    Raises:
        MissingExtraError: if prometheus-client is not installed.
    """

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError as error:
            raise MissingExtraError("prometheus-client", "serve", "The server") from error
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "fewstep"}
        self.answers = Counter("http_answers", "Answers by route, method and status", ["route", "method", "status"], **own)
        self.requests = Counter("requests", "Requests for samples by class of calls and how they ended", ["kind", "end"], **own)
        self.samples = Counter("samples", "Samples that were delivered", ["kind"], **own)
        self.seconds = Histogram("request_seconds", "From arrival to answer", ["kind"], buckets=SECONDS, **own)
        self.rows = Histogram("call_rows", "Rows of the batch of a network call", buckets=ROWS, **own)
        self.call_seconds = Histogram("call_seconds", "Time in a network call on the host", buckets=CALL_SECONDS, **own)
        self.open = Gauge("open_requests", "Requests for samples that are being answered", **own)
        self.waiting = Gauge("waiting_samples", "Samples that wait in the engine", **own)
        self.running = Gauge("running_samples", "Samples that the engine runs", **own)
        self.utilisation = Gauge("utilisation", "Share of the rows of all calls that were used", **own)

    def answered(self, route: str, method: str, status: int) -> None:
        """Count an answer."""
        self.answers.labels(route, method if method in METHODS else "other", str(status)).inc()

    def ended(self, nfe: int, end: str, *, samples: int, seconds: float) -> None:
        """Count a request for samples: its calls, how it ended, what it delivered and its time."""
        kind = kind_of(nfe)
        self.requests.labels(kind, end).inc()
        if end == "finished":
            self.samples.labels(kind).inc(samples)
            self.seconds.labels(kind).observe(seconds)

    def text(self, statistics: Any) -> bytes:
        """All figures in Prometheus' text form, with what the engine says of itself now."""
        from prometheus_client import generate_latest

        self.waiting.set(statistics.waiting)
        self.running.set(statistics.running)
        self.utilisation.set(statistics.utilisation)
        return generate_latest(self.registry)


class Watched(Around):
    """A denoiser whose calls are counted by `Metrics`: their rows, and their time on the host.

    Args:
        denoiser: what is called.
        metrics: what counts.
    """

    def __init__(self, denoiser: Any, metrics: Metrics):
        super().__init__(denoiser)
        self.metrics = metrics

    def __call__(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        began = time.perf_counter()
        d = self.denoiser(x, t, **cond)
        self.metrics.rows.observe(len(x))
        self.metrics.call_seconds.observe(time.perf_counter() - began)
        return d
