"""The server: what it gives equals what `fewstep.sample` gives, and whatever comes, it answers that and goes on."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request

import numpy as np
import pytest
import torch

import fewstep as fs

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

from http_servers import CLASSES, Network, denoiser_of, events_of, served, until  # noqa: E402

from fewstep.serve import Engine, Request  # noqa: E402
from fewstep.serve.http import make_app  # noqa: E402
from fewstep.serve.settings import Settings, load_plans  # noqa: E402

SCHEDULE = fs.schedules.VPLinear()
PLAN = fs.make_plan("unipc", SCHEDULE, 5, final="zero")


@pytest.fixture(scope="module")
def server():
    with served(plans={"five": PLAN}, samples=8, calls=40, body=2000) as running:
        yield running


@pytest.fixture(autouse=True)
def whole(request):
    """Whatever a test did, the shared server is idle and well after it."""
    yield
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        running.network.raises = running.network.nan = None
        running.network.held = 0
        running.network.gate.set()
        until(lambda: not running.service._running)
        assert running.told("GET", "/health") == (200, {"status": "alive"})


def alone(nfe=10, solver="auto", grid="auto", final="zero", *, plan=None, seeds=(0,), label=CLASSES, guidance=1.0):
    """What the same words give in Python."""
    plan = plan or fs.make_plan(solver, SCHEDULE, nfe, grid=grid, final=final)
    den = denoiser_of(Network())
    if guidance != 1.0:
        den = fs.guidance.ClassifierFree(den, guidance, {"label": CLASSES})
    labels = torch.tensor([label[i % len(label)] if isinstance(label, list) else label for i in range(len(seeds))])
    with torch.no_grad():
        return fs.sample(den, fs.draw_noise((1, 4, 4), seeds, plan), plan, cond={"label": labels}, seeds=seeds)


def npy(data):
    return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))


WORDS = {
    "nothing": ({}, {}),
    "a solver": ({"solver": "dpmpp_2m", "nfe": 7, "grid": "karras", "seeds": [3, 9]}, {"seeds": [3, 9]}),
    "a stochastic one": ({"solver": "dpmpp_2m_sde", "nfe": 6, "seed": 4, "count": 3, "final": "t_end"}, {"seeds": [4, 5, 6]}),
    "a named plan": ({"plan": "five", "label": [1, 2], "count": 3}, {"plan": PLAN, "seeds": [0, 1, 2], "label": [1, 2]}),
    "guidance": ({"label": 3, "guidance": 2.5, "nfe": 4, "count": 2}, {"seeds": [0, 1], "label": 3}),
}


@pytest.mark.parametrize("name", WORDS)
def test_samples_are_those_of_sample(server, name):
    words, changed = WORDS[name]
    same = {key: value for key, value in words.items() if key in ("nfe", "solver", "grid", "final", "guidance")}
    expected = alone(**{**same, **changed})
    status, headers, data = server.ask("POST", "/samples", {**words, "format": "npy"})
    assert (status, headers["content-type"]) == (200, "application/x-npy"), data
    assert torch.equal(npy(data), expected)


def test_pictures(server):
    expected = ((alone(seeds=range(5)) + 1) / 2).clamp(0, 1).mul(255).round().byte()
    _, headers, data = server.ask("POST", "/samples", {"count": 5, "format": "png"})
    assert headers["content-type"] == "image/png"
    picture = np.array(Image.open(io.BytesIO(data)))
    assert picture.shape == (9 * 16, 14 * 16)  # two rows of three, four pixels each and a line between, enlarged 16 times
    assert np.array_equal(picture[: 4 * 16 : 16, : 4 * 16 : 16], expected[0, 0])
    assert np.array_equal(picture[5 * 16 :: 16, 5 * 16 : 9 * 16 : 16], expected[4, 0])
    _, told = server.told("POST", "/samples", {"count": 5, "format": "json"})
    assert told["seeds"] == [0, 1, 2, 3, 4]
    assert told["npy"] is None
    each = [np.array(Image.open(io.BytesIO(base64.b64decode(image)))) for image in told["images"]]
    assert np.array_equal(np.stack(each), expected[:, 0])


def test_stream_tells_what_is_on_the_way(server):
    events = list(server.events({"nfe": 6, "count": 2, "previews": 2}))
    assert [name for name, _ in events if name != "preview"] == ["accepted", "done"]
    accepted, done = events[0][1], events[-1][1]
    assert accepted["id"] == done["id"]
    assert accepted["nfe"] == done["nfe"] == 6
    calls = [told["call"] for name, told in events if name == "preview"]
    assert set(calls) <= {2, 4, 6}  # a preview may be overtaken by the next
    assert calls == sorted(calls)
    assert all(len(told["images"]) == 2 for name, told in events if name == "preview")
    assert done["images"] == server.told("POST", "/samples", {"nfe": 6, "count": 2, "format": "json"})[1]["images"]


def test_previews_come_while_it_runs(server):
    server.network.held = server.network.calls + 4  # the last call waits until a preview was seen
    server.network.gate.clear()
    with contextlib.closing(server.open("POST", "/samples/stream", {"nfe": 4, "previews": 1})) as connection:
        events = events_of(connection.getresponse())
        assert next(events)[0] == "accepted"
        name, told = next(events)
        assert (name, told["nfe"], len(told["images"])) == ("preview", 4, 1)
        assert told["call"] < 4
        server.network.gate.set()
        assert [name for name, _ in events][-1] == "done"


def test_previews_stop_with_the_client_and_have_no_queue(monkeypatch):
    drawn, going = [], threading.Event()

    def slow(pictures, data_range):
        drawn.append(1)
        assert going.wait(60)
        return []

    with served(rows=64, waiting=64, calls=100, streams=1) as server:
        monkeypatch.setattr("fewstep.serve.service.pngs_of", slow)
        body = {"nfe": 100, "count": 4, "previews": 1, "solver": "ddim"}
        server.network.held = 50
        server.network.gate.clear()
        streams = [server.open("POST", "/samples/stream", body) for _ in range(3)]
        for connection in streams:
            assert next(events_of(connection.getresponse()))[0] == "accepted"
        until(lambda: drawn and server.network.calls >= 50)
        assert server.service._watched == 1  # the others get none, and nobody waits to look at them later
        assert server.service._streams._work_queue.qsize() == 0
        tickets = [running.ticket for running in server.service._running.values()]
        assert all(len(ticket._previews) <= 1 for ticket in tickets)
        for connection in streams:
            connection.close()
        until(lambda: not server.service._running)
        going.set()
        until(lambda: server.service._watched == 0)
        assert len(drawn) == 1  # none after the clients were gone
        server.service.close()
        server.service.watch(Gone(), drawn.append)  # is no error
        assert server.service._watched == 0


class Gone:
    """A request that is over."""

    ticket = None


def test_stream_whose_pictures_cannot_be_made_says_so(monkeypatch, caplog):
    def broken(pictures, data_range):
        raise RuntimeError("secret /etc/hosts")

    with served() as server:
        monkeypatch.setattr("fewstep.serve.service.pngs_of", broken)
        events = list(server.events({}))
    assert [name for name, _ in events] == ["accepted", "failed"]
    told = events[-1][1]
    assert told["status"] == 500
    assert "secret" not in told["detail"]
    assert events[0][1]["id"] in told["detail"]
    assert "secret" in caplog.text  # with the id, for who reads the log


def test_no_text_is_encoded_for_a_full_queue(server, monkeypatch):
    from fewstep.serve.messages import SamplesAsk
    from fewstep.serve.service import Claim, RefusedError

    encoded = []
    monkeypatch.setattr(type(server.service.model), "conditions", lambda *given: encoded.append(given) or {})
    server.network.gate.clear()
    busy = server.engine.submit(Request(PLAN, range(16), {"label": torch.zeros(16, dtype=torch.int64)}))
    with pytest.raises(RefusedError, match="Try again later") as caught:
        server.service.submit(Claim(), SamplesAsk())
    assert caught.value.status == 503
    assert not encoded
    busy.cancel()


@pytest.mark.parametrize(
    ("left", "pace", "count", "seconds"),
    [
        (160, 4.0, 4, 10),  # of 16 samples with 10 calls each 4 must go
        (160, 4.0, 1, 3),
        (160, 400.0, 4, 1),
        (16000, 4.0, 8, 60),
        (160, 0.0, 4, 7),  # nothing is known of the calls: as long as the oldest has waited
    ],
)
def test_pause_is_that_of_the_work_before(server, monkeypatch, left, pace, count, seconds):
    now = 10_000.0
    monkeypatch.setattr("fewstep.serve.service.time", types.SimpleNamespace(monotonic=lambda: now))
    held = types.SimpleNamespace(waiting=8, running=8, left=left, pace=pace)
    monkeypatch.setattr(server.engine, "statistics", lambda: held)
    began = [types.SimpleNamespace(began=now - age) for age in (3, 7)]
    monkeypatch.setattr(server.service, "_running", dict(enumerate(began)))
    assert server.service.pause(count) == seconds
    monkeypatch.undo()


def test_work_left_and_pace_are_counted(server):
    server.network.gate.clear()
    tickets = [server.engine.submit(Request(PLAN, range(4), {"label": torch.tensor([1] * 4)}, scale)) for scale in (1.0, 2.0)]
    assert server.engine.statistics().left == 4 * 5 + 2 * 4 * 5  # guided samples take two rows
    server.network.gate.set()
    for ticket in tickets:
        ticket.result(60)
    until(lambda: server.engine.statistics().left == 0)
    assert server.engine.statistics().pace > 0.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 2.5}, "samples must be a whole number, got 2.5"),
        ({"streams": True}, "streams must be a whole number, got True"),
        ({"timeout": float("inf")}, "timeout must be a finite number of seconds, got inf"),
        ({"drain": float("nan")}, "drain must be a finite number of seconds, got nan"),
        ({"token": " sesame"}, "a token has no blank at its begin or end"),
        ({"per_client": -1}, "per_client must be at least 0, got -1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


REFUSED = {
    '{"count": 9}': "a request has at most 8 samples here, got 9",
    '{"nfe": 41}': "a sample has at most 40 calls here, got 41",
    '{"nfe": 0}': "nfe: Input should be greater than or equal to 1, got 0.",
    '{"nfe": "8"}': 'nfe: Input should be a valid integer, got "8".',
    '{"nfe": true}': "nfe: Input should be a valid integer, got true.",
    '{"solver": "unip"}': "Did you mean 'unipc'",
    '{"grid": "karas"}': "Did you mean 'karras'",
    '{"plan": "../../etc/passwd"}': "unknown plan '../../etc/passwd'. Known: five.",
    '{"plan": "five", "nfe": 5}': "plan and nfe contradict each other",
    '{"seeds": [1], "count": 2}': "seeds stand for seed and count",
    '{"seeds": [-1]}': "seeds.0: Input should be greater than or equal to 0, got -1.",
    '{"seeds": []}': "seeds",
    '{"seed": 1e400}': "seed",
    '{"label": 10}': "toy has the classes 0 to 9, got label [10]",
    '{"label": []}': "toy has the classes",
    '{"label": "three"}': 'label: Input should be a valid integer, or a valid list, got "three".',
    '{"label": [1, "three"]}': 'label.1: Input should be a valid integer, got "three".',
    '{"solver": "%s"}' % ("x" * 500): f'at most 200 characters, got "{"x" * 56}...',
    '{"prompt": "a cat"}': "toy takes no prompts",
    '{"guidance": 3}': "guidance leads to a class",
    '{"guidance": NaN, "label": 1}': "guidance",
    '{"steps": 3}': "unknown field 'steps'.",
    '{"guidence": 3}': "unknown field 'guidence'. Did you mean 'guidance'? Known: count, ",
    '{"solver": "\\ud800"}': "solver: ",
    "[1]": 'the body is [1]: send a JSON object such as {"nfe": 8}.',
    "null": "",
    "": "the body is empty: send a JSON object",
    "{": "the body is no JSON: Expecting property name enclosed in double quotes at character 1",
    "[" * 900 + "]" * 900: "the body is ",
    "[" * 1500: "",
    '{"seed": ' + "9" * 1900 + "}": "",
    "\x00\xff": "",
}


@pytest.mark.parametrize("body", REFUSED, ids=lambda body: re.sub(r"[^\w.]+", "-", body)[:30] or "empty")
@pytest.mark.parametrize("path", ["/samples", "/samples/stream"])
def test_bad_input_is_one_line(server, body, path):
    status, told = server.told("POST", path, body.encode("latin-1"))
    assert status == 422
    assert list(told) == ["detail"]
    assert REFUSED[body] in told["detail"]
    assert "\n" not in told["detail"]
    assert len(told["detail"]) <= 300


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/samples", {"previews": 2}, "previews is read by POST /samples/stream alone."),
        ("/samples/stream", {"format": "npy"}, "format is read by POST /samples alone."),
    ],
)
def test_a_field_of_another_route_is_told_so(server, path, body, told):
    assert server.told("POST", path, body) == (422, {"detail": told})


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain; charset=utf-8", "application/octet-stream"])
def test_a_forgotten_content_type_is_told(server, kind):
    status, told = server.told("POST", "/samples", {"nfe": 2}, {"content-type": kind})
    assert status == 422
    assert told["detail"] == f'the request has content type "{kind}": send JSON with the header content-type: application/json.'


def test_wrong_questions_are_one_line(server):
    assert server.told("GET", "/plan?nfe=no")[1]["detail"].endswith('got "no".')
    assert "Did you mean 'solver'?" in server.told("GET", "/plan?solvr=ddim")[1]["detail"]
    assert server.told("GET", "/plan?label=3")[1]["detail"] == "label is read by POST /samples alone."


def test_body_is_bounded(server):
    assert server.told("POST", "/samples", b"x" * 2001)[0] == 413
    chunked = (b"x" * 500 for _ in range(5))  # says no length
    with contextlib.closing(server.open("GET", "/health")) as connection:
        connection.getresponse().read()
        connection.request("POST", "/samples", chunked, {"content-type": "application/json"}, encode_chunked=True)
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())) == (413, {"detail": "a request has at most 2000 bytes."})


def test_full_queue_says_when(server):
    server.network.gate.clear()
    busy = [server.open("POST", "/samples", {"count": 8}) for _ in range(2)]
    until(lambda: len(server.service._running) == 2)
    status, headers, data = server.ask("POST", "/samples", {"count": 1})
    assert status == 503, data
    assert 1 <= int(headers["retry-after"]) <= 60
    assert "Try again later" in json.loads(data)["detail"]
    server.network.gate.set()
    for connection in busy:
        with contextlib.closing(connection):
            assert connection.getresponse().status == 200


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_only_the_request_that_breaks_the_network_fails(server, how, caplog):
    setattr(server.network, how, 7)
    server.network.gate.clear()
    server.network.called.clear()
    first = server.open("POST", "/samples", {"count": 1, "nfe": 3})  # holds the network up until the others wait
    assert server.network.called.wait(30)
    others = [server.open("POST", "/samples", {"label": label, "count": 2, "format": "npy"}) for label in (1, 7, 2)]
    until(lambda: len(server.service._running) == 4)
    server.network.gate.set()
    with contextlib.closing(first):
        assert first.getresponse().status == 200
    for connection, label in zip(others, (1, 7, 2), strict=True):
        with contextlib.closing(connection):
            answer = connection.getresponse()
            status, data = answer.status, answer.read()
        if label == 7:
            assert status == 500
            told = json.loads(data)["detail"]
            assert "the network failed for this request" in told
            assert "secret" not in told
            assert "hosts" not in told
            assert told.rstrip(".").split()[-1] in caplog.text  # the id under which the log tells more
        else:
            assert status == 200
            assert torch.equal(npy(data), alone(label=label, seeds=(0, 1)))


@pytest.mark.parametrize("path", ["/samples", "/samples/stream"])
def test_client_that_vanishes_is_cancelled(server, path):
    before = server.engine.statistics().cancelled
    server.network.gate.clear()
    connection = server.open("POST", path, {"count": 4})
    until(lambda: len(server.service._running) == 1)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # no farewell, as a machine that dies
    connection.close()
    until(lambda: server.engine.statistics().cancelled == before + 1)
    until(lambda: not server.service._running)


def test_cancel_by_id(server):
    server.network.gate.clear()
    with contextlib.closing(server.open("POST", "/samples/stream", {"count": 4})) as connection:
        events = events_of(connection.getresponse())
        name, told = next(events)
        assert name == "accepted"
        assert server.ask("DELETE", f"/samples/{told['id']}")[0] == 204
        assert next(events) == ("failed", {"status": 409, "detail": "the request was cancelled."})
    assert server.told("DELETE", f"/samples/{told['id']}")[0] == 404


def test_plan_and_model(server):
    status, told = server.told("GET", "/plan?solver=ddim&nfe=4&grid=lambda")
    plan = fs.make_plan("ddim", SCHEDULE, 4, grid="lambda", final="zero")
    assert status == 200
    assert told["digest"] == plan.digest
    assert told["grid"] == plan.grid.tolist()
    assert told["tau"] == plan.tau.tolist()
    assert told["lam"][-1] is None  # infinite, where there is no noise
    assert server.told("GET", "/plan?plan=five")[1]["digest"] == PLAN.digest
    assert server.told("GET", "/plan?plan=six")[0] == server.told("GET", "/plan?nfe=no")[0] == 422
    card = server.told("GET", "/model")[1]
    assert card["classes"] == CLASSES
    assert card["plans"] == {"five": 5}
    assert card["guidance"]
    assert card["solvers"] == fs.solver_names()


def test_figures(server):
    server.ask("POST", "/samples", {"count": 3, "nfe": 4})
    status, headers, data = server.ask("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    text = data.decode()
    for line in (
        r'fewstep_requests_total\{end="finished",kind="3-4 calls"\} \d',
        r'fewstep_http_answers_total\{method="POST",route="/samples",status="200"\} \d',
        r'fewstep_request_seconds_bucket\{kind="3-4 calls",le="0.1"\} \d',
        r'fewstep_call_rows_bucket\{le="4.0"\} \d',
        r"fewstep_waiting_samples 0\.0",
        r"fewstep_running_samples 0\.0",
    ):
        assert re.search(f"^{line}", text, re.MULTILINE), line
    before = len(data)
    for i in range(20):
        server.ask("GET", f"/no/such/{i}")
        server.ask("DELETE", f"/samples/none{i}")
    after = server.ask("GET", "/metrics")[2].decode()
    assert 'route="other"' in after
    assert len(after) < before + 2000  # paths that clients make up are no labels


def test_page_and_paths(server):
    status, headers, data = server.ask("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    files = re.findall(rb'(?:href|src)="(page/[^"]+)"', data)
    assert len(files) == 2
    for name in (*files, b"page/plan.js"):
        assert server.ask("GET", f"/{name.decode()}")[0] == 200
    assert not re.search(rb"https?://(?!www\.w3\.org/)", data)  # nothing from elsewhere
    for path in (
        "/page/../http.py",
        "/page/..%2fhttp.py",
        "/page/%2e%2e/http.py",
        "/page/http.py",
        "/docs",
        "/samples/",
        "//samples",
    ):
        assert server.ask("GET", path)[0] in (404, 405), path


def test_token():
    with served(token="open sesame") as server:
        for path in ("/", "/health", "/ready", "/page/page.js", "/openapi.json"):
            assert server.ask("GET", path)[0] == 200
        for method, path in (
            ("GET", "/model"),
            ("GET", "/plan"),
            ("GET", "/metrics"),
            ("POST", "/samples"),
            ("DELETE", "/samples/x"),
        ):
            for given in ({}, {"authorization": "Bearer open"}, {"authorization": "Basic open sesame"}, {"authorization": b"\xff"}):
                status, headers, _ = server.ask(method, path, {} if method == "POST" else None, given)
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert server.told("GET", "/model", headers={"authorization": "Bearer open sesame"})[0] == 200
        assert server.ask("POST", "/samples", {}, {"authorization": "bearer open sesame"})[0] == 200


def test_too_slow_is_504_and_cancelled():
    with served(timeout=0.2) as server:
        server.network.gate.clear()
        assert server.told("POST", "/samples", {}) == (504, {"detail": "not done within 0.2 s: the request is cancelled."})
        events = list(server.events({}))
        assert events[-1] == ("failed", {"status": 504, "detail": "not done within 0.2 s: the request is cancelled."})
        server.network.gate.set()
        until(lambda: server.engine.statistics().cancelled == 2)


def test_one_client_has_its_share():
    with served(per_client=1) as server:
        server.network.gate.clear()
        with contextlib.closing(server.open("POST", "/samples", {})) as first:
            until(lambda: server.service._running)
            status, headers, _ = server.ask("POST", "/samples", {})
            assert (status, headers["retry-after"]) == (429, "1")
            server.network.gate.set()
            assert first.getresponse().status == 200
        until(lambda: not server.service._clients)
        assert server.ask("POST", "/samples", {})[0] == 200


def test_engine_that_ended_is_told():
    with served() as server:
        server.engine.close(drain=True)
        assert server.told("GET", "/health") == (503, {"status": "dead"})
        assert server.told("GET", "/ready") == (503, {"status": "dead"})
        assert server.told("POST", "/samples", {})[0] == 503


def test_engine_whose_thread_died_is_told(monkeypatch, caplog):
    def broken():
        raise RuntimeError("no such call")

    with served() as server:
        monkeypatch.setattr(server.engine._batches, "turn", broken)
        server.engine.submit(Request(PLAN, [0], {"label": torch.tensor([1])}))
        until(lambda: server.told("GET", "/health") == (503, {"status": "dead"}))
    assert "no such call" in caplog.text


def test_engine_that_hangs_is_told_and_one_without_work_does_not():
    with served(stall=0.3) as server:
        time.sleep(0.4)
        assert server.told("GET", "/health") == (200, {"status": "alive"})  # it has nothing to do
        server.network.gate.clear()
        with contextlib.closing(server.open("POST", "/samples", {})) as waits:
            until(lambda: server.told("GET", "/health") == (503, {"status": "stalled"}))
            assert server.told("GET", "/ready") == (503, {"status": "stalled"})
            server.network.gate.set()
            assert waits.getresponse().status == 200
        assert server.told("GET", "/health") == (200, {"status": "alive"})


@pytest.mark.parametrize("patient", [True, False])
def test_sigterm_drains(patient):
    from fewstep.serve.process import listen, serve

    network = Network()
    den = denoiser_of(network)
    network.gate.clear()
    seen = {}
    with Engine(den, den.info.shape, null={"label": CLASSES}) as engine:
        app = make_app(engine, Settings(drain=30.0 if patient else 0.2))
        listening = listen("127.0.0.1", 0)
        port = listening.getsockname()[1]

        def client():
            from http_servers import Server

            server = Server(network, engine, app, port)
            running = server.open("POST", "/samples", {"format": "npy"})
            until(lambda: server.service._running)
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: server.service.draining)
            if patient:
                seen["new"] = server.told("POST", "/samples", {})
                seen["ready"] = server.told("GET", "/ready")
                network.gate.set()
            with contextlib.closing(running):
                answer = running.getresponse()
                seen["running"] = answer.status, answer.read()
            network.gate.set()

        thread = threading.Thread(target=client)
        drained = serve(app, listening, started=thread.start)
        thread.join()
        app.state.service.close()
    assert drained is patient
    if patient:
        assert seen["new"] == (503, {"detail": "the server is about to end and takes no more requests."})
        assert seen["ready"] == (503, {"status": "draining"})
        assert seen["running"][0] == 200
        assert torch.equal(npy(seen["running"][1]), alone())
    else:
        assert seen["running"] == (503, b'{"detail":"the server ended."}')


def test_an_address_is_that_of_the_connection():
    from fewstep.serve.process import listen, serve

    network, seen = Network(), {}
    den = denoiser_of(network)
    network.gate.clear()
    with Engine(den, den.info.shape, null={"label": CLASSES}) as engine:
        app = make_app(engine, Settings(per_client=1))
        listening = listen("127.0.0.1", 0)
        port = listening.getsockname()[1]

        def client():
            from http_servers import Server

            server = Server(network, engine, app, port)
            try:
                with contextlib.closing(server.open("POST", "/samples", {})) as first:
                    until(lambda: server.service._running)
                    seen["other"] = server.ask("POST", "/samples", {}, {"x-forwarded-for": "10.1.2.3"})[0]
                    network.gate.set()
                    seen["first"] = first.getresponse().status
            finally:
                network.gate.set()
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=client)
        assert serve(app, listening, started=thread.start)
        thread.join()
        app.state.service.close()
    assert seen == {"other": 429, "first": 200}


def test_a_server_that_ends_by_itself_is_noticed(monkeypatch):
    import uvicorn

    from fewstep.serve.process import listen, serve

    begun = threading.Event()

    def broken(self, sockets):
        self.started = True
        assert begun.wait(60)
        raise OSError("no more files")

    monkeypatch.setattr(uvicorn.Server, "run", broken)
    den = denoiser_of(Network())
    with Engine(den, den.info.shape) as engine, listen("127.0.0.1", 0) as listening:
        app = make_app(engine)
        with pytest.raises(fs.errors.FewstepError, match=r"the server ended by itself, by OSError: no more files"):
            serve(app, listening, started=begun.set)
        app.state.service.close()


def test_description_tells_every_status(server):
    description = server.told("GET", "/openapi.json")[1]
    assert set(description["paths"]) == {
        "/samples",
        "/samples/stream",
        "/samples/{own}",
        "/model",
        "/plan",
        "/health",
        "/ready",
        "/metrics",
    }
    for path in ("/samples", "/samples/stream"):
        answers = description["paths"][path]["post"]["responses"]
        assert set(answers) == {"200", "401", "408", "409", "413", "422", "429", "500", "503", "504"}
        assert answers["422"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Failure"}
    assert set(description["paths"]["/samples"]["post"]["responses"]["200"]["content"]) == {
        "application/json",
        "application/x-npy",
        "image/png",
    }


def test_plans_of_a_folder(tmp_path):
    PLAN.save(tmp_path / "plan-5.safetensors")
    (tmp_path / "student.safetensors").write_bytes(b"weights")
    plans, others = load_plans(tmp_path)
    assert {name: plan.digest for name, plan in plans.items()} == {"plan-5": PLAN.digest}
    assert others == ["student.safetensors"]
    (tmp_path / "plan-6.safetensors").write_bytes(b"damaged")
    with pytest.raises(fs.errors.ArtefactError, match="plan-6"):
        load_plans(tmp_path)
    with pytest.raises(NotADirectoryError, match="no folder of plans"):
        load_plans(tmp_path / "none")


def test_plans_of_another_schedule_are_refused():
    other = fs.make_plan("ddim", fs.schedules.Flow(), 3)
    den = denoiser_of(Network())
    with (
        Engine(den, den.info.shape) as engine,
        pytest.raises(fs.errors.PlanError, match="'flow' was made for another noise schedule"),
    ):
        make_app(engine, Settings(plans={"flow": other}))


def test_options_of_the_command():
    from fewstep.cli.serve import SCHEDULERS as offered
    from fewstep.serve import SCHEDULERS

    assert set(offered) == set(SCHEDULERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port from 0 to 65535"),
        (["--rows", "0"], "--rows and --waiting must be at least 1"),
        (["--plans", "no-such-folder"], "no-such-folder is no folder of plans"),
        (["--samples", "0"], "samples must be above 0, got 0"),
        (["--token", "\n"], "a token is one or more printable ASCII characters"),
        (["--negative", "blurry"], "digits takes no prompts"),
        (["--host", "no.such.host.invalid"], "Listen on this machine alone with --host 127.0.0.1."),
        (["--size", "small"], "--size takes"),
    ],
    ids=str,
)
def test_command_refuses_in_one_line(arguments, message, capsys):
    from fewstep.cli import main

    assert main(["serve", "digits", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken_is_told_before_the_model_is_opened(monkeypatch, capsys):
    from fewstep.cli import main

    monkeypatch.setattr("fewstep.cli.setup.open_model", lambda *_, **__: pytest.fail("the model was opened"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "digits", "--port", str(port)]) == 2
    why = "Address already in use. Take any port that is free with --port 0."
    assert capsys.readouterr().err == f"fewstep: cannot listen on 127.0.0.1, port {port}: {why}\n"


@pytest.mark.slow
def test_command_serves_until_it_is_told_to_stop(tmp_path):
    fs.make_plan("unipc", fs.load("digits").schedule, 4).save(tmp_path / "four.safetensors")
    command = [sys.executable, "-m", "fewstep", "serve", "digits", "--port", "0", "--plans", str(tmp_path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told["plans"] == ["four"]
        with urllib.request.urlopen(f"{told['url']}plan?plan=four") as answer:
            assert json.load(answer)["nfe"] == 4
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "every request was answered" in error


def test_request_that_is_over_before_it_is_submitted_is_cancelled(server):
    from fewstep.serve.messages import SamplesAsk
    from fewstep.serve.service import Claim, RefusedError

    claim, before = Claim(), server.engine.statistics().cancelled
    server.network.gate.clear()
    server.service.forget(claim)  # the client went away while a thread still made its plan
    with pytest.raises(RefusedError, match="cancelled"):
        server.service.submit(claim, SamplesAsk())
    assert server.engine.statistics().cancelled == before + 1
    assert not server.service._running
