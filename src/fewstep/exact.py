r"""Denoisers in closed form: a Gaussian, a mixture of Gaussians, a finite set of points. Ground truth for everything else.

Notation. The clean data $x_0$ have a density $p_0$; the noised marginal at time t is that of
$x_t = \alpha x_0 + \sigma \varepsilon$, and the data prediction is the posterior mean $D(x, t) = E[x_0 \mid x_t = x]$. For
$p_0 = N(m, C)$ with $C = U \Lambda U^T$ it is

$$ D(x, t) = m + U \frac{\alpha \Lambda}{\alpha^2 \Lambda + \sigma^2} U^T (x - \alpha m), $$

and for a mixture the average of these, each weighted with the posterior probability of its component. By Tweedie's formula
$D = (x + \sigma^2 \nabla \log p_t(x)) / \alpha$ (Efron, "Tweedie's Formula and Selection Bias", JASA 106, 2011). A finite set of points
is a mixture of equal weights and one isotropic covariance ("Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv 2206.00364, appendix B.3).

Nothing is divided by alpha, so alpha = 0 gives the prior mean; sigma = 0 gives the limit: $x / \alpha$, or the nearest point of the
support.

All of them are callables ``(x, t)`` as `fewstep.Denoiser` is, with a ``schedule`` and a counter ``calls``. x is ``"batch *shape"``,
t a number in the schedule's own time or one per sample. They compute in float64 (float32 on devices that have none) and answer in
x's precision.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fewstep.identity import digest_of
from fewstep.schedules import NoiseSchedule

__all__ = ["FiniteData", "Gaussian", "GaussianMixture", "widest_dtype"]

BLOCK = 1 << 22
"""How many numbers a temporary array of `FiniteData` may have; more are worked off in blocks."""
CANCELLATION = 1e-9
"""Largest rounding error in a log-weight for which `FiniteData` expands squared distances into products."""
FLOOR = 1e-16
"""Variance, relative to that of the data, that stands for 0 where a mixture has no density (sigma = 0 and a singular covariance)."""

Time = float | Tensor | NDArray[np.float64]
Level = float | Tensor


def widest_dtype(device: torch.device) -> torch.dtype:
    """The most precise floating-point type of a device: float64, except on Apple's MPS, which has none.

    Example:
        >>> widest_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


class _Exact:
    """A denoiser that is its parameters."""

    _parameters: _Parameters

    @property
    def fingerprint(self) -> str:
        """Digest of the parameters."""
        return digest_of({name: value for name, value in self._parameters.host.items() if isinstance(value, Tensor)})


