"""What may a network leave out? ``python benchmarks/layer_skips.py`` writes ``benchmarks/results/layer_skips.json``.

*mlp*: a residual network of 12 blocks on the flattened 8 x 8 digits, trained here for less than a minute and a half; *digits*: the
network that comes along, without labels. A fifth of all blocks at all calls is left out: searched (`fewstep.tuners.layer_skips`), the same
blocks at all calls (those of the least damage in all), and at random (the mean of several draws). Of each: MMD of the pixels to the data,
beside that of the whole network; the mean distance to the exact samples of the same noise; and the time of a sample over that
of the whole network, in alternate runs. The noise is none that was searched on. The bar: an MMD at most a tenth above the whole network's.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.evaluate import MMD
from fewstep.train import DenoisingLoss, fit
from fewstep.tuners import LayerSkips, Skipping, layer_skips, trace_paths
from fewstep.tuners.task import distances

RESULTS = Path(__file__).parent / "results" / "layer_skips.json"
BLOCKS, WIDTH, STEPS = 12, 128, 2500
SHARE, CALLS, PATHS, OTHER_NOISE, DRAWS = 0.2, (5, 10), 256, 9000, 5
FEW, ROUNDS = 256, 9
"""Samples whose time is measured, and how often."""
SAMPLES = {"mlp": 1797, "digits": 512}


class Block(nn.Module):
    """h + F(h, time)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        return h + self.down(nn.functional.silu(self.up(self.norm(h) + time)))


class ResidualMLP(nn.Module):
    """A residual network ``network(x, time)`` on vectors of 64."""

    def __init__(self, blocks: int = BLOCKS, width: int = WIDTH):
        super().__init__()
        self.register_buffer("omega", torch.logspace(-0.3, 2.0, 32))
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.stem, self.head = nn.Linear(64, width), nn.Linear(width, 64)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angle = time[:, None] * self.omega
        told = self.time(torch.cat([angle.cos(), angle.sin()], 1))
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, told)
        return self.head(h)


def digits() -> Tensor:
    """``"1797 64"`` in [-1, 1]."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().data.astype(np.float32)) / 8.0 - 1.0


def trained_mlp(steps: int = STEPS, seed: int = 0) -> fs.Denoiser:
    """The residual network, trained on the digits as a flow."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ResidualMLP()
    schedule = fs.schedules.Flow()
    result = fit(DenoisingLoss(schedule, "flow"), network, {"x": digits()}, steps=steps, batch_size=192, ema=0.998, seed=seed)
    network.load_state_dict(result.averages[0.998])
    return fs.Denoiser(network.eval().requires_grad_(False), schedule, "flow", info=fs.ModelInfo("mlp", (64,)))


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what searched sub-networks cost in quality, and save in time.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--seed", type=int, default=0, help="of training and search")
    parser.add_argument("--evaluations", type=int, default=200, help="candidates judged in a search")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    mlp = trained_mlp(seed=options.seed)
    trained = round(time.perf_counter() - began, 1)
    rows = []
    for name, denoiser, data in (("mlp", mlp, digits()), ("digits", fs.load("digits"), digits().reshape(-1, 1, 8, 8))):
        for nfe in CALLS:
            for row in measured(denoiser, data, nfe, options, SAMPLES[name]):
                rows.append({"network": name, "calls": nfe, **row})
                print(" ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in rows[-1].items()))
    machine = {"architecture": platform.machine(), "threads": 1, "torch": torch.__version__}
    told = {"command": "python benchmarks/layer_skips.py", "seed": options.seed, "machine": machine, "training_seconds": trained}
    seconds = round(time.perf_counter() - began, 1)
    options.out.write_text(json.dumps({**told, "share": SHARE, "seconds": seconds, "results": rows}, indent=1) + "\n")
    return 0


def measured(denoiser: fs.Denoiser, data: Tensor, nfe: int, options: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    """One row for each way of leaving out."""
    schedule, shape, began = denoiser.schedule, tuple(data.shape[1:]), time.perf_counter()
    paths = trace_paths(denoiser, fs.draw_noise(shape, range(PATHS)), schedule, calls=64)
    plan = fs.make_plan("auto", schedule, nfe)
    searched = layer_skips(denoiser, plan, paths=paths, share=SHARE, evaluations=options.evaluations, seed=options.seed)
    seconds = round(time.perf_counter() - began, 1)
    noise = fs.draw_noise(shape, range(OTHER_NOISE, OTHER_NOISE + count))
    exact = fs.sample(denoiser, noise, fs.make_plan("auto", schedule, 64))

    def judged(run: Any) -> dict[str, float]:
        samples = fs.sample(run, noise, plan)
        return {"mmd": MMD()(samples, data), "error": float(distances(samples, exact).mean())}

    whole = {"left_out": "none", **judged(denoiser), "time": 1.0}
    rows = [whole | {"seconds": seconds}]
    table = searched.table
    random = random_tables(table.size, int(table.sum()), options.seed)
    tables = {"searched": [table], "same": [same_blocks(searched)], "random": random}
    for name, drawn in tables.items():
        runs = [Skipping(denoiser, with_table(searched, each.reshape(table.shape))) for each in drawn]
        each = [judged(run) for run in runs]
        row = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
        ratio = time_ratio(runs[0], denoiser, noise[:FEW], plan)
        rows.append({"left_out": name, **row, "mmd_ratio": row["mmd"] / whole["mmd"], "time": ratio})
    return rows


def same_blocks(found: LayerSkips) -> np.ndarray:
    """As many of the blocks, the same at all calls: those that the search's report tells."""
    table = np.zeros(found.table.shape, bool)
    table.flat[list(found.report["same"])] = True
    return table


def random_tables(size: int, count: int, seed: int) -> list[np.ndarray]:
    random, tables = np.random.default_rng([seed, 1]), np.zeros((DRAWS, size), bool)
    for table in tables:
        table[random.choice(size, count, replace=False)] = True
    return list(tables)


def with_table(found: LayerSkips, table: np.ndarray) -> LayerSkips:
    return LayerSkips(found.blocks, found.times, table, found.model, found.plan, found.calls)


def time_ratio(first: Any, second: Any, noise: Tensor, plan: fs.Plan) -> float:
    """The ratio of the medians of the times of a run, in alternate runs."""
    times = np.zeros((ROUNDS, 2))
    for row in times:
        for k, denoiser in enumerate((first, second)):
            began = time.perf_counter()
            fs.sample(denoiser, noise, plan)
            row[k] = time.perf_counter() - began
    return float(np.divide(*np.median(times, 0)))


if __name__ == "__main__":
    raise SystemExit(main())
