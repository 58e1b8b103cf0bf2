"""From what a user has to a denoiser: `load`; and whether it is wrapped right: `check`.

`load` takes a shipped model's name; a folder of the form that `fewstep.models.save_model` writes; a pipeline of diffusers, as an object, a
folder, an id of the hub or a single file; or any module or callable with its schedule. `check` finds a wrong prediction type, time
convention or data range by trying the others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.artefacts import check_not_pickled
from fewstep.denoisers import Denoiser, ModelInfo, check_conditions
from fewstep.errors import ArtefactError, UnknownNameError
from fewstep.models import read_model
from fewstep.noise import draw_noise
from fewstep.preconditioning import EDMPreconditioned
from fewstep.predictions import data_coefficients
from fewstep.schedules import EDM, Flow, FromBetas, NoiseSchedule, VPCosine, VPLinear

__all__ = ["STUDENT_CARD", "CheckReport", "check", "is_student", "load", "shipped_models"]

SHIPPED = Path(__file__).parent / "shipped"
PIPELINE_FILE = "model_index.json"
"""What says that a folder, or an object, is a pipeline of diffusers."""
STUDENT_CARD = "student.json"
"""What says that a folder is a student's."""
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pkl")
"""Of names that are files with weights, not models."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def shipped_models() -> list[str]:
    """Names of the models inside the package.

    Example:
        >>> "digits" in shipped_models()
        True
    """
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / "config.json").is_file()) if SHIPPED.is_dir() else []


def is_student(folder: str | Path) -> bool:
    """Whether a folder is a student's, as `fewstep.distill.Student.save` writes it."""
    return (Path(folder) / STUDENT_CARD).is_file()


