r"""Does every solver converge at the order it claims? ``python benchmarks/orders.py`` writes ``benchmarks/results/orders.json``.

Ours and every peer's that can be run, on the same levels and the same exact Gaussian mixture in double precision. The root mean square
distance to the exact solution is measured for N = 20, 40, ... 320 calls, uniform in lambda, on two intervals under VP-linear:

- *inside*, t from 0.95 to 0.05: the data prediction already changes in the first step, so a poor first step shows;
- *from noise*, t from 1 to 0.01: at the start it hardly changes, which is kind to multistep methods with a short first memory.

The observed order is log2 of the ratio of the errors at the last two N whose error lies above the rounding of that implementation
(1e-12; diffusers' classes work in single precision whatever they are given, so of theirs the errors count until they stop falling).

A stochastic solver follows the reverse SDE, so on the mixture it has no one solution to converge to. Its drift is measured where the data
prediction is sin(lambda) whatever the state: the mean of the SDE is then known in closed form.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import Levels, Stepper, steppers
from torch import Tensor
from tqdm import tqdm

import fewstep as fs

RESULTS = Path(__file__).parent / "results" / "orders.json"
CALLS = (20, 40, 80, 160, 320)
INTERVALS = {"inside": (0.95, 0.05), "from noise": (1.0, 0.01)}
MEANS = torch.tensor([[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2]], dtype=torch.float64)
VARIANCES = torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the order of convergence of every solver, ours and others'.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--official", type=Path, help="a folder with dpm-solver/, UniPC/ and SA-Solver/, the papers' repositories")
    parser.add_argument("--count", type=int, default=64, help="starts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    others, missing = steppers(options.official)
    problems = {name: Problem.make(ends, options.count) for name, ends in INTERVALS.items()}
    rows = [our_row(name, problems) for name in tqdm(fs.solver_names(), desc="ours", unit="solver")]
    rows += [other(stepper, problems) for stepper in tqdm(others, desc="peers", unit="solver")]
    report = {
        "command": "python benchmarks/orders.py",
        "machine": "one core of a 2-core machine",
        "seed": 0,
        "starts": options.count,
        "calls": list(CALLS),
        "missing": missing,
        "orders": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        seen = "  ".join(f"{name} {_words(order)}" for name, order in row["observed"].items())
        print(f"{row['library']:12} {row['solver']:44} claims {row['claim']}  {seen}")
    wrong = [row["solver"] for row in rows if row["library"] == "fewstep" and not row["holds"]]
    print("missing:", "; ".join(missing) or "none")
    print("ours that miss their claim:", ", ".join(wrong) or "none")
    return int(bool(wrong))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Starts and their exact solutions."""

    denoiser: Any
    noise: Tensor
    exact: Tensor

    @classmethod
    def make(cls, ends: tuple[float, float], count: int) -> Problem:
        schedule = fs.schedules.VPLinear(t_start=ends[0], t_end=ends[1])
        denoiser = fs.exact.GaussianMixture(schedule, MEANS, VARIANCES[:, None].expand(3, 2), WEIGHTS)
        noise = fs.draw_noise((2,), range(count), dtype=torch.float64) * float(schedule.sigma(schedule.t_start))
        return cls(denoiser, noise, fs.reference(denoiser, noise, schedule, tol=1e-12))

    def predict(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return self.denoiser(x, float(self.denoiser.schedule.t_of_lam(math.log(alpha / sigma))))

    def error(self, samples: Tensor) -> float:
        return float((samples - self.exact).square().mean().sqrt())


def our_row(name: str, problems: dict[str, Problem]) -> dict[str, Any]:
    claimed = fs.solvers.make_solver(name).claimed_order
    if fs.make_plan(name, fs.schedules.VPLinear(), 4).stochastic:
        row = drift(name, claimed)
    else:

        def run(problem: Problem, calls: int) -> Tensor:
            plan = fs.make_plan(name, problem.denoiser.schedule, calls, grid="lambda")
            return fs.sample(problem.denoiser, problem.noise, plan)

        row = measure("fewstep", name, run, claimed, problems)
    seen = [order for order in row["observed"].values() if order is not None]
    return {**row, "holds": min(seen) > claimed - 0.15}


def drift(name: str, claimed: int) -> dict[str, Any]:
    """Order of the mean of a stochastic solver, with D = sin(lambda)."""
    schedule = fs.schedules.VPLinear(t_start=0.95, t_end=0.05)
    a, b = (float(schedule.lam(t)) for t in (schedule.t_start, schedule.t_end))
    rate = 1.0 + float(getattr(fs.solvers.make_solver(name), "eta", 0.0))

    def antiderivative(lam: float) -> float:
        return rate * (rate * math.sin(lam) - math.cos(lam)) / (rate**2 + 1.0)

    start = torch.ones(1, 1, dtype=torch.float64)
    decay = float(schedule.sigma(schedule.t_end) / schedule.sigma(schedule.t_start)) * math.exp(-(rate - 1.0) * (b - a))
    mean = decay + float(schedule.alpha(schedule.t_end)) * (antiderivative(b) - math.exp(-rate * (b - a)) * antiderivative(a))
    errors = []
    for calls in CALLS:
        plan = fs.make_plan(name, schedule, calls, grid="lambda")
        rows = tuple(dataclasses.replace(row, noise=None) for row in plan.rows)
        end = fs.sample(
            lambda x, t: torch.full_like(x, math.sin(float(schedule.lam(t)))), start, fs.Plan(schedule, plan.grid, rows)
        )
        errors.append(abs(float(end) - mean))
    found = {"drift": slope(errors)}
    return {"library": "fewstep", "solver": name, "claim": claimed, "observed": found, "errors": {"drift": errors}}


def other(stepper: Stepper, problems: dict[str, Problem]) -> dict[str, Any]:
    def run(problem: Problem, calls: int) -> Tensor:
        schedule = problem.denoiser.schedule
        times = fs.grids.make_grid("lambda", schedule, calls)
        return stepper.run(problem.predict, Levels(schedule, times), problem.noise)

    return measure(stepper.library, stepper.solver, run, stepper.claim, problems)


def measure(
    library: str, solver: str, run: Callable[[Problem, int], Tensor], claimed: int, problems: dict[str, Problem]
) -> dict[str, Any]:
    errors: dict[str, list[float | None]] = {}
    observed: dict[str, float | None] = {}
    for name, problem in problems.items():
        found = [problem.error(run(problem, calls)) for calls in CALLS]
        errors[name] = [error if math.isfinite(error) else None for error in found]
        observed[name] = slope(found, single=library == "diffusers")
    return {"library": library, "solver": solver, "claim": claimed, "observed": observed, "errors": errors}


def slope(errors: list[float], *, single: bool = False) -> float | None:
    """log2 of the ratio of the last two errors above the rounding."""
    usable = [error for error in errors if math.isfinite(error) and error > 3e-11]
    while single and len(usable) > 2 and usable[-1] > usable[-2] / 1.6:
        usable.pop()
    return float(np.log2(usable[-2] / usable[-1])) if len(usable) > 1 else None


def _words(order: float | None) -> str:
    return "-" if order is None else f"{order:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
