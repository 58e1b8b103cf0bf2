"""LCM and LCM-LoRA on digits: ``python benchmarks/distill_lcm.py`` writes ``benchmarks/results/distill_lcm.json``, part by part.

The teacher is that of ``distill_teacher.py``, without guidance. Students learn from the digits of the training part, and are asked for
samples of 1, 2 and 4 calls. FD is Frechet's distance in the features of the classifier that comes along, from samples of the teacher in
20 calls of the solver "auto" (its floor: two such sets); beside it sliced Wasserstein in pixels. Without a student: the least FD of any
sampler of so many calls, untuned solvers on five grids, chosen on 512 other samples, and the plan of ``fewstep.tune``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import distill_teacher
import torch
from distill_teacher import labels_of, sampled, write_json
from torch import Tensor, nn

import fewstep as fs
from fewstep.adapt import LoraOptions
from fewstep.distill import LCM, distill
from fewstep.evaluate import Frechet, SlicedWasserstein, digit_features
from fewstep.train.recipes import digits
from fewstep.tuners.task import GRIDS, UNTUNED

RESULTS = Path(__file__).parent / "results" / "distill_lcm.json"
COUNT, FEW, CALLS, REFERENCE_CALLS = 4000, 512, (1, 2, 4), 20
REFERENCE_SEED, FLOOR_SEED, SCREEN_SEED, STUDENT_SEED = 0, 1_000_000, 2_000_000, 3_000_000
TRAINING = {"iterations": 1500, "batch_size": 128, "ema": 0.995}
EVALUATIONS = 200_000
"""Network evaluations that tuning may take."""

PARTS: dict[str, dict[str, Any]] = {
    "lcm": {"method": LCM(), "learning_rate": 1e-3},
    "lcm, l2": {"method": LCM(loss="l2"), "learning_rate": 1e-3},
    "lcm, online target": {"method": LCM(target_decay=None), "learning_rate": 1e-3},
    "lcm-lora, rank 64": {"method": LCM(), "adapter": LoraOptions(rank=64), "learning_rate": 1e-3},
    "lcm-lora, rank 64, online target": {
        "method": LCM(target_decay=None),
        "adapter": LoraOptions(rank=64),
        "learning_rate": 3e-3,
    },
}


class Judge:
    """The teacher's samples, and what is measured against them."""

    def __init__(self, teacher: fs.Denoiser):
        plan = fs.make_plan("auto", teacher.schedule, REFERENCE_CALLS, final="zero")
        self.reference = sampled(teacher, plan, COUNT, REFERENCE_SEED)
        self.features = digit_features(self.reference)
        self.floor = self(sampled(teacher, plan, COUNT, FLOOR_SEED))

    def __call__(self, samples: Tensor) -> dict[str, float]:
        fd = Frechet()(digit_features(samples), self.features)
        return {"fd": round(fd, 4), "sliced": round(SlicedWasserstein()(samples, self.reference), 4)}


def baselines(teacher: fs.Denoiser, judge: Judge) -> dict[str, Any]:
    """The best sampler of every number of calls without a student."""
    tuned = fs.tune(teacher, nfe=CALLS, cond={"label": labels_of(FEW)}, evaluations=EVALUATIONS, final="zero")
    found = {}
    for nfe in CALLS:
        plans = {
            f"{name}, {grid}": made.plan(teacher.schedule, nfe, grid, final="zero")
            for name, made in UNTUNED.items()
            for grid in GRIDS
        }
        some = {name: judge(sampled(teacher, plan, FEW, SCREEN_SEED))["fd"] for name, plan in plans.items()}
        rows = {name: plans[name] for name in sorted(some, key=lambda name: some[name])[:2]} | {"fewstep.tune": tuned.plans[nfe]}
        judged = {name: judge(sampled(teacher, plan, COUNT, STUDENT_SEED)) for name, plan in rows.items()}
        best = min(judged, key=lambda name: judged[name]["fd"])
        found[str(nfe)] = {"best": best, **judged[best], "all": judged}
    return found


def student_of(teacher: fs.Denoiser, judge: Judge, name: str, seed: int) -> dict[str, Any]:
    began = time.process_time()
    student = distill(teacher, data=digits("train"), steps=CALLS, seed=seed, compare=None, **PARTS[name], **TRAINING)
    told: dict[str, Any] = {
        "cpu_seconds": round(time.process_time() - began),
        "evaluations": student.card["training"]["evaluations"],
    }
    trained = [p.numel() for p in student.network.parameters() if p.requires_grad]
    told["trained_parameters"] = sum(trained)
    for nfe in CALLS:
        told[str(nfe)] = judge(sampled(student.denoiser, student.plan(nfe), COUNT, STUDENT_SEED))
    assert isinstance(student.network, nn.Module)
    return told


def show(report: dict[str, Any]) -> None:
    floor, best = report["floor"]["fd"], report.get("baselines", {})
    print(f"floor FD {floor}; best without a student:", {nfe: (found["best"], found["fd"]) for nfe, found in best.items()})
    for name, seeds in report["students"].items():
        medians = {nfe: statistics.median(told[str(nfe)]["fd"] for told in seeds.values()) for nfe in CALLS}
        print(
            f"{name}: FD {medians}, seeds {sorted(seeds)}, {statistics.median(told['cpu_seconds'] for told in seeds.values())} CPU s"
        )


def read(out: Path) -> dict[str, Any]:
    """What is in the file so far."""
    return json.loads(out.read_text()) if out.exists() else {"students": {}}


def write(out: Path, told: dict[str, Any], students: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Bring what was made into the file, and leave what others have written meanwhile; returns what it holds then."""

    def merged(report: dict[str, Any]) -> dict[str, Any]:
        report = {"students": {}} | report | told
        for name, seeds in students.items():
            report["students"].setdefault(name, {}).update(seeds)
        return report

    return write_json(out, merged)


def main() -> int:
    parser = argparse.ArgumentParser(description="Distill the digits into students of 1, 2 and 4 calls.")
    parser.add_argument("--parts", default=";".join(["baselines", *PARTS]), help="separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3, help="of training, from 0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes; what is there is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher = distill_teacher.load()
    judge = Judge(teacher)
    report = read(options.out)
    told = {"command": "python benchmarks/distill_lcm.py", "machine": "one core of a 2-core machine", "count": COUNT}
    told |= {"training": TRAINING, "floor": judge.floor}
    for name in options.parts.split(";"):
        if name == "baselines":
            report = write(options.out, {**told, "baselines": baselines(teacher, judge)}, {})
        for seed in range(options.seeds if name in PARTS else 0):
            if str(seed) not in report["students"].get(name, {}):
                report = write(options.out, told, {name: {str(seed): student_of(teacher, judge, name, seed)}})
    show(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
