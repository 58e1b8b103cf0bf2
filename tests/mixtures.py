"""A teacher in closed form, wrapped as a network is, and students for it: for the tests of distillation."""

import functools
import math

import torch
from torch import nn

import fewstep as fs

RADIUS, VARIANCE, MODES = 1.5, 0.05, 8


def ring(schedule, modes=MODES):
    angles = 2.0 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    return fs.exact.GaussianMixture(schedule, RADIUS * torch.stack([angles.cos(), angles.sin()], 1), VARIANCE)


def as_network(exact, predicts):
    """A closed form as a network: what predicts gives, and takes the schedule's own time."""

    def network(x, time, **cond):
        t = time.double().cpu().numpy()
        alpha, sigma = (
            torch.as_tensor(level).to(x).reshape(-1, *[1] * (x.ndim - 1))
            for level in (exact.schedule.alpha(t), exact.schedule.sigma(t))
        )
        x_0 = exact(x, t)
        eps = (x - alpha * x_0) / sigma
        A, B = fs.predictions.target_coefficients(predicts, alpha, sigma)
        return A * x_0 + B * eps

    return network


def teacher_of(exact, predicts="flow"):
    info = fs.ModelInfo(shape=tuple(exact.shape))
    return fs.Denoiser(as_network(exact, predicts), exact.schedule, predicts, network_time=lambda t: t, info=info)


class Wide(nn.Module):
    """A network of residual layers that is told the time by cosines."""

    def __init__(self, size=2, width=128, depth=3):
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(17, width), nn.SiLU(), nn.Linear(width, width))
        self.read, self.write = nn.Linear(size, width), nn.Linear(width, size)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x, time):
        angle = time[:, None].to(x) * torch.arange(1, 9).to(x) * (math.pi / 4)
        told = self.time_mlp(torch.cat([time[:, None].to(x), angle.cos(), angle.sin()], 1))
        h = self.read(x)
        for block in self.blocks:
            h = h + block(nn.functional.silu(h + told))
        return self.write(nn.functional.silu(h))


@functools.lru_cache
def taught(steps=2500):
    """A network that learnt to predict the flow of the ring."""
    exact = ring(fs.schedules.Flow())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Wide()
    loss = fs.train.DenoisingLoss(exact.schedule, "flow", times="low_discrepancy")
    result = fs.fit(
        loss, network, {"x": exact.draw(20_000, seed=0).float()}, steps=steps, batch_size=256, learning_rate=3e-3, ema=0.99
    )
    network.load_state_dict(result.averages[0.99])
    return network


def noises(size):
    """Batches of starting noise."""

    def draw(count, generator):
        return {"noise": torch.randn((count, size), generator=generator)}

    return draw


def judged(samples, exact, sets=4):
    """Modes that are reached, and the Wasserstein distance to exact sets in units of that of two exact sets: means of several."""
    n = len(samples)
    means = exact._parameters.host["means"].float()
    share = torch.bincount(torch.cdist(samples, means).argmin(1), minlength=len(means)) / n
    distance, exacts = fs.evaluate.Wasserstein(), [exact.draw(n, seed) for seed in range(1, 2 * sets + 1)]
    floor = sum(distance(a, b) for a, b in zip(exacts[::2], exacts[1::2], strict=True)) / sets
    return int((share > 0.4 / len(means)).sum()), sum(distance(samples.double(), a) for a in exacts[::2]) / sets / floor