def load(
    source: str | Path | Callable[..., Any],
    *,
    schedule: NoiseSchedule | None = None,
    predicts: str | None = None,
    preconditioning: str | None = None,
    sigma_data: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Denoiser:
    """A denoiser from a shipped model's name, a model or pipeline on disk or on the hub, a pipeline in memory, or a network.

    Nothing is unpickled: weights come from safetensors files.

    Args:
        source: ``"digits"``, ``"photos"``; the path of a folder with ``config.json`` and ``model.safetensors``, of a diffusers pipeline's
            folder, of the folder of a diffusers model, or of a single ``.safetensors`` file; an id of the hub, ``"owner/name"``; a
            diffusers pipeline; a module or callable.
        schedule, predicts: needed with a module or callable, and with a diffusers model that has no scheduler's folder beside it; refused
            with what says them itself.
        preconditioning: ``"edm"`` for the raw network inside EDM's preconditioning, called as ``network(x, c_noise, **cond)``; `schedule`
            is then `EDM` and `predicts` is left out. A network that holds its preconditioning, ``network(x, sigma)``, predicts data.
        sigma_data: of the preconditioning; 0.5 when left out.
        device: where a network goes; a pipeline in memory stays where it is.
        dtype: the precision of a network that is read; left out, the file's or, for diffusers, the one that it chooses.
        **options: of `Denoiser`, with a module or callable.

    Returns:
        A `Denoiser`; its ``info`` holds shape, range and conditions of the data. Of a pipeline it is a
        `fewstep.diffusers.pipelines.PipelineDenoiser`, which encodes prompts and decodes latents.

    Raises:
        ArtefactError: if the files are damaged, pickled, or of no form that is known.
        FileNotFoundError: if there is no such folder or name.
        UnknownNameError: for a pipeline or model of diffusers that is not served, or another preconditioning.
        TypeError: if schedule, predicts or sigma_data are missing or superfluous.

    Example:
        >>> load("digits").info.shape
        (1, 8, 8)
    """
    if getattr(source, "config_name", None) == PIPELINE_FILE:
        from fewstep.diffusers.pipelines import PipelineDenoiser

        _refuse(source, type(source).__name__, schedule, predicts, options)
        return PipelineDenoiser(source)
    if callable(source):
        if preconditioning is not None:
            source, schedule, predicts, options = _preconditioned(source, schedule, predicts, preconditioning, sigma_data, options)
        elif sigma_data is not None:
            raise TypeError('sigma_data= belongs to preconditioning="edm".')
        if schedule is None or predicts is None:
            raise TypeError(
                "a network needs its schedule= and what it predicts=, e.g. schedule=fewstep.schedules.EDM(), predicts='data'."
            )
        network: Callable[..., Any] = source.to(device, dtype) if isinstance(source, torch.nn.Module) else source
        return Denoiser(network, schedule, predicts, **options)
    if preconditioning is not None or sigma_data is not None:
        raise TypeError(f"{source} says its schedule and prediction itself; preconditioning= and sigma_data= are for raw networks.")
    path, name = _located(source)
    if path.is_file():
        check_not_pickled(path)
        if path.suffix.lower() != ".safetensors":
            raise ArtefactError(f"{path} is a file; a model is a folder, or one .safetensors file.")
        from fewstep.diffusers.pipelines import load_file

        _refuse(source, str(source), schedule, predicts, options)
        return load_file(path, device=device, dtype=dtype)
    if _is_of_diffusers(path):
        from fewstep.diffusers.pipelines import load_folder

        _refuse(source, str(source), None, None, options)
        return load_folder(path, name=name, schedule=schedule, predicts=predicts, device=device, dtype=dtype)
    _refuse(source, str(source), schedule, predicts, options)
    return _load_own(path, device, dtype)


def _load_own(folder: Path, device: torch.device | str, dtype: torch.dtype | None) -> Denoiser:
    """The denoiser of a folder of fewstep's form."""
    network, config = read_model(folder)
    info = ModelInfo(
        name=folder.name,
        shape=tuple(config.shape),
        data_range=config.data_range,
        conditions=config.conditions,
        fingerprint=config.fingerprint,
        extra=config.extra,
    )
    return Denoiser(network.to(device, dtype).eval().requires_grad_(False), config.schedule, config.predicts, info=info)


def _refuse(source: Any, name: str, schedule: NoiseSchedule | None, predicts: str | None, options: Mapping[str, Any]) -> None:
    """Refuse what a source says itself."""
    if schedule is not None or predicts is not None or options:
        raise TypeError(f"{name} says its schedule and prediction itself; leave schedule=, predicts= and other options out.")


def _preconditioned(
    network: Callable[..., Tensor],
    schedule: NoiseSchedule | None,
    predicts: str | None,
    name: str,
    sigma_data: float | None,
    options: dict[str, Any],
) -> tuple[EDMPreconditioned, NoiseSchedule, str, dict[str, Any]]:
    """A raw network as one that predicts data, and what else `load` then knows."""
    if name != "edm":
        raise UnknownNameError("preconditioning", name, ["edm"])
    if predicts is not None or not isinstance(schedule, (EDM, type(None))):
        raise TypeError(
            "preconditioning='edm' is for raw networks on the noise levels of EDM: leave predicts= out, and give schedule=EDM(...)."
        )
    wrapped = EDMPreconditioned(network) if sigma_data is None else EDMPreconditioned(network, sigma_data)
    parameters = [p.dtype for p in wrapped.parameters() if p.is_floating_point()]
    around = {"network_dtype": torch.promote_types(parameters[0], torch.float32)} if parameters else {}
    return wrapped, EDM() if schedule is None else schedule, "data", {**around, **options}


def _located(source: str | Path) -> tuple[Path, str]:
    """The folder or file of a source, and how to call it."""
    path = Path(source)
    if path.exists():
        return path, path.resolve().name
    if isinstance(source, str) and source in shipped_models():
        return SHIPPED / source, source
    if path.suffix.lower() in SUFFIXES:
        raise FileNotFoundError(f"there is no file {path}.")
    if isinstance(source, str) and "/" not in source and "\\" not in source:
        raise UnknownNameError("model, file or folder", source, shipped_models())
    if isinstance(source, str) and HUB_ID.fullmatch(source) and path.suffix != ".safetensors" and not path.parent.is_dir():
        from fewstep.diffusers.pipelines import download

        return download(source), source
    raise FileNotFoundError(f"there is no model folder {path}.")


def _is_of_diffusers(folder: Path) -> bool:
    """Whether a folder holds a pipeline or a model of diffusers, not one of ours.

    Raises:
        ArtefactError: if it holds neither.
    """
    if (folder / PIPELINE_FILE).is_file():
        return True
    path = folder / "config.json"
    if not path.is_file():
        check_not_pickled(folder)
        raise ArtefactError(f"{folder} has no config.json and no {PIPELINE_FILE}: it is no model folder.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False  # ours or not, it is damaged, and said to be by who reads it
    return isinstance(document, dict) and "_class_name" in document


# ---- is it wrapped right? ----------------------------------------------------------------------------------------------------------

TIMES: dict[str, Callable[[NoiseSchedule, np.ndarray], Any]] = {
    "t": lambda schedule, t: t,
    "1 - t": lambda schedule, t: 1.0 - t,
    "1000 t": lambda schedule, t: 1000.0 * t,
    "999 t": lambda schedule, t: 999.0 * t,
    "1000 t - 1": lambda schedule, t: 1000.0 * t - 1.0,
    "sigma": lambda schedule, t: schedule.sigma(t),
    "1000 sigma": lambda schedule, t: 1000.0 * schedule.sigma(t),
    "log(sigma / alpha) / 4": lambda schedule, t: -0.25 * schedule.lam(t),
    "lambda": lambda schedule, t: schedule.lam(t),
}
"""Time conventions that networks are found with."""
RANGES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float, float], bool]]] = {
    "as given": (lambda x: x, lambda low, high: True),
    "2 x - 1": (lambda x: 2.0 * x - 1.0, lambda low, high: low > -0.2),
    "(x + 1) / 2": (lambda x: 0.5 * (x + 1.0), lambda low, high: low < 0.2),
    "x / 127.5 - 1": (lambda x: x / 127.5 - 1.0, lambda low, high: low > -0.2 and high > 2.0),
}
"""Ranges of data that networks are found with, and the data (by its span) for which they are worth a try."""
OTHER_SCHEDULES: dict[str, NoiseSchedule] = {
    "VPLinear()": VPLinear(),
    "VPCosine()": VPCosine(),
    "Flow()": Flow(),
    "EDM()": EDM(),
    "FromBetas(0.0001 to 0.02)": FromBetas(np.linspace(1e-4, 0.02, 1000).tolist()),
    "FromBetas(0.00085 to 0.012, linear in the root)": FromBetas((np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).tolist()),
}
"""The schedules of the field, each with its own time."""
SIGNED = {f"minus {name}": (name, -1.0) for name in ("noise", "velocity", "flow")}
READINGS = {**{name: (name, 1.0) for name in ("noise", "data", "velocity", "flow", "score")}, **SIGNED}
MARGIN = 0.2
"""Natural logarithm of the factor in mean squared error, at some noise level, by which another reading must win before it counts."""
TIE = 0.02
"""Readings whose average scores differ by less explain the network equally well; the one with the fewest changes is named."""
LEVELS = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""lambda of the noise levels that are tried."""


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    Attributes:
        ok: whether this reading is better than a linear guess, and no other explains the network clearly better.
        message: the finding in words, with what to change.
        score: log of the mean squared error of the data prediction over that of a linear guess, averaged over noise levels; below 0 is
            better than the guess.
        best: the best reading: ``predicts``, ``time``, ``data``, ``schedule`` and its ``score``.
        table: all readings, best first, each with its ``scores`` at the noise levels.
    """

    ok: bool
    message: str
    score: float
    best: dict[str, Any]
    table: list[dict[str, Any]]

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'PROBLEM'}: {self.message}"


