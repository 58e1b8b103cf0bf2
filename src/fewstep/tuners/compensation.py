r"""DC-Solver's search of compensation ratios for one model, solver and grid, and the regression over guidance scales and numbers of calls.

Source: "DC-Solver: Improving Predictor-Corrector Diffusion Sampler via Dynamic Compensation" (arXiv 2409.03755, sections
3.2 and 3.3), and its official code. Step by step from the first call that can be compensated: the ratio $\rho_i$ is the one with which the
state at the next time, predicted and corrected, comes nearest to the exact one, the ratios before it being fixed,

$$ \rho_i = \arg\min_\rho \sum_k \big\| x_{i+1}(\rho) - x^*_k(t_{i+1}) \big\|^2 . $$

The last state is not corrected, so its ratio takes no call of the network. The authors take 40 steps of AdamW through the network for each
ratio. One number is found by Brent's method as well, in about a dozen calls and without a backward pass: the default here.

The search makes each step better, and the end may still be worse. So ratios are tried on other paths, and are 1 if they do not help there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fewstep.errors import MissingExtraError, UnknownNameError
from fewstep.grids import GridRule
from fewstep.identity import identity
from fewstep.multistep import Step
from fewstep.plan import Entry, Plan
from fewstep.sampler import sample
from fewstep.solver import Solver
from fewstep.solvers import CascadePolynomial, Compensated, DPMSolverPP, UniPC
from fewstep.tuners.paths import Paths, trace_paths
from fewstep.tuners.task import GRIDS, Candidate, Counted, Task, distances

if TYPE_CHECKING:
    from fewstep.tuners.effort import Effort

__all__ = ["cascade", "compensation", "compensation_candidates"]

Floats = NDArray[np.float64]
METHODS = ("brent", "gradient")
BOUNDS = (0.1, 4.0)
"""Between which ratios Brent's method searches. At 0 the prediction would have no weight in what is stored."""
MOST_TRIALS, PRECISE = 14, 1e-2
"""Of Brent's method: evaluations, and how well a ratio is found."""
STEPS, RATE = 40, 0.1
"""Of AdamW, as published."""
NOISES = 10
"""As published."""


def compensation(
    denoiser: Callable[..., Tensor],
    solver: Solver,
    *,
    paths: Paths,
    nfe: int | None = None,
    grid: str | GridRule | ArrayLike = "time",
    noises: int = NOISES,
    method: str = "brent",
    degree: int = 2,
    variable: str = "time",
    final: str = "t_end",
    block: int = 256,
) -> tuple[float, ...]:
    """Search the ratios with which a solver comes nearest to exact paths.

    Args:
        denoiser: ``D(x, t, **cond)`` with a schedule; guided or not. The ratios serve this model under this guidance only.
        solver: of one call a step, see `Compensated`.
        paths: exact paths, see `fewstep.tuners.trace_paths`: the first `noises` of them are searched on, the others decide whether the
            ratios are any use.
        nfe, grid, final: of the plan, see `fewstep.solver.Solver.plan`.
        noises: how many paths are searched on.
        method: ``"brent"``, about a dozen evaluations of every noise and call, or ``"gradient"``, 40 forward and backward, as published.
        degree, variable: see `Compensated`.
        block: the most samples of a network call.

    Returns:
        One ratio a call: all 1 if the samples from the other noises are not nearer to the exact ones with the ratios found, by more than
        a standard error of what is gained.

    Raises:
        UnknownNameError: for a method that does not exist.
        ValueError: if there are not more paths than `noises`, or the solver draws noise.
        MissingExtraError: for Brent's method without SciPy.

    Example:
        >>> import fewstep as fs
        >>> exact = fs.exact.GaussianMixture(fs.schedules.VPLinear(), [[-1.0, 0.0], [1.0, 0.5]], 0.05)
        >>> paths = trace_paths(exact, fs.draw_noise((2,), range(64), dtype=torch.float64), exact.schedule, calls=64)
        >>> ratios = compensation(exact, UniPC(), paths=paths, nfe=5)
        >>> len(ratios), ratios[:2]
        (5, (1.0, 1.0))
    """
    if not 0 < noises < paths.count:
        raise ValueError(f"{paths.count} paths are too few to search on {noises} and to validate on others.")
    counted = denoiser if isinstance(denoiser, Counted) else Counted(denoiser, block)
    plan = solver.plan(paths.schedule, nfe, grid, final=final)
    if plan.stochastic:
        raise ValueError(f"{solver!r:.80} draws noise, so its states are not to be compared with those of exact paths.")
    start = Compensated(solver, (1.0,) * plan.nfe, degree, variable)
    found = replace(start, ratios=searched(counted, start, plan.grid, paths.take(slice(noises)), method))
    helps = _nearer(counted, found.plan(paths.schedule, nfe, grid, final=final), plan, paths.take(slice(noises, None)))
    return found.ratios if helps else start.ratios


