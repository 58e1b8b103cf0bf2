r"""What do continuous batching and the queues of `fewstep.serve` buy? ``python benchmarks/serving.py`` writes ``results/serving.json``,
and its tables into docs/serve.md.

The network is simulated, of known cost: a call of r rows takes a fixed time and a time a row. Four parts:

- *utilisation*: requests of 4 to 50 calls, of one to four samples, half of them guided (two rows a sample), all there at the begin.
  The device works by itself, as a GPU does, and takes its time by the clock on the wall; the engine and its thread are the real ones.
  Utilisation is the time that the same evaluations take in full calls,
  over the time from the first submission to the last result. Beside it, in the same run on the same requests: *request-level batching*,
  where requests of equal plan and guidance are put together, up to the rows of a call, and run by ``fewstep.sample``; and *static
  batching*, where as many requests as fit start together, whatever their plans, and the next ones start when the last of these is through.
- *latency*: Poisson arrivals of such requests at a multiple of what full calls could serve, by scheduler. The engine's turns with a clock
  that the network advances, so the figures do not depend on the machine. As many samples may wait as in a new engine; requests that meet
  a full queue are counted.
- *drift*: the slots of "Queue Scheduling with Adversarial Bandit Learning" (arXiv 2303.01745): four queues, of which one is served a slot,
  with success of probability 0.55 + 0.4 sin(2 pi (t / 6000 + i / 4)); one arrival a queue and slot of equal probability, whose sum is the
  load times what a server that knew all rates could serve. The mean total backlog of the second and of the last quarter: a stable
  system has about as much in both.
- *engine_drift*: the same in the engine's turns: four kinds of requests whose conditions cannot share a call, and whose calls take a time
  that drifts in the same way. A call has one row, a request 16 samples.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fewstep as fs
from fewstep.sampler import prepare
from fewstep.serve import (
    SSMW,
    Arrangement,
    ByKind,
    Engine,
    LongestQueue,
    MaxWeight,
    Policy,
    Queue,
    Request,
    Scheduler,
    SoftMW,
    Ticket,
    Uniform,
    kind_of,
    make_scheduler,
)
from fewstep.serve.batches import Batches
from fewstep.serve.conditions import mark
from fewstep.serve.work import Job

RESULTS = Path(__file__).parent / "results" / "serving.json"
PAGE = Path(__file__).parents[1] / "docs" / "serve.md"
SCHEDULE = fs.schedules.Flow()
SHAPE = (1,)
ROWS, WAITING = 32, 256
FIXED, PER_ROW = 0.010, 0.001
"""Seconds: a full call takes 42 ms, and one of a single row a quarter of that."""
CALLS = range(4, 51)
SCHEDULERS = ("fifo", "shortest-remaining", "maxweight", "softmw", "ssmw")
QUEUES, PERIOD = 4, 6000
EACH = 16
"""Samples a request in the part engine_drift, where a call has one row."""
HOST = torch.device("cpu")


def seconds(rows: int) -> float:
    """What a call costs."""
    return FIXED + PER_ROW * rows


def plans() -> dict[int, fs.Plan]:
    return {nfe: fs.make_plan("dpmpp_2m", SCHEDULE, nfe=nfe) for nfe in CALLS}


def requests(count: int, seed: int) -> list[Request]:
    """Mixed ones: number of calls, samples and guidance are drawn."""
    draw, made = random.Random(seed), plans()
    found = []
    for k in range(count):
        nfe, samples, guidance = draw.choice(CALLS), draw.randint(1, 4), draw.choice((1.0, 3.0))
        cond = {"label": torch.full((samples,), k % 10)}
        found.append(Request(made[nfe], range(4 * k, 4 * k + samples), cond, guidance, kind=kind_of(nfe)))
    return found


def evaluations(request: Request) -> int:
    return request.plan.nfe * len(request.seeds) * (1 if request.guidance == 1.0 else 2)


# ---- utilisation -------------------------------------------------------------------------------------------------------------------


class Device:
    """Works by itself, in order, as a GPU does: a call returns at once, and is over when the device has come to it and spent its time."""

    def __init__(self) -> None:
        self.free = 0.0

    def launch(self, rows: int) -> None:
        self.free = max(self.free, time.perf_counter()) + seconds(rows)

    def record(self) -> Mark:
        return Mark(self.free)


class Mark:
    """An event in the device's queue."""

    def __init__(self, over: float):
        self.over = over

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.over - time.perf_counter()))


