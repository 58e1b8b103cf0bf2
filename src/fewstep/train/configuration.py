"""A run as a file: JSON or TOML with sections, every key of which has a default but the data.

| section | keys |
| --- | --- |
| `data` | `path`: digits, photos, a folder or .npz file, relative to the file; `size`, `mirrored`, `labelled` |
| `network` | the options of `fewstep.models.SmallUNetConfig` that the data leave open |
| `schedule` | `kind` (Flow, VPLinear, VPCosine, EDM, ...) and its options |
| `loss` | `predicts`, `weighting`, `times` and what else `fewstep.train.DenoisingLoss` takes; `label_dropout` |
| `optimizer` | `name`, and options of that class of PyTorch; of adamw those that are not given are betas (0.9, 0.99), no weight decay |
| `training` | the options of `fewstep.train.Recipe` |

Keys that do not exist are refused with the nearest that do. `Configuration.document` is the file that makes the same run again.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import UnknownNameError
from fewstep.models import SmallUNetConfig
from fewstep.schedules import Flow, from_config
from fewstep.train.averages import PowerFunction
from fewstep.train.losses import DenoisingLoss, LabelDropout
from fewstep.train.optim4bit import AdamW4bit, SGD4bit
from fewstep.train.pictures import Pictures, read_pictures
from fewstep.train.recipes import RECIPES, Recipe
from fewstep.train.stages import ADAMW

__all__ = ["OPTIMIZERS", "Configuration", "read_configuration"]

SIZE = 32
"""Height and width of pictures, if nothing is said."""
LABEL_DROPOUT = 0.1
OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "adamw4bit": AdamW4bit,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "sgd4bit": SGD4bit,
}
"""Name -> class, called as ``(parameters, lr=..., **options)``."""
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
DATA = ("path", "size", "mirrored", "labelled")
GIVEN_BY_DATA = ("in_channels", "image_size", "classes")
NOT_OPTIONS = ("data", "network", "loss", "licence", "optimizer")
"""Fields of a recipe that have sections of their own."""


@dataclass(frozen=True)
class Configuration:
    """The sections of a run, as JSON values; the ones left out are empty.

    Args:
        data, network, schedule, loss, optimizer, training: the sections.
        place: the folder that a path of the data is relative to.

    Example:
        >>> Configuration(data={"path": "digits"}, training={"steps": 3}).recipe().steps
        3
    """

    data: Mapping[str, Any]
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schedule: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loss: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: Path = Path()

    def __post_init__(self) -> None:
        _known("data", self.data, DATA)
        _known("network", self.network, [f.name for f in dataclasses.fields(SmallUNetConfig) if f.name not in GIVEN_BY_DATA])
        _known("loss", self.loss, [*_loss_options(), "label_dropout"])
        _known("training", self.training, [f.name for f in dataclasses.fields(Recipe) if f.name not in NOT_OPTIONS])
        if not isinstance(self.data.get("path"), str):
            raise ValueError("the section data needs a path: digits, photos, a folder of pictures, or an .npz file.")

    def recipe(self) -> Recipe:
        """Everything that decides the model; reads the pictures.

        Raises:
            ValueError: for values that make no sense, with the name of their section.
        """
        if self.data["path"] in RECIPES:
            return self._shipped(RECIPES[self.data["path"]])
        options = {name: value for name, value in self.data.items() if name != "path"}
        path = self.place / self.data["path"]
        options.setdefault("size", 0 if path.is_file() else SIZE)
        pictures = _made("data", read_pictures, path, **options)
        labelled = pictures.labels is not None
        network = _made("network", default_network, pictures.shape, len(pictures.classes) if labelled else None, self.network)
        base = Recipe(
            data=functools.partial(_given, pictures),
            network=network,
            loss=DenoisingLoss(Flow(), "flow", times="low_discrepancy"),
            steps=5000,
            batch_size=min(64, len(pictures)),
            licence="",
            precision=None,
        )
        dropout = self.loss.get("label_dropout", LABEL_DROPOUT if labelled else 0.0)
        if dropout and not labelled:
            raise ValueError("label_dropout in the section loss needs pictures with classes; these have none.")
        return self._finished(base, LabelDropout(len(pictures.classes), dropout) if dropout else None)

    def _shipped(self, recipe: Recipe) -> Recipe:
        """A shipped recipe with other options."""
        if len(self.data) > 1:
            raise ValueError(
                f"{self.data['path']} has its own size and labels; leave {', '.join(sorted(set(self.data) - {'path'}))} out."
            )
        network = _made("network", dataclasses.replace, recipe.network, **self.network)
        dropout = recipe.loss.dropout
        if "label_dropout" in self.loss:
            if network.classes is None:
                raise ValueError(f"label_dropout in the section loss needs data with classes; {self.data['path']} has none.")
            dropout = LabelDropout(network.classes, self.loss["label_dropout"])
        return self._finished(dataclasses.replace(recipe, network=network), dropout)

    def _finished(self, recipe: Recipe, dropout: LabelDropout | None) -> Recipe:
        schedule = _made("schedule", from_config, self.schedule) if self.schedule else recipe.loss.schedule
        options = {name: value for name, value in self.loss.items() if name != "label_dropout"}
        loss = _made("loss", dataclasses.replace, recipe.loss, schedule=schedule, dropout=dropout, **options)
        training = dict(self.training)
        if "precision" in training:
            if training["precision"] not in PRECISIONS:
                raise UnknownNameError("precision in the section training", training["precision"], PRECISIONS)
            training["precision"] = PRECISIONS[training["precision"]]
        if isinstance(training.get("ema"), Mapping):
            _known("training.ema", training["ema"], ["sigma_rel"])
            training["ema"] = _made("training", PowerFunction, **training["ema"])
        if self.optimizer:
            training["optimizer"] = make_optimizer(self.optimizer)
        return _made("training", dataclasses.replace, recipe, loss=loss, **training)

    def document(self) -> dict[str, Any]:
        """The sections that are not empty, with a path that holds from anywhere: the file that makes this run again."""
        found = {
            f.name: dict(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "place" and getattr(self, f.name)
        }
        if self.data["path"] not in RECIPES:
            found["data"]["path"] = str((self.place / self.data["path"]).resolve())
        return found


def read_configuration(path: str | os.PathLike[str]) -> Configuration:
    """Read a file.

    Raises:
        ValueError: if it is neither JSON nor TOML, or has sections or keys that do not exist.
        FileNotFoundError: if there is none.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no configuration {file}.")
    try:
        document = _toml(file) if file.suffix.lower() == ".toml" else json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid {file.suffix.lower()[1:].upper() or 'JSON'}: {str(error)[:200]}.") from error
    sections = [f.name for f in dataclasses.fields(Configuration) if f.name != "place"]
    if not isinstance(document, dict) or not all(isinstance(value, dict) for value in document.values()):
        raise ValueError(f"{file} must consist of sections ({', '.join(sections)}), each with keys and values.")
    _known("file", document, sections, "section")
    if "data" not in document:
        raise ValueError(f"{file} has no section data, which says what to train on: its key path.")
    return Configuration(**document, place=file.parent)


