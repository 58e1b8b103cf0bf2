"""``fewstep plan make``, ``fewstep plan show`` and ``fewstep plan export``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.cli.options import option

NFE, FINAL = 10, "zero"


@dataclass(frozen=True)
class MakeOptions:
    """Options of ``fewstep plan make``."""

    solver: str = option(None, "name of the solver; see `fewstep solvers`", positional=True)
    schedule: str = option("vp_linear", "vp_linear, vp_cosine, edm, flow, or the model whose schedule it is (name or folder)")
    nfe: int | None = option(None, f"network calls per sample (default: {NFE})", kind=int)
    grid: str = option("auto", "time grid: a name, or times separated by commas, noisiest first, which say calls, start and end")
    start: float | None = option(None, "time to start from (default: where the schedule starts)", kind=float)
    final: str | None = option(
        None, f"where to end: zero (sigma = 0) or t_end (where the schedule ends) (default: {FINAL})", choices=("zero", "t_end")
    )
    out: str = option("plan.safetensors", "the file to write")


@dataclass(frozen=True)
class ShowOptions:
    """Options of ``fewstep plan show``."""

    file: str = option(None, "a plan file", positional=True)
    json: bool = option(False, "print the plan as JSON: provenance, times, dense coefficients")


@dataclass(frozen=True)
class ExportOptions:
    """Options of ``fewstep plan export``."""

    file: str = option(None, "a plan file", positional=True)
    out: str = option(None, "the JSON file to write", positional=True)
    shape: str = option("", "shape of one sample, e.g. 3,32,32: arrays are then written at full size")


OPTIONS = {"plan make": MakeOptions, "plan show": ShowOptions, "plan export": ExportOptions}


def run(options: Any) -> int:
    """Make, show or export a plan."""
    if isinstance(options, ExportOptions):
        return _export(options)
    return _show(options) if isinstance(options, ShowOptions) else _make(options)


def _make(options: MakeOptions) -> int:
    own = "," in options.grid
    grid = _times(options.grid) if own else options.grid
    if given := [f"--{name}" for name in ("nfe", "start", "final") if own and getattr(options, name) is not None]:
        raise ValueError(f"--grid {options.grid} says calls, start and end by itself: leave {' and '.join(given)} out.")
    from fewstep.solvers import make_plan

    plan = make_plan(
        options.solver,
        _schedule(options.schedule),
        None if own else NFE if options.nfe is None else options.nfe,
        grid=grid,
        start=options.start,
        final="t_end" if own else options.final or FINAL,
    )
    plan.save(options.out)
    print(plan.show())
    print(f"written to {options.out}")
    return 0


def _times(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--grid takes a name or times separated by commas, not {text!r}.") from None


def _schedule(name: str) -> Any:
    from fewstep import schedules
    from fewstep.errors import UnknownNameError
    from fewstep.loading import load, shipped_models

    known = {"vp_linear": schedules.VPLinear, "vp_cosine": schedules.VPCosine, "edm": schedules.EDM, "flow": schedules.Flow}
    if name in known:
        return known[name]()
    try:
        return load(name).schedule
    except UnknownNameError:
        raise UnknownNameError("schedule or model", name, [*known, *shipped_models()]) from None


def _export(options: ExportOptions) -> int:
    from fewstep.export import table
    from fewstep.plan import Plan

    try:
        shape = [int(size) for size in options.shape.split(",")] if options.shape else None
    except ValueError:
        raise ValueError(f"--shape takes whole numbers separated by commas, not {options.shape!r}.") from None
    plan = Plan.load(options.file)
    Path(options.out).write_text(json.dumps(table(plan, shape)) + "\n", encoding="utf-8")
    print(f"{plan!r} written to {options.out}")
    return 0


def _show(options: ShowOptions) -> int:
    from fewstep.artefacts import json_value
    from fewstep.plan import Plan

    plan = Plan.load(options.file)
    if not options.json:
        print(plan.show())
        return 0
    dense = plan.dense()
    details = {
        "schedule": plan.schedule.config(),
        "provenance": json_value(plan.provenance),
        "digest": plan.digest,
        "grid": plan.grid.tolist(),
    }
    details |= {"tau": plan.tau.tolist(), **{name: getattr(dense, name).tolist() for name in ("A", "B", "C", "e")}}
    print(json.dumps(details, indent=2))
    return 0
