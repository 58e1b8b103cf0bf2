r"""Weightings of the denoising loss at equal budgets: ``python benchmarks/weightings.py`` writes ``benchmarks/results/weightings.json``.

One small network predicts the velocity of the digits (VP-linear, low-discrepancy times, conditional with label dropout); it is trained anew
for every weighting and seed with the same steps, batches, noise and learning rate. Adam's steps do not depend on the scale of a loss, and
the gradient is not clipped, so no weighting is favoured by its size. The averaged weights are sampled with DPM-Solver++ 2M, equal in
lambda, to noise level 0.

The Frechet distance is that of the shipped classifier's features, samples against the training part; that of the held-out part against it
is what good samples of its number would show. *Intensity* is the difference of the mean pixel, the colour shift that the paper of
debiased estimation is about.

``python benchmarks/weightings.py --steps 30 --samples 64 --seeds 1 --out quick.json`` is a quick look.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fewstep as fs
from fewstep.evaluate import Frechet, digit_features
from fewstep.models import SmallUNet, SmallUNetConfig
from fewstep.train import DenoisingLoss, LabelDropout, fit
from fewstep.train.recipes import digits

RESULTS = Path(__file__).parent / "results" / "weightings.json"
NETWORK = SmallUNetConfig(1, 8, channels=(32, 64), blocks=(1, 1), classes=10)
WEIGHTINGS = ("constant", "min_snr", "debiased")
NFE = (4, 6, 10, 20)
SCHEDULE = fs.schedules.VPLinear()


def main() -> int:
    parser = argparse.ArgumentParser(description="Train one network with several weightings of the loss.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    train, held_out = digits("train"), digits("held_out")
    reference = digit_features(train["x"])
    runs = []
    for seed in range(options.seeds):
        for weighting in tqdm(WEIGHTINGS, desc=f"seed {seed}"):
            denoiser = trained(weighting, seed, options.steps, train)
            for nfe in NFE:
                figures = judged(denoiser, nfe, options.samples, reference, train["x"])
                runs += [{"weighting": weighting, "seed": seed, "nfe": nfe, **figures}]
    report = {
        "command": "python benchmarks/weightings.py",
        "machine": "one core of a 2-core machine",
        "seeds": list(range(options.seeds)),
        "steps": options.steps,
        "batch_size": 64,
        "samples": options.samples,
        "network": repr(NETWORK),
        "predicts": "velocity",
        "seconds": round(time.perf_counter() - began),
        "held_out_frechet": Frechet()(digit_features(held_out["x"]), reference),
        "runs": runs,
        "table": table(runs),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["table"]:
        print(row)
    print(f"held-out digits: {report['held_out_frechet']:.3f}")
    return 0


def trained(weighting: str, seed: int, steps: int, data: dict[str, Tensor]) -> fs.Denoiser:
    """A denoiser with averaged weights. Everything but the weighting is the same for one seed."""
    torch.manual_seed(seed)
    network = SmallUNet(NETWORK)
    objective = DenoisingLoss(SCHEDULE, "velocity", weighting, "low_discrepancy", LabelDropout(null=10))
    result = fit(objective, network, data, steps=steps, batch_size=64, learning_rate=2e-3, clip=None, ema=0.99, seed=seed)
    network.load_state_dict(result.averages[0.99])
    return fs.Denoiser(network.eval(), SCHEDULE, "velocity")


@torch.no_grad()
def judged(denoiser: fs.Denoiser, nfe: int, count: int, reference: Tensor, data: Tensor) -> dict[str, float]:
    plan = fs.make_plan("dpmpp_2m", SCHEDULE, nfe, grid="lambda", final="zero")
    labels = torch.arange(count) % 10
    samples = torch.cat(
        [
            fs.sample(denoiser, fs.draw_noise((1, 8, 8), rows.tolist(), plan), plan, cond={"label": labels[rows]})
            for rows in torch.arange(count).split(250)
        ]
    )
    return {
        "frechet": float(Frechet()(digit_features(samples.clamp(-1, 1)), reference)),
        "intensity": float(samples.mean() - data.mean()),
    }


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over the seeds, its standard error, and in how many seeds the weighting is better than the constant one."""
    rows = []
    for nfe in NFE:
        chosen = {w: np.array([r["frechet"] for r in runs if r["weighting"] == w and r["nfe"] == nfe]) for w in WEIGHTINGS}
        for weighting, values in chosen.items():
            shift = [r["intensity"] for r in runs if r["weighting"] == weighting and r["nfe"] == nfe]
            rows.append(
                {
                    "nfe": nfe,
                    "weighting": weighting,
                    "frechet": round(float(values.mean()), 3),
                    "stderr": round(float(values.std(ddof=1) / np.sqrt(len(values))), 3) if len(values) > 1 else None,
                    "better_than_constant": int((values < chosen["constant"]).sum()),
                    "intensity": round(float(np.mean(shift)), 4),
                }
            )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