class Gaussian(_Exact):
    """Exact denoiser of normally distributed data.

    Args:
        schedule: the noise schedule.
        mean: ``"*shape"``, any shape of at least one dimension.
        covariance: a number (the variance of every element), ``"d"`` (the variances) or ``"d d"``, where d elements make a sample.
            Singular is legal.

    Raises:
        ValueError: if the shapes do not fit, or the covariance is not symmetric and positive semi-definite.

    Example:
        >>> from fewstep.schedules import EDM
        >>> exact = Gaussian(EDM(), [1.0, -1.0], 4.0)
        >>> exact(torch.zeros(1, 2), 2.0).tolist(), exact.calls
        ([[0.5, -0.5]], 1)
    """

    def __init__(self, schedule: NoiseSchedule, mean: ArrayLike | Tensor, covariance: ArrayLike | Tensor):
        mean = _host(mean, "mean")
        if mean.ndim < 1:
            raise ValueError("mean must have at least one dimension, got a number. Pass one mean per element of a sample.")
        self.schedule = _checked_schedule(schedule)
        self.shape = tuple(mean.shape)
        self.calls = 0
        variances, axes = _eigen(_host(covariance, "covariance")[None], 1, mean.numel())
        self._parameters = _Parameters(
            mean=mean.reshape(-1), variances=variances[0], axes=None if axes is None else axes[0].contiguous()
        )

    def __repr__(self) -> str:
        return f"Gaussian({self.schedule!r}, shape={self.shape})"

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """The posterior mean, ``"batch *shape"``."""
        self.calls += 1
        flat, alpha, sigma, p = _enter(self, x, t, 1)
        total = alpha * alpha * p["variances"] + sigma * sigma
        gain = _ratio(alpha * p["variances"], total)
        return _leave(p["mean"] + _along(p["axes"], gain, flat - alpha * p["mean"]), x)

    def solution(self, x: Tensor, t_from: float, t_to: float) -> Tensor:
        r"""The probability-flow ODE's solution at `t_to` that is x at `t_from`, in either direction.

        $x_{to} = \alpha_{to} m + U \sqrt{(\alpha_{to}^2 \Lambda + \sigma_{to}^2) / (\alpha_{from}^2 \Lambda + \sigma_{from}^2)}\,U^T
        (x - \alpha_{from} m)$.

        Example:
            >>> from fewstep.schedules import EDM
            >>> Gaussian(EDM(), [0.0], 1.0).solution(torch.ones(1, 1), math.sqrt(3.0), 0.0).tolist()
            [[0.5]]
        """
        flat, alpha, sigma, p = _enter(self, x, t_from, 1)
        alpha_to, sigma_to = _levels(self.schedule, t_to, flat, 1)
        before = alpha * alpha * p["variances"] + sigma * sigma
        after = alpha_to * alpha_to * p["variances"] + sigma_to * sigma_to
        gain = _ratio(after, before).sqrt()
        return _leave(alpha_to * p["mean"] + _along(p["axes"], gain, flat - alpha * p["mean"]), x)

    def draw(self, count: int, seed: int) -> Tensor:
        """Clean data: float64 ``"count *shape"`` on the CPU. More with the same seed begin with the same samples."""
        p = self._parameters.host
        normal = torch.from_numpy(_generator(seed).standard_normal((count, len(p["mean"]))))
        scaled = p["variances"].sqrt() * normal
        return (p["mean"] + (scaled if p["axes"] is None else scaled @ p["axes"].T)).reshape(count, *self.shape)


