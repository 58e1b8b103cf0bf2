"""Students that are told their number of calls, served for all of their numbers at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.denoisers import Around
from fewstep.errors import PlanError
from fewstep.loading import is_student, load
from fewstep.plan import Plan

__all__ = ["TOLD", "ByCalls", "load_served", "served_student"]

TOLD = "number_of_calls"
"""The condition by which an engine says how many calls a request makes."""


class ByCalls(Around):
    """The denoisers of one student, of which each request is served by that of its plan's number of calls.

    Args:
        denoisers: number of calls -> denoiser, as `fewstep.distill.Student.denoiser_of` gives it.

    Example:
        >>> import fewstep as fs
        >>> schedule = fs.schedules.Flow()
        >>> some = {n: fs.Denoiser(lambda x, time, n=n: x / n, schedule, "data") for n in (1, 2)}
        >>> by_calls = ByCalls(some)
        >>> [float(by_calls(torch.ones(1), 0.5, **by_calls.conditions_of(fs.make_plan("ddim", schedule, n)))) for n in (1, 2)]
        [1.0, 0.5]
    """

    def __init__(self, denoisers: Mapping[int, Any]):
        super().__init__(denoisers[max(denoisers)])
        self.denoisers = dict(denoisers)

    def __repr__(self) -> str:
        return f"ByCalls({sorted(self.denoisers)}, {self.denoiser!r})"

    def __call__(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        """The data prediction ``"batch *shape"`` of the student that is told so many calls."""
        return self.denoisers[cond.pop(TOLD)](x, t, **cond)

    def conditions_of(self, plan: Plan) -> dict[str, int]:
        """What samples of this plan are called with beside their conditions: calls of other numbers are other network calls."""
        return {TOLD: plan.nfe}

    def check_plan(self, plan: Plan) -> None:
        """Refuse a number of calls that the student is not told.

        Raises:
            PlanError: names those that it is told.
        """
        if plan.nfe not in self.denoisers:
            known = ", ".join(map(str, sorted(self.denoisers)))
            raise PlanError(
                f"this student is told how many calls it makes, {known}, but the plan makes {plan.nfe}. Ask for one of these."
            )

    def guided(self, guidance_scale: float) -> Any:
        """The same with guidance of a pipeline's own, see `fewstep.Denoiser`'s kinds; itself if that changes nothing."""
        return self._each({nfe: each.guided(guidance_scale) for nfe, each in self.denoisers.items()})

    def with_size(self, size: tuple[int, ...]) -> Any:
        """The same for samples of another size."""
        return self._each({nfe: each.with_size(size) for nfe, each in self.denoisers.items()})

    def _each(self, changed: Mapping[int, Any]) -> Any:
        return self if all(changed[nfe] is each for nfe, each in self.denoisers.items()) else ByCalls(changed)


def load_served(name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The denoiser of what a server is told to serve.

    Args:
        name: what `fewstep.load` takes, or a student's folder. A student that is told its number of calls is told that of each request.
        device, dtype: of `fewstep.load`.
    """
    if not is_student(name):
        return load(name, device=device, dtype=dtype)
    from fewstep.distill.student import Student

    return served_student(Student.load(name, device=device, dtype=dtype))


def served_student(student: Any) -> Any:
    """The denoiser of a student, for all numbers of calls that it is told, if it is told any."""
    if all(student.told_number(nfe) is None for nfe in student.plans):
        return student.denoiser
    return ByCalls({nfe: student.denoiser_of(nfe) for nfe in student.plans})
