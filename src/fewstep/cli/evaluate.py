"""``fewstep evaluate``."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.cli.options import Common, option


@dataclass(frozen=True)
class EvaluateOptions(Common):
    """Options of the command."""

    samples: str = option(
        None,
        "samples: a folder of `fewstep sample` or of pictures, a .npz or .npy file, or digits or photos; with --bits-per-dim a model",
        positional=True,
    )
    data: str = option(
        "digits",
        "what they are compared with, or what is judged with --bits-per-dim: the same kinds, or the shipped data digits or photos "
        "(left out: digits)",
        positional=True,
    )
    part: str = option("held_out", "part of the shipped data", choices=("held_out", "train"))
    distances: str = option("frechet,kid,mmd,sliced_wasserstein", "distances, separated by commas; wasserstein is the exact one")
    features: str = option(
        "auto", "what they look at: pixels, digits (a small classifier), inception; auto: digits if 1 x 8 x 8, else pixels"
    )
    weights: str = option("", "file of Inception's weights")
    count: int = option(1000, "use at most so many of either")
    resamples: int = option(200, "resamples of the intervals, and again of the floor and the test")
    seed: int = option(0, "seed of the resamples and of the crops of photos")
    out: str = option("", "folder for index.html, results.json and pictures; left out: none")
    bits_per_dim: bool = option(
        False, "how many bits per dimension the data cost under a model, an upper bound, instead of distances"
    )
    levels: int = option(
        0, "of --bits-per-dim: how many values the data take, from -1 to 1; 0: 17 for digits, 1021 for photos, else 256"
    )
    dequantization: str = option(
        "truncated_normal",
        "of --bits-per-dim: how discrete data become states",
        choices=("truncated_normal", "uniform", "variational"),
    )
    time: float = option(0.0, "of --bits-per-dim: the noise level of these states as a time of the schedule; 0: its last")
    draws: int = option(1, "of --bits-per-dim: states a sample")
    tol: float = option(1e-4, "of --bits-per-dim: tolerance of a step of the ODE")
    differentiation: str = option(
        "forward",
        "of --bits-per-dim: reverse for networks with an operator that has no forward derivative, as some attention",
        choices=("forward", "reverse"),
    )


OPTIONS = {"evaluate": EvaluateOptions}
SHIPPED = {"digits": (1, 8, 8), "photos": (3, 32, 32)}
"""Data that come along -> their shape."""
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SHOWN = 30
LEVELS = {"digits": 17, "photos": 1021}
"""Photos are averages of four bytes."""
ONLY_BITS = ("levels", "dequantization", "time", "draws", "tol", "differentiation")
ONLY_DISTANCES = ("distances", "features", "weights", "resamples")
BATCH = 64


def run(options: EvaluateOptions) -> int:
    """Measure and print, and write the page if it is asked for."""
    _check_options(options)
    return _run_bits(options) if options.bits_per_dim else _run_distances(options)


def _check_options(options: EvaluateOptions) -> None:
    """Refuse options that would do nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    idle = ONLY_DISTANCES if options.bits_per_dim else ONLY_BITS
    given = [f"--{name}" for name in idle if getattr(options, name) != defaults[name]]
    if given:
        does, beside = "does" if len(given) == 1 else "do", "with" if options.bits_per_dim else "without"
        raise ValueError(f"{', '.join(given)} {does} nothing {beside} --bits-per-dim.")


