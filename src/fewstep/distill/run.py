"""The way from a teacher to a student: `distill`.

The method says what is trained and how the student is sampled; `fewstep.train.fit` trains it; what comes out is compared with the teacher
and with the best plans for the teacher itself, untuned and tuned, of as many calls. Distillation is worth its cost if the student is better
than those, and after so many samples as the network calls that it saves take to pay for the training.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.adapt.lora import LoraOptions
from fewstep.artefacts import write_atomically
from fewstep.denoisers import innermost
from fewstep.distill.consistency import LCM
from fewstep.distill.distribution import DMD2
from fewstep.distill.flow_map import FreeFlow
from fewstep.distill.method import STUDENT, Method, Training
from fewstep.distill.networks import read_as
from fewstep.distill.report import Comparison, compare_student
from fewstep.distill.states import conditions as conditions_of
from fewstep.distill.student import FORMAT, Student
from fewstep.distill.student_network import WRAPPERS, AdaptedNetwork, GuidanceEmbedded, student_network, told_adapter
from fewstep.distill.trajectory import TDM
from fewstep.errors import UnknownNameError
from fewstep.guidance import Distilled
from fewstep.identity import identity
from fewstep.noise import draw_noise
from fewstep.plan import Plan
from fewstep.sampler import sample
from fewstep.solvers import DPMSolverPP
from fewstep.train.batches import Batches
from fewstep.train.stages import Stage
from fewstep.train.trainer import fit
from fewstep.version import __version__

__all__ = ["ADAPTED", "METHODS", "Comparison", "distill", "make_method", "own_steps", "teacher_samples"]

METHODS: dict[str, Callable[..., Method]] = {
    "lcm": LCM,
    "lcm-lora": LCM,
    "dmd2": DMD2,
    "tdm": TDM,
    "freeflow": FreeFlow,
}
"""Name -> what makes the method from its options."""
ADAPTED = ("lcm-lora",)
"""Methods that train an adapter, if nothing is said."""
BACKWARD = 3
"""A forward and a backward pass cost about so many forward passes."""
PROBED, SHOWN = 2, 8
"""Samples in the probe, and in pictures."""


def make_method(name: str, **options: Any) -> Method:
    """A method by its name.

    Raises:
        UnknownNameError: for a name that does not exist.
        TypeError: for an option that it does not have.

    Example:
        >>> make_method("lcm", loss="l2").loss
        'l2'
    """
    if name not in METHODS:
        raise UnknownNameError("method of distillation", name, METHODS)
    known = inspect.signature(METHODS[name]).parameters
    if unknown := [option for option in options if option not in known]:
        raise TypeError(f"{name} has no option {unknown[0]!r}; it has {', '.join(known)}.")
    return METHODS[name](**options)


def own_steps(name: str, calls: Sequence[int]) -> dict[str, Any]:
    """The numbers of calls as an option, for methods whose training depends on them."""
    if name not in METHODS or "steps" not in inspect.signature(METHODS[name]).parameters:
        return {}
    if len(calls) > 1:
        raise ValueError(f"{name} trains a student for one number of calls: make one for each, steps={calls[0]} and so on.")
    return {"steps": calls[0]}


def distill(
    teacher: Callable[..., Tensor],
    *,
    method: str | Method = "lcm",
    steps: int | Sequence[int] = (1, 2, 4),
    data: Any = None,
    conditions: Mapping[str, Tensor] | None = None,
    adapter: Any = None,
    network: nn.Module | None = None,
    iterations: int = 1000,
    batch_size: int = 64,
    learning_rate: float | None = None,
    warmup: int | None = None,
    ema: float = 0.995,
    seed: int = 0,
    folder: str | PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = False,
    sheets: int = 0,
    compare: Comparison | None = Comparison(),  # noqa: B008 - immutable
    **options: Any,
) -> Student:
    """Make a student of few calls.

    Args:
        teacher: ``D(x, t, **cond)`` with a schedule; guided or not, limited or not. Its network stays as it is.
        method: a name of `METHODS`, or a method with options of its own.
        steps: numbers of calls that the student is asked for.
        data: clean data and conditions, ``{"x": ..., "label": ...}``, in any form that `fewstep.train.fit` takes. Methods that need none
            take what is there but ``"x"``. Of `teacher_samples`, if there are no others.
        conditions: for methods that need no data.
        adapter: `fewstep.adapt.LoraOptions` or a ``peft.LoraConfig``, to train an adapter; None: the whole network, but for the methods
            named in `ADAPTED`.
        network: a network that the student begins with instead of the teacher's; for a teacher without one, it predicts data.
        iterations: optimizer steps.
        batch_size, warmup, ema, seed, resume, progress: of `fewstep.train.fit`; the student's weights are averaged.
        learning_rate: left out, 1e-4 for a network, 1e-3 for an adapter.
        folder: where checkpoints and the log go. The same call goes on from there, bit for bit.
        sheets: write pictures of a few samples into the folder every so many steps, a row for each number of calls; 0: none.
        compare: how the student is compared with the teacher and with plans for the teacher; None: not at all.
        **options: of `fewstep.train.fit`.

    Returns:
        the `Student`, on whose card the comparison is.

    Raises:
        UnknownNameError: for a method that does not exist.
        ValueError: if data are missing, or numbers make no sense.
        PlanError: for a number of calls that the method's students are not made for.
        NetworkError: if training diverges; see `fewstep.train.fit`.
        MissingExtraError: for an adapter without PEFT.
    """
    calls = sorted({steps} if isinstance(steps, int) else set(steps))
    chosen = make_method(method, **own_steps(method, calls)) if isinstance(method, str) else method
    name = method if isinstance(method, str) else _name_of(method)
    plans = {nfe: chosen.plan(teacher, nfe) for nfe in calls}
    adapter = LoraOptions() if adapter is None and name in ADAPTED else adapter
    source = _checked_data(chosen, name, data, conditions, teacher)
    student = _begin(chosen, teacher, network, adapter, seed)
    training, scale = chosen.training(teacher, student), _scale(chosen, teacher, student)
    place = None if folder is None else Path(folder)
    drawn = _Sheets(teacher, plans, _shown(source, seed), place, sheets, scale) if place is not None and sheets else None
    told = {
        "iterations": iterations,
        "batch_size": batch_size,
        "learning_rate": learning_rate if learning_rate is not None else 1e-4 if adapter is None else 1e-3,
        "seed": seed,
    }
    with _counting(teacher, training, drawn) as spent:
        result = fit(
            _watched(training.stages, spent),
            dict(training.modules),
            source,
            steps=iterations,
            batch_size=batch_size,
            learning_rate=told["learning_rate"],
            warmup=min(100, iterations // 10) if warmup is None else warmup,
            ema=ema,
            seed=seed,
            folder=place,
            resume=resume,
            progress=progress,
            **options,
        )
    student.load_state_dict(result.averages[ema][STUDENT])
    cost = spent.of(iterations)
    card = _card(chosen, name, teacher, student, plans)
    card |= {"adapter": told_adapter(adapter), "guidance_scale": scale, "training": {**told, "ema": ema, "evaluations": cost}}
    made = Student(student.eval(), teacher, plans, card, _probe(teacher, source, plans[calls[0]], seed), scale)
    if compare is not None:
        card["report"] = compare_student(made, compare, source, cost)
        card["told"] = compare.told(card["report"])
    return made


def _card(method: Method, name: str, teacher: Any, student: nn.Module, plans: Mapping[int, Plan]) -> dict[str, Any]:
    """What is known of a student before it is judged."""
    model = identity(teacher)
    return {
        "format": FORMAT,
        "fewstep": __version__,
        "method": {"name": name, "options": repr(method)},
        "calls": {str(nfe): read_as(teacher, student).network_time(plan.tau).tolist() for nfe, plan in plans.items()},
        "guidance": model["guidance"],
        "wrapped": {"kind": type(student).__name__, "options": student.options} if type(student).__name__ in WRAPPERS else None,
        "base": {key: model[key] for key in ("name", "fingerprint", "predicts")},
        "schedule": teacher.schedule.config(),
    }


def _name_of(method: Method) -> str:
    return next((name for name, made in METHODS.items() if made is type(method)), type(method).__name__)


# ---- before training ---------------------------------------------------------------------------------------------------------------


def _begin(method: Method, teacher: Any, network: nn.Module | None, adapter: Any, seed: int) -> nn.Module:
    """The untrained student."""
    inner = innermost(teacher, "network") if network is None else network
    if not isinstance(inner, nn.Module):
        raise TypeError(
            "the teacher has no torch module that the student could begin as; pass network=, a module network(x, time, **cond)."
        )
    made = student_network(inner, adapter, seed=seed)
    wrapped = getattr(method, "wrapped", None)
    made = made if wrapped is None else wrapped(made)
    if adapter is not None and not isinstance(made, AdaptedNetwork):
        raise ValueError(f"{method} tells its student something more, for which an adapter's file has no place: leave adapter out.")
    return made


def _checked_data(method: Method, name: str, data: Any, conditions: Mapping[str, Tensor] | None, teacher: Any) -> Any:
    """What `fit` draws batches from."""
    if method.needs_data:
        if data is None:
            raise ValueError(
                f"{name} learns from clean data: pass data={{'x': ...}}, with conditions beside it, or data=teacher_samples(teacher, ...)."
            )
        return data
    if data is not None and conditions is None:
        return data
    shape = getattr(getattr(teacher, "info", None), "shape", None) or getattr(teacher, "shape", None)
    if shape is None:
        raise ValueError("the teacher does not say the shape of its samples: give it info=ModelInfo(shape=...).")
    return _Conditions(dict(conditions or {}), tuple(shape))


@dataclass(frozen=True)
class _Conditions:
    """Batches of conditions for methods without data; ``"x"`` says how many samples there are, and of what shape."""

    conditions: dict[str, Tensor]
    shape: tuple[int, ...]

    def __call__(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = min((len(values) for values in self.conditions.values()), default=1)
        rows = torch.randint(size, (count,), generator=generator)
        return {"x": torch.zeros(count, *self.shape), **{name: values[rows] for name, values in self.conditions.items()}}


@torch.no_grad()
def teacher_samples(
    teacher: Callable[..., Tensor],
    seeds: Sequence[int],
    cond: Mapping[str, Tensor] | None = None,
    *,
    nfe: int = 32,
    block: int = 256,
) -> dict[str, Tensor]:
    """Data made by the teacher itself, for methods that need data where there are none: ``{"x": ..., **cond}``.

    Args:
        teacher: the denoiser, which says the shape of a sample.
        seeds: one a sample.
        cond: conditions, one entry a sample.
        nfe: calls a sample, of second-order DPM-Solver++.
        block: the most samples of a network call.

    Example:
        >>> import fewstep as fs
        >>> data = teacher_samples(fs.load("digits"), range(4), {"label": torch.arange(4)}, nfe=2)
        >>> data["x"].shape, sorted(data)
        (torch.Size([4, 1, 8, 8]), ['label', 'x'])
    """
    shape = getattr(getattr(teacher, "info", None), "shape", None) or getattr(teacher, "shape", None)
    if shape is None:
        raise ValueError("the teacher does not say the shape of its samples: give it info=ModelInfo(shape=...).")
    plan = DPMSolverPP(order=2).plan(teacher.schedule, nfe, "auto", final="zero")  # type: ignore[attr-defined]
    network = innermost(teacher, "network")
    device = (
        next((p.device for p in network.parameters()), torch.device("cpu"))
        if isinstance(network, nn.Module)
        else torch.device("cpu")
    )
    made, seeds = [], list(seeds)
    for first in range(0, len(seeds), block):
        rows = slice(first, first + block)
        noise = draw_noise(shape, seeds[rows], plan, device=device)
        made.append(sample(teacher, noise, plan, cond={name: value[rows] for name, value in (cond or {}).items()}))
    return {"x": torch.cat(made), **dict(cond or {})}


# ---- what it costs -----------------------------------------------------------------------------------------------------------------


class _Spent:
    """Network evaluations, one sample each; a backward pass counts as two more."""

    def __init__(self, also: Callable[[Any, int], None] | None):
        self.evaluations, self.steps, self.also = 0, 0, also

    def __call__(self, model: Any, step: int) -> None:
        """After the updates of a step."""
        self.steps += 1
        counted = self.evaluations
        if self.also is not None:
            self.also(model, step)
        self.evaluations = counted  # pictures are not training

    def of(self, iterations: int) -> int | None:
        """Those of so many steps, by those that were done here; None if none were."""
        return round(self.evaluations / self.steps * iterations) if self.steps else None

    def count(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook."""
        learning = torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad
        self.evaluations += (BACKWARD if learning else 1) * len(inputs[0])


