"""What commands that run a network share: device, precision, seeds, labels, and folders that are written whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import secrets
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.cli.options import Common
from fewstep.cli.parsing import parse_size
from fewstep.denoisers import Denoiser
from fewstep.errors import FewstepError
from fewstep.grids import check_grid_name
from fewstep.loading import is_student, load
from fewstep.solvers import make_solver
from fewstep.version import __version__

__all__ = [
    "ask_for",
    "check_plannable",
    "machine",
    "new_folder",
    "open_model",
    "open_student",
    "parse_labels",
    "progress",
    "quickest_threads",
    "read_arrays",
    "seconds_a_call",
    "state_dtype",
]


SMALL = 5_000_000
"""Parameters of a network below which one processor thread serves it best: more only wait for each other."""


def open_model(name: str, options: Common, nfe: int | None = None, *, every: bool = False) -> Denoiser:
    """The model on its device, in its precision; of a student that is told its number of calls, for that many, or for every number."""
    device = _device(options)
    denoiser = _load(name, device, _network_dtype(options), nfe, every)
    _few_threads(denoiser.network, options)
    size = getattr(options, "size", "")
    return _sized(denoiser, name, size) if size else denoiser


def open_student(name: str, options: Common) -> Any:
    """The student of a folder, on its device, in its precision and size.

    Raises:
        ValueError: as of `open_model`.
    """
    from fewstep.distill.student import Student

    device = _device(options)
    student = Student.load(name, device=device, dtype=_network_dtype(options))
    _few_threads(student.network, options)
    size = getattr(options, "size", "")
    return dataclasses.replace(student, teacher=_sized(student.teacher, name, size)) if size else student


def _device(options: Common) -> torch.device:
    """The device, if it can be used; the number of threads is set."""
    if options.threads < 0:
        raise ValueError(f"--threads must be at least 0, got {options.threads}.")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _few_threads(network: Any, options: Common) -> None:
    """One thread for a small network, if nothing was said."""
    parameters = sum(p.numel() for p in network.parameters()) if isinstance(network, torch.nn.Module) else 0
    if not options.threads and torch.device(options.device).type == "cpu" and parameters < SMALL:
        torch.set_num_threads(1)


def _sized(denoiser: Any, name: str, size: str) -> Any:
    if not isinstance(getattr(denoiser, "size", None), tuple):
        raise ValueError(f"{name} has one size; leave --size out.")
    return denoiser.with_size(parse_size(size))


def _load(name: str, device: torch.device, dtype: torch.dtype | None, nfe: int | None, every: bool) -> Denoiser:
    """The model of a name, or the student of a folder."""
    if every:
        from fewstep.serve.students import load_served

        return load_served(name, device=device, dtype=dtype)
    if not is_student(name):
        return load(name, device=device, dtype=dtype)
    from fewstep.distill.student import Student

    student = Student.load(name, device=device, dtype=dtype)
    return student.denoiser_of(nfe if nfe in student.plans else None)


def check_plannable(solver: str, grid: str, nfe: int) -> None:
    """Refuse what no model can be sampled with, before one is loaded.

    Raises:
        UnknownNameError: for a solver or a grid that does not exist.
        ValueError: for a number of calls below 1.
    """
    make_solver(solver)
    check_grid_name(grid)
    if nfe < 1:
        raise ValueError(f"--nfe must be at least 1, got {nfe}.")


def progress(options: Common, **details: Any) -> Any:
    """A progress bar on standard error; where that is no terminal, a line every ten seconds."""
    from tqdm import tqdm

    pause = {"mininterval": 0.1} if sys.stderr.isatty() else {"mininterval": 10.0, "delay": 10.0}
    return tqdm(disable=options.quiet, **pause, **details)


@torch.no_grad()
def seconds_a_call(denoiser: Denoiser, options: Common, count: int, cond: dict[str, torch.Tensor]) -> float:
    """What a call of the network takes for one sample, in the better of two calls for `count` of them, with the first conditions."""
    x = torch.zeros(count, *ask_for(denoiser.info.shape, denoiser.info.name), dtype=state_dtype(options), device=options.device)
    cond = {name: value[:count] for name, value in cond.items()}
    times = []
    for _ in range(3):  # the first one warms up
        began = time.perf_counter()
        float(denoiser(x, denoiser.schedule.t_end, **cond).sum())
        times.append(time.perf_counter() - began)
    return min(times[1:]) / count


def quickest_threads(denoiser: Denoiser, options: Common, count: int, cond: dict[str, torch.Tensor]) -> int:
    """How many processor threads serve calls for `count` samples best, one or all, measured here; it is set. Given --threads, those."""
    threads = {1, int(os.environ.get("OMP_NUM_THREADS", 0)) or (os.cpu_count() or 1)}
    if options.threads or torch.device(options.device).type != "cpu":
        return torch.get_num_threads()
    times = {}
    for number in sorted(threads):
        torch.set_num_threads(number)
        times[number] = seconds_a_call(denoiser, options, count, cond)
    best = min(threads, key=lambda number: times[number])
    torch.set_num_threads(best)
    return best


def _network_dtype(options: Common) -> torch.dtype | None:
    """Precision of the network; None: as it is."""
    return None if options.dtype == "float32" else getattr(torch, options.dtype)


def state_dtype(options: Common) -> torch.dtype:
    """Precision of the state."""
    return torch.float64 if options.dtype == "float64" else torch.float32


def parse_labels(text: str | None, denoiser: Denoiser, count: int, *, first: int = 0) -> torch.Tensor | None:
    """Labels of samples from the `first` on: ``"3"``, ``"0,1,2"`` (in turn), ``"each"`` (every class in turn) or None (no condition)."""
    known = denoiser.info.conditions.get("label")
    if known is None:
        if text is not None:
            raise ValueError(f"{denoiser.info.name} takes no labels; leave --label out.")
        return None
    if text is None:
        if "null" not in known:
            raise ValueError(f"{denoiser.info.name} needs a class: give --label.")
        return torch.full((count,), known["null"])
    try:
        labels = list(range(known["classes"])) if text == "each" else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f'--label takes a class, a list like 0,1,2 or "each", not {text!r}.') from None
    if not all(0 <= label < known["classes"] for label in labels):
        raise ValueError(f"{denoiser.info.name} has the classes 0 to {known['classes'] - 1}, not {text}.")
    return torch.tensor([labels[i % len(labels)] for i in range(first, first + count)])


def read_arrays(path: str | Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, or the one of a .npy file under this name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, or holds anything but plain numbers.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        return {name: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npy or .npz file of plain numbers.") from error


def machine() -> dict[str, Any]:
    """What the figures were made on, for the record."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the platform module's answer stands
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fewstep": __version__,
    }


