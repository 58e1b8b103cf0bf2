"""Pictures to train on, from a folder, a data set of the library `datasets`, or an .npz file: all of one square size, in [-1, 1].

A *folder of pictures*: one class without sub-folders; with sub-folders, each is a class, numbered by name. A folder that
``datasets.save_to_disk`` wrote is read without network; its columns are found by their types. Every picture is cut to its middle square and
scaled to the size; what is transparent becomes white, and of 16 bits the upper 8 are kept. Pictures are held as bytes, 3 KB for 32 x 32
pixels in colour.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import MissingExtraError

__all__ = ["ENDINGS", "Pictures", "read_pictures"]

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Of files that are pictures."""
DEEP = {"I;16": 256.0, "I;16B": 256.0, "I;16L": 256.0, "I": 256.0, "F": 1.0}
"""Modes of Pillow with more than 8 bits -> what is one step of 8 bits."""
GREY = ("1", "L", "LA", *DEEP)
"""Modes of Pillow without colour."""
DATASET_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")
"""By which a folder of `datasets` is known."""
ARRAYS, LABELS = ("x", "images", "image", "samples", "data", "arr_0"), ("label", "labels", "y")
"""Names of the arrays of an .npz file, and of columns, in the order in which they are looked for."""


@dataclass(frozen=True)
class Pictures:
    """Pictures and their classes, as rows that `fewstep.train.fit` takes.

    Args:
        pixels: ``"n channels size size"``, bytes, or floats in [-1, 1].
        labels: ``"n"``, or None.
        classes: their names.
        mirrored: whether every picture is there a second time, mirrored left to right.

    Example:
        >>> pictures = Pictures(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), None, mirrored=True)
        >>> len(pictures), pictures[torch.tensor([0, 5])]["x"].shape, pictures[torch.tensor([0])]["x"].min().item()
        (6, torch.Size([2, 1, 2, 2]), -1.0)
    """

    pixels: Tensor = field(repr=False)
    labels: Tensor | None = field(repr=False)
    classes: tuple[str, ...] = ()
    mirrored: bool = False

    def __len__(self) -> int:
        return len(self.pixels) * (2 if self.mirrored else 1)

    def __getitem__(self, rows: Tensor) -> dict[str, Tensor]:
        which, second = rows % len(self.pixels), rows >= len(self.pixels)
        x = self.pixels[which]
        x = x.float() / 127.5 - 1.0 if x.dtype is torch.uint8 else x
        if self.mirrored:
            x = torch.where(second[:, None, None, None], x.flip(3), x)
        return {"x": x} if self.labels is None else {"x": x, "label": self.labels[which]}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def told(self) -> list[Any]:
        """What they are, as JSON values, with a digest of all pixels and labels."""
        hasher = hashlib.sha256(self.pixels.numpy().tobytes())
        hasher.update(b"" if self.labels is None else self.labels.numpy().tobytes())
        return [list(self.pixels.shape), list(self.classes), self.mirrored, hasher.hexdigest()]


def read_pictures(path: str | os.PathLike[str], size: int, *, mirrored: bool = False, labelled: bool = True) -> Pictures:
    """Read all pictures of a folder, a saved data set or an .npz file.

    Args:
        path: where they are.
        size: height and width in pixels; an .npz file has its own, and 0 or that is the size to give.
        mirrored: add every picture mirrored left to right.
        labelled: whether classes are wanted, if there are any.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it holds no pictures, or some that cannot be read, of another shape or outside of [-1, 1].
        MissingExtraError: if Pillow or `datasets` is needed and not installed.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"there is no {place}: wanted a folder of pictures, a folder of `datasets`, or an .npz file.")
    if place.is_file():
        pixels, labels, classes = _arrays(place, size)
    elif size < 1:
        raise ValueError(f"the pictures need a size of at least 1 pixel, got {size}.")
    elif any((place / name).is_file() for name in DATASET_FILES):
        pixels, labels, classes = _data_set(place, size)
    else:
        pixels, labels, classes = _folder(place, size)
    if len(pixels) < 2:
        raise ValueError(f"{place} holds {len(pixels)} picture; training needs at least 2.")
    if not labelled or not classes:
        labels, classes = None, ()
    return Pictures(pixels, labels, classes, mirrored)


# ---- a folder ------------------------------------------------------------------------------------------------------------------------


def _folder(place: Path, size: int) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    groups = {folder.name: _files(folder.rglob("*")) for folder in sorted(place.iterdir()) if folder.is_dir()}
    groups = {name: files for name, files in groups.items() if files and not name.startswith(".")}
    loose = _files(place.iterdir())
    if not groups and not loose:
        raise ValueError(f"{place} holds no pictures ({', '.join(ENDINGS)}), nor sub-folders with some.")
    if groups and loose:
        raise ValueError(
            f"{place} holds pictures ({loose[0].name}, ...) beside sub-folders with pictures ({next(iter(groups))}, ...), "
            "which are classes. Put every picture into a sub-folder, or name a folder without any."
        )
    files = loose or [file for found in groups.values() for file in found]
    labels = [number for number, found in enumerate(groups.values()) for _ in found]
    return _scaled([_Source(str(file), file) for file in files], size), torch.tensor(labels) if groups else None, tuple(groups)


def _files(paths: Any) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file())


@dataclass(frozen=True)
class _Source:
    """One picture: what to call it, and a file or an opened one."""

    name: str
    content: Any

    def open(self) -> Any:
        from PIL import Image, UnidentifiedImageError

        if not isinstance(self.content, (str, os.PathLike)):
            return self.content
        try:
            return Image.open(self.content)
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(
                f"{self.name} is no picture that Pillow can read: {str(error)[:120]}. Remove or replace it."
            ) from error


def _scaled(sources: Sequence[_Source], size: int) -> Tensor:
    """All pictures as bytes, ``"n channels size size"``: grey if all of them are."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("Pillow", "train", "Reading pictures") from error
    from tqdm import tqdm

    grey = True
    for source in sources:  # the modes stand in the first bytes of the files
        with source.open() as picture:
            grey = grey and picture.mode in GREY
    shown = tqdm(sources, desc="reading pictures", unit="picture", leave=False, delay=2.0)
    return torch.from_numpy(np.stack([_square(source, size, grey) for source in shown]))


