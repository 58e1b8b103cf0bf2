r"""Does distillation beat the best solver? ``python benchmarks/distill.py`` writes ``benchmarks/results/distill.json``, a part at a time.

The teacher is that of ``distill_teacher.py``: digits, with labels, without guidance. What is asked of every student is the distance of
its samples from the teacher's own at many calls: Frechet's in the features of the classifier that comes along (FD), with the floor of two
sets of the teacher; sliced Wasserstein in pixels; how often the classifier sees the digit that was asked for; and coverage, the share of
the teacher's samples that have one of the student's as near as their fifth neighbour.

B_n is the least FD of any sampler of n calls without training a student: solvers on grids, chosen on other samples, and the plan of
``fewstep.tune``. Deterministic students are compared with the teacher's own end points for the same noise, too.

Parts are methods and ablations, ``--parts "dmd2;tdm"``; left out, all of them that are not in the file yet. Several may run at once.
CPU seconds are those of training.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distill_teacher
import numpy as np
import torch
from distill_teacher import labels_of, sampled, write_json
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep as fs
from fewstep.distill import DMD2, TDM, Adversary, FreeFlow, HighFrequencyLoss, HiPA, read_as, teacher_pairs
from fewstep.distill.cost import counting
from fewstep.evaluate.features import CLASSIFIER
from fewstep.models import read_classifier
from fewstep.train import stabilize
from fewstep.train.recipes import digits

RESULTS = Path(__file__).parent / "results" / "distill.json"
COUNT, FEW = 4000, 512
REFERENCE_CALLS = 20
CALLS = (1, 2, 3, 4, 8)
SOLVERS, GRIDS = ("ddim", "dpmpp_2m", "unipc", "auto"), ("auto", "time", "quadratic", "lambda", "karras")
FINALISTS = 2
REFERENCE_SEED, FLOOR_SEED, SCREEN_SEED, STUDENT_SEED, PAIR_SEED = 0, 1_000_000, 2_000_000, 3_000_000, 4_000_000
EMA = 0.99
COST, OLD_PAY_OFF = "evaluations_of_training", "pays_off_after"
"""Names in the file. Seeds that have `evaluations` were counted without backward passes; for these no number of samples is told."""


@dataclass(frozen=True)
class Part:
    """A student to train.

    Args:
        method: made when it is needed, for its class may not be there yet.
        nfe: calls to sample it with.
        steps, batch_size, learning_rate: of training.
        data: whether batches hold real digits beside labels; "pairs": the teacher's own.
    """

    method: Callable[[], Any]
    nfe: tuple[int, ...] = (1,)
    steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 1e-3
    data: str = "labels"


def lcm() -> Any:
    """Latent consistency distillation, where it is built."""
    return importlib.import_module("fewstep.distill").LCM()


def adversarial(**options: Any) -> Callable[[], Any]:
    return lambda: DMD2(adversary=Adversary(at="blocks.2.down", weight=0.03, head_weight=0.1, **options))


PARTS: dict[str, Part] = {
    "dmd2": Part(DMD2),
    "dmd2, as many steps of both": Part(lambda: DMD2(update_ratio=1), steps=300),
    "dmd2, 2 calls": Part(lambda: DMD2(steps=2), (2,)),
    "tdm": Part(lambda: TDM(update_ratio=3), (4,), steps=1200, batch_size=96, learning_rate=3e-4),
    "tdm, as many steps of both": Part(lambda: TDM(update_ratio=1), (4,), steps=1200, batch_size=96, learning_rate=3e-4),
    "tdm, shared intervals": Part(lambda: TDM(update_ratio=3, separate=False), (4,), steps=1200, batch_size=96, learning_rate=3e-4),
    "tdm, 1 call": Part(lambda: TDM(steps=1, update_ratio=5)),
    "tdm, 1 2 4 calls": Part(lambda: TDM(steps=(1, 2, 4), update_ratio=3), (1, 2, 4), steps=1800, batch_size=96),
    "freeflow": Part(FreeFlow, steps=1200),
    "freeflow, prediction only": Part(lambda: FreeFlow(correct=0.0), steps=1200),
    "freeflow, correction only": Part(lambda: FreeFlow(correct=1.0), steps=1200),
    "dmd2, adversary": Part(adversarial(), data="digits"),
    "dmd2, adversary, R1": Part(adversarial(stabilizer=stabilize.R1(0.1)), data="digits"),
    "dmd2, adversary, controller": Part(adversarial(stabilizer=stabilize.DiscriminatorController(1.0)), data="digits"),
    "dmd2, adversary without noise": Part(adversarial(noise=(0.0, 0.0)), data="digits"),
    "regression on pairs": Part(lambda: HiPA(losses=()), steps=1200, data="pairs"),
    "hipa": Part(lambda: HiPA(losses=(HighFrequencyLoss(),)), steps=1200, data="pairs"),
    "lcm": Part(lcm, (1, 2, 4), steps=1500, data="digits"),
    "dmd2, longer": Part(DMD2, steps=4500),
    "freeflow, a tenth of the correction": Part(lambda: FreeFlow(strength=0.1), steps=1200),
    "freeflow, longer": Part(FreeFlow, steps=3600),
    "tdm, longer": Part(lambda: TDM(update_ratio=3), (4,), steps=3600, batch_size=96, learning_rate=3e-4),
}


# ---- judging -----------------------------------------------------------------------------------------------------------------------


class Judge:
    """The teacher's samples, and what is measured against them."""

    def __init__(self, teacher: fs.Denoiser, folder: Path, count: int):
        self.teacher, self.count = teacher, count
        self.classifier = read_classifier(CLASSIFIER)[0]
        plan = fs.make_plan("auto", teacher.schedule, REFERENCE_CALLS, final="zero")
        self.reference = self._kept(folder / f"reference_{count}.safetensors", plan, REFERENCE_SEED)
        self.other = self._kept(folder / f"floor_{count}.safetensors", plan, FLOOR_SEED)
        self.ends = self._kept(folder / f"ends_{count}.safetensors", plan, STUDENT_SEED)
        self.data = fs.evaluate.digit_features(digits("held_out")["x"])
        self.features = fs.evaluate.digit_features(self.reference)
        self.near = torch.cdist(self.features[:2000], self.features[:2000]).kthvalue(6, dim=1).values

    def _kept(self, file: Path, plan: fs.Plan, seed: int) -> Tensor:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"samples": sampled(self.teacher, plan, self.count, seed)}, file)
        return load_file(file)["samples"]

    def __call__(self, samples: Tensor) -> dict[str, float]:
        features = fs.evaluate.digit_features(samples)
        with torch.no_grad():
            seen = self.classifier(samples.clamp(-1.0, 1.0)).argmax(1)
        nearest = torch.cdist(self.features[:2000], features[:2000]).min(1).values
        found = {
            "fd": fs.evaluate.Frechet()(features, self.features),
            "sliced": fs.evaluate.SlicedWasserstein()(samples, self.reference),
            "agreement": float((seen == labels_of(len(samples))).float().mean()),
            "coverage": float((nearest <= self.near).float().mean()),
            "fd_to_data": fs.evaluate.Frechet()(features, self.data),
        }
        return {name: round(value, 5) for name, value in found.items()}

    def path_error(self, samples: Tensor) -> float:
        """Relative distance from the teacher's end points for the same noise."""
        return round(float((samples - self.ends).norm() / self.ends.norm()), 4)

    def top_octave(self, samples: Tensor) -> float:
        """Error of the mean power beyond half the Nyquist radius against the teacher's end points, in dB."""
        return round(abs(10.0 * float(np.log10(power(samples) / power(self.ends)))), 4)


