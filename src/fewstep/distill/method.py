"""What a method of distillation is: it says what is trained, by which stages of one step, and how the student is sampled from.

A *teacher* is any denoiser with a noise schedule, guided or not; a *student* is a network that begins as a copy of the teacher's (or as the
teacher's with an adapter), reads as the teacher's does, and is run by a plan of a few calls. `fewstep.train.fit` does the training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from fewstep.plan import Plan
from fewstep.train.stages import Stage

__all__ = ["RESERVED", "STUDENT", "Method", "Training"]

RESERVED = ("x", "noise")
"""Names in a batch that are no conditions."""
STUDENT = "student"
"""The name of the student among the modules that are trained."""


@dataclass(frozen=True)
class Training:
    """What `fewstep.train.fit` is given.

    Args:
        modules: name -> module, `STUDENT` and what is trained beside it: a copy of the teacher for the score of the student's samples, the
            head of a discriminator. What is not trained, the teacher above all, is not among them.
        stages: the updates of a step.
    """

    modules: Mapping[str, nn.Module]
    stages: tuple[Stage, ...]


class Method(Protocol):
    """A frozen dataclass with a method's options.

    Batches hold conditions by their names, clean data as ``"x"`` and starting noise of unit variance as ``"noise"`` (`RESERVED`).
    A method whose student is more than a copy of the network, because it is told something more, also has
    ``wrapped(network) -> nn.Module``; see `fewstep.distill.LCM`. One whose student is told the number of calls has ``told(nfe)``, which
    gives ``{"told": number}``; see `fewstep.distill.TDM`. One that learns from pairs of the teacher has ``pairs`` and ``pair_calls``: how
    many are drawn where none are given, and in how many calls; see `fewstep.distill.HiPA`.
    """

    @property
    def needs_data(self) -> bool:
        """Whether batches must hold clean data ``"x"``; if not, they hold conditions, and of ``"x"`` the shape alone is right."""
        ...

    def training(self, teacher: Callable[..., Tensor], student: nn.Module) -> Training:
        """What is trained, for a teacher ``D(x, t, **cond)`` and the network of a student."""
        ...

    def plan(self, teacher: Callable[..., Tensor], nfe: int) -> Plan:
        """How the student is sampled from in so many calls.

        Raises:
            PlanError: for a number of calls that the student is not made for.
        """
        ...
