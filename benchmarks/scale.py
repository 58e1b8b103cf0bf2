"""Samples by many workers: kills, throughput, a thousand of them. ``python benchmarks/scale.py`` writes ``results/scale.json``.

*kills*: samples of the shipped digits by this process, and by 1, 2 and 4 workers of Ray of which one is killed (SIGKILL) every few seconds
while it works; the checksums of all shards have to be equal, and no sample may be lost or doubled. *throughput*: samples a second by this
process and by 1 to 4 workers without kills, from the first block to the last, against as many times one worker's rate as there are cores.
*simulation*: 1,000 workers with slow ones, hanging blocks and failures, with the same `Coordinator`. Figures of the first two mean
something on an idle machine only; ``load`` is the load average when they began.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewstep as fs
from fewstep.scale import Job, LocalEngine, Opened, RayEngine, read_shards, sample_shards
from fewstep.scale.actors import ray_session
from fewstep.scale.simulation import Cluster, simulate

RESULTS = Path(__file__).parent / "results" / "scale.json"
CLASSES = 10


def labels(rows: range) -> dict[str, torch.Tensor]:
    """The classes in turn."""
    return {"label": torch.tensor([i % CLASSES for i in rows])}


def make_job(count: int, nfe: int, block: int) -> Job:
    """Digits of all classes in turn; what `opened` needs travels with it."""
    denoiser = fs.load("digits")
    plan = fs.make_plan("auto", denoiser.schedule, nfe, final="zero")
    return Job(partial(Opened, denoiser, labels, data_range=(-1.0, 1.0)), plan, (1, 8, 8), range(count), block=block, threads=1)


class Killer:
    """Kills one worker that is ready every so many seconds, while it runs."""

    def __init__(self, seconds: float):
        self.seconds, self.ready, self.kills = seconds, set[int](), 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def told(self, what: str, process: int) -> None:
        """What the engine tells."""
        (self.ready.add if what == "ready" else self.ready.discard)(process)

    def _run(self) -> None:
        while not self.ended.wait(self.seconds):
            for process in list(self.ready)[:1]:
                self.ready.discard(process)
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.kills += 1

    def __enter__(self) -> Killer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def kills(job: Job, seconds: float, workers: list[int]) -> dict[str, Any]:
    """Checksums with kills against those without."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        alone = sample_shards(job, Path(folder) / "alone", engine=LocalEngine())
        for count in workers:
            began = time.perf_counter()
            with Killer(seconds) as killer:
                found = sample_shards(job, Path(folder) / f"{count}", engine=RayEngine(count, told=killer.told))
            _, about = read_shards(Path(folder) / f"{count}")
            seen = [told["index"] for told in about]
            rows.append(
                {
                    "workers": count,
                    "killed": killer.kills,
                    "deaths": found.tally.deaths,
                    "repeated": found.tally.repeated,
                    "lost": len(set(range(len(job.seeds))) - set(seen)),
                    "doubled": len(seen) - len(set(seen)),
                    "checksums_equal": found.checksums == alone.checksums,
                    "seconds": round(time.perf_counter() - began, 1),
                }
            )
            print(rows[-1], flush=True)
    return {"samples": len(job.seeds), "shards": len(alone.checksums), "seconds_between_kills": seconds, "rows": rows}


def throughput(job: Job, workers: list[int]) -> dict[str, Any]:
    """Samples a second from the first finished block to the last one, so without the start of the workers."""
    rows = []
    for count in [0, *workers]:
        times: list[tuple[float, int]] = []

        def after(there: int, times: list[tuple[float, int]] = times) -> None:
            times.append((time.perf_counter(), there))

        with tempfile.TemporaryDirectory() as folder:
            engine = RayEngine(count) if count else LocalEngine()
            sample_shards(job, Path(folder) / "a", engine=engine, after=after)
        (first, begun), (last, ended) = times[max(1, 2 * count)], times[-1]
        rows.append({"workers": count or "this process", "samples_per_second": round((ended - begun) / (last - first), 2)})
        print(rows[-1], flush=True)
    one = next(each["samples_per_second"] for each in rows if each["workers"] == 1)
    for each in rows[1:]:
        each["ratio"] = round(each["samples_per_second"] / one, 3)
        each["of_ideal"] = round(each["ratio"] / min(each["workers"], os.cpu_count() or 1), 3)
    return {"samples": len(job.seeds), "rows": rows}