@dataclass(frozen=True)
class _Watched:
    """An objective, after whose updates something else is done."""

    objective: Any
    after: Callable[[Any, int], None] = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        if name == "objective":
            raise AttributeError(name)
        return getattr(self.objective, name)

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Any]]:
        return self.objective(model, batch, generator)

    def updated(self, model: Any, step: int) -> None:
        """Called by the loop."""
        updated = getattr(self.objective, "updated", None)
        if updated is not None:
            updated(model, step)
        self.after(model, step)


def _watched(stages: Sequence[Stage], after: Callable[[Any, int], None]) -> list[Stage]:
    """The stages, with something that is done after the last that takes place in every step."""
    last = max((i for i, stage in enumerate(stages) if stage.every == 1), default=0)
    return [replace(s, objective=_Watched(s.objective, after)) if i == last else s for i, s in enumerate(stages)]


@contextlib.contextmanager
def _counting(teacher: Any, training: Training, also: Callable[[Any, int], None] | None) -> Iterator[_Spent]:
    """Within it, calls of the teacher's network and of what is trained are counted."""
    spent = _Spent(also)
    found = [*training.modules.values(), innermost(teacher, "network")]
    for stage in training.stages:
        found += (getattr(stage.objective, "modules", None) or {}).values()
    watched = {id(module): module for module in found if isinstance(module, nn.Module)}
    handles = [module.register_forward_hook(spent.count) for module in watched.values()]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


