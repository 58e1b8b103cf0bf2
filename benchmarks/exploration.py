r"""Which way finds the best setting in the fewest evaluations? ``python benchmarks/exploration.py`` writes ``results/exploration.json``.

Three sets of tasks. *linear*: 20 tasks that share 2 of 12 dimensions, 24 unit arms, rewards with noise 1, the two best at least 0.1 apart:
what the double design is made for. *mixtures* and *digits*: the arms are 16 settings (4 solvers on 4 grids, 5 calls), the tasks 10 Gaussian
mixtures of 8 dimensions, or the classes of the shipped digits; a reward is minus the logarithm of the distance of one sample from the
exact solution of its noise. Samples are drawn once into a pool, and the setting that is best on the pool is the right one.

Every method is run at several budgets (the designs: at several epsilon, for a confidence of 0.9, with the noise that the pool has); told
are the evaluations a task, the share of tasks that were answered rightly, and the mean loss against the best in the units of the reward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fewstep as fs
from fewstep.tuners import trace_paths
from fewstep.tuners.exploration import pick
from fewstep.tuners.task import distances

RESULTS = Path(__file__).parent / "results" / "exploration.json"
SOLVERS, GRIDS, CALLS = ("ddim", "dpmpp_2m", "unipc_2", "auto"), ("time", "quadratic", "lambda", "karras"), 5
RANK = 2
Floats = NDArray[np.float64]


def linear(seed: int, *, arms: int = 24, d: int = 12, count: int = 20, gap: float = 0.1) -> tuple[Floats, Floats]:
    """Arms and mean rewards ``"tasks arms"``."""
    chance = np.random.default_rng(seed)
    x = chance.standard_normal((arms, d))
    x /= np.linalg.norm(x, axis=1)[:, None]
    w = chance.standard_normal((5000, RANK))
    w /= np.linalg.norm(w, axis=1)[:, None]
    means = w @ np.linalg.qr(chance.standard_normal((d, RANK)))[0].T @ x.T
    ordered = np.sort(means, 1)
    return x, means[ordered[:, -1] - ordered[:, -2] > gap][:count]


def pool(denoiser: Any, noise: torch.Tensor, cond: dict[str, Any]) -> Floats:
    """Rewards ``"arms samples"``."""
    schedule = denoiser.schedule
    exact = trace_paths(denoiser, noise, schedule, calls=40, cond=cond, final="zero").target
    rows = []
    for solver in SOLVERS:
        for grid in GRIDS:
            plan = fs.make_plan(solver, schedule, CALLS, grid=grid, final="zero")
            rows.append(-np.log(np.maximum(distances(fs.sample(denoiser, noise, plan, cond=cond), exact), 1e-6)))
    return np.stack(rows)


@torch.no_grad()
def mixtures(count: int) -> list[Floats]:
    """A pool for each of ten mixtures."""
    found = []
    for seed in range(10):
        chance = np.random.default_rng(seed)
        exact = fs.exact.GaussianMixture(
            fs.schedules.VPLinear(), chance.standard_normal((4, 8)).tolist(), 0.02 + 0.2 * chance.random()
        )
        found.append(pool(exact, fs.draw_noise((8,), range(count), dtype=torch.float64), {}))
    return found


@torch.no_grad()
def digits(count: int) -> list[Floats]:
    """A pool for every class."""
    denoiser = fs.load("digits")
    noise = fs.draw_noise((1, 8, 8), range(count)) * float(denoiser.schedule.sigma(denoiser.schedule.t_start))
    return [pool(denoiser, noise, {"label": torch.full((count,), label)}) for label in range(10)]


def measure(
    arms: Floats, means: Floats, tasks: list[Callable[..., Any]], method: str, **options: Any
) -> tuple[float, float, float]:
    """Evaluations a task, share of right answers, mean loss."""
    found = pick(arms, tasks, method, **options)
    chosen = means[np.arange(len(means)), list(found.best)]
    return found.evaluations / len(tasks), float(np.mean(chosen >= means.max(1))), float(np.mean(means.max(1) - chosen))


def run_linear(runs: int) -> list[dict[str, Any]]:
    """The designs on tasks that are as they suppose, and the budgets that the rivals need there."""
    cells: list[tuple[str, dict[str, Any]]] = [
        ("single-design", {"confidence": 0.95, "noise": 1.0}),
        ("double-design", {"confidence": 0.95, "noise": 1.0, "rank": RANK}),
    ]
    cells += [(method, {"budget": 24 * 2**k}) for method in ("successive-halving", "uniform") for k in range(6, 13, 2)]
    rows = []
    for method, options in cells:
        told = []
        for seed in range(runs):
            x, means = linear(seed)
            chance = np.random.default_rng([seed, 1])
            tasks = [lambda a, n, mean=mean, c=chance: mean[a] + c.standard_normal(n) for mean in means]
            told.append(measure(x, means, tasks, method, **options))
        rows.append(row(method, options, told) | {"all_right": float(np.mean([share == 1.0 for _, share, _ in told]))})
        print(rows[-1], flush=True)
    return rows


def run_pools(pools: list[Floats], runs: int) -> list[dict[str, Any]]:
    """All methods on rewards drawn from pools with replacement."""
    means = np.stack([each.mean(1) for each in pools])
    noise = float(np.sqrt(np.mean([each.var(1).mean() for each in pools])))
    count = len(means[0])
    cells: list[tuple[str, dict[str, Any]]] = [
        (method, {"budget": count * 2**k}) for method in ("successive-halving", "uniform") for k in range(2, 10)
    ]
    for epsilon in (1.0, 0.5, 0.25):
        shared = {"confidence": 0.9, "noise": noise, "epsilon": epsilon}
        cells += [("single-design", shared), ("double-design", {**shared, "rank": RANK}), ("double-design", {**shared, "rank": 4})]
    rows = []
    for method, options in cells:
        told = []
        for seed in range(runs):
            chance = np.random.default_rng(seed)
            tasks = [lambda a, n, p=p, c=chance: c.choice(p[a], n) for p in pools]
            told.append(measure(np.eye(count), means, tasks, method, **options))
        rows.append(row(method, options, told))
        print(rows[-1], flush=True)
    return rows


def row(method: str, options: dict[str, Any], told: list[tuple[float, float, float]]) -> dict[str, Any]:
    """A line of the table."""
    evaluations, right, loss = np.mean(told, 0).tolist()
    given = {name: round(value, 4) for name, value in options.items()}
    return {"method": method, **given, "evaluations": round(evaluations, 1), "right": round(right, 4), "loss": round(loss, 5)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="of every cell")
    parser.add_argument("--linear-runs", type=int, default=100)
    parser.add_argument("--pool", type=int, default=200, help="samples a task")
    parser.add_argument("--parts", default="linear;mixtures;digits")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    document = json.loads(options.out.read_text()) if options.out.exists() else {}
    document["machine"] = "one core of a 2-core machine"
    for part in options.parts.split(";"):
        if part == "linear":
            rows, size = run_linear(options.linear_runs), f"--linear-runs {options.linear_runs}"
        else:
            rows = run_pools({"mixtures": mixtures, "digits": digits}[part](options.pool), options.runs)
            size = f"--runs {options.runs} --pool {options.pool}"
        document[part] = {"command": f"python benchmarks/exploration.py --parts {part} {size}", "rows": rows}
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
