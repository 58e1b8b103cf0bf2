r"""Gaussian teleportation: the noisy part of the path in closed form, as a plan's start transform; then any solver.

Source: "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and its Applications" (arXiv 2412.09726,
"analytical teleportation", with the closed-form solution of the Gaussian model). Far
from the data a model's score is nearly that of a Gaussian with the data's mean $\mu$ and
covariance $U \Lambda U^T$, for which the probability-flow ODE has the solution

$$ x_t = \alpha_t \mu + U \sqrt{\frac{\alpha_t^2 \Lambda + \sigma_t^2}{\alpha_s^2 \Lambda + \sigma_s^2}}\; U^T (x_s - \alpha_s \mu), $$

in any schedule; with few components kept, what is orthogonal to them counts as one with a common variance. The map is affine, so a plan
saves it, and the calls that the noisy part would have cost are spent elsewhere. Exact for Gaussian data.

Mean and covariance must be those of what the model was trained on: of latents, of a class if it is conditional. Guidance moves the mean
of the path away from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.artefacts import Artefact, read_as
from fewstep.errors import GridError
from fewstep.grids import GridRule
from fewstep.plan import StartTransform
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver, Wrapper

__all__ = ["GaussianPrior", "Teleport"]

Floats = NDArray[np.float64]
KIND = "gaussian-prior"
ORTHOGONAL = 1e-6
"""How far the axes may be from orthonormal."""
POWER_STEPS, SPARE_COLUMNS = 4, 16


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Mean and covariance of the data.

    Args:
        mean: ``"*shape"``.
        axes: ``"rank *shape"``, orthonormal.
        variances: ``"rank"``, along the axes.
        rest: variance of every direction orthogonal to the axes.

    Raises:
        ValueError: if the shapes do not fit, a variance is negative or the axes are not orthonormal.

    Example:
        >>> prior = GaussianPrior(np.zeros(2), np.eye(2), np.array([4.0, 0.0]))
        >>> from fewstep.schedules import EDM
        >>> prior.transform(EDM(), 3.0, 0.0).gains.round(3).tolist()  # sqrt(4 / 13), with 0 for the rest
        [0.555, 0.0]
    """

    mean: Floats
    axes: Floats
    variances: Floats
    rest: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mean", "axes", "variances"):
            array = np.array(getattr(self, name), np.float64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.axes.shape[1:] != self.mean.shape or self.variances.shape != self.axes.shape[:1]:
            raise ValueError(
                f'a Gaussian of mean {self.mean.shape} needs axes "rank *shape" and variances "rank", got {self.axes.shape} and '
                f"{self.variances.shape}."
            )
        if not ((self.variances >= 0.0).all() and self.rest >= 0.0 and np.isfinite(self.mean).all()):
            raise ValueError("the variances of a Gaussian must be at least 0, and its mean finite.")
        flat = self.axes.reshape(len(self.axes), -1)
        if not np.allclose(flat @ flat.T, np.eye(len(flat)), atol=ORTHOGONAL):
            raise ValueError("the axes of a Gaussian must be orthonormal.")

    @classmethod
    def fit(cls, data: ArrayLike, rank: int | None = None, *, seed: int = 0) -> GaussianPrior:
        """Mean and covariance of data.

        Args:
            data: ``"count *shape"``, an array or a tensor.
            rank: how many of the largest components to keep; all when left out. What is dropped goes into `rest`, evenly. Much fewer
                than there are elements are found by random projections ("Finding structure with randomness", arXiv 0909.4061,
                algorithm 4.4), in a fraction of the time and memory.
            seed: of the projections.

        Raises:
            ValueError: for fewer than 2 data, or a rank that they do not have.

        Example:
            >>> data = np.random.default_rng(0).normal(size=(500, 3)) * [2.0, 1.0, 0.5] + 1.0
            >>> GaussianPrior.fit(data, rank=1).variances.round(1).tolist()
            [3.8]
        """
        values = data.detach().cpu().double().numpy() if hasattr(data, "detach") else np.asarray(data, np.float64)  # type: ignore[union-attr]
        if values.ndim < 2 or len(values) < 2:
            raise ValueError(f'data must be "count *shape" with at least 2 samples, got shape {values.shape}.')
        shape, most = values.shape[1:], min(len(values) - 1, int(np.prod(values.shape[1:])))
        if rank is not None and not 1 <= rank <= most:
            raise ValueError(f"{len(values)} samples of {int(np.prod(shape))} elements have 1 to {most} components, not {rank}.")
        kept = most if rank is None else rank
        mean = values.mean(0)
        centred = (values - mean).reshape(len(values), -1)
        variances, axes = _components(centred, kept, seed)
        left = centred.shape[1] - kept
        rest = max(0.0, float((centred**2).sum() / len(centred) - variances.sum())) / left if left and rank is not None else 0.0
        return cls(mean, axes.reshape(kept, *shape), variances, rest)

    def transform(self, schedule: NoiseSchedule, t_from: float, t_to: float) -> StartTransform:
        """The map of a state at `t_from` to the one at `t_to` on the Gaussian's path."""
        alpha, sigma = (float(f(t_from)) for f in (schedule.alpha, schedule.sigma))
        alpha_to, sigma_to = (float(f(t_to)) for f in (schedule.alpha, schedule.sigma))

        def gain(variance: Any) -> Any:
            return np.sqrt((alpha_to**2 * variance + sigma_to**2) / (alpha**2 * variance + sigma**2))

        common = float(gain(self.rest))
        extra = gain(self.variances) - common
        shifted = np.tensordot(extra * (self.axes.reshape(len(extra), -1) @ self.mean.ravel()), self.axes, 1)
        shift = (alpha_to - common * alpha) * self.mean - alpha * shifted
        return StartTransform(common, shift, self.axes, extra, t_from)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return self._artefact().digest()

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to one ``.safetensors`` file with a checksum."""
        self._artefact().save(path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> GaussianPrior:
        """Read what `save` wrote, bit for bit.

        Raises:
            ArtefactError: if the file is damaged or holds something else.
        """

        def unpack(artefact: Artefact) -> GaussianPrior:
            mean, axes, variances = (artefact.tensors[name] for name in ("mean", "axes", "variances"))
            return cls(mean, axes, variances, artefact.meta["rest"])

        return read_as(path, kind=KIND, what="Gaussian", unpack=unpack, pack=lambda value: value._artefact())

    def _artefact(self) -> Artefact:
        return Artefact(KIND, {"rest": self.rest}, {"mean": self.mean, "axes": self.axes, "variances": self.variances})


@dataclass(frozen=True)
class Teleport(Wrapper):
    """A solver that starts where the Gaussian's path has led.

    Args:
        solver: what goes on from there, with all the calls.
        prior: mean and covariance of the data.
        to: the time to go to at once. A rule places its times between there and the end ("restarted"); for the times that another grid
            has left, pass them as a list that begins at `to` ("truncated").

    Raises:
        GridError: when planning, if `to` is not between start and end, or a list of times does not begin there.

    Example:
        >>> from fewstep.schedules import EDM
        >>> from fewstep.solvers.ddim import DDIM
        >>> prior = GaussianPrior(np.zeros(2), np.eye(2), np.ones(2))
        >>> plan = Teleport(DDIM(), prior, to=10.0).plan(EDM(), nfe=4, grid="karras")
        >>> plan.noise_time, float(plan.grid[0])
        (80.0, 10.0)
    """

    source: ClassVar[str] = "The Unreasonable Effectiveness of Gaussian Score Approximation, arXiv 2412.09726"

    solver: Solver
    prior: GaussianPrior
    to: float

    @property
    def claimed_order(self) -> int:
        """That of the wrapped solver, on what is left of the path. The jump is as exact as the data are Gaussian, whatever the calls."""
        return self.solver.claimed_order

    def start_transform(self, schedule: NoiseSchedule, times: Floats, start: float | None) -> StartTransform | None:
        """The jump; `start` is the time at whose noise level x_T is drawn."""
        begin = float(schedule.t_start if start is None else start)
        if not schedule.lam(begin) < schedule.lam(self.to):
            raise GridError(f"teleportation leads from noise towards data, not from t={begin:g} to t={self.to:g}.")
        if self.solver.start_transform(schedule, times, self.to) is not None:
            raise GridError("the solver that teleportation was given has a start of its own.")
        return self.prior.transform(schedule, begin, self.to)

    def _steps(
        self, schedule: NoiseSchedule, nfe: int | None, grid: str | GridRule | ArrayLike, start: float | None, final: str
    ) -> tuple[Floats, list[int]]:
        return super()._steps(schedule, nfe, grid, self.to, final)


def _components(centred: Floats, kept: int, seed: int) -> tuple[Floats, Floats]:
    """The largest variances ``"kept"`` and their axes ``"kept d"``."""
    count, size = centred.shape
    if 4 * (kept + SPARE_COLUMNS) < min(count, size):
        guess = centred.T @ np.random.default_rng(seed).standard_normal((count, kept + SPARE_COLUMNS))
        for _ in range(POWER_STEPS):
            guess = centred.T @ np.linalg.qr(centred @ np.linalg.qr(guess)[0])[0]
        basis = np.linalg.qr(guess)[0]
        _, singular, axes = np.linalg.svd(centred @ basis, full_matrices=False)
        return singular[:kept] ** 2 / count, axes[:kept] @ basis.T
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    return singular[:kept] ** 2 / count, axes[:kept]
