"""`sample_shards`: draw a job block by block with an engine, into a folder that is finished whatever happens on the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fewstep.identity import identity
from fewstep.scale.job import Drawer, Job
from fewstep.scale.shards import ShardSet

__all__ = ["Engine", "LocalEngine", "Summary", "Tally", "sample_shards"]


@dataclass(frozen=True)
class Tally:
    """What an engine had to do.

    Attributes:
        workers: that drew.
        deaths: workers that died and were replaced.
        repeated: blocks that were given to a second worker while the first had them.
    """

    workers: int = 1
    deaths: int = 0
    repeated: int = 0


class Engine(Protocol):
    """Where blocks are drawn."""

    def run(self, job: Job, drawer: Drawer, blocks: Sequence[int], keep: Callable[[int, bytes], None]) -> Tally:
        """Draw these blocks in any order, and hand each to `keep`, once.

        Args:
            job: what is drawn.
            drawer: of this process.
            blocks: their numbers.
            keep: takes the number of a block and its content.
        """
        ...


@dataclass(frozen=True)
class LocalEngine:
    """Draws one block after the other in this process."""

    def run(self, job: Job, drawer: Drawer, blocks: Sequence[int], keep: Callable[[int, bytes], None]) -> Tally:
        """See `Engine`."""
        for block in blocks:
            keep(block, drawer(block))
        return Tally()


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        checksums: SHA-256 of every shard, by its name.
        samples: in all of them.
        drawn: samples that this run drew; the others were there.
        damaged: shards that were there, but not what they had been, and were made again.
        tally: of the engine.
    """

    checksums: dict[str, str]
    samples: int
    drawn: int
    damaged: tuple[str, ...]
    tally: Tally


def sample_shards(
    job: Job,
    out: str | os.PathLike[str],
    *,
    engine: Engine | None = None,
    blocks_per_shard: int = 16,
    after: Callable[[int], None] | None = None,
) -> Summary:
    """Draw the samples of a job into a folder of checksummed WebDataset shards.

    Samples are the same to the bit whatever engine and however many workers draw them, on the same hardware, and whichever of them died
    and were replaced; only a block on which one after the other died ends the run. A run that was stopped goes on where it was when it is
    called again; memory does not grow with the number of samples.

    Args:
        job: what is drawn.
        out: the folder, see `fewstep.scale.shards`.
        engine: `LocalEngine` when left out; `RayEngine` for several processes or machines.
        blocks_per_shard: how many blocks a shard holds.
        after: called with how many samples are there, at first with those of earlier runs.

    Raises:
        ArtefactError: if the folder holds samples of another plan, model, seeds or anything else that decides them; if another run writes
            there; if a damaged shard that is made again is not what it was.
        BlockError: if one worker after the other dies on the same block, as many as the engine allows (`RayEngine(most_deaths=3)`).

    Example:
        >>> import tempfile
        >>> from functools import partial
        >>> import fewstep as fs
        >>> from fewstep.scale import Job, Opened, read_shards, sample_shards
        >>> exact = fs.exact.Gaussian(fs.schedules.Flow(), [0.0, 1.0], 0.1)
        >>> job = Job(partial(Opened, exact), fs.make_plan("ddim", exact.schedule, 4), (2,), range(10), block=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     summary = sample_shards(job, folder, blocks_per_shard=2)
        ...     samples, about = read_shards(folder)
        >>> len(summary.checksums), samples.shape, about[9]["seed"]
        (2, (10, 2), 9)
    """
    drawer = Drawer(job)
    with ShardSet(out, job, identity(drawer.opened.denoiser), blocks_per_shard=blocks_per_shard) as shards:
        missing = list(shards.missing)
        drawn = sum(len(job.rows(block)) for block in missing)
        there = len(job.seeds) - drawn
        if after is not None:
            after(there)

        def keep(block: int, content: bytes) -> None:
            nonlocal there
            shards.put(block, content)
            there += len(job.rows(block))
            if after is not None:
                after(there)

        tally = (engine or LocalEngine()).run(job, drawer, missing, keep) if missing else Tally(workers=0)
        assert shards.complete, "an engine left blocks out"
    return Summary(shards.checksums, len(job.seeds), drawn, tuple(shards.damaged), tally)
