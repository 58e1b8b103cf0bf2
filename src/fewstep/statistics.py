r"""Empirical statistics of a model, as DPM-Solver-v3 needs them, and their integrals. Host float64, no torch.

Source: "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics" (arXiv 2310.13268, section 3).
Three functions of $\lambda$, for every element of a sample, for every channel, or one number for all:

- $l$: how the noise prediction varies with the state; the diagonal of $\mathbb{E}[\sigma\,\partial\varepsilon/\partial x]$;
- $s, b$: the line by which $f = (\sigma\varepsilon - l x)/\alpha$ changes along trajectories, $df/d\lambda \approx s f + b$.

With $L, S$ the integrals of l and s, the solver integrates $e^{L+S} g$, where $g = e^{-S} f - \int e^{-S} b$ varies as little as a linear
change of variables can make it. All integrals here are relative to the begin of a step, so that no exponential overflows, however many
decades the schedule spans. Between the nodes l, s and b are interpolated by cubics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.artefacts import Artefact, frozen_json, json_value, read_as
from fewstep.errors import ArtefactError, PlanError, UnknownNameError
from fewstep.grids import FINITE_LAM
from fewstep.numerics import gauss_legendre, lagrange_polynomials
from fewstep.schedules import NoiseSchedule, from_config

__all__ = ["Integrals", "ModelStatistics"]

Floats = NDArray[np.float64]
KIND = "model-statistics"
POINTS = 8
"""Gauss-Legendre points between two nodes."""
WIDEST = 0.25
"""Nodes further apart in lambda than this are divided for the quadrature."""
SLACK = 1e-9
"""How far, in lambda, a time may lie beyond the nodes: the rounding of a schedule's inverse."""


