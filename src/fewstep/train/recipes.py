"""How the shipped models are made: `RECIPES`, each everything that decides a model, and `train_recipe`, which makes it. And the classifier
whose features judge samples of `digits`: `train_classifier`.

`digits`: 1,797 scanned handwritten digits of 8 x 8 pixels (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, as in scikit-learn),
1,437 for training and 360 held out, stratified. `photos`: crops of two photographs that come with scikit-learn, averaged over 2 x 2 pixels;
the right quarter of each is held back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import MissingExtraError, UnknownNameError
from fewstep.models import SmallClassifier, SmallUNet, SmallUNetConfig, save_classifier, save_model
from fewstep.schedules import Flow, VPLinear
from fewstep.train.averages import PowerFunction, check_profiles
from fewstep.train.batches import Data
from fewstep.train.divergence import FACTOR
from fewstep.train.losses import DenoisingLoss, LabelDropout
from fewstep.train.stages import ADAMW
from fewstep.train.trainer import FitResult, Options, fit

__all__ = ["RECIPES", "RandomCrops", "Recipe", "digits", "photo_regions", "photos", "train_classifier", "train_recipe"]

DIGITS_HELD_OUT = 360
DIGITS_SPLIT_SEED = 1998
PHOTO_TRAINING_PART = 0.75
"""Left part of each photograph that training sees."""
CROP = 32
CHECKPOINT_EVERY = 200
WARMUP = 200


def digits(part: str = "train") -> dict[str, Tensor]:
    """The digits data, scaled from [0, 16] to [-1, 1]: ``{"x": "n 1 8 8", "label": "n"}``.

    Args:
        part: ``"train"`` (1,437 samples) or ``"held_out"`` (360), a fixed stratified split.

    Raises:
        MissingExtraError: if scikit-learn, which brings the data, is not installed.
    """
    if part not in ("train", "held_out"):
        raise ValueError(f'part must be "train" or "held_out", got {part!r}.')
    bunch = _sklearn_datasets().load_digits()
    images, labels = np.asarray(bunch["images"], np.float32), np.asarray(bunch["target"], np.int64)
    rows = np.flatnonzero(_held_out(labels) == (part == "held_out"))
    return {"x": torch.from_numpy(images[rows] / 8.0 - 1.0)[:, None], "label": torch.from_numpy(labels[rows])}


def _held_out(labels: np.ndarray) -> np.ndarray:
    """Which samples are held out: the share of every class is that of the whole, to a sample."""
    random = np.random.default_rng(DIGITS_SPLIT_SEED)
    order = random.permutation(len(labels))
    rank = np.empty(len(labels))  # position within its class, between 0 and 1, in random order
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        rank[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    held_out = np.zeros(len(labels), bool)
    held_out[np.argsort(rank, kind="stable")[:DIGITS_HELD_OUT]] = True
    return held_out


def photo_regions(part: str = "train") -> list[Tensor]:
    """The two photographs in [-1, 1], averaged over 2 x 2 pixels: the left three quarters, or the held-back right quarter, ``"3 h w"``.

    Raises:
        MissingExtraError: if scikit-learn, which brings the photographs, is not installed.
    """
    if part not in ("train", "held_out"):
        raise ValueError(f'part must be "train" or "held_out", got {part!r}.')
    regions = []
    for image in _sklearn_datasets().load_sample_images().images:
        pixels = torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1) / 127.5 - 1.0
        pixels = functional.avg_pool2d(pixels, 2)
        border = int(PHOTO_TRAINING_PART * pixels.shape[2])
        regions.append((pixels[:, :, :border] if part == "train" else pixels[:, :, border:]).contiguous())
    return regions


@dataclass(frozen=True)
class RandomCrops:
    """A source of random square crops, mirrored half of the time: ``(batch_size, generator) -> {"x": "batch 3 size size"}``."""

    images: list[Tensor] = field(repr=False)
    size: int

    def __call__(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        chance = torch.rand(batch_size, 4, generator=generator, dtype=torch.float64).tolist()
        return {"x": torch.stack([self._crop(*row) for row in chance])}

    def _crop(self, which: float, down: float, right: float, mirrored: float) -> Tensor:
        image = self.images[int(which * len(self.images))]
        top, left = int(down * (image.shape[1] - self.size + 1)), int(right * (image.shape[2] - self.size + 1))
        crop = image[:, top : top + self.size, left : left + self.size]
        return crop.flip(2) if mirrored < 0.5 else crop


def photos(part: str = "train") -> RandomCrops:
    """Random 32 x 32 crops of the photographs."""
    return RandomCrops(photo_regions(part), CROP)


def _sklearn_datasets() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "The data of the shipped models") from error
    return datasets


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a model.

    Attributes:
        data: gives the training data, as `fewstep.train.fit` takes them.
        network: options of the network.
        loss: the objective, with the noise schedule and the prediction.
        licence: on what terms the data were used, and whose they are.
        warmup: steps over which the learning rate rises; None: 200, or a tenth of the steps if that is less.
        others: options of `fewstep.train.fit` by these names; `ema` is one average, which becomes the model.

    Raises:
        ValueError: for values that make no sense.
    """

    data: Callable[[], Data]
    network: SmallUNetConfig
    loss: DenoisingLoss
    steps: int
    batch_size: int
    licence: str
    learning_rate: float = 1e-3
    warmup: int | None = None
    ema: float | PowerFunction = 0.999
    precision: torch.dtype | None = torch.bfloat16
    seed: int = 0
    decay: str = "cosine"
    floor: float = 0.0
    clip: float | None = 1.0
    accumulate: int = 1
    divergence: float | None = FACTOR
    checkpoint_every: int = CHECKPOINT_EVERY
    log_every: int = 50
    optimizer: Callable[..., Any] = field(default=ADAMW)

    def __post_init__(self) -> None:
        for name, least in WHOLE.items():
            value = getattr(self, name)
            if (type(value) is not int or value < least) and not (name == "warmup" and value is None):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if self.warmup is not None and self.warmup >= self.steps:
            raise ValueError(
                f"warmup={self.warmup} must be less than steps={self.steps}, or the learning rate never gets to its highest; leave warmup "
                "out for a tenth of the steps."
            )
        for name in ("learning_rate", "floor", "clip", "divergence"):
            value = getattr(self, name)
            if not (type(value) in (int, float) or (value is None and name in ("clip", "divergence"))):
                raise ValueError(f"{name} must be a number, got {value!r}.")
        if type(self.ema) not in (int, float, PowerFunction):
            raise ValueError(f"ema must be one decay, or one PowerFunction, got {self.ema!r}.")
        self.check()

    @property
    def rise(self) -> int:
        """The steps of the warm-up."""
        return min(WARMUP, self.steps // 10) if self.warmup is None else self.warmup

    def check(self) -> None:
        """Have `fewstep.train.fit` look at the options, before any data are read.

        Raises:
            ValueError: for options that make no sense.
        """
        names = ("steps", "batch_size", "learning_rate", "decay", "floor", "clip", "precision", "seed", "divergence")
        Options(ema=check_profiles(self.ema), warmup=self.rise, **{name: getattr(self, name) for name in names})

    def record(self) -> dict[str, Any]:
        """The recipe as JSON values, for the model's configuration."""
        options = {name: getattr(self, name) for name in ("steps", "batch_size", "learning_rate", "ema", "seed")}
        options["warmup"] = self.rise
        options |= {name: getattr(self, name) for name in OTHERS if getattr(self, name) != getattr(RECIPES["digits"], name)}
        data = getattr(self.data, "__name__", "pictures")
        return {
            **{name: _told(value) for name, value in options.items()},
            "precision": str(self.precision),
            "loss": repr(self.loss),
            "data": data,
        }


WHOLE = {"steps": 1, "batch_size": 1, "warmup": 0, "seed": 0, "accumulate": 1, "checkpoint_every": 1, "log_every": 1}
"""Options that are whole numbers, and their least."""
OTHERS = ("decay", "floor", "clip", "accumulate", "optimizer")
"""Options that a record has if they are not the usual ones."""


def _told(value: Any) -> Any:
    if isinstance(value, PowerFunction):
        return {"sigma_rel": value.sigma_rel}
    return [value.func.__name__, dict(value.keywords)] if isinstance(value, functools.partial) else value


RECIPES: dict[str, Recipe] = {
    "digits": Recipe(
        data=digits,
        network=SmallUNetConfig(1, 8, channels=(64, 128), blocks=(2, 3), classes=10, dropout=0.1),
        loss=DenoisingLoss(VPLinear(), "velocity", times="low_discrepancy", dropout=LabelDropout(null=10)),
        steps=6000,
        batch_size=128,
        licence=(
            "Weights: Apache-2.0. Trained on Optical Recognition of Handwritten Digits by E. Alpaydin and C. Kaynak, UCI Machine Learning "
            "Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/), in the copy of "
            "scikit-learn; pixel values rescaled."
        ),
    ),
    "photos": Recipe(
        data=photos,
        network=SmallUNetConfig(3, 32, channels=(64, 96, 128), blocks=(2, 2, 1), patch=2),
        loss=DenoisingLoss(Flow(), "flow", times="low_discrepancy"),
        steps=4500,
        batch_size=64,
        licence=(
            "Weights: Apache-2.0. Trained on patches of two photographs in the copies of scikit-learn, averaged over 2 x 2 pixels, cut "
            "and rescaled: china.jpg by Flickr user danielbuechele (https://www.flickr.com/photos/danielbuechele/6061409035/) and "
            "flower.jpg by Flickr user vultilion (https://www.flickr.com/photos/vultilion/6056698931/), both CC BY 2.0 "
            "(https://creativecommons.org/licenses/by/2.0/)."
        ),
    ),
}
"""Name -> recipe."""


def train_recipe(
    recipe: str | Recipe,
    folder: str | Path,
    *,
    steps: int | None = None,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    progress: bool = True,
    resume: bool = True,
    tensorboard: bool = False,
) -> FitResult:
    """Train a model by its recipe and write its folder: averaged weights in half precision, ready for `fewstep.load`.

    Checkpoints and the log lie in ``folder/training``; run again with the same options, training goes on from there.

    Args:
        recipe: one of your own, or the name of one of `RECIPES`.
        folder: where the model goes.
        steps, seed: other ones than the recipe's.
        device: where to train.
        threads: processor threads to use.
        progress: show a bar.
        resume: False starts afresh.
        tensorboard: also write event files for TensorBoard, into ``folder/training``.

    Returns:
        what `fit` returned.

    Raises:
        UnknownNameError: for an unknown recipe.
        MissingExtraError: if scikit-learn, which brings the data, is not installed.
    """
    name = recipe if isinstance(recipe, str) else None
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise UnknownNameError("recipe", recipe, RECIPES)
        recipe = RECIPES[recipe]
    given = {key: value for key, value in {"steps": steps, "seed": seed}.items() if value is not None}
    recipe = dataclasses.replace(recipe, **given)
    place, data = Path(folder), recipe.data()
    network = _initial(recipe).to(device)
    with _threads(threads):
        result = fit(
            recipe.loss,
            network,
            data,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            warmup=recipe.rise,
            ema=recipe.ema,
            precision=recipe.precision,
            seed=recipe.seed,
            folder=place / "training",
            resume=resume,
            progress=progress,
            tensorboard=tensorboard,
            **{name: getattr(recipe, name) for name in PASSED_ON},
        )
    if result.main:
        network = SmallUNet(recipe.network)
        network.load_state_dict(result.averages[recipe.ema])
        training = {"recipe": name, **recipe.record(), "last_loss": result.log[-1]["loss"] if result.log else None}
        about = {"schedule": recipe.loss.schedule, "predicts": recipe.loss.predicts, "licence": recipe.licence}
        save_model(place, network, **about, training=training)
    return result


PASSED_ON = ("decay", "floor", "clip", "accumulate", "divergence", "checkpoint_every", "log_every", "optimizer")


CLASSIFIER = {"steps": 800, "batch_size": 128, "learning_rate": 2e-3}
BLUR = 0.1
"""Standard deviation of the noise on the images that the classifier learns from."""


def train_classifier(path: str | Path | None = None, *, seed: int = 0, progress: bool = False) -> SmallClassifier:
    """Train the classifier of the digits on their training part, and write its file if a path is given.

    The shipped one is that of seed 0 on one processor thread. It takes about half a minute.

    Returns:
        the network, frozen.

    Raises:
        MissingExtraError: if scikit-learn, which brings the data, is not installed.
    """

    def objective(model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        noisy = batch["x"] + BLUR * torch.randn(batch["x"].shape, generator=generator)
        return functional.cross_entropy(model(noisy), batch["label"]), {}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallClassifier()
    fit(objective, network, digits("train"), **CLASSIFIER, ema=(), seed=seed, progress=progress)  # type: ignore[arg-type]
    if path is not None:
        training = {**CLASSIFIER, "noise": BLUR, "seed": seed, "data": "digits, training part"}
        save_classifier(path, network, licence=RECIPES["digits"].licence, training=training)
    return network.eval().requires_grad_(False)


def _initial(recipe: Recipe) -> SmallUNet:
    """The untrained network; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return SmallUNet(recipe.network)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
