"""Train a flow model on points of your own, and sample from it in few calls.

    python examples/train.py            # about half a minute on a CPU
    python examples/train.py --smoke    # a few seconds

Prints how far the samples lie from the four clusters that the model was trained on.
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
        hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.layers = nn.Sequential(nn.Linear(10 + 8, width), nn.SiLU(), *hidden, nn.Linear(width, 2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        waves = torch.cat([2 * x, 4 * x], dim=1)
        return self.layers(torch.cat([x, waves.cos(), waves.sin(), angles.cos(), angles.sin()], dim=1))


def clusters(batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Four tight clusters on the axes."""
    angle = math.pi / 2 * torch.randint(4, (batch_size,), generator=generator)
    centre = torch.stack([angle.cos(), angle.sin()], dim=1)
    return {"x": centre + 0.05 * torch.randn(batch_size, 2, generator=generator)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="fewer steps")
    steps = 400 if parser.parse_args().smoke else 3000

    torch.manual_seed(0)
    network, schedule = PointNetwork(), fs.schedules.Flow()
    result = fs.fit(DenoisingLoss(schedule, "flow"), network, clusters, steps=steps, batch_size=512, learning_rate=2e-3, ema=0.99)
    network.load_state_dict(result.averages[0.99])

    den = fs.Denoiser(network, schedule, predicts="flow")
    print(fs.check(den, clusters(256, torch.Generator().manual_seed(1))["x"], most=256))
    noise = fs.draw_noise((2,), seeds=range(2000))
    for nfe in (2, 5, 10, 20):
        with torch.no_grad():
            x = fs.sample(den, noise, fs.make_plan("dpmpp_2m", schedule, nfe=nfe, final="zero"))
        centres = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        distance = torch.cdist(x, centres).min(dim=1).values.mean()
        print(f"{nfe:>3} calls: mean distance to the nearest cluster {float(distance):.3f}")


if __name__ == "__main__":
    main()
