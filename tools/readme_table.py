"""The results table of the README, made from `benchmarks/results/*.json`: `python tools/readme_table.py`.

`--check` changes nothing and exits with status 1 if the README is not up to date. Every file has the shape

    {"command": "python benchmarks/solvers.py", "machine": "2 CPU cores", "seed": 0,
     "title": "Root mean square distance to the reference",          (optional: what the error is)
     "rows": [{"model": "digits", "solver": "ddim", "grid": "time", "nfe": 8, "error": 0.0123}, ...]}

One table a model; a line for every solver with its grid, a column for every number of calls, the least error of a column in bold.
Other keys of the file and of its rows are left alone. A pair without a row, or with an error of null, shows as a dash.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["main", "render", "replace"]

ROOT = Path(__file__).parents[1]
START, END = "<!-- results:start -->", "<!-- results:end -->"
NOTHING = "*No results yet: `make bench` measures them.*"


def main(arguments: list[str] | None = None) -> int:
    """Bring the README up to date, or check it.

    Returns:
        the exit status.
    """
    parser = argparse.ArgumentParser(description="Write the results table of the README.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README is not up to date")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    options = parser.parse_args(arguments)
    readme = options.root / "README.md"
    old = readme.read_text(encoding="utf-8")
    files = sorted((options.root / "benchmarks" / "results").glob("*.json"))
    new = replace(old, [json.loads(file.read_text(encoding="utf-8")) for file in files])
    if new == old:
        return 0
    if options.check:
        print("README.md is not up to date with benchmarks/results. Run: python tools/readme_table.py")
        return 1
    readme.write_text(new, encoding="utf-8")
    return 0


def replace(readme: str, results: Iterable[Mapping[str, Any]]) -> str:
    """The README with its tables made anew."""
    parts = re.split(f"({re.escape(START)}|{re.escape(END)})", readme)
    if [part for part in parts if part in (START, END)] != [START, END]:
        raise ValueError(f"README.md needs one {START} and, after it, one {END}.")
    tables = "\n\n".join(render(result) for result in results if result["rows"])
    return f"{parts[0]}{START}\n{tables or NOTHING}\n{END}{parts[4]}"


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
