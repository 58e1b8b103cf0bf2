r"""How much does tuning gain? ``python benchmarks/tune.py`` writes ``benchmarks/results/tune.json``.

On exact mixtures (dimension 2, 16 and 64; four noise schedules) and on the two models that come along, with and without guidance of scale
3: the error of the plan that `fewstep.tune` makes, over the *least* error of any untuned setting at the same number of calls. The untuned
settings are those of every peer that can be run (diffusers, azula, k-diffusion) on each of the field's grids, and eight of fewstep's own.
Start, end and the exact target are the same for all; the noise and the labels that are judged on were never used for tuning.

For every cell also: the median over samples, a distance of distributions, what the tuned plan costs in network calls, and how many calls
the best untuned setting needs for the same error. The distance is that to exact samples: of mixtures, sliced Wasserstein to those of other
noise, with the floor of two exact sets; of the two models, whose samples are few, to those of the same noise, so that the draw of the noise
does not count: Frechet's in the features of a classifier for digits, sliced Wasserstein for photos.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peers import Levels, Stepper, steppers
from torch import Tensor
from tqdm import tqdm

import fewstep as fs
from fewstep.tuners.task import UNTUNED, errors_of

RESULTS = Path(__file__).parent / "results" / "tune.json"
CALLS = (4, 5, 6, 8, 10)
MORE_CALLS = (12, 15, 20, 25, 30)
GRIDS = ("auto", "time", "quadratic", "lambda", "karras", "beta")
SCHEDULES: dict[str, fs.schedules.NoiseSchedule] = {
    "VPLinear": fs.schedules.VPLinear(),
    "VPCosine": fs.schedules.VPCosine(),
    "EDM": fs.schedules.EDM(),
    "Flow": fs.schedules.Flow(t_start=0.999),  # alpha = 0, which the straight path has at 1, is infinite noise to many peers
}
DIMENSIONS = (2, 16, 64)
COMPONENTS = 8
GUIDED = 3.0
OTHER_NOISE = 10_000_000
FINALISTS, LEADERS = 5, 10
"""Settings that are measured on all samples; settings of every cell that are measured with more calls as well."""
WITH_MORE = 256
"""Samples of a network that are judged with more calls; of mixtures, all."""


@dataclass(frozen=True)
class Problem:
    """A model, noise and labels to judge on, and the exact samples."""

    name: str
    denoiser: Any
    schedule: fs.schedules.NoiseSchedule
    noise: Tensor
    cond: dict[str, Tensor]
    exact: Tensor
    others: Tensor
    few: int
    with_more: int

    def distance(self, samples: Tensor, rows: slice = slice(None)) -> float:
        """Of the distributions; see above."""
        if self.name.startswith("digits"):
            features = fs.evaluate.digit_features
            return fs.evaluate.Frechet()(features(samples.float()), features(self.exact[rows].float()))
        return sliced(samples, self.exact[rows] if self.name == "photos" else self.others)

    def predict(self, rows: slice) -> Any:
        """As peers call it: by alpha and sigma."""
        cond = {name: value[rows] for name, value in self.cond.items()}

        def call(x: Tensor, alpha: float, sigma: float) -> Tensor:
            t = float(self.schedule.t_of_lam(math.log(alpha / sigma)))
            return self.denoiser(x.to(self.noise.dtype), t, **cond).to(x.dtype)

        return call


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure tuned plans beside every setting of every peer.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--problems", default="", help="parts of names of problems to run, by semicolons; left out: all")
    parser.add_argument("--seed", type=int, default=700, help="of mixtures, noise and tuning")
    parser.add_argument("--checkpoints", type=Path, default=None, help="a folder, from which tuning that was stopped goes on")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers, missing = steppers()
    cells, costs = [], {}
    for problem in problems(options):
        began = time.perf_counter()
        noise, cond = tuning_noise(problem, options.seed)
        kept = options.checkpoints / problem.name if options.checkpoints else None
        tuned = fs.tune(problem.denoiser, nfe=CALLS, noise=noise, cond=cond, seed=options.seed, checkpoint=kept)
        costs[problem.name] = {"date": f"{date.today()}"} | {
            k: tuned.report[k] for k in ("evaluations", "seconds", "effort", "reference_error")
        }
        untuned, names = {}, set()
        for n in tqdm(CALLS + MORE_CALLS, desc=problem.name, unit="cell"):
            untuned[n], order = best_untuned(problem, n, peers, names if n in MORE_CALLS else set())
            names |= set(order[:LEADERS])
        cells += [cell(problem, n, tuned, untuned) for n in CALLS]
        costs[problem.name]["whole_seconds"] = round(time.perf_counter() - began)
        write(options, missing, cells, costs)
        for row in cells[-len(CALLS) :]:
            print(
                f"{row['problem']} {row['calls']}: {row['ratio']:.2f} (median {row['median_ratio']:.2f}), as {row['as_many_calls']} calls"
            )
    print(json.dumps(json.loads(options.out.read_text())["summary"], indent=2))
    return 0


def write(options: argparse.Namespace, missing: list[str], cells: list[dict[str, Any]], costs: dict[str, Any]) -> None:
    """What there is so far, with the problems of an earlier run that were not run again."""
    cells, costs = joined(cells, costs, options.out)
    report = {
        "command": "python benchmarks/tune.py",
        "machine": "one core of a 2-core machine",
        "seed": options.seed,
        "missing": missing,
        "summary": summary(cells),
        "costs": costs,
        "cells": cells,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def joined(cells: list[dict[str, Any]], costs: dict[str, Any], out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """With the problems of an earlier run that were not run again."""
    if not out.exists():
        return cells, costs
    before, new = json.loads(out.read_text()), {row["problem"] for row in cells}
    return [row for row in before["cells"] if row["problem"] not in new] + cells, {**before["costs"], **costs}


def problems(options: argparse.Namespace) -> Iterator[Problem]:
    """One after the other, those whose names contain what was asked for."""
    wanted = options.problems.split(";")
    names = [f"mixture {d}, {kind}" for d in DIMENSIONS for kind in SCHEDULES] + ["digits", "photos"]
    for name in names:
        for scale in (1.0, GUIDED):
            told = name if scale == 1.0 else f"{name}, guidance {scale:g}"
            if name == "photos" and scale != 1.0:
                continue  # it has no conditions
            if any(part in told for part in wanted):
                yield make_problem(told, name, scale, options.seed)


def make_problem(told: str, name: str, scale: float, seed: int) -> Problem:
    if name.startswith("mixture"):
        size, kind = name.removeprefix("mixture ").split(", ")
        denoiser: Any = mixture(int(size), SCHEDULES[kind], seed)
        schedule, shape, count, few, dtype = SCHEDULES[kind], (int(size),), 2048, 128, torch.float64
        cond, null = {"label": torch.arange(2 * count) % COMPONENTS}, -1
        if scale == 1.0:
            cond = {}
    else:
        denoiser = fs.load(name)
        if name == "photos":  # as the mixtures, from where alpha is not 0
            denoiser = fs.Denoiser(denoiser.network, SCHEDULES["Flow"], denoiser.predicts, info=denoiser.info)
        schedule, shape, dtype = denoiser.schedule, denoiser.info.shape, torch.float32
        count, few = (1024, 32) if name == "digits" else (48, 8)
        known = denoiser.info.conditions.get("label")
        cond = {"label": torch.arange(count) % known["classes"]} if known else {}
        null = known["null"] if known else 0
    if scale != 1.0:
        denoiser = fs.guidance.ClassifierFree(denoiser, scale, {"label": null})
    both = 2 * count if name.startswith("mixture") else count
    noise = fs.draw_noise(shape, range(OTHER_NOISE, OTHER_NOISE + both), dtype=dtype) * float(schedule.sigma(schedule.t_start))
    exact = fs.tuners.trace_paths(denoiser, noise, schedule, calls=200, cond=cond).target
    first = {key: value[:count] for key, value in cond.items()}
    with_more = count if both > count else min(count, WITH_MORE)
    return Problem(told, denoiser, schedule, noise[:count], first, exact[:count], exact[count:], few, with_more)


def mixture(size: int, schedule: fs.schedules.NoiseSchedule, seed: int) -> fs.exact.GaussianMixture:
    generator = torch.Generator().manual_seed(seed + size)
    means = torch.randn(COMPONENTS, size, generator=generator, dtype=torch.float64) * (1.0 if size < 8 else 0.6)
    scales = 0.05 * 8.0 ** torch.rand(COMPONENTS, size, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(COMPONENTS, size, size, generator=generator, dtype=torch.float64))[0]
    return fs.exact.GaussianMixture(schedule, means, axes @ torch.diag_embed(scales**2) @ axes.transpose(1, 2))


def tuning_noise(problem: Problem, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise to tune on: other than that which is judged on, and its labels in another order."""
    count = 64
    shape, dtype = tuple(problem.noise.shape[1:]), problem.noise.dtype
    scale = float(problem.schedule.sigma(problem.schedule.t_start))
    generator = torch.Generator().manual_seed(seed)
    cond = {name: value[torch.randint(len(value), (count,), generator=generator)] for name, value in problem.cond.items()}
    return fs.draw_noise(shape, range(count), dtype=dtype) * scale, cond


