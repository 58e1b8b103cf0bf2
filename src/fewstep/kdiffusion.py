r"""Functions with k-diffusion's signature, ``(model, x, sigmas, extra_args, callback, disable)``, of every solver and any saved plan.

A host of such functions owns the noise levels and the model. Its state is $x = x_0 + \sigma\varepsilon$ (or, for flow models in ComfyUI,
$x = (1-\sigma)x_0 + \sigma\varepsilon$), its model returns the data prediction. A solver plans through the host's levels; a saved plan
brings its own, and states are scaled where it was made for another noise schedule: two schedules differ, at equal sigma / alpha, by a
factor.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.errors import PlanError, UnknownNameError
from fewstep.grids import check_grid
from fewstep.noise import check_seeds
from fewstep.plan import Interval, Plan
from fewstep.sampler import Hooks, sample
from fewstep.schedules import EDM, Flow, NoiseSchedule
from fewstep.solver import Solver
from fewstep.solvers import make_solver

__all__ = ["KDiffusionSampler", "kdiffusion_sampler"]

Floats = NDArray[np.float64]
SPACES = ("ve", "flow")
REMEMBERED_PLANS = 16
SAME_END = 0.01
"""How far, relatively, the ends of the host's noise levels may lie from those of a saved plan."""
HIGHEST_SEED = 2**62


class _Way(NamedTuple):
    """A plan as a host runs it.

    `sigmas`: the host's noise level at every call. `scales`: host state / plan state there, and `ends`: of the first and the last state.
    `steps`: the host's step that a call begins, or None. `noise`: what is added to the host's state after a call.
    """

    plan: Plan
    sigmas: tuple[float, ...]
    scales: tuple[float, ...]
    ends: tuple[float, float]
    steps: tuple[int | None, ...]
    noise: tuple[tuple[Any, float, float] | None, ...]
    clock: tuple[Interval | None, ...]


