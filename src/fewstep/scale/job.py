"""A set of samples as numbered blocks of fixed size, so that they are the same whoever draws them.

Block b holds the samples of the indices ``b * block`` to ``(b + 1) * block``, the last one the rest. A matrix library rounds differently
for other sizes of a batch and other numbers of threads; both are fixed here, so a block has the same bits in whatever process it is drawn
on the same hardware, and sample i depends on its seed and its condition alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.noise import draw_noise
from fewstep.plan import Plan
from fewstep.sampler import sample
from fewstep.scale.members import Drawn, encoded

__all__ = ["Drawer", "Job", "Opened"]


def no_conditions(rows: range) -> dict[str, Any]:
    """None."""
    return {}


def nothing_more(rows: range) -> list[dict[str, Any]]:
    """Nothing for every sample."""
    return [{} for _ in rows]


@dataclass(frozen=True)
class Opened:
    """A model in the process that runs it.

    Args:
        denoiser: ``D(x, t, **cond)``, guided or not.
        conditions: from indices of samples to what is handed to every call, one entry a sample.
        about: from indices to what is written beside every sample, as JSON values, e.g. its label.
        decode: from samples to pictures, where the model samples latents.
        data_range: the values that a picture shows as black and white.
    """

    denoiser: Callable[..., Tensor]
    conditions: Callable[[range], Mapping[str, Any]] = no_conditions
    about: Callable[[range], Sequence[Mapping[str, Any]]] = nothing_more
    decode: Callable[[Tensor], Tensor] | None = None
    data_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Job:
    """What every worker is told.

    Args:
        open: makes the model in the process that calls it; it travels to workers, so it is a function of a module, a
            `functools.partial` of one, or of a denoiser that can travel.
        plan: what is run.
        shape: of one sample.
        seeds: one a sample; a range is short to send.
        block: samples that run at a time.
        threads: processor threads of a worker.
        dtype, device: of the state.
        told: what else decides the samples, as JSON values: it is kept beside them, and a run with other values is refused.

    Raises:
        ValueError: for no seeds, or numbers below 1.

    Example:
        >>> from functools import partial
        >>> import fewstep as fs
        >>> exact = fs.exact.Gaussian(fs.schedules.Flow(), [0.0, 1.0], 0.1)
        >>> plan = fs.make_plan("ddim", exact.schedule, 4)
        >>> job = Job(partial(Opened, exact), plan, (2,), range(10), block=4)
        >>> job.blocks, job.rows(2)
        (3, range(8, 10))
    """

    open: Callable[[], Opened]
    plan: Plan
    shape: tuple[int, ...]
    seeds: Sequence[int]
    block: int = 64
    threads: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    told: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.seeds) or min(self.block, self.threads) < 1:
            raise ValueError(
                f"a job needs seeds, and block and threads of at least 1, got {len(self.seeds)}, {self.block}, {self.threads}."
            )

    @property
    def blocks(self) -> int:
        """How many there are."""
        return -(-len(self.seeds) // self.block)

    def rows(self, block: int) -> range:
        """The indices of a block."""
        return range(block * self.block, min((block + 1) * self.block, len(self.seeds)))


class Drawer:
    """Draws blocks of a job in this process.

    Args:
        job: what is drawn. Its model is opened here.
    """

    def __init__(self, job: Job):
        self.job = job
        with fixed_threads(job.threads):
            self.opened = job.open()

    @torch.no_grad()
    def draw(self, rows: range) -> Drawn:
        """The samples of these indices."""
        job, opened = self.job, self.opened
        own = [int(job.seeds[i]) for i in rows]
        with fixed_threads(job.threads):
            noise = draw_noise(job.shape, own, job.plan, dtype=job.dtype, device=job.device)
            samples = sample(opened.denoiser, noise, job.plan, cond=opened.conditions(rows), seeds=own)
            pictures = samples if opened.decode is None else opened.decode(samples)
        about = [{"index": i, "seed": seed, **more} for i, seed, more in zip(rows, own, opened.about(rows), strict=True)]
        latents = None if opened.decode is None else samples.cpu().numpy()
        return Drawn(rows, pictures.cpu().numpy(), about, latents, opened.data_range)

    def __call__(self, block: int) -> bytes:
        """A block as members of a tar file."""
        return encoded(self.draw(self.job.rows(block)))


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """So many processor threads within it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