def in_8_bits(picture: Any) -> Any:
    """A picture of Pillow with 16 bits, or of floats, in 8. The mode alone decides on the scale, so that bright pictures stay brighter.

    Modes ``"I;16"`` and ``"I"``, as which Pillow opens 16 bits, lose their lower 8; floats are values up to 255. Other modes stay.
    """
    from PIL import Image

    if picture.mode not in DEEP:
        return picture
    return Image.fromarray(np.clip(np.asarray(picture, np.float64) / DEEP[picture.mode], 0.0, 255.0).astype(np.uint8))


def _square(source: _Source, size: int, grey: bool) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with source.open() as picture:
            picture = ImageOps.exif_transpose(picture)
            picture = in_8_bits(picture)
            if "A" in picture.getbands() or "transparency" in picture.info:
                above = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
            picture = ImageOps.fit(picture.convert("L" if grey else "RGB"), (size, size), Image.Resampling.BICUBIC)
            array = np.asarray(picture, np.uint8)
    except OSError as error:
        raise ValueError(f"{source.name} is damaged: {str(error)[:120]}. Remove or replace it.") from error
    return array[None] if grey else array.transpose(2, 0, 1).copy()


# ---- a data set ----------------------------------------------------------------------------------------------------------------------


def _data_set(place: Path, size: int) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "train", f"Reading {place}") from error
    found: Any = datasets.load_from_disk(str(place))
    if isinstance(found, dict):  # of parts
        name = "train" if "train" in found else next(iter(found))
        found = found[name]
    features = found.features
    image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise ValueError(
            f"{place} has no column of pictures; its columns are {', '.join(f'{n} ({k})' for n, k in features.items())}."
        )
    label = next((name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    label = label or next(
        (name for name in LABELS if name in features and "int" in str(getattr(features[name], "dtype", ""))), None
    )
    pixels = _scaled([_Source(f"picture {i} of {place}", row[image]) for i, row in enumerate(found.select_columns([image]))], size)
    if label is None:
        return pixels, None, ()
    labels = torch.tensor(found[label][:] if not isinstance(found[label], list) else found[label])
    names = getattr(features[label], "names", None) or [str(number) for number in range(int(labels.max()) + 1)]
    return pixels, _checked_labels(labels, len(names), place), tuple(names)


def _checked_labels(labels: Tensor, classes: int, place: Path) -> Tensor:
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"{place} has labels from {int(labels.min())} to {int(labels.max())}; wanted 0 to {classes - 1}.")
    return labels.long()


# ---- arrays --------------------------------------------------------------------------------------------------------------------------


def _arrays(file: Path, size: int) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    try:
        with np.load(file, allow_pickle=False) as loaded:
            arrays = dict(loaded)
    except (ValueError, OSError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no .npz file of plain numbers, nor a folder.") from error
    name = next((name for name in ARRAYS if name in arrays), None)
    if name is None:
        raise ValueError(f"{file} holds {', '.join(arrays) or 'nothing'}, but no array {', '.join(ARRAYS)}.")
    x = arrays[name]
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[2] != x.shape[3] or x.dtype.kind not in "uif" or (x.dtype.kind in "ui" and x.dtype != np.uint8):
        raise ValueError(
            f"{file} holds {name} as {x.dtype} of shape {x.shape}; wanted bytes, or floats in [-1, 1], (n, channels, size, size)."
        )
    if x.dtype.kind == "f" and not (np.isfinite(x).all() and np.abs(x).max() <= 1.0 + 1e-6):
        raise ValueError(
            f"{file} holds {name} between {x.min():.4g} and {x.max():.4g}; floats must lie in [-1, 1]. Scale them, or save bytes."
        )
    if size not in (0, x.shape[2]):
        raise ValueError(f"{file} holds pictures of {x.shape[2]} x {x.shape[2]} pixels, which is the size; got {size}.")
    pixels = torch.from_numpy(np.ascontiguousarray(x if x.dtype == np.uint8 else x.astype(np.float32)))
    labels, classes = _labels_of(arrays, len(x), file)
    if x.dtype.kind == "f" and x.min() >= 0.0:
        warnings.warn(f"{file} holds {name} with no value below 0: is this [0, 1]? Pictures in [-1, 1] are 2 x - 1.", stacklevel=4)
    return pixels, labels, classes


def _labels_of(arrays: dict[str, Any], count: int, file: Path) -> tuple[Tensor | None, tuple[str, ...]]:
    label = next((arrays[name] for name in LABELS if name in arrays), None)
    if label is None:
        return None, ()
    if label.shape != (count,) or label.dtype.kind not in "iu":
        raise ValueError(f"{file} holds labels {label.dtype} of shape {label.shape}; wanted one whole number a picture.")
    labels = torch.from_numpy(label.astype(np.int64))
    return _checked_labels(labels, int(labels.max()) + 1, file), tuple(str(i) for i in range(int(labels.max()) + 1))
