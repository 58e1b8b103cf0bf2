"""The numbers of a plan without memory, as tuners change them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fewstep.errors import PlanError
from fewstep.plan import Plan, Row
from fewstep.schedules import NoiseSchedule

__all__ = ["Numbers", "combined", "flat"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Numbers:
    """The numbers of a plan without memory: row i carries z_i and weighs all data predictions so far.

    Attributes:
        tau: ``"N"``, times of the calls.
        end: the last time.
        rows: for every row ``"i+2 *entry"``: the weight of z_i, then those of d_i, d_{i-1}, ..., d_0; an entry is a number, or an array
            that broadcasts over one sample's shape.
    """

    tau: Floats
    end: float
    rows: tuple[Floats, ...]

    @property
    def times(self) -> Floats:
        """``"N+1"``, the end included."""
        return np.append(self.tau, self.end)

    @classmethod
    def of(cls, plan: Plan) -> Numbers:
        """The numbers of any deterministic plan that starts with the noise itself.

        Raises:
            PlanError: for a plan with noise, offsets or a start of its own.

        Example:
            >>> import fewstep as fs
            >>> Numbers.of(fs.make_plan("ddim", fs.schedules.EDM(), 3)).rows[2].shape
            (4,)
        """
        dense = plan.dense()
        if plan.start is not None or plan.stochastic or dense.e.any() or (dense.A[:-1] == 0.0).any():
            raise PlanError(
                "this plan is more than weights of its states and predictions: it has noise, an offset or a start of its own."
            )
        rows = []
        for i in range(plan.nfe):
            carry = dense.A[i + 1] / dense.A[i]
            weights = dense.B[i + 1] - carry * dense.B[i]
            rows.append(np.stack([carry, *weights[i::-1]]))
        return cls(np.asarray(plan.tau, np.float64), float(plan.grid[-1]), tuple(rows))

    @property
    def pooled(self) -> Numbers:
        """With one number for all elements: the mean of every array."""
        return Numbers(self.tau, self.end, tuple(row.reshape(len(row), -1).mean(1) for row in self.rows))

    def plan(self, schedule: NoiseSchedule, provenance: dict[str, Any]) -> Plan:
        """The plan that runs these numbers."""
        rows = tuple(Row(float(t), _entries(row[:1]), _entries(row[1:])) for t, row in zip(self.tau, self.rows, strict=True))
        return Plan(schedule, self.times, rows, provenance=provenance)


def _entries(row: Floats) -> tuple[Any, ...]:
    return tuple(row.tolist()) if row.ndim == 1 else tuple(row)


def combined(row: Floats, state: Tensor, outputs: list[Tensor]) -> Tensor:
    """The next state by a row of numbers, the newest output last in the list."""
    total = float(row[0]) * state
    for weight, output in zip(row[1:].tolist(), reversed(outputs), strict=True):
        total.add_(output, alpha=weight)
    return total


def flat(values: Tensor) -> Tensor:
    """``"batch elements"`` in double precision."""
    return values.double().reshape(len(values), -1)
