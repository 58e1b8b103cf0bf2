r"""What does a step of `PlanScheduler` cost the host? ``python benchmarks/diffusers_step.py`` writes ``results/diffusers_step.json``.

The same loop with every scheduler, as diffusers' pipelines have it: ``step(output, t, latents, return_dict=False)[0]`` on one thread, with
an output that is there already. A sample of one number leaves the host's cost; at 1x4x64x64 the arithmetic counts as well. The schedulers
take turns within a round; the first step and ``set_timesteps`` are left out; the least of a few repeats is taken. Ratios to diffusers'
``DPMSolverMultistepScheduler`` are taken within a round; the median over the rounds is reported, with the quartiles.

Exit status 1 if the host's cost of DPM-Solver++(2M) is more than a tenth of the peer's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import fewstep as fs

RESULTS = Path(__file__).parent / "results" / "diffusers_step.json"
SHAPES = {"host": (1, 1, 1, 1), "1x4x64x64": (1, 4, 64, 64)}
PEER = "diffusers DPMSolverMultistep 2"
STEPS, REPEATS, BOUND = 20, 3, 0.1


def contestants() -> dict[str, Any]:
    """Schedulers by name."""
    config = diffusers.DPMSolverMultistepScheduler().config
    ours = {
        f"PlanScheduler {name}": fs.diffusers.PlanScheduler.from_config(config, solver=name)
        for name in ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "deis")
    }
    return {
        PEER: diffusers.DPMSolverMultistepScheduler(),
        "diffusers DDIM": diffusers.DDIMScheduler(clip_sample=False),
        "diffusers UniPC 2": diffusers.UniPCMultistepScheduler(),
        "diffusers FlowMatchEuler": diffusers.FlowMatchEulerDiscreteScheduler(),
        **ours,
    }


def run_of(scheduler: Any, x: Tensor) -> Callable[[], float]:
    """A run: the seconds of a step."""

    def run() -> float:
        scheduler.set_timesteps(STEPS)
        first, *rest = scheduler.timesteps
        latents = scheduler.step(x, first, x, return_dict=False)[0]
        start = time.perf_counter()
        for t in rest:
            latents = scheduler.step(x, t, latents, return_dict=False)[0]
        return (time.perf_counter() - start) / len(rest)

    return run


def measure(shape: tuple[int, ...], rounds: int, seed: int) -> dict[str, Any]:
    """Microseconds a step, and the ratio to the peer."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    runs = {name: run_of(scheduler, x) for name, scheduler in contestants().items()}
    took: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            took[name].append(1e6 * min(run() for _ in range(REPEATS)))
    return {
        name: {
            "microseconds": round(statistics.median(times), 2),
            "to_peer": quartiles([a / b for a, b in zip(times, took[PEER], strict=True)]),
        }
        for name, times in took.items()
    }


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"lower": round(low, 4), "median": round(middle, 4), "upper": round(high, 4)}


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what a step of PlanScheduler costs the host.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of every size")
    parser.add_argument("--seed", type=int, default=0, help="of the tensors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    timed = {name: measure(shape, options.rounds, options.seed) for name, shape in SHAPES.items()}
    ratio = timed["host"]["PlanScheduler dpmpp_2m"]["to_peer"]["median"]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    report = {
        "command": "python benchmarks/diffusers_step.py",
        "seed": options.seed,
        "machine": {"architecture": platform.machine(), "threads": 1, **versions},
        "rounds": options.rounds,
        "bars": {"host_cost_to_diffusers": {"value": ratio, "bound": BOUND, "is": "at most", "passed": ratio <= BOUND}},
        "timed": timed,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["bars"], indent=2))
    for name, entry in timed["host"].items():
        print(f"{name:32} {entry['microseconds']:8.1f} us a step, {entry['to_peer']['median']:.3f} of the peer")
    return 0 if ratio <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
