"""What DualFast, epsilon scaling, time shift and teleportation do: ``python benchmarks/corrections.py`` writes a JSON file of results.

*digits*: the shipped network, labels 0 to 9 in turn, no guidance. The error is the root mean square distance to the network's own
probability-flow solution from the same noise (DPM-Solver++(3M) in 60 calls); the Frechet distance is that of the pixels to all digits of
the data set. *exact*: the closed-form denoiser of 1,500 of those digits, each widened by 0.15, and the same with its noise prediction made
2 % too large (`inflated`), the kind of fault that time shift and epsilon scaling are for; the error is that to the exact solution.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fewstep as fs
from fewstep.solver import Solver
from fewstep.solvers import DDIM, DPMSolverPP, DualFast, EpsilonScale, GaussianPrior, Teleport, TimeShift

RESULTS = Path(__file__).parent / "results" / "corrections.json"
BASES: dict[str, Solver] = {"ddim": DDIM(), "dpmpp_2m": DPMSolverPP(order=2)}
REFERENCE_CALLS, BANDWIDTH, INFLATION = 60, 0.15, 1.02
Runner = Callable[[fs.Plan, fs.Hooks | None], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the corrections.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--count", type=int, default=200, help="samples of the network, a multiple of 100")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    from sklearn.datasets import load_digits

    data = torch.from_numpy(load_digits().images).reshape(-1, 1, 8, 8) / 8.0 - 1.0
    report: dict[str, Any] = {
        "command": "python benchmarks/corrections.py",
        "seed": 0,
        "count": options.count,
        "machine": {"architecture": platform.machine(), "threads": options.threads, "torch": torch.__version__},
        "rows": [],  # nothing for the README's table of solvers
    }
    with torch.no_grad():
        report["digits"] = list(_network(data, options.count))
        report["exact"] = list(_exact(data[:1500]))
        report["teleport"] = list(_teleport(data[:1500]))
    report["seconds"] = round(time.perf_counter() - began)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for part in ("digits", "exact", "teleport"):
        print(part)
        for row in report[part]:
            print("  ", *row.values())
    return 0


def _settings(schedule: Any, variance: float) -> Iterator[tuple[str, Callable[[Solver], Solver], fs.Hooks | None]]:
    """Name, what wraps the solver, and the hooks."""
    yield "plain", lambda solver: solver, None
    for anchor, weight in (("previous", 0.5), ("previous", 0.2), ("first", 0.5)):
        yield f"dualfast {anchor} {weight}", lambda solver, a=anchor, w=weight: DualFast(solver, w, a), None
    for scale in (0.99, 1.005, 1.01, 1.02):
        yield f"epsilon scale {scale}", lambda solver, s=scale: EpsilonScale(solver, s), None
    for name, value in (("paper", None), ("corrected", variance)):
        for window in (0.01, 0.03):
            hook = TimeShift(schedule, window, cutoff=0.3, data_variance=value)
            yield f"time shift {name} {window}", lambda solver: solver, fs.Hooks(time=hook)


def _compare(run: Runner, schedule: Any, variance: float, judge: Callable[[Tensor], dict[str, float]]) -> Iterator[dict[str, Any]]:
    for nfe in (5, 10):
        for base, solver in BASES.items():
            for name, wrap, hooks in _settings(schedule, variance):
                samples = run(wrap(solver).plan(schedule, nfe, "quadratic"), hooks)
                yield {"nfe": nfe, "solver": base, "correction": name, **judge(samples)}


def _network(data: Tensor, count: int) -> Iterator[dict[str, Any]]:
    denoiser = fs.load("digits")
    schedule = denoiser.schedule
    noise, labels = fs.draw_noise((1, 8, 8), range(count)), torch.arange(count) % 10

    def run(plan: fs.Plan, hooks: fs.Hooks | None) -> Tensor:
        parts = zip(noise.split(100), labels.split(100), strict=True)
        return torch.cat([fs.sample(denoiser, x, plan, cond={"label": label}, hooks=hooks) for x, label in parts])

    exact = run(fs.make_plan("dpmpp_3m", schedule, REFERENCE_CALLS, grid="lambda"), None)

    def judge(samples: Tensor) -> dict[str, float]:
        return {"error": _rms(samples - exact), "frechet": round(_frechet(samples, data), 3)}

    half = len(data) // 2
    yield {
        "nfe": 0,
        "solver": "none",
        "correction": "half of the data against the other",
        "error": 0.0,
        "frechet": round(_frechet(data[:half], data[half:]), 3),
    }
    yield {"nfe": REFERENCE_CALLS, "solver": "dpmpp_3m", "correction": "plain", **judge(exact)}
    yield from _compare(run, schedule, float(data.flatten(1).var(1).mean()), judge)


def _exact(points: Tensor) -> Iterator[dict[str, Any]]:
    schedule = fs.schedules.VPLinear()
    clean = fs.exact.FiniteData(schedule, points, bandwidth=BANDWIDTH)
    noise = fs.draw_noise((1, 8, 8), range(64), dtype=torch.float64)
    wanted = fs.sample(clean, noise, fs.make_plan("dpmpp_3m", schedule, 400, grid="lambda"))
    variance = float(points.flatten(1).var(1).mean()) + BANDWIDTH**2
    for fault, denoiser in (("none", clean), ("inflated", _inflated(clean))):

        def run(plan: fs.Plan, hooks: fs.Hooks | None, denoiser: Any = denoiser) -> Tensor:
            return fs.sample(denoiser, noise, plan, hooks=hooks)

        for row in _compare(run, schedule, variance, lambda samples: {"error": _rms(samples - wanted)}):
            yield {"fault": fault, **row}


def _inflated(exact: Any) -> Callable[[Tensor, Any], Tensor]:
    """The denoiser whose noise prediction is too large by a factor."""

    def denoise(x: Tensor, t: Any) -> Tensor:
        alpha = torch.as_tensor(exact.schedule.alpha(t)).reshape(-1, 1, 1, 1)
        return (x - INFLATION * (x - alpha * exact(x, t))) / alpha

    return denoise


def _teleport(points: Tensor) -> Iterator[dict[str, Any]]:
    """How far the end of the path moves, and the error of few calls with and without."""
    schedule = fs.schedules.EDM()
    exact = fs.exact.FiniteData(schedule, points, bandwidth=BANDWIDTH)
    fitted = GaussianPrior.fit(points)
    prior = GaussianPrior(fitted.mean, fitted.axes, fitted.variances + BANDWIDTH**2, BANDWIDTH**2)
    noise = 80.0 * fs.draw_noise((1, 8, 8), range(64), dtype=torch.float64)
    fine = DPMSolverPP(order=3)
    wanted = fs.sample(exact, noise, fine.plan(schedule, 400, "lambda"))
    for to in (40.0, 20.0, 10.0, 5.0, 3.0, 2.0, 1.0, 0.5):
        moved = fs.sample(exact, noise, Teleport(fine, prior, to).plan(schedule, 400, "lambda"))
        row: dict[str, Any] = {"to": to, "moved": round(float((moved - wanted).norm() / wanted.norm()), 5)}
        for nfe in (5, 8, 12):
            run = fs.sample(exact, noise, Teleport(DPMSolverPP(), prior, to).plan(schedule, nfe, "karras"))
            row[f"error at {nfe}"] = _rms(run - wanted)
        yield row
    yield {"to": 80.0, "moved": 0.0} | {
        f"error at {nfe}": _rms(fs.sample(exact, noise, DPMSolverPP().plan(schedule, nfe, "karras")) - wanted) for nfe in (5, 8, 12)
    }


def _rms(x: Tensor) -> float:
    return round(float(x.double().square().mean().sqrt()), 4)


def _frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to pixels."""
    first, second = (x.double().flatten(1).numpy() for x in (a, b))
    covariances = [np.cov(x.T) for x in (first, second)]
    values, axes = np.linalg.eigh(covariances[0])
    root = axes * np.sqrt(np.maximum(values, 0.0)) @ axes.T
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariances[1] @ root), 0.0)).sum()
    gap = first.mean(0) - second.mean(0)
    return float(gap @ gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2.0 * overlap)


if __name__ == "__main__":
    sys.exit(main())
