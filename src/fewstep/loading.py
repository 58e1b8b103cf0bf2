"""From what a user has to a denoiser: `load`; and whether it is wrapped right: `check`.

`load` takes a shipped model's name, a folder of the form that `fewstep.models.save_model` writes, or any module or callable with its
schedule. `check` finds a wrong prediction type, time convention or data range by trying the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.denoisers import Denoiser, ModelInfo
from fewstep.errors import ArtefactError, UnknownNameError
from fewstep.models import read_model
from fewstep.noise import draw_noise
from fewstep.predictions import data_coefficients
from fewstep.schedules import NoiseSchedule

__all__ = ["CheckReport", "check", "load", "shipped_models"]

SHIPPED = Path(__file__).parent / "shipped"


def shipped_models() -> list[str]:
    """Names of the models inside the package.

    Example:
        >>> "digits" in shipped_models()
        True
    """
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / "config.json").is_file()) if SHIPPED.is_dir() else []


def load(
    source: str | Path | Callable[..., Tensor],
    *,
    schedule: NoiseSchedule | None = None,
    predicts: str | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Denoiser:
    """A denoiser from a shipped model's name, a model folder, or a network.

    Args:
        source: ``"digits"``, ``"photos"``; the path of a folder with ``config.json`` and ``model.safetensors``; a module or callable.
        schedule, predicts: needed with a module or callable, and refused with a folder, which says them itself.
        device: where a module goes.
        **options: of `Denoiser`, with a module or callable.

    Returns:
        A `Denoiser`; its ``info`` holds shape, range and conditions of the data.

    Raises:
        ArtefactError: if the folder is damaged, or is not one of ours.
        FileNotFoundError: if there is no such folder or name.
        TypeError: if schedule or predicts are missing or superfluous.

    Example:
        >>> load("digits").info.shape
        (1, 8, 8)
    """
    if callable(source):
        if schedule is None or predicts is None:
            raise TypeError(
                "a network needs its schedule= and what it predicts=, e.g. schedule=fewstep.schedules.EDM(), predicts='data'."
            )
        network = source.to(device) if isinstance(source, torch.nn.Module) else source
        return Denoiser(network, schedule, predicts, **options)
    if schedule is not None or predicts is not None or options:
        raise TypeError(f"{source} says its schedule and prediction itself; leave schedule=, predicts= and other options out.")
    folder = _folder_of(source)
    network, config = read_model(folder)
    info = ModelInfo(
        name=folder.name,
        shape=tuple(config.shape),
        data_range=config.data_range,
        conditions=config.conditions,
        fingerprint=config.fingerprint,
        extra=config.extra,
    )
    return Denoiser(network.to(device).eval().requires_grad_(False), config.schedule, config.predicts, info=info)


def _folder_of(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ArtefactError(f"{path} has no config.json: it is not a model folder of fewstep's form.")
        return path
    if isinstance(source, str) and source in shipped_models():
        return SHIPPED / source
    if path.exists():
        raise ArtefactError(f"{path} is a file; a model is a folder with config.json and model.safetensors.")
    if isinstance(source, str) and "/" not in source and "\\" not in source:
        raise UnknownNameError("model", source, shipped_models())
    raise FileNotFoundError(f"there is no model folder {path}.")


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
RANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as given": lambda x: x,
    "2 x - 1": lambda x: 2.0 * x - 1.0,
    "(x + 1) / 2": lambda x: 0.5 * (x + 1.0),
    "x / 127.5 - 1": lambda x: x / 127.5 - 1.0,
}
SIGNED = {f"minus {name}": (name, -1.0) for name in ("noise", "velocity", "flow")}
READINGS = {**{name: (name, 1.0) for name in ("noise", "data", "velocity", "flow", "score")}, **SIGNED}
MARGIN = 0.2
"""Natural logarithm of the factor in mean squared error by which another reading must win before it counts."""
LEVELS = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""lambda of the noise levels that are tried."""


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    Attributes:
        ok: whether no other reading explains the network clearly better, and this one is better than a linear guess.
        message: the finding in words, with what to change.
        score: log of the mean squared error of the data prediction over that of the best linear guess, averaged over noise levels; below 0
            is better than the guess.
        best: the best reading: ``predicts``, ``time``, ``data`` and its ``score``.
        table: all readings, best first.
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

    Real data x_0 is noised at five levels of lambda. A network that is read rightly predicts x_0 better than the best linear guess; read
    wrongly (velocity taken for noise, t in [0, 1] for an index up to 999, data in [0, 1] for [-1, 1]) it does far worse.

    Args:
        denoiser: a `Denoiser`, not a guided one.
        data: ``"batch *shape"``, clean data; some dozens suffice.
        cond: conditions of these samples.
        seed: of the noise.
        most: how many samples are used.

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
    if data.ndim < 2 or not len(data) or not bool(torch.isfinite(data).all()):
        raise ValueError(f"data must be a finite tensor (batch, *shape) with at least one sample, got shape {tuple(data.shape)}.")
    data = data[:most] if data.is_floating_point() else data[:most].float()
    conditions = {k: v[:most] if isinstance(v, Tensor) and v.ndim else v for k, v in (cond or {}).items()}
    calls = denoiser.calls
    with torch.no_grad():
        table = _score_all(denoiser, data, conditions, seed)
    denoiser.calls = calls
    table.sort(key=lambda row: row["score"])
    mine = next(row for row in table if row["declared"])
    ok, message = _verdict(mine, table[0], data, denoiser.info)
    return CheckReport(ok, message, mine["score"], {k: table[0][k] for k in ("predicts", "time", "data", "score")}, table)


