"""The server in Ray Serve: replicas that answer as one server does, on this machine alone."""

import asyncio
import contextlib
import http.client
import io
import json
import os
import socket
import time

import numpy as np
import pytest
import torch

import fewstep as fs

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from fewstep.serve import Request
from fewstep.serve.ray_serve import Replica, deployment
from fewstep.serve.settings import Settings


def digits(plan, seeds, label):
    den = fs.load("digits")
    with torch.no_grad():
        return fs.sample(den, fs.draw_noise(den.info.shape, seeds, plan), plan, cond={"label": torch.tensor(label)})


def test_replica_ends_with_its_server():
    replica = Replica("digits", Settings(), {"rows": 4, "waiting": 4})
    assert replica.alive
    sent = []

    async def life():
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive():
            return next(messages)

        async def send(message):
            sent.append(message["type"])

        await replica({"type": "lifespan"}, receive, send)

    asyncio.run(life())
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    with pytest.raises(fs.errors.FewstepError, match="closed"):
        replica.engine.submit(Request(fs.make_plan("ddim", replica.engine.denoiser.schedule, 2), [0]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_deployment(tmp_path):
    pytest.importorskip("ray.serve", reason="the extra scale is not installed")
    import ray
    from ray import serve

    plan = fs.make_plan("unipc", fs.load("digits").schedule, 4, final="zero")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start_here(ray)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(deployment("digits", Settings(plans={"four": plan}, calls=400, timeout=120.0), replicas=2, cpus=0.5))
        expected = digits(plan, range(3), [1, 2, 3])
        for _ in range(6):  # both replicas, by turns
            status, data = ask(port, {"plan": "four", "count": 3, "label": [1, 2, 3], "format": "npy"})
            assert status == 200
            got = torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        assert ask(port, {"plan": "five"})[0] == 422
        events = stream(port, {"nfe": 3, "count": 1, "previews": 1})
        assert (events[0], events[-1]) == ("accepted", "done")
        with contextlib.closing(sent(port, "/samples/stream", {"nfe": 400, "count": 64})) as left:
            answer = left.getresponse()
            assert answer.readline() == b"event: accepted\n"  # one that never came to a replica is not cancelled there
            answer.close()  # the client goes away; its request is cancelled in the replica
        wait_for_cancelled(port)
    finally:
        serve.shutdown()
        ray.shutdown()


def start_here(ray, tries=4):
    """A session of this machine alone; Ray gives up after half a minute, which a busy machine may need."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    for left in reversed(range(tries)):
        try:
            ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
        except Exception as error:
            ray.shutdown()
            if not left or "timed out" not in str(error):
                raise
        else:
            return


def sent(port, path, body, method="POST"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, json.dumps(body), {"content-type": "application/json"})
    return connection


def ask(port, body, path="/samples", method="POST"):
    with contextlib.closing(sent(port, path, body, method)) as connection:
        answer = connection.getresponse()
        return answer.status, answer.read()


def stream(port, body):
    data = ask(port, body, "/samples/stream")[1].decode()
    return [line[7:] for line in data.splitlines() if line.startswith("event: ")]


def wait_for_cancelled(port):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if b'fewstep_requests_total{end="cancelled"' in ask(port, None, "/metrics", "GET")[1]:
            return
        time.sleep(0.1)
    raise AssertionError("the request of the client that went away was not cancelled")
