r"""How good is "auto", the solver and grid of those who choose none? ``python benchmarks/auto.py`` writes ``benchmarks/results/auto.json``.

Every peer that can be run (diffusers, azula, k-diffusion) on every one of the field's grids, and ours by ``make_plan("auto", schedule,
nfe)``; all start from the same noise, end at the same time, make the same number of calls, and are compared with the exact solution there.
A cell is a problem and a number of calls; its figure is our error over the *least* error of any peer's setting in that cell, which no one
could have known beforehand. The best single setting, the same in all cells, is reported beside it, and so are the peers' defaults.

The problems are the two models that come along, and mixtures that were drawn for this benchmark alone: the constants of "auto" were fitted
on others, and on few samples of the two models.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from peers import Levels, Stepper, steppers
from torch import Tensor
from tqdm import tqdm

import fewstep as fs

RESULTS = Path(__file__).parent / "results" / "auto.json"
CALLS = {"mixture": (5, 6, 8, 10, 12, 15, 20), "model": (5, 6, 8, 10, 15, 20)}
GRIDS = ("time", "quadratic", "lambda", "karras", "beta")
SCHEDULES: dict[str, fs.schedules.NoiseSchedule] = {
    "VPLinear": fs.schedules.VPLinear(),
    "VPCosine": fs.schedules.VPCosine(),
    "EDM": fs.schedules.EDM(),
    "Flow": fs.schedules.Flow(t_start=0.999),  # alpha = 0, which the straight path has at 1, is infinite noise to many peers
}
MIXTURES = {"few wide": (3, 2, 1.0, 0.3, 0.5), "many": (12, 8, 0.6, 0.1, 0.5), "high-dimensional": (10, 48, 0.5, 0.03, 0.6)}
"""Components, dimensions, spread of the means, least and largest standard deviation."""


@dataclasses.dataclass(frozen=True)
class Problem:
    name: str
    kind: str
    denoiser: Any
    schedule: fs.schedules.NoiseSchedule
    noise: Tensor
    cond: dict[str, Tensor]
    exact: Tensor

    def predict(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        t = float(self.schedule.t_of_lam(math.log(alpha / sigma)))
        return self.denoiser(x.to(self.noise.dtype), t, **self.cond).to(x.dtype)

    def error(self, samples: Tensor) -> float:
        return float((samples - self.exact).double().square().mean().sqrt())


def main() -> int:
    parser = argparse.ArgumentParser(description='Measure "auto" beside every setting of every peer.')
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--seed", type=int, default=500, help="of the first sample and of the mixtures")
    parser.add_argument("--count", type=int, default=16, help="samples of a model; of a mixture four times as many")
    parser.add_argument("--models", default="digits,photos", help="models, separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peers, missing = steppers()
    cells: list[dict[str, Any]] = []
    for problem in problems(options):
        cells += measure(problem, peers)
    report = {
        "command": "python benchmarks/auto.py",
        "machine": "one core of a 2-core machine",
        "seed": options.seed,
        "missing": missing,
        "summary": summary(cells),
        "cells": cells,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=2))
    return 0


def problems(options: argparse.Namespace) -> Any:
    for number, (name, (count, size, spread, low, high)) in enumerate(MIXTURES.items()):
        generator = torch.Generator().manual_seed(options.seed + number)
        means = torch.randn(count, size, generator=generator, dtype=torch.float64) * spread
        scales = low * (high / low) ** torch.rand(count, size, generator=generator, dtype=torch.float64)
        axes = torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64))[0]
        covariances = axes @ torch.diag_embed(scales**2) @ axes.transpose(1, 2)
        for kind, schedule in SCHEDULES.items():
            denoiser = fs.exact.GaussianMixture(schedule, means, covariances)
            noise = fs.draw_noise((size,), range(options.seed, options.seed + 4 * options.count), dtype=torch.float64)
            noise = noise * float(schedule.sigma(schedule.t_start))
            exact = fs.reference(denoiser, noise, schedule, tol=1e-6)
            yield Problem(f"{name} {kind}", "mixture", denoiser, schedule, noise, {}, exact)
    for name in filter(None, options.models.split(",")):
        network = fs.load(name)
        schedule = network.schedule
        if isinstance(schedule, fs.schedules.Flow):
            schedule = dataclasses.replace(schedule, t_start=0.999)
        noise = fs.draw_noise(network.info.shape, range(options.seed, options.seed + options.count))
        noise = noise * float(schedule.sigma(schedule.t_start))
        cond = {"label": torch.arange(options.count) % 10} if network.info.conditions else {}
        exact = fs.reference(network, noise, schedule, tol=5e-4, cond=cond)
        yield Problem(name, "model", network, schedule, noise, cond, exact)


def measure(problem: Problem, peers: list[Stepper]) -> list[dict[str, Any]]:
    cells = []
    for calls in tqdm(CALLS[problem.kind], desc=problem.name, unit="cell"):
        plan = fs.make_plan("auto", problem.schedule, calls)
        ours = problem.error(fs.sample(problem.denoiser, problem.noise, plan, cond=problem.cond))
        errors = {}
        for grid in GRIDS:
            levels = Levels(problem.schedule, fs.grids.make_grid(grid, problem.schedule, calls))
            for peer in peers:
                if calls % peer.stages:
                    continue
                with torch.no_grad():
                    error = problem.error(peer.run(problem.predict, levels, problem.noise.double()))
                errors[f"{peer.library} {peer.solver} | {grid}"] = error if math.isfinite(error) else 1e9
        best = min(errors, key=lambda name: errors[name])
        cells.append(
            {"problem": problem.name, "calls": calls, "auto": ours, "best": best, "ratio": ours / errors[best], "peers": errors}
        )
    return cells


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means and worst cells."""
    ratios = defaultdict(list)
    for cell in cells:
        least = cell["peers"][cell["best"]]
        ratios["auto"].append(cell["ratio"])
        for name, error in cell["peers"].items():
            ratios[name].append(error / least)
    whole = {name: values for name, values in ratios.items() if len(values) == len(cells)}
    means = {name: _geometric(values) for name, values in whole.items()}
    fixed = sorted((name for name in means if name != "auto"), key=lambda name: means[name])[:5]
    by_problem = defaultdict(list)
    for cell in cells:
        by_problem[cell["problem"]].append(cell["ratio"])
    worst = max(cells, key=lambda cell: cell["ratio"])
    return {
        "auto": {
            "geometric_mean": means["auto"],
            "worst": worst["ratio"],
            "worst_cell": f"{worst['problem']}, {worst['calls']} calls",
        },
        "best_fixed_settings": {name: {"geometric_mean": means[name], "worst": max(whole[name])} for name in fixed},
        "auto_by_problem": {name: _geometric(values) for name, values in by_problem.items()},
    }


def _geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


if __name__ == "__main__":
    raise SystemExit(main())
