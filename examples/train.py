"""Train a flow model on points of your own, and sample from it in few calls.

    python examples/train.py            # about half a minute on a CPU
    python examples/train.py --smoke    # a few seconds

Prints how far the samples lie from the two rings that the model was trained on.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.train import DenoisingLoss


class PointNetwork(nn.Module):
    """A small network on points in the plane."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        return self.layers(torch.cat([x, angles.cos(), angles.sin()], dim=1))


def rings(batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Points on circles of radius 1/2 and 1."""
    angle = 2 * math.pi * torch.rand(batch_size, generator=generator)
    radius = torch.where(torch.rand(batch_size, generator=generator) < 0.5, 0.5, 1.0)
    return {"x": torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="fewer steps")
    steps = 300 if parser.parse_args().smoke else 6000

    torch.manual_seed(0)
    network, schedule = PointNetwork(), fs.schedules.Flow()
    result = fs.fit(DenoisingLoss(schedule, "flow"), network, rings, steps=steps, batch_size=256, learning_rate=2e-3, ema=0.99)
    network.load_state_dict(result.averages[0.99])

    den = fs.Denoiser(network, schedule, predicts="flow")
    print(fs.check(den, rings(256, torch.Generator().manual_seed(1))["x"], most=256))
    noise = fs.draw_noise((2,), seeds=range(2000))
    for nfe in (2, 5, 10, 20):
        with torch.no_grad():
            x = fs.sample(den, noise, fs.make_plan("dpmpp_2m", schedule, nfe=nfe, final="zero"))
        radius = x.norm(dim=1)
        distance = torch.minimum((radius - 0.5).abs(), (radius - 1.0).abs()).mean()
        print(f"{nfe:>3} calls: mean distance to the rings {float(distance):.3f}")


if __name__ == "__main__":
    main()
