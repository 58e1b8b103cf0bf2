"""A folder of shards: what is in it, what it was made by, and how it grows.

    samples-000000.tar ...   WebDataset shards, each a whole number of blocks (`fewstep.scale.members`)
    plan.safetensors         the plan
    shards.json              what decides the samples, and every finished shard with its SHA-256
    .blocks/                 finished blocks of shards that are not, until the set is complete
    .lock                    empty; whoever writes here has it locked

Everything appears under its name when it is written whole. `shards.json` says nothing about workers or times: the same samples give the
same folder to the byte. While a
shard that was damaged is not made again, `shards.json` keeps what it was, so that it is made the same or not at all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from fewstep.artefacts import json_value, write_atomically
from fewstep.errors import ArtefactError, FewstepError
from fewstep.plan import Plan
from fewstep.scale.job import Job
from fewstep.scale.members import END
from fewstep.scale.reading import CHUNK, FORMAT, MANIFEST, file_digest, number_of, read_manifest
from fewstep.version import __version__

__all__ = ["ShardSet", "key_of"]

PLAN = "plan.safetensors"
UNFINISHED = ".blocks"
LOCK = ".lock"
TEMPORARY = re.compile(r"\.(samples-\d+\.tar|shards\.json|plan\.safetensors|\d+-[0-9a-f]{64}\.tar)\.\d+\.[0-9a-f]{8}\.tmp")
"""Files that are being written, and were when a run was killed."""


def key_of(job: Job, model: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the samples of a job, as JSON values.

    Args:
        job: the job.
        model: as `fewstep.identity.identity` tells it.
    """
    seeds = job.seeds
    run = len(seeds) < 2 or all(int(b) - int(a) == 1 for a, b in itertools.pairwise(seeds))
    listed = {} if run else {"sha256": hashlib.sha256(json.dumps([int(seed) for seed in seeds]).encode()).hexdigest()}
    return json_value(
        {
            "plan": job.plan.digest,
            "model": model,
            "samples": len(seeds),
            "seeds": {"first": int(seeds[0])} if run else listed,
            "shape": job.shape,
            "block": job.block,
            "threads": job.threads,
            "dtype": str(job.dtype).removeprefix("torch."),
            "device": str(job.device).partition(":")[0],
            "told": job.told,
            "versions": {"fewstep": __version__, "torch": torch.__version__, "numpy": np.__version__},
        }
    )


