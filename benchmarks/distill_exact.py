"""Students of a teacher in closed form: ``python benchmarks/distill_exact.py`` writes ``benchmarks/results/distill_exact.json``.

The teacher is the exact flow of eight modes on a ring in the plane. Students begin as a network that learnt that flow. Of DMD2, TDM and
FreeFlow: how many modes 800 samples reach, and their Wasserstein distance to exact samples in units of that of two exact sets, beside the
best of eight untuned solvers on five grids in as many calls of the exact teacher. Of LCM and FreeFlow, which map noise to its own sample:
the relative error of that map, from the paths of the exact flow.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from distill_teacher import write_json
from torch import Tensor

import fewstep as fs
from fewstep.distill import DMD2, LCM, TDM, FreeFlow, read_as
from fewstep.tuners.task import GRIDS, UNTUNED

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from mixtures import judged, noises, ring, taught, teacher_of  # pyright: ignore

RESULTS = Path(__file__).parent / "results" / "distill_exact.json"
COUNT, EMA, REFERENCE_CALLS = 800, 0.98, 400


@dataclass(frozen=True)
class Part:
    """A student: its method, its calls, and how it is trained."""

    method: Callable[[], Any]
    nfe: int = 1
    data: bool = False
    training: dict[str, Any] = field(default_factory=lambda: {"steps": 2500, "learning_rate": 1e-3})


PARTS = {
    "dmd2": Part(DMD2),
    "tdm": Part(lambda: TDM(update_ratio=3), 4, training={"steps": 2000, "learning_rate": 1e-3}),
    "freeflow": Part(FreeFlow),
    "lcm": Part(lambda: LCM(loss="l2"), data=True, training={"steps": 4000, "learning_rate": 2e-3}),
}


def student_of(part: Part, seed: int) -> dict[str, Any]:
    began, exact = time.process_time(), ring(fs.schedules.Flow())
    method, teacher = part.method(), teacher_of(exact)
    network = copy.deepcopy(taught())
    made = method.wrapped(network) if hasattr(method, "wrapped") else network
    training = method.training(teacher, made)
    data = {"x": exact.draw(20_000, seed=seed).float()} if part.data else noises(2)
    result = fs.fit(training.stages, dict(training.modules), data, batch_size=256, warmup=20, ema=EMA, seed=seed, **part.training)
    made.load_state_dict(result.averages[EMA]["student"])
    told: dict[str, Any] = {"cpu_seconds": round(time.process_time() - began)}
    plan = method.plan(teacher, part.nfe)
    noise = fs.draw_noise((2,), range(COUNT), plan)
    with torch.no_grad():
        samples = fs.sample(read_as(teacher, made), noise, plan, seeds=range(COUNT))
    told["modes"], told["distance"] = judged(samples, exact)
    if part.nfe == 1 and all(row.noise is None for row in plan.rows):
        told["map_error"] = map_error(exact, samples, noise)
    return {name: round(value, 4) for name, value in told.items()}


def map_error(exact: Any, samples: Tensor, noise: Tensor) -> float:
    """Relative distance from the ends of the exact paths."""
    plan = fs.make_plan("dpmpp_3m", exact.schedule, REFERENCE_CALLS, grid="time", final="zero")
    ends = fs.sample(exact, noise.double(), plan)
    return float((samples.double() - ends).norm() / ends.norm())


def untuned(nfe: int) -> dict[str, Any]:
    """The least distance without a student."""
    exact = ring(fs.schedules.Flow())
    found = {}
    for name, made in UNTUNED.items():
        for grid in GRIDS:
            plan = made.plan(exact.schedule, nfe, grid, final="zero")
            noise = fs.draw_noise((2,), range(COUNT), plan)
            samples = fs.sample(exact, noise.double(), plan)
            found[f"{name}, {grid}"] = (*judged(samples.float(), exact), map_error(exact, samples, noise))
    best = min(found, key=lambda name: found[name][1])
    least = min(row[2] for row in found.values())
    return {"best": best, "modes": found[best][0], "distance": round(found[best][1], 4), "least_map_error": round(least, 4)}


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Medians over the seeds, and the bars: every mode, 1.25 times the distance of two exact sets, 5 % of the map."""
    found = {}
    for name, seeds in report["students"].items():
        keys = next(iter(seeds.values()))
        row: dict[str, Any] = {key: statistics.median(told[key] for told in seeds.values()) for key in keys}
        if name == "lcm":
            row["holds"] = row["map_error"] <= 0.05
        else:
            row["holds"] = row["modes"] == 8 and row["distance"] <= 1.25
        found[name] = row
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Distill an exact mixture.")
    parser.add_argument("--parts", default=";".join(PARTS), help="separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3, help="of training, from 0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes; what is there is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain = {str(nfe): untuned(nfe) for nfe in (1, 4)}
    print(json.dumps(plain), flush=True)
    for name in options.parts.split(";"):
        for seed in range(options.seeds):
            told = student_of(PARTS[name], seed)
            print(name, seed, told, flush=True)
            write(options.out, plain, name, seed, told)
    print(json.dumps(json.loads(options.out.read_text())["summary"], indent=1))
    return 0


def write(out: Path, plain: dict[str, Any], name: str, seed: int, told: dict[str, Any]) -> None:
    def merged(report: dict[str, Any]) -> dict[str, Any]:
        report |= {"command": "python benchmarks/distill_exact.py", "machine": "one core of a 2-core machine", "untuned": plain}
        report.setdefault("students", {}).setdefault(name, {})[str(seed)] = told
        return report | {"summary": summary(report)}

    write_json(out, merged)


if __name__ == "__main__":
    raise SystemExit(main())