class KDiffusionSampler:
    """What `kdiffusion_sampler` returns: call it as one of k-diffusion's functions.

    Attributes:
        solver: the solver, or None of a saved plan.
        plan: the saved plan, or None of a solver.
        space: how the host's states are made: ``"ve"`` or ``"flow"``.
    """

    def __init__(self, solver: Solver | None, plan: Plan | None, space: str, name: str):
        self.solver, self.plan, self.space = solver, plan, space
        self.__name__ = f"sample_{name}"
        self._way = lru_cache(REMEMBERED_PLANS)(self._make_way)

    def __repr__(self) -> str:
        return f"KDiffusionSampler({self.solver if self.plan is None else self.plan!r}, space={self.space!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return KDiffusionSampler, (self.solver, self.plan, self.space, self.__name__.removeprefix("sample_"))

    @property
    def sigmas(self) -> Tensor | None:
        """The noise levels ``"K+1"`` that a saved plan wants from its host; None of a solver, which takes any."""
        return None if self.plan is None else torch.from_numpy(_own_levels(self.plan, self.space))

    @torch.no_grad()
    def __call__(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
        *,
        noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
        seeds: Iterable[int] | Tensor | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            model: ``model(x, sigma, **extra_args)`` -> data prediction; sigma is a vector ``"batch"``.
            x: ``"batch *shape"``, the state at the first noise level.
            sigmas: ``"K+1"``, decreasing; the last may be 0.
            extra_args: handed to the model.
            callback: called at the begin of every step with ``{"x", "i", "sigma", "sigma_hat", "denoised"}``.
            disable: show no progress bar; None: only in a terminal.
            noise_sampler: ``(sigma, sigma_next)`` -> Gaussian noise of unit variance in x's shape, as k-diffusion's.
            seeds: one whole number a sample, for the noise if there is no `noise_sampler`. Left out, they count up from
                ``extra_args["seed"]``; without that they are drawn from torch's generator, as k-diffusion's are.

        Raises:
            GridError: if the noise levels do not decrease.
            PlanError: if a saved plan is asked for other noise levels.
        """
        levels = tuple(torch.as_tensor(sigmas).detach().cpu().double().tolist())
        if len(levels) < 2:
            return x
        way, given = self._way(levels), dict(extra_args or {})
        run = _Run(way, model, given, callback, x.dtype)
        state: Callable[[int, float, Tensor], Tensor] | None = None
        plan, wanted = way.plan, None
        if any(way.clock) and noise_sampler is None:
            wanted = _seeds(seeds, given, len(x))
            rows = (dataclasses.replace(row, noise=noise) for row, noise in zip(plan.rows, way.clock, strict=True))
            plan = dataclasses.replace(plan, rows=tuple(rows))
        elif any(way.clock) and noise_sampler is not None:
            state = _Noise(way, noise_sampler, x)
        out = sample(
            run,
            x if way.ends[0] == 1.0 else x / way.ends[0],
            plan,
            seeds=wanted,
            progress=sys.stderr.isatty() if disable is None else not disable,
            hooks=Hooks(denoiser=run.at, state=state),
        )
        return (out if way.ends[1] == 1.0 else out * way.ends[1]).to(x.dtype)

    def _make_way(self, levels: tuple[float, ...]) -> _Way:
        host = _host_schedule(levels, self.space)
        if self.solver is not None:
            times, calls = self.solver._steps(host, None, check_grid(levels, host), None, "t_end")
            plan = self.solver.plan(host, grid=times)
            steps = [k if m == 0 else None for k, count in enumerate(calls) for m in range(count)]
        else:
            assert self.plan is not None
            plan, steps = self.plan, _steps_of(self.plan, levels, self.space)
        sigmas, scales = _at_host(plan, plan.tau, self.space)
        _, ends = _at_host(plan, np.array([plan.noise_time, plan.grid[-1]]), self.space)
        bare = (dataclasses.replace(row, noise=None) for row in plan.rows)
        return _Way(
            Plan(plan.schedule, plan.grid, tuple(bare), plan.start, {"solver": plan.provenance.get("solver", {})}),
            tuple(sigmas.tolist()),
            tuple(scales.tolist()),
            (float(ends[0]), float(ends[1])),
            tuple(steps),
            _noise_levels(plan, self.space),
            tuple(row.noise for row in plan.rows),
        )


def kdiffusion_sampler(solver: str | Solver | Plan | PathLike[str], *, space: str = "ve", **options: Any) -> KDiffusionSampler:
    r"""A function with k-diffusion's signature.

    Args:
        solver: a solver or its name (`fewstep.solver_names`), a plan, or the path of a saved one.
        space: the host's states: ``"ve"`` for $x_0 + \sigma\varepsilon$, ``"flow"`` for $(1-\sigma)x_0 + \sigma\varepsilon$ (flow models in
            ComfyUI).
        **options: of a solver given by name.

    Note:
        A solver plans through exactly the host's noise levels, which are those of its steps: multistep methods call the model once a step,
        single-step methods as often as they have stages.

        A saved plan keeps its own times. It runs if the host asks for as many steps from about the same noise level to about the same end
        (1 %); `KDiffusionSampler.sigmas` are the levels to ask for. Model and guidance are the host's, and not compared with what the plan
        was tuned for.

    Raises:
        UnknownNameError: for an unknown name or space.
        TypeError: for options of something that is no name, or that the solver does not have.

    Example:
        >>> sampler = kdiffusion_sampler("dpmpp_2m")
        >>> model = lambda x, sigma: x / (1 + sigma[:, None] ** 2)
        >>> sampler(model, 10 * torch.ones(1, 2), torch.tensor([10.0, 1.0, 0.1, 0.0])).shape
        torch.Size([1, 2])
    """
    if space not in SPACES:
        raise UnknownNameError("space", space, SPACES)
    if isinstance(solver, PathLike) or (isinstance(solver, str) and solver.endswith(".safetensors")):
        solver = Plan.load(fspath(solver))
    if isinstance(solver, str):
        return KDiffusionSampler(make_solver(solver, **options), None, space, solver)
    if options:
        raise TypeError(f"options are for a solver given by name; {type(solver).__name__} has its own.")
    if isinstance(solver, Plan):
        return KDiffusionSampler(None, solver, space, "plan")
    return KDiffusionSampler(solver, None, space, type(solver).__name__)


# ---- a run -------------------------------------------------------------------------------------------------------------------------


class _Run:
    """The host's model as a denoiser of the plan's states."""

    def __init__(self, way: _Way, model: Callable[..., Tensor], extra_args: dict[str, Any], callback: Any, dtype: torch.dtype):
        self.way, self.model, self.extra_args, self.callback, self.dtype = way, model, extra_args, callback, dtype

    def __call__(self, z: Tensor, t: float) -> Tensor:
        raise AssertionError("the loop asks `at` for the denoiser of every call")

    def at(self, i: int) -> Callable[[Tensor, float], Tensor]:
        """The denoiser of call i."""
        return lambda z, t: self._call(i, z)

    def _call(self, i: int, z: Tensor) -> Tensor:
        sigma, scale = self.way.sigmas[i], self.way.scales[i]
        x = (z if scale == 1.0 else z * scale).to(self.dtype)
        d = self.model(x, x.new_full((len(x),), sigma), **self.extra_args)
        if self.callback is not None and self.way.steps[i] is not None:
            level = x.new_tensor(sigma)
            self.callback({"x": x, "i": self.way.steps[i], "sigma": level, "sigma_hat": level, "denoised": d})
        return d.to(z.dtype) if isinstance(d, Tensor) else d


class _Noise:
    """The hook that adds a host's noise."""

    def __init__(self, way: _Way, sampler: Callable[[Tensor, Tensor], Tensor], x: Tensor):
        self.way, self.sampler, self.like = way, sampler, x

    def __call__(self, i: int, t: float, z: Tensor) -> Tensor:
        found = self.way.noise[i]
        if found is None:
            return z
        scale, sigma, sigma_next = found
        xi = self.sampler(self.like.new_tensor(sigma), self.like.new_tensor(sigma_next)).to(z)
        return z + (scale if isinstance(scale, float) else torch.from_numpy(scale.copy()).to(z)) * xi