def denoiser(device: Device) -> fs.Denoiser:
    """A network that costs what it should."""

    def network(x: Tensor, time_: Tensor, label: Tensor) -> Tensor:
        device.launch(len(x))
        return torch.zeros_like(x)

    return fs.Denoiser(network, SCHEDULE, "data")


class Static(Scheduler):
    """Batches that start and end together: nobody joins while one of the batch is not through."""

    def __init__(self) -> None:
        self.batch: set[int] = set()

    def arrange(self, works: Sequence[Any], rows: int) -> Arrangement:
        if not any(work.arrival in self.batch for work in works):
            self.batch, room = set(), rows
            for work in works:
                room -= work.samples * work.cost
                if room < 0 and self.batch:
                    break
                self.batch.add(work.arrival)
        return Arrangement([place for place, work in enumerate(works) if work.arrival in self.batch])


def served(asked: list[Request], scheduler: str | Scheduler) -> dict[str, float]:
    """All requests by an engine."""
    device = Device()
    engine = Engine(denoiser(device), SHAPE, null={"label": 10}, rows=ROWS, waiting=10**6, scheduler=scheduler)
    engine._batches = Batches(engine.denoiser, SHAPE, ROWS, engine.scheduler, record=device.record)
    with engine:
        begun, work = time.perf_counter(), time.process_time()
        for ticket in [engine.submit(request) for request in asked]:
            ticket.result()
        took, work = time.perf_counter() - begun, time.process_time() - work
    calls = engine.statistics().calls
    return {"seconds": round(took, 3), "calls": calls, "host_milliseconds_a_call": round(1e3 * work / calls, 3)}


def batched_by_request(asked: list[Request]) -> dict[str, float]:
    """Runs of `fewstep.sample`, each of requests of equal plan and guidance, in order of the first."""
    device, left, calls = Device(), list(asked), 0
    begun, work = time.perf_counter(), time.process_time()
    while left:
        like, room, batch = left[0], ROWS, []
        for request in left:
            rows = len(request.seeds) * (1 if request.guidance == 1.0 else 2)
            if request.plan is like.plan and request.guidance == like.guidance and rows <= room:
                batch.append(request)
                room -= rows
        left = [request for request in left if not any(request is one for one in batch)]
        den: Any = denoiser(device)
        den = den if like.guidance == 1.0 else fs.guidance.ClassifierFree(den, like.guidance, {"label": 10})
        noise = fs.draw_noise(SHAPE, [seed for request in batch for seed in request.seeds], like.plan)
        fs.sample(den, noise, like.plan, cond={"label": torch.cat([request.cond["label"] for request in batch])})
        device.record().synchronize()
        calls += like.plan.nfe
    took, work = time.perf_counter() - begun, time.process_time() - work
    return {"seconds": round(took, 3), "calls": calls, "host_milliseconds_a_call": round(1e3 * work / calls, 3)}


def measure_utilisation(count: int, seed: int) -> dict[str, Any]:
    asked = requests(count, seed)
    total = sum(map(evaluations, asked))
    ideal = total / ROWS * seconds(ROWS)
    took = {"continuous": served(asked, "fifo"), "static": served(asked, Static()), "request_level": batched_by_request(asked)}
    return {
        "requests": count,
        "evaluations": total,
        "ideal_seconds": round(ideal, 3),
        **{name: {**row, "utilisation": round(ideal / row["seconds"], 4)} for name, row in took.items()},
    }