def _toml(file: Path) -> Any:
    try:
        import tomllib
    except ImportError as error:
        raise ValueError("reading TOML needs Python 3.11; write the same as JSON") from error
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _known(section: str, given: Mapping[str, Any], known: Iterable[str], what: str = "key") -> None:
    known = list(known)
    for key in given:
        if key not in known:
            raise UnknownNameError(f"{what} of the {section}" if what == "section" else f"key of the section {section}", key, known)


def _made(section: str, make: Any, *arguments: Any, **options: Any) -> Any:
    """What a function makes of the values of a section; its complaints say which."""
    try:
        return make(*arguments, **options)
    except TypeError as error:
        raise ValueError(f"in the section {section}: {error}") from error
    except UnknownNameError:
        raise
    except ValueError as error:
        raise ValueError(f"in the section {section}: {error}") from error


def _loss_options() -> list[str]:
    return [f.name for f in dataclasses.fields(DenoisingLoss) if f.name not in ("schedule", "dropout")]


def _given(pictures: Pictures) -> Pictures:
    return pictures


def default_network(shape: tuple[int, int, int], classes: int | None, options: Mapping[str, Any]) -> SmallUNetConfig:
    """A network for pictures of a size: patches so that about 16 x 16 are left, two or three levels.

    Example:
        >>> default_network((3, 64, 64), None, {}).patch
        4
    """
    channels, size, _ = shape
    patch = options.get("patch") or next(
        p for p in range(max(1, size // 16), 0, -1) if size % p == 0 and (size // p % 2 == 0 or p == 1)
    )
    side = size // patch
    chosen: dict[str, Any] = (
        {"channels": (64, 128), "blocks": (2, 3)} if side <= 8 or side % 4 else {"channels": (64, 96, 128), "blocks": (2, 2, 1)}
    )
    if "channels" in options and "blocks" not in options:
        chosen["blocks"] = (2,) * len(options["channels"])
    return SmallUNetConfig(channels, size, **{**chosen, "patch": patch, "classes": classes, **options})


def make_optimizer(options: Mapping[str, Any]) -> Any:
    """What `fewstep.train.fit` calls, from the section optimizer."""
    given = dict(options)
    name = given.pop("name", "adamw")
    if name not in OPTIMIZERS:
        raise UnknownNameError("optimizer", name, OPTIMIZERS)
    if name == "adamw":
        given = {**ADAMW.keywords, **given}  # to name what is used anyway changes nothing
    known = [key for key in inspect.signature(OPTIMIZERS[name]).parameters if key not in ("params", "lr")]
    _known("optimizer", given, known)
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    made = ADAMW if name == "adamw" and given == ADAMW.keywords else functools.partial(OPTIMIZERS[name], **given)
    _made("optimizer", made, [torch.zeros(1, requires_grad=True)], lr=1e-3)
    return made