def _run_bits(options: EvaluateOptions) -> int:
    """Bits per dimension of data under a model."""
    from contextlib import nullcontext

    from fewstep.cli.setup import machine, new_folder, open_model, progress
    from fewstep.dequantization import Levels
    from fewstep.evaluate.report import Report
    from fewstep.likelihood import bits_per_dim

    shipped = options.data in SHIPPED and not Path(options.data).exists()
    levels = Levels(options.levels or (LEVELS[options.data] if shipped else 256))
    denoiser = open_model(options.samples, options)
    if shipped:  # before they are read
        _check_shape(denoiser, SHIPPED[options.data], options)
    data, classes = _data_for(denoiser, options)
    _check_shape(denoiser, tuple(data.shape[1:]), options)
    label, under = _labels_for(denoiser, classes, len(data))
    t = options.time or denoiser.schedule.t_end
    with new_folder(options.out) if options.out else nullcontext() as folder:
        with progress(options, total=len(data) * options.draws, desc="samples") as bar:
            found = bits_per_dim(
                denoiser,
                data.to(options.device),
                levels,
                dequantization=options.dequantization,
                draws=options.draws,
                tol=options.tol,
                differentiation=options.differentiation,
                t=t,
                cond={} if label is None else {"label": label.to(options.device)},
                seeds=range(options.seed, options.seed + len(data)),
                batch_size=BATCH,
                after=lambda count: bar.update(count * options.draws),
            )
        given = {
            name: getattr(options, name) for name in ("data", "part", "dequantization", "draws", "tol", "differentiation", "seed")
        }
        figures = {"bits_per_dim": found.value, "stderr": found.stderr, "bound": found.is_bound, "calls": float(found.calls.mean())}
        results = {
            "command": "fewstep evaluate --bits-per-dim",
            "model": options.samples,
            **given,
            "time": t,
            "levels": levels.count,
            "condition": under,
        }
        results = {**results, "count": len(data), **figures, "machine": machine()}
        part = f" ({options.part})" if shipped else ""
        told = (
            f"{options.samples} on {len(data)} samples of {options.data}{part}: at most {found}, {options.dequantization} at t={t:g}, "
            f"{levels.count} levels, {under}, {figures['calls']:.0f} evaluations a sample"
        )
        if folder is not None:
            report = Report("fewstep: bits per dimension", told, results)
            report.table(["bits/dim", "standard error"], [[f"{found.value:.4f}", f"{found.stderr:.4f}"]])
            report.write(folder)
    if options.json:
        print(json.dumps(results))
    elif not options.quiet:
        print(told)
    return 0


def _check_shape(denoiser: Any, shape: tuple[int, ...], options: EvaluateOptions) -> None:
    """Refuse data of another shape than the model's."""
    if denoiser.info.shape is not None and shape != tuple(denoiser.info.shape):
        raise ValueError(
            f"{denoiser.info.name} makes samples of shape {tuple(denoiser.info.shape)}, the data {options.data} have {shape}: name data of "
            "the model's shape, as in `fewstep evaluate MODEL DATA --bits-per-dim`."
        )


def _data_for(denoiser: Any, options: EvaluateOptions) -> tuple[Any, Any]:
    """The data and their classes, or None; pictures of a folder cut and scaled as `fewstep train` does."""
    import torch

    path, shape = Path(options.data), denoiser.info.shape
    if not path.is_dir() or (path / "samples.npz").is_file() or shape is None or len(shape) != 3 or shape[1] != shape[2]:
        return read_samples(options.data, options)
    from fewstep.train.pictures import read_pictures

    pictures = read_pictures(path, shape[-1])
    rows = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(options.seed))[: options.count]
    found = pictures[rows.sort().values]
    return found["x"], found.get("label")


def _labels_for(denoiser: Any, classes: Any, count: int) -> tuple[Any, str]:
    """The labels under which the data are judged, and what to say of them: without a class, where the model knows that, else their own."""
    import torch

    known = denoiser.info.conditions.get("label")
    if known is None:
        return None, "a model without classes"
    if "null" in known:
        return torch.full((count,), known["null"]), "under no class"
    labels = None if classes is None else torch.as_tensor(classes).long()
    if labels is None or not 0 <= int(labels.min()) <= int(labels.max()) < known["classes"]:
        raise ValueError(
            f"{denoiser.info.name} needs a class of every sample, 0 to {known['classes'] - 1}, which these data do not bring: wanted "
            "labels in their file, or a folder with a sub-folder for each."
        )
    return labels, "each under its class"