# ---- virtual time ------------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when the network says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def job(request: Request, arrival: int) -> Job:
    """What `Engine.submit` makes."""
    count = len(request.seeds)
    given = mark(dict(request.cond), count, HOST)
    free = None if request.guidance == 1.0 else mark({"label": torch.full((count,), 10)}, count, HOST)
    steps = prepare(request.plan, torch.empty(0, *SHAPE))
    return Job(Ticket(request), steps, list(request.seeds), given, free, request.kind, arrival)


def play(
    batches: Batches,
    clock: Clock,
    arrivals: Sequence[tuple[float, Request]],
    waiting: float,
    watch: Callable[[float], None] | None = None,
) -> tuple[list[tuple[str, float]], int]:
    """Requests at their times, until all are through.

    Returns:
        kind and latency of every finished request, and how many met a full queue.
    """
    coming, done, held, rejected = deque(arrivals), [], Counter(), 0

    def arrive(at: float, request: Request, number: int) -> None:
        held["samples"] += len(request.seeds)

        def ended(ticket: Ticket) -> None:
            held["samples"] -= len(request.seeds)
            done.append((request.kind, clock.now - at))

        made = job(request, number)
        made.ticket.add_done_callback(ended)
        batches.add(made)

    number = 0
    while coming or batches.pieces:
        if not batches.pieces:
            clock.now = max(clock.now, coming[0][0])
        while coming and coming[0][0] <= clock.now:
            at, request = coming.popleft()
            number += 1
            if held["samples"] + len(request.seeds) > batches.rows + waiting:
                rejected += 1
            else:
                arrive(at, request, number)
        if watch is not None:
            watch(held["samples"])
        batches.turn()
    return done, rejected


def measure_latency(load: float, count: int, seed: int) -> dict[str, Any]:
    asked = requests(count, seed)
    rate = load * ROWS / seconds(ROWS) / statistics.fmean(map(evaluations, asked))  # requests a second
    draw, at, arrivals = random.Random(seed + 1), 0.0, []
    for request in asked:
        at += draw.expovariate(rate)
        arrivals.append((at, request))
    found = {}
    for name in SCHEDULERS:
        clock = Clock()

        def network(x: Tensor, time_: Tensor, label: Tensor, clock: Clock = clock) -> Tensor:
            clock.now += seconds(len(x))
            return torch.zeros_like(x)

        batches = Batches(fs.Denoiser(network, SCHEDULE, "data"), SHAPE, ROWS, make_scheduler(name), clock=clock)
        done, rejected = play(batches, clock, arrivals, WAITING)
        found[name] = {
            "finished": len(done),
            "rejected": rejected,
            "filled": round(batches.evaluations / batches.calls / ROWS, 4),
            "evaluations_a_second": round(batches.evaluations / clock.now, 1),
            **percentiles([late for _, late in done]),
            "p99_by_kind": {
                kind: round(float(np.percentile([late for other, late in done if other == kind], 99)), 3)
                for kind in sorted({kind for kind, _ in done}, key=lambda kind: int(kind.split("-")[0]))
            },
        }
    return {"load": load, "requests": count, "waiting": WAITING, "schedulers": found}


def percentiles(latencies: list[float]) -> dict[str, float]:
    mean = round(statistics.fmean(latencies), 3)
    return {"mean": mean, **{f"p{q}": round(float(np.percentile(latencies, q)), 3) for q in (50, 99)}}


# ---- drift -------------------------------------------------------------------------------------------------------------------------


def success(t: float, queue: int, *, drifts: bool = True) -> float:
    """The probability that queue i is served in slot t."""
    return 0.55 + 0.4 * math.sin(2.0 * math.pi * ((t / PERIOD if drifts else 0.1) + queue / QUEUES))


def capacity(*, drifts: bool = True) -> float:
    """Jobs a slot that a server that knew all rates could serve: the mean over a period of the best queue's rate. Rates that do not
    drift have to be shared out: with equal arrivals every queue gets time in proportion to 1 / rate."""
    if drifts:
        return statistics.fmean(max(success(t, queue) for queue in range(QUEUES)) for t in range(PERIOD))
    return QUEUES / sum(1.0 / success(0, queue, drifts=False) for queue in range(QUEUES))


