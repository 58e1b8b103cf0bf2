"""Are the intervals and tests of `fewstep.evaluate` what they say? ``python benchmarks/intervals.py`` writes its JSON into ``results``.

Normal data in 4 or 16 dimensions whose standard deviations fall from 1 to 0.3, shifted by a number in every dimension or not at all.
For every distance: its expected figure at these sizes (the mean of 400 pairs of sets), the share of 200 other pairs whose 95 % interval
holds it, and the share with p <= 0.05, which is the size of the test where nothing is shifted and its power where something is. The
standard error of a share of 200 near 0.95 or 0.05 is 0.015.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.evaluate import KID, MMD, Distance, Frechet, SlicedWasserstein, Wasserstein, measure

RESULTS = Path(__file__).parent / "results" / "intervals.json"
CASES = ((4, 100, 100, 0.0), (4, 100, 100, 0.5), (16, 100, 150, 0.3), (16, 100, 150, 0.0))
PAIRS_FOR_TRUTH, PAIRS, RESAMPLES = 400, 200, 100
DISTANCES = (Frechet(), KID(), MMD(), SlicedWasserstein(64), Wasserstein())


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the intervals of distances.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = []
    for distance in DISTANCES:
        for d, n, m, shift in CASES:
            found.append(check(distance, d, n, n if isinstance(distance, Wasserstein) else m, shift, options.seed))
            print(json.dumps(found[-1]), flush=True)
    about = {"python": platform.python_version(), "numpy": np.__version__, "architecture": platform.machine()}
    sizes = {"pairs": PAIRS, "resamples": RESAMPLES, "seed": options.seed}
    options.out.write_text(
        json.dumps({"command": "python benchmarks/intervals.py", **sizes, "machine": about, "cases": found}, indent=1) + "\n"
    )
    return 0


def check(distance: Distance, d: int, n: int, m: int, shift: float, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)

    def draw(count: int, by: float) -> np.ndarray:
        return random.standard_normal((count, d)) * np.linspace(1.0, 0.3, d) + by

    expected = float(np.mean([distance(draw(n, shift), draw(m, 0.0)) for _ in range(PAIRS_FOR_TRUTH)]))
    runs = [measure(draw(n, shift), draw(m, 0.0), [distance], resamples=RESAMPLES, seed=i)[0] for i in range(PAIRS)]
    return {
        "distance": distance.name,
        "dimensions": d,
        "sizes": [n, m],
        "shift": shift,
        "expected": float(f"{expected:.4g}"),
        "coverage": float(np.mean([run.low <= expected <= run.high for run in runs])),
        "told_apart": float(np.mean([run.p <= 0.05 for run in runs])),
    }


if __name__ == "__main__":
    sys.exit(main())