def ask_for(data_shape: tuple[int, ...] | None, name: str) -> tuple[int, ...]:
    """The shape of one sample, which a model must say to be sampled from the command line."""
    if data_shape is None:
        raise FewstepError(f"{name} does not say the shape of its samples.")
    return data_shape


@contextmanager
def new_folder(path: str, ours: str = "") -> Iterator[Path]:
    """A folder to fill, which appears under its name when all is written. Files of an old one there are replaced one by one.

    Args:
        path: of the folder.
        ours: a regular expression for the names of files that the command writes, some of which an earlier run may have left: those go.
            In folders with such a name as well, which go when they are empty.

    Raises:
        OSError: before any work is done, if the place cannot be written.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; the output is a folder.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} into.")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"the folder {target} cannot be written.")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    try:
        yield temporary
        if not target.exists():
            temporary.rename(target)
            return
        _replace(temporary, target, re.compile(ours))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(new: Path, old: Path, ours: re.Pattern[str]) -> None:
    """Move what is in a new folder into an old one, and take away what an earlier run left there."""
    stale = [place for place in sorted(old.iterdir()) if ours.fullmatch(place.name) and not (new / place.name).exists()]
    for file in sorted(new.iterdir()):
        place = old / file.name
        if file.is_dir() and place.is_dir():
            _replace(file, place, ours)
        else:
            os.replace(file, place)
    for place in stale:
        _take_away(place, ours)


def _take_away(place: Path, ours: re.Pattern[str]) -> None:
    """A file, or what is ours in a folder, and the folder if nothing else is in it."""
    if place.is_symlink() or not place.is_dir():
        place.unlink()
        return
    for inner in place.iterdir():
        if ours.fullmatch(inner.name):
            _take_away(inner, ours)
    if not any(place.iterdir()):
        place.rmdir()