# ---- what is compared --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def best_untuned(problem: Problem, nfe: int, peers: list[Stepper], names: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The setting of least error, of all or of those named, and all names in the order of their errors.

    The best few on some samples go on to all of them; the least of several errors on the same samples favours the untuned.
    """
    part, whole = slice(problem.few), slice(problem.with_more if nfe in MORE_CALLS else None)
    tried = dict(settings(problem, nfe, peers, part, names))
    order = sorted(tried, key=lambda name: tried[name][0])
    if problem.few < len(problem.noise):
        tried = dict(settings(problem, nfe, peers, whole, set(order[:FINALISTS])))
    best = min(tried, key=lambda name: tried[name][0])
    return {"name": best, "rms": tried[best][0], "median": tried[best][1], "distance": tried[best][2]}, order


def settings(problem: Problem, nfe: int, peers: list[Stepper], rows: slice, names: set[str]) -> Iterator[tuple[str, Any]]:
    """Name and figures of every setting, or of those named."""
    noise = problem.noise[rows]
    cond = {name: value[rows] for name, value in problem.cond.items()}
    for grid in GRIDS:
        for name, solver in UNTUNED.items():
            told = f"fewstep {name}, {grid}"
            if not names or told in names:
                samples = fs.sample(problem.denoiser, noise, solver.plan(problem.schedule, nfe, grid), cond=cond, check=False)
                yield told, figures(problem, samples, rows)
        levels = Levels(problem.schedule, fs.grids.make_grid(grid, problem.schedule, nfe))
        for peer in peers:
            told = f"{peer.library} {peer.solver}, {grid}"
            if nfe % peer.stages == 0 and (not names or told in names):
                yield told, figures(problem, peer.run(problem.predict(rows), levels, noise.double()), rows)


def figures(problem: Problem, samples: Tensor, rows: slice = slice(None)) -> tuple[float, float, float]:
    """Root mean square and median of the errors, and the distance of the distributions."""
    errors = errors_of(samples, problem.exact[rows])
    if not math.isfinite(errors.rms):
        return math.inf, math.inf, math.inf
    return errors.rms, errors.median, problem.distance(samples, rows)


def sliced(first: Tensor, second: Tensor) -> float:
    """Sliced Wasserstein distance along 128 fixed directions."""
    count = min(len(first), len(second))
    a, b = (values[:count].double().flatten(1) for values in (first, second))
    directions = torch.randn(a.shape[1], 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean().sqrt())


def cell(problem: Problem, nfe: int, tuned: fs.tuners.Tuned, untuned: dict[int, dict[str, Any]]) -> dict[str, Any]:
    samples = fs.sample(problem.denoiser, problem.noise, tuned.plans[nfe], cond=problem.cond)
    rms, median, distance = figures(problem, samples)
    best, some = untuned[nfe], slice(problem.with_more)
    fewer = errors_of(samples[some], problem.exact[some]).rms
    enough = [n for n, other in sorted(untuned.items()) if other["rms"] <= (fewer if n in MORE_CALLS else rms)]
    return {
        "problem": problem.name,
        "calls": nfe,
        "tuned": {"by": tuned.report["plans"][str(nfe)]["best"], "rms": rms, "median": median, "distance": distance},
        "untuned": best,
        "exact_distance": problem.distance(problem.exact),
        "ratio": rms / best["rms"],
        "median_ratio": median / best["median"],
        "as_many_calls": enough[0] if enough else f"over {max(untuned)}",
    }


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means and worst cells."""
    worst = max(cells, key=lambda row: row["ratio"])
    by_problem: dict[str, list[float]] = {}
    for row in cells:
        by_problem.setdefault(row["problem"], []).append(row["ratio"])
    return {
        "geometric_mean": geometric([row["ratio"] for row in cells]),
        "geometric_mean_of_medians": geometric([row["median_ratio"] for row in cells]),
        "worst": worst["ratio"],
        "worst_cell": f"{worst['problem']}, {worst['calls']} calls",
        "cells_above_0.8": sum(row["ratio"] > 0.8 for row in cells),
        "by_calls": {str(n): geometric([row["ratio"] for row in cells if row["calls"] == n]) for n in CALLS},
        "by_problem": {name: geometric(values) for name, values in by_problem.items()},
        "further_from_the_data": sum(row["tuned"]["distance"] > row["untuned"]["distance"] * 1.05 for row in cells),
    }


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


if __name__ == "__main__":
    raise SystemExit(main())
