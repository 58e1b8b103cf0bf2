"""How often is a tuned plan worse than the untuned one on other noise? ``python benchmarks/overfitted.py`` writes
``benchmarks/results/overfitted.json``.

On an exact mixture in dimension 16, plans of 6 calls are tuned with the default effort for slow networks and fitted to eight paths only,
each with several seeds, and judged on 2,048 other noises beside the best untuned setting that tuning found.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from tune import OTHER_NOISE, SCHEDULES, mixture

import fewstep as fs
from fewstep.tuners import Effort
from fewstep.tuners.task import errors_of

RESULTS = Path(__file__).parent / "results" / "overfitted.json"
EFFORTS = {"default": Effort(), "8 paths": replace(Effort(), trajectories=8, pool=32)}
CALLS, SIZE, JUDGED = 6, 16, 2048


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge tuned plans on much noise that was not used for tuning.")
    parser.add_argument("--trials", type=int, default=16, help="seeds, from 0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    denoiser = mixture(SIZE, SCHEDULES["VPLinear"], 700)
    noise = fs.draw_noise((SIZE,), range(OTHER_NOISE, OTHER_NOISE + JUDGED), dtype=torch.float64)
    exact = fs.tuners.trace_paths(denoiser, noise, denoiser.schedule, calls=200).target
    found: dict[str, list[float]] = {}
    for name, effort in EFFORTS.items():
        for seed in tqdm(range(options.trials), desc=name, unit="trial"):
            given = fs.draw_noise((SIZE,), range(64 * seed, 64 * (seed + 1)), dtype=torch.float64)
            tuned = fs.tune(denoiser, nfe=CALLS, noise=given, effort=effort, seed=seed)
            plans = (tuned.plan, tuned.candidates[CALLS][0].plan)
            mine, untuned = (errors_of(fs.sample(denoiser, noise, plan), exact).rms for plan in plans)
            found.setdefault(name, []).append(mine / untuned)
    told = {
        name: {"ratios": ratios, "worse": sum(ratio > 1.0 for ratio in ratios), "worst": max(ratios)}
        for name, ratios in found.items()
    }
    report = {"command": "python benchmarks/overfitted.py", "machine": "one core of a 2-core machine", "trials": options.trials}
    options.out.write_text(json.dumps({**report, "calls": CALLS, "judged": JUDGED, "efforts": told}, indent=1) + "\n")
    for name, values in told.items():
        print(f"{name}: {values['worse']} of {options.trials} are worse, at most {values['worst']:.2f} of the untuned error")
        print("  " + " ".join(f"{ratio:.2f}" for ratio in sorted(values["ratios"])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
