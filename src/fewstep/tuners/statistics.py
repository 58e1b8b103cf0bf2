r"""DPM-Solver-v3's empirical statistics of a model, computed from exact paths.

Source: "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics" (arXiv 2310.13268, section 3).
With $y = x/\alpha$, the data prediction D, $r = y - D = \sigma\varepsilon/\alpha$ and $f = r - l y$, for every element, over
samples of $x_\lambda$:

$$ l = 1 - \alpha\, \mathbb{E}\Big[\frac{\partial D_i}{\partial x_i}\Big], \qquad f' = \frac{df}{d\lambda}, \qquad
   s = \frac{\operatorname{Cov}(f, f')}{\operatorname{Var} f}, \qquad b = \mathbb{E} f' - s\, \mathbb{E} f . $$

The diagonal of the derivative is the mean of $v \cdot (\partial D / \partial x)\, v$ over random signs v (Hutchinson's estimate). A sample
keeps its signs at all nodes, so that the estimate of l is as smooth in lambda as l is.

The samples move along the exact trajectories, so nothing has to be differentiated once more: $\mathbb{E} f'$ is the slope of
$\mathbb{E} f$ over the nodes, and s half that of $\log \operatorname{Var} f$. The paper takes a derivative of the
network along the ODE for them, and its samples from a solver of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.errors import FewstepError, UnknownNameError
from fewstep.grids import FINITE_LAM
from fewstep.identity import identity
from fewstep.numerics import lagrange_polynomials
from fewstep.schedules import NoiseSchedule
from fewstep.solvers import DPMSolverV3
from fewstep.statistics import ModelStatistics
from fewstep.tuners.paths import Paths, take_rows, trace_paths
from fewstep.tuners.task import GRIDS, Candidate, Counted, Task
from fewstep.version import __version__

if TYPE_CHECKING:
    from fewstep.tuners.effort import Effort

__all__ = ["model_statistics", "statistics_candidates"]

Floats = NDArray[np.float64]
Derivative = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, float], tuple[Tensor, Tensor]]
POOLS, DERIVATIVES = ("none", "channel", "all"), ("auto", "forward", "differences")
RELATIVE_STEP = {torch.float64: 1e-4, torch.float32: 3e-2, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Steps of finite differences in the state, in sigmas, by the precision of the network."""
ROUNDING = 32
"""Where f varies by less than so many roundings of the network's outputs make it, it does not vary, and s is 0."""
DISAGREEMENT = 0.5
"""A forward derivative that is further than this from finite differences, relative to them, is not used: the network cut it off."""
FINER = 64
"""Whole times are looked for on a grid so many times as fine as the nodes."""
STENCIL = 5
"""Slopes are those of the polynomial through so many nodes."""
TRIED = 8
"""Samples on which forward derivatives are tried."""
MOST_SAMPLES, NODES, FEW_NODES = 256, 120, 60
"""What `fewstep.tune` spends on statistics."""


def model_statistics(
    denoiser: Callable[..., Tensor],
    *,
    noise: Tensor | None = None,
    paths: Paths | None = None,
    cond: Mapping[str, Any] | None = None,
    nodes: int = 120,
    pool: str = "none",
    jvp: str = "auto",
    probes: int = 1,
    seed: int = 0,
    reference_calls: int = 64,
    block: int = 256,
) -> ModelStatistics:
    """Compute l, s and b of a model.

    A block of samples is worked off after the other, and only sums are kept: memory does not grow with the number of samples.

    Args:
        denoiser: ``D(x, t, **cond)`` with a schedule; guided or not. The statistics serve this model under this guidance only.
        noise: ``"batch *shape"``, starting noise at the scale of the schedule's start; exact paths are computed from it.
        paths: exact paths that there are already, instead of noise. They count by their weights, if they have any.
        cond: conditions of the noise, one entry a sample.
        nodes: number of intervals in lambda, equally long. Where the network rounds its times, nodes are moved to whole ones, so that there
            may be fewer.
        pool: ``"none"``: a number an element; ``"channel"``: one for every entry of a sample's first axis; ``"all"``: one for all.
        jvp: how the derivative along a probe is made: ``"forward"`` (automatic differentiation), ``"differences"`` (central ones, two
            calls more), or ``"auto"``: forward if every operator of the network can do that.
        probes: vectors of random signs a sample and node.
        seed: of the probes.
        reference_calls: network calls of an exact path.
        block: the most samples of a network call.

    Returns:
        `ModelStatistics` from the schedule's start to its end, or within `fewstep.grids.FINITE_LAM` where lambda is infinite there.

    Raises:
        UnknownNameError: for a pool or jvp that does not exist.
        ValueError: for both or none of noise and paths, fewer than 4 nodes or no probe.
        FewstepError: if the denoiser has no schedule, or the network fails.
        RuntimeError: from torch, for ``jvp="forward"`` where an operator lacks it.

    Note: a node takes `probes` forward derivatives a sample, each of about two evaluations, or ``1 + 2 probes`` evaluations with
        differences; a path, `reference_calls`.

    Example:
        >>> import fewstep as fs
        >>> exact = fs.exact.Gaussian(fs.schedules.VPLinear(), [1.0, -0.5], 0.25)
        >>> stats = model_statistics(exact, noise=fs.draw_noise((2,), range(16), dtype=torch.float64))
        >>> bool(np.abs(stats.l - ModelStatistics.gaussian(exact.schedule, [1.0, -0.5], 0.25, nodes=120).l).max() < 1e-12)
        True
    """
    _check_options(noise, paths, nodes, pool, jvp, probes)
    if not isinstance(getattr(denoiser, "schedule", None), NoiseSchedule):
        raise FewstepError("model_statistics needs a denoiser with a noise schedule: wrap the network in fewstep.Denoiser.")
    counted = denoiser if isinstance(denoiser, Counted) else Counted(denoiser, block)
    parts = _parts(counted, noise, paths, cond, reference_calls)
    moments = _gathered(counted, parts, nodes=nodes, pool=pool, jvp=jvp, probes=probes, seed=seed)
    calls = None if paths is not None else reference_calls
    return moments.statistics({"probes": probes, "seed": seed, "reference_calls": calls}, pool)