def _seeds(seeds: Iterable[int] | Tensor | None, extra_args: Mapping[str, Any], count: int) -> list[int]:
    if seeds is not None:
        return check_seeds(seeds, count)
    first = extra_args.get("seed")
    if first is not None:
        return [int(first) + i for i in range(count)]
    return torch.randint(HIGHEST_SEED, (count,)).tolist()


# ---- before a run ------------------------------------------------------------------------------------------------------------------


def _host_schedule(levels: tuple[float, ...], space: str) -> NoiseSchedule:
    """The host's noise schedule, on which time is sigma."""
    if space == "flow":
        return Flow(t_start=levels[0], t_end=levels[-1]) if levels[0] > levels[-1] else Flow()
    lowest = min((level for level in levels if 0.0 < level < levels[0]), default=0.5 * levels[0])
    return EDM(lowest, levels[0], t_end=levels[-1]) if levels[0] > levels[-1] >= 0.0 else EDM()


def _at_host(plan: Plan, times: Floats, space: str) -> tuple[Floats, Floats]:
    """Of times of a plan: the host's noise level, and host state / plan state."""
    schedule, host = plan.schedule, Flow() if space == "flow" else EDM()
    if host.same_noise(schedule):
        return times.astype(np.float64), np.ones(len(times))
    with np.errstate(divide="ignore"):
        levels = host.t_of_lam(schedule.lam(times))
    if not np.isfinite(levels).all():
        raise PlanError(
            'the plan starts from pure noise, alpha = 0, which no state x_0 + sigma eps can hold: use space="flow", or plan from a start '
            "below it."
        )
    sigma, alpha = schedule.sigma(times), schedule.alpha(times)
    clean = sigma == 0.0
    scales = np.where(clean, host.alpha(levels), host.sigma(levels)) / np.where(clean, alpha, sigma)
    return levels, scales


def _own_levels(plan: Plan, space: str) -> Floats:
    """The host's noise levels at a plan's states, without those of stages that do not go on; first that of the noise it starts from."""
    levels, _ = _at_host(plan, np.array([plan.noise_time, *plan.grid[1:]]), space)
    lowest = np.minimum.accumulate(levels)
    return levels[np.concatenate([[True], levels[1:] < lowest[:-1]])]


def _steps_of(plan: Plan, levels: tuple[float, ...], space: str) -> list[int | None]:
    """The host's step that every call of a saved plan begins; refuses levels that are not the plan's."""
    own = _own_levels(plan, space)
    ends = np.array([[own[0], own[-1]], [levels[0], levels[-1]]])
    fits = np.abs(ends[0] - ends[1]) <= SAME_END * np.minimum(*ends)
    if len(levels) - 1 not in (plan.nfe, len(own) - 1) or not fits.all():
        raise PlanError(
            f"this plan takes {len(own) - 1} steps from sigma {own[0]:.4g} to {own[-1]:.4g}, but the host asks for {len(levels) - 1} from "
            f"{levels[0]:.4g} to {levels[-1]:.4g}: hand it the plan's own noise levels, `sampler.sigmas`."
        )
    if len(levels) - 1 == plan.nfe:
        return list(range(plan.nfe))
    at, steps, last = _at_host(plan, plan.grid[:-1], space)[0], [], -1
    for level in at.tolist():
        step = min(int(np.searchsorted(-own, -level, side="right")) - 1, len(own) - 2)
        steps.append(step if step > last else None)
        last = max(last, step)
    return steps


def _noise_levels(plan: Plan, space: str) -> tuple[tuple[Any, float, float] | None, ...]:
    """Of every row: the scale of its noise, and the host's levels between which it is drawn.

    An interval begins where an earlier one ended; if none did, where the oldest state lies that its row carries on.
    """
    if not plan.stochastic:
        return (None,) * plan.nfe
    levels, known, found = _at_host(plan, plan.grid, space)[0].tolist(), {}, []
    for i, row in enumerate(plan.rows):
        if row.noise is None:
            found.append(None)
            continue
        begin = known.get(row.noise.begin, levels[i - max(0, len(row.carry) - 1)])
        end = known.setdefault(row.noise.end, levels[i + 1])
        known.setdefault(row.noise.begin, begin)
        found.append((row.noise.scale, begin, end))
    return tuple(found)
