"""``fewstep distill``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.cli.options import Prompted, option


@dataclass(frozen=True)
class DistillOptions(Prompted):
    """Options of the command."""

    model: str = option(
        "digits",
        "a shipped model (digits, photos), a model folder or a diffusers pipeline (folder, id of the hub)",
        positional=True,
    )
    method: str = option(
        "lcm",
        "lcm; lcm-lora, which trains an adapter; dmd2, tdm, freeflow, which need no data; hipa, which learns from the model's samples",
    )
    steps: str = option("1,2,4", "numbers of network calls that the student is for")
    options: str = option("", "options of the method: loss=l2,solver_steps=40; guidance=(1,5),embedded=True; update_ratio=10")
    adversary: bool = option(False, "dmd2 with an adversary too, which learns from clean data")
    guidance: float = option(1.0, "scale of classifier-free guidance that the student has within, 1 is none")
    adapter: int = option(0, "train an adapter of this rank; 0: the whole network, but for methods of adapters")
    data: str = option("", "clean data, a .npz file with x and, for models with classes, label; left out, a shipped model's own")
    drawn: int = option(0, "instead, so many samples that the model itself draws; where there are no data, 1024; of hipa, pairs")
    label: str = option("each", 'labels of what the model draws: a class, a list like 0,1,2, or "each"; "" for without condition')
    iterations: int = option(1000, "optimizer steps")
    batch: int = option(64, "samples in a step")
    learning_rate: float = option(0.0, "of AdamW; 0: 0.0001 for a network, 0.001 for an adapter")
    seed: int = option(0, "of everything random")
    count: int = option(512, "samples that the student and plans for the model are compared on; 0: no comparison")
    untuned: bool = option(False, "leave tuned plans out of the comparison, which take the longest")
    out: str = option("student", "folder for the student, index.html and results.json")
    fresh: bool = option(False, "begin anew; otherwise a run that was stopped goes on from OUT.unfinished")


OPTIONS = {"distill": DistillOptions}
DRAWN, SHOWN = 1024, 8


def run(options: DistillOptions) -> int:
    """Distill, write the student and the page."""
    from fewstep.cli.parsing import check_prompted, parse_numbers

    calls = parse_numbers("--steps", options.steps)
    if min(options.iterations, options.batch) < 1 or min(options.adapter, options.drawn, options.count, options.seed) < 0:
        raise ValueError("--iterations and --batch must be at least 1; --adapter, --drawn, --count and --seed at least 0.")
    if options.data and options.drawn:
        raise ValueError("give one of --data and --drawn.")
    if options.dtype != "float32":
        raise ValueError("students are trained in float32: leave --dtype out.")
    check_prompted(options)
    from fewstep.loading import is_student

    if is_student(options.model):
        raise ValueError(
            f"{options.model} is a student: distill the model that it learnt from, or tune the student by fewstep prefer."
        )
    from fewstep.adapt.lora import LoraOptions
    from fewstep.cli.conditions import conditions, guided, learnt_null
    from fewstep.cli.setup import open_model
    from fewstep.cli.training import STUDENT_FILES, drawable, features_of, resumable
    from fewstep.distill import Comparison, distill
    from fewstep.distill.run import ADAPTED
    from fewstep.tuners import Effort

    method = _method(options, calls)
    model = open_model(options.model, options)
    teacher = guided(model, options.guidance, options)
    data = _data(model, teacher, options) if _takes_data(method, options) else None
    told = None if data is not None else conditions(model, options, DRAWN, _label(model, options))
    compared = Comparison(
        options.count, features=features_of(model), seed=options.seed, tuned=None if options.untuned else Effort()
    )
    with resumable(options, STUDENT_FILES) as (folder, unfinished):
        student = distill(
            teacher,
            method=method,
            steps=calls,
            data=data,
            conditions=told,
            adapter=LoraOptions(rank=options.adapter) if options.adapter else LoraOptions() if options.method in ADAPTED else None,
            iterations=options.iterations,
            batch_size=options.batch,
            learning_rate=options.learning_rate or None,
            seed=options.seed,
            folder=unfinished,
            checkpoint_every=200,
            progress=not options.quiet,
            sheets=max(1, options.iterations // 4) if drawable(model) else 0,
            compare=compared if options.count else None,
        )
        place = Path(options.model)
        student.card["base"]["source"] = str(place.resolve()) if place.exists() else options.model
        student.card["null_label"] = learnt_null(model, told if data is None else data)
        student.save(folder)
        _page(student, options, unfinished).write(folder)
    if options.json:
        print(json.dumps(student.card))
    elif not options.quiet:
        for line in student.card.get("told", []):
            print(line)
        print(f"written to {options.out}; sample with: fewstep sample {options.out} --plan {options.out} --nfe {max(calls)}")
    return 0


def _method(options: DistillOptions, calls: list[int]) -> Any:
    """The method with its options."""
    from fewstep.cli.training import parse_options
    from fewstep.distill import Adversary, make_method
    from fewstep.distill.run import own_steps

    given = parse_options(options.options)
    if options.adversary:
        if options.method != "dmd2":
            raise ValueError(f"--adversary is one of dmd2, and the method is {options.method}: leave it out.")
        given["adversary"] = Adversary()
    if options.method == "hipa" and options.drawn:
        given["pairs"] = options.drawn
    return make_method(options.method, **{**own_steps(options.method, calls), **given})


def _takes_data(method: Any, options: DistillOptions) -> bool:
    """Whether clean data are to be read or drawn; pairs of noise and samples are drawn elsewhere.

    Raises:
        ValueError: for data of a method that has no use for them.
    """
    if hasattr(method, "pairs"):
        return bool(options.data)
    if not method.needs_data and (options.data or options.drawn):
        given = "--data" if options.data else "--drawn"
        raise ValueError(
            f"{options.method} learns without data, from conditions alone: leave {given} out; --label says which conditions."
        )
    return method.needs_data


def _data(model: Any, teacher: Any, options: DistillOptions) -> Any:
    """Clean data with their conditions: of a file, of a shipped model's recipe, or drawn by the model."""
    import torch

    from fewstep.cli.conditions import conditions
    from fewstep.cli.setup import read_arrays
    from fewstep.distill import teacher_samples
    from fewstep.train.recipes import RECIPES

    if options.data:
        arrays = {name: torch.from_numpy(array) for name, array in read_arrays(options.data, "x").items()}
        if "x" not in arrays or tuple(arrays["x"].shape[1:]) != tuple(model.info.shape):
            found = {name: tuple(array.shape) for name, array in arrays.items()}
            raise ValueError(f"{options.data} needs x, a row of shape {tuple(model.info.shape)} a sample; it has {found}.")
        arrays["x"] = arrays["x"].float()
        extra = {} if "label" in arrays or getattr(model, "takes_prompts", False) is False else None
        cond = {} if extra is not None else conditions(model, options, len(arrays["x"]), None)
        if options.method == "hipa" and "noise" not in arrays:
            raise ValueError(f"{options.data} needs noise beside x, from which the model made x: hipa learns from such pairs.")
        return {**arrays, **cond}
    if options.model in RECIPES and not options.drawn:
        return RECIPES[options.model].data()
    count = options.drawn or DRAWN
    cond = conditions(model, options, count, _label(model, options))
    if not options.quiet:
        print(f"drawing {count} samples of {model.info.name} to learn from", file=sys.stderr)
    return teacher_samples(teacher, range(10**6, 10**6 + count), cond)