def cascade(
    guided: Callable[[float], Callable[..., Tensor]],
    solver: Solver,
    *,
    scales: Sequence[float],
    calls: Sequence[int],
    noise: Tensor,
    cond: Mapping[str, Any] | None = None,
    grid: str | GridRule = "time",
    noises: int = NOISES,
    method: str = "brent",
    reference_calls: int = 64,
    block: int = 256,
) -> CascadePolynomial:
    """Search ratios at some guidance scales and numbers of calls, and fit the regression for those between.

    Args:
        guided: from a guidance scale to the denoiser, e.g. ``lambda scale: ClassifierFree(denoiser, scale, {"label": 10})``.
        solver, grid, noises, method, block: as of `compensation`.
        scales, calls: every scale is searched with every number of calls.
        noise: ``"batch *shape"``, starting noise, more than `noises`.
        cond: its conditions.
        reference_calls: network calls of an exact path.

    Returns:
        `CascadePolynomial`, which predicts within the scales and calls searched.

    Raises:
        ValueError, UnknownNameError, MissingExtraError: see `compensation`.

    Example:
        >>> import fewstep as fs
        >>> exact = fs.exact.GaussianMixture(fs.schedules.VPLinear(), [[-1.0, 0.0], [1.0, 0.5]], 0.05)
        >>> noise, cond = fs.draw_noise((2,), range(32), dtype=torch.float64), {"label": torch.arange(32) % 2}
        >>> guided = lambda scale: fs.guidance.ClassifierFree(exact, scale, {"label": -1})
        >>> fitted = cascade(guided, UniPC(), scales=(1.0, 2.0), calls=(5, 6), noise=noise, cond=cond)
        >>> len(fitted.ratios(1.5, 5))
        5
    """
    found, models = {}, []
    for scale in scales:
        denoiser = Counted(guided(scale), block)
        models.append(identity(denoiser))
        paths = trace_paths(denoiser, noise, denoiser.schedule, calls=reference_calls, cond=cond)
        for nfe in calls:
            options = {"paths": paths, "grid": grid, "noises": noises, "method": method}
            found[float(scale), nfe] = compensation(denoiser, solver, nfe=nfe, **options)
    told = {"models": models, "solver": solver.described(), "grid": grid if isinstance(grid, str) else repr(grid)}
    return CascadePolynomial.fit(found, provenance={**told, "noises": noises, "method": method})


def compensation_candidates(task: Task, nfe: int, effort: Effort) -> Iterator[Candidate]:
    """Compensated plans of some solvers on all grids."""
    some, plans = task.fit.take(slice(NOISES)), {}
    for name, solver in SOLVERS.items():
        for grid in GRIDS:
            start = Compensated(solver, (1.0,) * nfe)
            times = start.plan(task.schedule, nfe, grid, final=task.final).grid
            found = replace(start, ratios=searched(task.denoiser, start, times, some))
            plans[f"compensation: {name}, {grid}"] = found.plan(task.schedule, nfe, grid, final=task.final)
    yield from task.screened(plans)


SOLVERS: dict[str, Solver] = {
    "unipc": UniPC(order=3),
    "unipc lower final": UniPC(order=3, lower_order_final=True),
    "unipc_2": UniPC(order=2, shortcut="bh2"),
    "dpmpp_2m": DPMSolverPP(order=2),
}
"""What `fewstep.tune` compensates."""


def _nearer(denoiser: Counted, plan: Plan, other: Plan, paths: Paths) -> bool:
    """Whether a plan is nearer to the exact samples than another, in mean square, by more than a standard error of the difference."""
    runs = (sample(denoiser, paths.noise, each, cond=paths.cond, check=False) for each in (other, plan))
    before, after = (distances(samples, paths.target) ** 2 for samples in runs)
    gains = (before - after) * paths.shares
    return bool(gains.mean() > gains.std() / np.sqrt(len(gains)))


# ---- the search ----------------------------------------------------------------------------------------------------------------------


def searched(denoiser: Counted, start: Compensated, times: Floats, paths: Paths, method: str = "brent") -> tuple[float, ...]:
    """The ratio of every call, one after the other, on all of the paths."""
    if method not in METHODS:
        raise UnknownNameError("method of compensation", method, METHODS)
    steps = start.steps(paths.schedule, times)
    polynomials = start.polynomials(paths.schedule, steps)
    minimum: Callable[[Callable[[Any], Tensor]], float] = _brent if method == "brent" else _adamw
    walk = _Walk(denoiser, steps, times, paths)
    here, ratios = walk.arrived(0, paths.noise, ()), []
    for i, polynomial in enumerate(polynomials):
        ratio, shares = 1.0, [1.0]
        if polynomial is not None:
            ratio = minimum(partial(_loss_of, walk, i, here, polynomial))
            shares = _shares(polynomial, ratio)
        ratios.append(ratio)
        if i + 1 < len(steps):
            here = walk.arrived(i + 1, *walk.predicted(i, here, shares))
    return tuple(ratios)


