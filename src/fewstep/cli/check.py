"""``fewstep check``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from fewstep.cli.options import Common, option


@dataclass(frozen=True)
class CheckOptions(Common):
    """Options of the command."""

    model: str = option("digits", "a shipped model or a model folder", positional=True)
    data: str = option("", "clean data: a .npy file, or a .npz file with x and, if wanted, label; shipped models have their own")
    count: int = option(32, "how many samples to use")
    seed: int = option(0, "seed of the noise")


OPTIONS = {"check": CheckOptions}


def run(options: CheckOptions) -> int:
    """Check a model on data; status 1 if something is wrong."""
    from fewstep.cli.setup import open_model, state_dtype
    from fewstep.loading import check

    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}.")
    denoiser = open_model(options.model, options)
    batch = _data(options)
    x = batch.pop("x").to(state_dtype(options)).to(options.device)
    report = check(denoiser, x, cond={k: v.to(options.device) for k, v in batch.items()}, seed=options.seed, most=options.count)
    if options.json:
        print(json.dumps({**dataclasses.asdict(report), "table": report.table[:10]}, indent=2))
    else:
        print(report)
    return 0 if report.ok else 1


def _data(options: CheckOptions) -> dict[str, Any]:
    import torch

    from fewstep.cli.setup import read_arrays

    if not options.data:
        from fewstep.train.recipes import digits, photos

        if options.model == "digits":
            return {name: value[: options.count] for name, value in digits("held_out").items()}
        if options.model == "photos":
            return photos("held_out")(options.count, torch.Generator().manual_seed(options.seed))
        raise ValueError(f"--data is needed: {options.model} brings no data of its own.")
    arrays = read_arrays(options.data, "x")
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" or not array.ndim:
            raise ValueError(
                f"{options.data}: {name} has type {array.dtype} and shape {array.shape}; it must be real numbers, one row a sample."
            )
    if "x" not in arrays:
        raise ValueError(f"{options.data} holds {', '.join(arrays) or 'nothing'}, but no array `x`.")
    return {name: torch.from_numpy(array[: options.count]) for name, array in arrays.items()}
