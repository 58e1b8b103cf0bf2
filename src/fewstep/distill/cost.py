"""What a training costs: network evaluations, one sample each, counted while it runs and kept in its checkpoints.

A forward and a backward pass cost about as much as three forward passes. A run that went on from a checkpoint has cost what the run that
was never stopped has: what was done after the checkpoint, and lost, is not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.denoisers import innermost
from fewstep.distill.method import Training
from fewstep.train.stages import Stage

__all__ = ["Spent", "counting", "watched"]

BACKWARD = 3
"""A forward and a backward pass cost about so many forward passes."""


class Spent(nn.Module):
    """Network evaluations so far. A module without weights, so that checkpoints hold the number."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluations = 0

    def get_extra_state(self) -> Tensor:
        """The number, for checkpoints."""
        return torch.tensor([self.evaluations], dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """The number, of a checkpoint."""
        self.evaluations = int(state)

    def count(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook."""
        learning = torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad
        self.evaluations += (BACKWARD if learning else 1) * len(inputs[0])


@contextlib.contextmanager
def counting(teacher: Any, training: Training | None = None, spent: Spent | None = None) -> Iterator[Spent]:
    """Within it, calls of the teacher's network and of what is trained are counted.

    Example:
        >>> import fewstep as fs
        >>> teacher = fs.load("digits")
        >>> with counting(teacher) as spent, torch.no_grad():
        ...     _ = teacher(torch.zeros(3, 1, 8, 8), 0.5)
        >>> spent.evaluations
        3
    """
    spent = Spent() if spent is None else spent
    found: list[Any] = [innermost(teacher, "network")]
    if training is not None:
        found += training.modules.values()
        for stage in training.stages:
            found += (getattr(stage.objective, "modules", None) or {}).values()
    modules = {id(module): module for module in found if isinstance(module, nn.Module)}
    handles = [module.register_forward_hook(spent.count) for module in modules.values()]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Watched:
    """An objective with the number of evaluations among what checkpoints keep, and what is done after its updates.

    Args:
        made_for: what a checkpoint must have been made for, teacher and conditions: it is compared as the objective's options are.
        objective: the objective.
        spent: what is kept; None: nothing is.
        after: done after its updates.
    """

    made_for: str
    objective: Any
    spent: Spent | None = field(repr=False)
    after: Callable[[Any, int], None] | None = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        if name in ("objective", "made_for"):
            raise AttributeError(name)
        return getattr(self.objective, name)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The objective's own, and the number of evaluations."""
        own = dict(getattr(self.objective, "modules", None) or {})
        return own if self.spent is None else {**own, "spent": self.spent}

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Any]]:
        return self.objective(model, batch, generator)

    def updated(self, model: Any, step: int) -> None:
        """Called by the loop."""
        updated = getattr(self.objective, "updated", None)
        if updated is not None:
            updated(model, step)
        if self.after is not None and self.spent is not None:
            counted = self.spent.evaluations
            self.after(model, step)
            self.spent.evaluations = counted  # pictures are not training


def watched(
    stages: Sequence[Stage], made_for: str, spent: Spent, after: Callable[[Any, int], None] | None = None
) -> tuple[Stage, ...]:
    """The stages, with what checkpoints are compared by and keep, and something done after the last that is updated most often.

    Args:
        stages: of the method.
        made_for: the teacher and the conditions, in words.
        spent: kept in checkpoints.
        after: called with the model and the number of the step.
    """
    least = min(stage.every for stage in stages)
    last = max(i for i, stage in enumerate(stages) if stage.every == least)
    made = []
    for i, stage in enumerate(stages):
        objective = _Watched(made_for, stage.objective, spent if i == last else None, after if i == last else None)
        made.append(replace(stage, objective=objective))
    return tuple(made)