class ShardSet:
    """A folder that blocks are put into, in any order and by any number of runs one after the other, until it is complete.

    As a context it has the folder to itself: only then is the folder read, mended and written.

    Args:
        folder: made if it does not exist; its parent has to.
        job: what is drawn.
        model: as `fewstep.identity.identity` tells it.
        blocks_per_shard: how many blocks a shard holds.

    Attributes:
        missing: the blocks that are neither in a shard nor kept.
        damaged: names of shards that were listed and are not what they were; their blocks are missing.

    Raises:
        ArtefactError: when it is entered, if another run writes there, or the folder holds samples of something else, which both are
            named, or something that is no set of samples.
        ValueError: for less than 1 block a shard.
    """

    def __init__(self, folder: str | os.PathLike[str], job: Job, model: Mapping[str, Any], *, blocks_per_shard: int = 16):
        if blocks_per_shard < 1:
            raise ValueError(f"a shard holds at least 1 block, got {blocks_per_shard}.")
        self.folder, self.job = Path(folder), job
        self.key = key_of(job, model) | {"blocks_per_shard": blocks_per_shard}
        self.missing: list[int] = []
        self.damaged: list[str] = []
        self._per_shard = blocks_per_shard
        self._listed: dict[int, dict[str, Any]] = {}
        self._broken: dict[int, dict[str, Any]] = {}  # what damaged shards were, until they are made again
        self._kept: dict[int, Path] = {}
        self._held = ExitStack()

    def __enter__(self) -> ShardSet:
        self._check_place()
        self.folder.mkdir(exist_ok=True)
        with ExitStack() as held:
            held.enter_context(_locked(self.folder))
            self._begin()
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Take the folder of unfinished blocks away if the set is complete."""
        with self._held:
            if self.complete:
                shutil.rmtree(self._unfinished, ignore_errors=True)

    def _begin(self) -> None:
        """Read what is there, throw away what is not whole, finish what can be finished."""
        known = self._known()
        self._unfinished.mkdir(exist_ok=True)
        for path in [*self.folder.iterdir(), *self._unfinished.iterdir()]:
            if TEMPORARY.fullmatch(path.name):
                path.unlink()
        self._listed = {number: shard for number, shard in known.items() if self._intact(shard)}
        self._broken = {number: shard for number, shard in known.items() if number not in self._listed}
        self.damaged = [shard["name"] for shard in self._broken.values()]
        self._write_plan()
        self._write()
        self._kept = self._kept_blocks()
        for shard in range(self.shards):
            if shard not in self._listed:
                self._finish(shard)
        there = {b for b in range(self.job.blocks) if b in self._kept or b // self._per_shard in self._listed}
        self.missing = [b for b in range(self.job.blocks) if b not in there]

    @property
    def shards(self) -> int:
        """How many there are when the set is complete."""
        return -(-self.job.blocks // self._per_shard)

    @property
    def complete(self) -> bool:
        """Whether all are there."""
        return len(self._listed) == self.shards

    @property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of every finished shard, by its name."""
        return {shard["name"]: shard["sha256"] for _, shard in sorted(self._listed.items())}

    @property
    def _unfinished(self) -> Path:
        return self.folder / UNFINISHED

    def put(self, block: int, content: bytes) -> None:
        """Keep a block; finish its shard if it was the last one of it. A block that is there already is left as it is."""
        if block in self._kept or block // self._per_shard in self._listed:
            return
        digest = hashlib.sha256(content).hexdigest()
        path = self._unfinished / f"{block:09d}-{digest}.tar"
        write_atomically(path, content)
        self._kept[block] = path
        self._finish(block // self._per_shard)

    def _check_place(self) -> None:
        """Refuse a place that is none for shards, before anything is written there."""
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file; shards are written into a folder.")
        if not self.folder.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder.parent} to write {self.folder.name} into.")
        if not self.folder.exists() or (self.folder / MANIFEST).exists():
            return
        others = any(not file.name.startswith(".") and file.name != PLAN for file in self.folder.iterdir())
        if others and not (self.folder / MANIFEST).exists():  # another run may just have begun
            raise ArtefactError(f"{self.folder} holds other files and no {MANIFEST}: choose another folder for the shards.")

    def _known(self) -> dict[int, dict[str, Any]]:
        """The shards that the manifest lists, finished or damaged, if there is one."""
        if not (self.folder / MANIFEST).exists():
            return {}
        document = read_manifest(self.folder)
        for name, mine in self.key.items():
            if (theirs := document["made_by"].get(name)) != mine:
                raise ArtefactError(
                    f"{self.folder} holds samples with {name} {_told(theirs, mine)}, and this run has {_told(mine, theirs)}: "
                    "choose another folder, or repeat the command that began it."
                )
        known = {number_of(shard["name"]): shard for shard in [*document.get("damaged", []), *document["shards"]]}
        if max(known, default=0) >= self.shards:
            raise ArtefactError(f"{self.folder / MANIFEST} lists more than the {self.shards} shards of this set: it is damaged.")
        return dict(sorted(known.items()))

    def _write_plan(self) -> None:
        """Write the plan if what is there is not it."""
        try:
            there = Plan.load(self.folder / PLAN).digest
        except (FewstepError, OSError):
            there = None
        if there != self.job.plan.digest:
            self.job.plan.save(self.folder / PLAN)

    def _intact(self, shard: Mapping[str, Any]) -> bool:
        path = self.folder / shard["name"]
        return path.is_file() and file_digest(path) == shard["sha256"]

    def _kept_blocks(self) -> dict[int, Path]:
        """Blocks of earlier runs; what is not what its name says goes."""
        kept = {}
        for path in sorted(self._unfinished.glob("*.tar")):
            block, _, digest = path.stem.partition("-")
            if block.isdecimal() and file_digest(path) == digest and int(block) // self._per_shard not in self._listed:
                kept[int(block)] = path
            else:
                path.unlink()
        return kept

    def _finish(self, shard: int) -> None:
        """Write a shard if all its blocks are there: first the shard, then the list, and only then its blocks go."""
        blocks = range(shard * self._per_shard, min((shard + 1) * self._per_shard, self.job.blocks))
        if not all(block in self._kept for block in blocks):
            return
        name = f"samples-{shard:06d}.tar"
        parts = [self._kept[block] for block in blocks]
        try:
            digest, size = _joined(parts, self.folder / name, self._broken.get(shard, {}).get("sha256"))
        except ArtefactError:
            for block in blocks:  # the next run, perhaps elsewhere, draws them again
                self._kept.pop(block).unlink()
            raise
        samples = sum(len(self.job.rows(block)) for block in blocks)
        self._listed[shard] = {"name": name, "sha256": digest, "samples": samples, "bytes": size}
        self._broken.pop(shard, None)
        self._write()
        for block in blocks:
            self._kept.pop(block).unlink()

    def _write(self) -> None:
        document = {"format": FORMAT, "kind": "fewstep-shards", "made_by": self.key}
        document |= {"complete": self.complete, "shards": [shard for _, shard in sorted(self._listed.items())]}
        if self._broken:
            document["damaged"] = [shard for _, shard in sorted(self._broken.items())]
        write_atomically(self.folder / MANIFEST, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within it no other run may write there; a lock goes with the process that has it.

    Raises:
        ArtefactError: if another run does.
    """
    try:
        import fcntl
    except ImportError:  # no POSIX: then it is left to the user
        yield
        return
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArtefactError(f"another run writes into {folder}: wait for it, or choose another folder.") from error
        yield


def _joined(parts: Sequence[Path], target: Path, expected: str | None) -> tuple[str, int]:
    """Write files one after the other, and the end of a tar file; the SHA-256 of it and its size. It appears whole.

    Raises:
        ArtefactError: if the SHA-256 is not the one expected; then it does not appear.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                with open(part, "rb") as source:
                    while chunk := source.read(CHUNK):
                        size += file.write(chunk)
                        digest.update(chunk)
            size += file.write(END)
            digest.update(END)
            file.flush()
            os.fsync(file.fileno())
        if expected is not None and digest.hexdigest() != expected:
            raise ArtefactError(
                f"{target.name} was made again and is not what {MANIFEST} says it was: this machine rounds otherwise than the one that "
                "began. Repeat the command there, or choose another folder."
            )
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return digest.hexdigest(), size


def _told(value: Any, other: Any) -> str:
    """For people: long digests cut, of mappings only what differs."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        parts = [
            f"{name} {_told(value.get(name), other.get(name))}"
            for name in value.keys() | other
            if value.get(name) != other.get(name)
        ]
        return ", ".join(sorted(parts))
    return f"{value[:16]}" if isinstance(value, str) and len(value) == 64 else f"{value}"
