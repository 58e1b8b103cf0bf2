r"""How likely a model finds data: the density along the probability-flow ODE, and bits per dimension of discrete data.

The ODE carries states of the last noise level t (`schedule.t_end`) to noise at `schedule.t_start`, and densities with them. With the
normalised state $u = x/s$, $s = \sqrt{\alpha^2 + \sigma^2}$, and the angle $\phi = \operatorname{atan2}(\sigma, \alpha)$ of
`fewstep.integrate`,

$$ \frac{du}{d\phi} = \frac{\cos\phi\,u - D(x, t)}{\sin\phi} , \qquad
   \log p_t(x) = \log p_T(x_T) + d \log\frac{s_T}{s_t} + \int \frac{\cos\phi\,d - s \operatorname{tr}\nabla D}{\sin\phi}\,d\phi $$

(arXiv 2011.13456, eq. 39, in these variables). $p_T = N(0, \sigma_T^2 I)$, from which `fewstep.sample` starts, unless another is given.
Both are integrated together, in $\sqrt\phi$ and float64, by the pair 5(4) of Dormand and Prince, *every sample with steps of its own*: a
figure does not depend on which other samples are there.

What the number means:

- `log_likelihood` is the density of the model's own samples at the noise level t, in nats: of what `fewstep.reference` makes of noise
  from $p_T$. It is exact, to the tolerance, with the exact trace; with Hutchinson's it is an unbiased estimate. It is *not* the density of
  clean data: as t goes to 0, that of data on a lower-dimensional set, discrete data among them, grows without bound.
- `bits_per_dim` is about discrete data, whose probability is a number of its own: the integral of the density over a bin. What is
  computed is an upper bound of its negative logarithm to base 2, by one of the dequantizations (`fewstep.dequantization`). It depends on t,
  and is a bound at every t; models compare by bounds for the same levels, each at its best.

The trace: `exact`, d derivatives a call, for up to some hundred dimensions; `hutchinson`, the mean of $e^T \nabla D\,e$ over random signs
e that stay the same along a path (FFJORD, arXiv 1810.01367). Derivatives are taken in `forward` mode, which keeps no graph, or in
`reverse` mode, for networks with an operator that has no other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from fewstep.dequantization import Dequantization, Levels, draw_uniform, make_dequantization
from fewstep.errors import NetworkError, UnknownNameError
from fewstep.exact import widest_dtype
from fewstep.integrate import ERROR, STAGES, ToleranceError
from fewstep.noise import check_seeds, normals
from fewstep.schedules import NoiseSchedule

__all__ = ["BOUNDS", "DIFFERENTIATIONS", "TRACES", "BitsPerDim", "LogLikelihood", "bits_per_dim", "log_likelihood"]

Floats = NDArray[np.float64]
TRACES = ("hutchinson", "exact")
DIFFERENTIATIONS = ("forward", "reverse")
BOUNDS = ("average", "importance")
PROBE = 0x9B0BE
"""Key of the random signs, apart from those of starting noise."""
SHORTEST = 1e-12
"""Shortest step, as a share of the way."""
FORWARD_FAILED = "the network has an operator without a forward derivative"


class LogLikelihood(NamedTuple):
    """Densities of states, and how they were reached.

    Attributes:
        log_density: float64 ``"batch"``, natural logarithm.
        stderr: float64 ``"batch"``, standard error from the probes: 0 for the exact trace, NaN for one probe.
        noise: float64 ``"batch *shape"``, the states at t_start.
        calls: int64 ``"batch"``, evaluations of the ODE that every sample took.
    """

    log_density: Tensor
    stderr: Tensor
    noise: Tensor
    calls: NDArray[np.int64]


class BitsPerDim(NamedTuple):
    """Bits per dimension of discrete data.

    Attributes:
        value: mean over the samples.
        stderr: its standard error, from the spread of the samples.
        each: float64 ``"batch"``.
        calls: int64 ``"batch"``, evaluations of the ODE, all draws together.
        is_bound: whether the expected value bounds the exact one from above. It does not where Hutchinson's noise enters through the
            logarithm of a mean of weights (``bound="importance"``), which makes the figure too good.
    """

    value: float
    stderr: float
    each: Tensor
    calls: NDArray[np.int64]
    is_bound: bool

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.stderr:.4f} bits/dim"


def log_likelihood(
    denoiser: Any,
    x: Tensor,
    *,
    trace: str = "hutchinson",
    probes: int = 1,
    differentiation: str = "forward",
    prior: Callable[[Tensor], Tensor] | None = None,
    tol: float = 1e-5,
    t: float | None = None,
    t_start: float | None = None,
    cond: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    chunk: int = 1024,
    max_calls: int = 5000,
) -> LogLikelihood:
    """Natural logarithm of the density that a model gives to states of a noise level.

    Args:
        denoiser: ``D(x, t, **cond)`` with a ``schedule``; it is called with one time a sample, float64 ``"batch"`` on the host.
        x: ``"batch *shape"``, states at the time t. Nothing is added to them.
        trace: ``"hutchinson"`` or ``"exact"``.
        probes: random signs a sample, for Hutchinson's estimate.
        differentiation: ``"forward"`` or ``"reverse"``.
        prior: log density ``"batch"`` of states ``"batch *shape"`` at t_start; N(0, sigma^2) when left out.
        tol: largest estimated error of a step: of the normalised state relative to max(1, its root mean square), and of the log density
            per dimension. A network in float32 supports about 1e-6.
        t: the time of x, `schedule.t_end` when left out; sigma must not be 0 there.
        t_start: the other end, `schedule.t_start` when left out; alpha may be 0.
        cond: conditions; tensors with one entry a sample are split with the batch.
        seeds: one whole number a sample, of its probes; 0, 1, ... when left out.
        chunk: rows of the largest batch that the network sees.
        max_calls: evaluations of the ODE that a sample may take.

    Returns:
        `LogLikelihood`.

    Raises:
        ToleranceError: if the calls are spent, or the steps shrink to nothing.
        NetworkError: for values that are not finite, or an operator without a forward derivative.
        UnknownNameError: for another trace or differentiation.
        ValueError: for an end without noise, a tolerance or a number outside its range; for x of another shape than an exact denoiser's.

    Example:
        >>> from fewstep.exact import GaussianMixture
        >>> from fewstep.schedules import VPLinear
        >>> exact = GaussianMixture(VPLinear(), [[-1.0, 0.0], [1.0, 0.0]], 0.25)
        >>> x = torch.tensor([[0.3, 0.1]], dtype=torch.float64)
        >>> found = log_likelihood(exact, x, trace="exact", prior=lambda z: exact.log_density(z, 1.0))
        >>> bool((found.log_density - exact.log_density(x, 1e-3)).abs() < 1e-4)
        True
    """
    problem = _Problem.checked(denoiser, x, trace, differentiation, probes, (t, t_start), tol, chunk, max_calls)
    names = check_seeds(range(len(x)) if seeds is None else seeds, len(x))
    return _densities(problem, x, _directions(problem, x, names, 0), dict(cond or {}), prior)


def bits_per_dim(
    denoiser: Any,
    x: Tensor,
    levels: Levels,
    *,
    dequantization: str | Dequantization = "truncated_normal",
    draws: int = 1,
    bound: str = "average",
    trace: str = "hutchinson",
    probes: int = 1,
    differentiation: str = "forward",
    prior: Callable[[Tensor], Tensor] | None = None,
    tol: float = 1e-5,
    t: float | None = None,
    t_start: float | None = None,
    cond: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    batch_size: int = 256,
    chunk: int = 1024,
    max_calls: int = 5000,
    after: Callable[[int], object] | None = None,
) -> BitsPerDim:
    """An upper bound of the bits per dimension that discrete data cost under a model.

    Args:
        denoiser: as for `log_likelihood`.
        x: ``"batch *shape"``, clean data.
        levels: the values that they take.
        dequantization: a name of `fewstep.dequantization.DEQUANTIZATIONS`, or one.
        draws: states drawn for every sample.
        bound: ``"average"`` of the draws' bounds; or ``"importance"``, the logarithm of the mean of their weights, which is tighter the
            more draws there are. Use that with the exact trace: see `BitsPerDim`.
        trace, probes, differentiation, prior, tol, t, t_start, cond, chunk, max_calls: as for `log_likelihood`.
        seeds: one whole number a sample, of its draws and probes; 0, 1, ... when left out. A figure depends on them and not on the batches.
        batch_size: samples that are worked on together.
        after: called with a number of samples that are finished.

    Returns:
        `BitsPerDim`.

    Raises:
        ValueError: if x does not lie on the levels, or an option is outside its range.
        ToleranceError, NetworkError, UnknownNameError: as `log_likelihood`.

    Example:
        >>> from fewstep.exact import FiniteData
        >>> from fewstep.schedules import VPLinear
        >>> coin = FiniteData(VPLinear(), [[-1.0], [1.0]])  # one bit
        >>> x = torch.tensor([[-1.0], [1.0]])
        >>> str(bits_per_dim(coin, x, Levels(2), trace="exact", draws=4, t=0.05))
        '1.0000 ± 0.0000 bits/dim'
    """
    problem = _Problem.checked(denoiser, x, trace, differentiation, probes, (t, t_start), tol, chunk, max_calls)
    if bound not in BOUNDS:
        raise UnknownNameError("bound", bound, BOUNDS)
    if draws < 1 or batch_size < 1:
        raise ValueError(f"draws and batch_size must be at least 1, got {draws} and {batch_size}.")
    chosen, index = make_dequantization(dequantization), levels.index(x)
    names = check_seeds(range(len(x)) if seeds is None else seeds, len(x))
    alpha, sigma = float(problem.schedule.alpha(problem.begin)), float(problem.schedule.sigma(problem.begin))
    each, calls = torch.empty(len(x), dtype=torch.float64), np.zeros(len(x), np.int64)
    for i in range(0, len(x), batch_size):
        part = slice(i, min(i + batch_size, len(x)))
        given, logs = _some(dict(cond or {}), np.arange(len(x))[part], len(x)), []
        for draw in range(draws):
            u = draw_uniform(x.shape[1:], names[part], draw).to(x.device)
            z, price = chosen.draw(levels, index[part], u.to(widest_dtype(x.device)), alpha, sigma)
            found = _densities(problem, z, _directions(problem, z, names[part], draw), given, prior)
            logs.append(found.log_density + price.cpu().double())
            calls[part] += found.calls
        stacked = torch.stack(logs)
        log_p = stacked.mean(0) if bound == "average" else stacked.logsumexp(0) - math.log(draws)
        each[part] = -log_p / (problem.dimensions * math.log(2.0))
        if after is not None:
            after(part.stop - part.start)
    stderr = float(each.std() / math.sqrt(len(each))) if len(each) > 1 else math.nan
    return BitsPerDim(float(each.mean()), stderr, each, calls, bound == "average" or draws == 1 or trace == "exact")


# ---- the ODE -------------------------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """What to solve, and how."""

    denoiser: Any
    schedule: NoiseSchedule
    trace: str
    forward: bool
    probes: int
    begin: float
    end: float
    dimensions: int
    tol: float
    chunk: int
    max_calls: int

    @classmethod
    def checked(
        cls,
        denoiser: Any,
        x: Tensor,
        trace: str,
        differentiation: str,
        probes: int,
        times: tuple[float | None, float | None],
        tol: float,
        chunk: int,
        max_calls: int,
    ) -> _Problem:
        schedule = getattr(denoiser, "schedule", None)
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"the denoiser must have a schedule, as fewstep.Denoiser has; {type(denoiser).__name__} has none.")
        if trace not in TRACES:
            raise UnknownNameError("trace", trace, TRACES)
        if differentiation not in DIFFERENTIATIONS:
            raise UnknownNameError("differentiation", differentiation, DIFFERENTIATIONS)
        if probes < 1 or chunk < 1 or max_calls < 7:
            raise ValueError(
                f"probes and chunk must be at least 1 and max_calls at least 7, got {probes}, {chunk} and {max_calls}."
            )
        if not x.is_floating_point() or x.ndim < 2 or not x.numel() or not bool(torch.isfinite(x).all()):
            raise ValueError(f'x must be a finite floating-point tensor "batch *shape", got {x.dtype} {tuple(x.shape)}.')
        wanted = getattr(denoiser, "shape", None)  # an exact denoiser's
        if wanted is not None and tuple(wanted) != tuple(x.shape[1:]):
            raise ValueError(
                f"x holds samples of shape {tuple(x.shape[1:])}, but {type(denoiser).__name__} is one of shape {tuple(wanted)}."
            )
        if not 0.0 < tol < math.inf:
            raise ValueError(f"tol must be positive and finite, got {tol:g}.")
        begin = schedule.t_end if times[0] is None else float(times[0])
        end = schedule.t_start if times[1] is None else float(times[1])
        low, high = (float(lam) for lam in schedule.lam([end, begin]))
        if not low < high < math.inf:
            raise ValueError(
                f"the likelihood is that of states between no noise and t_start, but lambda is {high:.4g} at t={begin:g} and {low:.4g} at "
                f"t_start={end:g}. Pass a t where sigma > 0."
            )
        return cls(denoiser, schedule, trace, differentiation == "forward", probes, begin, end, x[0].numel(), tol, chunk, max_calls)


def _directions(problem: _Problem, x: Tensor, seeds: Sequence[int], draw: int) -> Tensor:
    """Directions ``"directions batch d"`` along which derivatives are taken: random signs, or all axes."""
    d = problem.dimensions
    if problem.trace == "exact":
        return torch.eye(d, dtype=torch.float64, device=x.device)[:, None].expand(d, len(x), d)
    signs = [np.copysign(1.0, normals(seeds, (PROBE, draw, k), (d,))) for k in range(problem.probes)]
    return torch.from_numpy(np.stack(signs)).to(widest_dtype(x.device)).to(x.device)


def _densities(
    problem: _Problem, x: Tensor, directions: Tensor, cond: dict[str, Any], prior: Callable[[Tensor], Tensor] | None
) -> LogLikelihood:
    """The log densities of states at the begin."""
    schedule, d = problem.schedule, problem.dimensions
    levels = [(float(schedule.alpha(t)), float(schedule.sigma(t))) for t in (problem.begin, problem.end)]
    scale, end_scale = (math.hypot(*level) for level in levels)
    u = x.detach().to(widest_dtype(x.device)).reshape(len(x), d) / scale
    integrals = u.new_zeros(len(x), 1 if problem.trace == "exact" else problem.probes)
    angles = [math.sqrt(math.atan2(sigma, alpha)) for alpha, sigma in levels]
    field = _Field(problem, tuple(x.shape[1:]), directions.to(u), cond, (angles[0], angles[1]))
    state, calls = _integrate(field, torch.cat([u, integrals], 1), problem)
    noise = (end_scale * state[:, :d]).reshape(x.shape)
    start = _normal(noise, levels[1][1]) if prior is None else prior(noise).detach()
    logs = (state[:, d:] + d * math.log(end_scale / scale)).cpu().double() + start.cpu().double()[:, None]
    if problem.trace == "exact":
        spread = torch.zeros(len(x), dtype=torch.float64)
    elif problem.probes == 1:
        spread = torch.full((len(x),), math.nan, dtype=torch.float64)
    else:
        spread = logs.std(1) / math.sqrt(problem.probes)
    return LogLikelihood(logs.mean(1), spread, noise, calls)


def _normal(x: Tensor, sigma: float) -> Tensor:
    """Log density of N(0, sigma^2), ``"batch"``."""
    flat = x.flatten(1)
    return -0.5 * (flat / sigma).square().sum(1) - flat.shape[1] * math.log(sigma * math.sqrt(2.0 * math.pi))


class _Field:
    """The slopes of the normalised state and of the integrals of its divergence, in q = sqrt(phi)."""

    def __init__(
        self, problem: _Problem, shape: tuple[int, ...], directions: Tensor, cond: dict[str, Any], ends: tuple[float, float]
    ):
        self.problem, self.shape, self.directions, self.cond = problem, shape, directions, cond
        self.ends = ends

    def __call__(self, q: Floats, state: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """``"rows d+integrals"`` from the same, at a place for every row."""
        d, schedule = self.problem.dimensions, self.problem.schedule
        t = np.where(q == self.ends[0], self.problem.begin, self.problem.end)
        inside = (q != self.ends[0]) & (q != self.ends[1])
        t[inside] = schedule.t_of_lam(-np.log(np.tan(q[inside] ** 2)))
        scale = _column(np.hypot(schedule.alpha(t), schedule.sigma(t)), state)
        rate, cosine = _column(2.0 * q / np.sin(q**2), state), _column(np.cos(q**2), state)
        index = torch.from_numpy(rows).to(state.device)
        cond = _some(self.cond, rows, self.directions.shape[1])
        data, along = self._derivatives(scale * state[:, :d], t, self.directions[:, index], cond)
        traces = along.sum(0)[:, None] if self.problem.trace == "exact" else along.T
        return rate * torch.cat([cosine * state[:, :d] - data, cosine * d - scale * traces], 1)

    def _derivatives(self, x: Tensor, t: Floats, directions: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The data prediction ``"rows d"``, and e^T (dD/dx) e of every direction: ``"directions rows"``."""
        together = max(1, self.problem.chunk // len(x)) if self.problem.forward else len(directions)
        data, along = x, []
        for i in range(0, len(directions), together):
            part = directions[i : i + together]
            run = self._pushed if self.problem.forward else self._pulled
            data, found = run(x, t, part, cond)
            along.append(found)
        return data, torch.cat(along)

    def _pushed(self, x: Tensor, t: Floats, directions: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Forward mode: all directions in one batch, without a graph."""
        count, rows = len(directions), len(x)
        many = {name: _repeat(value, count, rows) for name, value in cond.items()}
        with warnings.catch_warnings():  # of torch's own code, which it compiles at the first use
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x.repeat(count, 1), directions.reshape(-1, x.shape[1]))
                try:
                    data, change = forward_ad.unpack_dual(self._predict(dual, np.tile(t, count), many))
                except NotImplementedError as error:
                    reason = str(error).splitlines()[0][:120]
                    raise NetworkError(
                        f'{FORWARD_FAILED} ({reason}). Pass differentiation="reverse" (--differentiation reverse).'
                    ) from error
        change = torch.zeros_like(data) if change is None else change  # of a prediction that does not depend on x
        along = (change.reshape(count, rows, -1) * directions).sum(-1)
        return data[:rows].detach(), along.detach()

    def _pulled(self, x: Tensor, t: Floats, directions: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Reverse mode: one graph, one derivative a direction."""
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            data = self._predict(y, t, cond)
            pulled = [torch.autograd.grad(data, y, e, retain_graph=True)[0] for e in directions]
        return data.detach(), torch.stack([(p * e).sum(-1) for p, e in zip(pulled, directions, strict=True)])

    def _predict(self, flat: Tensor, t: Floats, cond: dict[str, Any]) -> Tensor:
        if len(flat) <= self.problem.chunk:
            data = self.problem.denoiser(flat.reshape(-1, *self.shape), t, **cond)
        else:
            parts = [np.arange(i, min(i + self.problem.chunk, len(flat))) for i in range(0, len(flat), self.problem.chunk)]
            states = flat.reshape(-1, *self.shape)
            data = torch.cat([self.problem.denoiser(states[p], t[p], **_some(cond, p, len(flat))) for p in parts])
        return data.reshape(flat.shape).to(flat.dtype)


@torch.no_grad()
def _integrate(field: _Field, state: Tensor, problem: _Problem) -> tuple[Tensor, NDArray[np.int64]]:
    """From one end to the other, every row with steps of its own: the states there, and the evaluations a row."""
    count, d = len(state), problem.dimensions
    begin, end = field.ends
    q, step = np.full(count, begin), np.full(count, (end - begin) * problem.tol**0.2)
    calls, slope = np.ones(count, np.int64), field(q, state, np.arange(count))
    while (active := np.flatnonzero(q < end)).size:
        if calls[active].max() + 6 > problem.max_calls:
            raise _failure(f"the {problem.max_calls} evaluations allowed are spent", calls)
        target = np.where(q[active] + 1.000001 * step[active] >= end, end, q[active] + step[active])
        h, rows = target - q[active], torch.from_numpy(active).to(state.device)
        old, slopes, new = state[rows], [slope[rows]], state[rows]
        for weights in STAGES:
            new = _combine(old, weights, slopes, h)
            node = np.where(sum(weights) > 1.0 - 1e-12, target, q[active] + sum(weights) * h)
            slopes.append(field(node, new, active))
        calls[active] += 6
        ratio = _errors(_combine(torch.zeros_like(old), ERROR, slopes, h), old, new, d) / problem.tol
        good = ratio <= 1.0
        taken = torch.from_numpy(active[good]).to(state.device)
        kept = torch.from_numpy(np.flatnonzero(good)).to(state.device)
        state[taken], slope[taken] = new[kept], slopes[-1][kept]
        q[active[good]] = target[good]
        step[active] = h * np.where(good, _factor(ratio), np.minimum(_factor(ratio), 0.9))
        if (step[active] < SHORTEST * (end - begin)).any():
            worst = float(ratio.max())
            if not math.isfinite(worst):
                raise NetworkError("the denoiser, or its derivative, returns values that are not finite.")
            raise _failure("the steps became too small", calls)
    return state, calls


def _errors(difference: Tensor, old: Tensor, new: Tensor, d: int) -> Floats:
    """The error of every row: of the state, relative, and of the log density per dimension; infinite where it is not a number."""
    scale = torch.maximum(_rms(old[:, :d]), _rms(new[:, :d])).clamp_min(1.0)
    of_state, of_density = _rms(difference[:, :d]) / scale, difference[:, d:].abs().amax(1) / d
    errors = torch.maximum(of_state, of_density).cpu().double().numpy()
    return np.where(np.isnan(errors), math.inf, errors)


def _rms(u: Tensor) -> Tensor:
    return u.square().mean(1).sqrt()


def _factor(ratio: Floats) -> Floats:
    """By how much to change a step whose error is this multiple of the tolerance."""
    return np.clip(0.9 * np.clip(ratio, 1e-30, 1e30) ** -0.2, 0.2, 5.0)


def _combine(old: Tensor, weights: Sequence[float], slopes: list[Tensor], h: Floats) -> Tensor:
    """The sum of old and h (weights . slopes)."""
    total = sum((weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight), torch.zeros_like(old))
    return old + _column(h, old) * total


def _column(values: Floats, x: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float64)).to(x.dtype).to(x.device)[:, None]


def _some(cond: dict[str, Any], rows: NDArray[np.int64], batch: int) -> dict[str, Any]:
    """The conditions of some samples: tensors with one entry a sample are taken apart, others stay."""
    return {
        name: value[torch.from_numpy(rows).to(value.device)]
        if isinstance(value, Tensor) and value.ndim and len(value) == batch
        else value
        for name, value in cond.items()
    }


def _repeat(value: Any, count: int, rows: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        return value.repeat(count, *[1] * (value.ndim - 1))
    return value


def _failure(reason: str, calls: NDArray[np.int64]) -> ToleranceError:
    return ToleranceError(
        f"the likelihood did not reach the end: {reason}. Ask for less (tol=), allow more (max_calls=), or run the network in float64.",
        math.inf,
        int(calls.max()),
    )
