"""Towards what is preferred: `prefer` trains a few-step model, or an adapter of it, so that it keeps its plan and its few calls.

The method gives the objective, `fewstep.train.fit` trains; the same call goes on where an earlier one was stopped, bit for bit. What comes
out is compared with what it began as on the same noise: the reward, and how far the samples have moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.adapt.adapted_network import AdaptedNetwork
from fewstep.artefacts import write_atomically
from fewstep.evaluate.distances import SlicedWasserstein
from fewstep.identity import identity
from fewstep.noise import draw_noise
from fewstep.plan import Plan
from fewstep.sampler import check_fit, sample
from fewstep.steer.method import RESERVED, Policy, PreferenceMethod, Reward, checked, told_of
from fewstep.steer.policy import device_like, network_of, reference_of, trained_copy, with_network
from fewstep.steer.pso import PSO
from fewstep.train.batches import Batches
from fewstep.train.trainer import fit
from fewstep.train.watched import Spent, counted, made_for, watch

__all__ = ["Judged", "Preferred", "prefer"]

SHOWN, JUDGE_SEED, BLOCK = 16, 1_000_000, 256


@dataclass(frozen=True)
class Judged:
    """How the result is compared with what it began as.

    Args:
        count: samples of each.
        seed: of the first one.
        features: ``samples -> "count d"``, what the distance looks at; None for the samples themselves.
    """

    count: int = 256
    seed: int = JUDGE_SEED
    features: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Preferred:
    """What `prefer` gives.

    Attributes:
        denoiser: the tuned model, for `fewstep.sample` with `plan`.
        network: its network; with an adapter, a `fewstep.adapt.AdaptedNetwork`.
        plan: how it is sampled.
        report: JSON values: rewards before and after, the distance, what it cost.
        log: the records of training.
    """

    denoiser: Any
    network: nn.Module = field(repr=False)
    plan: Plan
    report: dict[str, Any]
    log: list[dict[str, Any]] = field(repr=False)

    @property
    def told(self) -> list[str]:
        """The report in sentences."""
        report, lines = self.report, []
        if "reward" in report:
            was, now = report["reward"]["before"], report["reward"]["after"]
            lines.append(
                f"reward {was['mean']:.4g} before, {now['mean']:.4g} after: {report['reward']['gain']:+.2f} standard deviations "
                f"of {was['deviation']:.3g}"
            )
        if "moved" in report:
            lines.append(
                f"samples moved by {report['moved']:.3g} ({report['distance']}; two sets of the model it began as: {report['floor']:.3g})"
            )
        if report["evaluations"]:
            lines.append(f"training took {report['evaluations']:,} network evaluations")
        if report.get("score_evaluations"):
            lines.append(f"the pairs and the score that it learnt by took {report['score_evaluations']:,} more")
        return lines


def prefer(
    student: Any,
    plan: Plan,
    *,
    method: PreferenceMethod = PSO(),  # noqa: B008 - immutable
    reward: Reward | Sequence[Reward] | None = None,
    cond: Mapping[str, Tensor] | None = None,
    data: Any = None,
    shape: Sequence[int] | None = None,
    adapter: Any = None,
    steps: int = 200,
    batch_size: int = 32,
    learning_rate: float | None = None,
    warmup: int | None = None,
    ema: float = 0.9,
    seed: int = 0,
    folder: str | PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = False,
    sheets: int = 0,
    judged: Judged | None = Judged(),
    **options: Any,
) -> Preferred:
    """Tune a few-step model towards what a reward, a score or targets prefer.

    Args:
        student: ``D(x, t, **cond)`` around a torch module: a distilled student's denoiser, or any other. It stays as it is.
        plan: how it is sampled, but for `OfflinePSO` with noise in at least one row: of a consistency student 2 calls or more.
        method: `PSO`, `OfflinePSO` or `SPO`.
        reward: ``reward(x, **cond) -> "batch"`` of clean samples, larger for better; several, none of which is traded for another. Methods
            that need none are judged by it.
        cond: conditions to learn from, one row each, drawn in batches: prompts, labels.
        data: for methods that need clean data: ``{"x": ..., **cond}``, in any form that `fewstep.train.fit` takes.
        shape: of one sample, where the student does not say it.
        adapter: `fewstep.adapt.LoraOptions` or a ``peft.LoraConfig``; None: the whole network, or the adapter that it has.
        steps: optimizer steps.
        batch_size: conditions in a step; PSO makes two samples of each.
        learning_rate: left out, 1e-5 for a network, 1e-4 for an adapter.
        warmup, seed, resume, progress: of `fewstep.train.fit`.
        ema: the decay of the averaged weights, which the result has; 0 for the last ones.
        folder: where checkpoints, the log and pictures go. The same call goes on from there, bit for bit.
        sheets: pictures of a few samples every so many steps, the model it began as in the first row; 0: none.
        judged: how the result is compared with what it began as; None: not at all.
        **options: of `fewstep.train.fit`.

    Returns:
        a `Preferred`.

    Raises:
        PlanError: for a plan without noise, or that does not fit the student.
        ValueError: if reward, data or shape are missing, or numbers make no sense.
        TypeError: for a student without a torch module.
        NetworkError: if training diverges.

    Example:
        >>> import fewstep as fs
        >>> digits = fs.load("digits")
        >>> plan = fs.make_plan("ddpm", digits.schedule, 4, final="zero")
        >>> labels = {"label": torch.arange(10)}
        >>> made = prefer(digits, plan, reward=lambda x, **_: x.mean((1, 2, 3)), cond=labels, steps=2, batch_size=2, judged=None)
        >>> made.report["evaluations"] > 0
        True
    """
    scored = _whole_reward(reward)
    if method.needs_reward and scored is None:
        raise ValueError(f"{method} learns from a reward: pass reward=, a function of samples, one number each.")
    source, size = _source(method, data, cond), _shape_of(student, shape)
    check_fit(student, plan, torch.zeros(1, *size), range(1))
    network = trained_copy(network_of(student), adapter, seed=seed)
    denoiser = with_network(student, network)
    like = device_like(network, torch.zeros(1, *size))
    reference, spent = reference_of(student, network), Spent()
    objective = method.objective(Policy(denoiser, reference, plan, size, scored, like))
    place = None if folder is None else Path(folder)
    rate = learning_rate if learning_rate is not None else 1e-4 if isinstance(network, AdaptedNetwork) else 1e-5
    rows = Batches(source, max(SHOWN, judged.count if judged else 0), seed)
    drawn = _Sheets(student, denoiser, plan, rows, size, place, like, sheets) if sheets and place is not None else None
    with counted([network_of(reference), network], spent):
        result = fit(
            watch(objective, f"{made_for(student, source, plan.digest)} by {_named(reward)}", spent, drawn),
            network,
            source,
            steps=steps,
            batch_size=batch_size,
            learning_rate=rate,
            warmup=min(20, steps // 10) if warmup is None else warmup,
            ema=(ema,) if ema else (),
            seed=seed,
            folder=place,
            resume=resume,
            progress=progress,
            **{"decay": "constant", **options},
        )
    if ema:
        network.load_state_dict(result.averages[ema])
    network.eval()
    report = {"method": repr(method), "plan": plan.digest, "model": identity(student)["name"], "evaluations": spent.evaluations}
    report |= {"training": {"steps": steps, "batch_size": batch_size, "learning_rate": rate, "ema": ema, "seed": seed}}
    if judged is not None:
        report |= _judge(student, denoiser, plan, scored, rows, size, judged, like)
    return Preferred(denoiser, network, plan, report, result.log)


# ---- before training ---------------------------------------------------------------------------------------------------------------


def _whole_reward(reward: Reward | Sequence[Reward] | None) -> Reward | None:
    """One reward of one or several, whose numbers are checked."""
    if reward is None:
        return None
    if callable(reward):
        return lambda x, **cond: checked(reward(x, **cond), len(x), "a reward")
    several = list(reward)
    return lambda x, **cond: torch.stack([checked(each(x, **cond), len(x), "a reward") for each in several], 1)


def _named(reward: Reward | Sequence[Reward] | None) -> str:
    """What a checkpoint calls the reward."""
    several = [reward] if reward is None or callable(reward) else reward
    return ", ".join(told_of(each) for each in several)


def _source(method: PreferenceMethod, data: Any, cond: Mapping[str, Tensor] | None) -> Any:
    """What `fit` draws batches from."""
    if method.needs_data:
        if data is None:
            raise ValueError(f"{method} learns from targets: pass data={{'x': ...}}, with conditions beside it.")
        return data
    if data is not None:
        raise ValueError(f"{method} makes its own samples: pass cond= for the conditions, and leave data out.")
    return dict(cond) if cond else {"row": torch.arange(1024)}


def _shape_of(student: Any, shape: Sequence[int] | None) -> tuple[int, ...]:
    found = shape or getattr(getattr(student, "info", None), "shape", None) or getattr(student, "shape", None)
    if found is None:
        raise ValueError("the student does not say the shape of its samples: pass shape=, without the batch.")
    return tuple(found)


# ---- beside training ---------------------------------------------------------------------------------------------------------------


class _Sheets:
    """Pictures of a few samples: in the first row of the model that training began with."""

    def __init__(
        self,
        student: Any,
        denoiser: Any,
        plan: Plan,
        rows: Batches,
        shape: tuple[int, ...],
        folder: Path,
        like: Tensor,
        every: int,
    ):
        self.denoiser, self.plan, self.folder, self.like, self.every = denoiser, plan, folder, like, every
        self.shape, self.cond = shape, _conditions(rows, SHOWN)
        self.first = _samples(student, plan, shape, range(SHOWN), self.cond, like)

    def __call__(self, model: Any, step: int) -> None:
        if step % self.every:
            return
        from fewstep.evaluate.report import image_grid

        pictures = torch.cat([self.first, _samples(self.denoiser, self.plan, self.shape, range(SHOWN), self.cond, self.like)])
        decode, info = getattr(self.denoiser, "decode", None), getattr(self.denoiser, "info", None)
        pictures = pictures if decode is None else decode(pictures)
        sheet = image_grid(pictures.nan_to_num().cpu(), getattr(info, "data_range", None) or (-1.0, 1.0), columns=SHOWN)
        write_atomically(self.folder / f"samples-{step:07d}.png", sheet)


def _conditions(rows: Batches, count: int) -> dict[str, Tensor]:
    """Those of the first samples."""
    batch = rows.piece(1, 0, count)
    return {name: value for name, value in batch.items() if name not in RESERVED}


@torch.no_grad()
def _samples(
    denoiser: Any, plan: Plan, shape: tuple[int, ...], seeds: Sequence[int], cond: Mapping[str, Tensor], like: Tensor
) -> Tensor:
    made = []
    for first in range(0, len(seeds), BLOCK):
        part = slice(first, first + BLOCK)
        noise = draw_noise(shape, seeds[part], plan, dtype=like.dtype, device=like.device)
        told = {name: value[part].to(like.device) for name, value in cond.items()}
        made.append(sample(denoiser, noise, plan, cond=told, seeds=seeds[part], check=False))
    return torch.cat(made)


# ---- after it ----------------------------------------------------------------------------------------------------------------------


def _judge(
    student: Any,
    denoiser: Any,
    plan: Plan,
    reward: Reward | None,
    rows: Batches,
    shape: tuple[int, ...],
    judged: Judged,
    like: Tensor,
) -> dict[str, Any]:
    """Before and after, on the same noise and conditions; the floor is another set of the model it began as."""
    cond = _conditions(rows, judged.count)
    mine, others = (range(judged.seed + k * judged.count, judged.seed + (k + 1) * judged.count) for k in (0, 1))
    before, again = (_samples(student, plan, shape, seeds, cond, like) for seeds in (mine, others))
    after = _samples(denoiser, plan, shape, mine, cond, like)
    features = judged.features or (lambda x: x.flatten(1))
    distance = SlicedWasserstein()
    report: dict[str, Any] = {"count": judged.count, "distance": "sliced Wasserstein"}
    report |= {"moved": distance(features(after), features(before)), "floor": distance(features(again), features(before))}
    if reward is None:
        return report
    told = {name: value.to(like.device) for name, value in cond.items()}
    with torch.no_grad():
        found = [reward(x, **told).double().reshape(len(x), -1) for x in (before, after)]
    deviation = found[0].std(0).clamp(min=1e-12)
    gain = ((found[1].mean(0) - found[0].mean(0)) / deviation).mean()
    names = ("before", "after")
    levels = {n: {"mean": float(r.mean()), "deviation": float(r.std(0).mean())} for n, r in zip(names, found, strict=True)}
    report["reward"] = {**levels, "gain": float(gain)}
    return report
