r"""DualFast: a noise prediction that is pushed away from an earlier one, around any multistep solver. Experimental.

It lowers the error of DDIM, and takes its order from a solver of order 2 or more; see the page of the method for what was measured.

Source: "DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models" (arXiv 2506.13058). The authors' code is not
public. With $h = \lambda_t - \lambda_s$, the noise prediction $\epsilon_s = (x_s - \alpha_s D_s)/\sigma_s$ in the first-order term of a
step is replaced by

$$ \hat\epsilon_s = (1 + c)\,\epsilon_s - c\,\epsilon_\tau, \qquad
   x_t \mathrel{+}= -\sigma_t (e^h - 1)\, c\, (\epsilon_s - \epsilon_\tau), $$

with an earlier, noisier time $\tau$ and $c \ge 0$. Terms of higher order stay as they are. A data-prediction solver with
$\hat D = (x_s - \sigma_s \hat\epsilon_s)/\alpha_s$ in its first-order term gets the same correction, so there is one formula for
both. The factor is $\sigma_t (e^h - 1) = \alpha_t \sigma_s / \alpha_s - \sigma_t$, finite at $\sigma_t = 0$.

With the step before as $\tau$ and $c = h / 2 h_{before}$ around DDIM, this *is* the second-order DPM-Solver multistep. With $c$ fixed and
the first time as $\tau$, the method does not converge to the ODE.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UnknownNameError
from fewstep.plan import Row
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver, Wrapper, per_call

__all__ = ["DualFast"]

ANCHORS = ("previous", "first")
DUST = 1e-14
"""What is left of 1 - 1 where a noise-prediction solver stores the noise itself."""


@dataclass(frozen=True)
class DualFast(Wrapper):
    """DualFast around a deterministic solver of one call a step.

    Args:
        solver: what it corrects.
        weight: c of the second call, which falls linearly to 0 at the last call; or a sequence with c of every call after the first
            (as many as calls less one). 0 gives exactly the rows of `solver`.
        anchor: the earlier time: that of the step before (``"previous"``) or the first of all (``"first"``).

    Raises:
        ValueError: for a weight that is negative or not finite, an anchor that does not exist, or a solver of several calls a step;
            when planning, for a stochastic solver, or a sequence that does not fit the calls.
        TypeError: for a weight that is neither a number nor a sequence of them.

    Note:
        The paper's weights could not be compared: there is no public code or table of them. The fall from 0.5 to 0 is ours; a sequence
        takes any other, also one that grows.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> from fewstep.solvers.ddim import DDIM
        >>> DualFast(DDIM(), weight=0.3).plan(VPLinear(), nfe=5).nfe
        5
    """

    source: ClassVar[str] = "DualFast, arXiv 2506.13058"

    solver: Solver
    weight: float | tuple[float, ...] = 0.5
    anchor: str = "previous"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", per_call(self.weight, "the weight of DualFast"))
        given = self.weight if isinstance(self.weight, tuple) else (self.weight,)
        if not all(math.isfinite(weight) and weight >= 0.0 for weight in given):
            raise ValueError(f"the weight of DualFast must be finite and at least 0, got {self.weight!r}.")
        if self.anchor not in ANCHORS:
            raise UnknownNameError("anchor", self.anchor, ANCHORS)
        if self.solver.stages > 1:
            raise ValueError(
                f"DualFast needs a solver of one call a step, {type(self.solver).__name__} takes {self.solver.stages}."
            )

    @property
    def claimed_order(self) -> int:
        if not np.any(self.weight):
            return self.solver.claimed_order
        return 1 if self.anchor == "previous" else 0

    def rows(self, schedule: NoiseSchedule, times: NDArray[np.float64], calls: Sequence[int]) -> Iterator[Row]:
        rows = list(self.solver.rows(schedule, times, calls))
        levels = np.array([*(row.tau for row in rows), times[-1]])
        alpha, sigma = schedule.alpha(levels), schedule.sigma(levels)
        if any(row.noise is not None for row in rows):
            raise ValueError("DualFast corrects the step of an ODE; the solver it was given draws noise.")
        for i, c in enumerate(self._weights(len(rows))):
            if c == 0.0:
                yield rows[i]
                continue
            factor = c * float(alpha[i + 1] * sigma[i] / alpha[i] - sigma[i + 1])
            step = _Terms(rows[i], i)
            for j, sign in ((i, -factor), (i - 1 if self.anchor == "previous" else 0, factor)):
                step.add_noise_prediction(j, sign, rows[j], float(alpha[j]), float(sigma[j]))
            yield replace(rows[i], carry=tuple(step.carry), weights=tuple(step.weights))

    def _weights(self, nfe: int) -> list[float]:
        """C of every call; the first has nothing to look back on."""
        if not isinstance(self.weight, tuple):
            return [0.0, *(self.weight * (1.0 - i / (nfe - 1)) for i in range(1, nfe))]
        if len(self.weight) != nfe - 1:
            raise ValueError(
                f"a plan of {nfe} calls needs {nfe - 1} weights, one for every call after the first, got {len(self.weight)}."
            )
        return [0.0, *self.weight]


class _Terms:
    """The linear combination of call i, to be added to."""

    def __init__(self, row: Row, i: int):
        self.i = i
        self.carry: list[Any] = [*row.carry, *[0.0] * (i + 1 - len(row.carry))]
        self.weights: list[Any] = [*row.weights, *[0.0] * (i + 1 - len(row.weights))]

    def add_noise_prediction(self, j: int, factor: float, row: Row, alpha: float, sigma: float) -> None:
        """Add factor (z_j - alpha d_j) / sigma, with d_j taken back from the output o_j = p z_j + q d_j + sum r o that is stored."""
        back, scale = self.i - j, factor / sigma
        if alpha == 0.0:
            self.carry[back] = self.carry[back] + scale
            return
        share = 1.0 + alpha * row.state_gain / row.output_gain
        self.carry[back] = self.carry[back] + scale * np.where(np.abs(share) < DUST, 0.0, share)[()]
        self.weights[back] = self.weights[back] - scale * alpha / row.output_gain
        for k, r in enumerate(row.memory, start=1):
            self.weights[back + k] = self.weights[back + k] + scale * alpha * r / row.output_gain
