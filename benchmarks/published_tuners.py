"""Do published tuners gain what they should?

``python benchmarks/published_tuners.py`` writes ``benchmarks/results/published_tuners.json``. Two problems: a mixture of three Gaussians in
the plane (VP-linear, to t = 0.01), and the shipped network of digits with its labels, also under guidance. Errors are distances from the
exact samples, on noise that nothing was computed from, over those of the peers:

- DPM-Solver-v3 with statistics of the model; peer: DPM-Solver++ 2M on the same grid. The bar: 0.75 at 4 to 8 calls.
- UniPC with compensation ratios; peer: UniPC without. The bar: 0.75 at 5 and 6 calls.
- Times searched for DPM-Solver++ 2M in 200 evaluations; peer: the best of the grids time, lambda and karras. The bar: 0.7.
- Recipes searched in 300 evaluations on few noises; peer: the best of published solvers and grids. The bar: 0.5.

Beside them `fewstep.tuners.Learned` after each of its stages, on as few noises as the recipes, with the same peers: what it
gains, and for how many network evaluations.

Where a peer is the best of several, it is the best in that figure, on the noise judged on. ``benchmarks/tune.py`` compares with more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep.solvers import Compensated, DPMSolverPP, DPMSolverV3, UniPC
from fewstep.statistics import ModelStatistics
from fewstep.tuners import Effort, Learned, compensation, model_statistics, trace_paths
from fewstep.tuners.draws import Draws
from fewstep.tuners.preparation import prepare
from fewstep.tuners.search import search_recipe
from fewstep.tuners.task import UNTUNED, Counted, Task, errors_of
from fewstep.tuners.timesteps import search_times

RESULTS = Path(__file__).parent / "results" / "published_tuners.json"
SCHEDULE = fs.schedules.VPLinear(t_end=1e-2)
CALLS, SEARCHED_CALLS = (4, 5, 6, 8, 10), 5
SAMPLES, PATHS, OTHER_NOISE = 512, 128, 9000
FEW_SAMPLES, FEW_PATHS, FEW_NODES, GUIDED = 96, 48, 60, 3.0
"""With a network."""
TIMES_PATHS, RECIPE_PATHS, POOL = 384, 64, 4
SEEDS = 3
PUBLISHED = {name: UNTUNED[name] for name in ("dpmpp_2m", "dpmpp_3m", "unipc", "deis", "ipndm_3")}
Found = Iterator[tuple[dict[str, Any], fs.Plan, list[fs.Plan]]]


@dataclass(frozen=True)
class Problem:
    """A model, noise to judge on, and the exact samples of it.

    Attributes:
        name: of the model and its guidance.
        denoiser: counts.
        noise: ``"batch *shape"``, which nothing is computed from.
        cond: its conditions.
        exact: its samples.
    """

    name: str
    denoiser: Counted
    noise: Tensor
    cond: dict[str, Tensor]
    exact: Tensor

    def task(self, paths: int, pool: int, seed: int) -> Task:
        """Exact paths of other noise, which is chosen among `pool` times as much."""
        rows = {name: value[:paths] for name, value in self.cond.items()}
        given = drawn(tuple(self.noise.shape[1:]), min(paths, len(self.noise)), 1000 * seed, self.noise.dtype)
        draw = Draws(self.denoiser, given, rows, seed)
        effort = Effort(trajectories=paths, held_out=2, pool=pool)
        return prepare(self.denoiser, draw, effort, final="t_end", seed=seed)

    def row(self, told: dict[str, Any], plan: fs.Plan, peers: list[fs.Plan]) -> dict[str, Any]:
        """What a plan gains over the best of others."""
        mine, *others = (
            errors_of(fs.sample(self.denoiser, self.noise, each, cond=self.cond, check=False), self.exact)
            for each in (plan, *peers)
        )
        row = {"problem": self.name, **told, "error": mine.rms, "untuned": min(other.rms for other in others)}
        row |= {"median": mine.median, "untuned_median": min(other.median for other in others)}
        return {**row, "ratio": row["error"] / row["untuned"], "median_ratio": row["median"] / row["untuned_median"]}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what published tuners gain, on a mixture and on a small network.")
    parser.add_argument("--problems", default="mixture,digits,learned", help="some of them")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="where the JSON goes; rows of problems that are not run again stay"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise that is tuned on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(options.out.read_text()) if options.out.exists() else {"results": [], "seconds": {}}
    rows, seconds = [], {}
    for name in options.problems.split(","):
        began = time.perf_counter()
        for problem, found in {"mixture": on_mixture, "digits": on_digits, "learned": learned_on_both}[name](options.seed):
            rows.append(problem.row(*found))
            print(
                "{problem:20} {tuner:38} {grid:10} {calls:3} calls  {error:.4f}  ratio {ratio:.2f}, of medians {median_ratio:.2f}, "
                "{evaluations} evaluations".format(**rows[-1]),
                flush=True,
            )
        seconds[name] = round(time.perf_counter() - began, 1)
    kept = [row for row in before["results"] if row.get("problem", "").split(",")[0] not in seconds and "problem" in row]
    told = {"command": "python benchmarks/published_tuners.py", "machine": "one core of a 2-core machine", "seed": options.seed}
    told |= {"seconds": {**before["seconds"], **seconds} if isinstance(before["seconds"], dict) else seconds}
    options.out.write_text(json.dumps({**told, "results": kept + rows}, indent=1) + "\n")
    return 0


# ---- the problems ------------------------------------------------------------------------------------------------------------------


def on_mixture(seed: int) -> Iterator[tuple[Problem, Any]]:
    problem = mixture_problem("mixture")
    mixture = problem.denoiser
    stats = model_statistics(mixture, noise=drawn((2,), SAMPLES, seed), nodes=240)
    yield from ((problem, found) for found in statistics_plans(mixture, stats, CALLS))
    paths = trace_paths(mixture, drawn((2,), PATHS, seed), SCHEDULE, calls=128)
    yield from ((problem, found) for found in compensation_plans(mixture, paths, CALLS, ("brent", "gradient")))
    for k in range(seed, seed + SEEDS):
        yield from ((problem, found) for found in times_plans(problem.task(TIMES_PATHS, POOL, k), k))
    for pool in (1, POOL):
        for k in range(seed, seed + SEEDS):
            yield from ((problem, found) for found in recipe_plans(problem.task(RECIPE_PATHS, pool, k), k, pool))


def learned_on_both(seed: int) -> Iterator[tuple[Problem, Any]]:
    problem = mixture_problem("learned, mixture")
    for k in range(seed, seed + SEEDS):
        yield from ((problem, found) for found in learned_plans(problem.task(RECIPE_PATHS, POOL, k), k))
    problem = network_problem("learned, digits", fs.load("digits"))
    yield from ((problem, found) for found in learned_plans(problem.task(FEW_PATHS, POOL, seed), seed))


def on_digits(seed: int) -> Iterator[tuple[Problem, Any]]:
    model = fs.load("digits")
    problem = network_problem("digits", model)
    task = problem.task(FEW_PATHS, 1, seed)
    stats = model_statistics(problem.denoiser, paths=task.fit, nodes=FEW_NODES)
    yield from ((problem, found) for found in statistics_plans(problem.denoiser, stats, (SEARCHED_CALLS,)))
    yield from ((problem, found) for found in compensation_plans(problem.denoiser, task.fit, (SEARCHED_CALLS,), ("brent",)))
    few = replace(task, fit=task.fit.take(slice(FEW_PATHS // 2)), seed=seed, kept={})
    yield from ((problem, found) for found in times_plans(few, seed))
    yield from ((problem, found) for found in recipe_plans(task, seed, 1))
    guided = fs.guidance.ClassifierFree(model, GUIDED, {"label": model.info.conditions["label"]["null"]})
    problem = network_problem(f"digits, guidance {GUIDED:g}", guided)
    task = problem.task(FEW_PATHS, 1, seed)
    yield from ((problem, found) for found in compensation_plans(problem.denoiser, task.fit, (SEARCHED_CALLS,), ("brent",)))


def mixture_problem(name: str) -> Problem:
    mixture, noise = Counted(three_clusters(), SAMPLES), drawn((2,), SAMPLES, OTHER_NOISE)
    return Problem(name, mixture, noise, {}, fs.reference(mixture, noise, SCHEDULE, tol=1e-6).plain())


def network_problem(name: str, denoiser: Any) -> Problem:
    noise, cond = drawn((1, 8, 8), FEW_SAMPLES, OTHER_NOISE, torch.float32), {"label": torch.arange(FEW_SAMPLES) % 10}
    counted = Counted(denoiser, 256)
    return Problem(name, counted, noise, cond, trace_paths(counted, noise, counted.schedule, calls=64, cond=cond).target)


def three_clusters() -> fs.exact.GaussianMixture:
    return fs.exact.GaussianMixture(SCHEDULE, [[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2]], [0.1, 0.2, 0.15], [0.3, 0.5, 0.2])


def drawn(shape: tuple[int, ...], count: int, first: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return fs.draw_noise(shape, range(first, first + count), dtype=dtype)


# ---- the tuners: what each makes, and the plans it is compared with ------------------------------------------------------------------


def statistics_plans(denoiser: Counted, stats: ModelStatistics, calls: tuple[int, ...]) -> Found:
    """Plans of DPM-Solver-v3, and of 2M on the same grid."""
    solvers = {
        "v3, order 3, as in the readme": DPMSolverV3(stats),
        "v3, order 3, pseudo": DPMSolverV3(stats, pseudo=True, corrector="same", lower_order_final=False),
        "v3, order 3, no corrector": DPMSolverV3(stats, corrector="none"),
        "v3, order 2, corrector raised": DPMSolverV3(stats, order=2, corrector="raised"),
    }
    for name, solver in solvers.items():
        for grid in ("lambda", "quadratic"):
            for nfe in calls:
                told = {"tuner": name, "grid": grid, "calls": nfe, "evaluations": stats.provenance["evaluations"]}
                yield told, solver.plan(denoiser.schedule, nfe, grid), [DPMSolverPP(order=2).plan(denoiser.schedule, nfe, grid)]


def compensation_plans(denoiser: Counted, paths: fs.tuners.Paths, calls: tuple[int, ...], methods: tuple[str, ...]) -> Found:
    """Plans of UniPC with ratios, and without."""
    schedule = denoiser.schedule
    for method in methods:
        for name, solver in {"UniPC-3": UniPC(3), "UniPC-3, lower final": UniPC(3, lower_order_final=True)}.items():
            for nfe in calls:
                before = denoiser.evaluations
                ratios = compensation(denoiser, solver, paths=paths, nfe=nfe, method=method)
                told = {"tuner": f"{name}, ratios by {method}", "grid": "time", "calls": nfe}
                told["evaluations"] = denoiser.evaluations - before
                yield told, Compensated(solver, ratios).plan(schedule, nfe, "time"), [solver.plan(schedule, nfe, "time")]


def times_plans(task: Task, seed: int) -> Found:
    """Plans of 2M with searched times, and on three grids."""
    solver, schedule = DPMSolverPP(order=2), task.schedule
    peers = [solver.plan(schedule, SEARCHED_CALLS, grid) for grid in ("time", "lambda", "karras")]
    for method in ("evolution", "continuous"):
        before = task.denoiser.evaluations
        found = search_times(task, SEARCHED_CALLS, solver, method=method, evaluations=200, seed=seed)
        told = {
            "tuner": f"2M, times by {method}",
            "grid": "searched",
            "calls": SEARCHED_CALLS,
            "seed": seed,
            "noises": task.fit.count,
        }
        told["evaluations"] = task.denoiser.evaluations - before
        yield told, solver.plan(schedule, grid=found.times), peers


def recipe_plans(task: Task, seed: int, pool: int) -> Found:
    """The plan of a searched recipe, and those of published solvers on published grids."""
    grids, before = ("time", "quadratic", "lambda", "karras"), task.denoiser.evaluations
    peers = [solver.plan(task.schedule, SEARCHED_CALLS, grid) for solver in PUBLISHED.values() for grid in grids]
    found = search_recipe(task, SEARCHED_CALLS, evaluations=300, seed=seed)
    name = "recipe" if pool == 1 else "recipe, sensitive noises"
    told = {"tuner": name, "grid": "searched", "calls": SEARCHED_CALLS, "seed": seed, "noises": task.fit.count}
    told |= {"evaluations": task.denoiser.evaluations - before, "recipe": json.loads(found.recipe.to_json())}
    yield told, found.plan, peers


def learned_plans(task: Task, seed: int) -> Found:
    """The plans after every stage of learning, and those of published solvers on published grids."""
    grids, before = ("time", "quadratic", "lambda", "karras"), task.denoiser.evaluations
    peers = [solver.plan(task.schedule, SEARCHED_CALLS, grid) for solver in PUBLISHED.values() for grid in grids]
    stages = Learned(trials=30, polish=4, entries=(), matched=False).stages(task, SEARCHED_CALLS)
    found = [(name, numbers, task.denoiser.evaluations - before) for name, numbers in stages]  # what is judged is not counted
    for name, numbers, evaluations in found:
        told = {"tuner": f"learned: {name}", "grid": "learned", "calls": SEARCHED_CALLS, "seed": seed, "noises": task.fit.count}
        yield {**told, "evaluations": evaluations}, numbers.plan(task.schedule, {}), peers


if __name__ == "__main__":
    raise SystemExit(main())
