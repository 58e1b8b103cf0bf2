"""``fewstep compare --stop-early successive-halving``: which solvers are run on all samples."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["counted", "halved"]

FEWEST = 8
"""Samples of the first round at least."""
STOPPED = "stopped early on {count} samples"
"""What begins why a candidate was left out; a colon and its score follow."""


def halved(task: Any, noise: Any, exact: Any, cond: Mapping[str, Any], options: Any) -> Any:
    """The candidates without those that fell behind on fewer samples.

    Solvers and grids are ranked as the page ranks them by error, on the first samples of those that it compares; the worse half goes, and
    the rest runs on twice as many, until all samples would be the next. What went is told among what is skipped, with the samples that it
    had and its score. Stochastic solvers follow other paths than the exact solution, so their errors say nothing, and all of them stay.

    Args:
        task: of the command: a denoiser, and the candidates.
        noise, exact, cond: of all samples.
        options: of the command.
    """
    from fewstep.cli.engines import mapper
    from fewstep.cli.setup import progress
    from fewstep.evaluate.comparison import compare_solvers

    found = task.found
    racing = list(dict.fromkeys((solver, grid) for solver, grid, plan in found.plans if not plan.stochastic))
    skipped, count = dict(found.skipped), _first(len(noise), len(racing))
    while count < len(noise) and len(racing) > 1:
        plans = [entry for entry in found.plans if entry[:2] in racing]
        round_of = dataclasses.replace(found, plans=plans)
        part = {name: value[:count] for name, value in cond.items()}
        with progress(options, total=len(plans), desc=f"{task.model.info.name}: {count} samples", unit="run") as bar:
            comparison = compare_solvers(
                task.denoiser,
                noise[:count],
                exact[:count],
                round_of,
                exact_error=0.0,
                exact_nfe=0,
                cond=part,
                block=options.batch,
                after=lambda _, bar=bar: bar.update(),
                map=mapper(options),
            )
        scores = {place.key: place.score for place in comparison.ranking("error")}
        order = sorted(racing, key=lambda key: scores[key])
        racing, gone = order[: math.ceil(len(order) / 2)], order[math.ceil(len(order) / 2) :]
        for solver, grid in gone:
            score = scores[solver, grid] / scores[order[0]]
            told = f"{score:.2f} times the best one's" if np.isfinite(score) else "not finite"
            skipped[solver if len(options.grids.split(",")) == 1 else f"{solver}, {grid}"] = (
                f"{STOPPED.format(count=count)}: its error was {told}"
            )
        count *= 2
    plans = [entry for entry in found.plans if entry[2].stochastic or entry[:2] in racing]
    return dataclasses.replace(found, plans=plans, skipped=skipped)


def counted(skipped: Mapping[str, str]) -> str:
    """How many were stopped early when, and what else was left out; without the reasons, which are long.

    Example:
        >>> score = "stopped early on 8 samples: its error was 1.50 times the best one's"
        >>> counted({"a": score, "b": score.replace("1.50", "2.00"), "c": "no name stands for it"})
        '2 stopped early on 8 samples; c'
    """
    begin = STOPPED.partition(" on ")[0]
    counts = Counter(why.partition(":")[0] for why in skipped.values() if why.startswith(begin))
    others = [name for name, why in skipped.items() if not why.startswith(begin)]
    return "; ".join([*(f"{count} {why}" for why, count in counts.items()), *([", ".join(others)] if others else [])])


def _first(count: int, racing: int) -> int:
    """Samples of the first round: so many that two are left for all samples, but not less than `FEWEST`."""
    rounds = max(0, math.ceil(math.log2(max(racing, 1))) - 1)
    return max(FEWEST, math.ceil(count / 2**rounds))
