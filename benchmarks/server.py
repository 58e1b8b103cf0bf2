"""What does the server survive? ``python benchmarks/server.py`` writes ``benchmarks/results/server.json``.

A server of its own process, on a network that takes 2 ms a call whatever the batch, raises for class 7 and gives NaN for class 8. In turn:

- *steady*: 12,500 requests that are refused and 4,000 that are answered, one after the other; the memory of the process along the way.
- *malformed*: schemathesis makes requests that contradict the server's own description, until the server has answered 10,000; every
  answer is judged by schemathesis (no server error, status, content and form as described). Then lines that are no HTTP at all.
- *load*: clients at once that wait, read streams, hang up in the middle, meet a full queue, break the network. Those that are well get what
  they got alone, bit for bit; the memory of the process is looked at all along.
- *stop*: SIGTERM while requests run; how many of them are answered, what newcomers are told, how and when the process ends.

Not measured here: an hour of load. The memory is that of some minutes, as requests rather than hours count.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "server.json"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance"
)
RAISES, NAN, CLASSES = 7, 8, 10
ROUND = 1000
"""Examples an operation and run of schemathesis; some are the same, and are sent once."""
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what the server survives.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--malformed", type=int, default=10_000, help="malformed requests at least")
    parser.add_argument("--seconds", type=float, default=90.0, help="of load")
    parser.add_argument("--clients", type=int, default=16, help="at once")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return serve_slowly()
    with running_server() as (process, port):
        ordinary = {label: samples(port, label) for label in range(6)}
        report: dict[str, Any] = {
            "command": " ".join(["python benchmarks/server.py", *sys.argv[1:]]),
            "seed": options.seed,
            "machine": "one core of a 2-core machine, shared with other work",
            "python": platform.python_version(),
            "steady": steady(process, port),
            "malformed": malformed(process, port, options),
            "garbage": garbage(process, port, options.seed),
            "load": load(process, port, ordinary, options),
            "stop": stop(process, port),
        }
    told = json.dumps(report, indent=2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(told + "\n")
    print(told)
    return 0


# ---- the server ----------------------------------------------------------------------------------------------------------------------


def serve_slowly() -> int:
    """The server, in a process of its own."""
    import torch

    import fewstep as fs
    from fewstep.serve import Engine
    from fewstep.serve.http import make_app
    from fewstep.serve.metrics import Metrics, Watched
    from fewstep.serve.process import listen, serve
    from fewstep.serve.settings import Settings

    torch.set_num_threads(1)

    def network(x: Any, time_: Any, label: Any) -> Any:
        time.sleep(0.002)
        if (label == RAISES).any():
            raise RuntimeError("this class breaks the network")
        d = torch.tanh(x) * (0.3 + 0.05 * label.to(x.dtype)).reshape(-1, 1, 1, 1)
        d[label == NAN] = torch.nan
        return d

    info = fs.denoisers.ModelInfo("toy", (1, 8, 8), (-1.0, 1.0), {"label": {"classes": CLASSES, "null": CLASSES}})
    denoiser, metrics = fs.Denoiser(network, fs.schedules.VPLinear(), "noise", info=info), Metrics()
    engine = Engine(Watched(denoiser, metrics), info.shape, null={"label": CLASSES}, rows=32, waiting=32)
    app = make_app(engine, Settings(samples=16, calls=50, timeout=20.0, drain=20.0), metrics=metrics)
    listening = listen("127.0.0.1", 0)
    drained = serve(app, listening, started=lambda: print(listening.getsockname()[1], flush=True))
    engine.close(drain=False, timeout=10)
    return 0 if drained else 1


@contextlib.contextmanager
def running_server() -> Any:
    command = [sys.executable, str(Path(__file__).resolve()), "--child"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def memory(process: subprocess.Popen[str]) -> float:
    """MiB that the process holds."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE / 2**20


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def samples(port: int, label: int) -> bytes:
    status, data = ask(port, "POST", "/samples", words(label))
    assert status == 200, data
    return data