def check(denoiser: Denoiser, data: Tensor, *, cond: Mapping[str, Any] | None = None, seed: int = 0, most: int = 32) -> CheckReport:
    """Whether a network is wrapped right, judged by how well it denoises noised data under this reading and under others.

    Real data x_0 is noised at five levels of lambda. A network that is read rightly predicts x_0 better than a linear guess; read
    wrongly (velocity taken for noise, t in [0, 1] for an index up to 999, data in [0, 1] for [-1, 1], the time of another schedule) it
    does far worse. Readings between which the data cannot decide are not told apart: on data of unit variance, say, a network that
    always answers 0 is a right predictor of the velocity.

    Args:
        denoiser: a `Denoiser`, not a guided one.
        data: ``"batch *shape"``, clean data; some dozens suffice.
        cond: conditions of these samples.
        seed: of the noise.
        most: how many samples are used.

    Raises:
        TypeError: for anything but a `Denoiser`, or data that is no tensor.
        ValueError: for data that is no finite real tensor ``"batch *shape"``, or `most` below 1.

    Example:
        >>> import torch
        >>> from fewstep.exact import Gaussian
        >>> from fewstep.schedules import VPLinear
        >>> exact = Gaussian(VPLinear(), torch.zeros(4), 0.3)
        >>> def noise(x, t):
        ...     alpha, sigma = float(exact.schedule.alpha(float(t[0]))), float(exact.schedule.sigma(float(t[0])))
        ...     return (x - alpha * exact(x, float(t[0]))) / sigma
        >>> data = exact.draw(32, seed=0)
        >>> check(Denoiser(noise, VPLinear(), predicts="noise"), data).ok
        True
        >>> check(Denoiser(noise, VPLinear(), predicts="velocity"), data).best["predicts"]
        'noise'
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"check needs a fewstep.Denoiser around the raw network, got {type(denoiser).__name__}.")
    if most < 1:
        raise ValueError(f"at least 1 sample is needed, got {most}.")
    if not isinstance(data, Tensor):
        raise TypeError(
            f'data must be a tensor "batch *shape", got {type(data).__name__}; pass data["x"] of a mapping, conditions as cond=.'
        )
    if data.ndim < 2 or not len(data) or data.is_complex() or not bool(torch.isfinite(data).all()):
        raise ValueError(
            f"data must be a finite real tensor (batch, *shape) with a sample, got {data.dtype} of shape {tuple(data.shape)}."
        )
    data = data[:most] if data.is_floating_point() else data[:most].float()
    conditions = {k: v[:most] if isinstance(v, Tensor) and v.ndim else v for k, v in (cond or {}).items()}
    check_conditions(denoiser, conditions, len(data))
    calls = denoiser.calls
    with torch.no_grad():
        table = _score_all(denoiser, data, conditions, seed)
    denoiser.calls = calls
    table.sort(key=lambda row: (row["score"], row["changes"]))
    mine = next(row for row in table if row["changes"] == 0)
    near = [row for row in table if row["score"] <= table[0]["score"] + TIE]
    best = min(near, key=lambda row: row["changes"])
    ok, message = _verdict(mine, best, data, denoiser.info)
    return CheckReport(ok, message, mine["score"], {k: best[k] for k in ("predicts", "time", "data", "schedule", "score")}, table)


def _score_all(denoiser: Denoiser, data: Tensor, cond: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    noise = draw_noise(tuple(data.shape[1:]), range(seed, seed + len(data)), dtype=data.dtype, device=data.device)
    low, high = float(data.min()), float(data.max())
    own, table = _own_times(denoiser), []
    for range_name, (rescale, worth) in RANGES.items():
        if range_name != "as given" and not worth(low, high):
            continue
        x0 = rescale(data)
        settings = [("as wrapped", denoiser.schedule, *convention) for convention in own]
        if range_name == "as given":
            settings += _other_settings(denoiser)
        for name, schedule, time_name, convention in settings:
            times = [float(t) for t in schedule.t_of_lam(LEVELS)]
            predict = _raw(denoiser, schedule, convention, cond)
            wrapped = convention is denoiser.network_time and schedule is denoiser.schedule
            outputs = _raw_outputs(schedule, predict, x0, noise, times, wrapped=wrapped)
            for reading, (predicts, sign) in READINGS.items():
                scores = [math.inf] if outputs is None else _scores(schedule, predicts, sign, x0, noise, times, outputs)
                differs = (reading != denoiser.predicts, range_name != "as given", time_name != "as wrapped", name != "as wrapped")
                row = {"predicts": reading, "time": time_name, "data": range_name, "schedule": name, "changes": sum(differs)}
                table.append({**row, "score": sum(scores) / len(scores), "scores": scores})
    return table


def _own_times(denoiser: Denoiser) -> list[tuple[str, Any]]:
    """The network's time as wrapped, and the other conventions that differ from it."""
    schedule = denoiser.schedule
    times = schedule.t_of_lam(LEVELS)
    wrapped = [float(denoiser.network_time(np.asarray(t))) for t in times]
    found = [("as wrapped", denoiser.network_time)]
    for name, convention in TIMES.items():
        if not np.allclose([float(convention(schedule, np.asarray(t))) for t in times], wrapped):
            found.append((name, lambda t, convention=convention: convention(schedule, t)))
    return found


