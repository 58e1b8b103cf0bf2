"""Several solvers on one model at several numbers of calls: the runs, a ranking of them, and their place in a report.

Two figures rank a solver. The *error* is the root mean square difference of its samples from the exact solution of the same noise. The
*distance* is that of the distribution of its samples from an independent set of exact solutions (`fewstep.evaluate.distances`), which is
all that matters where only the distribution does, and the only figure for stochastic solvers, which follow other paths. Both judge the
solver, not the model: even a poor model has an exact solution. The samples that one would get from the same noise with no error at
all are some distance away as well, because the sets are finite: that is the floor.

At every number of calls the figure is divided by the smallest there; the geometric mean of these ratios over the numbers of calls ranks.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fewstep import solvers
from fewstep.denoisers import ModelInfo
from fewstep.errors import UnknownNameError
from fewstep.evaluate.distances import KID, MMD, Distance, Excess, Groups, excess
from fewstep.evaluate.report import Report, image_grid, line_plot
from fewstep.evaluate.trajectories import ErrorRow, run_plans
from fewstep.grids import grid_names
from fewstep.plan import Plan
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver

__all__ = ["Candidates", "Comparison", "Judge", "Ranked", "add_comparison", "candidates", "check_distance", "compare_solvers"]

Key = tuple[str, str]
"""Name of the solver, name of the grid."""
SHOWN_SAMPLES = 10
SHOWN_LINES = 6
UNNAMED: dict[str, Solver] = {"epsilon_scale": solvers.EpsilonScale(solvers.DPMSolverPP(order=2))}
"""Solvers that need nothing of a model but have no name in `fewstep.solver_names`: they run as well, around the solver of "dualfast"."""
LEFT_OUT = {
    "Compensated": "its ratios are searched for a model, a grid and a number of calls",
    "DPMSolverV3": "its statistics are computed for a model",
    "Mixed": "its recipe is written or searched for a number of calls",
    "Teleport": "it starts from the mean and the covariance of the data",
    "TimeShift": "it is a hook around any solver, with a window chosen for a model",
    "adaptive": "it takes a tolerance, not a number of calls",
}
"""What is no candidate, and why."""


@dataclass(frozen=True)
class Candidates:
    """What is to be run.

    Attributes:
        plans: (solver, grid, plan), as `compare_plans` takes them.
        same: name -> the name before it that makes the same plans and stands for it.
        skipped: name -> why it is left out, or what of it.
        final: where the plans end, as of `Solver.plan`.
    """

    plans: list[tuple[str, str, Plan]]
    same: dict[str, str]
    skipped: dict[str, str]
    final: str = "t_end"


def candidates(
    schedule: NoiseSchedule,
    nfes: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    grids: Sequence[str] = ("auto",),
    final: str = "t_end",
) -> Candidates:
    """The plans of named solvers.

    Args:
        schedule: of the model.
        nfes: numbers of calls.
        names: of solvers; all of `fewstep.solver_names`, and "epsilon_scale", when left out. Then, of names that make the same plans one
            is run; what cannot be planned is left out and told, and so are solvers that need something of the model first.
        grids: names of time grids.
        final: where all end, as of `Solver.plan`.

    Raises:
        UnknownNameError: for the name of a grid that does not exist.
        UnknownNameError, GridError, ValueError: from a solver that was asked for by name.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> found = candidates(VPLinear(), [4])
        >>> found.same["dpmpp_1"], "dpmpp_1" in [name for name, _, _ in found.plans]
        ('ddim', False)
    """
    for grid in grids:
        if grid not in grid_names():
            raise UnknownNameError("grid", grid, grid_names())
    found = Candidates([], {}, {} if names is not None else _left_out(), final)
    seen: dict[Any, str] = {}
    for name in sorted([*solvers.solver_names(), *UNNAMED]) if names is None else names:
        mine: list[tuple[str, str, Plan]] = []
        for grid, nfe in itertools.product(grids, nfes):
            plan = _plan(name, schedule, nfe, grid, final, None if names is not None else found.skipped)
            mine += [] if plan is None else [(name, grid, plan)]
        twin = name if names is not None else seen.setdefault(tuple((grid, _numbers(plan)) for _, grid, plan in mine), name)
        if twin == name:
            found.plans.extend(mine)
        elif mine:
            found.same[name] = twin
    return found


def _plan(name: str, schedule: NoiseSchedule, nfe: int, grid: str, final: str, skipped: dict[str, str] | None) -> Plan | None:
    """The plan; or None, and the reason in `skipped` if that is given."""
    try:
        solver = UNNAMED[name] if name in UNNAMED else solvers.make_solver(name)
        return solver.plan(schedule, nfe, grid, final=final)
    except (TypeError, ValueError) as error:
        if skipped is None:
            raise
        skipped[name] = f"with {nfe} calls and grid {grid}: {str(error).rstrip('.')}"
        return None


def _left_out() -> dict[str, str]:
    """What no candidate is made of, and why: solvers of the package without a name, and what is no solver of so many calls."""
    with_name = {solver for solver, _ in solvers.SOLVERS.values()} | {type(solver) for solver in UNNAMED.values()}
    public = (getattr(solvers, name) for name in solvers.__all__)
    classes = (c for c in public if inspect.isclass(c) and issubclass(c, Solver) and c is not Solver and c not in with_name)
    unknown = "it needs something that is computed for the model, so no name stands for it"
    return {**{c.__name__: unknown for c in classes}, **LEFT_OUT}


def _numbers(plan: Plan) -> tuple[Any, ...]:
    """What decides the samples of a plan, to 10 digits."""
    dense = plan.dense()
    clock = [bound for row in plan.rows if row.noise is not None for bound in (row.noise.begin, row.noise.end)]
    arrays = (plan.tau, dense.A, dense.B, dense.C, dense.e, np.array(clock))
    return (None if plan.start is None else plan.digest, *(np.char.mod("%.10g", array.ravel()).tobytes() for array in arrays))


@dataclass(frozen=True)
class Judge:
    """What a distance of distributions needs.

    Args:
        distance: which one.
        features: from samples to vectors.
        twin: ``"batch *shape"``: exact solutions of the noise that the solvers start from.
        others: ``"n *shape"``: exact solutions of other noise.
        told: what the features are, in words.
        resamples, seed: of the intervals.
        groups: of the twin and of the others, as of `fewstep.evaluate.measure`.

    Raises:
        ValueError: for a distance that can be negative, of which no ratios can be formed.
    """

    distance: Distance
    features: Callable[[Tensor], Tensor]
    twin: Tensor
    others: Tensor
    told: str
    resamples: int = 100
    seed: int = 0
    groups: Groups | None = None

    def __post_init__(self) -> None:
        check_distance(self.distance)


def check_distance(distance: Distance) -> None:
    """Whether a distance can rank solvers.

    Raises:
        ValueError: if it cannot.
    """
    if isinstance(distance, (KID, MMD)):
        raise ValueError(f"{distance.name} can be negative, so it ranks nothing: take frechet, sliced_wasserstein or wasserstein.")


@dataclass(frozen=True)
class Ranked:
    """A solver's place.

    Attributes:
        key: solver and grid.
        score: geometric mean over the numbers of calls of its figure divided by the smallest one there.
    """

    key: Key
    score: float


@dataclass
class Comparison:
    """What was found on one model.

    Attributes:
        model: its name.
        info: of the denoiser.
        schedule: its kind.
        nfes: numbers of calls.
        rows: the runs, each with its first few samples.
        exact: exact solutions of the same noise, the first few.
        exact_error: estimated error of the exact solution.
        exact_nfe: calls that it took.
        count: how many samples every run has.
        end: where the runs and the exact solution end, in words.
        distances: of the runs, by `ErrorRow.key`; empty if none was asked for.
        judge: which distance that is.
        floor: distance of the exact solutions of the same noise.
        same, skipped: of `Candidates`.
        unfinished: solvers and grids that an interrupt kept from running, or from finishing.
    """

    model: str
    info: ModelInfo
    schedule: str
    nfes: list[int]
    rows: list[ErrorRow]
    exact: Tensor
    exact_error: float
    exact_nfe: int
    count: int
    end: str
    distances: dict[tuple[str, str, int], Excess] = field(default_factory=dict)
    judge: Judge | None = None
    floor: float | None = None
    same: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unfinished: list[Key] = field(default_factory=list)

    def contestants(self) -> list[Key]:
        """Solvers and grids, in the order in which they ran."""
        return list(dict.fromkeys((row.solver, row.grid) for row in self.rows))

    def errors(self) -> dict[tuple[str, str, int], float]:
        """Errors of the deterministic runs, infinite where the samples are not finite."""
        return {r.key: r.error if math.isfinite(r.error) else math.inf for r in self.rows if not r.stochastic}

    def figures(self, by: str) -> dict[tuple[str, str, int], float]:
        """The figures that rank by ``"error"`` or ``"distance"``."""
        return self.errors() if by == "error" else {key: found.value for key, found in self.distances.items()}

    def ranking(self, by: str = "error") -> list[Ranked]:
        """Best first. A solver counts at the numbers of calls that it ran with."""
        figures = self.figures(by)
        best = {n: min((v for (*_, m), v in figures.items() if m == n), default=math.nan) for n in self.nfes}
        ranked = []
        for solver, grid in self.contestants():
            ratios = [_ratio(figures[solver, grid, n], best[n]) for n in self.nfes if (solver, grid, n) in figures]
            if ratios:
                ranked.append(Ranked((solver, grid), math.exp(sum(map(math.log, ratios)) / len(ratios))))
        return sorted(ranked, key=lambda place: place.score)

    def results(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON values."""
        document: dict[str, Any] = {"exact_calls": self.exact_nfe, "exact_error": self.exact_error, "count": self.count}
        document["end"] = self.end
        if self.unfinished:
            document["unfinished"] = [", ".join(key) for key in self.unfinished]
        document["same"], document["skipped"] = self.same, self.skipped
        for by in ("error", "distance") if self.distances else ("error",):
            document[f"ranking_by_{by}"] = [
                {"solver": place.key[0], "grid": place.key[1], "score": _finite(place.score)} for place in self.ranking(by)
            ]
        if self.judge is not None:
            document["distance"] = {
                "name": self.judge.distance.name,
                "features": self.judge.told,
                "sizes": [self.count, len(self.judge.others)],
                "floor": self.floor,
                "resamples": self.judge.resamples,
                "seed": self.judge.seed,
            }
        return document

    def records(self) -> list[dict[str, Any]]:
        """The runs as JSON values."""
        records = []
        for row in self.rows:
            record: dict[str, Any] = {"model": self.model, "solver": row.solver, "grid": row.grid, "nfe": row.nfe}
            record["error"] = _finite(row.error)
            if row.stochastic:
                record["stochastic"] = True
            if row.key in self.distances:
                found = dataclasses.asdict(self.distances[row.key])
                record["distance"] = {name: _finite(value) for name, value in found.items()}
            records.append(record)
        return records


