"""How far a plan's samples are from the exact solution that starts from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.plan import Plan
from fewstep.sampler import sample

__all__ = ["ErrorRow", "compare_plans", "rms_error"]


@dataclass(frozen=True)
class ErrorRow:
    """One plan's result.

    Attributes:
        solver, grid, nfe: what was run.
        error: root mean square over elements and samples, in the units of the data.
        samples: ``"batch *shape"``.
    """

    solver: str
    grid: str
    nfe: int
    error: float
    samples: Tensor


def rms_error(samples: Tensor, exact: Tensor) -> float:
    """Root mean square difference over elements and samples.

    Example:
        >>> import torch
        >>> rms_error(torch.zeros(2, 2), torch.full((2, 2), 3.0))
        3.0
    """
    return float((samples - exact).double().square().mean().sqrt())


@torch.no_grad()
def compare_plans(
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    exact: Tensor,
    *,
    plans: Iterable[tuple[str, str, Plan]],
    cond: Mapping[str, Any] | None = None,
    seeds: Iterable[int] | None = None,
    after: Callable[[ErrorRow], None] | None = None,
) -> list[ErrorRow]:
    """Run plans from the same noise and measure each against the exact solution.

    Args:
        denoiser, noise, cond, seeds: as of `fewstep.sample`.
        exact: ``"batch *shape"``, e.g. `fewstep.reference` from the same noise to the plans' last time.
        plans: (name of the solver, name of the grid, plan).
        after: called with every row, for progress.
    """
    seeds = None if seeds is None else list(seeds)
    rows = []
    for solver, grid, plan in plans:
        samples = sample(denoiser, noise, plan, cond=cond, seeds=seeds if plan.stochastic else None)
        rows.append(ErrorRow(solver, grid, plan.nfe, rms_error(samples, exact), samples))
        if after is not None:
            after(rows[-1])
    return rows
