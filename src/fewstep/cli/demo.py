"""``fewstep demo``: what few calls cost, on the shipped models."""

from __future__ import annotations

import json
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
    "dpmpp_3m": "DPM-Solver++ 3M",
}
SHOWN = ("ddim", "dpmpp_2m", "dpmpp_3m")
SHOWN_CALLS = (4, 6, 10, 20)
GRIDS = ("auto", "time", "lambda")
INTRO = (
    "Every picture below starts from the same noise. The exact column is the solution of the model's differential equation, computed with "
    "hundreds of network calls; a solver is as good as it comes close to it with few."
)


def run(options: DemoOptions) -> int:
    """Sample, measure, write the page."""
    from tqdm import tqdm

    from fewstep.cli.setup import machine, new_folder, open_model
    from fewstep.evaluate.report import Report

    nfes = _numbers(options.nfe)
    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}.")
    names = options.models.split(",")
    models = {name: open_model(name, options) for name in names}
    began = time.perf_counter()
    report = Report("fewstep: how many network calls does a sample need?", INTRO)
    report.results = {
        "command": "fewstep demo",
        "machine": machine(),
        "seed": options.seed,
        "count": options.count,
        "rows": [],
        "models": {},
    }
    total = len(names) * len(SOLVERS) * len(GRIDS) * len(nfes)
    with new_folder(options.out) as folder, tqdm(total=total, desc="demo", unit="run", disable=options.quiet or None) as bar:
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


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"--nfe takes numbers separated by commas, not {text!r}.") from None
    if numbers[0] < 1:
        raise ValueError(f"--nfe takes numbers of at least 1, got {numbers[0]}.")
    return numbers


def _model(report: Any, name: str, denoiser: Any, options: DemoOptions, nfes: list[int], bar: Any) -> None:
    from fewstep.cli.setup import parse_labels, state_dtype
    from fewstep.evaluate.trajectories import compare_plans
    from fewstep.integrate import reference
    from fewstep.noise import draw_noise
    from fewstep.solvers import make_plan

    seeds = range(options.seed, options.seed + options.count)
    labels = parse_labels("each" if denoiser.info.conditions else None, denoiser, options.count)
    cond = {} if labels is None else {"label": labels.to(options.device)}
    schedule = denoiser.schedule
    plans = [(solver, grid, make_plan(solver, schedule, nfe, grid=grid)) for grid in GRIDS for solver in SOLVERS for nfe in nfes]
    noise = draw_noise(denoiser.info.shape, seeds, plans[0][2], dtype=state_dtype(options), device=options.device)
    bar.set_description(f"{name}: exact solution")
    exact = reference(denoiser, noise, schedule, tol=options.tol, cond=cond)
    bar.set_description(name)
    rows = compare_plans(denoiser, noise, exact, plans=plans, cond=cond, after=lambda _: bar.update())
    report.results["rows"] += [{"model": name, "solver": r.solver, "grid": r.grid, "nfe": r.nfe, "error": r.error} for r in rows]
    summary = _summary(name, rows, nfes)
    report.results["models"][name] = {"exact_calls": exact.nfe, "exact_error": exact.error, "summary": summary}
    _section(report, name, denoiser, exact, rows, nfes, summary)


def _section(report: Any, name: str, denoiser: Any, exact: Any, rows: list[Any], nfes: list[int], summary: str) -> None:
    from fewstep.evaluate.report import image_grid, line_plot

    found = {(row.solver, row.grid, row.nfe): row for row in rows}
    low, high = denoiser.info.data_range or (-1.0, 1.0)
    columns, scale = (5, 5) if denoiser.info.shape[-1] <= 8 else (3, 2)
    report.heading(f"{name} ({'x'.join(map(str, denoiser.info.shape))}, {type(denoiser.schedule).__name__} schedule)")
    report.text(summary)

    def picture(samples: Any) -> bytes:
        return image_grid(samples[: 2 * columns], (low, high), columns=columns, scale=scale)

    calls = [nfe for nfe in SHOWN_CALLS if nfe in nfes] or nfes[:4]
    for solver in SHOWN:
        report.heading(SOLVERS[solver], 3)
        shown = [found[solver, "auto", nfe] for nfe in calls]
        strip = [(f"{name}-{solver}-{r.nfe}.png", f"{r.nfe} calls, error {r.error:.3g}", picture(r.samples)) for r in shown]
        report.pictures([*strip, (f"{name}-exact.png", f"exact ({exact.nfe} calls)", picture(exact))])
    lines = {label: [(nfe, found[solver, "auto", nfe].error) for nfe in nfes] for solver, label in SOLVERS.items()}
    report.heading("Error against calls", 3)
    plot = line_plot(lines, xlabel="network calls a sample", ylabel="RMS error against the exact solution")
    report.pictures(
        [(f"{name}-error.png", f"{name}: RMS error over pixels, which span {low:g} to {high:g}; grid auto", plot)], plot=True
    )
    report.heading("All of it", 3)
    keys = [(solver, grid) for solver in SOLVERS for grid in GRIDS]
    best = {(min(range(len(keys)), key=lambda i, n=nfe: found[(*keys[i], n)].error), j + 1) for j, nfe in enumerate(nfes)}
    body = [[f"{SOLVERS[s]}, {g}", *(f"{found[s, g, nfe].error:.3g}" for nfe in nfes)] for s, g in keys]
    report.table(["solver, time grid", *(f"{nfe} calls" for nfe in nfes)], body, best=best)
    report.text(f"The best at each number of calls is set off. The exact solution is known to within {exact.error:.1e}.", note=True)


def _summary(name: str, rows: list[Any], nfes: list[int]) -> str:
    """How many calls it takes to match DDIM at its most calls, each at the best of its time grids."""

    def best(solver: str, nfe: int) -> float:
        return min(row.error for row in rows if (row.solver, row.nfe) == (solver, nfe))

    goal = best("ddim", nfes[-1])
    enough = [nfe for nfe in nfes if best("dpmpp_2m", nfe) <= goal]
    told = f"{name}: DDIM with {nfes[-1]} calls has an error of {goal:.3g} at the best of these time grids"
    return f"{told}; DPM-Solver++ 2M needs {enough[0]} calls for as little." if enough else f"{told}."