def _other_settings(denoiser: Denoiser) -> list[tuple[str, NoiseSchedule, str, Any]]:
    """Other schedules, each with its own time and, if that is in [0, 1], a thousand times it."""
    found = []
    for name, schedule in OTHER_SCHEDULES.items():
        if schedule.same_noise(denoiser.schedule):
            continue
        found.append((name, schedule, "its own", schedule.network_time))
        if isinstance(schedule, EDM):
            found.append((name, schedule, "log(sigma) / 4", lambda t: 0.25 * np.log(t)))
        elif not isinstance(schedule, FromBetas):
            found.append((name, schedule, "1000 times its own", lambda t: 1000.0 * t))
    return found


def _raw(denoiser: Denoiser, schedule: NoiseSchedule, convention: Any, cond: dict[str, Any]) -> Callable[[Tensor, float], Tensor]:
    """The network under another time, its output as it is."""
    raw = Denoiser(
        denoiser.network,
        schedule,
        "data",
        network_time=convention,
        integer_time=denoiser.integer_time,
        scalar_time=denoiser.scalar_time,
        network_dtype=denoiser.network_dtype,
    )
    return lambda x, t: raw(x, t, **cond)


def _raw_outputs(
    schedule: NoiseSchedule,
    predict: Callable[[Tensor, float], Tensor],
    x0: Tensor,
    noise: Tensor,
    times: list[float],
    *,
    wrapped: bool,
) -> list[Tensor] | None:
    """The outputs at every level. None if the network cannot take such times, or if at the middle level no reading beats a guess."""

    def noised(t: float) -> Tensor:
        return float(schedule.alpha(t)) * x0 + float(schedule.sigma(t)) * noise

    middle = len(times) // 2
    try:
        with np.errstate(all="ignore"):  # a network may be a formula, which other times than its own lead out of its domain
            first = predict(noised(times[middle]), times[middle])
            if not wrapped:
                scores = [_scores(schedule, *reading, x0, noise, [times[middle]], [first])[0] for reading in READINGS.values()]
                if min(scores) > _worst(len(x0)):
                    return None
            return [first if k == middle else predict(noised(t), t) for k, t in enumerate(times)]
    except Exception:
        if wrapped:
            raise
        return None


