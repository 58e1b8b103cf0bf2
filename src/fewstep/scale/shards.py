"""A folder of shards: what is in it, what it was made by, and how it grows.

    samples-000000.tar ...   WebDataset shards, each a whole number of blocks (`fewstep.scale.members`)
    plan.safetensors         the plan
    shards.json              what decides the samples, and every finished shard with its SHA-256
    .blocks/                 finished blocks of shards that are not, until the set is complete

Everything appears under its name when it is written whole. `shards.json` says nothing about workers or times: the same samples give the
same folder to the byte.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.artefacts import json_value, write_atomically
from fewstep.errors import ArtefactError
from fewstep.scale.job import Job
from fewstep.scale.members import END, read_members
from fewstep.version import __version__

__all__ = ["MANIFEST", "ShardSet", "key_of", "read_shards"]

MANIFEST = "shards.json"
PLAN = "plan.safetensors"
UNFINISHED = ".blocks"
FORMAT = 1
CHUNK = 1 << 20


def key_of(job: Job, model: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the samples of a job, as JSON values.

    Args:
        job: the job.
        model: as `fewstep.identity.identity` tells it.
    """
    seeds = job.seeds
    run = len(seeds) < 2 or all(int(b) - int(a) == 1 for a, b in itertools.pairwise(seeds))
    listed = hashlib.sha256(np.asarray(seeds, np.int64).tobytes()).hexdigest()
    return json_value(
        {
            "plan": job.plan.digest,
            "model": model,
            "samples": len(seeds),
            "seeds": {"first": int(seeds[0])} if run else {"sha256": listed},
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
    """A folder that blocks are put into, in any order and by any number of runs, until it is complete.

    Args:
        folder: made if it does not exist; its parent has to.
        job: what is drawn.
        model: as `fewstep.identity.identity` tells it.
        blocks_per_shard: how many blocks a shard holds.

    Attributes:
        missing: the blocks that are neither in a shard nor kept.
        damaged: names of shards that were listed and are not what they were; their blocks are missing.

    Raises:
        ArtefactError: if the folder holds samples of something else, which both are named, or something that is no set of samples.
        ValueError: for less than 1 block a shard.
    """

    def __init__(self, folder: str | os.PathLike[str], job: Job, model: Mapping[str, Any], *, blocks_per_shard: int = 16):
        if blocks_per_shard < 1:
            raise ValueError(f"a shard holds at least 1 block, got {blocks_per_shard}.")
        self.folder, self.job = Path(folder), job
        self.key = key_of(job, model) | {"blocks_per_shard": blocks_per_shard}
        self._per_shard = blocks_per_shard
        self._listed = self._known()
        self._unfinished.mkdir(parents=True, exist_ok=True)
        self._expected = {shard["name"]: shard["sha256"] for shard in self._listed.values()}
        self.damaged = [shard["name"] for shard in self._listed.values() if not self._intact(shard)]
        self._listed = {k: shard for k, shard in self._listed.items() if shard["name"] not in self.damaged}
        if not (self.folder / PLAN).exists():
            job.plan.save(self.folder / PLAN)
        self._write()
        self._kept = self._kept_blocks()
        for shard in range(self.shards):
            if shard not in self._listed:
                self._finish(shard)
        kept = set(self._kept)
        self.missing = [b for b in range(job.blocks) if b // blocks_per_shard not in self._listed and b not in kept]

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

    def close(self) -> None:
        """Take the folder of unfinished blocks away if the set is complete."""
        if self.complete:
            shutil.rmtree(self._unfinished, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within it no other run may write here; a lock goes with the process that has it.

        Raises:
            ArtefactError: if another run does.
        """
        try:
            import fcntl
        except ImportError:  # no POSIX: then it is left to the user
            yield
            return
        with open(self._unfinished / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ArtefactError(f"another run writes into {self.folder}: wait for it, or choose another folder.") from error
            yield

    def _known(self) -> dict[int, dict[str, Any]]:
        """The finished shards that the manifest lists, if there is one."""
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file; shards are written into a folder.")
        if not self.folder.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder.parent} to write {self.folder.name} into.")
        if not (self.folder / MANIFEST).exists():
            if self.folder.exists() and any(not file.name.startswith(".") and file.name != PLAN for file in self.folder.iterdir()):
                raise ArtefactError(f"{self.folder} holds other files and no {MANIFEST}: choose another folder for the shards.")
            return {}
        document = read_manifest(self.folder)
        for name, mine in self.key.items():
            if (theirs := document["made_by"].get(name)) != mine:
                raise ArtefactError(
                    f"{self.folder} holds samples with {name} {_told(theirs, mine)}, and this run has {_told(mine, theirs)}: "
                    "choose another folder, or repeat the command that began it."
                )
        return {int(shard["name"][8:-4]): shard for shard in document["shards"]}

    def _intact(self, shard: Mapping[str, Any]) -> bool:
        path = self.folder / shard["name"]
        return path.is_file() and _digest(path) == shard["sha256"]

    def _kept_blocks(self) -> dict[int, Path]:
        """Blocks of earlier runs; what is not what its name says goes."""
        kept = {}
        for path in sorted(self._unfinished.glob("*.tar")):
            block, _, digest = path.stem.partition("-")
            if _digest(path) == digest and int(block) // self._per_shard not in self._listed:
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
        digest, size = _joined([self._kept[block] for block in blocks], self.folder / name)
        if self._expected.get(name, digest) != digest:
            raise ArtefactError(
                f"{name} was made again and is not what {MANIFEST} says it was: this machine rounds otherwise than the one that began. "
                "Choose another folder."
            )
        samples = sum(len(self.job.rows(block)) for block in blocks)
        self._listed[shard] = {"name": name, "sha256": digest, "samples": samples, "bytes": size}
        self._write()
        for block in blocks:
            self._kept.pop(block).unlink()

    def _write(self) -> None:
        document = {"format": FORMAT, "kind": "fewstep-shards", "made_by": self.key}
        document |= {"complete": self.complete, "shards": [shard for _, shard in sorted(self._listed.items())]}
        write_atomically(self.folder / MANIFEST, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def _joined(parts: Sequence[Path], target: Path) -> tuple[str, int]:
    """Write files one after the other, and the end of a tar file; the SHA-256 of it and its size. It appears whole."""
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
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return digest.hexdigest(), size


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder of shards says about itself.

    Raises:
        ArtefactError: if it is damaged, foreign or newer.
    """
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = document["kind"] == "fewstep-shards" and isinstance(document["made_by"], dict)
        known = known and all({"name", "sha256", "samples"} <= set(shard) for shard in document["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder / MANIFEST} cannot be read: it is damaged or foreign.") from error
    if not known or document.get("format") != FORMAT:
        raise ArtefactError(
            f"{folder / MANIFEST} is no manifest of shards of format {FORMAT}: it is foreign, or of a newer fewstep."
        )
    return document


def read_shards(folder: str | os.PathLike[str], count: int | None = None) -> tuple[NDArray[Any], list[dict[str, Any]]]:
    """The first samples of a folder of shards, in the order of their indices, and what is said about each.

    Args:
        folder: that `fewstep.scale.sample_shards` wrote; it may be incomplete.
        count: at most so many; all when left out.

    Raises:
        FileNotFoundError: if it is no such folder.
        ArtefactError: if a shard is not what the manifest says, or there is none yet.
    """
    arrays: list[NDArray[Any]] = []
    about: list[dict[str, Any]] = []
    for shard in read_manifest(Path(folder))["shards"]:
        if count is not None and len(arrays) >= count:
            break
        path = Path(folder) / shard["name"]
        if _digest(path) != shard["sha256"]:
            raise ArtefactError(f"{path} is not what {MANIFEST} says it was: repeat the command that wrote it, which mends it.")
        for array, told in read_members(path):
            arrays.append(array)
            about.append(told)
    if not arrays:
        raise ArtefactError(f"{folder} has no finished shard yet: repeat the command that began it.")
    return np.stack(arrays[:count]), about[:count]