def _told_end(schedule: NoiseSchedule, final: str) -> str:
    return "noise level 0" if final == "zero" else f"t = {schedule.t_end:g}, the last time of the noise schedule (t_end)"


def _ratio(value: float, best: float) -> float:
    return 1.0 if value == best else value / best if best > 0.0 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare_solvers(
    denoiser: Any,
    noise: Tensor,
    exact: Tensor,
    found: Candidates,
    *,
    exact_error: float,
    exact_nfe: int,
    cond: Mapping[str, Any] | None = None,
    seeds: Iterable[int] | None = None,
    judge: Judge | None = None,
    block: int | None = None,
    after: Callable[[ErrorRow], None] | None = None,
    interruptible: bool = False,
) -> Comparison:
    """Run all candidates from the same noise.

    Args:
        denoiser: a `fewstep.Denoiser`, with the shape and range of its data.
        noise: ``"batch *shape"``.
        exact: ``"batch *shape"``, the exact solution from this noise, to where the plans end.
        found: what to run.
        exact_error, exact_nfe: estimated error of `exact`, and the calls it took.
        cond, seeds, block: as of `compare_plans`.
        judge: for a distance of distributions; without one there is none.
        after: called with every run and all its samples.
        interruptible: on KeyboardInterrupt return what the solvers with all their runs gave, if there are any.
    """
    distances: dict[tuple[str, str, int], Excess] = {}
    features = None if judge is None else (judge.features(judge.twin), judge.features(judge.others))

    def measure_row(row: ErrorRow) -> ErrorRow:
        if judge is not None and features is not None and bool(row.samples.isfinite().all()):
            options = {"resamples": judge.resamples, "seed": judge.seed, "groups": judge.groups}
            distances[row.key] = excess(judge.features(row.samples), *features, judge.distance, **options)
        if after is not None:
            after(row)
        return dataclasses.replace(row, samples=row.samples[:SHOWN_SAMPLES].clone())

    rows: list[ErrorRow] = []
    try:
        for row in run_plans(denoiser, noise, exact, plans=found.plans, cond=cond, seeds=seeds, block=block):
            rows.append(measure_row(row))  # noqa: PERF401  what is finished outlives an interrupt
    except KeyboardInterrupt:
        unfinished = {plan[:2] for plan in found.plans[len(rows) :]}
        rows = [row for row in rows if row.key[:2] not in unfinished]
        if not interruptible or not rows:
            raise
    ran = {row.key for row in rows}
    return Comparison(
        model=denoiser.info.name,
        info=denoiser.info,
        schedule=type(denoiser.schedule).__name__,
        nfes=sorted({row.nfe for row in rows}),
        rows=rows,
        exact=exact[:SHOWN_SAMPLES].clone(),
        exact_error=exact_error,
        exact_nfe=exact_nfe,
        count=len(noise),
        end=_told_end(denoiser.schedule, found.final),
        distances={key: distance for key, distance in distances.items() if key in ran},
        judge=judge,
        floor=None if judge is None or features is None else judge.distance(*features),
        same=found.same,
        skipped=found.skipped,
        unfinished=list(dict.fromkeys((solver, grid) for solver, grid, plan in found.plans if (solver, grid, plan.nfe) not in ran)),
    )


