r"""What Local SGD saves and costs: ``python benchmarks/local_sgd.py`` writes ``benchmarks/results/local_sgd.json``, in about half an hour.

- *Volumes*: the planner's, for the settings of the paper (arXiv 2310.14423) that were published with a figure.
- *Equality*: four processes (gloo, one thread each) train a small denoiser of digits. With H = 1 and SGD with momentum, the largest
  difference of a weight to PyTorch's DistributedDataParallel, in double and in single precision.
- *Loss at a volume*: the same processes with SGD with momentum, and with AdamW; every worker has a quarter of the digits. The denoising
  loss on held-out digits, with fixed noise, of the weights of the last step, for three seeds, by rule. Data-parallel training has the best
  learning rate of a grid for itself, the rules the best for the first QSR, both found on a seed of its own; their other options make about
  equal volumes. "Never but at the end" and "one worker alone" say what averages are good for.
- *A loss*: seconds that a survivor spends in the average in which a worker is missing, killed or hanging, until training goes on.
- *Theory*: the exact law of the drift against a simulation in one dimension, and in a valley that narrows, L = (1 + x^2) y^2 / 2 with noise
  on y: how much faster x goes to the flat place than with SGD.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fewstep.errors import NetworkError
from fewstep.schedules import VPLinear
from fewstep.train import (
    QSR,
    ConstantH,
    DenoisingLoss,
    ElasticGroup,
    InversePower,
    LocalOptimizer,
    PostLocal,
    SimulatedWorkers,
    communication_volume,
    fit,
    local_sgd_drift_factor,
    warmup_cosine,
)
from fewstep.train.recipes import digits
from fewstep.train.synchronization import Synchronization

RESULTS = Path(__file__).parent / "results" / "local_sgd.json"
WORKERS, STEPS, WARMUP, BATCH, SEEDS = 4, 800, 40, 32, (0, 1, 2)
GRID_SEED = 10
RATES = {"SGD": (0.8, 1.2, 1.6, 2.0, 2.4, 2.8, 3.2, 4.0), "AdamW": (4e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2, 3.2e-2)}
"""Peaks to choose from, by optimizer."""
EDGE = 1.5
"""A peak is out that is within this factor of one at which either method ends in numbers that are not finite: another seed, or another
rule, would not bear it."""
PLAIN: dict[str, Any] = {"clip": None, "ema": ()}
FIRST_QSR = "QSR, H_base 4, alpha 1.4 peak"
WIDTH = 192
DRAWS = 64
"""Noise levels for every held-out digit."""
PATIENCE = 3.0
LOSS = DenoisingLoss(VPLinear(), "noise", times="low_discrepancy")
PARALLEL = "data-parallel (DDP)"
ALONE = "one worker alone"


def rules(peak: float) -> dict[str, Synchronization]:
    """Name -> rule. Alphas are multiples of the peak, as the paper's are of its."""
    options: dict[str, Any] = {"warmup_steps": WARMUP, "total_steps": STEPS}
    return {
        "every step": ConstantH(1, STEPS),
        "constant H = 8": ConstantH(8, STEPS),
        "constant H = 16": ConstantH(16, STEPS),
        FIRST_QSR: QSR(1.4 * peak, 4, **options),
        "QSR, H_base 4, alpha 2 peak": QSR(2.0 * peak, 4, **options),
        "QSR, H_base 4, alpha 3 peak": QSR(3.0 * peak, 4, **options),
        "power 1, H_base 4, alpha 6 peak": InversePower(1.0, 6.0 * peak, 4, **options),
        "power 3, H_base 4, alpha 2 peak": InversePower(3.0, 2.0 * peak, 4, **options),
        "post-local from step 40, H = 12": PostLocal(40, ConstantH(12, STEPS)),
        "never but at the end": ConstantH(STEPS, STEPS),
    }