def _worst(count: int) -> float:
    """The score above which a reading is no better than a linear guess, which knows the mean of this very data."""
    return 0.05 + 1.0 / count


def _scores(
    schedule: NoiseSchedule, predicts: str, sign: float, x0: Tensor, noise: Tensor, times: list[float], outputs: list[Tensor]
) -> list[float]:
    """At every level, the log of the error over that of the linear guess of the same data from the same noise."""
    mean = x0.mean(dim=0)
    variance, scores = max(float((x0 - mean).square().mean()), 1e-12), []
    for t, output in zip(times, outputs, strict=True):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        a, b = data_coefficients(predicts, alpha, sigma)
        x = alpha * x0 + sigma * noise
        error = float((a * x + sign * b * output - x0).square().mean())
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        linear = float((mean + gain * (x - alpha * mean) - x0).square().mean())
        scores.append(math.log(max(error, 1e-30) / linear) if math.isfinite(error) else math.inf)
    return scores


def _verdict(mine: dict[str, Any], best: dict[str, Any], data: Tensor, info: ModelInfo) -> tuple[bool, str]:
    low, high = float(data.min()), float(data.max())
    bad = _worst(len(data))
    nothing = best["score"] > bad
    gap = (
        0.0
        if nothing
        else max(m - b if math.isfinite(m) else math.inf for m, b in zip(mine["scores"], best["scores"], strict=True))
    )
    if nothing or (gap <= MARGIN and mine["score"] > bad):
        return (
            False,
            f"no reading that was tried predicts this data better than a linear guess (this one has {_ratio(mine['score'])} times its "
            f"error): the network is untrained, or was trained on other data than these, which span {low:.3g} to {high:.3g}.",
        )
    if best is not mine and gap > MARGIN:
        own = best["schedule"] == "as wrapped"
        changes = [
            f"it predicts {best['predicts']!r}, not {mine['predicts']!r}" if best["predicts"] != mine["predicts"] else "",
            f"its schedule is {best['schedule']} with {'its' if best['time'] == 'its own' else best['time'] + ' as'} time"
            if not own
            else "",
            f"its time is {best['time']}" if own and best["time"] != mine["time"] else "",
            f"it wants its data as {best['data']} (yours spans {low:.3g} to {high:.3g})" if best["data"] != mine["data"] else "",
        ]
        found = " and ".join(change for change in changes if change)
        return False, f"most likely {found}: at some noise level that reading has {_ratio(-gap)} of this one's error."
    if info.data_range is not None and (low < info.data_range[0] - 0.05 or high > info.data_range[1] + 0.05):
        return (
            False,
            f"the data spans {low:.3g} to {high:.3g}, but the model was trained on {info.data_range[0]:g} to {info.data_range[1]:g}.",
        )
    others = (
        "no other reading that was tried does better" if best is mine else "no other reading that was tried does clearly better"
    )
    return True, f"the network denoises this data with {_ratio(mine['score'])} of a linear guess's error; {others}."


def _ratio(score: float) -> str:
    return f"{math.exp(max(min(score, 50.0), -50.0)):.3g}"