def _check_options(noise: Tensor | None, paths: Paths | None, nodes: int, pool: str, jvp: str, probes: int) -> None:
    if pool not in POOLS:
        raise UnknownNameError("pool", pool, POOLS)
    if jvp not in DERIVATIVES:
        raise UnknownNameError("jvp", jvp, DERIVATIVES)
    if (noise is None) == (paths is None):
        raise ValueError("statistics are computed from noise= or from paths=: give one of them.")
    if noise is not None and not len(noise):
        raise ValueError("statistics need at least one noise.")
    if nodes < STENCIL - 1 or probes < 1:
        raise ValueError(f"statistics need at least {STENCIL - 1} nodes and 1 probe, got {nodes} and {probes}.")


def _parts(
    denoiser: Counted, noise: Tensor | None, paths: Paths | None, cond: Mapping[str, Any] | None, calls: int
) -> Iterator[Paths]:
    """Exact paths, a block at a time."""
    count = paths.count if paths is not None else len(noise) if noise is not None else 0
    for begin in range(0, count, denoiser.block):
        rows = slice(begin, begin + denoiser.block)
        if paths is not None:
            yield paths.take(rows)
        elif noise is not None:
            yield trace_paths(denoiser, noise[rows], denoiser.schedule, calls=calls, cond=take_rows(cond or {}, rows))


def _gathered(
    denoiser: Counted, parts: Iterable[Paths], *, nodes: int, pool: str, jvp: str = "auto", probes: int = 1, seed: int = 0
) -> _Moments:
    """The sums over all paths, with signs of a seed."""
    moments, random = _Moments(denoiser, _node_times(denoiser, nodes), pool, jvp), np.random.default_rng([seed, 0x76337374])
    for part in parts:
        signs = random.choice([-1.0, 1.0], (probes, *part.noise.shape))
        moments.add(part, torch.from_numpy(signs).to(part.noise))
    return moments


def _node_times(denoiser: Counted, nodes: int) -> Floats:
    """The times of the nodes, the noisiest first: equally far apart in lambda, and whole ones of the network where it rounds."""
    schedule = denoiser.schedule
    ends = schedule.lam(np.array([schedule.t_start, schedule.t_end]))
    low, high = np.where(np.isinf(ends), FINITE_LAM, ends)
    found = schedule.t_of_lam(np.linspace(low, high, nodes + 1))
    if not denoiser.rounds_times:
        return found
    fine = schedule.t_of_lam(np.linspace(high, low, FINER * nodes))
    whole = np.unique(np.rint(denoiser.network_time(found)))
    return np.concatenate([found[:1], np.interp(whole, denoiser.network_time(fine), fine)[-2:0:-1], found[-1:]])


# ---- derivatives of the data prediction ----------------------------------------------------------------------------------------------


