"""What tuning returns: the best of what was validated, and how everything did."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from fewstep.artefacts import json_value
from fewstep.identity import identity
from fewstep.plan import Plan
from fewstep.tuners.effort import Effort
from fewstep.tuners.hard import CHALLENGED, challenged
from fewstep.tuners.task import Candidate, Task
from fewstep.version import __version__

__all__ = ["Tuned", "best_of", "ratio_of", "settled", "summarised"]

SURE = 0.5
"""Standard errors by which a tuned plan's mean squared error must be less."""


@dataclass(frozen=True, repr=False)
class Tuned:
    """What tuning found.

    Attributes:
        plans: number of calls -> the best plan.
        candidates: number of calls -> everything that was validated, in the order in which it was tried; the first is the best
            untuned solver and grid.
        report: JSON values: the model, options, costs, and the errors of every candidate.
    """

    plans: dict[int, Plan]
    candidates: dict[int, list[Candidate]]
    report: dict[str, Any]

    @property
    def plan(self) -> Plan:
        """The plan, if one number of calls was asked for.

        Raises:
            ValueError: if there are several.
        """
        if len(self.plans) != 1:
            raise ValueError(f"there are plans for {sorted(self.plans)} calls: take one from .plans.")
        return next(iter(self.plans.values()))

    def show(self) -> str:
        """A table of the errors, before and after, and what to be careful about."""
        lines = [f"{'calls':>5}  {'untuned':>9}  {'tuned':>9}  {'ratio':>5}  {'median':>6}  best untuned setting; tuned by"]
        for nfe, told in self.report["plans"].items():
            medians = told["median"] / max(told["candidates"][0]["median"], 1e-300)
            lines.append(
                f"{nfe:>5}  {told['untuned_rms']:>9.3g}  {told['rms']:>9.3g}  {told['ratio']:>5.2f}  {medians:>6.2f}  {told['untuned']}; "
                f"{told['best']}"
            )
        return "\n".join([*lines, *self.warnings])

    @property
    def warnings(self) -> list[str]:
        """What the figures do not say by themselves."""
        known = self.report["reference_error"]
        coarse = [nfe for nfe, told in self.report["plans"].items() if told["rms"] < known]
        if not coarse:
            return []
        return [
            f"at {', '.join(coarse)} calls the error is less than that of the exact paths themselves, {known:.2g} as estimated: read it "
            f"as that at most. A larger effort follows them in more calls."
        ]

    def __repr__(self) -> str:
        found = (f"{nfe}: {told['best']}, {told['ratio']:.2f}" for nfe, told in self.report["plans"].items())
        return f"Tuned({'; '.join(found)})"


def best_of(tried: list[Candidate]) -> Candidate:
    """The best of all: of those that passed a challenge, else of those that were not challenged, else the untuned plan.

    Considered are those that are not above the untuned plan in distance of the distributions, and below it in mean squared error by more
    than half a standard error of the difference: one sample that ends in another mode can make a standard error, and which plan it befalls
    is chance. The best has the least product of both errors and the distance.
    """
    left = _left(tried)
    passed = sorted((c for c in left if c.challenge), key=lambda c: c.challenge[0] * c.errors.median * c.distance)  # type: ignore[index]
    return next(iter(passed or left or tried))


def ratio_of(tried: list[Candidate]) -> float:
    """The root mean square error of the best over that of the untuned plan, both with hard noise if the best was challenged."""
    best, base = best_of(tried), tried[0]
    error, untuned = best.challenge or (best.errors.rms, base.errors.rms)
    return error / untuned if untuned > 0.0 else 1.0


def _left(tried: list[Candidate]) -> list[Candidate]:
    """What is better than the untuned plan on the validation noise, best first, without what failed a challenge."""
    base = tried[0]
    sure = [c for c in tried[1:] if c.gain > SURE and c.errors.rms <= base.errors.rms and c.distance <= base.distance]
    return sorted((c for c in sure if _stands(c)), key=lambda c: c.errors.rms * c.errors.median * c.distance)


def _stands(candidate: Candidate) -> bool:
    """Whether it has not failed a challenge."""
    mine, untuned = candidate.challenge or (0.0, 0.0)
    return math.isfinite(mine) and mine <= untuned


def settled(task: Task, tried: list[Candidate], effort: Effort) -> list[Candidate]:
    """The same, challenged a few at a time, best first, until the best of those that are left has passed, or none is left."""
    while (left := _left(tried)) and left[0].challenge is None:
        finalists = [c for c in left if c.challenge is None][:CHALLENGED]
        outcomes = challenged(task, finalists, pool=effort.hard_pool, count=effort.hard)
        found = {id(c): replace(c, challenge=outcome) for c, outcome in zip(finalists, outcomes, strict=True)}
        tried = [found.get(id(c), c) for c in tried]
        for finalist in finalists:
            error, base = found[id(finalist)].challenge or (0.0, 0.0)
            task.report(f"{finalist.plan.nfe} calls: {finalist.name}, with hard noise {error:.4g}, untuned {base:.4g}")
    return tried


def summarised(task: Task, candidates: dict[int, list[Candidate]], method: str, effort: Effort) -> Tuned:
    """The best of the candidates, with what is known of how they came about."""
    model, plans, told = identity(task.denoiser.denoiser), {}, {}
    cost = {"evaluations": task.denoiser.evaluations, "seconds": round(time.perf_counter() - task.began, 1)}
    for nfe, tried in candidates.items():
        best, base = best_of(tried), tried[0]
        rms, untuned_rms = best.challenge or (best.errors.rms, base.errors.rms)
        validation = {"rms": rms, "median": best.errors.median, "distance": best.distance}
        validation |= {"untuned": base.name, "untuned_rms": untuned_rms}
        plans[nfe] = best.plan
        if best.tuned:
            made = {
                "model": model,
                "method": best.name,
                "seed": task.seed,
                "effort": asdict(effort),
                "validation": validation,
                **cost,
            }
            before = json_value(best.plan.provenance)
            provenance = {**before, "final": task.final, "fewstep": __version__, "tuned": made}
            plans[nfe] = replace(best.plan, provenance=provenance)
        told[str(nfe)] = {
            "best": best.name,
            "ratio": ratio_of(tried),
            **validation,
            "candidates": [c.told for c in tried],
        }
    report = {
        "model": model,
        "schedule": task.schedule.config(),
        "method": method,
        "final": task.final,
        "seed": task.seed,
        "effort": asdict(effort),
        "reference_error": task.held_out.error,
        **cost,
        "plans": told,
    }
    return Tuned(plans, candidates, report)
