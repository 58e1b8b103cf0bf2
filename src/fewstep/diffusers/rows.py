"""A plan's rows in a loop that belongs to somebody else: the state of a run, and the plans of runs that begin later."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.diffusers.networks import HostNetwork
from fewstep.errors import PlanError
from fewstep.plan import Plan, Row
from fewstep.sampler import Step, open_memory, prepare
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver
from fewstep.solvers import DDIM

__all__ = ["Run", "coefficients_of", "for_outputs", "plan_on", "tail", "version", "working"]

Floats = NDArray[np.float64]


class Run:
    """The state of one run: from the first step after `set_timesteps` to the last."""

    __slots__ = ("drawn", "first", "index", "limited", "outputs", "pieces", "returned", "states", "steps", "version")

    def __init__(self, plan: Plan, x: Tensor, first: int, network: HostNetwork, *, limited: bool):
        coefficients = coefficients_of(plan, network)
        self.limited = coefficients if limited else None
        told = plan if limited else for_outputs(plan, network, coefficients)
        self.steps: list[Step] = prepare(told, x)
        self.states: deque[Tensor]
        self.outputs: deque[Tensor]
        self.states, self.outputs = open_memory(told, x)
        self.first = self.index = first
        self.returned: Tensor | None = None
        self.version = 0
        self.pieces = pieces_of(plan) if plan.stochastic else []
        self.drawn: dict[int, Tensor] = {}

    def take(self, sample: Tensor) -> Tensor:
        """A state of the host's own: it counts, not the one that was returned."""
        self.states[0] = x = sample.to(self.states[0].dtype)
        return x

    def noise(self, i: int, x: Tensor, generator: Any, given: Tensor | None) -> Tensor:
        """Unit noise over the interval of row i, consistent with that of the rows that share some of it."""
        from diffusers.utils.torch_utils import randn_tensor as draw

        if given is not None:
            return given.to(x)
        if len(self.pieces[i]) == 1 and self.pieces[i][0][1] == 1.0 and not self.pieces[i][0][2]:
            return draw(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        total = torch.zeros_like(x)
        for piece, share, needed in self.pieces[i]:
            xi = self.drawn.pop(piece, None)
            if xi is None:
                xi = draw(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            if needed:
                self.drawn[piece] = xi
            total.add_(xi, alpha=share)
        return total


def working(sample: Tensor) -> Tensor:
    """The sample in the precision that a run works in, at least single."""
    return sample if sample.dtype in (torch.float32, torch.float64) else sample.float()


def version(tensor: Tensor) -> int:
    """A number that changes when the tensor is written to. Inference mode does not count; there only another tensor is noticed."""
    return 0 if tensor.is_inference() else tensor._version


def coefficients_of(plan: Plan, network: HostNetwork) -> list[tuple[float, float]]:
    """A and b of d = a x + b f at every call."""
    pairs = []
    for i, tau in enumerate(plan.tau):
        alpha, sigma = float(plan.schedule.alpha(tau)), float(plan.schedule.sigma(tau))
        if network.says_nothing_at(alpha):
            raise PlanError(
                f"at call {i + 1} alpha is 0, where a noise prediction says nothing about the data. Start later, or say what the network "
                f"predicts with prediction_type=."
            )
        pairs.append(network.coefficients(alpha, sigma))
    return pairs


def for_outputs(plan: Plan, network: HostNetwork, coefficients: list[tuple[float, float]]) -> Plan:
    """The same run with the network's own outputs in place of the data predictions, and what is stored scaled to a gain of 1 of them."""
    known = plan.prepared.get(("outputs", network))
    if known is not None:
        return known
    rows, gains = [], []
    for row, (a, b) in zip(plan.rows, coefficients, strict=True):
        state, output = row.state_gain + row.output_gain * a, row.output_gain * b
        gain = output if isinstance(output, float) and output != 0.0 else 1.0
        gains.append(gain)
        i = len(rows)
        rows.append(
            Row(
                tau=row.tau,
                carry=row.carry,
                weights=tuple(w * gains[i - k] for k, w in enumerate(row.weights)),
                state_gain=state / gain,
                output_gain=1.0 if gain is output else output,
                memory=tuple(r * gains[i - k] / gain for k, r in enumerate(row.memory, start=1)),
                offset=row.offset,
                noise=row.noise,
            )
        )
    made = Plan(plan.schedule, plan.grid, tuple(rows))
    plan.prepared["outputs", network] = made
    return made


def pieces_of(plan: Plan) -> list[list[tuple[int, float, bool]]]:
    """For every row the pieces of the clock that its interval consists of: number, square root of its share, whether later rows need it."""
    edges = sorted({edge for row in plan.rows if row.noise is not None for edge in (row.noise.begin, row.noise.end)})
    used: list[list[int]] = [
        []
        if row.noise is None
        else [k for k in range(len(edges) - 1) if row.noise.begin <= edges[k] and edges[k + 1] <= row.noise.end]
        for row in plan.rows
    ]
    last = {k: i for i, row in enumerate(used) for k in row}
    return [
        [(k, math.sqrt((edges[k + 1] - edges[k]) / (edges[row[-1] + 1] - edges[row[0]])), last[k] > i) for k in row]
        for i, row in enumerate(used)
    ]


def plan_on(solver: Solver, schedule: NoiseSchedule, times: Floats, nfe: int | None = None) -> Plan:
    """The plan of a solver with one call at each of these times, but for inner stages, which single-step methods place themselves.

    Where a solver's steps differ in calls, and times are those of its steps, `nfe` says the calls; left out, the most they can take.
    """
    if solver.stages == 1 or solver.even:
        return solver.plan(schedule, nfe if solver.even else None, grid=times)
    ends_clean = float(schedule.sigma(times[-1])) == 0.0
    if not ends_clean:
        schedule = dataclasses.replace(schedule, t_end=float(times[-1]))  # type: ignore[type-var]

    def rule(schedule: NoiseSchedule, nfe: int, t_start: float, t_end: float) -> Floats:
        if nfe == len(times) - 1:
            return times
        return np.interp(np.linspace(0.0, 1.0, nfe + 1), np.linspace(0.0, 1.0, len(times)), times)

    return solver.plan(schedule, len(times) - 1, rule, start=float(times[0]), final="zero" if ends_clean else "t_end")


def tail(plan: Plan, first: int) -> Plan:
    """The rest of a single-step plan. Stages of a step that was begun before are first-order steps between the noise levels of the plan."""
    cut = next(i for i in range(first, plan.nfe + 1) if all(reach_of(row) <= k - i for k, row in enumerate(plan.rows) if k >= i))
    rows, lams = [], plan.schedule.lam(plan.grid)
    for i in range(first, cut):
        still = not lams[i] < lams[i + 1]
        rows.append(Row(plan.tau[i], (1.0,), ()) if still else DDIM().plan(plan.schedule, grid=plan.grid[i : i + 2]).rows[0])
    rows = [dataclasses.replace(row, tau=plan.tau[first + i]) for i, row in enumerate(rows)]
    return Plan(plan.schedule, plan.grid[first:], (*rows, *plan.rows[cut:]), provenance=plan.provenance)


def reach_of(row: Row) -> int:
    """How many calls before its own a row looks back."""
    return max(len(row.carry) - 1, len(row.weights) - 1, len(row.memory))
