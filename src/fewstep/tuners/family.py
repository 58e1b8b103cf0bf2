"""Families of plans: one for every number of calls and guidance scale that was asked for, and between scales where that was validated.

A plan serves the guidance scale that it was made for. Scales are tuned in increasing order, each starting from the plans of the one
before, on the same noise: that costs less than a search, and neighbouring plans then belong together, so that what lies between two of
them can serve a scale between theirs. At a quarter, a half and three quarters of the way between neighbours three candidates are judged
on exact paths of that scale: the two plans' numbers mixed in proportion (their times in lambda), and each of the two as it is. The one
whose largest error, relative to that of the best untuned setting, is least serves the scales between, if no untuned setting is better at
any of the three; else there is no plan between.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.artefacts import json_value, write_atomically
from fewstep.errors import ArtefactError, PlanError
from fewstep.identity import identity
from fewstep.plan import Plan
from fewstep.tuners.auto import tune
from fewstep.tuners.draws import Draws
from fewstep.tuners.effort import Effort, validation_cost
from fewstep.tuners.numbers import Numbers
from fewstep.tuners.preparation import prepare
from fewstep.tuners.progress import Bar
from fewstep.tuners.result import Tuned
from fewstep.tuners.task import Candidate, Counted

__all__ = ["Family", "Gap", "tune_family"]

DOCUMENT = "family.json"
MIXED, LOWER, UPPER = "mixed", "lower", "upper"
PLACES = (0.25, 0.5, 0.75)
"""Where the candidates between two scales are judged."""


@dataclass(frozen=True)
class Gap:
    """What was found between two neighbouring scales.

    Attributes:
        nfe: number of calls.
        lower, upper: the scales.
        ratios: of the candidates, ``"mixed"`` (if the plans can be mixed), ``"lower"`` and ``"upper"``: the largest of their root mean
            square errors over those of the best untuned settings, at a quarter, a half and three quarters of the way.
    """

    nfe: int
    lower: float
    upper: float
    ratios: Mapping[str, float]

    @property
    def best(self) -> str:
        """The candidate whose ratio is least."""
        return min(self.ratios, key=lambda name: self.ratios[name])

    @property
    def chosen(self) -> str | None:
        """The candidate that serves the scales between; None if no plan does."""
        return self.best if self.ratios[self.best] <= 1.0 else None


@dataclass(frozen=True)
class Family:
    """Plans by number of calls and guidance scale.

    Attributes:
        plans: (number of calls, guidance scale) -> plan.
        gaps: what is known of the scales between.
        guidance: its other settings, as `fewstep.guidance.ClassifierFree.guidance` tells them.
        tuned: guidance scale -> all that tuning found there; empty for a family that was loaded.
    """

    plans: Mapping[tuple[int, float], Plan]
    gaps: tuple[Gap, ...]
    guidance: Mapping[str, Any]
    tuned: Mapping[float, Tuned]

    def plan(self, nfe: int, guidance_scale: float) -> Plan:
        """The plan for a number of calls and a guidance scale.

        Raises:
            PlanError: if there is none; it says which there are.
        """
        for (calls, scale), plan in self.plans.items():
            if calls == nfe and math.isclose(scale, guidance_scale):
                return plan
        gap = next((gap for gap in self.gaps if gap.nfe == nfe and gap.lower < guidance_scale < gap.upper), None)
        if gap is None:
            calls, scales = (sorted({key[k] for key in self.plans}) for k in (0, 1))
            raise PlanError(
                f"there is no plan for {nfe} calls and guidance {guidance_scale:g}: tuned were {calls} calls at {scales}."
            )
        if gap.chosen is None:
            raise PlanError(
                f"no plan serves guidance {guidance_scale:g} at {nfe} calls: between {gap.lower:g} and {gap.upper:g} the error would be "
                f"{gap.ratios[gap.best]:.3g} of the best untuned setting's. Tune that scale too."
            )
        share = {MIXED: (guidance_scale - gap.lower) / (gap.upper - gap.lower), LOWER: 0.0, UPPER: 1.0}[gap.chosen]
        guidance = None if guidance_scale == 1.0 else {**self.guidance, "guidance_scale": float(guidance_scale)}
        return _between(self.plans[nfe, gap.lower], self.plans[nfe, gap.upper], share, guidance)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the plans and ``family.json`` into a folder, which is made if it does not exist."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        told = []
        for (nfe, scale), plan in self.plans.items():
            name = f"plan-{nfe}-guidance-{scale:g}.safetensors"
            plan.save(folder / name)
            told.append({"nfe": nfe, "guidance_scale": scale, "file": name, "digest": plan.digest})
        document = {
            "fewstep": "family of plans",
            "plans": told,
            "gaps": [asdict(gap) for gap in self.gaps],
            "guidance": dict(self.guidance),
        }
        write_atomically(folder / DOCUMENT, json.dumps(json_value(document), indent=1).encode())

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> Family:
        """Read a family.

        Raises:
            ArtefactError: if there is none, or a plan is not the one that was saved with it.
        """
        path = Path(folder) / DOCUMENT
        try:
            document = json.loads(path.read_text())
            gaps = tuple(Gap(**gap) for gap in document["gaps"])
            plans = {(told["nfe"], told["guidance_scale"]): Plan.load(path.parent / told["file"]) for told in document["plans"]}
            changed = [
                told["file"] for told in document["plans"] if plans[told["nfe"], told["guidance_scale"]].digest != told["digest"]
            ]
        except FileNotFoundError as error:
            raise ArtefactError(
                f"{folder} holds no whole family of plans: {Path(str(error.filename or error)).name} is missing."
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{path} is damaged: {error}.") from error
        if changed:
            raise ArtefactError(f"{changed[0]} is not the plan that was saved with {path}.")
        return cls(plans, gaps, document["guidance"], {})


def tune_family(
    denoiser: Any,
    guidance: Sequence[float],
    *,
    nfe: int | Sequence[int],
    noise: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    final: str = "t_end",
    block: int = 256,
    minutes: float | None = None,
    evaluations: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
    **options: Any,
) -> Family:
    """Tune plans for several guidance scales, and say what serves the scales between.

    Args:
        denoiser: a `fewstep.guidance.ClassifierFree` of any scale; its prediction may be limited, as by `fewstep.denoisers.Clipped`.
        guidance: the scales, each once.
        nfe, noise, cond, seed, final, block, progress, report: as of `fewstep.tune`.
        minutes, evaluations: for all scales together.
        checkpoint: a folder with one of `fewstep.tune` for every scale.
        **options: the other options of `fewstep.tune`.

    Raises:
        TypeError: for a denoiser without guidance.
        ValueError: for no scales, or one twice; and what `fewstep.tune` raises.

    Example:
        >>> import torch, fewstep as fs
        >>> exact = fs.exact.GaussianMixture(fs.schedules.VPLinear(), [[-1.0, 0.0], [1.0, 0.5], [0.0, 1.0]], 0.05)
        >>> guided = fs.guidance.ClassifierFree(exact, 1.0, {"label": -1})
        >>> noise, labels = fs.draw_noise((2,), range(48), dtype=torch.float64), torch.arange(48) % 3
        >>> effort = Effort(trajectories=64, held_out=48, pool=1, trials=10, polish=3)
        >>> family = tune_family(guided, [2.0, 3.0], nfe=4, noise=noise, cond={"label": labels}, effort=effort)
        >>> x = fs.sample(guided.with_scale(2.4), noise, family.plan(4, 2.4), cond={"label": labels})
    """
    if not (hasattr(denoiser, "with_scale") and getattr(denoiser, "guidance", None)):
        raise TypeError(f"a family over guidance scales needs a fewstep.guidance.ClassifierFree, got {type(denoiser).__name__}.")
    scales = sorted(float(scale) for scale in guidance)
    if not scales or len(set(scales)) < len(scales):
        raise ValueError(f"guidance needs scales, each once, got {list(guidance)}.")
    say = report or (lambda line: None)
    limits = {"minutes": minutes and minutes / len(scales), "evaluations": evaluations and evaluations // len(scales)}
    shared = {"noise": noise, "cond": cond, "seed": seed, "final": final, "block": block}
    tuned: dict[float, Tuned] = {}
    starts: Mapping[int, Plan] = {}
    for scale in scales:
        say(f"guidance {scale:g}")
        folder = None if checkpoint is None else Path(checkpoint) / f"guidance-{scale:g}"
        tuned[scale] = tune(
            denoiser.with_scale(scale),
            nfe=nfe,
            starts=starts,
            checkpoint=folder,
            progress=progress,
            report=report,
            **shared,
            **limits,
            **options,
        )
        starts = {n: best.plan for n, tried in tuned[scale].candidates.items() if (best := _best_learned(tried)) is not None}
    plans = {(n, scale): plan for scale, found in tuned.items() for n, plan in found.plans.items()}
    gaps: list[Gap] = []
    for lower, upper in pairwise(scales):
        told = f"between guidance {lower:g} and {upper:g}"
        say(told)
        gaps += _gaps(denoiser, tuned, lower, upper, shared, partial(Bar, shown=progress, name=told))
    return Family(plans, tuple(gaps), denoiser.guidance, tuned)


def _gaps(
    denoiser: Any, tuned: dict[float, Tuned], lower: float, upper: float, shared: dict[str, Any], bar: Callable[..., Bar]
) -> list[Gap]:
    """What serves the scales between two, for every number of calls."""
    told, ratios = tuned[lower].report["effort"], {n: dict[str, float]() for n in tuned[lower].plans}
    effort = Effort(trajectories=1, held_out=told["held_out"], pool=told["pool"], reference_calls=told["reference_calls"])
    for place in PLACES:
        guided = denoiser.with_scale(lower + place * (upper - lower))
        counted = Counted(guided, shared["block"])
        draw = Draws(counted, shared["noise"], dict(shared["cond"] or {}), shared["seed"] + 1)
        with bar(counted, validation_cost(effort, list(ratios))) as seen:
            task = prepare(counted, draw, effort, final=shared["final"], seed=shared["seed"], report=seen.say)
            for nfe, low in tuned[lower].plans.items():
                for name, share in {MIXED: place, LOWER: 0.0, UPPER: 1.0}.items():
                    try:
                        plan = _between(low, tuned[upper].plans[nfe], share, identity(guided)["guidance"])
                    except PlanError:  # plans of other kinds than weights cannot be mixed
                        continue
                    untuned = task.untuned(nfe).errors.rms
                    ratio = task.judge(name, plan).errors.rms / untuned if untuned > 0.0 else math.inf
                    ratios[nfe][name] = max(ratio, ratios[nfe].get(name, 0.0))
                    seen.say(f"{nfe} calls at {guided.guidance_scale:g}: {name}, {ratio:.2f} of the best untuned setting's error")
    return [Gap(nfe, lower, upper, found) for nfe, found in ratios.items()]


def _best_learned(tried: Sequence[Candidate]) -> Candidate | None:
    learned = [candidate for candidate in tried if candidate.name.startswith("learned")]
    return min(learned, key=lambda candidate: candidate.errors.rms, default=None)


def _between(low: Plan, high: Plan, share: float, guidance: Mapping[str, Any] | None) -> Plan:
    """The numbers of two plans, mixed; as made under this guidance.

    Raises:
        PlanError: for plans that cannot be mixed.
    """
    if share in (0.0, 1.0):
        plan = high if share else low
        return replace(plan, provenance=_provenance(plan, plan, guidance, share))
    schedule, a, b = low.schedule, Numbers.of(low), Numbers.of(high)
    first, second = (schedule.lam(numbers.tau[1:]) for numbers in (a, b))
    tau = np.append(a.tau[:1], schedule.t_of_lam((1.0 - share) * first + share * second))
    rows = []
    for row, other in zip(a.rows, b.rows, strict=True):
        entries = max(row.ndim, other.ndim)  # numbers, or arrays of a sample's shape
        one, two = (values.reshape(*values.shape, *[1] * (entries - values.ndim)) for values in (row, other))
        rows.append((1.0 - share) * one + share * two)
    return Numbers(tau, a.end, tuple(rows)).plan(schedule, _provenance(low, high, guidance, share))


def _provenance(low: Plan, high: Plan, guidance: Mapping[str, Any] | None, share: float) -> dict[str, Any]:
    """Of a plan between two."""
    told, other = json_value(low.provenance), json_value(high.provenance)
    made = told.get("tuned") or other.get("tuned")
    if made is None:
        return told
    model = {**made["model"], "guidance": guidance}
    method = f"between the plans of two guidance scales, {share:g} of the way"
    return {**told, "tuned": {**made, "model": model, "method": method}}
