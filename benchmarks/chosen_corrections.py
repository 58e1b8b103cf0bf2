"""What is gained by corrections that are chosen for a model: ``python benchmarks/chosen_corrections.py`` writes
``benchmarks/results/chosen_corrections.json``.

The exact denoiser of 1,500 digits (8 x 8), each widened by 0.15. *exposure*: the same with its noise prediction scaled by 0.98 or 1.02, on
VP-linear; a time shift (`fewstep.tuners.time_shift`) and a factor of epsilon scaling (`fewstep.tuners.epsilon_scale`) are chosen on
192 exact paths of the sound denoiser, and on paths of its own. *teleport*: `fewstep.tune` with ``method="teleport"`` on EDM's schedule from
80. Errors are mean distances to the exact samples of the sound denoiser on other noise, for *teleport* those of the validation.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep.solver import Solver
from fewstep.solvers import DDIM, DPMSolverPP
from fewstep.tuners import Effort, Paths, epsilon_scale, time_shift, trace_paths
from fewstep.tuners.judge import mean_error

RESULTS = Path(__file__).parent / "results" / "chosen_corrections.json"
BANDWIDTH, PATHS, OTHERS, OTHER_NOISE = 0.15, 192, 128, 9000
SOLVERS: dict[str, Solver] = {"ddim": DDIM(), "dpmpp_2m": DPMSolverPP(order=2)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure corrections that are chosen for a model.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from sklearn.datasets import load_digits

    began = time.perf_counter()
    points = torch.from_numpy(load_digits().images).reshape(-1, 1, 8, 8)[:1500] / 8.0 - 1.0
    report: dict[str, Any] = {"command": "python benchmarks/chosen_corrections.py", "seed": 0}
    report["machine"] = {"architecture": platform.machine(), "threads": 1, "torch": torch.__version__}
    for part, measured in (("exposure", exposure(points)), ("teleport", teleport(points))):
        report[part] = []
        for row in measured:
            report[part].append(row)
            print(part, *(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    report["seconds"] = round(time.perf_counter() - began)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


class Scaled:
    """A denoiser whose noise prediction is that of another one, times a factor."""

    def __init__(self, exact: Any, factor: float):
        self.exact, self.factor, self.schedule = exact, factor, exact.schedule

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        alpha = torch.as_tensor(self.schedule.alpha(t)).reshape(-1, *[1] * (x.ndim - 1))
        return (x - self.factor * (x - alpha * self.exact(x, t))) / alpha


def exposure(points: Tensor) -> Iterator[dict[str, Any]]:
    """Errors without correction, with the chosen shift and with the chosen factor."""
    schedule = fs.schedules.VPLinear()
    sound = fs.exact.FiniteData(schedule, points, bandwidth=BANDWIDTH)
    noises = (fs.draw_noise((1, 8, 8), range(k, k + n), dtype=torch.float64) for k, n in ((0, PATHS), (OTHER_NOISE, OTHERS)))
    paths, others = (trace_paths(sound, noise, schedule, calls=64) for noise in noises)
    for factor in (0.98, 1.0, 1.02):
        denoiser = Scaled(sound, factor)
        own = trace_paths(denoiser, paths.noise, schedule, calls=64)
        for source, used in (("sound", paths), ("own", own)):
            for name, solver in SOLVERS.items():
                for nfe in (5, 10, 20):
                    yield {
                        "factor": factor,
                        "paths": source,
                        "solver": name,
                        "calls": nfe,
                        **chosen(denoiser, solver, nfe, used, others),
                    }


def chosen(denoiser: Callable[..., Tensor], solver: Solver, nfe: int, paths: Paths, others: Paths) -> dict[str, Any]:
    plan = solver.plan(paths.schedule, nfe, "quadratic")
    shift = time_shift(denoiser, plan, paths=paths)
    scale = epsilon_scale(denoiser, solver, paths=paths, nfe=nfe, grid="quadratic")

    def error(numbers: fs.Plan, hooks: fs.Hooks | None = None) -> float:
        return mean_error(fs.sample(denoiser, others.noise, numbers, hooks=hooks), others.target)

    none = error(plan)
    told = {"none": none, "shift": error(plan, shift.hooks) / none}
    told["scaled"] = error(scale.solver.plan(paths.schedule, nfe, "quadratic")) / none
    settings = {key: shift.report[key] for key in ("window", "cutoff", "criterion")}
    return {**told, **settings, "scale": scale.scale}


def teleport(points: Tensor) -> Iterator[dict[str, Any]]:
    """Errors of the best untuned setting and after every skip."""
    exact = fs.exact.FiniteData(fs.schedules.EDM(), points, bandwidth=BANDWIDTH)
    noise = 80.0 * fs.draw_noise((1, 8, 8), range(64), dtype=torch.float64)
    effort = Effort(trajectories=128, held_out=256, pool=1)
    tuned = fs.tune(exact, nfe=(5, 8, 12), noise=noise, method="teleport", effort=effort)
    for nfe, candidates in tuned.candidates.items():
        for candidate in candidates:
            yield {"calls": nfe, "plan": candidate.name, "error": candidate.errors.rms, "median": candidate.errors.median}


if __name__ == "__main__":
    raise SystemExit(main())
