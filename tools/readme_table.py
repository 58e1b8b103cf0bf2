"""The tables of results in the README and in `docs/`, made from `benchmarks/results/*.json`: `python tools/readme_table.py`.

`--check` changes nothing and exits with status 1 if a page is not up to date. A page says where a table goes and what is in it:

    <!-- results:start -->                              every file that has rows
    <!-- results:end -->

    <!-- results:start solvers=ddim,ddpm -->            of them, these solvers
    <!-- results:end -->

    <!-- models:start -->                               the models that come along, from models.json
    <!-- models:end -->

    <!-- orders:start -->                               claimed and measured orders, ours and others', from orders.json
    <!-- orders:end -->

    <!-- official:start -->                             differences from the authors' code, from official.json
    <!-- official:end -->

    <!-- grids:start -->                                time grids by solver and model, from solvers.json
    <!-- grids:end -->

    <!-- auto:start -->                                 "auto" beside the best of every peer's settings, from auto.json
    <!-- auto:end -->

    <!-- tune:start -->                                 tuned plans beside the best of every untuned setting, from tune.json
    <!-- tune:end -->

A file with rows has the shape

    {"command": "python benchmarks/solvers.py", "machine": "2 CPU cores", "seed": 0,
     "title": "Root mean square distance to the reference",          (optional: what the error is)
     "shown": [5, 10, 20],                                           (optional: which numbers of calls; all otherwise)
     "rows": [{"model": "digits", "solver": "ddim", "grid": "time", "nfe": 8, "error": 0.0123}, ...]}

One table a model; a line for every solver with its grid, a column for every number of calls, the least error of a column in bold.
Other keys of the file and of its rows are left alone. A pair without a row, or with an error of null, shows as a dash.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["auto_table", "grids_table", "main", "models_table", "official_table", "orders_table", "render", "replace", "tune_table"]

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"<!-- (results|models|orders|official|auto|grids|tune):(start(?: solvers=([^ ]+))?|end) -->")
AIM = 1.6
"""The ratio to the best of every peer's settings that "auto" should keep below in every cell."""
NOTHING = "*No results yet: `make bench` measures them.*"


def main(arguments: list[str] | None = None) -> int:
    """Bring the pages up to date, or check them.

    Returns:
        the exit status.
    """
    parser = argparse.ArgumentParser(description="Write the tables of results in the README and the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is not up to date")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    options = parser.parse_args(arguments)
    files = sorted((options.root / "benchmarks" / "results").glob("*.json"))
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    stale = 0
    for page in [options.root / "README.md", *sorted((options.root / "docs").rglob("*.md"))]:
        old = page.read_text(encoding="utf-8")
        try:
            new = replace(old, results)
        except ValueError as error:
            raise ValueError(f"{page.name}: {error}") from None
        if new == old:
            continue
        stale += 1
        if options.check:
            print(f"{page.relative_to(options.root)} is not up to date with benchmarks/results. Run: python tools/readme_table.py")
        else:
            page.write_text(new, encoding="utf-8")
    return int(options.check and stale > 0)


