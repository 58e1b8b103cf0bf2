r"""Does every solver converge at the order it claims? ``python benchmarks/orders.py`` writes ``benchmarks/results/orders.json``.

Ours and every peer's that can be run, on the same levels and the same exact Gaussian mixture in double precision. The root mean square
distance to the exact solution is measured for N = 24, 48, ... 384 calls, uniform in lambda, on two intervals under VP-linear. All N divide
by 2, 3 and 4: a method of several calls a step then ends every run with the same kind of step, and its order is not mixed with a change of
that step.

- *midway*, t from 0.5 to 0.05: the data prediction already changes in the first step, so a poor first step shows;
- *from noise*, t from 1 to 0.01: at the start it hardly changes, which is kind to multistep methods with a short first memory.

The observed order is the slope of log error against log calls over the last two doublings whose errors lie above the rounding of that
implementation (3e-11; diffusers' classes work in single precision whatever they are given, so of theirs the errors count until they stop
falling). `fewstep.adaptive` chooses its own steps, so its tolerance falls instead, and the slope is against the calls it took.

A stochastic solver follows the reverse SDE, so on the mixture it has no one solution to converge to. Its drift is measured where the data
prediction is sin(lambda) whatever the state: the mean of the SDE is then known in closed form.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import Levels, Stepper, steppers
from torch import Tensor
from tqdm import tqdm

import fewstep as fs
from fewstep.recipes import Recipe
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver
from fewstep.statistics import ModelStatistics

RESULTS = Path(__file__).parent / "results" / "orders.json"
CALLS = (24, 48, 96, 192, 384)
INTERVALS = {"midway": (0.5, 0.05), "from noise": (1.0, 0.01)}
FOR_CONSISTENCY_MODELS = ("lcm", "tcd")
"""Solvers that draw the noise anew, and so follow neither the ODE nor the SDE."""
LOOSEST = 1e-2
"""First tolerance of the adaptive solvers; they fall so that the calls double."""
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
    rows = [our_row(name, make, problems) for name, make in tqdm(our_rows().items(), desc="ours", unit="solver")]
    rows += [adaptive_row(order, problems) for order in (2, 3)]
    rows += [other(stepper, problems) for stepper in tqdm(others, desc="peers", unit="solver")]
    report = {
        "command": "python benchmarks/orders.py" + (" --official FOLDER" if options.official else ""),
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


Make = Callable[[Problem, int], Solver]
"""The solver for a problem and a number of calls."""


def our_rows() -> dict[str, Make]:
    """All named solvers, and those that need a recipe, ratios or statistics: of the last, the Gaussian ones in closed form."""

    def fixed(solver: Solver) -> Make:
        return lambda problem, calls: solver

    def v3(**options: Any) -> Make:
        return lambda problem, calls: fs.solvers.DPMSolverV3(gaussian_statistics(problem.denoiser.schedule), **options)

    def compensated(ratio: float) -> Make:
        return lambda problem, calls: fs.solvers.Compensated(fs.solvers.UniPC(), (1.0, 1.0, *[ratio] * (calls - 2)))

    def mixed(make: Callable[[int], Recipe]) -> Make:
        return lambda problem, calls: fs.solvers.Mixed(make(calls))

    corrected = {"corrector": 1, "relaxation": "bh1", "corrector_relaxation": "bh1"}
    return {
        **{name: fixed(fs.solvers.make_solver(name)) for name in fs.solver_names() if name not in FOR_CONSISTENCY_MODELS},
        "DEIS, order 4": fixed(fs.solvers.DEIS(order=4)),
        **{f"IPNDM, order {order}": fixed(fs.solvers.IPNDM(order=order)) for order in (1, 2, 3)},
        "UniPC, lower_order_final": fixed(fs.solvers.UniPC(lower_order_final=True)),
        "DPMSolverV3": v3(),
        "DPMSolverV3, order 2, no corrector": v3(order=2, corrector="none", lower_order_final=False),
        "DPMSolverV3, raised, no lowered end": v3(corrector="raised", lower_order_final=False),
        "Compensated(UniPC), ratios 1": compensated(1.0),
        "Compensated(UniPC), ratios 0.9": compensated(0.9),
        "Mixed, recipe of 2M": mixed(lambda calls: Recipe.multistep(calls, order=2, relaxation="bh2")),
        "Mixed, recipe of UniPC": mixed(lambda calls: Recipe.multistep(calls, order=3, **corrected)),
        "Mixed, recipe of 3S": mixed(lambda calls: Recipe.singlestep(calls, order=3)),
        "Mixed, data and noise in turn": mixed(alternating),
    }


def alternating(calls: int) -> Recipe:
    """Second-order multistep whose steps predict data and noise in turn."""
    data, noise = (Recipe.multistep(calls, order=2, prediction=prediction) for prediction in ("data", "noise"))
    return Recipe(tuple((data, noise)[i % 2].moves[i] for i in range(calls)))


def gaussian_statistics(schedule: NoiseSchedule) -> ModelStatistics:
    """Of the Gaussian with the mixture's mean and variances."""
    weights, means = WEIGHTS.numpy()[:, None], MEANS.numpy()
    mean = (weights * means).sum(0)
    variance = (weights * (means**2 + VARIANCES.numpy()[:, None])).sum(0) - mean**2
    return ModelStatistics.gaussian(schedule, mean, variance)


