"""Jobs of an exact model, which take no time; workers import this file by its folder."""

from __future__ import annotations

import os
import signal

import torch

import fewstep as fs
from fewstep.scale import Job, Opened

SCHEDULE = fs.schedules.VPLinear()
MIXTURE = fs.exact.GaussianMixture(SCHEDULE, [[-1.0, 0.5], [1.5, -0.5]], 0.1)
PLAN = fs.make_plan("ddim", SCHEDULE, 4)


def toy(count=50, block=8, plan=PLAN, seeds=None, threads=1, opened=None, **told):
    return Job(opened or Toy(), plan, (2,), seeds or range(count), block=block, threads=threads, told=told)


class Toy:
    """Opens the mixture. On the block that begins with `deadly` its process ends, where it is not the one that wrote `alive`."""

    def __init__(self, deadly: int | None = None, fails: bool = False):
        self.deadly, self.fails, self.alive = deadly, fails, os.getpid()

    def __call__(self) -> Opened:
        if self.fails and os.getpid() != self.alive:
            raise ValueError("the weights are gone.")
        return Opened(MIXTURE, conditions=self.conditions, about=self.about)

    def conditions(self, rows: range) -> dict[str, torch.Tensor]:
        if rows.start == self.deadly and os.getpid() != self.alive:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def about(self, rows: range) -> list[dict[str, int]]:
        return [{"label": i % 3} for i in rows]