class GaussianMixture(_Exact):
    """Exact denoiser of a mixture of Gaussians, each with a covariance of its own.

    Args:
        schedule: the noise schedule.
        means: ``"k *shape"``.
        covariances: a number or ``"k"`` (variances of isotropic components), ``"k d"`` (variances) or ``"k d d"``.
        weights: ``"k"``, positive; they are normalised to add up to 1. Equal when left out.

    Raises:
        ValueError: if the shapes do not fit, a covariance is not symmetric and positive semi-definite, or a weight is not positive.

    Example:
        >>> from fewstep.schedules import Flow
        >>> exact = GaussianMixture(Flow(), [[-1.0, 0.0], [1.0, 0.0]], 0.01, [0.25, 0.75])
        >>> exact(torch.zeros(1, 2), 1.0).tolist(), exact(torch.zeros(1, 2), 1.0, label=torch.tensor([0])).tolist()
        ([[0.5, 0.0]], [[-1.0, 0.0]])
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        means: ArrayLike | Tensor,
        covariances: ArrayLike | Tensor,
        weights: ArrayLike | Tensor | None = None,
    ):
        means = _host(means, "means")
        if means.ndim < 2 or not len(means):
            raise ValueError(f'means must be "k *shape" with at least one component, got shape {tuple(means.shape)}.')
        self.schedule = _checked_schedule(schedule)
        self.shape = tuple(means.shape[1:])
        self.count = len(means)
        self.calls = 0
        weights = torch.ones(self.count, dtype=torch.float64) if weights is None else _host(weights, "weights")
        if weights.shape != (self.count,) or not bool((weights > 0).all()):
            raise ValueError(f"weights must be {self.count} positive numbers, one a component, got {weights.tolist()}.")
        flat = means.reshape(self.count, -1)
        variances, axes = _eigen(_host(covariances, "covariances"), self.count, flat.shape[1])
        spread = variances.max() + flat.var(0, correction=0).max()
        self._floor = FLOOR * (float(spread) or 1.0)
        self._parameters = _Parameters(means=flat, variances=variances, axes=axes, log_weights=(weights / weights.sum()).log())

    def __repr__(self) -> str:
        return f"GaussianMixture({self.schedule!r}, components={self.count}, shape={self.shape})"

    def __call__(self, x: Tensor, t: Time, *, label: Tensor | int | None = None) -> Tensor:
        """The posterior mean, ``"batch *shape"``.

        Args:
            x: ``"batch *shape"``.
            t: a time, or ``"batch"``.
            label: int64 ``"batch"``: data of this component only; -1, or the number of components, stands for all.

        Raises:
            ValueError: for a label that is no component. Labels that are not on the CPU are not read; a wrong one gives NaN.
        """
        self.calls += 1
        alpha, p, shift, total, logits = self._terms(x, t, label)
        posterior = p["means"] + _along(p["axes"], alpha * p["variances"] / total, shift)
        return _leave((logits.softmax(-1)[..., None] * posterior).sum(1), x)

    def log_density(self, x: Tensor, t: Time, *, label: Tensor | int | None = None) -> Tensor:
        """Natural logarithm of the noised marginal's density, ``"batch"``."""
        logits = self._terms(x, t, label)[-1]
        return (logits.logsumexp(-1) - 0.5 * math.log(2.0 * math.pi) * math.prod(self.shape)).to(x.dtype)

    def score(self, x: Tensor, t: Time, *, label: Tensor | int | None = None) -> Tensor:
        """Gradient of `log_density` in x, ``"batch *shape"``."""
        _, p, shift, total, logits = self._terms(x, t, label)
        return _leave((logits.softmax(-1)[..., None] * _along(p["axes"], -1.0 / total, shift)).sum(1), x)

    def draw(self, count: int, seed: int) -> Tensor:
        """Clean data: float64 ``"count *shape"`` on the CPU. More with the same seed begin with the same samples."""
        p = self._parameters.host
        normal = torch.from_numpy(_generator(seed).standard_normal((count, 1 + math.prod(self.shape))))
        which = _pick(p["log_weights"].exp(), normal[:, 0])
        scaled = p["variances"][which].sqrt() * normal[:, 1:]
        if p["axes"] is not None:
            scaled = torch.einsum("bij,bj->bi", p["axes"][which], scaled)
        return (p["means"][which] + scaled).reshape(count, *self.shape)

    def _terms(self, x: Tensor, t: Time, label: Tensor | int | None) -> tuple[Level, dict[str, Any], Tensor, Tensor, Tensor]:
        """Returns alpha, the parameters, x - alpha m ``"batch k d"``, the variances of x_t ``"#batch k d"`` and log(w p) ``"batch k"``."""
        flat, alpha, sigma, p = _enter(self, x, t, 2)
        shift = flat[:, None, :] - alpha * p["means"]
        total = alpha * alpha * p["variances"] + sigma * sigma
        total = torch.where(total > 0.0, total, alpha * alpha * self._floor)
        inside = shift if p["axes"] is None else torch.einsum("bki,kij->bkj", shift, p["axes"])
        logits = p["log_weights"] - 0.5 * total.log().sum(-1) - 0.5 * (inside.square() / total).sum(-1)
        if label is not None:
            asked = _labels(label, flat, self.count)
            mine = asked[:, None] == torch.arange(self.count, device=flat.device)
            logits = logits.masked_fill(~(mine | _unlabelled(asked, self.count)), -math.inf)
        return alpha, p, shift, total, logits


