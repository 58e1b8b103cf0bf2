"""``fewstep demo``: what few calls cost, on the shipped models."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import Any

from fewstep.cli.options import Common, option


@dataclass(frozen=True)
class DemoOptions(Common):
    """Options of the command."""

    out: str = option("demo-out", "folder for index.html, results.json and the pictures")
    models: str = option("digits,photos", "shipped models, separated by commas")
    count: int = option(12, "samples of each model")
    nfe: str = option("3,4,5,6,8,10,15,20", "numbers of network calls")
    seed: int = option(0, "seed of the first sample")
    tol: float = option(5e-3, "tolerance of the exact solution, in the units of the data")


OPTIONS = {"demo": DemoOptions}
SOLVERS = {
    "ddim": "DDIM",
    "dpmpp_2m": "DPM-Solver++ 2M",
    "auto": "fewstep's auto",
}
SHOWN = ("ddim", "dpmpp_2m", "auto")
SHOWN_CALLS = (4, 6, 10, 20)
GRIDS = ("auto", "lambda", "karras")
INTRO = (
    "Every picture below starts from the same noise. The exact column is the solution of the model's differential equation, computed with "
    "hundreds of network calls; a solver is as good as it comes close to it with few."
)


def run(options: DemoOptions) -> int:
    """Sample, measure, write the page."""
    from fewstep.cli.parsing import parse_numbers

    nfes = parse_numbers("--nfe", options.nfe)
    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}.")
    from fewstep.cli.setup import machine, new_folder, open_model, progress
    from fewstep.evaluate.report import Report

    names = options.models.split(",")
    models = {name: open_model(name, options) for name in names}
    began = time.perf_counter()
    report = Report("fewstep: how many network calls does a sample need?", INTRO)
    report.results = {
        "command": "fewstep demo",
        "machine": machine(),
        "seed": options.seed,
        "count": options.count,
    }
    total = len(names) * len(SOLVERS) * len(GRIDS) * len(nfes)
    with new_folder(options.out) as folder, progress(options, total=total, desc="demo", unit="run") as bar:
        for name, denoiser in models.items():
            _model(report, name, denoiser, options, nfes, bar)
        report.results["seconds"] = round(time.perf_counter() - began, 1)
        report.text(f"Made in {report.results['seconds']:.0f} seconds on {machine()['processor']}, seed {options.seed}.", note=True)
        report.write(folder)
    if options.json:
        print(json.dumps(report.results))
    elif not options.quiet:
        for line in report.results["models"].values():
            print(line["summary"])
        print(f"written to {options.out}/index.html")
    return 0


def _model(report: Any, name: str, denoiser: Any, options: DemoOptions, nfes: list[int], bar: Any) -> None:
    from fewstep.cli.setup import parse_labels, state_dtype
    from fewstep.evaluate.comparison import add_comparison, candidates, compare_solvers
    from fewstep.integrate import reference
    from fewstep.noise import draw_noise

    seeds = range(options.seed, options.seed + options.count)
    labels = parse_labels("each" if denoiser.info.conditions else None, denoiser, options.count)
    cond = {} if labels is None else {"label": labels.to(options.device)}
    found = candidates(denoiser.schedule, nfes, names=list(SOLVERS), grids=GRIDS)
    noise = draw_noise(denoiser.info.shape, seeds, found.plans[0][2], dtype=state_dtype(options), device=options.device)
    bar.set_description(f"{name}: exact solution")
    exact = reference(denoiser, noise, denoiser.schedule, tol=options.tol, cond=cond)
    bar.set_description(name)
    comparison = compare_solvers(
        denoiser,
        noise,
        exact.plain(),
        found,
        exact_error=exact.error,
        exact_nfe=exact.nfe,
        cond=cond,
        after=lambda _: bar.update(),
    )
    calls = [nfe for nfe in SHOWN_CALLS if nfe in nfes] or nfes[:4]
    errors = comparison.figures("error")
    shown, summary = _best_grids(errors), _summary(name, errors, nfes)
    add_comparison(report, comparison, summary=summary, shown=shown, calls=calls, curves=shown, titles=SOLVERS)


def _best_grids(errors: dict[tuple[str, str, int], float]) -> list[tuple[str, str]]:
    """Every solver with its best time grid here, by the geometric mean of the errors; "auto" is a solver and its grid."""
    chosen = []
    for solver in SHOWN:
        grids = ("auto",) if solver == "auto" else GRIDS
        product = {grid: math.prod(error for key, error in errors.items() if key[:2] == (solver, grid)) for grid in grids}
        chosen.append((solver, min(product, key=product.__getitem__)))
    return chosen


def _summary(name: str, errors: dict[tuple[str, str, int], float], nfes: list[int]) -> str:
    """How many calls it takes to match DDIM at its most calls, each at the best of its time grids."""

    def best(solver: str, nfe: int) -> float:
        return min(errors[solver, grid, nfe] for grid in GRIDS)

    goal = best("ddim", nfes[-1])
    told = f"{name}: DDIM with {nfes[-1]} calls has an error of {goal:.3g} at the best of these time grids"
    for solver in SHOWN[1:]:
        enough = [nfe for nfe in nfes if best(solver, nfe) <= goal]
        told += f"; {SOLVERS[solver]} needs {enough[0]} calls for as little" if enough else ""
    return f"{told}."