# ---- after it ----------------------------------------------------------------------------------------------------------------------


def _scale(method: Method, teacher: Any, student: nn.Module) -> float | None:
    """What a student that is told the guidance scale is asked for unless another is given: the teacher's, within the range."""
    if not isinstance(student, GuidanceEmbedded):
        return None
    low, high = method.guidance  # type: ignore[attr-defined]
    return min(max(teacher.guidance_scale, low), high)


def _shown(source: Any, seed: int) -> dict[str, Tensor]:
    """Conditions of the samples in the pictures."""
    return conditions_of(Batches(source, SHOWN, seed).piece(1, 0, SHOWN))


class _Recorder:
    """A network that remembers what it was asked."""

    def __call__(self, x: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        self.asked = {"x": x, "time": time, **cond}
        return x


def _probe(teacher: Any, source: Any, plan: Plan, seed: int) -> dict[str, Tensor]:
    """What the student is asked on two samples at the plan's first time."""
    batch = Batches(source, PROBED, seed).piece(1, 0, PROBED)
    x = draw_noise(batch["x"].shape[1:], range(PROBED), plan)
    recorder = _Recorder()
    cond = conditions_of(batch)
    read_as(teacher, recorder)(x, float(plan.tau[0]), **cond)  # type: ignore[arg-type]
    return recorder.asked


class _Sheets:
    """Pictures of a few samples, every so many steps."""

    def __init__(
        self, teacher: Any, plans: Mapping[int, Plan], cond: Mapping[str, Tensor], folder: Path, every: int, scale: float | None
    ):
        self.teacher, self.plans, self.cond, self.folder, self.every, self.scale = teacher, plans, cond, folder, every, scale

    @torch.no_grad()
    def __call__(self, model: Any, step: int) -> None:
        if step % self.every:
            return
        from fewstep.evaluate.report import image_grid

        network = model[STUDENT]
        training = network.training
        denoiser = read_as(self.teacher, network.eval())
        asked = denoiser if self.scale is None else Distilled(denoiser, self.scale)
        shape, seeds = denoiser.info.shape or (), range(SHOWN)
        made = []
        for plan in self.plans.values():
            noise = draw_noise(shape, seeds, plan, device=next(network.parameters()).device)
            made.append(sample(asked, noise, plan, cond=self.cond, seeds=seeds, check=False))
        network.train(training)
        decode = getattr(denoiser, "decode", None)
        pictures = torch.cat(made) if decode is None else decode(torch.cat(made))
        sheet = image_grid(pictures.nan_to_num().cpu(), denoiser.info.data_range or (-1.0, 1.0), columns=SHOWN)
        write_atomically(self.folder / f"samples-{step:07d}.png", sheet)