def power(x: Tensor) -> float:
    down, right = torch.fft.fftfreq(8)[:, None], torch.fft.rfftfreq(8)[None, :]
    return float(torch.fft.rfft2(x, norm="ortho").abs().square()[..., (down**2 + right**2).sqrt() > 0.25].mean())


# ---- without a student -------------------------------------------------------------------------------------------------------------


def baselines(judge: Judge, evaluations: int) -> dict[str, Any]:
    """For every number of calls, all that was judged, and the best of it."""
    teacher, began = judge.teacher, time.process_time()
    tuned = fs.tune(teacher, nfe=CALLS, cond={"label": labels_of(FEW)}, evaluations=evaluations, final="zero")
    found: dict[str, Any] = {"tuning": {"evaluations": evaluations, "cpu_seconds": round(time.process_time() - began)}, "calls": {}}
    target = fs.evaluate.digit_features(
        sampled(teacher, fs.make_plan("auto", teacher.schedule, REFERENCE_CALLS, final="zero"), FEW, SCREEN_SEED)
    )
    for n in CALLS:
        screened = {}
        for name, plan in untuned(teacher.schedule, n).items():
            features = fs.evaluate.digit_features(sampled(teacher, plan, FEW, SCREEN_SEED))
            screened[name] = (fs.evaluate.Frechet()(features, target), plan)
        best = sorted(screened, key=lambda name: screened[name][0])[:FINALISTS]
        plans = {name: screened[name][1] for name in best} | {"fewstep.tune": tuned.plans[n]}
        rows = {name: judge(sampled(teacher, plan, judge.count, STUDENT_SEED)) for name, plan in plans.items()}
        least = min(rows, key=lambda name: rows[name]["fd"])
        found["calls"][str(n)] = {"best": least, **rows[least], "all": rows}
        print(n, least, rows[least], flush=True)
    return found


