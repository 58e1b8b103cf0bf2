"""``fewstep compare``."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from fewstep.cli.options import Common, final_option, option


@dataclass(frozen=True)
class CompareOptions(Common):
    """Options of the command."""

    models: str = option("digits", "shipped models or model folders, separated by commas", positional=True)
    nfe: str = option("4,5,6,8,10", "numbers of network calls")
    solvers: str = option("all", "names of solvers, separated by commas, or all; see `fewstep solvers`")
    grids: str = option("auto", "names of time grids, separated by commas")
    final: str = final_option()
    count: int = option(200, "samples of every solver")
    others: int = option(0, "exact solutions of other noise that the samples are compared with; 0: twice --count")
    distance: str = option("sliced_wasserstein", "distance of distributions: sliced_wasserstein, frechet or wasserstein")
    features: str = option("pixels", "what the distance looks at: pixels, digits (a small classifier), inception, auto")
    weights: str = option("", "file of Inception's weights")
    resamples: int = option(100, "resamples of every interval")
    tol: float = option(2e-3, "tolerance of the exact solutions, root mean square in the units of the data")
    seed: int = option(0, "seed of the first sample")
    batch: int = option(100, "samples that run at a time; the samples do not depend on it")
    out: str = option("compare-out", "folder for index.html, results.json and the pictures")


OPTIONS = {"compare": CompareOptions}
INTRO = (
    "Every solver starts from the same noise. Its error is the root mean square difference of its samples from the exact solution of the "
    "model's differential equation, its distance that of the distribution of its samples from exact solutions of other noise. Both judge "
    "the solver, not the model."
)
FAR = 1_000_000
"""The other noise has seeds this far from those of the samples."""


def run(options: CompareOptions) -> int:
    """Run all solvers, rank them, write the page."""
    from fewstep.cli.setup import machine, new_folder, open_model, parse_numbers, progress
    from fewstep.evaluate.report import Report

    nfes = parse_numbers("--nfe", options.nfe)
    if options.count < 2 or options.others < 0 or options.others == 1 or options.batch < 1 or options.resamples < 20:
        raise ValueError("--count and --others must be at least 2, --batch at least 1 and --resamples at least 20.")
    models = [open_model(name, options) for name in options.models.split(",")]
    if len({model.info.name for model in models}) < len(models):
        raise ValueError(f"the models need different names, got {', '.join(model.info.name for model in models)}.")
    prepared = [_prepare(model, nfes, options) for model in models]
    began = time.perf_counter()
    report = Report("fewstep: solvers compared", INTRO)
    report.results = {"command": "fewstep compare", "machine": machine(), "seed": options.seed, "count": options.count}
    with new_folder(options.out) as folder:
        for model, (found, judged) in zip(models, prepared, strict=True):
            with progress(options, total=len(found.plans), desc=model.info.name, unit="run") as bar:
                _model(report, model, found, judged, options, bar)
        report.results["seconds"] = round(time.perf_counter() - began, 1)
        report.text(f"Made in {report.results['seconds']:.0f} seconds on {machine()['processor']}, seed {options.seed}.", note=True)
        report.write(folder)
    if options.json:
        print(json.dumps(report.results))
    elif not options.quiet:
        _print(report.results, options)
    return 0


def _prepare(model: Any, nfes: list[int], options: CompareOptions) -> tuple[Any, Any]:
    """The plans, and the distance with its features, so that wrong names are refused before any work."""
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
    return found, (distance, features)


def _reasons(skipped: dict[str, str]) -> str:
    """Why solvers could not be planned, with how many share a reason; without what is never a candidate."""
    from fewstep.evaluate.comparison import LEFT_OUT

    counts = Counter(reason for solver, reason in skipped.items() if solver not in LEFT_OUT)
    return "; ".join(f"{reason} ({count} solver{'s' * (count > 1)})" for reason, count in counts.items())


def _model(report: Any, model: Any, found: Any, judged: Any, options: CompareOptions, bar: Any) -> None:
    from fewstep.cli.setup import parse_labels, state_dtype
    from fewstep.evaluate.comparison import Judge, add_comparison, compare_solvers
    from fewstep.evaluate.trajectories import settled_solution
    from fewstep.noise import draw_noise

    plan = found.plans[0][2]

    def solve(first: int, count: int) -> tuple[Any, Any, Any]:
        labels = parse_labels("each" if model.info.conditions else None, model, count)
        cond = {} if labels is None else {"label": labels.to(options.device)}
        seeds = range(first, first + count)
        noise = draw_noise(model.info.shape, seeds, plan, dtype=state_dtype(options), device=options.device)
        bar.set_description(f"{model.info.name}: exact solutions of {count} samples")
        solving = {"tol": options.tol, "final": options.final, "cond": cond, "block": options.batch}
        return noise, cond, settled_solution(model, noise, model.schedule, **solving)

    noise, cond, exact = solve(options.seed, options.count)
    _, other_cond, others = solve(options.seed + FAR, options.others or 2 * options.count)
    bar.set_description(model.info.name)
    distance, features = judged
    groups = (cond["label"], other_cond["label"]) if "label" in cond else None
    judge = Judge(distance, features, exact.samples, others.samples, _told(options, model), options.resamples, options.seed, groups)
    comparison = compare_solvers(
        model,
        noise,
        exact.samples,
        found,
        exact_error=max(exact.error, others.error),
        exact_nfe=exact.nfe,
        cond=cond,
        seeds=range(options.seed, options.seed + options.count),
        judge=judge,
        block=options.batch,
        after=lambda _: bar.update(),
    )
    ranking = [place.key for place in comparison.ranking("error")]
    by_distance = [place.key for place in comparison.ranking("distance")]
    shown = list(dict.fromkeys([*ranking[:2], *by_distance[:1], *(k for k in ranking if k[0] == "ddim"), *ranking[-1:]]))
    add_comparison(report, comparison, summary=_summary(comparison), shown=shown, calls=_some(comparison.nfes), order=ranking)


def _some(nfes: list[int]) -> list[int]:
    """At most four of them, the first and the last included."""
    places = {round(i * (len(nfes) - 1) / 3) for i in range(4)}
    return [nfes[i] for i in sorted(places)]


def _told(options: CompareOptions, model: Any) -> str:
    from fewstep.evaluate.features import make_features, pixels

    if options.features == "inception":
        return "features of Inception"
    is_pixels = make_features(options.features, model.info.shape) is pixels
    return "pixels" if is_pixels else "features of the classifier of digits"


def _summary(comparison: Any) -> str:
    def named(by: str) -> str:
        best = comparison.ranking(by)[:3]
        return ", ".join(f"{place.key[0]} ({place.score:.2f})" for place in best) or "none"

    told = f"Best by error, with the geometric mean of the ratio to the best at each number of calls: {named('error')}."
    return f"{told} By distance: {named('distance')}."


def _print(results: dict[str, Any], options: CompareOptions) -> None:
    for name, found in results["models"].items():
        second = {(place["solver"], place["grid"]): i + 1 for i, place in enumerate(found["ranking_by_distance"])}
        first = {(place["solver"], place["grid"]): i + 1 for i, place in enumerate(found["ranking_by_error"])}
        about = found["distance"]
        sizes = f"{about['sizes'][0]} against {about['sizes'][1]} samples"
        print(f"{name}: {about['name']} of {about['features']}, {sizes}, seed {about['seed']}, floor {about['floor']:.3g}")
        print(f"all runs and the exact solution end at {found['end']}")
        print("  by error  by distance  solver, grid")
        for key in sorted(first.keys() | second.keys(), key=lambda k: (first.get(k, 10**6), second.get(k, 10**6))):
            print(f"  {first.get(key, '-')!s:>8}  {second.get(key, '-')!s:>11}  {', '.join(key)}")
        for solver, reason in found["skipped"].items():
            print(f"  skipped {solver}: {reason}")
    print(f"written to {options.out}/index.html")
