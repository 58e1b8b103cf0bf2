"""``fewstep compare``."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import Any

from fewstep.cli.options import Prompted, address_option, engine_option, final_option, option, workers_option


@dataclass(frozen=True)
class CompareOptions(Prompted):
    """Options of the command."""

    models: str = option(
        "digits",
        "shipped models, model folders or diffusers pipelines (folders, ids of the hub), separated by commas",
        positional=True,
    )
    nfe: str = option("4,5,6,8,10", "numbers of network calls")
    solvers: str = option("all", "names of solvers, separated by commas, or all; see `fewstep solvers`")
    grids: str = option("auto", "names of time grids, separated by commas")
    final: str = final_option()
    guidance: float = option(1.0, "scale of classifier-free guidance; 1 is none")
    count: int = option(0, "samples of every solver; 0: as many, from 20 to 200, as take a few minutes")
    others: int = option(0, "exact solutions of other noise that the samples are compared with; 0: twice --count")
    distance: str = option("sliced_wasserstein", "distance of distributions: sliced_wasserstein, frechet or wasserstein")
    features: str = option("pixels", "what the distance looks at: pixels, digits (a small classifier), inception, auto")
    weights: str = option("", "file of Inception's weights")
    resamples: int = option(100, "resamples of every interval")
    tol: float = option(2e-3, "tolerance of the exact solutions, root mean square in the units of the data")
    seed: int = option(0, "seed of the first sample")
    batch: int = option(100, "samples that run at a time; the samples do not depend on it")
    engine: str = engine_option("where solvers run: in this process, or in workers of Ray, with the same results")
    address: str = address_option()
    workers: int = workers_option()
    stop_early: str = option(
        "none",
        "successive-halving: run deterministic solvers on few samples first, and only the better half of them on twice as many, and so on",
        choices=("none", "successive-halving"),
    )
    out: str = option("compare-out", "folder for index.html, results.json and the pictures")


OPTIONS = {"compare": CompareOptions}
INTRO = (
    "Every solver starts from the same noise. Its error is the root mean square difference of its samples from the exact solution of the "
    "model's differential equation, its distance that of the distribution of its samples from exact solutions of other noise. Both judge "
    "the solver, not the model."
)
GOAL, FEWEST, MOST = 240.0, 20, 200
"""Seconds that the network calls may take unless --count says how many samples there are, and the bounds of that number."""
PICTURES = 5
EXACT_CALLS = 600
"""About what an exact solution takes."""
FAR = 1_000_000
"""The other noise has seeds this far from those of the samples."""


def run(options: CompareOptions) -> int:
    """Run all solvers, rank them, write the page. After an interrupt, the page has what was finished."""
    from fewstep.cli import INTERRUPTED
    from fewstep.cli.engines import check_engine
    from fewstep.cli.parsing import check_prompted, parse_numbers, told_prompts

    nfes = parse_numbers("--nfe", options.nfe)
    if (
        1 in (options.count, options.others)
        or min(options.count, options.others) < 0
        or options.batch < 1
        or options.resamples < 20
    ):
        raise ValueError("--count and --others must be at least 2, --batch at least 1 and --resamples at least 20.")
    if not options.tol > 0.0:
        raise ValueError(f"--tol must be positive, got {options.tol:g}.")
    check_prompted(options)
    check_engine(options)
    from fewstep.cli.setup import check_plannable, machine, new_folder, open_model
    from fewstep.evaluate.report import Report

    names = ["auto"] if options.solvers == "all" else options.solvers.split(",")
    for solver, grid in product(names, options.grids.split(",")):
        check_plannable(solver, grid, nfes[0])
    models = [open_model(name, options) for name in options.models.split(",")]
    if len({model.info.name for model in models}) < len(models):
        raise ValueError(f"the models need different names, got {', '.join(model.info.name for model in models)}.")
    tasks = [_prepare(model, nfes, options) for model in models]
    began = time.perf_counter()
    report = Report("fewstep: solvers compared", INTRO)
    report.results = {"command": "fewstep compare", "machine": machine(), "seed": options.seed, "guidance": options.guidance}
    report.results |= told_prompts(options)
    with new_folder(options.out) as folder:
        finished = _run_all(report, tasks, options)
        report.results |= {"seconds": round(time.perf_counter() - began, 1), "finished": finished}
        report.text(f"Made in {report.results['seconds']:.0f} seconds on {machine()['processor']}, seed {options.seed}.", note=True)
        report.write(folder)
    if options.json:
        print(json.dumps(report.results))
    elif not options.quiet:
        _print(report.results, options)
    if not finished:
        print(f"fewstep: interrupted; what was finished is in {options.out}.", file=sys.stderr)
    return 0 if finished else INTERRUPTED


@dataclass(frozen=True)
class _Task:
    """What is to be done with one model."""

    model: Any
    denoiser: Any
    found: Any
    distance: Any
    features: Any
    count: int
    others: int


def _prepare(model: Any, nfes: list[int], options: CompareOptions) -> _Task:
    """The plans, and the distance with its features, so that wrong names are refused before any work."""
    from fewstep.cli.conditions import guided
    from fewstep.cli.setup import ask_for
    from fewstep.evaluate.comparison import candidates, check_distance
    from fewstep.evaluate.distances import make_distances
    from fewstep.evaluate.features import make_features

    names = None if options.solvers == "all" else options.solvers.split(",")
    found = candidates(model.schedule, nfes, names=names, grids=options.grids.split(","), final=options.final)
    if not found.plans:
        raise ValueError(f"no solver can be run on {model.info.name}: {_reasons(found.skipped)}.")
    shape = ask_for(model.info.shape, model.info.name)
    features = make_features(options.features, shape, weights=options.weights or None, device=options.device)
    (distance,) = make_distances([options.distance])
    check_distance(distance)
    denoiser = guided(model, options.guidance, options)
    count = options.count or _affordable(model, found, options)
    others = options.others or 2 * count
    return _Task(model, denoiser, found, distance, features, count, others)


def _reasons(skipped: dict[str, str]) -> str:
    """Why solvers could not be planned, with how many share a reason; without what is never a candidate."""
    from fewstep.evaluate.comparison import LEFT_OUT

    counts = Counter(reason for solver, reason in skipped.items() if solver not in LEFT_OUT)
    return "; ".join(f"{reason} ({count} solver{'s' * (count > 1)})" for reason, count in counts.items())


def _affordable(model: Any, found: Any, options: CompareOptions) -> int:
    """How many samples take a few minutes, in tens, by the time that a call of the network takes."""
    from fewstep.cli.conditions import conditions
    from fewstep.cli.setup import seconds_a_call

    calls = sum(plan.nfe for *_, plan in found.plans) + (1 if options.others else 3) * EXACT_CALLS
    cond = conditions(model, options, FEWEST, "each" if model.info.conditions else None)
    seconds = calls * seconds_a_call(model, options, FEWEST, cond) * (1 if options.guidance == 1.0 else 2)
    count = min(max(10 * int(GOAL / seconds / 10), FEWEST), MOST)
    if not options.quiet:
        minutes = max(1, round(count * seconds / 60))
        told = f"{model.info.name}: {count} samples of every solver, about {minutes} min of network calls here; --count sets it."
        print(told, file=sys.stderr)
    return count


def _run_all(report: Any, tasks: list[_Task], options: CompareOptions) -> bool:
    """Fill the report. False if an interrupt came first, but left something to show."""
    try:
        for task in tasks:
            _run(report, task, options)
    except KeyboardInterrupt:
        if not report.results.get("models"):
            raise
        return False
    return not any("unfinished" in found for found in report.results["models"].values())


def _run(report: Any, task: _Task, options: CompareOptions) -> None:
    from fewstep.cli.engines import mapper, session
    from fewstep.cli.setup import progress
    from fewstep.evaluate.comparison import Judge, add_comparison, compare_solvers
    from fewstep.evaluate.features import TITLES, resolved_features

    noise, cond, exact = _exact(task, options.seed, task.count, options)
    _, other_cond, others = _exact(task, options.seed + FAR, task.others, options)
    groups = (cond["label"], other_cond["label"]) if "label" in cond else None
    told = TITLES[resolved_features(options.features, task.model.info.shape)]
    if task.model.info.data_range is None and told == TITLES["pixels"]:
        told = "elements of the latents" if hasattr(task.model, "decode") else "elements of the samples"
    judge = Judge(task.distance, task.features, exact.samples, others.samples, told, options.resamples, options.seed, groups)
    found, seeds = task.found, range(options.seed, options.seed + task.count)
    with session(options):
        if options.stop_early != "none":
            from fewstep.cli.halving import halved

            found = halved(task, noise, exact.samples, cond, options)
        with progress(options, total=len(found.plans), desc=task.model.info.name, unit="run") as bar:
            comparison = compare_solvers(
                task.denoiser,
                noise,
                exact.samples,
                found,
                exact_error=max(exact.error, others.error),
                exact_nfe=exact.nfe,
                cond=cond,
                seeds=seeds,
                judge=judge,
                block=options.batch,
                after=lambda _: bar.update(),
                interruptible=True,
                map=mapper(options),
            )
    ranking = [place.key for place in comparison.ranking("error")]
    by_distance = [place.key for place in comparison.ranking("distance")]
    shown = list(dict.fromkeys([*ranking[:2], *by_distance[:1], *(k for k in ranking if k[0] == "ddim"), *ranking[-1:]]))
    add_comparison(report, comparison, summary=_summary(comparison), shown=shown, calls=_some(comparison.nfes))


def _exact(task: _Task, first: int, count: int, options: CompareOptions) -> tuple[Any, Any, Any]:
    """Noise, conditions and exact solutions of samples, under a bar of their own."""
    from fewstep.cli.conditions import conditions
    from fewstep.cli.setup import progress, state_dtype
    from fewstep.evaluate.trajectories import settled_solution
    from fewstep.noise import draw_noise

    model, plan = task.model, task.found.plans[0][2]
    cond = conditions(model, options, count, "each" if model.info.conditions else None)
    noise = draw_noise(model.info.shape, range(first, first + count), plan, dtype=state_dtype(options), device=options.device)
    solving = {"tol": options.tol, "final": options.final, "cond": cond, "block": options.batch}
    what = "exact solutions" if first == options.seed else "exact solutions of other noise"
    # how many calls it takes shows on the way, so there is no total
    with progress(options, desc=f"{model.info.name}: {what}", unit="call") as bar:
        found = settled_solution(task.denoiser, noise, model.schedule, **solving, advance=bar.update)
    return noise, cond, found


def _some(nfes: list[int]) -> list[int]:
    """All of them if a row of pictures has the room, else that many, the first and the last included."""
    places = {round(i * (len(nfes) - 1) / (PICTURES - 1)) for i in range(PICTURES)}
    return [nfes[i] for i in sorted(places)]


def _summary(comparison: Any) -> str:
    several = len({grid for _, grid in comparison.contestants()}) > 1

    def named(by: str) -> str:
        places = comparison.ranking(by)
        first = [", ".join(place.key[: 1 + several]) for place in places if place.rank == 1]
        if len(first) > 3:
            return f"{len(first)} of {len(places)} share the first place, {first[0]} among them"
        best = [", ".join(place.key[: 1 + several]) for place in places[:3]]
        return "; ".join(best) if several else ", ".join(best) or "none"

    told = f"{comparison.count} samples of every solver. Best by error: {named('error')}."
    return f"{told} Best by distance: {named('distance')}." if comparison.distances else told


def _print(results: dict[str, Any], options: CompareOptions) -> None:
    from fewstep.cli.halving import counted

    for name, found in results["models"].items():
        first, second = (
            {(place["solver"], place["grid"]): place["rank"] for place in found.get(f"ranking_by_{by}", [])}
            for by in ("error", "distance")
        )
        several = len({grid for _, grid in first.keys() | second.keys()}) > 1
        about = found["distance"]
        sizes = f"{about['sizes'][0]} against {about['sizes'][1]} samples"
        print(f"{name}: {about['name']} of {about['features']}, {sizes}, seed {about['seed']}, floor {about['floor']:.3g}")
        print(f"all runs and the exact solution end at {found['end']}")
        errors = {(row["solver"], row["grid"], row["nfe"]): row["error"] for row in results["rows"] if row["model"] == name}
        nfes = sorted({key[2] for key in errors})
        widest = max(len(", ".join(key[: 1 + several])) for key in first.keys() | second.keys())
        head = "".join(f"{nfe:>10}" for nfe in nfes)
        print(f"  by error  by distance  {('solver, grid' if several else 'solver'):<{widest}}  error at calls:{head}")
        for key in sorted(first.keys() | second.keys(), key=lambda k: (first.get(k, 10**6), second.get(k, 10**6))):
            cells = "".join(f"{_cell(errors.get((*key, nfe)) if key in first else None):>10}" for nfe in nfes)
            told = f"  {first.get(key, '-')!s:>8}  {second.get(key, '-')!s:>11}  {', '.join(key[: 1 + several]):<{widest}}"
            print(f"{told}  {'':15}{cells}")
        if found["skipped"]:
            print(f"  skipped: {counted(found['skipped'])}; which, and why: {options.out}/results.json")
    print(f"written to {options.out}/index.html")


def _cell(error: float | None) -> str:
    return "-" if error is None else f"{error:.3g}"
