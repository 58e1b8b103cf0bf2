"""``fewstep train``."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.cli.options import option


@dataclass(frozen=True)
class TrainOptions:
    """Options of the command."""

    recipe: str = option(None, "digits or photos; digits-classifier is the network whose features judge digits", positional=True)
    out: str = option("model", "folder for the model, for the classifier a file; an interrupted training there is taken up again")
    steps: int = option(0, "optimizer steps; 0: as the recipe says")
    seed: int = option(-1, "seed of everything; -1: as the recipe says")
    device: str = option("cpu", "where to train")
    threads: int = option(0, "processor threads; 0 leaves the choice to PyTorch")
    afresh: bool = option(False, "begin anew, even if there is an interrupted training")
    quiet: bool = option(False, "no progress bar and no messages")


OPTIONS = {"train": TrainOptions}


def run(options: TrainOptions) -> int:
    """Train a recipe into a folder."""
    from fewstep.train.recipes import train_classifier, train_recipe

    if options.recipe == "digits-classifier":
        if options.steps or options.device != "cpu" or options.threads or options.afresh:
            raise ValueError("digits-classifier takes --out, --seed and --quiet only.")
        train_classifier(options.out, seed=max(0, options.seed), progress=not options.quiet)
        if not options.quiet:
            print(f"written to {options.out}")
        return 0
    train_recipe(
        options.recipe,
        options.out,
        steps=options.steps or None,
        seed=None if options.seed == -1 else options.seed,
        device=options.device,
        threads=options.threads or None,
        progress=not options.quiet,
        resume=not options.afresh,
    )
    if not options.quiet:
        print(f"written to {options.out}; sample with: fewstep sample {options.out}")
    return 0
