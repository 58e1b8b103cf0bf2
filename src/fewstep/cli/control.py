"""``fewstep control``."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.cli.options import Prompted, option
from fewstep.cli.parsing import COUNT

HALVES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class ControlOptions(Prompted):
    """Options of the command."""

    model: str = option("digits", "a student's folder, a shipped model (digits, photos), or a model folder", positional=True)
    target: str = option(
        "inpaint",
        "inpaint: pixels of --image; intensity: the mean of rows or columns; class: --wanted",
        choices=("inpaint", "intensity", "class"),
    )
    image: str = option("", "for inpaint and intensity: a picture (.png, .jpg), or x or the one array of a .npy or .npz file")
    mask: str = option("left", f"for inpaint, what is given: {', '.join(HALVES)}, or a file, bright or 1 where pixels are given")
    curve: str = option(
        "", "for intensity, instead of --image: the means, separated by commas, or one for all, in the model's range"
    )
    axis: str = option("rows", "for intensity", choices=("rows", "columns"))
    wanted: int | None = option(None, "for class: the class, by the shipped classifier of digits", kind=int)
    label: str = option(None, 'a class that the model is told, a list like 0,1,2, or "each"; left out: without condition')
    guidance: float = option(1.0, "scale of classifier-free guidance of a model that is no student; 1 is none")
    nfe: int = option(0, "network calls of decoding; 0: the most that a student is made for, 8 for other models")
    surrogate: int = option(
        0, "network calls that the noise is optimised through; 0: 1 for a student, as many as --nfe for other models"
    )
    iterations: int = option(70, "of Adam")
    refined: int = option(0, "so many of them, the last, go through all calls of decoding")
    learning_rate: float = option(0.2, "of Adam, in units of the noise's deviation")
    count: int | None = option(None, f"how many samples (default: {COUNT}, or as many as --seed names)", kind=int)
    seed: str = option("0", "seed of the first sample, or a range like 0-63, or a list like 3,5,8")
    out: str = option("controlled", "folder for samples.png, samples.npz, index.html and results.json")
    fresh: bool = option(False, "begin anew; otherwise a run that was stopped goes on from OUT.unfinished")


OPTIONS = {"control": ControlOptions}
OWN_FILES = r"samples\.(png|npz)|samples-\d+\.png|index\.html|results\.json"


def run(options: ControlOptions) -> int:
    """Optimise the noise, write samples and the page."""
    from fewstep.cli.parsing import check_prompted, parse_seeds

    _check(options)
    check_prompted(options)
    seeds = parse_seeds(options.seed, options.count)
    from fewstep.cli.conditions import conditions
    from fewstep.cli.setup import state_dtype
    from fewstep.cli.training import resumable
    from fewstep.noise import draw_noise
    from fewstep.steer import optimize_noise

    model, through, surrogate, decode = _model(options)
    shape = _picture_shape(model, options)
    loss = _loss(options, shape, model.info.data_range or (-1.0, 1.0))
    cond = conditions(model, options, len(seeds), options.label)
    noise = draw_noise(shape, seeds, decode, dtype=state_dtype(options), device=options.device)
    with resumable(options, OWN_FILES) as (folder, unfinished):
        found = optimize_noise(
            _guided(model, options),
            loss,
            noise,
            surrogate,
            decode,
            iterations=options.iterations,
            refined=options.refined,
            learning_rate=options.learning_rate,
            cond=cond,
            seeds=seeds,
            surrogate=through,
            folder=unfinished,
            checkpoint_every=10,
            progress=not options.quiet,
            sheets=max(1, options.iterations // 4),
        )
        told = _told(found, options, surrogate, decode, seeds)
        _write(folder, found, model, cond, noise, decode, seeds, told, options, unfinished)
    if options.json:
        print(json.dumps(told))
    elif not options.quiet:
        print(f"control error {told['error']:.4g} after decoding in {decode.nfe} calls; {told['without']:.4g} without control")
        print(f"{told['calls']} network calls a sample, a backward pass counted as two: {options.out}")
    return 0


def _check(options: ControlOptions) -> None:
    if options.iterations < 1 or min(options.nfe, options.surrogate) < 0:
        raise ValueError("--iterations must be at least 1; --nfe and --surrogate at least 0.")
    if not 0 <= options.refined <= options.iterations:
        raise ValueError(f"--refined is a number of the {options.iterations} iterations, got {options.refined}.")
    if options.target == "inpaint" and not options.image:
        raise ValueError("inpaint needs a picture: give --image.")
    if options.target == "class" and options.wanted is None:
        raise ValueError("class needs the class to aim at: give --wanted.")
    if options.target == "intensity" and bool(options.image) == bool(options.curve):
        raise ValueError("intensity needs one of --image and --curve.")


def _model(options: ControlOptions) -> tuple[Any, Any, Any, Any]:
    """The denoiser that decodes, another that is optimised through (None: the same), and the plans of the latter and of the former."""
    from fewstep.cli.conditions import check_null, check_unguided
    from fewstep.cli.setup import open_model, open_student
    from fewstep.loading import is_student
    from fewstep.solvers import TCD, make_plan

    if not is_student(options.model):
        model, nfe = open_model(options.model, options), options.nfe or 8
        decode = make_plan("auto", model.schedule, nfe, final="zero")
        other = options.surrogate not in (0, nfe)
        return model, None, make_plan("auto", model.schedule, options.surrogate, final="zero") if other else decode, decode
    student = open_student(options.model, options)
    check_null(student, options.model, options.label)
    check_unguided(options.model, options.guidance)
    plans = [student.plan(calls or None) for calls in (options.surrogate or min(student.plans), options.nfe)]
    quiet = [TCD(gamma=0.0).plan(plan.schedule, grid=plan.grid) if plan.stochastic else plan for plan in plans]
    told = [student.denoiser_of(plan.nfe) for plan in plans]
    return told[1], told[0], quiet[0], quiet[1]


def _guided(model: Any, options: ControlOptions) -> Any:
    from fewstep.cli.conditions import guided

    if options.guidance != 1.0 and options.label is None:
        raise ValueError("--guidance needs --label: what it leads to.")
    return guided(model, options.guidance, options)


def _picture_shape(model: Any, options: ControlOptions) -> tuple[int, ...]:
    from fewstep.cli.setup import ask_for

    shape = ask_for(model.info.shape, model.info.name)
    if hasattr(model, "decode") or len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"{options.model} makes no pictures of pixels; in Python fewstep.steer.optimize_noise takes any loss of its samples."
        )
    return shape


def _loss(options: ControlOptions, shape: tuple[int, ...], data_range: tuple[float, float]) -> Any:
    """The target."""
    import torch

    from fewstep.steer import ClassTarget, IntensityTarget, MaskedPixels

    if options.target == "class":
        if options.wanted is None or not 0 <= options.wanted < 10 or shape != (1, 8, 8):
            raise ValueError(
                f"the shipped classifier knows the classes 0 to 9 of pictures (1, 8, 8), not {options.wanted} of {shape}."
            )
        return ClassTarget(options.wanted)
    if options.target == "inpaint":
        return MaskedPixels(_read_picture(options.image, shape, data_range), _mask(options.mask, shape))
    axis = {"rows": 1, "columns": 2}[options.axis]
    if options.image:
        image = _read_picture(options.image, shape, data_range)
        return IntensityTarget(image.mean([k for k in range(3) if k != axis]), axis=axis)
    try:
        curve = torch.tensor([float(part) for part in options.curve.split(",")])
    except ValueError:
        raise ValueError(f"--curve takes numbers separated by commas, not {options.curve!r}.") from None
    if len(curve) not in (1, shape[axis]):
        raise ValueError(f"--curve needs one number, or {shape[axis]} for the {options.axis} of a sample; got {len(curve)}.")
    return IntensityTarget(curve, axis=axis)


def _read_picture(path: str, shape: tuple[int, ...], data_range: tuple[float, float]) -> Any:
    """A picture of the model's size: of an array as it is, of a file from black and white to the range."""
    import numpy as np
    import torch

    from fewstep.cli.setup import read_arrays
    from fewstep.errors import MissingExtraError

    if Path(path).suffix in (".npy", ".npz"):
        arrays = read_arrays(path, "x")
        if "x" not in arrays and len(arrays) != 1:
            raise ValueError(f"{path} needs an array x, or only one; it has {', '.join(arrays)}.")
        found = torch.from_numpy(np.asarray(arrays.get("x", next(iter(arrays.values()))), np.float32))
        found = found.reshape(shape) if found.numel() == int(np.prod(shape)) else found
    else:
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise MissingExtraError("Pillow", "demo", "Reading pictures") from error
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("L" if shape[0] == 1 else "RGB"), np.float32) / 255.0
        except UnidentifiedImageError:
            raise ValueError(f"{path} is no picture that can be read.") from None
        low, high = data_range
        found = torch.from_numpy(low + (high - low) * (pixels[None] if shape[0] == 1 else pixels.transpose(2, 0, 1)))
    if tuple(found.shape) != tuple(shape):
        raise ValueError(f"{path} has shape {tuple(found.shape)}, but samples of the model have {tuple(shape)}. Scale it first.")
    return found