def _run_distances(options: EvaluateOptions) -> int:
    """Distances between samples and data."""
    from contextlib import nullcontext

    from fewstep.cli.setup import new_folder, progress
    from fewstep.evaluate.distances import make_distances, measure
    from fewstep.evaluate.features import make_features, resolved_features

    chosen = make_distances(options.distances)
    if options.count < 2:
        raise ValueError(f"--count must be at least 2, got {options.count}.")
    (samples, labels), (data, classes) = (read_samples(source, options) for source in (options.samples, options.data))
    sets, groups = [samples, data], _groups(labels, classes)
    if sets[0].shape[1:] != sets[1].shape[1:]:
        raise ValueError(
            f"the samples have shape {tuple(sets[0].shape[1:])}, what they are compared with {tuple(sets[1].shape[1:])}."
        )
    shape = tuple(sets[0].shape[1:])
    looked_at = resolved_features(options.features, shape)
    features = make_features(looked_at, shape, weights=options.weights or None, device=options.device)
    told = [f"{_told(options)}, features: {_features(options, looked_at)}", *_warnings(labels, classes, groups)]
    first, second = (features(samples) for samples in sets)
    with new_folder(options.out) if options.out else nullcontext() as folder:
        total = 2 * options.resamples * len(chosen)
        with progress(options, total=total, desc="resampling") as bar:
            drawn = {"resamples": options.resamples, "seed": options.seed, "after": bar.update}
            measured = measure(first, second, chosen, groups=groups, **drawn)
        results = _results(measured, looked_at, options)
        if folder is not None:
            _write(folder, sets, measured, results, told, options)
    if options.json:
        print(json.dumps(results))
    elif not options.quiet:
        print(f"{told[0]}, {options.resamples} resamples{_within(measured)}, seed {options.seed}")
        for line in told[1:]:
            print(line)
        for figure in measured:
            print(figure)
    return 0


def _groups(labels: Any, classes: Any) -> tuple[Any, Any] | None:
    """The classes of both, if both have the same ones."""
    known = labels is not None and classes is not None and set(labels.tolist()) == set(classes.tolist())
    return (labels, classes) if known else None


def _warnings(labels: Any, classes: Any, groups: Any) -> list[str]:
    """What a reader should know when only one side brings classes, or both bring other ones."""
    if groups is not None or (labels is None and classes is None):
        return []
    if labels is not None and classes is not None:
        why = "The samples have other classes than what they are compared with"
    else:
        why = f"{'The samples' if labels is None else 'What the samples are compared with'} have no labels"
    return [f"{why}, so the classes are not held fixed and the test has less power."]


def _features(options: EvaluateOptions, looked_at: str) -> str:
    return f"{looked_at} (auto)" if options.features == "auto" else looked_at


def _within(measured: list[Any]) -> str:
    return f" within {measured[0].groups} classes" if measured[0].groups > 1 else ""


def read_samples(source: str, options: EvaluateOptions) -> tuple[Any, Any]:
    """Samples ``"n *shape"`` in float32, pictures and bytes brought to [-1, 1]; and their labels, or None."""
    import numpy as np
    import torch

    from fewstep.cli.setup import read_arrays

    path = Path(source)
    if source in SHIPPED and not path.exists():
        return _shipped(source, options)
    if path.is_dir():
        if (path / "shards.json").is_file():
            return _shards(path, options.count)
        if not (path / "samples.npz").is_file():
            return _pictures(path, options.count), None
        path = path / "samples.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"there are no samples at {source}: wanted a folder, an .npz or .npy file, or {' or '.join(SHIPPED)}."
        )
    if path.suffix.lower() in PICTURES:
        raise ValueError(f"{path} is one picture. Put the pictures in a folder, one a sample, and name the folder.")
    arrays = read_arrays(path, "samples")
    name = next((name for name in ("samples", "x", "arr_0") if name in arrays), None)
    if name is None:
        raise ValueError(f"{path} holds {', '.join(arrays) or 'nothing'}, but no array `samples`, `x` or `arr_0`.")
    array = arrays[name][: options.count]
    if array.dtype == np.uint8:
        last = array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3)
        array = (array.transpose(0, 3, 1, 2) if last else array).astype(np.float32) / 127.5 - 1.0
    if array.ndim < 2 or len(array) < 2 or array.dtype.kind != "f":
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}; wanted at least 2 samples (n, *shape), floats or bytes."
        )
    label = next((arrays[name] for name in ("labels", "label") if name in arrays), None)
    if label is not None and (label.ndim != 1 or len(label) < len(array) or label.dtype.kind not in "iu"):
        raise ValueError(f"{path} holds labels {label.dtype} of shape {label.shape}; wanted one whole number a sample.")
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)), None if label is None else label[: len(array)]


def _shipped(name: str, options: EvaluateOptions) -> tuple[Any, Any]:
    import torch

    from fewstep.train.recipes import digits, photos

    if name == "photos":
        return photos(options.part)(options.count, torch.Generator().manual_seed(options.seed))["x"], None
    whole = digits(options.part)
    rows = torch.randperm(len(whole["x"]), generator=torch.Generator().manual_seed(options.seed))[: options.count]
    return whole["x"][rows], whole["label"][rows].numpy()