def words(label: int) -> dict[str, Any]:
    """What clients ask for: plans of all kinds, by class."""
    solver = ("auto", "ddim", "dpmpp_2m_sde", "unipc", "auto", "ddpm")[label % 6]
    return {"label": label, "nfe": 4 + 6 * (label % 6), "solver": solver, "count": 1 + label % 4, "seed": label, "format": "npy"}


def answers(port: int) -> Counter[str]:
    """How many answers of each status the server has given, by its own figures."""
    found: Counter[str] = Counter()
    figures = ask(port, "GET", "/metrics")[1].decode()
    for status, count in re.findall(r'^fewstep_http_answers_total\{.*status="(\d+)"\} (\S+)$', figures, re.M):
        found[status] += int(float(count))
    return found


# ---- parts ---------------------------------------------------------------------------------------------------------------------------


def malformed(process: subprocess.Popen[str], port: int, options: argparse.Namespace) -> dict[str, Any]:
    """Requests that contradict the description."""
    began, before, held = time.monotonic(), answers(port), memory(process)
    failures, rounds, done = [], 0, 0
    while done < options.malformed:
        command = [
            shutil.which("schemathesis") or "schemathesis",
            "run",
            f"http://127.0.0.1:{port}/openapi.json",
            "--mode",
            "negative",
        ]
        command += ["--phases", "fuzzing", "--checks", CHECKS, "--max-examples", str(min(ROUND, options.malformed)), "--no-color"]
        command += [
            "--seed",
            str(options.seed + rounds),
            "--continue-on-failure",
            "--generation-database",
            "none",
            "--warnings",
            "off",
        ]
        with tempfile.TemporaryDirectory() as folder:  # it writes what it has seen
            told = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        rounds += 1
        failures += re.findall(r"^- (.+)$", told.stdout, re.M)
        now = answers(port) - before
        if sum(now.values()) == done or told.returncode not in (0, 1):
            raise SystemExit(f"schemathesis made no requests:\n{told.stdout[-2000:]}{told.stderr[-2000:]}")
        done = sum(now.values())
        print(f"{done} malformed requests in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return {
        "requests": done,
        "answers": dict(sorted(now.items())),
        "failed_checks": dict(Counter(failures)),
        "checks": CHECKS.split(","),
        "seconds": round(time.monotonic() - began, 1),
        "memory_mib": [round(held, 1), round(memory(process), 1)],
        "well_after": ask(port, "GET", "/health")[0] == 200,
    }


