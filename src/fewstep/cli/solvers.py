"""``fewstep solvers``."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass

from fewstep.cli.options import option


@dataclass(frozen=True)
class SolversOptions:
    """Options of the command."""

    json: bool = option(False, "print results as JSON on standard output")


WIDTH = 32
OPTIONS = {"solvers": SolversOptions}


def run(options: SolversOptions) -> int:
    """Print the table."""
    from fewstep.solvers import make_solver, solver_names

    rows = []
    for name in solver_names():
        solver = make_solver(name)
        noise = "yes" if getattr(solver, "eta", 0.0) else "no"
        rows.append(
            {
                "name": name,
                "order": solver.claimed_order,
                "draws noise": noise,
                "cost": _cost(solver.stages),
                "source": solver.source,
            }
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    rows = [{**row, "source": _short(row["source"])} for row in rows]
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()).rstrip())
    return 0


def _cost(stages: int) -> str:
    return "1 call a step" if stages == 1 else f"{stages} calls a step"


def _short(source: str) -> str:
    """A source in a table: the first words of the title, and the number of the paper whole."""
    title, mark, number = source.partition(", arXiv ")
    return f"{textwrap.shorten(title, WIDTH, placeholder=' ...')}{mark}{number}"