# ---- the report --------------------------------------------------------------------------------------------------------------------


def add_comparison(
    report: Report,
    found: Comparison,
    *,
    summary: str,
    shown: Sequence[Key],
    calls: Sequence[int],
    order: Sequence[Key],
    curves: Sequence[Key] | None = None,
    titles: Mapping[str, str] | None = None,
) -> None:
    """Add a section: sample grids, curves and tables.

    Args:
        report: where it goes; its results are filled as well.
        found: what `compare_solvers` gave.
        summary: first paragraph.
        shown: whose samples are shown.
        calls: at which numbers of calls.
        order: of the table's rows.
        curves: in the plot; as `order` when left out. The first few of these are coloured and named.
        titles: names of solvers for people.
    """
    report.results.setdefault("rows", []).extend(found.records())
    report.results.setdefault("models", {})[found.model] = {**found.results(), "summary": summary}
    report.heading(f"{found.model} ({'x'.join(map(str, found.info.shape or ()))}, {found.schedule} schedule)")
    report.text(f"All runs and the exact solution end at {found.end}. {summary}")
    _pictures(report, found, shown, calls, titles or {})
    low, high = found.info.data_range or (-1.0, 1.0)
    report.heading("Error against calls", 3)
    caption = f"{found.model}: RMS error against the exact solution, {found.count} samples; values span {low:g} to {high:g}"
    _curves(report, found, curves or order, found.errors(), titles or {}, f"{found.model}-error.png", "RMS error", caption, {})
    _table(report, found, order, "error", titles or {})
    report.text(
        f"The best at each number of calls is set off. The exact solution is known to within {found.exact_error:.1e}.", note=True
    )
    if found.judge is not None:
        _distances(report, found, titles or {})
    _remarks(report, found)