def _loss_of(walk: _Walk, i: int, here: _Here, polynomial: Floats, ratio: Any) -> Tensor:
    return walk.loss(i, here, _shares(polynomial, ratio))


class _Here(NamedTuple):
    """Before the step of call i.

    Attributes:
        state: ``"batch *shape"``, corrected.
        plain: m_i, not compensated.
        stored: o_{i-1}, o_{i-2}, ..., compensated.
    """

    state: Tensor
    plain: Tensor
    stored: tuple[Tensor, ...]


class _Walk:
    """Steps of a solver along exact paths, one at a time."""

    def __init__(self, denoiser: Counted, steps: Sequence[Step], times: Floats, paths: Paths):
        self.denoiser, self.steps, self.times, self.paths = denoiser, steps, times, paths

    def arrived(self, i: int, z: Tensor, stored: tuple[Tensor, ...]) -> _Here:
        """At the predicted state of call i: the call, and the correction that it makes."""
        step = self.steps[i]
        plain = _sum((step.state_gain, step.output_gain), (z, self._prediction(z, step.tau)))
        state = z + _sum(step.correction, (plain, *stored)) + _entry(step.correction_offset, z)
        return _Here(state, plain, stored)

    def predicted(self, i: int, here: _Here, shares: Sequence[Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The next state, and what is stored by then, if call i stores these shares of the last values."""
        step, stored = self.steps[i], (_sum(shares, (here.plain, *here.stored)), *here.stored)
        return _sum((step.carry, *step.weights), (here.state, *stored)) + _entry(step.offset, here.state), stored

    def loss(self, i: int, here: _Here, shares: Sequence[Any]) -> Tensor:
        """How far the next state is from the exact one."""
        last = i + 1 == len(self.steps)
        state, stored = self.predicted(i, here, shares)
        if not last and self.steps[i + 1].correction:
            state = self.arrived(i + 1, state, stored).state
        target = self.paths.target if last else self.paths.at(float(self.times[i + 1]))
        return (state - target).double().square().mean()

    def _prediction(self, z: Tensor, t: float) -> Tensor:
        if not z.requires_grad:
            return self.denoiser(z, t, **self.paths.cond)
        self.denoiser.evaluations += 3 * len(z)  # a backward pass costs about two
        return self.denoiser.denoiser(z, t, **self.paths.cond)


def _shares(polynomials: Floats, ratio: Any) -> list[Any]:
    """The weights of the stored values at a ratio, which may be a tensor."""
    return [sum(c * (ratio - 1.0) ** power for power, c in enumerate(row)) for row in polynomials.tolist()]


def _sum(weights: Sequence[Any], values: Sequence[Tensor]) -> Tensor:
    """Weighted values; those beyond the weights count nothing."""
    terms = (_entry(weight, value) * value for weight, value in zip(weights, values, strict=False))
    return sum(terms, start=torch.zeros_like(values[0]))


def _entry(entry: Entry | Tensor, like: Tensor) -> float | Tensor:
    return torch.from_numpy(entry.copy()).to(like) if isinstance(entry, np.ndarray) else entry


def _brent(loss: Callable[[Any], Tensor]) -> float:
    """The best ratio between the bounds, or 1 if that is no better."""
    try:
        from scipy.optimize import minimize_scalar
    except ImportError as error:
        raise MissingExtraError("SciPy", "tune", "Searching ratios by Brent's method") from error
    options = {"maxiter": MOST_TRIALS, "xatol": PRECISE}
    found: Any = minimize_scalar(lambda ratio: float(loss(ratio)), bounds=BOUNDS, method="bounded", options=options)
    return float(found.x) if found.fun < float(loss(1.0)) else 1.0


@torch.enable_grad()
def _adamw(loss: Callable[[Any], Tensor]) -> float:
    """The best ratio on the way of AdamW from 1."""
    ratio, best = torch.ones((), dtype=torch.float64, requires_grad=True), (float("inf"), 1.0)
    optimiser = torch.optim.AdamW([ratio], lr=RATE)
    for _ in range(STEPS):
        value = loss(ratio)
        if ratio.item() >= BOUNDS[0]:
            best = min(best, (value.item(), ratio.item()))
        (ratio.grad,) = torch.autograd.grad(value, ratio)  # not backward(), which would leave gradients in the network
        optimiser.step()
    return best[1]