def untuned(schedule: Any, n: int) -> dict[str, fs.Plan]:
    plans = {}
    for solver in SOLVERS:
        for grid in GRIDS if n > 1 and solver != "auto" else ("auto",):
            plans[f"{solver}, {grid}"] = fs.make_plan(solver, schedule, n, grid=grid, final="zero")
    return plans


# ---- students ----------------------------------------------------------------------------------------------------------------------


def data_of(part: Part, teacher: fs.Denoiser, seed: int) -> Any:
    if part.data == "digits":
        return digits("train")
    if part.data == "pairs":
        plan = fs.make_plan("auto", teacher.schedule, 12, final="zero")
        return teacher_pairs(teacher, range(PAIR_SEED, PAIR_SEED + 4000), plan, cond={"label": labels_of(4000)})

    def labels(count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"label": torch.randint(10, (count,), generator=generator)}

    return labels


def student_of(part: Part, judge: Judge, seed: int, folder: Path | None = None) -> dict[str, Any]:
    """Train one, and measure it."""
    method, teacher = part.method(), judge.teacher
    torch.manual_seed(seed)
    network = copy.deepcopy(teacher.network).requires_grad_(True)
    student = method.wrapped(network) if hasattr(method, "wrapped") else network
    training = method.training(teacher, student)
    data, began = data_of(part, teacher, seed), time.process_time()
    options = {"steps": part.steps, "batch_size": part.batch_size, "learning_rate": part.learning_rate, "warmup": 50, "ema": EMA}
    with counting(teacher, training) as spent:
        result = fs.fit(
            training.stages, dict(training.modules), data, **options, seed=seed, divergence=None, log_every=max(1, part.steps // 20)
        )
    seconds = time.process_time() - began
    student.load_state_dict(result.averages[EMA]["student"])
    student.eval()
    found: dict[str, Any] = {"seed": seed, "cpu_seconds": round(seconds, 1), COST: spent.evaluations, "calls": {}}
    for n in part.nfe:
        plan = method.plan(teacher, n)
        sampler = method.sampled(student, n) if hasattr(method, "sampled") else student
        samples = sampled(read_as(teacher, sampler), plan, judge.count, STUDENT_SEED)
        row = judge(samples) | {"top_octave_db": judge.top_octave(samples)}
        if all(line.noise is None for line in plan.rows):
            row["path_error"] = judge.path_error(samples)
        found["calls"][str(n)] = row
    found["log"] = (
        [{k: v for k, v in record.items() if "logit" in k} for record in result.log[-4:]] if "adversary" in repr(method) else []
    )
    return found


def pays_off_after(n: int, fd: float, best: dict[int, float], cost: float) -> int | None:
    """Samples after which a student of n calls has saved what its training took, beside the sampler of fewest calls that is as good.

    Args:
        n: calls of the student.
        fd: its distance.
        best: calls -> the least distance without a student.
        cost: network evaluations of the training, a backward pass counted as two.

    Returns:
        None if a sampler of no more calls is as good, or none of those that were tried.
    """
    equal = next((calls for calls in sorted(best) if best[calls] <= fd), None)
    return None if equal is None or equal <= n else round(cost / (equal - n))


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Medians over seeds, and the bars."""
    best = {int(n): row["fd"] for n, row in report.get("baselines", {}).get("calls", {}).items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, part in report["parts"].items():
        for n in part["seeds"][0]["calls"]:
            cells = [seed["calls"][n] for seed in part["seeds"]]
            rows[f"{name}: {n}"] = {
                key: round(statistics.median(cell[key] for cell in cells), 4) for key in cells[0] if key != OLD_PAY_OFF
            }
            costs = [seed[COST] for seed in part["seeds"] if COST in seed]
            if costs and best:
                rows[f"{name}: {n}"]["pays_off_after"] = pays_off_after(
                    int(n), rows[f"{name}: {n}"]["fd"], best, statistics.median(costs)
                )
    floor = report["floor"]["fd"]
    fd = {name: row["fd"] for name, row in rows.items()}
    bars: dict[str, Any] = {}

    def bar(name: str, left: str, right: float | None) -> None:
        if left in rows and right is not None:
            bars[name] = {"value": fd[left], "bar": round(right, 4), "holds": fd[left] <= right}

    bar("DMD2, 1 call: FD <= 1.6 floor", "dmd2: 1", 1.6 * floor)
    bar("DMD2, 1 call: FD <= B_4", "dmd2: 1", best.get(4))
    bar("TDM, 4 calls: FD <= 1.6 floor", "tdm: 4", 1.6 * floor)
    bar("TDM, 4 calls: FD <= B_4", "tdm: 4", best.get(4))
    bar("TDM, 1 call: FD <= B_2", "tdm, 1 call: 1", best.get(2))
    bar("FreeFlow: FD <= 1.5 floor", "freeflow: 1", 1.5 * floor)
    bar("LCM, 1 call: FD <= 0.05 B_1", "lcm: 1", 0.05 * best[1] if 1 in best else None)
    bar("LCM, 1 call: FD <= B_2", "lcm: 1", best.get(2))
    bar("LCM, 2 calls: FD <= 0.3 B_2", "lcm: 2", 0.3 * best[2] if 2 in best else None)
    for name in ("adversary", "adversary, R1", "adversary, controller"):
        part = f"dmd2, {name}: 1"
        bar(f"DMD2, {name}: FD <= 2.5 floor", part, 2.5 * floor)
        if part in rows:
            to_data, teacher = rows[part]["fd_to_data"], report["floor"]["fd_to_data"]
            bars[f"DMD2, {name}: FD to data below the teacher's"] = {"value": to_data, "bar": teacher, "holds": to_data < teacher}
    if "hipa: 1" in rows and "regression on pairs: 1" in rows:
        ours, plain = rows["hipa: 1"], rows["regression on pairs: 1"]
        ratio = round(ours["top_octave_db"] / plain["top_octave_db"], 3)
        bars["HiPA: error of the top octave half of the regression's"] = {"value": ratio, "bar": 0.5, "holds": ratio <= 0.5}
        ratio = round(ours["fd"] / plain["fd"], 3)
        bars["HiPA: FD at most 1.05 of the regression's"] = {"value": ratio, "bar": 1.05, "holds": ratio <= 1.05}
    worse = {
        "DMD2, as many steps of both: FD 3 times as large": ("dmd2, as many steps of both: 1", "dmd2: 1", 3.0),
        "TDM, shared intervals: FD 1.2 times as large": ("tdm, shared intervals: 4", "tdm: 4", 1.2),
        "DMD2, adversary without noise: FD 1.5 times as large": ("dmd2, adversary without noise: 1", "dmd2, adversary: 1", 1.5),
        "FreeFlow, prediction only: FD 1.5 times as large": ("freeflow, prediction only: 1", "freeflow: 1", 1.5),
    }
    for name, (left, right, factor) in worse.items():
        if left in fd and right in fd:
            bars[name] = {"value": round(fd[left] / fd[right], 3), "bar": factor, "holds": fd[left] >= factor * fd[right]}
    if "freeflow, correction only: 1" in rows and "freeflow: 1" in rows:
        ratio = rows["freeflow, correction only: 1"]["path_error"] / rows["freeflow: 1"]["path_error"]
        bars["FreeFlow, correction only: path error 1.5 times as large"] = {
            "value": round(ratio, 3),
            "bar": 1.5,
            "holds": ratio >= 1.5,
        }
    if "freeflow: 1" in rows:
        ratio = rows["freeflow: 1"]["path_error"] / report["euler_path_error"]
        bars["FreeFlow: path error <= 0.5 of one Euler step"] = {"value": round(ratio, 3), "bar": 0.5, "holds": ratio <= 0.5}
    return {"floor": floor, "best without training": best, "medians": rows, "bars": bars}


def main() -> int:
    parser = argparse.ArgumentParser(description="Distilled students beside the best samplers without training.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--parts", default="", help="names, by semicolons; left out: those that are not in the file yet")
    parser.add_argument("--seeds", type=int, default=3, help="of training")
    parser.add_argument("--count", type=int, default=COUNT, help="samples in a set")
    parser.add_argument("--tuning", type=int, default=300_000, help="network evaluations of fewstep.tune")
    parser.add_argument("--steps", type=float, default=1.0, help="factor of the steps of training")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "fewstep_distill", help="folder for the teacher's samples"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(options.out.read_text()) if options.out.exists() else {"parts": {}}
    judge = Judge(distill_teacher.load(), options.cache, options.count)
    report["floor"] = judge(judge.other)
    euler = fs.make_plan("ddim", judge.teacher.schedule, 1, final="zero")
    report["euler_path_error"] = judge.path_error(sampled(judge.teacher, euler, judge.count, STUDENT_SEED))
    wanted = [name.strip() for name in options.parts.split(";") if name.strip()] or ["baselines", *PARTS]
    for name in wanted:
        if name == "baselines":
            if "baselines" not in report or options.parts:
                report["baselines"] = baselines(judge, options.tuning)
                write(report, options, "baselines")
            continue
        part = dataclasses.replace(PARTS[name], steps=max(1, round(options.steps * PARTS[name].steps)))
        try:
            method = repr(part.method())
        except AttributeError as error:
            print(f"{name} is left out: {error}")
            continue
        before = report["parts"].get(name, {})
        told = {"method": method, "steps": part.steps, "batch_size": part.batch_size, "learning_rate": part.learning_rate}
        cells = before["seeds"] if before and all(before[name] == value for name, value in told.items()) else []
        for seed in range(len(cells), options.seeds):
            cells = [*cells, student_of(part, judge, seed)]
            report["parts"][name] = {**told, "seeds": cells}
            write(report, options, name)
            print(name, cells[-1]["calls"], cells[-1]["cpu_seconds"], flush=True)
    print(json.dumps(report["summary"]["bars"] if "summary" in report else report["floor"], indent=1))
    return 0


def write(report: dict[str, Any], options: argparse.Namespace, made: str) -> None:
    """Bring what this process made, a part or the baselines, into the file; the rest is as the file has it now, also in `report`."""

    def merged(now: dict[str, Any]) -> dict[str, Any]:
        now.setdefault("parts", {})
        if made == "baselines":
            now["baselines"] = report["baselines"]
        else:
            now["parts"][made] = report["parts"][made]
        now |= {name: value for name, value in report.items() if name not in ("parts", "baselines", "summary")}
        now |= {"command": "python benchmarks/distill.py", "machine": "one core of a 2-core machine", "count": options.count}
        return now | {"summary": summary(now)}

    report |= write_json(options.out, merged)


if __name__ == "__main__":
    raise SystemExit(main())