def simulate(policy: Policy | None, load: float, slots: int, seed: int, *, drifts: bool = True) -> list[int]:
    """The total backlog after every slot; without a policy, jobs are served in order of arrival."""
    draw = np.random.default_rng(seed)
    comes = draw.random((slots, QUEUES)) < load * capacity(drifts=drifts) / QUEUES
    luck = draw.random((slots, QUEUES))
    rates = [[success(t, queue, drifts=drifts) for queue in range(QUEUES)] for t in range(PERIOD if drifts else 1)]
    names = [str(queue) for queue in range(QUEUES)]
    backlog, order, history, total = [0] * QUEUES, deque(), [], 0
    arrivals, lucky = comes.tolist(), luck.tolist()
    for t in range(slots):
        rate = rates[t % len(rates)]
        for queue in range(QUEUES):
            if arrivals[t][queue]:
                backlog[queue] += 1
                total += 1
                if policy is None:
                    order.append(queue)
        if total:
            choice = None
            if policy is None:
                chosen = order[0]
            else:
                choice = policy.choose({names[q]: Queue(float(backlog[q]), rate[q]) for q in range(QUEUES)})
                chosen = int(choice.kind)
            ok = lucky[t][chosen] < rate[chosen]
            if choice is not None:
                policy.observe(choice, float(ok))
            if ok:
                backlog[chosen] -= 1
                total -= 1
                if policy is None:
                    order.popleft()
        history.append(total)
    return history


POLICIES: dict[str, Callable[[int], Policy | None]] = {
    "fifo": lambda seed: None,
    "uniform": lambda seed: Uniform(seed),
    "longest queue": lambda seed: LongestQueue(),
    "maxweight, rates known": lambda seed: MaxWeight(),
    "softmw": lambda seed: SoftMW(2000, seed),
    "ssmw": lambda seed: SSMW(2000, seed),
}


def quarters(history: Sequence[float]) -> list[float]:
    """Means of the second and of the last quarter."""
    quarter = len(history) // 4
    return [round(statistics.fmean(history[k * quarter : (k + 1) * quarter]), 1) for k in (1, 3)]