def _forward(predict: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """The prediction and its derivative along v, by forward-mode automatic differentiation."""
    with warnings.catch_warnings():  # of torch's own code, which it compiles at the first use
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
        prediction, derivative = torch.func.jvp(predict, (x,), (v,))[:2]
    return prediction, derivative


def _differences(predict: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """The same by central differences."""
    return predict(x), (predict(x + step * v) - predict(x - step * v)) / (2.0 * step)


NAMED: dict[str, Derivative] = {"forward": _forward, "differences": _differences}


def _working_derivative(denoiser: Counted, part: Paths, signs: Tensor) -> str:
    """The forward derivative, unless an operator of the network lacks it, or it is cut off on the way; tried on some samples."""
    some, t = part.take(slice(TRIED)), float(part.times[len(part.times) // 2])
    predict, given = _predict(denoiser, some, t), (some.at(t), signs[: some.count], _step(denoiser, some, t))
    expected = _differences(predict, *given)[1]
    try:
        found = _forward(predict, *given)[1]
    except RuntimeError:
        return "differences"
    return "forward" if bool((found - expected).norm() <= DISAGREEMENT * expected.norm()) else "differences"


def _states(part: Paths, t: float) -> Tensor:
    """On the paths; a step of first order beyond their last node, where sigma goes to 0."""
    schedule, last = part.schedule, float(part.times[-1])
    if schedule.lam(t) <= schedule.lam(last):
        return part.at(t)
    carry = float(schedule.sigma(t) / schedule.sigma(last))
    return carry * part.states[-1] + float(schedule.alpha(t) - schedule.alpha(last) * carry) * part.predictions[-1]


def _predict(denoiser: Counted, part: Paths, t: float) -> Callable[[Tensor], Tensor]:
    return lambda x: denoiser(x, t, **part.cond)


def _step(denoiser: Counted, part: Paths, t: float) -> float:
    """Of finite differences."""
    return _relative_step(denoiser.precision or part.states.dtype) * float(denoiser.schedule.sigma(t))


def _relative_step(precision: torch.dtype) -> float:
    return RELATIVE_STEP.get(precision, RELATIVE_STEP[torch.float32])


# ---- sums ----------------------------------------------------------------------------------------------------------------------------


class _Moments:
    """Weighted sums over samples, in float64, at every node.

    f hardly varies where y is large, so its variance would drown in the rounding of the sums of yy, yr and rr. Instead those of yy, qy and
    qq are kept, with q = r - p y - c, where p is the l of the first samples, and c the mean of their f.
    """

    def __init__(self, denoiser: Counted, times: Floats, pool: str, jvp: str):
        self.denoiser, self.times, self.pool, self.jvp = denoiser, times, pool, jvp
        self.alpha, self.lam = denoiser.schedule.alpha(times), denoiser.schedule.lam(times)
        self.pilots: list[tuple[Floats, Floats]] = []
        self.sums: list[Any] = [0.0] * len(times)
        self.total, self.samples, self.precision = 0.0, 0, torch.float64

    def add(self, part: Paths, signs: Tensor) -> None:
        """The samples of some paths, at all nodes, with signs ``"probes batch *shape"``."""
        if self.jvp == "auto":
            self.jvp = _working_derivative(self.denoiser, part, signs[0])
        self.precision = self.denoiser.precision or part.noise.dtype
        weights = torch.from_numpy(part.shares).double().to(part.noise.device)
        for k, t in enumerate(self.times.tolist()):
            slope, y, r = self._values(part, signs, t, float(self.alpha[k]))
            if len(self.pilots) == k:
                l = 1.0 - float(self.alpha[k]) * _pooled(slope.mean(0), self.pool)  # noqa: E741 - the paper's name
                self.pilots.append((l, _pooled((r - torch.from_numpy(l).to(y) * y).mean(0), self.pool)))
            p, c = (torch.from_numpy(value).to(y) for value in self.pilots[k])
            q = r - p * y - c
            sums = [torch.tensordot(weights, term, 1) for term in (slope, y, q, y * y, q * y, q * q)]
            self.sums[k] = self.sums[k] + np.array([_pooled(value, self.pool) for value in sums])
        self.total += float(weights.sum())
        self.samples += part.count

    def _values(self, part: Paths, signs: Tensor, t: float, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
        """``"batch *shape"``: v (dD/dx) v, y and r."""
        x, predict, step = _states(part, t), _predict(self.denoiser, part, t), _step(self.denoiser, part, t)
        d, slope = x, torch.zeros_like(x)
        for v in signs:
            d, along = NAMED[self.jvp](predict, x, v, step)
            slope += v * along / len(signs)
        self.denoiser.evaluations += len(signs) * len(x) * (self.jvp == "forward")  # a forward derivative costs about two
        y = x.double() / alpha
        return slope.double(), y, y - d

    def statistics(self, made_with: dict[str, Any], pool: str) -> ModelStatistics:
        """l, s and b, with a pool as wide as that of the sums, or wider."""
        slope, y, q, yy, qy, qq = np.moveaxis(np.array(self.sums) / self.total, 1, 0)
        p, c = (np.array(pilots) for pilots in zip(*self.pilots, strict=True))
        lam = self.lam.reshape(-1, *[1] * (slope.ndim - 1))
        l = 1.0 - self.alpha.reshape(lam.shape) * slope  # noqa: E741 - the paper's name
        l, middle = (_wider(value, pool) for value in (l, c))  # noqa: E741
        a, e = p - l, c - middle  # f - middle = q + a y + e
        f = _wider(q + a * y + e, pool)
        spread = _wider(qq + a * a * yy + e * e + 2.0 * (a * qy + e * q + a * e * y), pool) - f * f
        tiny = _wider(yy * self._noise(yy, lam), pool)
        s = np.where(spread > tiny, 0.5 * _slopes(self.lam, np.log(np.maximum(spread, tiny))), 0.0)
        b = _slopes(self.lam, f + middle) - s * (f + middle)
        told = {"how": "empirical", "model": identity(self.denoiser), "samples": self.samples, "pool": pool, "jvp": self.jvp}
        cost = {"evaluations": self.denoiser.evaluations, "fewstep": __version__}
        l, s, b = (value.reshape(-1) if pool == "all" else value for value in (l, s, b))  # noqa: E741
        return ModelStatistics(self.denoiser.schedule, self.lam, l, s, b, {**told, **made_with, **cost})

    def _noise(self, yy: Floats, lam: Floats) -> Floats:
        """The variance of f that rounding makes, over that of y: of the outputs, and of the differences that l is made of."""
        eps = torch.finfo(self.precision).eps
        of_slopes = (self.jvp == "differences") * yy * np.exp(2.0 * lam) / _relative_step(self.precision) ** 2
        return (ROUNDING * eps) ** 2 * (1.0 + of_slopes)


def _axes(values: Floats, first: int, pool: str) -> tuple[int, ...]:
    """The axes, from one on, that share a number."""
    return tuple(range({"none": values.ndim, "channel": first + 1, "all": first}[pool], values.ndim))


def _pooled(values: Tensor, pool: str) -> Floats:
    """The mean ``"*shape"`` of what shares a number, with axes of length 1."""
    array = values.cpu().numpy()
    return np.mean(array, _axes(array, 0, pool), keepdims=True)


def _wider(values: Floats, pool: str) -> Floats:
    """The same at every node, ``"N+1 *shape"``."""
    return np.mean(values, _axes(values, 1, pool), keepdims=True)


def _slopes(lam: Floats, values: Floats) -> Floats:
    """The derivative at every node, of the polynomial through the nearest ones."""
    count = min(STENCIL, len(lam))
    found = np.empty_like(values)
    for k in range(len(lam)):
        low = min(max(k - count // 2, 0), len(lam) - count)
        near = slice(low, low + count)
        found[k] = np.tensordot(lagrange_polynomials(lam[near] - lam[k])[:, 1], values[near], 1)
    return found


# ---- plans ---------------------------------------------------------------------------------------------------------------------------


def statistics_candidates(task: Task, nfe: int, effort: Effort) -> Iterator[Candidate]:
    """Plans of DPM-Solver-v3 with statistics of the task's model, which are computed once: for every element, and one for all."""
    if "statistics" not in task.kept:
        task.report("statistics of the model")
        task.kept["statistics"] = _of_task(task, NODES if effort.trajectories >= MOST_SAMPLES else FEW_NODES)
    plans = {
        f"statistics, pool {pool}: {name}, {grid}": solver.plan(task.schedule, nfe, grid, final=task.final)
        for pool, statistics in task.kept["statistics"].items()
        for name, solver in _solvers(statistics).items()
        for grid in GRIDS
    }
    yield from task.screened(plans)


def _of_task(task: Task, nodes: int) -> dict[str, ModelStatistics]:
    """Of the paths to fit to. They are more of those that depend much on the noise, where v3 has most to gain."""
    some = task.fit.take(slice(MOST_SAMPLES))
    moments = _gathered(task.denoiser, _parts(task.denoiser, None, some, None, 0), nodes=nodes, pool="none", seed=task.seed)
    return {pool: moments.statistics({"probes": 1, "seed": task.seed}, pool) for pool in ("none", "all")}


def _solvers(statistics: ModelStatistics) -> dict[str, DPMSolverV3]:
    """The sets of options that are tried: those of the authors for few and for more calls, and some beside."""
    return {
        "v3-3": DPMSolverV3(statistics),
        "v3-3 pseudo": DPMSolverV3(statistics, pseudo=True, corrector="same", lower_order_final=False),
        "v3-3 uncorrected": DPMSolverV3(statistics, corrector="none"),
        "v3-2": DPMSolverV3(statistics, order=2),
        "v3-2 raised": DPMSolverV3(statistics, order=2, corrector="raised"),
    }