@dataclass(frozen=True)
class Integrals:
    r"""Of the step from $\lambda_s$ to $\lambda_t$; each an array of the statistics' shape.

    Attributes:
        L, S: $L_t - L_s$ and $S_t - S_s$.
        drift: $e^{S_s} \int_s^t e^{-S} b$.
        moments: $E_k = \int_s^t e^{L - L_s + S - S_s} (\lambda - \lambda_s)^k / k!$ for k = 0, 1, ...
        forcing: $\int_s^t e^{L - L_s + S - S_s}\, e^{S_s} \int_s^\lambda e^{-S} b$.
    """

    L: Floats
    S: Floats
    drift: Floats
    moments: tuple[Floats, ...]
    forcing: Floats


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """The functions l, s and b of one model, on nodes.

    Args:
        schedule: the noise schedule of the model.
        lam: ``"N+1"``, increasing, finite; the range of lambda that a plan may use.
        l, s, b: ``"N+1 *shape"``, where shape broadcasts over one sample's: nothing for scalars, ``(C, 1, 1)`` for channels.
        provenance: JSON values: model fingerprint, guidance scale, how many samples, seed, versions. Statistics of a guided model are those
            of one guidance scale.

    Raises:
        ArtefactError: if shapes do not fit, or the numbers are not finite or not increasing.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> stats = ModelStatistics.gaussian(VPLinear(), mean=0.0, variance=0.25)
        >>> step = stats.integrals(0.0, 1.0)
        >>> exact = 1.0 - 0.5 * math.log((1 + 0.25 * math.exp(2.0)) / (1 + 0.25))  # L of a Gaussian in closed form
        >>> abs(float(step.L) - exact) < 1e-7
        True
    """

    schedule: NoiseSchedule
    lam: Floats
    l: Floats  # noqa: E741 - the paper's name
    s: Floats
    b: Floats
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lam", "l", "s", "b"):
            array = np.array(getattr(self, name), np.float64)
            if not np.isfinite(array).all():
                raise ArtefactError(f"model statistics must be finite, but {name} is not.")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.lam.ndim != 1 or len(self.lam) < 2 or not (np.diff(self.lam) > 0.0).all():
            raise ArtefactError(
                f"model statistics need at least 2 nodes that increase in lambda, got lam of shape {self.lam.shape}."
            )
        shapes = {name: getattr(self, name).shape for name in ("l", "s", "b")}
        if any(shape[:1] != self.lam.shape for shape in shapes.values()):
            raise ArtefactError(f"model statistics need l, s and b on {len(self.lam)} nodes, got shapes {shapes}.")
        try:
            shape = np.broadcast_shapes(*(shape[1:] for shape in shapes.values()))
        except ValueError as error:
            raise ArtefactError(f"the shapes of l, s and b do not go together: {shapes}.") from error
        for name, own in shapes.items():  # as many axes each
            fill = [1] * (len(shape) + 1 - len(own))
            object.__setattr__(self, name, getattr(self, name).reshape(own[0], *fill, *own[1:]))
        object.__setattr__(self, "provenance", frozen_json(self.provenance))

    # ---- closed forms --------------------------------------------------------------------------------------------------------------

    @classmethod
    def degenerate(cls, schedule: NoiseSchedule, ends: tuple[float, float] | None = None) -> ModelStatistics:
        """L = 1, s = b = 0, with which the solver is the exponential integrator on the data prediction (UniP).

        Args:
            schedule: noise schedule.
            ends: of lambda; those of the schedule when left out, or of `FINITE_LAM` where these are infinite.
        """
        low, high = _ends(schedule, ends)
        return cls(schedule, np.array([low, high]), np.ones(2), np.zeros(2), np.zeros(2), {"how": "degenerate"})

    @classmethod
    def gaussian(
        cls,
        schedule: NoiseSchedule,
        mean: ArrayLike,
        variance: ArrayLike,
        *,
        nodes: int = 240,
        ends: tuple[float, float] | None = None,
    ) -> ModelStatistics:
        r"""Of data that are Gaussian with a diagonal covariance, in closed form; the solver is then exact in one step between finite
        lambdas, up to the interpolation between the nodes.

        $l = 1/(1 + V e^{2\lambda})$ and $f = -l m$ whatever the state, so s = 0 and $b = df/d\lambda = 2 l (1 - l) m$.
        Where alpha is 0, as at the start of the default `Flow`, lambda is infinite and the first step is DDIM's.

        Args:
            schedule: noise schedule.
            mean, variance: m and V, numbers or arrays over one sample's shape.
            nodes: number of intervals, equally long in lambda.
            ends: as of `degenerate`.
        """
        lam = np.linspace(*_ends(schedule, ends), nodes + 1)
        m, v = np.broadcast_arrays(np.asarray(mean, np.float64), np.asarray(variance, np.float64))
        if (v < 0.0).any():
            raise ValueError(f"a variance must be at least 0, got {v.min():g}.")
        l = 1.0 / (1.0 + v * np.exp(2.0 * lam.reshape(-1, *[1] * v.ndim)))  # noqa: E741
        return cls(schedule, lam, l, np.zeros_like(l), 2.0 * l * (1.0 - l) * m, {"how": "gaussian"})

    # ---- reading -------------------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """The common shape of l, s and b at a node."""
        return np.broadcast_shapes(self.l.shape[1:], self.s.shape[1:], self.b.shape[1:])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return self._artefact().digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelStatistics) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"ModelStatistics({len(self.lam)} nodes, lambda {self.lam[0]:.4g} to {self.lam[-1]:.4g}, shape {self.shape})"

    def check(self, schedule: NoiseSchedule, lams: Floats) -> None:
        """Whether a plan on these finite lambdas can use the statistics.

        Raises:
            PlanError: if they are of another schedule, or do not reach as far.
        """
        if not self.schedule.same_noise(schedule):
            raise PlanError(f"the statistics were computed for {self.schedule!r:.100}, but the plan is for {schedule!r:.100}.")
        low, high = self.lam[0], self.lam[-1]
        if len(lams) and not (low - SLACK <= lams.min() and lams.max() <= high + SLACK):
            raise PlanError(
                f"the statistics cover lambda from {low:.5g} to {high:.5g}, but the plan needs {lams.min():.5g} to {lams.max():.5g}. "
                f"Plan for a shorter interval, or compute statistics on a longer one."
            )

    def at(self, lam: float) -> Floats:
        """The function l."""
        near, basis = self._cubic(self._interval(lam), np.array([lam]))
        return _along(basis, self.l[near])[0]

    def integrals(self, start: float, end: float, *, count: int = 1, rule: str = "gauss") -> Integrals:
        """The integrals of a step; on the way back, where end < start, with the sign that goes with it.

        Args:
            start, end: lambda at its ends, within the nodes.
            count: how many moments.
            rule: ``"gauss"``, or ``"trapezoid"`` on the nodes, as the official code has it; then both ends must be nodes.
        """
        unit, share, upto = _rule(rule)
        L, S, drift, forcing = (np.zeros(self.shape) for _ in range(4))
        moments = [np.zeros(self.shape) for _ in range(count)]
        for begin, until in self._pieces(start, end, rule):
            width, points = until - begin, begin + (until - begin) * unit
            near, basis = self._cubic(self._interval(0.5 * (begin + until)), points)
            l, s, b = (_along(basis, array[near]) for array in (self.l, self.s, self.b))  # noqa: E741
            L_at, S_at = L + width * _along(upto, l), S + width * _along(upto, s)
            inner = np.exp(-S_at) * b
            drift_at = drift + width * _along(upto, inner)
            weights = np.exp(L_at + S_at) * (width * share).reshape(-1, *[1] * len(self.shape))
            for j in range(count):
                moments[j] += _along((points - start) ** j / math.factorial(j), weights)
            forcing = forcing + (weights * drift_at).sum(0)
            L, S = L + width * _along(share, l), S + width * _along(share, s)
            drift = drift + width * _along(share, inner)
        return Integrals(L, S, drift, tuple(moments), forcing)

    def align(self, lam: float, start: float, *, rule: str = "gauss") -> tuple[Floats, Floats]:
        """U and v of g = u f + v: what the value f at `lam`, before or after a step's `start`, is in the variables of that step."""
        if lam == start:
            return np.ones(self.shape), np.zeros(self.shape)
        between = self.integrals(start, lam, count=0, rule=rule)
        return np.exp(-between.S), -between.drift

    # ---- files ---------------------------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write the statistics to one ``.safetensors`` file with their schedule, provenance and a checksum.

        Raises:
            OSError: if the place cannot be written; nothing half-written is left.
        """
        self._artefact().save(path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ModelStatistics:
        """Read statistics that `save` wrote, bit for bit.

        Raises:
            ArtefactError: if the file is truncated, damaged, foreign or of a newer format.
            FileNotFoundError: if there is none.
        """

        def unpack(artefact: Artefact) -> ModelStatistics:
            lam, l, s, b = (artefact.tensors[name] for name in ("lam", "l", "s", "b"))  # noqa: E741
            return cls(from_config(artefact.meta["schedule"]), lam, l, s, b, artefact.meta["provenance"])

        return read_as(path, kind=KIND, what="set of model statistics", unpack=unpack, pack=lambda value: value._artefact())

    def _artefact(self) -> Artefact:
        meta = {"schedule": self.schedule.config(), "provenance": json_value(self.provenance)}
        return Artefact(KIND, meta, {name: getattr(self, name) for name in ("lam", "l", "s", "b")})

    # ---- quadrature ----------------------------------------------------------------------------------------------------------------

    def _interval(self, lam: float) -> int:
        """The number of the interval between nodes in which lambda lies; the outermost ones reach further."""
        return int(np.clip(np.searchsorted(self.lam, lam, side="right") - 1, 0, len(self.lam) - 2))

    def _pieces(self, start: float, end: float, rule: str) -> list[tuple[float, float]]:
        """The way from start to end, cut at the nodes: pairs of begin and end, in the direction of the step."""
        low, high = min(start, end), max(start, end)
        inside = self.lam[(self.lam > low + SLACK) & (self.lam < high - SLACK)].tolist()
        knots = [start, *(inside if start < end else inside[::-1]), end]
        if rule == "gauss":
            cuts = [np.linspace(a, b, 1 + math.ceil(abs(b - a) / WIDEST))[:-1] for a, b in pairwise(knots)]
            knots = [*np.concatenate(cuts).tolist(), end]
        return list(pairwise(knots))

    def _cubic(self, k: int, points: Floats) -> tuple[slice, Floats]:
        """The four nodes around interval k, and the weights of their values at the points."""
        low = min(max(k - 1, 0), max(len(self.lam) - 4, 0))
        nodes = self.lam[low : low + 4]
        basis = np.ones((len(points), len(nodes)))
        for j, node in enumerate(nodes):
            for i, other in enumerate(nodes):
                if i != j:
                    basis[:, j] *= (points - other) / (node - other)
        return slice(low, low + 4), basis


def _along(weights: Floats, values: Floats) -> Floats:
    """Weighted sums over the first axis of values."""
    return np.tensordot(weights, values, axes=(-1, 0))


@lru_cache
def _rule(name: str) -> tuple[Floats, Floats, Floats]:
    """Points of the unit interval, their weights, and the weights of the integrals from 0 up to each point."""
    if name == "trapezoid":
        return np.array([0.0, 1.0]), np.array([0.5, 0.5]), np.array([[0.0, 0.0], [0.5, 0.5]])
    if name != "gauss":
        raise UnknownNameError("rule", name, ("gauss", "trapezoid"))
    points, weights = gauss_legendre(0.0, 1.0, POINTS)
    powers = np.arange(1, POINTS + 1)
    return points, weights, (points[:, None] ** powers / powers) @ lagrange_polynomials(points).T


def _ends(schedule: NoiseSchedule, ends: tuple[float, float] | None) -> tuple[float, float]:
    if ends is not None:
        return float(ends[0]), float(ends[1])
    low, high = (float(schedule.lam(t)) for t in (schedule.t_start, schedule.t_end))
    return (FINITE_LAM[0] if math.isinf(low) else low), (FINITE_LAM[1] if math.isinf(high) else high)
