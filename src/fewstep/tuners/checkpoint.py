"""What a tuning run has finished, in a folder, so that it goes on after it was stopped: what it may spend, the exact paths, and the plans
of every number of calls with their errors.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.artefacts import Artefact, write_atomically
from fewstep.errors import ArtefactError
from fewstep.plan import Plan
from fewstep.schedules import NoiseSchedule
from fewstep.tuners.effort import Effort
from fewstep.tuners.paths import Paths
from fewstep.tuners.task import Candidate, Errors

__all__ = ["Checkpoint", "Spending"]

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
            if isinstance(value, Tensor):
                hasher.update(
                    str(tuple(value.shape)).encode() + np.ascontiguousarray(value.detach().cpu().double().numpy()).tobytes()
                )
            else:
                hasher.update(json.dumps(value, sort_keys=True).encode())
        return hasher.hexdigest()

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
        cond = {key.removeprefix("cond."): value.to(like.device) for key, value in tensors.items() if key.startswith("cond.")}
        weights = artefact.tensors["weights"] if artefact.meta["weighted"] else None
        cond |= artefact.meta["cond"]
        return Paths(schedule, artefact.tensors["times"], states, predictions, target, cond, artefact.meta["error"], weights)

    def save_paths(self, name: str, paths: Paths) -> None:
        """Save exact paths."""
        arrays = {key: _array(getattr(paths, key)) for key in TENSORS if getattr(paths, key) is not None}
        arrays |= {f"cond.{key}": _array(value) for key, value in paths.cond.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in paths.cond.items() if not isinstance(value, Tensor)}
        meta = {"key": self.key, "error": paths.error, "weighted": paths.weights is not None, "cond": plain}
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
        document = json.loads(path.read_text())
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
        document = json.loads(path.read_text())
        self._check(document, path)
        plans = [Plan.load(self.folder / f"calls-{nfe}-{k}.safetensors") for k in range(len(document["candidates"]))]
        return [
            Candidate(told["name"], plan, Errors(told["rms"], told["median"]), told["distance"], told["tuned"])
            for told, plan in zip(document["candidates"], plans, strict=True)
        ]

    def save_candidates(self, nfe: int, candidates: list[Candidate]) -> None:
        """Save what was validated for a number of calls; the list last, so that it is there when all is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for k, candidate in enumerate(candidates):
            candidate.plan.save(self.folder / f"calls-{nfe}-{k}.safetensors")
        told = [{"name": c.name, "tuned": c.tuned, "distance": c.distance, **asdict(c.errors)} for c in candidates]
        document = json.dumps({"key": self.key, "candidates": told}, indent=1)
        write_atomically(self.folder / f"calls-{nfe}.json", document.encode())

    def _check(self, document: dict[str, Any], path: Path) -> None:
        if document.get("key") != self.key:
            raise ArtefactError(
                f"{path} is of another run (model, options or noise differ). Give another folder, or remove this one."
            )


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
