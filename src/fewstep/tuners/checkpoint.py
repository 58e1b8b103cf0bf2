"""What a tuning run has finished, in a folder, so that it goes on after it was stopped: what it may spend, the exact paths, and the plans
of every number of calls with their errors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.artefacts import Artefact, write_atomically
from fewstep.errors import ArtefactError
from fewstep.identity import identity
from fewstep.plan import Plan
from fewstep.schedules import NoiseSchedule
from fewstep.tuners.effort import Effort
from fewstep.tuners.paths import Paths
from fewstep.tuners.task import Candidate, Errors
from fewstep.version import __version__

__all__ = ["Checkpoint", "Spending", "check_savable"]

KIND = "paths"
TENSORS = ("times", "states", "predictions", "target", "weights")


SPENDING = "spending.json"


@dataclass(frozen=True)
class Spending:
    """What a run may spend, and what it has spent.

    Attributes:
        effort: on exact paths and the first method.
        budget: evaluations in all; None for no limit.
        evaluations: so far, those of earlier parts of a run that was stopped included.
        seconds: so far, likewise.
    """

    effort: Effort
    budget: int | None
    evaluations: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """A folder of one run.

    Args:
        folder: where the files go; made when the first is written.
        key: a digest of all that the run depends on. Files of another run are refused.
    """

    folder: Path
    key: str

    @staticmethod
    def key_of(**settings: Any) -> str:
        """A digest of JSON values and tensors."""
        hasher = hashlib.sha256()
        for name, value in sorted(settings.items()):
            hasher.update(name.encode())
            if isinstance(value, (Tensor, np.ndarray)):
                numbers = np.ascontiguousarray(torch.as_tensor(value).detach().cpu().double().numpy())
                hasher.update(str(numbers.shape).encode() + numbers.tobytes())
            else:
                hasher.update(json.dumps(value, sort_keys=True).encode())
        return hasher.hexdigest()

    @staticmethod
    def key_of_run(denoiser: Any, **settings: Any) -> str:
        """A digest of a model, the version of fewstep, and JSON values and tensors."""
        told = {"model": identity(denoiser), "schedule": denoiser.schedule.config(), "fewstep": __version__}
        return Checkpoint.key_of(**told, **settings)

    def paths(self, name: str, schedule: NoiseSchedule, like: Tensor) -> Paths | None:
        """Exact paths that were saved, in the precision and on the device of a tensor; None if there are none.

        Raises:
            ArtefactError: if they are damaged or of another run.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        artefact = Artefact.load(path, kind=KIND)
        self._check(artefact.meta, path)
        tensors = {key: torch.from_numpy(value) for key, value in artefact.tensors.items()}
        states, predictions, target = (tensors[key].to(like) for key in ("states", "predictions", "target"))
        dtypes = artefact.meta["dtypes"]
        cond = {
            name: tensors[f"cond.{name}"].to(like.device, getattr(torch, dtype)) if dtype else artefact.tensors[f"cond.{name}"]
            for name, dtype in dtypes.items()
        }
        weights = artefact.tensors["weights"] if artefact.meta["weighted"] else None
        cond |= artefact.meta["cond"]
        told = artefact.meta["error"], weights, artefact.meta["whole"]
        return Paths(schedule, artefact.tensors["times"], states, predictions, target, cond, *told)

    def save_paths(self, name: str, paths: Paths) -> None:
        """Save exact paths."""
        arrays = {key: _array(getattr(paths, key)) for key in TENSORS if getattr(paths, key) is not None}
        kept = {key: value for key, value in paths.cond.items() if isinstance(value, (Tensor, np.ndarray))}
        arrays |= {f"cond.{key}": _array(value) for key, value in kept.items()}
        dtypes = {key: str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else "" for key, value in kept.items()}
        plain = {key: value for key, value in paths.cond.items() if key not in kept}
        meta = {
            "key": self.key,
            "error": paths.error,
            "weighted": paths.weights is not None,
            "whole": paths.whole,
            "cond": plain,
            "dtypes": dtypes,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        Artefact(KIND, meta, arrays).save(self.folder / f"{name}.safetensors")

    def spending(self) -> Spending | None:
        """What the run was to spend and has spent; None at its beginning.

        Raises:
            ArtefactError: if it is of another run.
        """
        path = self.folder / SPENDING
        if not path.exists():
            return None
        document = _read(path)
        if document.get("key") != self.key and {file.name for file in self.folder.iterdir()} == {SPENDING}:
            return None  # of another run that was stopped before it had anything to keep
        self._check(document, path)
        told = document["spending"]
        robust = tuple(told["effort"].pop("robust"))
        return Spending(**{**told, "effort": Effort(**told["effort"], robust=robust)})

    def save_spending(self, spending: Spending) -> None:
        """Save what is to be spent and has been."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / SPENDING, json.dumps({"key": self.key, "spending": asdict(spending)}, indent=1).encode())

    def candidates(self, nfe: int) -> list[Candidate] | None:
        """Everything that was validated for a number of calls; None if it was not finished.

        Raises:
            ArtefactError: if the files are damaged or of another run.
        """
        path = self.folder / f"calls-{nfe}.json"
        if not path.exists():
            return None
        document = _read(path)
        self._check(document, path)
        try:
            plans = [Plan.load(self.folder / f"calls-{nfe}-{k}.safetensors") for k in range(len(document["candidates"]))]
        except FileNotFoundError as error:
            raise ArtefactError(
                f"{self.folder} is damaged: {Path(str(error.filename or error)).name} is missing. Begin anew."
            ) from error
        return [_candidate(told, plan) for told, plan in zip(document["candidates"], plans, strict=True)]

    def save_candidates(self, nfe: int, candidates: list[Candidate]) -> None:
        """Save what was validated for a number of calls; the list last, so that it is there when all is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for k, candidate in enumerate(candidates):
            candidate.plan.save(self.folder / f"calls-{nfe}-{k}.safetensors")
        document = json.dumps({"key": self.key, "candidates": [candidate.told for candidate in candidates]}, indent=1)
        write_atomically(self.folder / f"calls-{nfe}.json", document.encode())

    def _check(self, document: dict[str, Any], path: Path) -> None:
        if document.get("key") != self.key:
            raise ArtefactError(
                f"the folder {self.folder} is of another run, as {path.name} in it says (model, conditions, options or noise differ). Give "
                f"another folder, or remove that one (fewstep tune: --fresh)."
            )


def _candidate(told: dict[str, Any], plan: Plan) -> Candidate:
    errors = Errors(told["rms"], told["median"])
    challenge = None if told["challenge"] is None else tuple(told["challenge"])
    return Candidate(told["name"], plan, errors, told["distance"], told["gain"], told["tuned"], challenge)


def check_savable(cond: Mapping[str, Any]) -> None:
    """Refuse conditions that a checkpoint cannot keep, before anything is computed.

    Raises:
        ValueError: for a condition that is no tensor, array or JSON value.
    """
    try:
        json.dumps({name: None if isinstance(value, (Tensor, np.ndarray)) else value for name, value in cond.items()})
    except TypeError as error:
        raise ValueError(f"a checkpoint keeps conditions that are tensors, arrays or plain values: {error}.") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ArtefactError(f"{path} is damaged: {error}. Begin anew, with a fresh folder.") from error


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)
