"""The way from a teacher to a student: `distill`.

The method says what is trained and how the student is sampled; `fewstep.train.fit` trains it; what comes out is compared with the teacher
and with the best plans for the teacher itself, untuned and tuned, of as many calls. Distillation is worth its cost if the student is better
than those, and after so many samples as the network calls that it saves take to pay for the training.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.adapt.lora import LoraOptions
from fewstep.denoisers import innermost
from fewstep.distill.consistency import LCM
from fewstep.distill.cost import counting, watched
from fewstep.distill.distribution import DMD2
from fewstep.distill.flow_map import FreeFlow
from fewstep.distill.high_frequency import HiPA
from fewstep.distill.method import STUDENT, Method
from fewstep.distill.networks import asked_of, read_as
from fewstep.distill.report import Comparison, compare_student
from fewstep.distill.sheets import SHOWN, Sheets, check_drawable
from fewstep.distill.sources import shape_of, source_of, teacher_samples
from fewstep.distill.states import conditions as conditions_of
from fewstep.distill.student import FORMAT, Student, denoiser_of
from fewstep.distill.student_network import WRAPPERS, AdaptedNetwork, GuidanceEmbedded, student_network, told_adapter
from fewstep.distill.trajectory import TDM
from fewstep.errors import UnknownNameError
from fewstep.identity import identity
from fewstep.noise import draw_noise
from fewstep.plan import Plan
from fewstep.train.batches import Batches
from fewstep.train.trainer import fit
from fewstep.train.watched import made_for
from fewstep.version import __version__

__all__ = ["ADAPTED", "METHODS", "Comparison", "distill", "make_method", "own_steps", "teacher_samples"]

METHODS: dict[str, Callable[..., Method]] = {
    "lcm": LCM,
    "lcm-lora": LCM,
    "dmd2": DMD2,
    "tdm": TDM,
    "freeflow": FreeFlow,
    "hipa": HiPA,
}
"""Name -> what makes the method from its options."""
ADAPTED = ("lcm-lora",)
"""Methods that train an adapter, if nothing is said."""
SEVERAL = ("tdm",)
"""Methods whose one student may be made for several numbers of calls, and is told which."""
PROBED = 2
"""Samples in the probe."""


def make_method(name: str, **options: Any) -> Method:
    """A method by its name.

    Raises:
        UnknownNameError: for a name that does not exist.
        TypeError: for an option that it does not have.
        ValueError: for a value that makes no sense.

    Example:
        >>> make_method("lcm", loss="l2").loss
        'l2'
    """
    if name not in METHODS:
        raise UnknownNameError("method of distillation", name, METHODS)
    known = inspect.signature(METHODS[name]).parameters
    if unknown := [option for option in options if option not in known]:
        raise TypeError(f"{name} has no option {unknown[0]!r}; it has {', '.join(known)}.")
    try:
        return METHODS[name](**options)
    except TypeError as error:
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise ValueError(f"{name} cannot be made with {given}: {error}.") from error


def own_steps(name: str, calls: Sequence[int]) -> dict[str, Any]:
    """The numbers of calls as an option, for methods whose training depends on them.

    Example:
        >>> own_steps("tdm", [1, 2, 4]), own_steps("dmd2", [2]), own_steps("lcm", [1, 2])
        ({'steps': (1, 2, 4)}, {'steps': 2}, {})
    """
    if name not in METHODS or "steps" not in inspect.signature(METHODS[name]).parameters:
        return {}
    if len(calls) > 1 and name in SEVERAL:
        return {"steps": tuple(calls)}
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
        conditions: instead, for methods that need no data; HiPA draws its pairs with them.
        adapter: `fewstep.adapt.LoraOptions` or a ``peft.LoraConfig``, to train an adapter; None: the whole network, but for the methods
            named in `ADAPTED`.
        network: a network that the student begins with instead of the teacher's; for a teacher without one, it predicts data. Whoever
            loads the student gives one like it.
        iterations: optimizer steps.
        batch_size, warmup, ema, seed, resume, progress: of `fewstep.train.fit`; the student's weights are averaged.
        learning_rate: left out, 1e-4 for a network, 1e-3 for an adapter.
        folder: where checkpoints and the log go. The same call goes on from there, bit for bit; one with another teacher, other data or
            conditions is refused.
        sheets: write pictures of a few samples into the folder every so many steps, a row for each number of calls; 0: none.
        compare: how the student is compared with the teacher and with plans for the teacher; None: not at all.
        **options: of `fewstep.train.fit`.

    Returns:
        the `Student`, on whose card the comparison is.

    Raises:
        UnknownNameError: for a method that does not exist.
        ValueError: if data are missing or given twice, samples have no known shape, or numbers make no sense.
        PlanError: for a number of calls that the method's students are not made for.
        NetworkError: if training diverges; see `fewstep.train.fit`.
        MissingExtraError: for an adapter without PEFT.
    """
    calls = sorted({steps} if isinstance(steps, int) else set(steps))
    chosen = make_method(method, **own_steps(method, calls)) if isinstance(method, str) else method
    adapter = LoraOptions() if adapter is None and isinstance(method, str) and method in ADAPTED else adapter
    name = method if isinstance(method, str) else _name_of(method, adapter)
    plans = {nfe: chosen.plan(teacher, nfe) for nfe in calls}
    with counting(teacher) as drawn:
        source = source_of(chosen, name, data, conditions, teacher, seed)
    with _seeded(seed):
        student = _begin(chosen, teacher, network, adapter, seed)
        training = chosen.training(teacher, student)
    scale, place = _scale(chosen, teacher, student), None if folder is None else Path(folder)
    probe = _probe(teacher, source, plans[calls[0]], seed)
    told = {
        "iterations": iterations,
        "batch_size": batch_size,
        "learning_rate": learning_rate if learning_rate is not None else 1e-4 if adapter is None else 1e-3,
        "seed": seed,
    }
    card = _card(chosen, name, teacher, student, plans) | {"adapter": told_adapter(adapter), "guidance_scale": scale}
    card["own_network"] = None if network is None else type(network).__name__
    shown = None
    if place is not None and sheets:
        cond, stride = conditions_of(Batches(source, SHOWN, seed).piece(1, 0, SHOWN)), min(s.every for s in training.stages)
        shape = check_drawable(teacher, tuple(probe["x"].shape[1:]))
        shown = Sheets(_reader(teacher, card), plans, cond, shape, place, sheets, stride)
    with counting(teacher, training) as spent:
        result = fit(
            watched(training.stages, made_for(teacher, source, card["adapter"]), spent, shown),
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
    cost = drawn.evaluations + spent.evaluations
    card["training"] = {**told, "ema": ema, "evaluations": cost}
    made = Student(student.eval(), teacher, plans, card, probe, scale)
    if compare is not None:
        card["report"] = compare_student(made, compare, source, cost)
        card["told"] = compare.told(card["report"])
    return made


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within it, new weights are drawn by the seed and by nothing that was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _card(method: Method, name: str, teacher: Any, student: nn.Module, plans: Mapping[int, Plan]) -> dict[str, Any]:
    """What is known of a student before it is judged."""
    model, told = identity(teacher), getattr(method, "told", None)
    numbers = {} if told is None else {str(nfe): told(nfe)["told"] for nfe in plans if told(nfe)}
    return {
        "format": FORMAT,
        "fewstep": __version__,
        "method": {"name": name, "options": repr(method)},
        "calls": {str(nfe): _told_times(teacher, student, plan) for nfe, plan in plans.items()},
        "told_number": numbers,
        "guidance": model["guidance"],
        "wrapped": {"kind": type(student).__name__, "options": student.options} if type(student).__name__ in WRAPPERS else None,
        "base": {key: model[key] for key in ("name", "fingerprint", "predicts")},
        "schedule": teacher.schedule.config(),
    }


def _told_times(teacher: Any, student: nn.Module, plan: Plan) -> list[float]:
    """What the network is told of the times of a plan."""
    denoiser = read_as(teacher, student)
    times = np.asarray(denoiser.network_time(plan.tau), np.float64)
    return (np.rint(times) if denoiser.integer_time else times).tolist()


def _name_of(method: Method, adapter: Any) -> str:
    names = [name for name, made in METHODS.items() if made is type(method)]
    fitting = [name for name in names if (name in ADAPTED) == (adapter is not None)]
    return next(iter([*fitting, *names, type(method).__name__]))


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


def _scale(method: Method, teacher: Any, student: nn.Module) -> float | None:
    """What a student that is told the guidance scale is asked for unless another is given: the teacher's, within the range."""
    if not isinstance(student, GuidanceEmbedded):
        return None
    low, high = method.guidance  # type: ignore[attr-defined]
    return min(max(teacher.guidance_scale, low), high)


def _probe(teacher: Any, source: Any, plan: Plan, seed: int) -> dict[str, Tensor]:
    """What the student is asked on two samples at the plan's first time."""
    batch = Batches(source, PROBED, seed).piece(1, 0, PROBED)
    like = next((batch[name] for name in ("x", "noise") if name in batch), None)
    x = draw_noise(shape_of(teacher) if like is None else like.shape[1:], range(PROBED), plan)
    return asked_of(teacher, x, float(plan.tau[0]), {name: value.cpu() for name, value in conditions_of(batch).items()})


def _reader(teacher: Any, card: Mapping[str, Any]) -> Callable[[nn.Module, int], Any]:
    """What makes the denoiser of a student's network for a number of calls."""
    return lambda network, nfe: denoiser_of(teacher, network, card["told_number"].get(str(nfe)), card["guidance_scale"])
