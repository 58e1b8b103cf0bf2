r"""What does the loop itself cost? ``python benchmarks/overhead.py`` writes ``benchmarks/results/overhead.json``.

The network is the identity and predicts the data, so all that is left of a step of DPM-Solver++(2M) is the loop: Python, the dispatch of
operations, and one linear combination of three tensors. Measured on one thread, in rounds that take every contestant in turn:

- *ours*: ``fewstep.sample``, the preparation of its plan included, no final look for NaN (``check=False``);
- *diffusers*: ``DPMSolverMultistepScheduler.step`` in the usual loop, ``set_timesteps`` left out;
- *combination*: ``(x * a).add_(d0, alpha=b).add_(d1, alpha=c)``, new memory every time, the oldest tensor dropped.

Time per step is that of a whole run over its number of steps, and the *slope*: the time of 60 steps less that of 20, over 40, which leaves
out what happens once a run. Ratios are taken within a round; the median over the rounds is reported, with the quartiles.

A run gives its memory back when it ends, and the C library may hand that to the system, so that the next run pays for page faults. Whether
it does depends on its settings, not on the loop; so everything is measured twice, in processes with the library's own settings and with
``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_`` at 1 GiB, and the faults are reported.

Counted, not timed: the full-size operations of a step (those that make or change a tensor of the sample's size), and the reads from the
device in a run, by looking at every operation that is dispatched. As a cross-check the loop runs on the meta device, which has no values
to read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep as fs

RESULTS = Path(__file__).parent / "results" / "overhead.json"
SHAPES = {"host": (1, 1, 1, 1), "1x4x64x64": (1, 4, 64, 64), "1x16x128x128": (1, 16, 128, 128)}
SHORT, LONG = 20, 60
REPEATS = 3
ALLOCATORS = {
    "as_it_is": {},
    "keeps_memory": {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)},
}
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what the loop costs.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of every size")
    parser.add_argument("--seed", type=int, default=0, help="of the tensors")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        print(json.dumps({name: measure(shape, options.rounds, options.seed) for name, shape in SHAPES.items()}))
        return 0
    timed = {name: in_child(options, extra) for name, extra in ALLOCATORS.items()}
    counted = count_operations()
    report = {
        "command": "python benchmarks/overhead.py",
        "seed": options.seed,
        "machine": machine(),
        "rounds": options.rounds,
        "bars": bars(timed, counted),
        "counted": counted,
        "timed": timed,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({"bars": report["bars"], "counted": counted}, indent=2))
    return 0 if all(bar["passed"] for bar in report["bars"].values()) else 1


def machine() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    try:
        import diffusers

        versions["diffusers"] = diffusers.__version__
    except ImportError:
        print("diffusers is not installed: its part is left out", file=sys.stderr)
    return {"architecture": platform.machine(), "threads": 1, **versions}


def in_child(options: argparse.Namespace, extra: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", "--rounds", str(options.rounds), "--seed", str(options.seed)]
    done = subprocess.run(command, env={**os.environ, **extra}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def bars(timed: dict[str, Any], counted: dict[str, Any]) -> dict[str, Any]:
    """The bars, on the slopes with the C library's own settings."""
    own = timed["as_it_is"]

    def bar(value: float, bound: float) -> dict[str, Any]:
        return {"value": round(value, 4), "bound": bound, "is": "at most", "passed": value <= bound}

    found = {
        "microseconds_a_step_at_1x4x64x64": bar(own["1x4x64x64"]["ours"]["slope"], 20.0),
        "ratio_to_combination_at_1x16x128x128": bar(own["1x16x128x128"]["ours_to_combination"]["median"], 1.5),
        "full_size_operations_a_step": bar(counted["full_size_operations_a_step"], 4),
        "reads_in_a_run": bar(counted["reads_in_a_run"], 0),
    }
    if "ours_to_diffusers" in own["host"]:
        found["ratio_to_diffusers_host_cost"] = bar(own["host"]["ours_to_diffusers"]["median"], 0.1)
    return found


# ---- time --------------------------------------------------------------------------------------------------------------------------


