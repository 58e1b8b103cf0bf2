r"""Reference trajectories: the probability-flow ODE solved once, with many calls, and read off at any time afterwards.

Tuners compare a plan's states with the exact ones, at times that are being searched. So the paths are kept on a fine grid and interpolated.
With $\varphi = \operatorname{atan2}(\sigma, \alpha)$ the scaled state $u = x / \sqrt{\alpha^2 + \sigma^2}$ obeys

$$ \frac{du}{d\varphi} = \frac{\cos\varphi\; u - D}{\sin\varphi} , $$

which the stored data predictions D give at every node, so between two nodes u is the cubic through both values and slopes (Hermite). The
angle is finite where lambda is not: alpha = 0 is a node like any other; at sigma = 0 the state is its own prediction, and nothing is
interpolated beyond the last node with sigma > 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.grids import make_grid
from fewstep.sampler import sample
from fewstep.schedules import NoiseSchedule
from fewstep.solvers import Adams

__all__ = ["Paths", "trace_paths"]

Floats = NDArray[np.float64]
DenoiserLike = Callable[..., Tensor]


@dataclass(frozen=True)
class Paths:
    """Exact paths of some noises, on a fine grid.

    Attributes:
        schedule: the noise schedule.
        times: ``"K+1"``, decreasing in noise.
        states: ``"K+1 batch *shape"``.
        predictions: ``"K+1 batch *shape"``, the data predictions there.
        target: ``"batch *shape"``, the exact samples: the states at the end, or the prediction of the clean data made there.
        cond: conditions, tensors with one entry a sample.
        weights: ``"batch"``: how many samples each path stands for, where they are no fair sample of the noise.
        whole: whether the states between are kept.
        error: how far the ends are from those of half as many calls, root mean square over all elements: an upper estimate.
    """

    schedule: NoiseSchedule
    times: Floats
    states: Tensor
    predictions: Tensor
    target: Tensor
    cond: dict[str, Any]
    error: float
    weights: Floats | None = None
    whole: bool = True

    @property
    def noise(self) -> Tensor:
        """``"batch *shape"``, where they start."""
        return self.states[0]

    @property
    def count(self) -> int:
        """How many paths."""
        return self.states.shape[1]

    @property
    def shares(self) -> Floats:
        """``"batch"``: the weights, 1 where there are none."""
        return np.ones(self.count) if self.weights is None else self.weights

    def at(self, t: float) -> Tensor:
        """``"batch *shape"``: the states at a time between the first and the last.

        Raises:
            ValueError: if they were not kept.
        """
        if not self.whole:
            raise ValueError(f"of these paths the ends alone were kept, not the states at {t:g}.")
        angles = _angles(self.schedule, self.times)
        angle = float(_angles(self.schedule, np.array([t]))[0])
        k = int(np.clip(np.searchsorted(-angles, -angle, side="right") - 1, 0, len(angles) - 2))
        if angle == angles[k]:
            return self.states[k]
        h = float(angles[k + 1] - angles[k])
        s = (angle - float(angles[k])) / h
        ends = [self._scaled(j, float(angles[j])) for j in (k, k + 1)]
        weights = ((1 + 2 * s) * (1 - s) ** 2, s * (1 - s) ** 2 * h, s**2 * (3 - 2 * s), s**2 * (s - 1) * h)
        u = weights[0] * ends[0][0] + weights[1] * ends[0][1] + weights[2] * ends[1][0] + weights[3] * ends[1][1]
        return u * math.hypot(float(self.schedule.alpha(t)), float(self.schedule.sigma(t)))

    def _scaled(self, k: int, angle: float) -> tuple[Tensor, Tensor]:
        """U and its slope at node k."""
        t = float(self.times[k])
        u = self.states[k] / math.hypot(float(self.schedule.alpha(t)), float(self.schedule.sigma(t)))
        return u, (math.cos(angle) * u - self.predictions[k]) / math.sin(angle)

    def take(self, rows: NDArray[np.intp] | slice) -> Paths:
        """Some of the paths."""
        picked = rows if isinstance(rows, slice) else torch.from_numpy(np.asarray(rows)).to(self.states.device)
        return replace(
            self,
            states=self.states[:, picked],
            predictions=self.predictions[:, picked],
            target=self.target[picked],
            cond=take_rows(self.cond, picked),
            weights=None if self.weights is None else self.weights[rows],
        )

    def ends(self) -> Paths:
        """Without the states between, which are nearly all of the memory."""
        kept = [0, -1]
        return replace(self, times=self.times[kept], states=self.states[kept], predictions=self.predictions[kept], whole=False)

    def joined(self, other: Paths) -> Paths:
        """These and others on the same grid, or the ends of both."""
        return replace(
            self,
            states=torch.cat([self.states, other.states], 1),
            predictions=torch.cat([self.predictions, other.predictions], 1),
            target=torch.cat([self.target, other.target]),
            cond={name: join_rows(value, other.cond[name]) for name, value in self.cond.items()},
            weights=np.concatenate([self.shares, other.shares]),
        )


def join_rows(first: Any, second: Any) -> Any:
    """Two conditions along the batch, where there is one."""
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat([first, second])
    if isinstance(first, np.ndarray) and first.ndim:
        return np.concatenate([first, second])
    if isinstance(first, Mapping):
        return {name: join_rows(value, second[name]) for name, value in first.items()}
    if type(first) in (list, tuple):
        return type(first)([join_rows(one, other) for one, other in zip(first, second, strict=True)])
    return first


def take_rows(cond: Mapping[str, Any], rows: Any) -> dict[str, Any]:
    """The conditions of some samples: arrays that have one entry a sample by row, also inside dictionaries and lists; the rest as it is."""
    return {name: _rows_of(value, rows) for name, value in cond.items()}


def arrays_of(value: Any) -> list[Any]:
    """The arrays that have a batch, in a condition."""
    if isinstance(value, (Tensor, np.ndarray)):
        return [value] if value.ndim else []
    inner = list(value.values()) if isinstance(value, Mapping) else list(value) if type(value) in (list, tuple) else []
    return [array for item in inner for array in arrays_of(item)]


def _rows_of(value: Any, rows: Any) -> Any:
    if isinstance(value, Tensor):
        return value[rows] if value.ndim else value
    if isinstance(value, np.ndarray):
        return value[rows.cpu().numpy() if isinstance(rows, Tensor) else rows] if value.ndim else value
    if isinstance(value, Mapping):
        return {name: _rows_of(item, rows) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rows_of(item, rows) for item in value)
    return value


@torch.no_grad()
def trace_paths(
    denoiser: DenoiserLike,
    noise: Tensor,
    schedule: NoiseSchedule,
    *,
    calls: int,
    cond: Mapping[str, Any] | None = None,
    final: str = "t_end",
) -> Paths:
    """Solve from noise to data with `calls` calls (the third-order Adams method in the flow velocity), and keep everything.

    The error is estimated on the first eighth of the noises (at least one), with half as many calls.

    Args:
        denoiser: ``D(x, t, **cond)``.
        noise: ``"batch *shape"``, at the scale of the schedule's start.
        schedule: the denoiser's.
        calls: of the network, at least 8.
        cond: conditions.
        final: ``"t_end"``: the target is the state there; ``"zero"``: the data prediction made of it.

    Raises:
        FewstepError: if the paths are not finite.
    """
    if calls < 8:
        raise ValueError(f"reference trajectories need at least 8 calls, got {calls}.")
    cond = dict(cond or {})
    grid = make_grid("auto", schedule, calls)
    times, states, predictions, samples = _solved(denoiser, noise, schedule, grid, cond)
    target = samples
    if float(schedule.sigma(times[-1])) == 0.0:
        times, states = times[:-1], states[:-1]
    else:
        predictions = torch.cat([predictions, denoiser(samples, float(times[-1]), **cond)[None]])
        target = predictions[-1] if final == "zero" else target
    if not bool(torch.isfinite(target).all()):
        raise FewstepError("the reference trajectories are not finite: see fewstep.check for how the network is wrapped.")
    few = max(1, len(noise) // 8)
    coarse = np.append(grid[:-1:2], grid[-1])
    half = _solved(denoiser, noise[:few], schedule, coarse, take_rows(cond, slice(few)))[-1]
    error = float((half - samples[:few]).double().square().mean().sqrt())
    return Paths(schedule, times, states, predictions, target, cond, error)


def _solved(
    denoiser: DenoiserLike, noise: Tensor, schedule: NoiseSchedule, grid: Floats, cond: Mapping[str, Any]
) -> tuple[Floats, Tensor, Tensor, Tensor]:
    """Times, states, predictions of all but the last, and the last state, on a grid.

    Where the prediction jumps there are two nodes, one with the prediction on either side, and the solver begins anew.
    """
    solver = Adams(order=3, prediction="flow", corrector="start")
    jumps = sorted((t for t in getattr(denoiser, "jumps", ()) if grid[-1] < t < grid[0]), reverse=True)
    ends, state = [float(grid[0]), *jumps, float(grid[-1])], noise
    times, states, predictions = [], [], []
    for begin, end in pairwise(ends):
        part = np.array([begin, *(t for t in grid if end < t < begin), end])
        run = sample(denoiser, state, solver.plan(schedule, grid=part), cond=cond, trajectory=True)
        state = run.samples
        here, visited, outputs = np.array(run.times, np.float64), run.states, run.predictions
        if end == ends[-1]:
            times, states, predictions = [*times, here], [*states, visited], [*predictions, outputs]
        else:
            here[-1] = np.nextafter(end, np.inf)
            before = denoiser(state, float(here[-1]), **cond)[None]
            times, states, predictions = [*times, here], [*states, visited], [*predictions, outputs, before]
    return np.concatenate(times), torch.cat(states), torch.cat(predictions), state


def _angles(schedule: NoiseSchedule, times: Floats) -> Floats:
    return np.arctan2(schedule.sigma(times), schedule.alpha(times))
