"""What a distillation costs: the calls of the teacher's network and of what is trained; see `fewstep.train.watched`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fewstep.denoisers import innermost
from fewstep.distill.method import Training
from fewstep.train.stages import Stage
from fewstep.train.watched import Spent, counted, watch

__all__ = ["counting", "watched"]


@contextlib.contextmanager
def counting(teacher: Any, training: Training | None = None, spent: Spent | None = None) -> Iterator[Spent]:
    """Within it, calls of the teacher's network and of what is trained are counted.

    Example:
        >>> import torch
        >>> import fewstep as fs
        >>> teacher = fs.load("digits")
        >>> with counting(teacher) as spent, torch.no_grad():
        ...     _ = teacher(torch.zeros(3, 1, 8, 8), 0.5)
        >>> spent.evaluations
        3
    """
    found: list[Any] = [innermost(teacher, "network")]
    if training is not None:
        found += training.modules.values()
        for stage in training.stages:
            found += (getattr(stage.objective, "modules", None) or {}).values()
    with counted(found, spent) as counts:
        yield counts


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
        objective = watch(stage.objective, made_for, spent if i == last else None, after if i == last else None)
        made.append(replace(stage, objective=objective))
    return tuple(made)