def _title(key: Key, titles: Mapping[str, str], grids: bool) -> str:
    return f"{titles.get(key[0], key[0])}, {key[1]}" if grids else titles.get(key[0], key[0])


def _pictures(report: Report, found: Comparison, shown: Sequence[Key], calls: Sequence[int], titles: Mapping[str, str]) -> None:
    if found.exact.ndim != 4 or found.exact.shape[1] not in (1, 3):
        return
    columns, scale = (5, 4) if found.exact.shape[-1] <= 8 else (3, 2)
    limits = found.info.data_range or (-1.0, 1.0)
    rows = {row.key: row for row in found.rows}
    grids = len({grid for _, grid in shown}) > 1

    def picture(samples: Tensor) -> bytes:
        return image_grid(samples[: 2 * columns], limits, columns=columns, scale=scale)

    exact = (f"{found.model}-exact.png", f"exact ({found.exact_nfe} calls)", picture(found.exact))
    for solver, grid in shown:
        report.heading(_title((solver, grid), titles, grids), 3)
        strip = []
        for row in (rows[solver, grid, n] for n in calls if (solver, grid, n) in rows):
            judged = f"distance {found.distances[row.key].value:.3g}" if row.key in found.distances else "stochastic"
            told = judged if row.stochastic else f"error {row.error:.3g}"
            strip.append((f"{found.model}-{solver}-{grid}-{row.nfe}.png", f"{row.nfe} calls, {told}", picture(row.samples)))
        report.pictures([*strip, exact])