class FiniteData(_Exact):
    """Exact denoiser of a finite data set, every point equally likely: what a network that memorised it would predict.

    Args:
        schedule: the noise schedule.
        points: ``"n *shape"``.
        labels: int64 ``"n"``, at least 0, if the points have classes.
        bandwidth: widen every point to a Gaussian of this standard deviation (a kernel density estimate).

    Raises:
        ValueError: if the shapes do not fit, there is no point, or the bandwidth is negative.

    Example:
        >>> from fewstep.schedules import EDM
        >>> exact = FiniteData(EDM(), [[-1.0], [3.0]])
        >>> exact(torch.tensor([[0.9]]), 0.0).tolist(), exact(torch.tensor([[1.0]]), 50.0).tolist()
        ([[-1.0]], [[1.0]])
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        points: ArrayLike | Tensor,
        labels: ArrayLike | Tensor | None = None,
        *,
        bandwidth: float = 0.0,
    ):
        points = _host(points, "points")
        if points.ndim < 2 or not len(points):
            raise ValueError(f'points must be "n *shape" with at least one point, got shape {tuple(points.shape)}.')
        if not (math.isfinite(bandwidth) and bandwidth >= 0.0):
            raise ValueError(f"bandwidth must be at least 0 and finite, got {bandwidth:g}.")
        self.schedule = _checked_schedule(schedule)
        self.shape = tuple(points.shape[1:])
        self.bandwidth = float(bandwidth)
        self.calls = 0
        flat = points.reshape(len(points), -1)
        centre = flat.mean(0)
        known = None if labels is None else _checked_labels(labels, len(points))
        self.classes = 0 if known is None else int(known.max()) + 1
        # products of points relative to their centre, not to 0, cancel less in the squared distances
        self._radius = float((flat - centre).square().sum(1).max().sqrt())
        self._parameters = _Parameters(centre=centre, offsets=flat - centre, labels=known)

    def __repr__(self) -> str:
        return f"FiniteData({self.schedule!r}, points={len(self._parameters.host['offsets'])}, shape={self.shape})"

    def __call__(self, x: Tensor, t: Time, *, label: Tensor | int | None = None) -> Tensor:
        """The posterior mean, ``"batch *shape"``.

        Args:
            x: ``"batch *shape"``.
            t: a time, or ``"batch"``.
            label: int64 ``"batch"``: points with this label only; -1, or the number of classes, stands for all.

        Raises:
            ValueError: for a label without points. Labels that are not on the CPU are not read; a wrong one gives NaN.
        """
        self.calls += 1
        flat, alpha, sigma, p = _enter(self, x, t, 1)
        asked = None if label is None else self._asked(label, flat)
        shift = flat - alpha * p["centre"]
        rows = max(1, BLOCK // len(p["offsets"]))
        means = []
        for i in range(0, len(flat), rows):
            part = slice(i, i + rows)
            levels = (alpha[part], sigma[part]) if isinstance(alpha, Tensor) and isinstance(sigma, Tensor) else (alpha, sigma)
            means.append(self._mean_offset(shift[part], *levels, p, None if asked is None else asked[part]))
        mean = torch.cat(means) if means else shift
        variance = self.bandwidth**2
        gain = alpha * variance / (alpha * alpha * variance + sigma * sigma) if variance else 0.0
        return _leave(p["centre"] + mean + gain * (shift - alpha * mean), x)

    def draw(self, count: int, seed: int) -> Tensor:
        """Clean data, points drawn with replacement: float64 ``"count *shape"`` on the CPU, as `Gaussian.draw`."""
        p = self._parameters.host
        points = p["centre"] + p["offsets"]
        normal = torch.from_numpy(_generator(seed).standard_normal((count, 1 + points.shape[1])))
        which = _pick(torch.full((len(points),), 1.0 / len(points), dtype=torch.float64), normal[:, 0])
        return (points[which] + self.bandwidth * normal[:, 1:]).reshape(count, *self.shape)

    def _mean_offset(self, shift: Tensor, alpha: Level, sigma: Level, p: dict[str, Any], asked: Tensor | None) -> Tensor:
        """The posterior mean of the point, relative to the centre: ``"rows d"``. `shift` is x - alpha centre."""
        spread = alpha * alpha * self.bandwidth**2 + sigma * sigma
        squares = self._squared_distances(shift, alpha, spread, p["offsets"])
        if asked is not None:
            mine = (asked[:, None] == p["labels"]) | _unlabelled(asked, self.classes)
            squares = squares.masked_fill(~mine, math.inf)
        excess = squares - squares.amin(1, keepdim=True)  # 0 at the nearest point, so that it alone is left when spread is 0
        tiny = torch.finfo(shift.dtype).tiny
        spread = spread.clamp_min(tiny) if isinstance(spread, Tensor) else max(spread, tiny)
        weights = (-0.5 * excess / spread).softmax(1)
        return weights @ p["offsets"]

    def _squared_distances(self, shift: Tensor, alpha: Level, spread: Level, offsets: Tensor) -> Tensor:
        """|shift - alpha offset|^2: ``"rows n"``. By products, which is fast, unless their cancellation would show in the weights."""
        reach = _largest(alpha * self._radius) ** 2 / max(_smallest(spread), torch.finfo(torch.float64).tiny)
        if torch.finfo(shift.dtype).eps * (reach + shift.shape[1]) < CANCELLATION:
            products = shift @ offsets.T
            return (shift.square().sum(1, keepdim=True) - 2.0 * alpha * products) + alpha * alpha * offsets.square().sum(1)
        width = max(1, BLOCK // max(1, shift.numel()))
        alphas = alpha[:, :, None] if isinstance(alpha, Tensor) else alpha
        parts = [(shift[:, None, :] - alphas * part).square().sum(-1) for part in offsets.split(width)]
        return torch.cat(parts, 1)

    def _asked(self, label: Tensor | int, flat: Tensor) -> Tensor:
        known = self._parameters.host["labels"]
        if known is None:
            raise ValueError("a label was passed, but these points have none. Give labels= when making FiniteData.")
        asked = _labels(label, flat, self.classes)
        if asked.device.type == "cpu":
            empty = set(asked.tolist()) - set(known.tolist()) - {-1, self.classes}
            if empty:
                raise ValueError(f"no point has the label {min(empty)}.")
        return asked


class _Parameters:
    """Float64 tensors on the CPU by name (None is legal), and their copies on the devices where they were needed."""

    def __init__(self, **tensors: Tensor | None):
        self.host: dict[str, Any] = tensors
        self._moved: dict[tuple[torch.device, torch.dtype], dict[str, Any]] = {}

    def like(self, x: Tensor) -> dict[str, Any]:
        key = (x.device, x.dtype)
        if key not in self._moved:
            self._moved[key] = {name: _moved(value, x) for name, value in self.host.items()}
        return self._moved[key]


def _moved(value: Tensor | None, x: Tensor) -> Tensor | None:
    if value is None:
        return None
    return (value.to(x.dtype) if value.is_floating_point() else value).to(x.device)


def _host(value: ArrayLike | Tensor, name: str) -> Tensor:
    array = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite.")
    return torch.from_numpy(array.copy())


def _checked_schedule(schedule: NoiseSchedule) -> NoiseSchedule:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a fewstep.schedules schedule, got {type(schedule).__name__}.")
    return schedule


def _checked_labels(labels: ArrayLike | Tensor, count: int) -> Tensor:
    known = labels.detach().cpu().clone() if isinstance(labels, Tensor) else torch.as_tensor(np.array(labels))
    if known.is_floating_point() or known.shape != (count,) or int(known.min()) < 0:
        raise ValueError(f"labels must be {count} whole numbers of at least 0, one a point.")
    return known.to(torch.int64)


def _eigen(covariances: Tensor, count: int, size: int) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues ``"k d"`` and, unless all are along the axes, eigenvectors ``"k d d"`` (columns)."""
    shapes = {0: (), 1: (count,), 2: (count, size), 3: (count, size, size)}
    if shapes.get(covariances.ndim) != tuple(covariances.shape):
        raise ValueError(
            f"{count} covariance(s) of {size} element(s) must be a number or have shape {(count,)}, {(count, size)} or "
            f"{(count, size, size)}, got {tuple(covariances.shape)}."
        )
    if covariances.ndim < 3:
        values, axes = covariances.reshape(-1, 1) if covariances.ndim < 2 else covariances, None
    else:
        scale = covariances.abs().amax((1, 2), keepdim=True)
        if not bool(((covariances - covariances.mT).abs() <= 1e-8 * scale).all()):
            raise ValueError("a covariance must be symmetric.")
        values, axes = torch.linalg.eigh(0.5 * (covariances + covariances.mT))
        tolerance = 1e-12 * values.abs().amax(1, keepdim=True)
        values = torch.where(values.abs() <= tolerance, 0.0, values)
    if bool((values < 0.0).any()):
        raise ValueError(
            f"a covariance must be positive semi-definite, got an eigenvalue or variance of {float(values.min()):.6g}."
        )
    return values.expand(count, size).contiguous(), axes


