"""Conditions from the command line: classes for the networks that take them, prompts for pipelines of diffusers, and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fewstep.cli.options import Prompted
from fewstep.cli.parsing import prompts_of
from fewstep.cli.setup import parse_labels
from fewstep.denoisers import Denoiser
from fewstep.guidance import ClassifierFree

__all__ = ["check_null", "check_unguided", "conditions", "guided", "learnt_null"]


def conditions(denoiser: Denoiser, options: Prompted, count: int, label: str | None, *, first: int = 0) -> dict[str, torch.Tensor]:
    """Conditions with one entry a sample, on the device.

    Args:
        denoiser: the model.
        options: with the prompts.
        count: how many samples.
        label: as `parse_labels` takes it.
        first: index of the first of the samples, among those that share prompts and labels in turn.

    Raises:
        ValueError: for what the model does not take, or if it has no prompt that it needs.
    """
    prompts, name = prompts_of(options), denoiser.info.name
    if getattr(denoiser, "takes_prompts", False):
        parse_labels(label, denoiser, count)
        if not prompts:
            raise ValueError(f"{name} takes prompts: give --prompt or --prompt-file.")
        return denoiser.encode([prompts[i % len(prompts)] for i in range(first, first + count)])[0]  # type: ignore[attr-defined]
    if getattr(denoiser.network, "takes_prompts", False):
        raise ValueError(f"{name} takes prompts, but has no text encoder; give the folder of its whole pipeline.")
    if prompts or options.negative is not None:
        raise ValueError(f"{name} takes no prompts; leave --prompt, --prompt-file and --negative out.")
    labels = parse_labels(label, denoiser, count, first=first)
    return {} if labels is None else {"label": labels.to(options.device)}


def learnt_null(denoiser: Denoiser, data: Any) -> bool:
    """Whether a student learnt from samples without a class, too, of a model that knows such; for its card."""
    known = denoiser.info.conditions.get("label", {})
    if "null" not in known or not isinstance(data, Mapping):
        return False
    return "label" not in data or bool((data["label"] == known["null"]).any())


def check_null(student: Any, name: str, label: str | None) -> None:
    """Refuse to ask a student without a class, if it was not taught to do without.

    Raises:
        ValueError: if so.
    """
    if label is None and student.denoiser.info.conditions.get("label") and not student.card.get("null_label"):
        raise ValueError(f"{name} is a student that learnt from samples with a class alone: give --label.")


def check_unguided(name: str, scale: float) -> None:
    """Refuse to guide a student.

    Raises:
        ValueError: if so.
    """
    if scale != 1.0:
        raise ValueError(f"{name} is a student, which has its guidance within: leave --guidance out.")


def guided(denoiser: Denoiser, scale: float, options: Prompted) -> Any:
    """The denoiser under guidance, if it is asked for; of a pipeline, what the pipeline samples from.

    Raises:
        ValueError: for guidance of a model without conditions, or a negative prompt that nothing leads away from.
    """
    prompted = getattr(denoiser, "takes_prompts", False)
    if prompted and options.negative is not None and (scale == 1.0 or denoiser.family.distilled()):  # type: ignore[attr-defined]
        why = "has its guidance within" if scale != 1.0 else "is not guided; give --guidance as well"
        raise ValueError(f"--negative is what guidance leads away from, and {denoiser.info.name} {why}.")
    if not hasattr(denoiser, "guided"):
        return denoiser if scale == 1.0 else ClassifierFree(denoiser, scale, _null(denoiser))
    if scale == 1.0 or (prompted and denoiser.family.distilled()):  # type: ignore[attr-defined]
        return denoiser.guided(scale)  # type: ignore[attr-defined]
    null = denoiser.encode([""], options.negative)[1] if prompted else _null(denoiser)  # type: ignore[attr-defined]
    return denoiser.guided(scale, null)  # type: ignore[attr-defined]


def _null(denoiser: Denoiser) -> dict[str, float | torch.Tensor]:
    label = denoiser.info.conditions.get("label", {})
    if "null" not in label:
        raise ValueError(
            f"--guidance needs a model with conditions and one that stands for none; {denoiser.info.name} has not both."
        )
    return {"label": label["null"]}
