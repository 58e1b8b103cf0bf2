"""Reading a folder of shards: what it says about itself, and its samples."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import ArtefactError
from fewstep.scale.members import read_members

__all__ = ["CHUNK", "FORMAT", "MANIFEST", "file_digest", "number_of", "read_manifest", "read_shards"]

MANIFEST = "shards.json"
FORMAT = 1
CHUNK = 1 << 20
NAME = re.compile(r"samples-(\d{6,12})\.tar")


def number_of(name: str) -> int:
    """Which shard a file is.

    Raises:
        ValueError: if it is none.

    Example:
        >>> number_of("samples-000012.tar")
        12
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no name of a shard")
    return int(found[1])


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder of shards says about itself.

    Raises:
        ArtefactError: if it is damaged, foreign or newer.
        FileNotFoundError: if there is none.
    """
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = document["kind"] == "fewstep-shards" and type(document["made_by"]["samples"]) is int
        known = known and all(_orderly(part) for part in (document["shards"], document.get("damaged", [])))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder / MANIFEST} cannot be read: it is damaged or foreign.") from error
    if not known or document.get("format") != FORMAT:
        raise ArtefactError(
            f"{folder / MANIFEST} is no manifest of shards of format {FORMAT}: it is foreign, or of a newer fewstep."
        )
    return document


def _orderly(shards: list[Mapping[str, Any]]) -> bool:
    """Whether every entry has what it needs, and they are in order."""
    numbers = [number_of(shard["name"]) for shard in shards]
    whole = all(type(shard["sha256"]) is str and type(shard["samples"]) is int for shard in shards)
    return whole and numbers == sorted(set(numbers))


def read_shards(
    folder: str | os.PathLike[str], count: int | None = None, *, partial: bool = False
) -> tuple[NDArray[Any], list[dict[str, Any]]]:
    """The first samples of a folder of shards, in the order of their indices, and what is said about each.

    Args:
        folder: that `fewstep.scale.sample_shards` wrote.
        count: at most so many; all when left out.
        partial: of a set that is not complete, take the samples that are there, which may have gaps.

    Raises:
        FileNotFoundError: if it is no such folder.
        ValueError: for a count below 1.
        ArtefactError: if a shard is missing or not what the manifest says, or there is none yet; without `partial`, if not all samples
            that are asked for are there.
    """
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    folder = Path(folder)
    document = read_manifest(folder)
    if not document["shards"]:
        raise ArtefactError(f"{folder} has no finished shard yet: repeat the command that began it.")
    if not partial:
        _check_there(folder, document, count)
    arrays: list[NDArray[Any]] = []
    about: list[dict[str, Any]] = []
    for shard in document["shards"]:
        if count is not None and len(arrays) >= count:
            break
        path = folder / shard["name"]
        if not path.is_file() or file_digest(path) != shard["sha256"]:
            wrong = f"is not what {MANIFEST} says it was" if path.is_file() else "is missing"
            raise ArtefactError(f"{path} {wrong}: repeat the command that wrote it, which mends it.")
        for array, told in read_members(path):
            arrays.append(array)
            about.append(told)
    return np.stack(arrays[:count]), about[:count]


def _check_there(folder: Path, document: Mapping[str, Any], count: int | None) -> None:
    """Refuse a set that has not the first `count` samples."""
    shards, total = document["shards"], document["made_by"]["samples"]
    there = sum(shard["samples"] for place, shard in enumerate(shards) if number_of(shard["name"]) == place)
    if there < (total if count is None else min(count, total)):
        have = sum(shard["samples"] for shard in shards)
        fewer = f", or ask for a count of at most {there}" if there else ""
        raise ArtefactError(
            f"{folder} is not complete: it has {have} of {total} samples, the first {there} without a gap. "
            f"Repeat the command that began it{fewer}, or read_shards(..., partial=True) for what is there."
        )