def _label(model: Any, options: DistillOptions) -> str | None:
    """The labels, for a model that takes some."""
    return options.label or None if model.info.conditions else None


def _page(student: Any, options: DistillOptions, unfinished: Path) -> Any:
    from fewstep.cli.setup import machine
    from fewstep.cli.training import student_sheets
    from fewstep.evaluate.report import Report

    card = student.card
    results = {"command": "fewstep distill", "machine": machine(), **card}
    intro = (
        f"A student of {card['base']['name']} for {', '.join(card['calls'])} network calls, by {card['method']['name']} in "
        f"{options.iterations} steps of {options.batch} samples."
    )
    page = Report("fewstep: a student", intro, results)
    use = f"fewstep sample {options.out} --plan {options.out} --nfe {max(student.plans)}"
    page.text(f"To use it: {use}; in Python, fewstep.distill.Student.load({options.out!r}).", note=True)
    report = card.get("report")
    if report is not None:
        page.heading("Beside plans for the model itself")
        page.text(
            f"Distance ({report['distance']}) of {report['count']} samples from as many of the model in {report['reference_calls']} calls; "
            f"two such sets of the model differ by {_number(report['floor'])}. Training took {report['evaluations'] or 0:,} network "
            "evaluations, a backward pass counted as two."
        )
        rows = [
            [
                nfe,
                _number(found["student"]),
                _number(found["untuned"]["distance"]),
                "" if found["tuned"] is None else _number(found["tuned"]["distance"]),
                "more than tried" if found["equal"] is None else str(found["equal"]),
                "" if found["break_even"] is None else f"{found['break_even']:,}",
            ]
            for nfe, found in report["calls"].items()
        ]
        head = [
            "calls",
            "student",
            "best untuned plan",
            "best tuned plan",
            "calls of an untuned plan as good",
            "pays after samples",
        ]
        page.table(head, rows, text=())
        for line in card["told"]:
            page.text(line[0].upper() + line[1:] + ".")
    if sheets := student_sheets(unfinished):
        page.heading("Samples while it was trained")
        page.pictures(sheets)
    return page


def _number(distance: float | None) -> str:
    return "not finite" if distance is None else f"{distance:.3g}"