def steady(process: subprocess.Popen[str], port: int, refused: int = 2500, drawn: int = 800, parts: int = 5) -> dict[str, Any]:
    """The memory after each of some equal parts of one client's requests: those that are refused, then those that are answered."""
    told: dict[str, Any] = {"requests": {"refused": parts * refused, "answered": parts * drawn}, "memory_mib": {}}
    kinds = {
        "refused": (refused, lambda k: {"nfe": "x" * (k % 50), f"field {k}": 1}),
        "answered": (drawn, lambda k: words(k % 6) | {"nfe": 4, "seed": k}),
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        for name, (count, body) in kinds.items():
            held = told["memory_mib"][name] = []
            for part in range(parts):
                for k in range(part * count, (part + 1) * count):
                    connection.request("POST", "/samples", json.dumps(body(k)), {"content-type": "application/json"})
                    connection.getresponse().read()
                held.append(round(memory(process), 1))
    return told


def garbage(process: subprocess.Popen[str], port: int, seed: int, count: int = 500) -> dict[str, Any]:
    """Bytes that are no HTTP, and heads that end in the middle."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            line = rng.integers(0, 256, int(rng.integers(1, 400)), dtype=np.uint8).tobytes()
            with contextlib.suppress(OSError):
                connection.sendall(
                    line if i % 2 else b"POST /samples HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n" + line[:40]
                )
    return {"connections": count, "well_after": ask(port, "GET", "/health")[0] == 200 and process.poll() is None}


def load(process: subprocess.Popen[str], port: int, ordinary: dict[int, bytes], options: argparse.Namespace) -> dict[str, Any]:
    """Clients at once, of every kind."""
    ends: Counter[str] = Counter()
    latencies: list[float] = []
    lock, until, began = threading.Lock(), time.monotonic() + options.seconds, time.monotonic()
    before, held = answers(port), []

    def client(number: int) -> None:
        rng = np.random.default_rng([options.seed, number])
        while time.monotonic() < until:
            kind, asked = ("waits", "streams", "vanishes", "vanishes", "breaks")[int(rng.integers(5))], time.monotonic()
            end = one(port, kind, rng, ordinary)
            with lock:
                ends[f"{kind}: {end}"] += 1
                if end == "as alone":
                    latencies.append(time.monotonic() - asked)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(options.clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        held.append(memory(process))
        time.sleep(options.seconds / 30)
    deadline = time.monotonic() + 30
    while open_requests(port) and time.monotonic() < deadline:
        time.sleep(0.05)
    third = len(held) // 3
    return {
        "seconds": round(time.monotonic() - began, 1),
        "clients": options.clients,
        "requests": sum(ends.values()),
        "ends": dict(sorted(ends.items())),
        "answers": dict(sorted((answers(port) - before).items())),
        "latency_seconds": {"p50": statistics.median(latencies), "p99": float(np.percentile(latencies, 99))},
        "memory_mib": {
            "first_third": round(statistics.median(held[:third]), 1),
            "second_third": round(statistics.median(held[third : 2 * third]), 1),
            "last_third": round(statistics.median(held[2 * third :]), 1),
        },
        "left_open": open_requests(port),
        "well_after": samples(port, 1) == ordinary[1],
    }


def open_requests(port: int) -> int:
    """Requests that the server believes to answer."""
    found = re.search(r"^fewstep_open_requests (\S+)$", ask(port, "GET", "/metrics")[1].decode(), re.M)
    return int(float(found[1])) if found else -1


def one(port: int, kind: str, rng: np.random.Generator, ordinary: dict[int, bytes]) -> str:
    """One request of a client, and how it ended."""
    label = int(rng.integers(6))
    if kind == "vanishes":
        path, body = ("/samples", "/samples/stream")[int(rng.integers(2))], {"label": label, "nfe": 40, "count": 8}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        time.sleep(float(rng.uniform(0, 0.1)))
        connection.close()
        return "gone"
    if kind == "streams":
        body = {key: value for key, value in words(label).items() if key != "format"}
        status, data = ask(port, "POST", "/samples/stream", {**body, "previews": 3})
        return {200: "done" if b"event: done" in data else "not done", 503: "queue full"}.get(status, str(status))
    label = int(rng.choice([RAISES, NAN])) if kind == "breaks" else label
    status, data = ask(port, "POST", "/samples", words(label))
    if status == 200:
        return "as alone" if data == ordinary.get(label) else "other samples"
    return {500: "told of the network", 503: "queue full"}.get(status, str(status))


def stop(process: subprocess.Popen[str], port: int, count: int = 8) -> dict[str, Any]:
    """SIGTERM while requests run."""
    ends: Counter[int] = Counter()
    lock = threading.Lock()

    def client() -> None:
        status = ask(port, "POST", "/samples", {"nfe": 50, "count": 4, "solver": "dpmpp_2m", "format": "npy"})[0]
        with lock:
            ends[status] += 1

    threads = [threading.Thread(target=client) for _ in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while open_requests(port) < count and time.monotonic() < deadline and any(thread.is_alive() for thread in threads):
        time.sleep(0.001)
    began, open_then = time.monotonic(), open_requests(port)
    process.send_signal(signal.SIGTERM)
    newcomers: Counter[str] = Counter()
    while process.poll() is None and time.monotonic() < began + 40:
        try:
            newcomers[str(ask(port, "POST", "/samples", {})[0])] += 1
        except OSError:
            newcomers["no connection"] += 1
        except http.client.HTTPException:
            newcomers["closed"] += 1
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    return {
        "running": open_then,
        "answers_of_those_that_ran": {str(status): number for status, number in ends.items()},
        "newcomers": dict(newcomers),
        "exit_status": process.poll(),
        "seconds_to_the_end": round(time.monotonic() - began, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