class Denoiser(nn.Module):
    """Three layers on the pixels and waves of the time."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(64 + 16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 64)]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("frequencies", 2.0 ** torch.arange(8.0))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        angles = time[:, None].to(x) * self.frequencies
        return self.layers(torch.cat([x.flatten(1), angles.cos(), angles.sin()], 1)).view(x.shape)


def held_out_loss(model: nn.Module) -> float:
    x = digits("held_out")["x"].repeat(DRAWS, 1, 1, 1)
    with torch.no_grad():
        return float(LOSS(model, {"x": x}, torch.Generator().manual_seed(0))[0])


# ---- learning rates, in one process ------------------------------------------------------------------------------------------------


def loss_at(kind: str, name: str, peak: float) -> float:
    """The loss of a run on the seed of the grid; workers are simulated. Infinite where the run ends in numbers that are not finite."""
    torch.manual_seed(GRID_SEED)
    model, x, workers = Denoiser(), digits()["x"], SimulatedWorkers(WORKERS)
    turns = 1 if name == PARALLEL else WORKERS

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        plain = plain_optimizer(kind, parameters, lr)
        return plain if name == PARALLEL else LocalOptimizer(plain, rules(peak)[name], workers)

    def batch(size: int, generator: torch.Generator) -> dict[str, Tensor]:
        mine = x if name == PARALLEL else x[workers.index :: WORKERS]
        return {"x": mine[torch.randint(len(mine), (size,), generator=generator)]}

    options = {"steps": turns * STEPS, "batch_size": WORKERS * BATCH // turns, "warmup": turns * WARMUP}
    try:
        fit(LOSS, model, batch, optimizer=optimizer, seed=GRID_SEED, learning_rate=peak, **options, **PLAIN)
    except NetworkError:
        return math.inf
    loss = held_out_loss(model)
    return loss if math.isfinite(loss) else math.inf


def best_peaks(kinds: Sequence[str]) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Optimizer -> method -> peak, and the whole grid."""
    rows = [
        {"optimizer": kind, "name": name, "peak": peak, "loss": loss_at(kind, name, peak)}
        for kind in kinds
        for name in (PARALLEL, FIRST_QSR)
        for peak in tqdm(RATES[kind], desc=f"{kind}, {name}", leave=False)
    ]
    best: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    edges = {
        kind: min((row["peak"] for row in rows if row["optimizer"] == kind and not math.isfinite(row["loss"])), default=math.inf)
        for kind in kinds
    }
    for row in sorted(rows, key=lambda row: -row["loss"]):
        if EDGE * row["peak"] <= edges[row["optimizer"]]:
            best[row["optimizer"]][row["name"]] = row["peak"]
    return best, [{**row, "loss": row["loss"] if math.isfinite(row["loss"]) else None} for row in rows]


# ---- the processes -----------------------------------------------------------------------------------------------------------------


def plain_optimizer(kind: str, parameters: Any, lr: float) -> torch.optim.Optimizer:
    if kind == "SGD":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)


def train(rank: int, kind: str, name: str, peak: float, seed: int) -> dict[str, Any]:
    """One run of this worker, with its quarter of the data; data-parallel training draws the same batches."""
    torch.manual_seed(seed)
    model = Denoiser()
    inside: list[LocalOptimizer] = []

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        plain = plain_optimizer(kind, parameters, lr)
        if name in (PARALLEL, ALONE):
            return plain
        inside.append(LocalOptimizer(plain, rules(peak)[name]))
        return inside[0]

    wrapped = DistributedDataParallel(model) if name == PARALLEL else model
    x = digits()["x"][rank::WORKERS]
    dist.barrier()
    start, moved = time.perf_counter(), loopback()
    options = {"steps": STEPS, "batch_size": BATCH, "warmup": WARMUP}
    fit(LOSS, wrapped, {"x": x}, optimizer=optimizer, seed=100 * seed + rank, learning_rate=peak, **options, **PLAIN)
    dist.barrier()
    elements = sum(p.numel() for p in model.parameters())
    payload = {PARALLEL: 4 * elements * STEPS, ALONE: 0}
    return {
        "optimizer": kind,
        "name": name,
        "seed": seed,
        "peak": peak,
        "loss": held_out_loss(model),
        "payload_bytes": inside[0].traffic.payload_bytes if inside else payload[name],
        "control_bytes": inside[0].traffic.control_bytes if inside else 0,
        "rounds": inside[0].traffic.rounds if inside else payload[name] // (4 * elements),
        "loopback_bytes": loopback() - moved,
        "seconds": time.perf_counter() - start,
        "weights": float(sum(p.detach().double().sum() for p in model.parameters())),
    }


def loopback() -> int:
    """Bytes that the machine sent itself so far, or 0 where that is not told."""
    path = Path("/proc/net/dev")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[9]) for line in lines if line.strip().startswith("lo:")), 0)