def replace(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with its tables made anew.

    Args:
        page: Markdown.
        results: name of the file -> its content.

    Raises:
        ValueError: where a start has no end, or an end no start.
    """
    marks = list(MARK.finditer(page))
    kinds = [(mark[1], mark[2].startswith("start")) for mark in marks]
    if len(kinds) % 2 or any(kinds[i] != (kinds[i + 1][0], True) or kinds[i + 1][1] for i in range(0, len(kinds), 2)):
        raise ValueError("every start of a table needs its end after it.")
    parts, place = [], 0
    for start, end in zip(marks[::2], marks[1::2], strict=True):
        text = _tables(results, start[3]) if start[1] == "results" else TABLES[start[1]](results.get(SOURCES[start[1]]))
        parts.append(f"{page[place : start.end()]}\n{text}\n")
        place = end.start()
    return "".join(parts) + page[place:]


def _tables(results: Mapping[str, Mapping[str, Any]], solvers: str | None) -> str:
    tables = []
    for result in results.values():
        rows = [row for row in result.get("rows", ()) if _wanted(row, solvers, result.get("shown"))]
        if rows:
            tables.append(render({**result, "rows": rows}))
    return "\n\n".join(tables) or NOTHING


def _wanted(row: Mapping[str, Any], solvers: str | None, shown: list[int] | None) -> bool:
    if not {"model", "solver", "nfe"} <= row.keys():
        return False  # of another kind of benchmark
    chosen = solvers is None or row["solver"].replace(" ", "_") in solvers.split(",")
    return chosen and (shown is None or row["nfe"] in shown)


def models_table(result: Mapping[str, Any] | None) -> str:
    """The models that come along: size, what they predict, and what judges them."""
    if result is None:
        return NOTHING
    lines = [
        "| name | parameters | predicts | schedule | steps of training | judged by |",
        "| --- | ---: | --- | --- | ---: | --- |",
    ]
    for name, entry in result.items():
        if not (isinstance(entry, Mapping) and "model" in entry):
            continue
        model = entry["model"]
        bars = "; ".join(
            f"{key.replace('_', ' ')} {bar['value']:.3g} ({bar['is']} {bar['bound']:g})" for key, bar in entry["bars"].items()
        )
        kind = model["schedule"]["kind"]
        steps = model["training"]["steps"]
        lines.append(f"| `{name}` | {model['parameters']:,} | {model['predicts']} | {kind} | {steps:,} | {bars} |")
    return "\n".join([*lines, "", f"Measured by `{result['command']}`, seed {result['seed']}."])


def orders_table(result: Mapping[str, Any] | None) -> str:
    """Claimed and measured orders."""
    if result is None:
        return NOTHING
    lines = ["| library | solver | claims | midway | from noise | drift |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in result["orders"]:
        cells = []
        for name in ("midway", "from noise", "drift"):
            order = row["observed"].get(name)
            text = "" if order is None else f"{order:.2f}"
            cells.append(f"**{text}**" if text and order < row["claim"] - 0.15 else text)
        lines.append(f"| {row['library']} | `{row['solver']}` | {row['claim']} | {' | '.join(cells)} |")
    missing = f" Not run: {'; '.join(result['missing'])}." if result["missing"] else ""
    return "\n".join([*lines, "", f"Measured by `{result['command']}`, {result['starts']} starts.{missing}"])


def official_table(result: Mapping[str, Any] | None) -> str:
    """The largest difference of our samples from those of other code that should take the same steps."""
    if result is None:
        return NOTHING
    lines = ["| code | solver | ours | cases | largest difference |", "| --- | --- | --- | ---: | ---: |"]
    lines += [
        f"| {row['code']} | `{row['theirs']}` | `{row['ours']}` | {row['cases']} | {row['largest']:.1e} |"
        for row in result["comparisons"]
    ]
    missing = f" Not run: {'; '.join(result['missing'])}." if result["missing"] else ""
    return "\n".join([*lines, "", f"Measured by `{result['command']}`, seed {result['seed']}.{missing}"])


def auto_table(result: Mapping[str, Any] | None) -> str:
    """The figures of "auto" and of the best fixed settings, over the least error of any setting in each cell."""
    if result is None:
        return NOTHING
    summary = result["summary"]
    lines = ["| setting | geometric mean | worst cell |", "| --- | ---: | ---: |"]
    lines.append(
        f"| `auto` | {summary['auto']['geometric_mean']:.3g} | {summary['auto']['worst']:.3g} ({summary['auto']['worst_cell']}) |"
    )
    for name, values in summary["best_fixed_settings"].items():
        lines.append(f"| {name.replace(' | ', ', grid ')} | {values['geometric_mean']:.3g} | {values['worst']:.3g} |")
    by_problem = "; ".join(f"{name} {value:.2f}" for name, value in summary["auto_by_problem"].items())
    missing = f" Not run: {'; '.join(result['missing'])}." if result["missing"] else ""
    ratios = [cell["ratio"] for cell in result["cells"]]
    above = ", ".join(f"above {bar:g} in {sum(ratio > bar for ratio in ratios)}" for bar in (1.0, AIM))
    worst = f"Of {len(ratios)} cells `auto` is {above}; the worst is {max(ratios):.2f}, {summary['auto']['worst_cell']}."
    return "\n".join(
        [
            *lines,
            "",
            worst,
            "",
            f"`auto` by problem: {by_problem}.",
            "",
            f"Measured by `{result['command']}`, seed {result['seed']}.{missing}",
        ]
    )


def tune_table(result: Mapping[str, Any] | None) -> str:
    """Errors of tuned plans over the least error of any untuned setting, by problem and number of calls."""
    if result is None:
        return NOTHING
    cells, calls = result["cells"], sorted({cell["calls"] for cell in result["cells"]})
    lines = [f"| problem | {' | '.join(f'{n} calls' for n in calls)} |", f"| --- |{' ---: |' * len(calls)}"]
    for problem in dict.fromkeys(cell["problem"] for cell in cells):
        found = {cell["calls"]: cell for cell in cells if cell["problem"] == problem}
        told = [
            f"{found[n]['ratio']:.2f} ({found[n]['median_ratio']:.2f}), {found[n]['as_many_calls']}" if n in found else "–"
            for n in calls
        ]
        lines.append(f"| {problem} | {' | '.join(told)} |")
    summary = result["summary"]
    missing = f" Not run: {'; '.join(result['missing'])}." if result["missing"] else ""
    return "\n".join(
        [
            "Error of the tuned plan over the least error of any untuned setting (in brackets the same of the medians), and how many "
            "calls the best untuned setting needs to be as good.",
            "",
            *lines,
            "",
            f"Geometric mean {summary['geometric_mean']:.2f} (of the medians {summary['geometric_mean_of_medians']:.2f}); the worst "
            f"of {len(cells)} cells is {summary['worst']:.2f}, {summary['worst_cell']}; above 0.8 are {summary['cells_above_0.8']}. The "
            f"distance of the distributions is over 5 % larger than the untuned plan's in {summary['further_from_the_data']} cells.",
            "",
            f"Measured by `{result['command']}` on {result['machine']}, seed {result['seed']}.{missing}",
        ]
    )


def grids_table(result: Mapping[str, Any] | None) -> str:
    """What every grid scored with two solvers when `benchmarks/solvers.py` chose among them."""
    if result is None:
        return NOTHING
    scores: dict[str, dict[str, float]] = {}
    columns = []
    for model, notes in result["models"].items():
        for solver in ("dpmpp_2m", "dpmpp_3m"):
            columns.append(f"{model}, `{solver}`")
            for setting, score in notes["tried"].get(solver, {}).items():
                row = scores.setdefault(setting.rsplit(", ", 1)[0], {})
                row[columns[-1]] = min(score or float("inf"), row.get(columns[-1], float("inf")))
    best = {column: min(row[column] for row in scores.values() if column in row) for column in columns}
    lines = [f"| grid | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    lines += [f"| `{grid}` | {' | '.join(_cell(row.get(c), best[c]) for c in columns)} |" for grid, row in scores.items()]
    return "\n".join([*lines, "", f"Measured by `{result['command']}`, seed {result['seed']}."])


SOURCES = {"models": "models", "orders": "orders", "official": "official", "auto": "auto", "grids": "solvers", "tune": "tune"}
TABLES = {
    "models": models_table,
    "orders": orders_table,
    "official": official_table,
    "auto": auto_table,
    "grids": grids_table,
    "tune": tune_table,
}


def render(result: Mapping[str, Any]) -> str:
    """The tables of one file.

    Example:
        >>> rows = [{"model": "digits", "solver": "ddim", "grid": "time", "nfe": n, "error": 1 / n} for n in (4, 8)]
        >>> print(render({"command": "make bench", "machine": "2 cores", "seed": 0, "rows": rows}))
        **digits**
        <BLANKLINE>
        | solver | grid | 4 calls | 8 calls |
        | --- | --- | ---: | ---: |
        | `ddim` | `time` | **0.25** | **0.125** |
        <BLANKLINE>
        Made by `make bench` on 2 cores, seed 0.
    """
    rows = result["rows"]
    blocks = [f"{result['title']}."] if result.get("title") else []
    models = dict.fromkeys(row["model"] for row in rows)
    blocks += [_table(model, [row for row in rows if row["model"] == model]) for model in models]
    blocks.append(f"Made by `{result['command']}` on {result['machine']}, seed {result['seed']}.")
    return "\n\n".join(blocks)


def _table(model: str, rows: list[Mapping[str, Any]]) -> str:
    calls = sorted({row["nfe"] for row in rows})
    errors = {(row["solver"], row["grid"], row["nfe"]): row["error"] for row in rows if row["error"] is not None}
    best = {nfe: min((error for key, error in errors.items() if key[2] == nfe), default=None) for nfe in calls}
    lines = [
        f"**{model}**",
        "",
        f"| solver | grid | {' | '.join(f'{nfe} calls' if nfe != 1 else '1 call' for nfe in calls)} |",
        f"| --- | --- |{' ---: |' * len(calls)}",
    ]
    for solver, grid in dict.fromkeys((row["solver"], row["grid"]) for row in rows):
        cells = [_cell(errors.get((solver, grid, nfe)), best[nfe]) for nfe in calls]
        lines.append(f"| `{solver}` | `{grid}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(error: float | None, best: float | None) -> str:
    if error is None:
        return "–"
    return f"**{error:.3g}**" if error == best else f"{error:.3g}"


if __name__ == "__main__":
    sys.exit(main())
