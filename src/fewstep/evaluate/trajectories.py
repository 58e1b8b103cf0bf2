"""How far a plan's samples are from the exact solution that starts from the same noise, and how fast that falls with more calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UnknownNameError
from fewstep.grids import FINALS
from fewstep.integrate import ToleranceError
from fewstep.plan import Plan
from fewstep.sampler import sample
from fewstep.schedules import NoiseSchedule
from fewstep.solvers import make_plan

__all__ = ["ErrorRow", "ObservedOrder", "Settled", "compare_plans", "observed_order", "rms_error", "settled_solution"]

ABOVE_FLOOR = 10.0
"""Errors count for the order if they are this many times that of the exact solution."""
ROUNDING = 100.0
"""Errors count for the order if they are this many times the rounding of a state."""
FIRST_CALLS = 40


@dataclass(frozen=True)
class ErrorRow:
    """One plan's result.

    Attributes:
        solver, grid, nfe: what was run.
        error: root mean square over elements and samples, in the units of the data. A stochastic plan follows another path than the
            exact solution, so its error says nothing against it.
        samples: ``"batch *shape"``.
        stochastic: whether the plan draws noise.
    """

    solver: str
    grid: str
    nfe: int
    error: float
    samples: Tensor
    stochastic: bool = False

    @property
    def key(self) -> tuple[str, str, int]:
        """What was run."""
        return self.solver, self.grid, self.nfe


def rms_error(samples: Tensor, exact: Tensor) -> float:
    """Root mean square difference over elements and samples.

    Example:
        >>> import torch
        >>> rms_error(torch.zeros(2, 2), torch.full((2, 2), 3.0))
        3.0
    """
    return float((samples - exact).double().square().mean().sqrt())


def compare_plans(
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    exact: Tensor,
    *,
    plans: Iterable[tuple[str, str, Plan]],
    cond: Mapping[str, Any] | None = None,
    seeds: Iterable[int] | None = None,
    after: Callable[[ErrorRow], None] | None = None,
    block: int | None = None,
) -> list[ErrorRow]:
    """Run plans from the same noise and measure each against the exact solution.

    Args:
        denoiser, noise, cond, seeds: as of `fewstep.sample`.
        exact: ``"batch *shape"``, e.g. `fewstep.reference` from the same noise to the plans' last time.
        plans: (name of the solver, name of the grid, plan).
        after: called with every row and all its samples, for progress, or to measure more of them.
        block: samples that run at a time; all when left out.
    """
    rows = []
    for row in run_plans(denoiser, noise, exact, plans=plans, cond=cond, seeds=seeds, block=block):
        if after is not None:
            after(row)
        rows.append(row)
    return rows


@torch.no_grad()
def run_plans(
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    exact: Tensor,
    *,
    plans: Iterable[tuple[str, str, Plan]],
    cond: Mapping[str, Any] | None = None,
    seeds: Iterable[int] | None = None,
    block: int | None = None,
) -> Iterator[ErrorRow]:
    """The rows of `compare_plans` one by one, so that a caller need not keep all samples."""
    chosen = None if seeds is None else list(seeds)
    for solver, grid, plan in plans:
        # unchecked: a solver that diverges has an error that is not finite, and the others go on
        samples = _in_blocks(denoiser, noise, plan, cond, chosen if plan.stochastic else None, block or len(noise), check=False)
        yield ErrorRow(solver, grid, plan.nfe, rms_error(samples, exact), samples, plan.stochastic)


def _in_blocks(
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    plan: Plan,
    cond: Mapping[str, Any] | None,
    seeds: list[int] | None,
    block: int,
    *,
    advance: Callable[[int], None] | None = None,
    check: bool = True,
) -> Tensor:
    """The samples; `advance` is told after every call how many samples it was for."""
    parts = []
    for i in range(0, len(noise), block):
        rows = slice(i, i + block)
        own = {k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == len(noise) else v for k, v in (cond or {}).items()}
        some, drawn = noise[rows], None if seeds is None else seeds[rows]

        def tell(*_: Any, count: int = len(some)) -> None:
            if advance is not None:
                advance(count)

        parts.append(sample(denoiser, some, plan, cond=own, seeds=drawn, callback=tell, check=check))
    return torch.cat(parts)


@dataclass(frozen=True)
class Settled:
    """A solution that no longer changes when it is given twice the calls.

    Attributes:
        samples: ``"batch *shape"``.
        error: root mean square difference from the solution with half the calls, in the units of the data. The error itself is less.
        nfe: calls of the finer solution, per sample.
        calls: calls of all solutions, per sample.
    """

    samples: Tensor
    error: float
    nfe: int
    calls: int


@torch.no_grad()
def settled_solution(
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    schedule: NoiseSchedule,
    *,
    tol: float = 2e-3,
    final: str = "t_end",
    cond: Mapping[str, Any] | None = None,
    block: int | None = None,
    most: int = 1280,
    after: Callable[[int], None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Settled:
    """The probability-flow solution of many samples, by a third-order solver whose calls are doubled until two solutions agree.

    `fewstep.reference` holds the worst sample to its tolerance, which costs hundreds of calls; this holds the root mean square over all
    samples to it, which is enough for distances of distributions. No sample depends on the others.

    Args:
        denoiser, noise, cond: as of `fewstep.sample`.
        schedule: the denoiser's noise schedule.
        tol: largest root mean square difference of the last two solutions, in the units of the data.
        final: ``"t_end"``: the solution ends at ``schedule.t_end``; ``"zero"``: one prediction of the data follows, to sigma = 0.
        block: samples that run at a time.
        most: calls at which it gives up.
        after: called with the number of calls of every solution that is done.
        advance: called after every call of the network with the number of samples it was for, for progress.

    Raises:
        ToleranceError: if the solutions do not agree.
        UnknownNameError: for an unknown final.

    Example:
        >>> from fewstep.exact import Gaussian
        >>> from fewstep.schedules import VPLinear
        >>> exact = Gaussian(VPLinear(), [1.0, -1.0], 0.25)
        >>> x = torch.ones(1, 2, dtype=torch.float64)
        >>> found = settled_solution(exact, x, VPLinear(), tol=1e-4)
        >>> rms_error(found.samples, exact.solution(x, 1.0, 1e-3)) < found.error < 1e-4
        True
    """
    nfe, calls, last, error = FIRST_CALLS, 0, None, math.inf
    final_step = _final_step(schedule, final)
    while nfe <= most:
        samples = noise
        for plan in (make_plan("dpmpp_3m", schedule, nfe, grid="lambda"), *final_step):
            samples = _in_blocks(denoiser, samples, plan, cond, None, block or len(noise), advance=advance)
        spent = nfe + len(final_step)
        calls += spent
        if after is not None:
            after(spent)
        if last is not None:
            error = rms_error(samples, last)
            if error <= tol:
                return Settled(samples, error, spent, calls)
        nfe, last = 2 * nfe, samples
    raise ToleranceError(
        f"solutions with {nfe // 4} and {nfe // 2} calls differ by {error:.2g}, more than {tol:.2g}. Ask for less (tol=).",
        error,
        calls,
    )


def _final_step(schedule: NoiseSchedule, final: str) -> list[Plan]:
    """One prediction of the data at ``t_end``, if the solution is to end at sigma = 0 and does not yet."""
    if final not in FINALS:
        raise UnknownNameError("final", final, FINALS)
    end, zero = schedule.t_end, schedule.t_zero
    return [] if final == "t_end" or end == zero else [make_plan("ddim", schedule, grid=[end, zero], start=end, final=final)]


# ---- order -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObservedOrder:
    """How fast the error falls.

    Attributes:
        order: the exponent p of error = c / nfe^p between the two finest runs whose error is well above that of the exact solution and
            of rounding.
        nfes, errors: what was run.
        orders: the exponent between neighbours, one fewer.
    """

    order: float
    nfes: tuple[int, ...]
    errors: tuple[float, ...]
    orders: tuple[float, ...]


def observed_order(
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    exact: Tensor,
    plan_of: Callable[[int], Plan],
    *,
    nfes: Sequence[int] = (20, 40, 80, 160, 320),
    cond: Mapping[str, Any] | None = None,
    seeds: Iterable[int] | None = None,
) -> ObservedOrder:
    """Measure a solver's order of convergence.

    Args:
        denoiser, noise, cond, seeds: as of `fewstep.sample`. Take a smooth, exact denoiser and float64.
        exact: ``"batch *shape"``; the result of `fewstep.reference` brings its own error, which is taken into account.
        plan_of: number of calls -> plan.
        nfes: increasing.

    Raises:
        ValueError: if fewer than two runs are well above the error of the exact solution: compare with a better one, or with fewer calls.

    Example:
        >>> from fewstep import make_plan
        >>> from fewstep.exact import Gaussian
        >>> from fewstep.schedules import VPLinear
        >>> schedule = VPLinear(t_start=0.95, t_end=0.05)
        >>> denoiser = Gaussian(schedule, [1.0, -1.0], 0.25)
        >>> x = torch.ones(1, 2, dtype=torch.float64)
        >>> exact = denoiser.solution(x, 0.95, 0.05)
        >>> found = observed_order(denoiser, x, exact, lambda n: make_plan("dpmpp_2m", schedule, n, grid="lambda"))
        >>> round(found.order)
        2
    """
    if len(nfes) < 2 or list(nfes) != sorted(set(nfes)):
        raise ValueError(f"nfes must be at least two increasing numbers, got {list(nfes)}.")
    rows = compare_plans(denoiser, noise, exact, plans=[("", "", plan_of(n)) for n in nfes], cond=cond, seeds=seeds)
    errors = tuple(row.error for row in rows)
    size = float(exact.detach().double().square().mean().sqrt())
    rounding = ROUNDING * torch.finfo(noise.dtype).eps * max(1.0, size)
    floor = max(rounding, ABOVE_FLOOR * float(getattr(exact, "error", 0.0)) * max(1.0, size))
    usable = [(n, e) for n, e in zip(nfes, errors, strict=True) if e > floor]
    if len(usable) < 2:
        raise ValueError(
            f"only {len(usable)} of {len(nfes)} runs have an error well above that of the exact solution and of rounding, {floor:.1e}; "
            f"the errors are {', '.join(f'{e:.1e}' for e in errors)}. Compare at fewer calls, or with a better solution."
        )
    steps = itertools.pairwise(zip(nfes, errors, strict=True))
    orders = tuple(_exponent(*coarse, *fine) for coarse, fine in steps)
    return ObservedOrder(_exponent(*usable[-2], *usable[-1]), tuple(nfes), errors, orders)


def _exponent(n: int, error: float, finer: int, smaller: float) -> float:
    return math.log(error / smaller) / math.log(finer / n) if error > 0.0 < smaller else math.nan