def _score_all(denoiser: Denoiser, data: Tensor, cond: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    schedule = denoiser.schedule
    times = [float(t) for t in schedule.t_of_lam(LEVELS)]
    noise = draw_noise(tuple(data.shape[1:]), range(seed, seed + len(data)), dtype=data.dtype, device=data.device)
    conventions: dict[str, Any] = {"as wrapped": denoiser.network_time}
    wrapped = np.array([float(denoiser.network_time(np.asarray(t))) for t in times])
    for name, convention in TIMES.items():
        values = np.array([float(convention(schedule, np.asarray(t))) for t in times])
        if not np.allclose(values, wrapped):
            conventions[name] = lambda t, convention=convention: convention(schedule, t)
    table = []
    for (range_name, rescale), (time_name, convention) in itertools.product(RANGES.items(), conventions.items()):
        x0 = rescale(data)
        outputs = _raw_outputs(denoiser, convention, x0, noise, times, cond)
        for reading, (predicts, sign) in READINGS.items():
            score = math.inf if outputs is None else _score(schedule, predicts, sign, x0, noise, times, outputs)
            declared = reading == denoiser.predicts and range_name == "as given" and time_name == "as wrapped"
            table.append({"predicts": reading, "time": time_name, "data": range_name, "score": score, "declared": declared})
    return table


def _raw_outputs(
    denoiser: Denoiser, convention: Any, x0: Tensor, noise: Tensor, times: list[float], cond: dict[str, Any]
) -> list[Tensor] | None:
    raw = Denoiser(
        denoiser.network,
        denoiser.schedule,
        "data",
        network_time=convention,
        integer_time=denoiser.integer_time,
        scalar_time=denoiser.scalar_time,
        network_dtype=denoiser.network_dtype,
    )
    schedule = denoiser.schedule
    try:
        with np.errstate(all="ignore"):  # a network may be a formula, which other times than its own lead out of its domain
            return [raw(float(schedule.alpha(t)) * x0 + float(schedule.sigma(t)) * noise, t, **cond) for t in times]
    except (IndexError, ValueError, OverflowError):
        if convention is denoiser.network_time:
            raise
        return None  # this network cannot take such times at all


def _score(
    schedule: NoiseSchedule, predicts: str, sign: float, x0: Tensor, noise: Tensor, times: list[float], outputs: list[Tensor]
) -> float:
    variance, scores = max(float(x0.var(dim=0, unbiased=False).mean()), 1e-12), []
    for t, output in zip(times, outputs, strict=True):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        a, b = data_coefficients(predicts, alpha, sigma)
        error = float((a * (alpha * x0 + sigma * noise) + sign * b * output - x0).square().mean())
        linear = variance * sigma**2 / (alpha**2 * variance + sigma**2)
        scores.append(math.log(max(error, 1e-30) / linear) if math.isfinite(error) else math.inf)
    return sum(scores) / len(scores)


def _verdict(mine: dict[str, Any], best: dict[str, Any], data: Tensor, info: ModelInfo) -> tuple[bool, str]:
    low, high = float(data.min()), float(data.max())
    if mine["score"] > best["score"] + MARGIN:
        changes = [
            f"it predicts {best['predicts']!r}, not {mine['predicts']!r}" if best["predicts"] != mine["predicts"] else "",
            f"its time is {best['time']}" if best["time"] != mine["time"] else "",
            f"it wants its data as {best['data']} (yours spans {low:.3g} to {high:.3g})" if best["data"] != mine["data"] else "",
        ]
        found = " and ".join(change for change in changes if change)
        factor = math.exp(min(mine["score"] - best["score"], 50.0))
        return False, f"most likely {found}: that reading has {factor:.3g} times less error."
    if mine["score"] > 0.5 * MARGIN:
        return (
            False,
            "no reading predicts this data better than a linear guess: untrained, trained on other data, or another schedule.",
        )
    if info.data_range is not None and (low < info.data_range[0] - 0.05 or high > info.data_range[1] + 0.05):
        return (
            False,
            f"the data spans {low:.3g} to {high:.3g}, but the model was trained on {info.data_range[0]:g} to {info.data_range[1]:g}.",
        )
    return (
        True,
        f"the network denoises this data with {math.exp(mine['score']):.3g} of a linear guess's error; no other reading does better.",
    )
