"""What the server needs of a model beside its network calls: conditions from words, plans by name, pictures from samples."""

from __future__ import annotations

import base64
import io
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.denoisers import innermost
from fewstep.errors import FewstepError, PlanError
from fewstep.evaluate.report import image_grid
from fewstep.plan import Plan
from fewstep.solvers import make_plan

__all__ = ["PlanShelf", "ServedModel", "npy_of", "png_of", "pngs_of", "short_line"]

KEPT_PLANS = 256
SMALLEST_SIDE = 64
"""Pixels: pictures in a grid are enlarged to about this."""


def short_line(text: object, most: int = 300) -> str:
    """A message as one line of ASCII that is not too long, whatever was in it."""
    line = " ".join(str(text).split()).encode("ascii", "replace").decode()
    return line if len(line) <= most else f"{line[: most - 3]}..."


class PlanShelf:
    """Plans by what they are made of, the newest kept: a plan is made once, not once a request.

    Args:
        schedule: noise schedule of the model.
        most: how many are kept.

    Example:
        >>> from fewstep.schedules import EDM
        >>> shelf = PlanShelf(EDM())
        >>> shelf("ddim", "karras", "zero", 4) is shelf("ddim", "karras", "zero", 4)
        True
    """

    def __init__(self, schedule: Any, most: int = KEPT_PLANS):
        self._schedule, self._most = schedule, most
        self._plans: OrderedDict[tuple[str, str, str, int], Plan] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, solver: str, grid: str, final: str, nfe: int) -> Plan:
        """The plan.

        Raises:
            FewstepError: for names that do not exist, or a plan that cannot be made.
        """
        key = (solver, grid, final, nfe)
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
        plan = make_plan(solver, self._schedule, nfe, grid=grid, final=final)
        with self._lock:
            self._plans[key] = plan
            while len(self._plans) > self._most:
                self._plans.popitem(last=False)
        return plan


