r"""Plans for other runtimes: a JSON table that twenty lines of any language can run, and the loop as a straight-line torch module.

`table` writes down everything a run needs, alpha and sigma at every call included, so that nothing of fewstep is needed to run it; the
page "Export" has runners in NumPy and JavaScript. `unrolled` is the same run as a `torch.nn.Module`, for ``torch.compile``,
``torch.export`` and CUDA graphs: everything is computed before its forward, which draws nothing and reads nothing from the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.artefacts import json_value
from fewstep.denoisers import Denoiser
from fewstep.errors import PlanError
from fewstep.noise import BrownianPath, check_seeds
from fewstep.plan import Entry, Plan
from fewstep.sampler import Hooks, Step, check_fit, sample, steps_of

__all__ = ["Unrolled", "draws", "table", "unrolled"]

VERSION = 1


def table(
    plan: Plan, shape: Sequence[int] | None = None, *, network_time: Callable[[np.ndarray], Any] | None = None
) -> dict[str, Any]:
    """A plan as JSON values.

    Args:
        plan: any plan.
        shape: of one sample. With it arrays are written at full size, so that a runner needs no broadcasting.
        network_time: ``den.network_time`` of a denoiser that was wrapped with a time of its own; left out, that of the plan's schedule:
            the (fractional) index of a table, or the schedule's own time.

    Returns:
        ``"format": "fewstep-plan"``, ``"version"``, ``"schedule"``, ``"provenance"``, ``"digest"``; ``"start"``: null or the transform of
        the noise; ``"steps"``, one a call; ``"end"``: time, alpha and sigma of the samples. Numbers are written so that they read back bit
        for bit. An array is ``{"shape": [...], "data": [...]}``, row by row.

    Raises:
        PlanError: if the plan's arrays do not fit the shape.

    Example:
        >>> import fewstep as fs
        >>> steps = table(fs.make_plan("ddim", fs.schedules.EDM(), grid=[80.0, 1.0, 0.0]))["steps"]
        >>> steps[1]["tau"], steps[1]["carry"], steps[1]["weights"]
        (1.0, [], [1.0])
    """

    def entry(value: Entry) -> Any:
        if isinstance(value, (float, int)):
            return float(value)
        array = np.asarray(value)
        if shape is not None:
            try:
                array = np.broadcast_to(array, tuple(shape))
            except ValueError:
                raise PlanError(
                    f"the plan has coefficients of shape {array.shape}, which do not fit samples of {tuple(shape)}."
                ) from None
        return {"shape": list(array.shape), "data": array.ravel().tolist()}

    told = plan.schedule.network_time if network_time is None else network_time

    def level(t: float) -> dict[str, float]:
        return {"alpha": float(plan.schedule.alpha(t)), "sigma": float(plan.schedule.sigma(t))}

    def noise_of(row: Any) -> dict[str, Any] | None:
        return row.noise and {"scale": entry(row.noise.scale), "begin": row.noise.begin, "end": row.noise.end}

    steps = [
        {
            "tau": row.tau,
            "network_time": float(told(np.asarray(row.tau))),
            **level(row.tau),
            "state_gain": entry(row.state_gain),
            "output_gain": entry(row.output_gain),
            "memory": [entry(value) for value in row.memory],
            "carry": [entry(value) for value in row.carry],
            "weights": [entry(value) for value in row.weights],
            "offset": entry(row.offset),
            "noise": noise_of(row),
        }
        for row in plan.rows
    ]
    start = None
    if plan.start is not None:
        basis, gains = plan.start.basis, plan.start.gains
        vectors = [] if basis is None else [{"shape": list(vector.shape), "data": vector.ravel().tolist()} for vector in basis]
        start = {
            "scale": entry(plan.start.scale),
            "shift": entry(plan.start.shift),
            "basis": vectors,
            "gains": [] if gains is None else gains.tolist(),
        }
    return {
        "format": "fewstep-plan",
        "version": VERSION,
        "schedule": plan.schedule.config(),
        "provenance": json_value(plan.provenance),
        "digest": plan.digest,
        "noise": {"tau": plan.noise_time, **level(plan.noise_time)},
        "start": start,
        "steps": steps,
        "end": {"tau": float(plan.grid[-1]), **level(float(plan.grid[-1]))},
    }


def draws(plan: Plan, seeds: Iterable[int] | Tensor, shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The noise that `fewstep.sample` draws during a run, for runs elsewhere.

    Args:
        plan: a stochastic plan; a deterministic one gives zeros, and so does a call after which nothing is added.
        seeds: one whole number a sample.
        shape: of one sample.
        dtype: of the result.

    Returns:
        ``"N batch *shape"``, unit variance.

    Example:
        >>> import fewstep as fs
        >>> plan = fs.make_plan("ddpm", fs.schedules.VPLinear(), nfe=4)
        >>> draws(plan, range(3), (2,)).shape
        torch.Size([4, 3, 2])
    """
    numbers = check_seeds(seeds)
    path = BrownianPath(numbers, shape)
    nothing = np.zeros((len(numbers), *shape))
    found = [nothing if row.noise is None else path.normalised(row.noise.begin, row.noise.end) for row in plan.rows]
    return torch.from_numpy(np.stack(found)).to(dtype)


