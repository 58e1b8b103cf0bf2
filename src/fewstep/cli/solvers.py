"""``fewstep solvers``."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fewstep.cli.options import option


@dataclass(frozen=True)
class SolversOptions:
    """Options of the command."""

    json: bool = option(False, "print results as JSON on standard output")


OPTIONS = {"solvers": SolversOptions}


def run(options: SolversOptions) -> int:
    """Print the table."""
    from fewstep.solvers import make_solver, solver_names

    rows = []
    for name in solver_names():
        solver = make_solver(name)
        noise = "yes" if getattr(solver, "eta", 0.0) else "no"
        rows.append(
            {"name": name, "order": solver.claimed_order, "draws noise": noise, "cost": solver.cost, "source": solver.source}
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()).rstrip())
    return 0