CLUSTERS = {
    "even": {},
    "slow workers": {"slow": 0.02},
    "hanging blocks": {"hangs": 0.001},
    "failures": {"failure_seconds": 3600.0},
    "failures every 10 minutes": {"failure_seconds": 600.0},
    "all of them": {"slow": 0.02, "hangs": 0.001, "failure_seconds": 3600.0},
}


def simulated(blocks: int, workers: int, seeds: int) -> dict[str, Any]:
    """Efficiency with and without blocks done again, and with one block a worker at a time."""
    common = {"workers": workers, "block_seconds": 2.0, "restart_seconds": 30.0, "message_seconds": 5e-4}
    policies = {"as it is": {}, "nothing done again": {"copies": 1}, "one block at a time": {"depth": 1}}
    rows = []
    for name, changes in CLUSTERS.items():
        for policy, options in policies.items():
            found = [simulate(Cluster(**{**common, **changes}), blocks, seed=seed, **options) for seed in range(seeds)]
            assert all(each.kept == each.blocks == blocks for each in found)
            rows.append(
                {
                    "cluster": name,
                    "policy": policy,
                    "efficiency": round(float(np.mean([each.efficiency for each in found])), 4),
                    "seconds": round(float(np.mean([each.seconds for each in found])), 1),
                    "ideal_seconds": round(float(np.mean([each.ideal_seconds for each in found])), 1),
                    "deaths": float(np.mean([each.deaths for each in found])),
                    "repeated": float(np.mean([each.repeated for each in found])),
                    "wasted": round(float(np.mean([each.wasted for each in found])), 4),
                }
            )
            print(rows[-1], flush=True)
    cluster = {field.name: getattr(Cluster(**common), field.name) for field in dataclasses.fields(Cluster)}
    told = {name: None if value == float("inf") else value for name, value in cluster.items()}
    return {"blocks": blocks, "seeds": seeds, "cluster": told, "changes": CLUSTERS, "rows": rows}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="samples of kills and throughput")
    parser.add_argument("--nfe", type=int, default=4)
    parser.add_argument("--block", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=5.0, help="between kills")
    parser.add_argument("--workers", default="1,2,4", help="of kills")
    parser.add_argument("--rates", default="1,2,3,4", help="numbers of workers of throughput")
    parser.add_argument("--blocks", type=int, default=50_000, help="of the simulation")
    parser.add_argument("--seeds", type=int, default=2, help="of the simulation")
    parser.add_argument("--parts", default="kills;throughput;simulation")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    document = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts.split(";"):
        told: dict[str, Any] = {"machine": f"a machine of {os.cpu_count()} cores", "load": round(os.getloadavg()[0], 1)}
        if part == "simulation":
            told = {"machine": "one core of a 2-core machine"}
            size = f"--blocks {options.blocks} --seeds {options.seeds}"
            found = simulated(options.blocks, 1000, options.seeds)
        else:
            size = f"--count {options.count} --nfe {options.nfe} --block {options.block}"
            job = make_job(options.count, options.nfe, options.block)
            with ray_session(None, 4):
                if part == "kills":
                    found = kills(job, options.seconds, [int(n) for n in options.workers.split(",")])
                    size += f" --seconds {options.seconds:g} --workers {options.workers}"
                else:
                    found = throughput(job, [int(n) for n in options.rates.split(",")])
                    size += f" --rates {options.rates}"
        document[part] = {"command": f"python benchmarks/scale.py --parts '{part}' {size}", **told, **found}
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
