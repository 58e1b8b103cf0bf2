"""Samples as members of WebDataset shards: ``00000012.npy``, ``00000012.png``, ``00000012.json`` in a plain tar file.

Equal samples give equal bytes: headers hold no time, owner or name of a machine, arrays and JSON have one form, and the compression of
pictures is fixed. What loads WebDataset's format (the library webdataset, ``datasets.load_dataset("webdataset", ...)``) reads them.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.artefacts import json_value
from fewstep.errors import ArtefactError

__all__ = ["END", "Drawn", "encoded", "member", "png", "read_members"]

END = bytes(2 * tarfile.BLOCKSIZE)
"""What a tar file ends with."""
DIGITS = 8
"""Of a sample's index in names."""


@dataclass(frozen=True)
class Drawn:
    """Some samples.

    Attributes:
        rows: their indices.
        samples: ``"batch *shape"``.
        about: what is said about each: its index, its seed, its label where it has one.
        latents: what the samples were decoded from, if they were.
        data_range: what a picture shows as black and white; None if the samples are no pictures.
    """

    rows: range
    samples: NDArray[Any]
    about: Sequence[Mapping[str, Any]]
    latents: NDArray[Any] | None = None
    data_range: tuple[float, float] | None = None


def encoded(drawn: Drawn) -> bytes:
    """The members of all samples, in order."""
    low, high = drawn.data_range or (0.0, 0.0)
    shown = drawn.data_range is not None and drawn.samples.ndim == 4 and drawn.samples.shape[1] in (1, 3)
    parts = []
    for k, i in enumerate(drawn.rows):
        key, sample = f"{i:0{DIGITS}d}", drawn.samples[k]
        parts.append(member(f"{key}.npy", _npy(sample)))
        if drawn.latents is not None:
            parts.append(member(f"{key}.latents.npy", _npy(drawn.latents[k])))
        if shown:
            pixels = np.clip((sample.astype(np.float64) - low) / (high - low), 0.0, 1.0)
            parts.append(member(f"{key}.png", png(np.rint(255.0 * pixels).astype(np.uint8).transpose(1, 2, 0))))
        about = json.dumps(json_value(drawn.about[k]), sort_keys=True, separators=(",", ":"))
        parts.append(member(f"{key}.json", about.encode()))
    return b"".join(parts)


def member(name: str, content: bytes) -> bytes:
    """A file of a tar archive: its header and its content, padded.

    Example:
        >>> len(member("a.txt", b"hello"))
        1024
    """
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def png(pixels: NDArray[np.uint8]) -> bytes:
    r"""A PNG of ``"height width channels"`` with 1 channel (gray) or 3 (red, green, blue).

    Example:
        >>> png(np.zeros((2, 2, 1), np.uint8))[:4]
        b'\x89PNG'
    """
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # the first byte of a line: not filtered
    lines[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 6)) + chunk(b"IEND", b"")


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def read_members(path: Path) -> Iterator[tuple[NDArray[Any], dict[str, Any]]]:
    """The samples of a shard, and what is said about each.

    Raises:
        ArtefactError: if it cannot be read.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            array: NDArray[Any] | None = None
            for info in archive:
                kind = info.name.partition(".")[2]
                content = archive.extractfile(info)
                if content is None or kind not in ("npy", "json"):
                    continue
                if kind == "npy":
                    array = np.lib.format.read_array(io.BytesIO(content.read()), allow_pickle=False)
                elif array is not None:
                    yield array, json.loads(content.read())
                    array = None
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ArtefactError(f"{path} is no shard of samples: {error}. It is truncated, damaged or foreign.") from error