def difference(rank: int, dtype: torch.dtype) -> float:
    """Largest difference of a weight between an average every step and data-parallel SGD with momentum, after 100 steps."""
    models = []
    for local in (False, True):
        torch.manual_seed(0)
        model = Denoiser().to(dtype)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = LocalOptimizer(optimizer, ConstantH(1, 100)) if local else optimizer
        wrapped = model if local else DistributedDataParallel(model)
        x = digits()["x"][rank::WORKERS].to(dtype)
        for step in range(100):
            generator = torch.Generator().manual_seed(1000 * rank + step)
            optimizer.zero_grad()
            LOSS(wrapped, {"x": x[torch.randint(len(x), (BATCH,), generator=generator)]}, generator)[0].backward()
            optimizer.step()
        models.append(model)
    return max(float((p - q).detach().abs().max()) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


def work(rank: int, folder: str, jobs: Sequence[tuple[str, str, float, int]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS)
    results: dict[str, Any] = {"double": difference(rank, torch.float64), "single": difference(rank, torch.float32)}
    results["runs"] = [train(rank, *job) for job in jobs]
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def lose(rank: int, folder: str, how: str) -> None:
    """Rounds of ten steps; worker 2 is lost in the third. The time of the survivors' third average."""
    torch.set_num_threads(1)
    group = ElasticGroup(dist.FileStore(f"{folder}/store"), rank, WORKERS, PATIENCE)  # pyright: ignore[reportPrivateImportUsage]
    model, times, x = Denoiser(), [], digits()["x"][rank::WORKERS]
    optimizer = LocalOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), ConstantH(10, 50), group)
    warnings.simplefilter("ignore", RuntimeWarning)  # that worker 2 is lost
    for step in range(50):
        if rank == 2 and step == 25:
            os.kill(os.getpid(), getattr(signal, how))
        optimizer.zero_grad()
        LOSS(model, {"x": x[:BATCH]}, torch.Generator().manual_seed(step))[0].backward()
        start = time.monotonic()
        optimizer.step()
        times.append(time.monotonic() - start)
    Path(folder, f"{rank}.json").write_text(json.dumps({"seconds": times[29], "workers": optimizer.workers.size}))


def processes(target: Callable[..., None], *arguments: Any, lost: int | None = None) -> list[Any]:
    """What every process wrote."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=target, args=(rank, folder, *arguments)) for rank in range(WORKERS)]
        for worker in workers:
            worker.start()
        for rank, worker in enumerate(workers):
            if rank != lost:
                worker.join()
        for worker in workers:
            worker.kill()
            worker.join()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORKERS) if rank != lost]


# ---- the parts of the report -------------------------------------------------------------------------------------------------------


def volumes() -> list[dict[str, Any]]:
    """The paper's runs: batch 4,096 on ImageNet, 312 steps an epoch."""
    rows = []
    for run, epochs, warmup, peak, h_base, alpha, published in (
        ("ViT-B, AdamW", 300, 10_000, 0.008, 4, 0.0175, 10.4),
        ("ViT-B, AdamW", 300, 10_000, 0.008, 8, 0.0175, 6.9),
        ("ResNet-152, SGD", 200, 5 * 312, 0.8, 2, 0.2, 39.7),
        ("ResNet-152, SGD", 200, 5 * 312, 0.8, 4, 0.25, 20.1),
    ):
        steps = 312 * epochs
        rates = warmup_cosine(peak, total_steps=steps, warmup_steps=warmup)
        plan = communication_volume(QSR(alpha, h_base, warmup, steps), rates)
        row = {"run": run, "h_base": h_base, "alpha": alpha, "steps": steps, "rounds": plan.rounds}
        rows.append({**row, "percent": 100.0 * plan.relative, "published": published})
    return rows


def drift_in_one_dimension() -> list[dict[str, Any]]:
    """Variance about the minimum, over that of SGD with the whole batch."""
    rate, workers, rows = 0.05, 4, []
    for h in (1, 4, 16, 64, 256):
        random, y, total, steps = np.random.default_rng(h), np.zeros((1000, workers)), 0.0, 256 * 6
        for step in range(steps):
            total += (y**2).mean() / (steps - 256) if step >= 256 else 0.0
            y = y - rate * (y + random.standard_normal(y.shape))
            y = np.repeat(y.mean(1, keepdims=True), workers, 1) if (step + 1) % h == 0 else y
        plain = rate**2 / workers / (1.0 - (1.0 - rate) ** 2)
        rows.append({"h": h, "measured": total / plain, "law": local_sgd_drift_factor(rate, h, 1.0, workers)})
    return rows


