"""Pictures of a few samples while a student is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.artefacts import write_atomically
from fewstep.denoisers import innermost
from fewstep.distill.method import STUDENT
from fewstep.distill.networks import device_of
from fewstep.noise import draw_noise
from fewstep.plan import Plan
from fewstep.sampler import sample

__all__ = ["SHOWN", "Sheets", "check_drawable"]

SHOWN = 8
"""Samples in a row."""


def check_drawable(teacher: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Refuse samples that are no pictures, before anything is trained.

    Raises:
        ValueError: for other shapes than ``"1 height width"`` and ``"3 height width"``, if the teacher does not decode them.
    """
    if innermost(teacher, "decode") is None and not (len(shape) == 3 and shape[0] in (1, 3)):
        raise ValueError(f"sheets show pictures of 1 or 3 channels, and samples of shape {shape} are none: leave sheets out.")
    return shape


class Sheets:
    """Called after a step with the model and the number of the step; writes a picture every so many steps, a row for every plan.

    Args:
        reads: makes the denoiser of a student's network for a number of calls.
        plans: number of calls -> plan.
        cond: conditions, for `SHOWN` samples.
        shape: of a sample.
        folder: where pictures go.
        every: steps between them.
        stride: steps between calls; a picture that is due between two is written at the later one.
    """

    def __init__(
        self,
        reads: Callable[[nn.Module, int], Any],
        plans: Mapping[int, Plan],
        cond: Mapping[str, Tensor],
        shape: tuple[int, ...],
        folder: Path,
        every: int,
        stride: int = 1,
    ):
        self.reads, self.plans, self.cond, self.shape, self.folder = reads, plans, cond, shape, folder
        self.every, self.stride = every, stride

    @torch.no_grad()
    def __call__(self, model: Any, step: int) -> None:
        if step % self.every >= self.stride:
            return
        from fewstep.evaluate.report import image_grid

        network = model[STUDENT]
        training = network.training
        network.eval()
        made, denoiser = [], None
        for nfe, plan in self.plans.items():
            denoiser = self.reads(network, nfe)
            device = device_of(denoiser)
            noise = draw_noise(self.shape, range(SHOWN), plan, device=device)
            cond = {name: value.to(device) for name, value in self.cond.items()}
            made.append(sample(denoiser, noise, plan, cond=cond, seeds=range(SHOWN), check=False))
        network.train(training)
        decode, info = getattr(denoiser, "decode", None), innermost(denoiser, "info")
        pictures = torch.cat(made) if decode is None else decode(torch.cat(made))
        sheet = image_grid(pictures.nan_to_num().cpu(), info.data_range or (-1.0, 1.0), columns=SHOWN)
        write_atomically(self.folder / f"samples-{step:07d}.png", sheet)