@dataclass(frozen=True)
class ServedModel:
    """A model and what its requests are translated with.

    Args:
        denoiser: as `fewstep.load` gives it, not guided.
        null: the conditions that guidance leads away from, None for a model that is not guided.
    """

    denoiser: Any
    null: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.info.shape is None:
            raise FewstepError(f"{self.info.name} does not say the shape of its samples, which a server must know.")
        object.__setattr__(self, "_device_lock", threading.Lock())

    @classmethod
    def of(cls, denoiser: Any, *, negative: str | None = None) -> ServedModel:
        """What is served of a model: of a pipeline, what it samples from, with its own text for guidance to lead away from.

        A pipeline that limits its predictions (``clip_sample``) does so after guidance, an engine before; it is served without guidance.

        Args:
            denoiser: as `fewstep.load` gives it.
            negative: text that guidance leads away from, of a model that takes prompts.

        Raises:
            PlanError: for a negative text of another model.
        """
        prompted, null = bool(innermost(denoiser, "takes_prompts")), None
        if negative is not None and not prompted:
            raise PlanError(f"{denoiser.info.name} takes no prompts: leave the negative one out.")
        if prompted:
            null = denoiser.encode([""], negative)[1]
        elif "null" in denoiser.info.conditions.get("label", {}):
            null = {"label": denoiser.info.conditions["label"]["null"]}
        family = innermost(denoiser, "family")
        if family is None:
            return cls(denoiser, null)
        if family.distilled():
            return cls(denoiser)
        limited = denoiser.guided(1.0)
        return cls(limited, null if limited is denoiser else None)

    @property
    def info(self) -> Any:
        """`fewstep.denoisers.ModelInfo` of the model."""
        return self.denoiser.info

    @property
    def takes_prompts(self) -> bool:
        """Whether a request must bring a prompt."""
        return bool(innermost(self.denoiser, "takes_prompts"))

    @property
    def distilled(self) -> bool:
        """Whether the network takes the scale of guidance as a condition."""
        family = innermost(self.denoiser, "family")
        return family is not None and family.distilled()

    @property
    def classes(self) -> Mapping[str, int] | None:
        """``{"classes": n, "null": label}`` of the condition "label", None without."""
        return self.info.conditions.get("label")

    @property
    def pictures(self) -> bool:
        """Whether samples, decoded if they are latents, are single pictures."""
        shape = self.info.shape
        return len(shape) == 3 and (innermost(self.denoiser, "decode") is not None or shape[0] in (1, 3))

    def conditions(
        self, count: int, label: int | list[int] | None, prompt: str | list[str] | None, guidance: float
    ) -> dict[str, Any]:
        """Conditions with one row a sample.

        Raises:
            PlanError: for what the model does not take, or if it is given nothing that it needs.
        """
        name = self.info.name
        if guidance != 1.0 and not self.distilled:
            if self.null is None:
                raise PlanError(f"{name} cannot be guided: leave guidance out.")
            if label is None and prompt is None:
                raise PlanError("guidance leads to a class or a prompt: give one.")
        cond = self._labels(count, label) | self._prompts(count, prompt)
        return cond | ({"guidance": torch.full((count,), guidance, dtype=torch.float32)} if self.distilled else {})

    def _labels(self, count: int, label: int | list[int] | None) -> dict[str, Tensor]:
        known, name = self.classes, self.info.name
        if known is None:
            if label is not None:
                raise PlanError(f"{name} takes no classes: leave label out.")
            return {}
        if label is None:
            if "null" not in known:
                raise PlanError(f"{name} needs a class: give label, from 0 to {known['classes'] - 1}.")
            return {"label": torch.full((count,), known["null"])}
        labels = [label] if isinstance(label, int) else label
        if not labels or max(labels) >= known["classes"]:
            raise PlanError(f"{name} has the classes 0 to {known['classes'] - 1}, got label {short_line(labels, 60)}.")
        return {"label": torch.tensor([labels[i % len(labels)] for i in range(count)])}

    def _prompts(self, count: int, prompt: str | list[str] | None) -> dict[str, Tensor]:
        if not self.takes_prompts:
            if prompt is not None:
                raise PlanError(f"{self.info.name} takes no prompts: leave prompt out.")
            return {}
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not prompts:
            raise PlanError(f"{self.info.name} takes prompts: give prompt.")
        with self._device_lock:  # type: ignore[attr-defined]
            return innermost(self.denoiser, "encode")([prompts[i % len(prompts)] for i in range(count)])[0]

    @torch.no_grad()
    def shown(self, samples: Tensor) -> Tensor:
        """Samples as a person sees them: latents decoded, on the CPU."""
        decode = innermost(self.denoiser, "decode")
        if decode is None:
            return samples.cpu()
        with self._device_lock:  # type: ignore[attr-defined]
            return decode(samples).cpu()

    @property
    def data_range(self) -> tuple[float, float]:
        """What is black and what is white."""
        return self.info.data_range or (-1.0, 1.0)


def png_of(pictures: Tensor, data_range: tuple[float, float]) -> bytes:
    """One PNG of all pictures ``"batch channels height width"`` in a square, small ones enlarged."""
    return image_grid(
        pictures, data_range, columns=math.ceil(math.sqrt(len(pictures))), scale=max(1, SMALLEST_SIDE // pictures.shape[-1])
    )


def pngs_of(pictures: Tensor, data_range: tuple[float, float]) -> list[str]:
    """A PNG of each picture ``"batch channels height width"``, as large as it is, in base64."""
    return [base64.b64encode(image_grid(one[None], data_range, columns=1, scale=1)).decode() for one in pictures]


def npy_of(samples: Tensor) -> bytes:
    r"""Samples as the bytes of a .npy file.

    Example:
        >>> npy_of(torch.zeros(2, 3))[:6]
        b'\x93NUMPY'
    """
    file = io.BytesIO()
    np.save(file, samples.detach().cpu().numpy(), allow_pickle=False)
    return file.getvalue()