def _shards(folder: Path, count: int) -> tuple[Any, Any]:
    """Of what ``fewstep sample --shards`` wrote."""
    import numpy as np
    import torch

    from fewstep.scale import read_shards

    arrays, about = read_shards(folder, count)
    labels = np.array([told["label"] for told in about]) if all("label" in told for told in about) else None
    return torch.from_numpy(np.ascontiguousarray(arrays, np.float32)), labels


def _pictures(folder: Path, count: int) -> Any:
    import numpy as np
    import torch

    from fewstep.errors import MissingExtraError

    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("Pillow", "demo", "Reading pictures") from error
    from fewstep.train.pictures import GREY, in_8_bits

    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)[:count]
    if len(files) < 2:
        raise ValueError(f"{folder} holds neither samples.npz nor at least 2 pictures ({', '.join(PICTURES)}).")
    arrays = []
    for file in files:
        with Image.open(file) as picture:
            gray = picture.mode in GREY
            array = np.asarray(in_8_bits(picture).convert("L" if gray else "RGB"), np.float32)
        arrays.append(array[None] if gray else array.transpose(2, 0, 1))
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(f"{file} has shape {arrays[-1].shape}, {files[0].name} has {arrays[0].shape}; pictures must be alike.")
    return torch.from_numpy(np.stack(arrays) / 127.5 - 1.0)


def _told(options: EvaluateOptions) -> str:
    part = f" ({options.part})" if options.data in SHIPPED and not Path(options.data).exists() else ""
    return f"{options.samples} against {options.data}{part}"


def _results(measured: list[Any], looked_at: str, options: EvaluateOptions) -> dict[str, Any]:
    from fewstep.cli.setup import machine

    given = {"samples": options.samples, "data": options.data, "part": options.part, "features": looked_at}
    figures = [dataclasses.asdict(figure) for figure in measured]
    return {"command": "fewstep evaluate", **given, "seed": options.seed, "distances": figures, "machine": machine()}


def _write(
    folder: Path, sets: list[Any], measured: list[Any], results: dict[str, Any], told: list[str], options: EvaluateOptions
) -> None:
    from fewstep.evaluate.distances import DISTANCES
    from fewstep.evaluate.report import Report, image_grid

    report = Report("fewstep: samples against data", f"{told[0]}. {' '.join(told[1:])}".strip(), results)
    if sets[0].ndim == 4 and sets[0].shape[1] in (1, 3):
        scale = max(1, 40 // sets[0].shape[-1])
        columns = min(10, max(2, 400 // (scale * sets[0].shape[-1])))
        shown = [image_grid(samples[:SHOWN], (-1.0, 1.0), columns=columns, scale=scale) for samples in sets]
        report.heading("The first of them")
        report.pictures([("samples.png", f"samples: {options.samples}", shown[0]), ("data.png", f"data: {options.data}", shown[1])])
    report.heading("Distances")
    level = measured[0].level
    head = ["distance", "value", f"{100 * level:g} % interval", "floor", "95 % of the floor below", "p", "sizes"]
    rows = []
    for m in measured:
        sizes = f"{m.sizes[0]}, {m.sizes[1]}"
        rows.append([DISTANCES[m.distance].title, *_numbers(m), f"{m.p:.3g}", sizes])
    report.table(head, rows)
    apart = [DISTANCES[m.distance].title for m in measured if m.p <= 0.05]
    few = " The sets are small: only large differences would show." if any(m.weak for m in measured) else ""
    report.text(f"Told apart at the 5 % level: {', '.join(apart) if apart else 'by none of them'}.{few}")
    report.text(
        f"Interval: of the expected figure at these sizes. Floor: what sets of these sizes show if nothing distinguishes them, from random "
        f"partitions of both together. p: share of these partitions that show at least the value. {options.resamples} resamples "
        f"each{_within(measured)}, seed {options.seed}.",
        note=True,
    )
    report.write(folder)


def _numbers(m: Any) -> list[str]:
    low, high = (f"{bound:.4g}" if math.isfinite(bound) else "–" for bound in (m.low, m.high))
    return [f"{m.value:.4g}", f"{low} to {high}", f"{m.floor:.4g}", f"{m.floor_high:.4g}"]