def drift_in_a_valley() -> list[dict[str, Any]]:
    """How long x takes from 1 to 0.8 in L = (1 + x^2) y^2 / 2; the law at the mean curvature on the way."""
    rate, workers, noise, taken = 0.05, 4, 0.5, {}
    for h in (1, 4, 16, 64):
        random = np.random.default_rng(h)
        x, y, step = np.ones((1000, workers)), np.zeros((1000, workers)), 0
        while x.mean() > 0.8:
            curvature = 1.0 + x**2
            x, y = x - rate * x * y**2, y - rate * (curvature * y + noise * random.standard_normal(y.shape))
            step += 1
            if step % h == 0:
                x, y = (np.repeat(v.mean(1, keepdims=True), workers, 1) for v in (x, y))
        taken[h] = step
    law = {h: local_sgd_drift_factor(rate, h, 1.0 + 0.9**2, workers) for h in taken}
    return [{"h": h, "steps": taken[h], "times as fast": taken[1] / taken[h], "law": law[h]} for h in taken]


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a method, means over seeds; the difference to data-parallel training is paired by seed."""
    parallel = {run["seed"]: run for run in runs if run["name"] == PARALLEL}
    noise = statistics.stdev(run["loss"] for run in parallel.values())
    rows = []
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        excess = [run["loss"] / parallel[run["seed"]]["loss"] - 1.0 for run in mine]
        row: dict[str, Any] = {"name": name, "losses": [run["loss"] for run in mine], "rounds": mine[0]["rounds"]}
        row["loss"] = statistics.mean(row["losses"])
        row["percent_of_bytes"] = 100.0 * mine[0]["payload_bytes"] / parallel[SEEDS[0]]["payload_bytes"]
        moved = [run["loopback_bytes"] / max(1, parallel[run["seed"]]["loopback_bytes"]) for run in mine]
        row["percent_of_loopback"] = 100.0 * statistics.median(moved)
        row["excess_percent"] = 100.0 * statistics.mean(excess)
        row["within_seed_noise"] = row["loss"] - statistics.mean(r["loss"] for r in parallel.values()) <= noise
        rows.append(row)
    return rows


def theory() -> dict[str, Any]:
    report = {"volumes": volumes(), "drift": drift_in_one_dimension(), "valley": drift_in_a_valley()}
    for row in report["volumes"]:
        print(f"{row['run']:16} H_base {row['h_base']} alpha {row['alpha']}: {row['percent']:.4f} % (published {row['published']})")
    for row in report["drift"] + report["valley"]:
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    return report


def training(kinds: Sequence[str] = tuple(RATES)) -> dict[str, Any]:
    best, grid = best_peaks(kinds)
    print(best, flush=True)
    jobs = []
    for kind, peaks in best.items():
        names = {PARALLEL: peaks[PARALLEL], **dict.fromkeys([*rules(1.0), ALONE], peaks[FIRST_QSR])}
        jobs += [(kind, name, peak, seed) for seed in SEEDS for name, peak in names.items()]
    ranks = processes(work, jobs)
    for runs in zip(*[rank["runs"] for rank in ranks], strict=True):
        assert runs[0]["name"] == ALONE or len({run["weights"] for run in runs}) == 1, "the workers end with different models"
    report: dict[str, Any] = {
        "workers": WORKERS,
        "steps": STEPS,
        "batch_of_a_worker": BATCH,
        "seeds": list(SEEDS),
        "difference_to_data_parallel": {kind: max(rank[kind] for rank in ranks) for kind in ("double", "single")},
        "grid": grid,
        "learning_rates": best,
        "by_optimizer": {kind: summary([run for run in ranks[0]["runs"] if run["optimizer"] == kind]) for kind in kinds},
        "runs": ranks[0]["runs"],
    }
    print(report["difference_to_data_parallel"])
    for kind, rows in report["by_optimizer"].items():
        print(f"{kind}, peaks {best[kind]}")
        for row in rows:
            moved = f"{row['percent_of_bytes']:7.3f} % of bytes ({row['percent_of_loopback']:5.1f} % seen)"
            told = f"{row['excess_percent']:+.2f} %, {'within' if row['within_seed_noise'] else 'beyond'} seed noise"
            print(f"{row['name']:34} {row['rounds']:4} rounds {moved}  loss {row['loss']:.5f}  {told}")
    return report


def loss() -> dict[str, Any]:
    report = {"patience": PATIENCE, "losses_of_a_worker": {how: processes(lose, how, lost=2) for how in ("SIGKILL", "SIGSTOP")}}
    print(report)
    return report


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"theory": theory, "training": training, "loss": loss}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which to measure; the file keeps the others"
    )
    parser.add_argument("--optimizers", nargs="+", choices=RATES, default=list(RATES), help="of the part training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    report |= {"command": "python benchmarks/local_sgd.py", "machine": "both cores of a 2-core machine"}
    for part in options.parts:
        report |= training(options.optimizers) if part == "training" else PARTS[part]()
        options.out.write_text(json.dumps(report, indent=1) + "\n")  # after every part, so that none is lost
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
