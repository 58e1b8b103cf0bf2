"""``fewstep train``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.cli.options import option

CLASSIFIER = "digits-classifier"
CONFIGURATIONS = (".json", ".toml")
SHEET = {"count": 16, "nfe": 20}
"""The samples that show the new model."""
TRAINING = ("steps", "batch_size", "learning_rate", "seed", "accumulate", "precision")
"""Options that stand in the section training of a configuration."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of the command."""

    what: str = option(
        None,
        "a folder of pictures (sub-folders are classes), a folder of the library datasets, an .npz file, a .json or .toml file with every "
        "option of a run, or digits or photos; digits-classifier is the network whose features judge digits",
        positional=True,
    )
    out: str = option("model", "folder for the model, for the classifier a file; an interrupted training there is taken up again")
    size: int | None = option(None, "height and width of the pictures, which are cut and scaled to it (default: 32)", kind=int)
    mirrored: bool = option(False, "learn from every picture mirrored left to right, too")
    steps: int = option(0, "optimizer steps; 0: as the configuration says, 5000 for pictures of your own")
    batch_size: int = option(0, "pictures in a step; 0: as the configuration says, 64")
    learning_rate: float = option(0.0, "the highest; 0: as the configuration says, 0.001")
    accumulate: int = option(0, "pieces that a step works its pictures out in, to save memory; 0: as the configuration says, 1")
    precision: str = option(
        None, "of the network while it is trained; the weights stay in float32", choices=("float32", "bfloat16", "float16")
    )
    seed: int = option(-1, "seed of everything; -1: as the configuration says, 0")
    device: str = option("cpu", "where to train")
    threads: int = option(0, "processor threads; 0 leaves the choice to PyTorch")
    tensorboard: bool = option(False, "also log for TensorBoard, into OUT/training/tensorboard")
    no_samples: bool = option(False, "do not draw samples of the new model at the end")
    afresh: bool = option(False, "begin anew, even if there is an interrupted training")
    quiet: bool = option(False, "no progress bar and no messages")


OPTIONS = {"train": TrainOptions}


def run(options: TrainOptions) -> int:
    """Train a model into a folder."""
    return _classifier(options) if options.what == CLASSIFIER else _model(options)


def _classifier(options: TrainOptions) -> int:
    from fewstep.train.recipes import train_classifier

    allowed = TrainOptions(what=options.what, out=options.out, seed=options.seed, quiet=options.quiet)
    if options != allowed:
        raise ValueError(f"{CLASSIFIER} takes --out, --seed and --quiet only.")
    folder = Path(options.out).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to write {Path(options.out).name} into.")
    train_classifier(options.out, seed=max(0, options.seed), progress=not options.quiet)
    if not options.quiet:
        print(f"written to {options.out}")
    return 0


def _model(options: TrainOptions) -> int:
    import torch

    from fewstep.artefacts import write_atomically
    from fewstep.train.recipes import train_recipe

    if options.threads < 0:
        raise ValueError(f"--threads must be at least 0, got {options.threads}.")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device} cannot be used: {str(error).splitlines()[0][:200]}") from error
    place = Path(options.out)
    if place.exists() and not place.is_dir():
        raise ValueError(f"--out {place} is a file; wanted a folder for the model.")
    configuration = _configuration(options)
    recipe = configuration.recipe()
    result = train_recipe(
        recipe,
        place,
        device=options.device,
        threads=options.threads or None,
        progress=not options.quiet,
        resume=not options.afresh,
        tensorboard=options.tensorboard,
    )
    if not result.main:
        return 0
    write_atomically(place / "train.json", (json.dumps(configuration.document(), indent=2) + "\n").encode())
    if not options.quiet:
        print(f"written to {place}; sample with: fewstep sample {place}")
    if not options.no_samples:
        _sheet(place, recipe, options)
    return 0


def _configuration(options: TrainOptions) -> Any:
    """The sections of the run: of a file, or of data alone; with what the command line says."""
    from fewstep.errors import UnknownNameError
    from fewstep.train.configuration import Configuration, read_configuration
    from fewstep.train.recipes import RECIPES

    what = Path(options.what)
    if what.suffix.lower() in CONFIGURATIONS and options.what not in RECIPES:
        found = read_configuration(what)
    elif options.what in RECIPES or what.exists():
        found = Configuration(data={"path": options.what})
    elif len(what.parts) == 1 and not what.suffix:
        raise UnknownNameError("recipe, folder or file", options.what, [*RECIPES, CLASSIFIER])
    else:
        raise FileNotFoundError(
            f"there is no {what}: wanted a folder of pictures, an .npz file, or a .json or .toml configuration."
        )
    unsaid = TrainOptions(what=options.what)
    given = {name: getattr(options, name) for name in TRAINING if getattr(options, name) != getattr(unsaid, name)}
    data = {"size": options.size, "mirrored": options.mirrored or None}
    return Configuration(
        data={**found.data, **{name: value for name, value in data.items() if value is not None}},
        network=found.network,
        schedule=found.schedule,
        loss=found.loss,
        optimizer=found.optimizer,
        training={**found.training, **given},
        place=found.place,
    )


def _sheet(place: Path, recipe: Any, options: TrainOptions) -> None:
    """Samples of the new model, as ``fewstep sample`` draws them."""
    from fewstep.cli import sample

    label = None if recipe.network.classes is None else "each"
    drawn = {"label": label, "device": options.device, "threads": options.threads, "quiet": True, **SHEET}
    sample.run(sample.SampleOptions(model=str(place), out=str(place / "samples"), **drawn))
    if not options.quiet:
        print(f"samples in {place / 'samples' / 'samples.png'}")
