r"""Multistep methods with a corrector: the parts of a step, and how they become rows of a plan.

Call i sees the *predicted* state $z_i$. Once its output $o_i$ is known, a corrector replaces the state, at no call, by

$$ x_i = z_i + \sum_{k \ge 0} v_{ik}\, o_{i-k} + e'_i, \qquad\text{and then}\qquad
   z_{i+1} = c_i x_i + \sum_{k \ge 0} w_{ik}\, o_{i-k} + e_i . $$

A plan has no corrected states: its row carries $c_i z_i$ and has the weights $c_i v_{ik} + w_{ik}$. The parts are kept apart up to here
for what must treat them apart, as dynamic compensation does.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from fewstep.numerics import lagrange_polynomials
from fewstep.plan import Entry, Interval, Row
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver

__all__ = ["Multistep", "Step", "added", "taylor_weights", "trapezoidal_end"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """One call, the correction that its output makes, and the predictor step after it; newest first in every sequence.

    Args:
        tau: time handed to the network.
        carry: c, on the corrected state.
        weights: w of the predictor, on the stored outputs o_i, o_{i-1}, ...
        state_gain, output_gain: o_i = state_gain z_i + output_gain d_i.
        stores: what o_i is, ``"data"``, ``"noise"`` or ``"v3"``; only outputs of one kind may be combined into another output.
        correction: v, on o_i, o_{i-1}, ...; empty for no correction.
        offset, correction_offset: e and e'.
        noise: as of `fewstep.plan.Row`.
    """

    tau: float
    carry: Entry
    weights: tuple[Entry, ...]
    state_gain: Entry = 0.0
    output_gain: Entry = 1.0
    stores: str = "data"
    correction: tuple[Entry, ...] = ()
    offset: Entry = 0.0
    correction_offset: Entry = 0.0
    noise: Interval | None = None

    def row(self) -> Row:
        """The row of a plan, the correction folded in.

        Example:
            >>> Step(0.5, 0.5, (1.0, 2.0), correction=(4.0,)).row().weights
            (3.0, 2.0)
        """
        weights = added(self.weights, [self.carry * v for v in self.correction])
        offset = self.offset + self.carry * self.correction_offset
        return Row(self.tau, (self.carry,), weights, self.state_gain, self.output_gain, offset=offset, noise=self.noise)


class Multistep(Solver):
    """Interface of solvers that can say the parts of their steps."""

    @abc.abstractmethod
    def steps(self, schedule: NoiseSchedule, times: Floats) -> Iterator[Step]:
        """The steps on a checked grid ``"N+1"``, one a call."""

    def rows(self, schedule: NoiseSchedule, times: Floats, calls: Sequence[int]) -> Iterator[Row]:
        return (step.row() for step in self.steps(schedule, times))


def added(first: Sequence[Entry], second: Sequence[Entry]) -> tuple[Entry, ...]:
    """The sum of two sequences of entries, the shorter one filled with zeros.

    Example:
        >>> added([1.0], [2.0, 3.0])
        (3.0, 3.0)
    """
    return tuple(a + b for a, b in zip_longest(first, second, fillvalue=0.0))


def taylor_weights(moments: Sequence[Entry], offsets: Sequence[float], derivatives: Sequence[Sequence[int]]) -> list[Entry]:
    r"""Weights of values g_j in $\sum_k E_k\, g^{(k)}$, a step that integrates the Taylor polynomial of g at the place 0.

    $g^{(0)}$ is the first value; $g^{(k)}$ is the k-th derivative of the polynomial through the first value and some others.

    Args:
        moments: E_0, E_1, ...: numbers or arrays.
        offsets: where the values lie, 0 first.
        derivatives: for k = 1, 2, ...: which of the other values (numbers from 1 on) estimate $g^{(k)}$, at least k of them.

    Example:
        >>> [float(w) for w in taylor_weights([1.0, 0.5], [0.0, -2.0], [[1]])]  # 1 g_0 + 0.5 (g_0 - g_1) / 2
        [1.25, -0.25]
    """
    weights: list[Entry] = [moments[0]] + [0.0] * (len(offsets) - 1)
    for k, points in enumerate(derivatives, start=1):
        used = [0, *points]
        estimate = math.factorial(k) * lagrange_polynomials([offsets[j] for j in used])[:, k]
        for j, factor in zip(used, estimate.tolist(), strict=True):
            weights[j] = weights[j] + factor * moments[k]
    return weights


def trapezoidal_end(prediction: str, alpha: Floats, sigma: Floats) -> tuple[Floats, Floats]:
    r"""The end of a first-order step, brought to the trapezoidal rule in the velocity $v = \varepsilon - x_0$.

    With $S = \alpha + \sigma$ the state moves by $d(x / S) = v\,d(\sigma / S)$, so the end lacks
    $\tfrac12 S_1 (\sigma_1 / S_1 - \sigma_0 / S_0)(v_1 - v_0)$. The velocity is tame where the step is long, which the polynomial through
    noise predictions is not: near alpha = 0 their slope is steep, and it overshoots.

    Args:
        prediction: what the method stores, ``"noise"``, ``"data"`` or ``"flow"``.
        alpha, sigma: ``"2"``, at the begin and the end of the step.

    Returns:
        Weights of the states and of the stored values at the step's end and begin, in this order; the state at the end has 1 of its own.

    Example:
        >>> states, values = trapezoidal_end("flow", np.array([0.2, 0.4]), np.array([0.8, 0.6]))
        >>> states.tolist(), values.round(3).tolist()
        ([1.0, 0.0], [-0.1, 0.1])
    """
    scale = alpha + sigma
    half = 0.5 * scale[1] * (sigma[1] / scale[1] - sigma[0] / scale[0]) * np.array([1.0, -1.0])
    of_state, of_value = {  # v in terms of the state and of what is stored, at the begin and the end
        "noise": lambda: (-1.0 / alpha, scale / alpha),
        "data": lambda: (1.0 / sigma, -scale / sigma),
        "flow": lambda: (np.zeros(2), np.ones(2)),
    }[prediction]()
    return np.array([1.0, 0.0]) + half * of_state[::-1], half * of_value[::-1]