def measure(shape: tuple[int, ...], rounds: int, seed: int) -> dict[str, Any]:
    """Microseconds a step of every contestant."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    contestants = {"ours": our_runs(x), "combination": combination_runs(x)}
    with contextlib.suppress(ImportError):
        contestants["diffusers"] = diffusers_runs(x)
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    faults = dict.fromkeys(contestants, 0)
    for runs in contestants.values():
        for run in runs:
            for _ in range(5):
                run()
    for _ in range(rounds):
        for name, (short, long) in contestants.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            took[name].append((best(short), best(long)))
            faults[name] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    slope = {name: [1e6 * (b - a) / (LONG - SHORT) for a, b in pairs] for name, pairs in took.items()}
    whole = {name: [1e6 * a / SHORT for a, _ in pairs] for name, pairs in took.items()}
    report: dict[str, Any] = {
        name: {
            "slope": round(statistics.median(slope[name]), 2),
            "whole_run": round(statistics.median(whole[name]), 2),
            "page_faults": round(faults[name] / rounds / REPEATS / (SHORT + LONG), 2),
        }
        for name in contestants
    }
    for other in contestants:
        if other != "ours":
            report[f"ours_to_{other}"] = quartiles([a / b for a, b in zip(slope["ours"], slope[other], strict=True)])
            report[f"ours_to_{other}_whole_run"] = quartiles([a / b for a, b in zip(whole["ours"], whole[other], strict=True)])
    return report


def best(run: Callable[[], None]) -> float:
    """The least of a few times, for an interruption only ever adds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"lower": round(low, 4), "median": round(middle, 4), "upper": round(high, 4)}


def our_runs(x: Tensor) -> list[Callable[[], None]]:
    schedule = fs.schedules.VPLinear()
    denoiser = fs.Denoiser(lambda x, t: x, schedule, predicts="data")

    def of(nfe: int) -> Callable[[], None]:
        plan = fs.make_plan("dpmpp_2m", schedule, nfe=nfe, grid="lambda", final="zero")

        def run() -> None:
            fs.sample(denoiser, x, plan, check=False)

        return run

    return [of(SHORT), of(LONG)]


def combination_runs(x: Tensor) -> list[Callable[[], None]]:
    def of(steps: int) -> Callable[[], None]:
        def run() -> None:
            state, newest, oldest = x, x, x
            for _ in range(steps):
                state = (state * 0.5).add_(newest, alpha=0.75).add_(oldest, alpha=-0.25)
                newest, oldest = state, newest

        return run

    return [of(SHORT), of(LONG)]


def diffusers_runs(x: Tensor) -> list[Callable[[], None]]:
    from diffusers import DPMSolverMultistepScheduler

    def of(steps: int) -> Callable[[], None]:
        scheduler = DPMSolverMultistepScheduler(prediction_type="sample", final_sigmas_type="zero", lower_order_final=False)
        scheduler.set_timesteps(steps)

        def run() -> None:
            scheduler._step_index, scheduler.lower_order_nums, scheduler.model_outputs = None, 0, [None, None]
            state = x
            for t in scheduler.timesteps:
                state = scheduler.step(state, t, state).prev_sample

        return run

    return [of(SHORT), of(LONG)]


# ---- counts ------------------------------------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts operations on tensors of the sample's size, and reads of values."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.full_size = 0
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in READS or (name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu")):
            self.reads.append(name)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if isinstance(result, Tensor) and result.numel() == self.size and not is_view:
            self.full_size += 1
        return result


def count_operations() -> dict[str, Any]:
    """Operations a step, beyond the network and the conversion of its prediction, and reads in a whole run."""
    schedule = fs.schedules.VPLinear()
    denoiser = fs.Denoiser(lambda x, t: x, schedule, predicts="data")
    x = torch.randn(2, 3, 5, 7)
    counts = {}
    for nfe in (SHORT, LONG):
        plan = fs.make_plan("dpmpp_2m", schedule, nfe=nfe, grid="lambda", final="zero")
        with Counter(x.numel()) as counter:
            fs.sample(denoiser, x, plan, check=False)
        counts[nfe] = counter
        fs.sample(denoiser, x.to("meta"), plan, check=False)  # would raise at a read
    return {
        "full_size_operations_a_step": (counts[LONG].full_size - counts[SHORT].full_size) / (LONG - SHORT),
        "reads_in_a_run": len(counts[LONG].reads),
        "runs_on_the_meta_device": True,
    }


if __name__ == "__main__":
    sys.exit(main())