def _mask(text: str, shape: tuple[int, ...]) -> Any:
    """1 where pixels are given."""
    import torch

    if text not in HALVES:
        return (_read_picture(text, (1, *shape[1:]), (0.0, 1.0)) > 0.5).float()
    mask, (height, width) = torch.zeros(1, *shape[1:]), shape[1:]
    rows = {"top": slice(0, height // 2), "bottom": slice(height // 2, None)}.get(text, slice(None))
    columns = {"left": slice(0, width // 2), "right": slice(width // 2, None)}.get(text, slice(None))
    mask[:, rows, columns] = 1.0
    return mask


def _told(found: Any, options: ControlOptions, surrogate: Any, decode: Any, seeds: list[int]) -> dict[str, Any]:
    from fewstep.cli.setup import machine

    errors = {"error": found.errors, "surrogate": found.surrogate_errors, "without": found.initial_errors}
    told = {"command": "fewstep control", "target": options.target, **{name: float(e.mean()) for name, e in errors.items()}}
    told |= {"calls": found.calls, "surrogate_calls": surrogate.nfe, "decode_calls": decode.nfe, "iterations": options.iterations}
    return {**told, "refined": options.refined, "seeds": seeds, "errors": found.errors.tolist(), "machine": machine()}


def _write(
    folder: Path,
    found: Any,
    model: Any,
    cond: Any,
    noise: Any,
    decode: Any,
    seeds: list[int],
    told: dict[str, Any],
    options: Any,
    unfinished: Path,
) -> None:
    import numpy as np
    import torch

    from fewstep.artefacts import write_atomically
    from fewstep.cli.training import student_sheets
    from fewstep.evaluate.report import Report, image_grid
    from fewstep.sampler import sample

    with torch.no_grad():
        free = sample(_guided(model, options), noise, decode, cond=cond, seeds=seeds)
    file = io.BytesIO()
    arrays = {"samples": found.samples, "noise": found.noise, "errors": found.errors, "without": free}
    np.savez_compressed(file, seeds=np.array(seeds), **{name: value.cpu().numpy() for name, value in arrays.items()})
    write_atomically(folder / "samples.npz", file.getvalue())
    data_range, scale = model.info.data_range or (-1.0, 1.0), max(1, 64 // found.samples.shape[-1])
    both = torch.cat([found.samples, free]).cpu()
    sheet = image_grid(both[: len(seeds)], data_range, columns=min(8, len(seeds)), scale=scale)
    page = Report(
        "fewstep: controlled",
        f"{len(seeds)} samples of {model.info.name} by the target {options.target}.",
        {**told, "log": found.log},
    )
    page.table(
        ["", "control error"],
        [
            ["without control", f"{told['without']:.4g}"],
            [f"through {told['surrogate_calls']} calls, as optimised", f"{told['surrogate']:.4g}"],
            [f"decoded in {told['decode_calls']} calls", f"{told['error']:.4g}"],
        ],
    )
    page.text(f"{told['calls']} network calls a sample, a backward pass counted as two.")
    page.heading("Samples")
    page.pictures([("samples.png", "with control", sheet)])
    page.pictures(
        [
            (
                "samples-0.png",
                "the same noise without",
                image_grid(both[len(seeds) :], data_range, columns=min(8, len(seeds)), scale=scale),
            )
        ]
    )
    if sheets := student_sheets(unfinished, "iteration"):
        page.heading("On the way")
        page.pictures(sheets)
    page.write(folder)