class Unrolled(torch.nn.Module):
    """A plan and a denoiser as one module; see `unrolled`.

    Attributes:
        plan: what is run; a stochastic plan without its noise, which is given.
        network: the denoiser's network if that is a module, so that its weights are the module's; else None.
    """

    def __init__(self, plan: Plan, denoiser: Callable[..., Tensor], like: Tensor):
        super().__init__()
        network = getattr(denoiser, "network", None)
        self.network = network if isinstance(network, torch.nn.Module) else None
        self.plan = dataclasses.replace(plan, rows=tuple(dataclasses.replace(row, noise=None) for row in plan.rows), provenance={})
        self.plan.prepared[like.dtype] = [_with_numbers(step) for step in steps_of(self.plan, like)]
        assert not self.plan.stochastic  # asked for once: a property that is not yet cached cannot be traced, for its lock
        self._noise = [step.noise and step.noise[0] for step in steps_of(plan, like)]
        self._denoiser = _Straight(denoiser, plan) if isinstance(denoiser, Denoiser) else denoiser

    def forward(self, noise: Tensor, xi: Tensor | None = None, cond: dict[str, Any] | None = None) -> Tensor:
        """Samples ``"batch *shape"``.

        Args:
            noise: ``"batch *shape"``, x_T in the module's precision.
            xi: ``"N batch *shape"``, for stochastic plans; see `draws`.
            cond: conditions, handed to every call.

        Raises:
            PlanError: if a stochastic plan gets no xi.
        """
        if xi is None:
            if any(scale is not None for scale in self._noise):
                raise PlanError("this plan adds noise: pass xi=, for example fewstep.export.draws(plan, seeds, shape).")
            return sample(self._denoiser, noise, self.plan, cond=cond, check=False)

        def add(i: int, t: float, x: Tensor) -> Tensor:
            scale = self._noise[i]
            return x if scale is None else x + scale * xi[i]

        return sample(self._denoiser, noise, self.plan, cond=cond, check=False, hooks=Hooks(state=add))


class _Straight:
    """A denoiser's call with coefficients and network times that were computed before, and no counter."""

    def __init__(self, denoiser: Denoiser, plan: Plan):
        self.network, self.dtype, self.time_like = denoiser.network, denoiser.network_dtype, denoiser._time_like
        self.known = {t: denoiser._coefficients(t) for t in plan.tau.tolist()}

    def __call__(self, x: Tensor, t: float, **cond: Any) -> Tensor:
        a, b, time = self.known[t]
        output = self.network(x if self.dtype is None else x.to(self.dtype), self.time_like(x, time), **cond).to(x.dtype)
        if a == 0.0:
            return output if b == 1.0 else output * b
        return torch.mul(output, b).add_(x, alpha=a)


def unrolled(
    plan: Plan,
    denoiser: Callable[..., Tensor],
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Unrolled:
    """The whole sampling loop of a plan as a module: ``forward(noise, xi=None, cond=None) -> samples``, equal to `fewstep.sample`.

    Args:
        plan: any plan for the denoiser's schedule.
        denoiser: a `fewstep.Denoiser`, whose network is called with coefficients and times that are computed here; any other is called as
            it is, and must be traceable itself.
        shape: of one sample.
        dtype, device: of the state; where the plan's arrays are put.

    Raises:
        PlanError: if the plan was made for another schedule or model, or its arrays do not fit the shape.

    Example:
        >>> import fewstep as fs
        >>> schedule = fs.schedules.EDM()
        >>> den = fs.Denoiser(lambda x, t: 0.5 * x, schedule, predicts="data")
        >>> unrolled(fs.make_plan("dpmpp_2m", schedule, nfe=4), den, (2,))(torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """
    like = torch.empty((1, *shape), dtype=dtype, device=device)
    check_fit(denoiser, plan, like, seeds=())
    return Unrolled(plan, denoiser, like)


def _with_numbers(step: Step) -> Step:
    """The step without tensors for single numbers, which would be inputs of a graph."""
    return step._replace(gains=None if step.gains is None else _numbers(step.gains), terms=_numbers(step.terms))


def _numbers(terms: tuple[tuple[bool, int, Any], ...]) -> tuple[tuple[bool, int, Any], ...]:
    return tuple((stored, k, float(f) if isinstance(f, Tensor) and f.ndim == 0 else f) for stored, k, f in terms)