def measure_drift(slots: int, seeds: Sequence[int], loads: Sequence[float]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for drifts in (True, False):
        for load in loads:
            row = {}
            for name, make in POLICIES.items():
                runs = [quarters(simulate(make(seed), load, slots, seed, drifts=drifts)) for seed in seeds]
                second, last = (round(statistics.fmean(run[k] for run in runs), 1) for k in (0, 1))
                row[name] = {"second_quarter": second, "last_quarter": last, "growth": round(last / second, 3)}
            found[f"{'drifting' if drifts else 'constant'}, load {load:g}"] = row
    return {"slots": slots, "seeds": list(seeds), "period": PERIOD, "cases": found}


def measure_engine_drift(load: float, periods: int, seed: int, period: float, window: int) -> dict[str, Any]:
    """Kinds whose requests cannot share a call; a call of kind i at time t takes 1 / (0.55 + 0.4 sin(...)) s."""
    plan, draw, at, arrivals = fs.make_plan("ddim", SCHEDULE, nfe=1), random.Random(seed), 0.0, []
    while True:
        at += draw.expovariate(load * capacity() / EACH)
        if at > periods * period:
            break
        kind = draw.randrange(QUEUES)
        arrivals.append(
            (at, Request(plan, range(EACH * len(arrivals), EACH * (len(arrivals) + 1)), {"size": kind}, kind=str(kind)))
        )
    found = {}
    for name, scheduler in {"fifo": make_scheduler("fifo"), "ssmw": ByKind(SSMW(window)), "softmw": ByKind(SoftMW(window))}.items():
        clock, backlog = Clock(), []

        def network(x: Tensor, time_: Tensor, size: int, clock: Clock = clock) -> Tensor:
            clock.now += 1.0 / success(clock.now / period * PERIOD, size)
            return torch.zeros_like(x)

        batches = Batches(fs.Denoiser(network, SCHEDULE, "data"), SHAPE, 1, scheduler, clock=clock)
        done, _ = play(batches, clock, arrivals, math.inf, lambda samples, b=backlog, c=clock: b.append((c.now, samples)))
        ends = [periods * period * k / 4 for k in (1, 2, 3, 4)]
        second, last = (
            statistics.fmean(samples for now, samples in backlog if low <= now < high) for low, high in (ends[:2], ends[2:])
        )
        found[name] = {"second_quarter": round(second, 1), "last_quarter": round(last, 1), "growth": round(last / second, 3)}
        found[name] |= percentiles([late for _, late in done])
    return {
        "load": load,
        "requests": len(arrivals),
        "period_seconds": period,
        "periods": periods,
        "window": window,
        "schedulers": found,
    }


# ---- the page ----------------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def tables(report: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/serve.md, by the names of their places."""
    found = {}
    told, columns = report["utilisation"], ("calls", "seconds", "utilisation", "host_milliseconds_a_call")
    rows: list[Any] = [
        (name.replace("_", "-"), *(told[name][c] for c in columns)) for name in ("continuous", "static", "request_level")
    ]
    found["utilisation"] = table(["batching", "calls", "seconds", "utilisation", "host's work, ms a call"], rows)
    rows = []
    for case in report["latency"]:
        for name, row in case["schedulers"].items():
            short, long = (row["p99_by_kind"][kind] for kind in ("3-4 calls", "33-64 calls"))
            rows.append((case["load"], f"`{name}`", row["mean"], row["p50"], row["p99"], short, long, row["rejected"]))
    head = ["load", "scheduler", "mean", "median", "p99", "p99 of 4 calls", "p99 of 33 to 50 calls", "rejected"]
    found["latency"] = table(head, rows)
    cases = {name: case for name, case in report["drift"]["cases"].items() if name.startswith("drifting")}
    rows = [
        (name, *(f"{case[name]['second_quarter']:.0f}, {case[name]['last_quarter']:.0f}" for case in cases.values()))
        for name in POLICIES
    ]
    found["drift"] = table(["policy", *(name.split(", ")[1] for name in cases)], rows)
    rows = [
        (f"{case['period_seconds']:.0f} s", f"`{name}`", row["second_quarter"], row["last_quarter"], row["mean"], row["p99"])
        for case in report["engine_drift"]
        for name, row in case["schedulers"].items()
    ]
    head = ["period", "scheduler", "backlog, second quarter", "last quarter", "mean latency (s)", "p99 (s)"]
    found["engine_drift"] = table(head, rows)
    return found


def with_tables(page: str, report: dict[str, Any]) -> str:
    """The page with the tables between their marks."""
    for name, text in tables(report).items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


def measure(part: str, options: argparse.Namespace) -> Any:
    seed = options.seed
    if part == "utilisation":
        return measure_utilisation(options.requests, seed)
    if part == "latency":
        return [measure_latency(load, 3 * options.requests, seed) for load in (0.8, 2.0)]
    if part == "drift":
        return measure_drift(options.slots, [seed, seed + 1], (0.55, 0.7, 0.85))
    return [measure_engine_drift(0.7, 4, seed, period, window) for period, window in ((6000.0, 2000), (1000.0, 400))]


PARTS = ("utilisation", "latency", "drift", "engine_drift")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the serving engine and its queues.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--seed", type=int, default=0, help="of requests, arrivals and services")
    parser.add_argument(
        "--requests", type=int, default=200, help="of the part utilisation; the part latency has three times as many"
    )
    parser.add_argument("--slots", type=int, default=60_000, help="of the part drift")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="measure these alone, and keep the others of the file"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() and options.parts is not PARTS else {}
    report |= {
        "command": "python benchmarks/serving.py",
        "machine": "one core of a 2-core machine",
        "seed": options.seed,
        "network": {"fixed_seconds": FIXED, "seconds_a_row": PER_ROW, "rows": ROWS},
    }
    for part in options.parts:
        report[part] = measure(part, options)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps({part: report[part]}, indent=2), flush=True)
    if set(PARTS) <= report.keys() and options.out == RESULTS:
        PAGE.write_text(with_tables(PAGE.read_text(), report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
