"""Several solvers on one model at several numbers of calls: the runs, a ranking of them, and their place in a report.

Two figures rank a solver. The *error* is the root mean square difference of its samples from the exact solution of the same noise. The
*distance* is that of the distribution of its samples from an independent set of exact solutions (`fewstep.evaluate.distances`), which is
all that matters where only the distribution does, and the only figure for stochastic solvers, which follow other paths. Both judge the
solver, not the model: even a poor model has an exact solution. The samples that one would get from the same noise with no error at
all are some distance away as well, because the sets are finite: that is the floor.

At every number of calls the figure is divided by the smallest there; the geometric mean of these ratios over the numbers of calls ranks.
What cannot be told apart shares a rank: an error below that of the exact solution counts as that, and a distance counts as the floor plus
its difference from it, whichever way, if the interval of that excludes 0, and else as the floor.
"""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
    "Restart": "it goes over an interval of noise levels again, which has to be chosen",
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
        rank: its place, from 1; equal scores share it.
    """

    key: Key
    score: float
    rank: int


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
        """The figures that rank by ``"error"`` or ``"distance"``: at least the error of the exact solution, or the floor.

        Samples that vary too little are nearer than the floor; that is as much a difference as to be as much farther.
        """
        if by == "error":
            return {key: max(error, self.exact_error) for key, error in self.errors().items()}
        floor = self.floor or 0.0
        return {key: floor + abs(found.excess) * _differs(found) for key, found in self.distances.items()}

    def diverging(self) -> set[tuple[str, str, int]]:
        """The runs whose samples are farther from the exact solution than data are from each other, or not finite."""
        low, high = self.info.data_range or (0.0, 0.0)
        far = max(high - low, 2.0 * float(self.exact.double().square().mean().sqrt()))
        return {row.key for row in self.rows if not row.error <= far}

    def ranking(self, by: str = "error") -> list[Ranked]:
        """Best first. A solver counts at the numbers of calls that it ran with."""
        figures = self.figures(by)
        best = {n: min((v for (*_, m), v in figures.items() if m == n), default=math.nan) for n in self.nfes}
        ranked = []
        for solver, grid in self.contestants():
            ratios = [_ratio(figures[solver, grid, n], best[n]) for n in self.nfes if (solver, grid, n) in figures]
            if ratios:
                ranked.append(((solver, grid), math.exp(sum(map(math.log, ratios)) / len(ratios))))
        scores = sorted(score for _, score in ranked)
        return [Ranked(key, score, 1 + scores.index(score)) for key, score in sorted(ranked, key=lambda place: place[1])]

    def results(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON values."""
        document: dict[str, Any] = {"exact_calls": self.exact_nfe, "exact_error": self.exact_error, "count": self.count}
        document["end"] = self.end
        if self.unfinished:
            document["unfinished"] = [", ".join(key) for key in self.unfinished]
        document["same"], document["skipped"] = self.same, self.skipped
        for by in ("error", "distance") if self.distances else ("error",):
            document[f"ranking_by_{by}"] = [
                {"rank": place.rank, "solver": place.key[0], "grid": place.key[1], "score": _finite(place.score)}
                for place in self.ranking(by)
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


def _differs(found: Excess) -> bool:
    """Whether the interval tells a run from the exact solution."""
    return not found.excess_low <= 0.0 <= found.excess_high


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
    map: Callable[..., Iterable[Any]] | None = None,  # noqa: A002  what it is called everywhere else
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
        map: runs a function on every candidate and gives the results in order, e.g. `fewstep.scale.RayMap`, which does so in parallel;
            one after the other when left out.
    """
    distances: dict[tuple[str, str, int], Excess] = {}
    features = None if judge is None else (judge.features(judge.twin), judge.features(judge.others))

    rows: list[ErrorRow] = []
    try:
        measure_one = partial(
            _measured, denoiser, noise, exact, cond, None if seeds is None else list(seeds), block, judge, features
        )
        for row, distance in (map or builtins.map)(measure_one, found.plans):  # what is finished outlives an interrupt
            if distance is not None:
                distances[row.key] = distance
            if after is not None:
                after(row)
            rows.append(dataclasses.replace(row, samples=row.samples[:SHOWN_SAMPLES].clone()))
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


def _measured(
    denoiser: Any,
    noise: Tensor,
    exact: Tensor,
    cond: Mapping[str, Any] | None,
    seeds: list[int] | None,
    block: int | None,
    judge: Judge | None,
    features: tuple[Tensor, Tensor] | None,
    candidate: tuple[str, str, Plan],
) -> tuple[ErrorRow, Excess | None]:
    """A run, and the distance of its samples if they are finite; `features` are those of the judge's exact solutions."""
    (row,) = run_plans(denoiser, noise, exact, plans=[candidate], cond=cond, seeds=seeds, block=block)
    if judge is None or features is None or not bool(row.samples.isfinite().all()):
        return row, None
    options = {"resamples": judge.resamples, "seed": judge.seed, "groups": judge.groups}
    return row, excess(judge.features(row.samples), *features, judge.distance, **options)


# ---- the report --------------------------------------------------------------------------------------------------------------------


def add_comparison(
    report: Report,
    found: Comparison,
    *,
    summary: str,
    shown: Sequence[Key],
    calls: Sequence[int],
    curves: Sequence[Key] | None = None,
    titles: Mapping[str, str] | None = None,
) -> None:
    """Add a section: sample grids, curves and tables, the best first.

    Args:
        report: where it goes; its results are filled as well.
        found: what `compare_solvers` gave.
        summary: first paragraph.
        shown: whose samples are shown.
        calls: at which numbers of calls.
        curves: in the plot of errors; all when left out. The first few of these are coloured and named.
        titles: names of solvers for people.
    """
    report.results.setdefault("rows", []).extend(found.records())
    report.results.setdefault("models", {})[found.model] = {**found.results(), "summary": summary}
    report.heading(f"{found.model} ({'x'.join(map(str, found.info.shape or ()))}, {found.schedule} schedule)")
    report.text(f"{summary} All runs and the exact solution end at {found.end}.")
    section = _Section(report, found, titles or {})
    section.pictures(shown, calls)
    if found.errors():
        section.errors(curves)
    if found.judge is not None and found.distances:
        section.distances(found.judge)
    _remarks(report, found)


@dataclass(frozen=True)
class _Section:
    """The part of a page that is about one model."""

    report: Report
    found: Comparison
    titles: Mapping[str, str]

    def pictures(self, shown: Sequence[Key], calls: Sequence[int]) -> None:
        found = self.found
        if found.exact.ndim != 4 or found.exact.shape[1] not in (1, 3):
            return
        columns, scale = (5, 4) if found.exact.shape[-1] <= 8 else (3, 2)
        limits = found.info.data_range or (-1.0, 1.0)
        rows = {row.key: row for row in found.rows}

        def picture(samples: Tensor) -> bytes:
            return image_grid(samples[: 2 * columns], limits, columns=columns, scale=scale)

        if set(found.nfes) - set(calls):
            self.report.text(f"Pictures are shown at {_listed(calls)} calls; the tables have all.", note=True)
        exact = (f"{found.model}-exact.png", f"exact ({found.exact_nfe} calls)", picture(found.exact))
        for solver, grid in shown:
            self.report.heading(self.title((solver, grid)), 3)
            strip = []
            for row in (rows[solver, grid, n] for n in calls if (solver, grid, n) in rows):
                name = f"{found.model}-{solver}-{grid}-{row.nfe}.png"
                strip.append((name, f"{row.nfe} calls, {self.told(row)}", picture(row.samples)))
            self.report.pictures([*strip, exact])

    def told(self, row: ErrorRow) -> str:
        """What stands below a picture."""
        if row.key in self.found.diverging():
            return "diverges"
        if not row.stochastic:
            return f"error {self.error_cell(row.key)}"
        return f"distance {_figure(self.found.distances[row.key].value)}" if row.key in self.found.distances else "stochastic"

    def title(self, key: Key) -> str:
        """Solver and grid in words."""
        name = self.titles.get(key[0], key[0])
        return name if not self.several_grids or key == ("auto", "auto") else f"{name}, {key[1]} grid"

    @property
    def several_grids(self) -> bool:
        return len({grid for _, grid in self.found.contestants()}) > 1

    def errors(self, curves: Sequence[Key] | None) -> None:
        found, figures = self.found, self.found.figures("error")
        span = found.info.data_range
        self.report.heading("Error against calls", 3)
        units = "in units of the samples (latents have no range)" if span is None else f"values span {span[0]:g} to {span[1]:g}"
        caption = f"{found.model}: RMS error against the exact solution, {found.count} samples; {units}"
        unknown = any(error < found.exact_error for error in found.errors().values())
        levels = {"exact solution known to": found.exact_error} if unknown else {}
        ranked = [place.key for place in found.ranking("error")]
        self.curves(curves or ranked, figures, f"{found.model}-error.png", "RMS error", caption, levels)
        legend = "Score: the geometric mean, over the numbers of calls, of the error divided by the smallest there. "
        legend += "Set off: the best at each number of calls."
        if unknown:
            legend += (
                f" The exact solution is known to within {_figure(found.exact_error)}, so smaller errors are not told apart: they are "
                f"marked <, and count as that."
            )
        else:
            legend += f" The exact solution is known to within {_figure(found.exact_error)}."
        self.table("error", legend, self.error_cell, best=True)

    def error_cell(self, key: tuple[str, str, int]) -> str:
        error, limit = self.found.errors()[key], self.found.exact_error
        return f"< {_figure(limit)}" if error < limit else _figure(error)

    def distances(self, judge: Judge) -> None:
        found, floor = self.found, self.found.floor or 0.0
        title = f"{judge.distance.title} of {judge.told}"
        self.report.heading("Distance of the distributions", 3)
        self.report.text(
            f"{title[0].upper()}{title[1:]}: {found.count} samples of every solver against {len(judge.others)} exact solutions of other "
            f"noise. The exact solutions of the same noise are {_figure(floor)} away. That is the floor: a solver without any error shows "
            f"as much, because the sets are finite."
        )
        caption = f"{found.model}: {title}, {found.count} against {len(judge.others)} samples"
        figures = {key: distance.value for key, distance in found.distances.items()}
        levels = {"exact, same noise": floor} if floor > 0.0 else {}
        order = [place.key for place in found.ranking("distance")]
        self.curves(order, figures, f"{found.model}-{judge.distance.name}.png", judge.distance.title, caption, levels)
        legend = (
            f"Marked ≠: the distance differs from the floor, by the 95 % interval at these sizes ({judge.resamples} resamples, seed "
            f"{judge.seed}; the intervals are in results.json). One below the floor is no better: such samples vary too little. Score: "
            f"the geometric mean, over the numbers of calls, of the floor plus this difference, whichever way, divided by the smallest "
            f"there. Without the mark the difference counts as 0. Equal scores share a rank."
        )
        self.table("distance", legend, self.distance_cell, best=False)

    def distance_cell(self, key: tuple[str, str, int]) -> str:
        distance = self.found.distances[key]
        return f"{'≠ ' if _differs(distance) else ''}{_figure(distance.value)}"

    def curves(
        self,
        order: Sequence[Key],
        figures: Mapping[tuple[str, str, int], float],
        file: str,
        ylabel: str,
        caption: str,
        levels: Mapping[str, float],
    ) -> None:
        found = self.found
        drawn = {key: value for key, value in figures.items() if key not in found.diverging() and value > 0.0}
        lines = {key: [(float(n), drawn[(*key, n)]) for n in found.nfes if (*key, n) in drawn] for key in order}
        lines = {key: points for key, points in lines.items() if points}
        if not lines:
            return
        named = list(lines)[:SHOWN_LINES]
        named += [key for key in lines if key[0] == "ddim" and key not in named][:1]
        faint = [points for key, points in lines.items() if key not in named]
        plot = line_plot(
            {self.title(key): lines[key] for key in named},
            xlabel="network calls a sample",
            ylabel=ylabel,
            faint=faint,
            levels=levels,
        )
        rest = f"; in grey the other {len(faint)}, as far as they are within the frame" if faint else ""
        self.report.pictures([(file, caption + rest, plot)], plot=True)

    def table(self, by: str, legend: str, cell: Callable[[tuple[str, str, int]], str], *, best: bool) -> None:
        """Ranks and figures, one row a solver, below what the figures mean."""
        found, figures, diverging = self.found, self.found.figures(by), self.found.diverging()
        if any(key in diverging for key in figures):
            legend += " Diverges: the samples are farther from the exact solution than data are from each other."
        self.report.text(legend, note=True)
        body, places = [], found.ranking(by)
        for place in places:
            keys = [(*place.key, n) for n in found.nfes]
            cells = ["–" if key not in figures else "diverges" if key in diverging else cell(key) for key in keys]
            names = self.names(place.key)
            body.append([str(place.rank), *names, *cells, _score(place.score)])
        head = ["rank", "solver", *(["time grid"] if self.several_grids else []), *(f"{n} calls" for n in found.nfes), "score"]
        marked = self.least(places, figures, len(head) - 1 - len(found.nfes)) if best else set()
        self.report.table(head, body, best=marked, text={1, 2} if self.several_grids else {1})

    def names(self, key: Key) -> list[str]:
        """The cells that say what was run."""
        return [self.titles.get(key[0], key[0]), *([key[1]] if self.several_grids else [])]

    def least(self, places: Sequence[Ranked], figures: Mapping[tuple[str, str, int], float], first: int) -> set[tuple[int, int]]:
        """The cells with the smallest figure of their column, unless that is as small as can be told."""
        marked = set()
        for j, n in enumerate(self.found.nfes):
            column = {i: figures[(*place.key, n)] for i, place in enumerate(places) if (*place.key, n) in figures}
            if column and min(column.values()) > self.found.exact_error:
                marked.add((min(column, key=lambda i, c=column: c[i]), first + j))
        return marked


def _figure(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 100.0 else f"{value:#.3g}"


def _score(value: float) -> str:
    return f"{value:#.4g}" if value < 100.0 else "> 100"


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


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
    if found.skipped:
        report.text(f"Skipped, {len(found.skipped)}, those with the same reason together:", note=True)
        report.table(["skipped", "why"], [[", ".join(names), why] for why, names in by_reason(found.skipped).items()], text={0, 1})


def by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """Reasons, and the names that are left out for each.

    Example:
        >>> by_reason({"a": "too few calls", "b": "no name", "c": "too few calls"})
        {'too few calls': ['a', 'c'], 'no name': ['b']}
    """
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    return names