def _enter(exact: Any, x: Tensor, t: Time, dims: int) -> tuple[Tensor, Level, Level, dict[str, Any]]:
    """The state in the working precision as ``"batch d"``, alpha and sigma at t, and the parameters beside it."""
    if math.prod(x.shape[1:]) != math.prod(exact.shape) or x.ndim < 1:
        raise ValueError(f'x must be "batch *shape" with samples of shape {exact.shape}, got shape {tuple(x.shape)}.')
    flat = x.reshape(x.shape[0], math.prod(exact.shape)).to(widest_dtype(x.device))
    alpha, sigma = _levels(exact.schedule, t, flat, dims)
    return flat, alpha, sigma, exact._parameters.like(flat)


def _leave(flat: Tensor, x: Tensor) -> Tensor:
    return flat.reshape(x.shape).to(x.dtype)


def _levels(schedule: NoiseSchedule, t: Time, flat: Tensor, dims: int) -> tuple[Level, Level]:
    """Two levels, alpha and sigma at t: two numbers, or for a time per sample two tensors ``"batch"`` with `dims` more axes of length 1."""
    if not (isinstance(t, (Tensor, np.ndarray)) and t.ndim):
        return float(schedule.alpha(float(t))), float(schedule.sigma(float(t)))
    times = t.detach().cpu().double().numpy() if isinstance(t, Tensor) else np.asarray(t, np.float64)
    if times.shape != (flat.shape[0],):
        raise ValueError(f"t must be one number or one per sample ({flat.shape[0]},), got shape {times.shape}.")
    alpha, sigma = (
        torch.as_tensor(level).to(flat.dtype).to(flat.device) for level in (schedule.alpha(times), schedule.sigma(times))
    )
    shape = (-1, *[1] * dims)
    return alpha.reshape(shape), sigma.reshape(shape)


