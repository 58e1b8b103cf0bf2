r"""How far Gaussian teleportation may go for a model: by the measured deviation of its prediction from the Gaussian's.

Source: "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and its Applications" (arXiv 2412.09726). Far
from the data the model's data prediction D is nearly that of a Gaussian with the data's mean $\mu$ and covariance $U \Lambda U^T$,

$$ D_G(x, t) = \mu + U \frac{\alpha \Lambda}{\alpha^2 \Lambda + \sigma^2} U^T (x - \alpha \mu) , \qquad
   \delta(t) = \frac{\alpha}{\sigma} \Big( \mathrm{E}\, \tfrac1d \| D(x_t, t) - D_G(x_t, t) \|^2 \Big)^{1/2} , $$

so $\delta$ is the root mean square difference of the noise predictions, per element. It takes one batch of calls a time, on the states to
which the Gaussian's path leads. The skip is the farthest time up to which every $\delta$ is below a tolerance.

The authors choose the skip by the samples of each (FID); `teleport_candidates` does, too, among a few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fewstep.plan import Plan
from fewstep.sampler import sample
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver
from fewstep.solvers import GaussianPrior, Teleport
from fewstep.tuners.judge import Judge
from fewstep.tuners.paths import take_rows
from fewstep.tuners.task import GRIDS, UNTUNED, Candidate, Task, distances
from fewstep.tuners.times import finite_ends

if TYPE_CHECKING:
    from fewstep.tuners.effort import Effort

__all__ = ["Skip", "teleport_candidates", "teleport_skip"]

Floats = NDArray[np.float64]
TOLERANCE = 1e-3
"""With it the end of the exact path to digits moves by less than a thousandth."""
TOLERANCES = (1e-3, 3e-3, 1e-2, 3e-2)
"""The skips that `fewstep.tune` tries are those of these."""
LEVELS = 33
"""Times that are looked at, uniform in lambda."""
PROBES = 64
SAMPLES, CALLS = 1024, 10
"""Of the model, for its Gaussian; and network calls of each."""
SOLVERS = ("auto", "dpmpp_2m", "unipc")


@dataclass(frozen=True)
class Skip:
    """How far to go at once.

    Attributes:
        to: the time; None for no skip at all.
        times: ``"K"``: the times that were looked at, from noise to data.
        deviations: ``"K"``: root mean square difference, per element, of the model's noise prediction from the Gaussian's.
    """

    to: float | None
    times: Floats
    deviations: Floats

    def within(self, tolerance: float) -> float | None:
        """The farthest time up to which no deviation is above a tolerance; None if it is at the first."""
        over = np.flatnonzero(~(self.deviations <= tolerance))
        last = (len(self.times) if not len(over) else int(over[0])) - 1
        return float(self.times[last]) if last >= 0 else None


@torch.no_grad()
def teleport_skip(
    denoiser: Callable[..., Tensor],
    prior: GaussianPrior,
    noise: Tensor,
    *,
    cond: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
    times: ArrayLike | None = None,
) -> Skip:
    """The farthest skip with a deviation below a tolerance.

    Args:
        denoiser: ``D(x, t, **cond)`` with a schedule.
        prior: mean and covariance of what it was trained on, ``GaussianPrior.fit(data)``.
        noise: ``"batch *shape"``, starting noise; each time looked at takes a call on it.
        cond: conditions.
        tolerance: of the difference of the noise predictions, which are about 1, in root mean square per element.
        times: ``"K"``, what may be skipped to, decreasing in noise; left out, 32 times between start and end, uniform in lambda.

    Returns:
        `Skip`; ``Teleport(solver, prior, to=skip.to)`` uses it, if ``to`` is not None.

    Raises:
        ValueError: for a tolerance that is not positive, times that are not between start and end, or noise of another shape than the
            Gaussian's.

    Example:
        >>> import fewstep as fs
        >>> exact = fs.exact.Gaussian(fs.schedules.EDM(), [1.0, 0.0], [[0.5, 0.1], [0.1, 0.2]])
        >>> noise = 80 * fs.draw_noise((2,), range(8), dtype=torch.float64)
        >>> values, axes = np.linalg.eigh([[0.5, 0.1], [0.1, 0.2]])
        >>> skip = teleport_skip(exact, GaussianPrior(np.array([1.0, 0.0]), axes.T, values), noise)
        >>> bool(skip.to == skip.times[-1]), bool(skip.deviations.max() < 1e-10)  # Gaussian data: all the way
        (True, True)
    """
    schedule: NoiseSchedule = denoiser.schedule  # type: ignore[attr-defined]
    if not tolerance > 0.0:
        raise ValueError(f"the tolerance must be positive, got {tolerance:g}.")
    if tuple(noise.shape[1:]) != prior.mean.shape:
        raise ValueError(f"the noise has samples of shape {tuple(noise.shape[1:])}, the Gaussian of {prior.mean.shape}.")
    levels = _levels(schedule) if times is None else np.asarray(times, np.float64)
    lams = schedule.lam(levels)
    if levels.ndim != 1 or not len(levels) or lams[0] <= schedule.lam(schedule.t_start) or not (np.diff(lams) > 0.0).all():
        raise ValueError("times to skip to must decrease in noise, after the schedule's start.")
    deviations = np.array([_deviation(denoiser, prior, noise, dict(cond or {}), t) for t in levels.tolist()])
    found = Skip(None, levels, deviations)
    return Skip(found.within(tolerance), levels, deviations)


def teleport_candidates(task: Task, nfe: int, effort: Effort) -> Iterator[Candidate]:
    """For each of a few skips that the Gaussian of the model's samples allows, the best of a few solvers on all grids, by the paths to
    fit to. Those without a skip are among the untuned ones.
    """
    if "teleport" not in task.kept:
        task.kept["teleport"] = _skips(task)
    prior, skips = task.kept["teleport"]
    for to in skips:
        judge = Judge(task, None, len(SOLVERS) * len(GRIDS))
        plans = {(name, grid): _plan(task, UNTUNED[name], prior, to, nfe, grid) for name in SOLVERS for grid in GRIDS}
        for key, plan in plans.items():
            judge(key, lambda plan=plan: plan)
        name, grid = judge.best(1)[0]
        yield task.judge(f"teleport: to {to:.4g}, {name}, {grid}", plans[name, grid])


def _plan(task: Task, solver: Solver, prior: GaussianPrior, to: float, nfe: int, grid: str) -> Plan:
    return Teleport(solver, prior, to).plan(task.schedule, nfe, grid, final=task.final)


def _skips(task: Task) -> tuple[GaussianPrior, list[float]]:
    """The Gaussian of the model's samples, and the times that the tolerances allow. The paths to fit to are too few for it, and no fair
    sample: others are drawn in few calls, which change mean and covariance little.
    """
    random, given = np.random.default_rng([task.seed, 0x67617573]), task.fit.noise
    scale = float(task.schedule.sigma(task.schedule.t_start))
    noise = (scale * torch.from_numpy(random.standard_normal((SAMPLES, *given.shape[1:])))).to(given)
    cond = take_rows(task.fit.cond, torch.from_numpy(random.integers(task.fit.count, size=SAMPLES)))
    plan = UNTUNED["auto"].plan(task.schedule, CALLS, "auto", final=task.final)
    prior = GaussianPrior.fit(sample(task.denoiser, noise, plan, cond=cond))
    found = teleport_skip(task.denoiser, prior, noise[:PROBES], cond=take_rows(cond, slice(PROBES)))
    told = (found.within(tolerance) for tolerance in TOLERANCES)
    return prior, list(dict.fromkeys(to for to in told if to is not None and to != found.times[-1]))


def _levels(schedule: NoiseSchedule) -> Floats:
    """Times uniform in lambda, without the start."""
    lams = np.linspace(*finite_ends(schedule, np.array([schedule.t_start, schedule.t_end])), LEVELS)
    return np.asarray(schedule.t_of_lam(lams[1:]), np.float64)


def _deviation(denoiser: Callable[..., Tensor], prior: GaussianPrior, noise: Tensor, cond: dict[str, Any], t: float) -> float:
    schedule: NoiseSchedule = denoiser.schedule  # type: ignore[attr-defined]
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    x = _moved(prior, noise, schedule, t)
    theirs = denoiser(x, t, **cond)
    mine = _prediction(prior, x, alpha, sigma)
    return alpha / sigma * float(np.sqrt(np.mean(distances(theirs, mine) ** 2)))


def _moved(prior: GaussianPrior, noise: Tensor, schedule: NoiseSchedule, t: float) -> Tensor:
    """The states at a time on the Gaussian's path."""
    start = prior.transform(schedule, schedule.t_start, t)
    assert start.gains is not None
    return _affine(prior, noise, start.scale, start.gains, start.shift)


def _prediction(prior: GaussianPrior, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The data prediction of the Gaussian, ``"batch *shape"``."""

    def gain(variance: Any) -> Any:
        return alpha * variance / (alpha**2 * variance + sigma**2)

    common = float(gain(prior.rest))
    gains = gain(prior.variances) - common
    return _mean(prior, x) + _affine(prior, x - alpha * _mean(prior, x), common, gains, 0.0)


def _mean(prior: GaussianPrior, x: Tensor) -> Tensor:
    """The mean, like x."""
    return torch.from_numpy(prior.mean.copy()).to(x)


def _affine(prior: GaussianPrior, x: Tensor, scale: Any, gains: Floats, shift: Any) -> Tensor:
    """The states scaled, more along the axes, and shifted."""
    axes = torch.from_numpy(prior.axes.reshape(len(gains), -1).copy()).to(x)
    along = (x.flatten(1) @ axes.T) * torch.from_numpy(np.array(gains)).to(x) @ axes
    moved = x * scale if isinstance(scale, float) else x * torch.from_numpy(np.array(scale)).to(x)
    return moved + along.reshape(x.shape) + (torch.from_numpy(np.array(shift, np.float64)).to(x))