def our_row(name: str, make: Make, problems: dict[str, Problem]) -> dict[str, Any]:
    example = next(iter(problems.values()))
    claimed = make(example, CALLS[0]).claimed_order
    if make(example, CALLS[0]).plan(example.denoiser.schedule, CALLS[0]).stochastic:
        row = drift(name, claimed)
    else:

        def run(problem: Problem, calls: int) -> Tensor:
            plan = make(problem, calls).plan(problem.denoiser.schedule, calls, "lambda")
            return fs.sample(problem.denoiser, problem.noise, plan)

        row = measure("fewstep", name, run, claimed, problems)
    return {**row, "holds": _holds(row)}


def adaptive_row(order: int, problems: dict[str, Problem]) -> dict[str, Any]:
    """`fewstep.adaptive` at falling tolerances: the error of a step is of its order, so 2^-order of one doubles the calls."""
    calls, errors = ({name: [] for name in problems} for _ in range(2))
    for name, problem in problems.items():
        for k in range(len(CALLS)):
            options = {"order": order, "rtol": 0.0, "atol": LOOSEST * 2.0 ** (-order * (k + 2))}
            run = fs.adaptive(problem.denoiser, problem.noise, problem.denoiser.schedule, **options)
            calls[name].append(float(run.calls.mean()))
            errors[name].append(problem.error(run.samples))
    observed = {name: slope(errors[name], calls[name]) for name in problems}
    row = {"library": "fewstep", "solver": f"adaptive, order {order}", "claim": order, "observed": observed, "errors": errors}
    return {**row, "calls": calls, "holds": _holds(row)}


def _holds(row: dict[str, Any]) -> bool:
    """Whether no measured order falls short of the claim."""
    return min(order for order in row["observed"].values() if order is not None) > row["claim"] - 0.15


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


def slope(errors: list[float], calls: Sequence[float] = CALLS, *, single: bool = False) -> float | None:
    """Slope of log error against log calls over the last three errors above the rounding, or the last two if there are no more."""
    usable = [(n, error) for n, error in zip(calls, errors, strict=True) if math.isfinite(error) and error > 3e-11]
    while single and len(usable) > 2 and usable[-1][1] > usable[-2][1] / 1.6:
        usable.pop()
    if len(usable) < 2:
        return None
    n, error = np.log(np.array(usable[-3:])).T
    return -float(np.polyfit(n, error, 1)[0])


def _words(order: float | None) -> str:
    return "-" if order is None else f"{order:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
