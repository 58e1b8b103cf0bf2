"""What the server serves beside its model, and its limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fewstep.errors import ArtefactError, FewstepError
from fewstep.plan import Plan

__all__ = ["Settings", "load_plans"]


@dataclass(frozen=True)
class Settings:
    """Plans by name, the token, and limits of a request.

    Args:
        plans: plans that requests may name, all for the model's noise schedule.
        token: what requests must bring as ``Authorization: Bearer TOKEN``; None for no token.
        samples: samples a request at most.
        calls: network calls a sample at most.
        body: bytes of a request's body at most.
        timeout: seconds from the request's arrival to its answer.
        drain: seconds that running requests have when the server is told to stop.
        stall: seconds in which the engine, while it has work, must move, or ``/health`` says that it is stalled: longer than any network
            call takes.
        per_client: requests of one address that run at a time; 0 for any number.
        streams: requests that are given previews at a time, a thread each; those beyond get their samples without.

    Raises:
        ValueError: for a limit that nothing can keep.

    Example:
        >>> Settings(samples=8).samples
        8
    """

    plans: Mapping[str, Plan] = field(default_factory=dict)
    token: str | None = None
    samples: int = 64
    calls: int = 100
    body: int = 65_536
    timeout: float = 60.0
    drain: float = 30.0
    stall: float = 120.0
    per_client: int = 0
    streams: int = 32

    def __post_init__(self) -> None:
        for name in ("samples", "calls", "body", "streams", "per_client"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}.")
        for name in ("timeout", "drain", "stall"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number of seconds, got {getattr(self, name)!r}.")
        for name in ("samples", "calls", "body", "timeout", "streams", "stall"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}.")
        for name in ("drain", "per_client"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}.")
        if self.token is not None and (not self.token or not self.token.isascii() or not self.token.isprintable()):
            raise ValueError("a token is one or more printable ASCII characters.")
        if self.token is not None and self.token != self.token.strip():
            raise ValueError("a token has no blank at its begin or end, which headers lose.")


def load_plans(folder: str | Path) -> tuple[dict[str, Plan], list[str]]:
    """The plans of a folder.

    Returns:
        the plans by the names of their files without ``.safetensors``; and the names of the other ``.safetensors``, as the weights of a
        student beside its plans.

    Raises:
        NotADirectoryError: if there is no such folder.
        FewstepError: if it holds no plan.
        ArtefactError: for a plan that is damaged.
    """
    place = Path(folder)
    if not place.is_dir():
        raise NotADirectoryError(f"{folder} is no folder of plans.")
    found = {file: _plan_of(file) for file in sorted(place.glob("*.safetensors"))}
    plans = {file.stem: plan for file, plan in found.items() if plan is not None}
    if not plans:
        raise FewstepError(f"{folder} holds no plan; `fewstep plan make` and `fewstep tune` write them as NAME.safetensors.")
    return plans, [file.name for file, plan in found.items() if plan is None]


def _plan_of(file: Path) -> Plan | None:
    try:
        return Plan.load(file)
    except ArtefactError:
        if file.stem.startswith("plan"):
            raise
        return None
