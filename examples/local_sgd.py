"""Train a flow model on points with four workers that average their weights seldom, and say before how seldom.

    python examples/local_sgd.py            # four processes, about a minute on two cores
    python examples/local_sgd.py --smoke    # the same workers simulated in one process, a few seconds

Prints the planned volume, what was moved, and how far samples lie from the four clusters that the model was trained on.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

import fewstep as fs
from fewstep.train import QSR, DenoisingLoss, ElasticGroup, LocalOptimizer, SimulatedWorkers, communication_volume

WORKERS, PEAK, WARMUP = 4, 4e-3, 40


class PointNetwork(nn.Module):
    """A small network on points in the plane."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(14, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        return self.layers(torch.cat([x, (2 * x).cos(), (2 * x).sin(), angles.cos(), angles.sin()], dim=1))


def clusters(batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Four tight clusters on the axes."""
    angle = math.pi / 2 * torch.randint(4, (batch_size,), generator=generator)
    centre = torch.stack([angle.cos(), angle.sin()], dim=1)
    return {"x": centre + 0.05 * torch.randn(batch_size, 2, generator=generator)}


def rate(steps: int) -> Callable[[int], float]:
    """The learning rates of `fs.fit`: after so many steps."""
    return lambda step: PEAK * min((step + 1) / WARMUP, 1.0) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def train(group: ElasticGroup | SimulatedWorkers, rank: int, steps: int, calls: int) -> tuple[nn.Module, LocalOptimizer]:
    """Each worker has its own seed; all begin with the weights of the first."""
    network, made = PointNetwork(), []

    def optimizer(parameters: object, lr: float) -> torch.optim.Optimizer:
        sync = QSR(alpha=2 * PEAK, h_base=4, warmup_steps=WARMUP, total_steps=steps)
        made.append(LocalOptimizer(torch.optim.AdamW(parameters, lr=lr), sync, group))
        return made[0]

    loss = DenoisingLoss(fs.schedules.Flow(), "flow")
    options = {"steps": calls, "batch_size": 128, "learning_rate": PEAK, "warmup": WARMUP * calls // steps, "seed": rank, "ema": ()}
    fs.fit(loss, network, clusters, optimizer=optimizer, **options)
    return network, made[0]


def report(network: nn.Module, optimizer: LocalOptimizer) -> None:
    print(f"moved: {optimizer.traffic.payload_bytes} bytes of weights per worker in {optimizer.traffic.rounds} rounds")
    noise = fs.draw_noise((2,), seeds=range(2000))
    with torch.no_grad():
        den = fs.Denoiser(network, fs.schedules.Flow(), predicts="flow")
        x = fs.sample(den, noise, fs.make_plan("dpmpp_2m", den.schedule, nfe=10, final="zero"))
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    print(f"mean distance to the nearest cluster {float(torch.cdist(x, centres).min(dim=1).values.mean()):.3f}")


def worker(rank: int, folder: str, steps: int) -> None:
    torch.manual_seed(rank)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store")  # on one machine; torch.distributed.TCPStore over a network
    network, optimizer = train(ElasticGroup(store, rank, WORKERS), rank, steps, steps)
    if rank == 0:
        report(network, optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="fewer steps, in one process")
    smoke = parser.parse_args().smoke
    steps = 400 if smoke else 2000

    torch.manual_seed(0)
    elements = sum(p.numel() for p in PointNetwork().parameters())
    plan = communication_volume(QSR(alpha=2 * PEAK, h_base=4, warmup_steps=WARMUP, total_steps=steps), rate(steps))
    print(plan.show(elements, WORKERS))
    if smoke:
        report(*train(SimulatedWorkers(WORKERS), 0, steps, WORKERS * steps))
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(worker, (folder, steps), nprocs=WORKERS, start_method="spawn")


if __name__ == "__main__":
    main()