def _curves(
    report: Report,
    found: Comparison,
    order: Sequence[Key],
    figures: Mapping[tuple[str, str, int], float],
    titles: Mapping[str, str],
    file: str,
    ylabel: str,
    caption: str,
    levels: Mapping[str, float],
) -> None:
    lines: dict[Key, list[tuple[float, float]]] = {}
    for solver, grid in order:
        points = [
            (float(n), figures[solver, grid, n]) for n in found.nfes if math.isfinite(figures.get((solver, grid, n), math.inf))
        ]
        if points and all(value > 0.0 for _, value in points):
            lines[solver, grid] = points
    named = list(lines)[:SHOWN_LINES]
    named += [key for key in lines if key[0] == "ddim" and key not in named][:1]
    grids = len({grid for _, grid in named}) > 1
    plot = line_plot(
        {_title(key, titles, grids): lines[key] for key in named},
        xlabel="network calls a sample",
        ylabel=ylabel,
        faint=[points for key, points in lines.items() if key not in named],
        levels=levels,
    )
    rest = f"; in grey the other {len(lines) - len(named)}, as far as they are within the frame" if len(lines) > len(named) else ""
    report.pictures([(file, caption + rest, plot)], plot=True)


def _table(report: Report, found: Comparison, order: Sequence[Key], by: str, titles: Mapping[str, str]) -> None:
    """Ranks and figures, one row a solver."""
    figures = found.figures(by)
    scores = {place.key: (i + 1, place.score) for i, place in enumerate(found.ranking(by))}
    grids = len({grid for _, grid in found.contestants()}) > 1
    keys = [key for key in order if key in scores]
    body, best = [], set()
    for key in keys:
        rank, score = scores[key]
        cells = [_cell(found, (*key, n), figures.get((*key, n)), by) for n in found.nfes]
        body.append([_title(key, titles, grids), str(rank), f"{score:.2f}", *cells])
    for j, n in enumerate(found.nfes):
        column = {i: figures[(*key, n)] for i, key in enumerate(keys) if (*key, n) in figures}
        if column:
            best.add((min(column, key=lambda i, c=column: c[i]), j + 3))
    head = ["solver, time grid" if grids else "solver", "rank", "times the best", *(f"{n} calls" for n in found.nfes)]
    report.table(head, body, best=best)


def _cell(found: Comparison, key: tuple[str, str, int], value: float | None, by: str) -> str:
    if value is None or by == "error":
        return "–" if value is None else "diverged" if math.isinf(value) else f"{value:.3g}"
    judged = found.distances[key]
    mark = " ≈" if judged.excess_low <= 0.0 <= judged.excess_high else ""
    return f"{value:.3g}{mark}\n{judged.excess:+.2g} [{judged.excess_low:.2g}, {judged.excess_high:.2g}]"


def _distances(report: Report, found: Comparison, titles: Mapping[str, str]) -> None:
    judge, floor = found.judge, found.floor
    if judge is None or floor is None:
        return
    title = f"{judge.distance.title} of {judge.told}"
    order = [place.key for place in found.ranking("distance")]
    report.heading("Distance of the distributions", 3)
    report.text(
        f"{title[0].upper()}{title[1:]}: {found.count} samples of every solver against {len(judge.others)} exact solutions of other noise. "
        f"The exact solutions of the same noise are {floor:.3g} away. That is the floor: a solver without any error shows as much, because "
        f"the sets are finite."
    )
    figures = found.figures("distance")
    caption = f"{found.model}: {title}, {found.count} against {len(judge.others)} samples"
    name = f"{found.model}-{judge.distance.name}.png"
    _curves(
        report,
        found,
        order,
        figures,
        titles,
        name,
        judge.distance.title,
        caption,
        {"exact, same noise": floor} if floor > 0.0 else {},
    )
    _table(report, found, order, "distance", titles)
    report.text(
        f"Below each figure, how much it is above the floor, and the 95 % interval of that at these sizes, from {judge.resamples} "
        f"resamples, seed {judge.seed}. With ≈ the interval holds 0: by this distance, these samples do not tell the solver from the "
        f"exact solution.",
        note=True,
    )


def _remarks(report: Report, found: Comparison) -> None:
    if found.unfinished:
        names = "; ".join(", ".join(key) for key in found.unfinished)
        report.text(f"Interrupted before all runs of these were done, so they are left out: {names}.")
    if found.same:
        told = ", ".join(f"{name} = {twin}" for name, twin in found.same.items())
        report.text(f"Names that make the same plans, run once: {told}.", note=True)
    stochastic = sorted({row.solver for row in found.rows if row.stochastic})
    if stochastic:
        names = ", ".join(stochastic)
        report.text(f"Stochastic, so without an error against the ODE's solution, and ranked by distance only: {names}.", note=True)
    for name, reason in found.skipped.items():
        report.text(f"Skipped, {name}: {reason}.", note=True)
