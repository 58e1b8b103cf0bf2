"""What control through a distilled surrogate is worth: ``python benchmarks/control.py`` writes ``benchmarks/results/control.json``.

The student of ``steer_student.py`` (digits, latent consistency distillation) and its teacher. Three targets: the left half of a held-out
digit (inpaint), the mean of each row of a held-out digit (intensity), and a class, by the classifier that comes along, of a model that is
told the next one, 0 after 9 (class). Models are told real classes, for the student never learnt to do without one. Every method begins
from the same noise, keeps it on its shell and does 70 iterations of Adam, at the better of two learning rates on other samples.

- DITTO: through 20 calls of the teacher's best solver, decoded by the same.
- DITTO-2: through one call of the student, decoded in 4 calls without fresh noise (TCD with gamma = 0); or in 1.
- the same with the last 20 of the 70 iterations through the 4 calls of decoding ("refined").
- the ablation: decoded in 4 calls that draw their noise anew.

The control error is that *after* decoding, the mean over samples; those of DITTO are of the first 30. Calls count a backward pass as two.
"Equal time" is DITTO's error after as many network calls as DITTO-2 took. FD is Frechet's distance in the classifier's features to held-out
digits, of the samples of all seeds together; it is compared with that of the same noise without control.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import distill_teacher
import steer_student
import torch

import fewstep as fs
from fewstep.evaluate import Frechet, digit_features
from fewstep.steer import ClassTarget, IntensityTarget, MaskedPixels, optimize_noise
from fewstep.train.recipes import digits

RESULTS = Path(__file__).parent / "results" / "control.json"
COUNT, FEW, TRIED = 120, 30, 10
ITERATIONS, TEACHER_CALLS = 70, 20
RATES = (0.2, 0.5)
REFINED = 20


def target_of(name: str, rows: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    """The loss, and what the model is told."""
    held = digits("held_out")
    x, label = held["x"][rows], held["label"][rows]
    if name == "inpaint":
        mask = torch.zeros(1, 8, 8)
        mask[..., :4] = 1.0
        return MaskedPixels(x, mask), {"label": label}
    if name == "intensity":
        return IntensityTarget(x.mean((1, 3)), axis=1), {"label": label}
    return ClassTarget(label), {"label": (label + 1) % 10}


def rows_of(seed: int, count: int) -> torch.Tensor:
    return torch.randperm(len(digits("held_out")["x"]), generator=torch.Generator().manual_seed(seed))[:count]


def plans(student: Any, teacher: Any) -> dict[str, tuple[Any, fs.Plan, fs.Plan, int, int]]:
    """Name -> denoiser, what is optimised through, what decodes, how many samples, and how many iterations are refined."""
    grid = [float(t) for t in student.plan(4).grid]
    quiet = fs.solvers.TCD(gamma=0.0).plan(teacher.schedule, grid=grid)
    many = fs.make_plan("auto", teacher.schedule, TEACHER_CALLS, final="zero")
    one = student.plan(1)
    return {
        "DITTO, 20 calls": (teacher, many, many, FEW, 0),
        "DITTO-2, decoded in 4 calls": (student.denoiser, one, quiet, COUNT, 0),
        "DITTO-2, decoded in 1 call": (student.denoiser, one, one, COUNT, 0),
        "DITTO-2, refined": (student.denoiser, one, quiet, COUNT, REFINED),
        "DITTO-2, decoded with fresh noise": (student.denoiser, one, student.plan(4), COUNT, 0),
    }


def controlled(name: str, way: Any, seed: int, count: int, rate: float) -> Any:
    denoiser, surrogate, decode, _, refined = way
    loss, cond = target_of(name, rows_of(seed, count))
    seeds = range(1000 * seed, 1000 * seed + count)
    noise = fs.draw_noise(distill_teacher.SHAPE, seeds, decode)
    options = {"cond": cond, "seeds": seeds, "iterations": ITERATIONS, "refined": refined, "learning_rate": rate}
    return optimize_noise(denoiser, loss, noise, surrogate, decode, **options)


def measured(name: str, ways: dict[str, Any], seeds: int) -> dict[str, Any]:
    """A target: every way, at its better learning rate."""
    held = digit_features(digits("held_out")["x"])
    found: dict[str, Any] = {}
    for title, way in ways.items():
        tried = {rate: float(controlled(name, way, 99, TRIED, rate).errors.mean()) for rate in RATES}
        rate, samples, free, rows = min(tried, key=lambda r: tried[r]), [], [], []
        for seed in range(seeds):
            began = time.process_time()
            made = controlled(name, way, seed, way[3], rate)
            seconds = time.process_time() - began
            noise = fs.draw_noise(distill_teacher.SHAPE, range(1000 * seed, 1000 * seed + way[3]), way[2])
            cond = target_of(name, rows_of(seed, way[3]))[1]
            plain = fs.sample(way[0], noise, way[2], cond=cond, seeds=range(1000 * seed, 1000 * seed + way[3]))
            samples, free = [*samples, made.samples], [*free, plain]
            equal = made.log[: max(1, round(ITERATIONS / way[1].nfe))][-1]["error"]
            cell = {
                "error": float(made.errors[:FEW].mean()),
                "without": float(made.initial_errors[:FEW].mean()),
                "surrogate": float(made.surrogate_errors[:FEW].mean()),
            }
            cell |= {"at the time of one call an iteration": equal, "calls": made.calls, "cpu_seconds_a_sample": seconds / way[3]}
            rows.append({key: float(f"{value:.4g}") for key, value in cell.items()})
        found[title] = {"learning_rate": rate, "seeds": rows}
        if way[3] == COUNT:
            fd = [Frechet()(digit_features(torch.cat(x)), held) for x in (samples, free)]
            found[title] |= {"fd": round(fd[0], 4), "fd_without": round(fd[1], 4)}
        print(name, title, rate, rows, found[title].get("fd"), found[title].get("fd_without"), flush=True)
    return found


def summary(targets: dict[str, Any]) -> dict[str, Any]:
    """Medians over seeds, and the bars."""
    rows, bars = {}, {}
    for name, ways in targets.items():
        median = {
            title: {key: statistics.median(cell[key] for cell in way["seeds"]) for key in way["seeds"][0]}
            for title, way in ways.items()
        }
        rows[name] = median
        ditto, mine = median["DITTO, 20 calls"], median["DITTO-2, decoded in 4 calls"]
        refined, fresh = median["DITTO-2, refined"], median["DITTO-2, decoded with fresh noise"]
        time_bar = ditto["at the time of one call an iteration"]
        way, quick = ways["DITTO-2, decoded in 4 calls"], ways["DITTO-2, decoded in 1 call"]
        once = median["DITTO-2, decoded in 1 call"]
        bars[name] = {
            "error <= 0.5 of DITTO at equal time": _bar(mine["error"] / time_bar, 0.5),
            "FD <= 1.5 of that without control": _bar(way["fd"] / way["fd_without"], 1.5),
            "error <= 1.1 of DITTO at equal iterations": _bar(mine["error"] / ditto["error"], 1.1),
            "in 1 call: error <= 0.5 of DITTO at equal time": _bar(once["error"] / time_bar, 0.5),
            "in 1 call: FD <= 1.5 of that without control": _bar(quick["fd"] / quick["fd_without"], 1.5),
            "refined: error <= 0.5 of DITTO at equal time": _bar(refined["error"] / time_bar, 0.5),
            "the same in 1 call": _bar(once["error"] / ditto["error"], 1.1),
            "the same, refined": _bar(refined["error"] / ditto["error"], 1.1),
            "calls <= a tenth": _bar(mine["calls"] / ditto["calls"], 0.1),
            "calls <= a tenth, refined": _bar(refined["calls"] / ditto["calls"], 0.1),
            "fresh noise loses control: error >= 2 times": _bar(fresh["error"] / mine["error"], 2.0, most=False),
        }
    return {"medians": rows, "bars": bars}


def _bar(value: float, bar: float, *, most: bool = True) -> dict[str, Any]:
    return {"value": round(value, 4), "bar": bar, "holds": value <= bar if most else value >= bar}


def main() -> int:
    parser = argparse.ArgumentParser(description="Control by the starting noise, through a student and through the sampler.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--seeds", type=int, default=3, help="of noise and targets")
    parser.add_argument(
        "--targets", default="inpaint,intensity,class", help="which; of the others, results that are there are kept"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher, student = distill_teacher.load(), steer_student.load()
    targets = json.loads(options.out.read_text())["targets"] if options.out.exists() else {}
    targets |= {name: measured(name, plans(student, teacher), options.seeds) for name in options.targets.split(",")}
    report = {"command": "python benchmarks/control.py", "machine": "one core of a 2-core machine", "targets": targets}
    report |= {"iterations": ITERATIONS, "summary": summary(targets)}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
