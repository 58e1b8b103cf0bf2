"""Anything computed for a model is an artefact: one ``.safetensors`` file that holds numbers and says what they are.

The tensors are the numbers; the header carries one JSON document: kind, format, what they were computed for and how, and a SHA-256
over the document and the tensors, so that a file that was cut, edited or damaged is refused. Never pickle: loading executes nothing.
The checksum guards against accidents and careless edits; it is no signature, so trust a file as far as you trust its sender.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from fewstep.errors import ArtefactError

__all__ = ["FORMAT", "Artefact", "check_not_pickled", "frozen_json", "json_value", "read_as", "write_atomically"]

T = TypeVar("T")
FORMAT = 1
"""The newest format this version writes and reads."""
HEADER = "fewstep"
PICKLED = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
"""Endings of files of weights that are pickled."""
CONVERT = {
    "file": 'diffusers.StableDiffusionPipeline.from_single_file("OLD").save_pretrained("NEW")',
    "folder": 'diffusers.DiffusionPipeline.from_pretrained("OLD", use_safetensors=False).save_pretrained("NEW")',
}
"""How to make safetensors of a pickled file, or a folder of them; for another class of diffusers, its name."""
LARGEST_DOCUMENT = 16_000_000
"""Characters of JSON in the header; a plan has some thousands."""


@dataclass(frozen=True)
class Artefact:
    """Numbers and what they are.

    Args:
        kind: ``"plan"``, ``"statistics"``, ...
        meta: JSON values only, finite numbers.
        tensors: name to array; the dtype is kept.

    Example:
        >>> import numpy as np, tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "a.safetensors")
        >>> Artefact("demo", {"seed": 0}, {"x": np.arange(3.0)}).save(path)
        >>> Artefact.load(path, kind="demo").tensors["x"].tolist()
        [0.0, 1.0, 2.0]
    """

    kind: str
    meta: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def digest(self) -> str:
        """SHA-256 over the kind, the format, the meta data and every tensor with its name, dtype and shape."""
        hasher = hashlib.sha256(_dump({"kind": self.kind, "format": FORMAT, "meta": self.meta}).encode())
        for name in sorted(self.tensors):
            array = np.ascontiguousarray(self.tensors[name])
            hasher.update(_dump([name, array.dtype.str, list(array.shape)]).encode())
            hasher.update(array.tobytes())
        return hasher.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: to a temporary name first, then renamed, so that a crash leaves no half of it.

        Raises:
            ValueError: if the meta data is not JSON or holds numbers that are not finite.
            OSError: if the place cannot be written.
        """
        from safetensors.numpy import save

        document = _dump({"kind": self.kind, "format": FORMAT, "meta": self.meta, "sha256": self.digest()})
        arrays = {name: np.ascontiguousarray(array) for name, array in self.tensors.items()}
        write_atomically(path, save(arrays, metadata={HEADER: document}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, kind: str) -> Artefact:
        """Read a file that `save` wrote.

        Raises:
            ArtefactError: if it is truncated, damaged, foreign, of another kind or of a newer format.
            FileNotFoundError: if there is none.
        """
        document, tensors = _read(path)
        if not isinstance(document, dict) or document.keys() != {"kind", "format", "meta", "sha256"}:
            raise ArtefactError(f"{path} is not a fewstep file: its header is not what fewstep writes.")
        found, version, meta, checksum = (document[key] for key in ("kind", "format", "meta", "sha256"))
        if found != kind:
            raise ArtefactError(f"{path} holds a {found!r} artefact, not {kind!r}.")
        if type(version) is not int or version > FORMAT:
            raise ArtefactError(f"{path} has format {version!r}; this fewstep reads up to {FORMAT}. Upgrade fewstep.")
        if not isinstance(meta, dict) or version != FORMAT:
            raise ArtefactError(f"{path} is damaged: its header is not what fewstep writes.")
        artefact = cls(found, meta, tensors)
        if artefact.digest() != checksum:
            raise ArtefactError(f"{path} is damaged or was edited: its checksum does not fit its content. Make it anew.")
        return artefact


def read_as(
    path: str | os.PathLike[str], *, kind: str, what: str, unpack: Callable[[Artefact], T], pack: Callable[[T], Artefact]
) -> T:
    """Read a file into an object, and refuse it unless the object says all that the file says.

    Args:
        path: the file.
        kind: of the artefact.
        what: what it holds, in words.
        unpack, pack: from the artefact to the object, and back.

    Raises:
        ArtefactError: as `Artefact.load`; also if `unpack` refuses the content, or `pack` does not give it back to the bit.
        FileNotFoundError: if there is none.
    """
    artefact = Artefact.load(path, kind=kind)
    try:
        value = unpack(artefact)
        same = pack(value).digest() == artefact.digest()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise ArtefactError(f"{path} holds no valid {what}: {str(error)[:200]}") from error
    if not same:
        raise ArtefactError(f"{path} holds more than a {what}, or numbers of other types than a {what} has.")
    return value


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write bytes to a temporary file beside `path`, then rename it onto `path`.

    Raises:
        OSError: if the folder does not exist or cannot be written; nothing is left behind.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} into.")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:  # of the place that was asked for, not of the temporary name
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(target)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: of two equal ones a reader may take either."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def _read(path: str | os.PathLike[str]) -> tuple[Any, dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    if Path(path).exists() and not Path(path).is_file():
        raise ArtefactError(f"{path} is not a file.")
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            text = header.get(HEADER)
            if text is None or len(header) > 1:
                raise ArtefactError(f"{path} is a safetensors file, but fewstep did not write it.")
            if len(text) > LARGEST_DOCUMENT:
                raise ArtefactError(f"{path} has a header of {len(text)} characters; fewstep writes none above {LARGEST_DOCUMENT}.")
            document = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant, parse_float=_number)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, MemoryError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(
            f"{path} cannot be read: {type(error).__name__}: {str(error)[:200]}. It is truncated, damaged or foreign."
        ) from error
    return document, tensors


def json_value(value: Any) -> Any:
    """The value with mappings, sequences and NumPy numbers turned into plain JSON ones.

    Raises:
        TypeError: for anything JSON has no form for.

    Example:
        >>> json_value({"a": (1, np.float64(2.0))})
        {'a': [1, 2.0]}
    """
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form.")


def frozen_json(value: Any) -> Any:
    """The value as `json_value` gives it, unchangeable: mappings as read-only views, lists as tuples.

    Example:
        >>> frozen_json({"a": [1, 2]})["a"]
        (1, 2)
    """
    value = json_value(value)

    def frozen(part: Any) -> Any:
        if isinstance(part, dict):
            return MappingProxyType({key: frozen(item) for key, item in part.items()})
        return tuple(map(frozen, part)) if isinstance(part, list) else part

    return frozen(value)


def check_not_pickled(path: Path) -> None:
    """Refuse a file of weights that is pickled, and a folder that holds no others.

    Raises:
        ArtefactError: says how to convert it.
    """
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    pickled = [file for file in files if file.suffix.lower() in PICKLED]
    if pickled and not any(file.suffix.lower() == ".safetensors" for file in files):
        raise ArtefactError(
            f"{pickled[0]} is pickled, and opening it may run code, so fewstep does not. Convert it once, where you trust it, with "
            f"{CONVERT['folder' if path.is_dir() else 'file']}"
        )