def _along(axes: Tensor | None, gain: Tensor, vectors: Tensor) -> Tensor:
    """U gain U^T vectors: ``"batch d"`` with axes ``"d d"``, or ``"batch k d"`` with axes ``"k d d"``."""
    if axes is None:
        return gain * vectors
    if axes.ndim == 2:
        return (gain * (vectors @ axes)) @ axes.T
    return torch.einsum("bkj,kij->bki", gain * torch.einsum("bki,kij->bkj", vectors, axes), axes)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """The quotient, and 0 where both vanish (a direction without spread, at sigma = 0)."""
    return torch.where(bottom > 0.0, top / torch.where(bottom > 0.0, bottom, 1.0), 0.0)


def _labels(label: Tensor | int, flat: Tensor, count: int) -> Tensor:
    """The labels asked for as int64 ``"batch"``; those on the CPU are checked to be within -1..count."""
    asked = torch.as_tensor(label)
    if asked.is_floating_point() or asked.dtype is torch.bool or asked.shape not in ((), (flat.shape[0],)):
        raise ValueError(f'label must be whole numbers "batch" ({flat.shape[0]},), got {asked.dtype} {tuple(asked.shape)}.')
    if asked.device.type == "cpu" and asked.numel() and not -1 <= int(asked.min()) <= int(asked.max()) <= count:
        raise ValueError(
            f"label must be within 0..{count - 1}, or -1 or {count} for all, got {int(asked.min())}..{int(asked.max())}."
        )
    return asked.to(torch.int64).to(flat.device).expand(flat.shape[0])


def _unlabelled(asked: Tensor, count: int) -> Tensor:
    return ((asked == -1) | (asked == count))[:, None]


def _pick(weights: Tensor, normal: Tensor) -> Tensor:
    """Indices drawn with these probabilities, from standard normal numbers."""
    return torch.searchsorted(weights.cumsum(0), torch.special.ndtr(normal)).clamp_max(len(weights) - 1)


def _largest(level: Level) -> float:
    return float(level.max()) if isinstance(level, Tensor) else level


def _smallest(level: Level) -> float:
    return float(level.min()) if isinstance(level, Tensor) else level


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))
