"""Whether a student is worth it: beside the teacher in many calls, and the best plans for the teacher in as few, untuned and tuned.

Everything is judged by one distance of distributions, from samples of the teacher in many calls; the *floor* is the distance of two such
sets. Samples of both have the same conditions.

A student pays if it needs fewer network evaluations than the cheapest plan that is as good, untuned or tuned; a guided teacher needs two a
call, and a student of it one. It has paid after so many samples as these take to save what the training took. Where a tuned plan of no more
calls is as good, that is said, and no number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.denoisers import innermost
from fewstep.distill.states import conditions
from fewstep.evaluate.distances import make_distances
from fewstep.evaluate.features import pixels
from fewstep.noise import draw_noise
from fewstep.plan import Plan
from fewstep.sampler import sample
from fewstep.solvers import DPMSolverPP
from fewstep.train.batches import Batches
from fewstep.tuners.auto import tune
from fewstep.tuners.effort import Effort
from fewstep.tuners.task import GRIDS, UNTUNED

if TYPE_CHECKING:
    from fewstep.distill.student import Student

__all__ = ["Comparison", "compare_student"]

REFERENCE_SEED = 2**31
"""Seeds of the reference begin here, others at 0 and above."""
SCREENED, FINALISTS = 4, 3
"""Every untuned setting is tried on one in so many samples, and so many of the best on all."""
LADDER = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48)
"""Numbers of calls in which an untuned plan is tried against the student."""


@dataclass(frozen=True)
class Comparison:
    """How a student is compared.

    Args:
        count: samples of each.
        distance: a name of `fewstep.evaluate.make_distances`.
        features: from samples to vectors; the samples themselves when left out.
        reference_calls: calls of the teacher for the reference.
        tuned: how much is spent on tuned plans; None: none are made.
        seed: of the noise.
        block: the most samples of a network call.
    """

    count: int = 512
    distance: str = "sliced_wasserstein"
    features: Callable[[Tensor], Any] | None = field(default=None, repr=False)
    reference_calls: int = 64
    tuned: Effort | None = Effort()  # noqa: RUF009 - immutable
    seed: int = 0
    block: int = 256

    def __post_init__(self) -> None:
        make_distances(self.distance)  # raises for an unknown name, before anything is trained

    def told(self, report: Mapping[str, Any]) -> list[str]:
        """The report in lines for people, one for every number of calls."""
        return [_line(nfe, found, report) for nfe, found in report["calls"].items()]


def _line(nfe: str, found: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    tuned = "" if found["tuned"] is None else f", tuned {_told(found['tuned']['distance'])}"
    return (
        f"{nfe} calls: distance {_told(found['student'])} (floor {_told(report['floor'])}); for the teacher itself the best untuned plan "
        f"{_told(found['untuned']['distance'])}{tuned}; {_worth(int(nfe), found)}"
    )


def _worth(nfe: int, found: Mapping[str, Any]) -> str:
    """Whether the student pays, in words."""
    equal, equal_tuned, saved = found["equal"], found["equal_tuned"], found["saved"]
    if found["student"] is None:
        return "the student's samples are not finite: it does not pay"
    if equal_tuned is not None and equal_tuned <= nfe:
        told = f"a tuned plan of {equal_tuned} calls is as good"
        return f"{told}: the student does not pay" if saved <= 0 else f"{told}, but calls the network {saved} times more a sample"
    if saved is not None and saved <= 0:
        return f"an untuned plan of {equal} calls, and no more network evaluations, is as good: the student does not pay"
    tuned = "" if equal_tuned is None else f", a tuned one {equal_tuned},"
    if equal is None:
        told = f"no untuned plan of up to {LADDER[-1]} calls is as good" + (
            "" if equal_tuned is None else f", a tuned one of {equal_tuned} is"
        )
    else:
        told = f"an untuned plan needs {equal} calls{tuned} to be as good"
    return told + ("" if found["break_even"] is None else f"; pays after {found['break_even']:,} samples")


def _told(distance: float | None) -> str:
    return "not finite" if distance is None else f"{distance:.3g}"


def _finite(distance: float) -> float | None:
    """As JSON values are: None for what is not finite."""
    return distance if math.isfinite(distance) else None


@torch.no_grad()
def compare_student(student: Student, how: Comparison, data: Any, cost: int | None) -> dict[str, Any]:
    """The comparison as JSON values.

    Args:
        student: to be judged.
        how: how.
        data: of the training, from which conditions are drawn.
        cost: network evaluations of the training.
    """
    judge = _Judge(student, how, data)
    calls: dict[str, Any] = {}
    tuned = judge.tuned(sorted(student.plans))
    for nfe in sorted(student.plans):
        own = judge.distance(judge.sampled(student, nfe))
        name, best, _ = judge.untuned(nfe)
        plans = {
            "equal": judge.equal(own),
            "equal_tuned": next((n for n in sorted(tuned) if tuned[n]["distance"] <= max(own, judge.floor)), None),
        }
        calls[str(nfe)] = {
            "student": _finite(own),
            "untuned": {"name": name, "distance": _finite(best)},
            "tuned": {**tuned[nfe], "distance": _finite(tuned[nfe]["distance"])} if nfe in tuned else None,
            **plans,
            **_saved(nfe, plans, judge.rows_a_call, cost),
        }
    told = {"count": how.count, "distance": how.distance, "reference_calls": how.reference_calls, "seed": how.seed}
    return {**told, "floor": _finite(judge.floor), "evaluations": cost, "evaluations_a_call": judge.rows_a_call, "calls": calls}


def _saved(nfe: int, plans: Mapping[str, int | None], rows_a_call: int, cost: int | None) -> dict[str, int | None]:
    """Network evaluations that a sample saves beside the cheapest plan that is as good, and after how many samples that pays.

    Example:
        >>> _saved(4, {"equal": 4, "equal_tuned": None}, 2, 5000)
        {'saved': 4, 'break_even': 1250}
        >>> _saved(4, {"equal": 6, "equal_tuned": 4}, 1, 5000)
        {'saved': 0, 'break_even': None}
    """
    known = [calls for calls in plans.values() if calls is not None]
    saved = min(known) * rows_a_call - nfe if known else None
    tuned = plans["equal_tuned"]
    pays = cost is not None and saved is not None and saved > 0 and (tuned is None or tuned > nfe)
    return {"saved": saved, "break_even": round(cost / saved) if pays else None}  # type: ignore[operator]


class _Judge:
    """The reference, and the distance of anything from it."""

    def __init__(self, student: Student, how: Comparison, data: Any):
        self.how, self.teacher = how, student.teacher
        if student.guidance_scale is not None:
            self.teacher = self.teacher.with_scale(student.guidance_scale)  # type: ignore[attr-defined]
        self.metric = make_distances(how.distance)[0]
        device = next((p.device for p in student.network.parameters()), torch.device("cpu"))
        batch = Batches(data, how.count, how.seed).piece(1, 0, how.count)
        self.cond = {name: value.to(device) for name, value in conditions(batch).items()}
        self.seeds = list(range(how.seed, how.seed + how.count))
        self.like, self.device = student.probe["x"], device
        schedule = self.teacher.schedule  # type: ignore[attr-defined]
        many = DPMSolverPP(order=2).plan(schedule, how.reference_calls, "auto", final="zero")
        self.rows_a_call = 1
        self.reference = self._seen(self.run(many, [seed + REFERENCE_SEED for seed in self.seeds]))
        self.rows_a_call = self._rows(many)
        self.floor = self.distance(self.run(many, self.seeds))
        self._best: dict[int, tuple[str, float, Plan]] = {}

    def noise(self, plan: Plan, seeds: list[int]) -> Tensor:
        """Starting noise."""
        return draw_noise(self.like.shape[1:], seeds, plan, dtype=self.like.dtype, device=self.device)

    def run(self, plan: Plan, seeds: list[int]) -> Tensor:
        """Samples of the teacher."""
        parts = []
        for first in range(0, len(seeds), self.how.block):
            rows = slice(first, first + self.how.block)
            cond = {name: value[rows] for name, value in self.cond.items()}
            parts.append(sample(self.teacher, self.noise(plan, seeds[rows]), plan, cond=cond, seeds=seeds[rows], check=False))
        return torch.cat(parts)

    def sampled(self, student: Student, nfe: int) -> Tensor:
        """Samples of the student, finite or not."""
        plan = student.plan(nfe)
        noise = self.noise(plan, self.seeds)
        return sample(student.denoiser_of(nfe), noise, plan, cond=self.cond, seeds=self.seeds, check=False)

    def _seen(self, samples: Tensor) -> Any:
        return (self.how.features or pixels)(samples)

    def distance(self, samples: Tensor) -> float:
        """From the reference; infinite for samples that are not finite."""
        return self.metric(self._seen(samples), self.reference) if bool(samples.isfinite().all()) else float("inf")

    def _rows(self, plan: Plan) -> int:
        """Network evaluations of a sample and call: 2 under guidance of two halves."""
        network, seen = innermost(self.teacher, "network"), [0]
        if not isinstance(network, nn.Module):
            return 1

        def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen[0] += len(inputs[0])

        handle = network.register_forward_hook(count)
        try:
            self.teacher(
                self.noise(plan, self.seeds[:1]), float(plan.tau[0]), **{name: value[:1] for name, value in self.cond.items()}
            )
        finally:
            handle.remove()
        return max(1, seen[0])

    def untuned(self, nfe: int) -> tuple[str, float, Plan]:
        """The best untuned plan of so many calls by this distance: its name, distance and itself."""
        if nfe not in self._best:
            schedule = self.teacher.schedule  # type: ignore[attr-defined]
            plans = {
                f"{name}, {grid}": made.plan(schedule, nfe, grid, final="zero") for name, made in UNTUNED.items() for grid in GRIDS
            }
            few = _Some(self, slice(0, len(self.seeds), SCREENED))
            order = sorted(plans, key=lambda name: few.distance(plans[name]))[:FINALISTS]
            distances = {name: self.distance(self.run(plans[name], self.seeds)) for name in order}
            best = min(distances, key=lambda name: distances[name])
            self._best[nfe] = best, distances[best], plans[best]
        return self._best[nfe]

    def equal(self, distance: float) -> int | None:
        """The least number of calls of which an untuned plan has at most this distance."""
        for nfe in LADDER:
            if self.untuned(nfe)[1] <= max(distance, self.floor):
                return nfe
        return None

    def tuned(self, calls: list[int]) -> dict[int, dict[str, Any]]:
        """The best tuned plans."""
        if self.how.tuned is None:
            return {}
        count = min(64, len(self.seeds))
        schedule = self.teacher.schedule  # type: ignore[attr-defined]
        noise = float(schedule.sigma(schedule.t_start)) * draw_noise(self.like.shape[1:], self.seeds[:count], dtype=self.like.dtype)
        cond = {name: value[:count] for name, value in self.cond.items()}
        found = tune(
            self.teacher,
            nfe=calls,
            noise=noise.to(self.device),
            cond=cond,
            seed=self.how.seed,
            final="zero",
            effort=self.how.tuned,
            features=self.how.features,
            block=self.how.block,
        )
        return {
            nfe: {"name": found.report["plans"][str(nfe)]["best"], "distance": self.distance(self.run(plan, self.seeds))}
            for nfe, plan in found.plans.items()
        }


class _Some:
    """The judge's distance on some of the samples."""

    def __init__(self, judge: _Judge, rows: slice):
        self.judge, self.seeds = judge, judge.seeds[rows]
        self.cond = {name: value[rows] for name, value in judge.cond.items()}

    def distance(self, plan: Plan) -> float:
        """Of the samples of a plan."""
        samples = sample(
            self.judge.teacher, self.judge.noise(plan, self.seeds), plan, cond=self.cond, seeds=self.seeds, check=False
        )
        return self.judge.distance(samples)
