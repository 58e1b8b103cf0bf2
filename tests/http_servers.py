"""Servers for tests: a small network that a test holds up, breaks and counts, behind a real socket."""

import contextlib
import http.client
import json
import socket
import threading
import time

import torch

import fewstep as fs
from fewstep.serve import Engine
from fewstep.serve.settings import Settings

CLASSES = 10


class Network:
    """x and label by the element, so that samples do not depend on the batch. `gate` holds calls up, from number `held` on."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.called = threading.Event()
        self.raises = self.nan = None
        self.calls = self.held = 0

    def __call__(self, x, time, label):
        self.called.set()
        self.calls += 1
        assert self.calls < self.held or self.gate.wait(60)
        if self.raises is not None and (label == self.raises).any():
            raise RuntimeError("secret /etc/hosts")
        d = torch.tanh(x) * (0.3 + 0.05 * label.to(x.dtype)).reshape(-1, 1, 1, 1)
        if self.nan is not None:
            d[label == self.nan] = torch.nan
        return d


def denoiser_of(network):
    info = fs.denoisers.ModelInfo(
        "toy", (1, 4, 4), data_range=(-1.0, 1.0), conditions={"label": {"classes": CLASSES, "null": CLASSES}}
    )
    return fs.Denoiser(network, fs.schedules.VPLinear(), "noise", info=info)


class Server:
    """A running server: its parts, and requests to it."""

    def __init__(self, network, engine, app, port):
        self.network, self.engine, self.app, self.port = network, engine, app, port
        self.service = app.state.service

    def open(self, method, path, body=None, headers=None):
        """A request that is sent; the connection, to read from or to leave."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
        return connection

    def ask(self, method, path, body=None, headers=None):
        """(status, headers, body)."""
        with contextlib.closing(self.open(method, path, body, headers)) as connection:
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def told(self, method, path, body=None, headers=None):
        """(status, JSON)."""
        status, _, data = self.ask(method, path, body, headers)
        return status, json.loads(data)

    def events(self, body):
        """The events of a stream, as (name, data)."""
        with contextlib.closing(self.open("POST", "/samples/stream", body)) as connection:
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            yield from events_of(answer)


def events_of(answer):
    name = None
    for line in answer:
        if line.startswith(b"event: "):
            name = line[7:].strip().decode()
        elif line.startswith(b"data: "):
            yield name, json.loads(line[6:])


def until(true, seconds=30.0):
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


@contextlib.contextmanager
def served(*, rows=8, waiting=8, **settings):
    """A server on a port of its own, which ends with its engine."""
    import uvicorn

    from fewstep.serve.http import make_app
    from fewstep.serve.metrics import Metrics, Watched

    network, metrics = Network(), Metrics()
    den = denoiser_of(network)
    engine = Engine(Watched(den, metrics), den.info.shape, null={"label": CLASSES}, rows=rows, waiting=waiting)
    app = make_app(engine, Settings(**settings), metrics=metrics)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until(lambda: server.started)
        yield Server(network, engine, app, listening.getsockname()[1])
    finally:
        network.gate.set()
        server.should_exit = True
        thread.join()
        engine.close(drain=False, timeout=30)
        app.state.service.close()
