r"""A plan is the numbers of one sampling run: what a Butcher tableau is to Runge-Kutta.

Call $i = 0, \dots, N-1$ evaluates the data prediction $d_i = D(z_i, \tau_i)$. The *recurrent* form, which solvers emit and the loop runs:

$$ o_i = p_i z_i + q_i d_i + \sum_{k \ge 1} r_{ik}\, o_{i-k}, \qquad
   z_{i+1} = \sum_{k \ge 0} c_{ik}\, z_{i-k} + \sum_{k \ge 0} w_{ik}\, o_{i-k} + e_i + s_i \xi_i . $$

The *dense* form, which tuners fit and analysis reads:

$$ z_i = A_i z_0 + \sum_{j<i} B_{ij} d_j + \sum_{k<i} C_{ik}\,\xi_k + e_i, \qquad i = 0, \dots, N . $$

$z_0$ is the noise $x_T$, or its image under the plan's *start transform*. $\xi_i$ is Gaussian noise of unit variance tied to an interval of
a clock (see `fewstep.noise`), so that it is the same for every plan that cuts the clock at the same places. An entry is a number, or an
array that broadcasts over one sample's shape. Everything is float64 on the host, checked and frozen when the plan is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.artefacts import Artefact, frozen_json, json_value, read_as
from fewstep.errors import PlanError
from fewstep.grids import check_grid
from fewstep.schedules import NoiseSchedule, from_config

__all__ = ["Dense", "Interval", "Plan", "Row", "StartTransform"]

Floats = NDArray[np.float64]
Entry = float | Floats
DUST = 1e-13
"""Relative size below which a difference of dense entries counts as rounding."""
MOST_CALLS = 100_000
"""A plan file that claims more calls is refused before anything is allocated for it."""


@dataclass(frozen=True)
class Interval:
    """Gaussian noise ``scale * xi``, where xi is the increment of a Brownian motion over [begin, end] of the clock, divided by its
    standard deviation.

    The clock of a solver is the one in which its stochastic differential equation has Brownian increments: `numerics.noise_clock`.
    """

    scale: Entry
    begin: float
    end: float


@dataclass(frozen=True)
class Row:
    """One call and the step after it; newest first in every sequence.

    Args:
        tau: time handed to the network.
        carry: c, weights of the states z_i, z_{i-1}, ...
        weights: w, weights of the stored outputs o_i, o_{i-1}, ...
        state_gain, output_gain, memory: p, q and r (r starts at o_{i-1}); the defaults store the data prediction itself.
        offset: e.
        noise: s with its interval, or None.
    """

    tau: float
    carry: tuple[Entry, ...]
    weights: tuple[Entry, ...]
    state_gain: Entry = 0.0
    output_gain: Entry = 1.0
    memory: tuple[Entry, ...] = ()
    offset: Entry = 0.0
    noise: Interval | None = None

    @property
    def entries(self) -> list[Entry]:
        """Every coefficient of the row."""
        scale = [] if self.noise is None else [self.noise.scale]
        return [*self.carry, *self.weights, *self.memory, self.state_gain, self.output_gain, self.offset, *scale]


@dataclass(frozen=True)
class StartTransform:
    r"""$z_0 = a\,x_T + b + \sum_r g_r \langle u_r, x_T \rangle u_r$: a saved affine map of the starting noise.

    Args:
        scale: a, a number or an array over one sample's shape.
        shift: b, likewise.
        basis: ``"rank *shape"`` or None.
        gains: ``"rank"`` or None.
        time: the time at whose noise level x_T is drawn; left out, it is the plan's first time.
    """

    scale: Entry = 1.0
    shift: Entry = 0.0
    basis: Floats | None = None
    gains: Floats | None = None
    time: float | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "shift"):
            object.__setattr__(self, name, _entry(getattr(self, name), f"start transform's {name}"))
        if self.time is not None:
            object.__setattr__(self, "time", _entry(self.time, "start transform's time"))
        if (self.basis is None) != (self.gains is None):
            raise PlanError("a start transform needs both a basis and its gains, or neither.")
        if self.basis is not None and self.gains is not None:
            basis, gains = _frozen(self.basis), _frozen(self.gains)
            if basis.ndim < 2 or gains.shape != basis.shape[:1]:
                raise PlanError(f"a start transform of gains {gains.shape} needs a basis (rank, *shape), got {basis.shape}.")
            object.__setattr__(self, "basis", basis)
            object.__setattr__(self, "gains", gains)


@dataclass(frozen=True, eq=False)
class Plan:
    """The numbers of one sampling run. Immutable; a malformed one cannot be made.

    Args:
        schedule: the noise schedule it was made for.
        grid: ``"N+1"`` times: the noise level of every state, inner stages of single-step methods included. Stages may share or pass
            levels, so only the ends are checked: they must differ. From noise to data, or back (`Solver.inverse_plan`).
        rows: one `Row` a call.
        start: how the starting noise becomes z_0, or None for as it is.
        provenance: JSON values: how it was made.

    Example:
        >>> import fewstep as fs
        >>> plan = fs.solvers.DDIM().plan(fs.schedules.VPLinear(), nfe=4, grid="lambda")
        >>> plan.nfe, plan.stochastic, plan.dense().B.shape
        (4, False, (5, 4))
    """

    schedule: NoiseSchedule
    grid: Floats
    rows: tuple[Row, ...]
    start: StartTransform | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        grid = _frozen(self.grid)
        if not self.rows or grid.shape != (len(self.rows) + 1,):
            raise PlanError(
                f"a plan of {len(self.rows)} calls needs at least 1 call and one more time than calls, got {grid.shape}."
            )
        _check_ends(grid[[0, -1]], self.schedule)
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "rows", tuple(_checked_row(i, row) for i, row in enumerate(self.rows)))
        if not isinstance(self.provenance, Mapping):
            raise PlanError(f"the provenance of a plan is a mapping, got {type(self.provenance).__name__}.")
        object.__setattr__(self, "provenance", frozen_json(self.provenance))

    # ---- reading -------------------------------------------------------------------------------------------------------------------

    @property
    def nfe(self) -> int:
        """Number of network calls per sample."""
        return len(self.rows)

    @cached_property
    def tau(self) -> Floats:
        """``"N"``: the times handed to the network."""
        return _frozen([row.tau for row in self.rows])

    @property
    def noise_time(self) -> float:
        """The time at whose noise level x_T is drawn."""
        return float(self.grid[0]) if self.start is None or self.start.time is None else self.start.time

    @cached_property
    def stochastic(self) -> bool:
        """Whether the run draws noise, and so needs seeds."""
        return any(row.noise is not None for row in self.rows)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content. Equal plans have equal digests."""
        return self._artefact().digest()

    @cached_property
    def prepared(self) -> dict[Any, Any]:
        """What a run keeps for the next run of the same plan. Not part of the content."""
        return {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (self.schedule, self.grid, self.rows, self.start, json_value(self.provenance))

    def __repr__(self) -> str:
        solver = self.provenance.get("solver", {})
        name = solver.get("name", "?") if isinstance(solver, Mapping) else solver
        kind = ", stochastic" if self.stochastic else ""
        return f"Plan({name}, nfe={self.nfe}, {type(self.schedule).__name__} {self.grid[0]:g} -> {self.grid[-1]:g}{kind})"

    def show(self) -> str:
        """The plan as a table for people: one line a call."""
        head = [repr(self), f"{'call':>4}  {'tau':>10}  {'lambda':>8}  {'sigma':>9}   z_next = ..."]
        if self.start is not None:
            head.insert(1, "starts from a transform of the noise")
        with np.errstate(divide="ignore"):
            lams, sigmas = self.schedule.lam(self.grid), self.schedule.sigma(self.grid)
        lines = [
            f"{i:>4}  {row.tau:>10.6g}  {lams[i]:>8.4f}  {sigmas[i]:>9.3e}   {_formula(i, row)}" for i, row in enumerate(self.rows)
        ]
        return "\n".join([*head, *lines, f" end  {self.grid[-1]:>10.6g}  {lams[-1]:>8.4f}  {sigmas[-1]:>9.3e}"])

    def dense(self) -> Dense:
        """The dense view of this plan: every state in terms of z_0, the data predictions and the noises."""
        shape = np.broadcast_shapes(*(np.shape(entry) for row in self.rows for entry in row.entries))
        n = self.nfe
        states, outputs = np.zeros((n + 1, 2 * n + 2, *shape)), np.zeros((n, 2 * n + 2, *shape))  # columns: z_0, d, xi, 1
        states[0, 0] = 1.0
        for i, row in enumerate(self.rows):
            outputs[i] = row.state_gain * states[i]
            outputs[i, 1 + i] += row.output_gain
            for k, r in enumerate(row.memory, start=1):
                outputs[i] += r * outputs[i - k]
            for k, c in enumerate(row.carry):
                states[i + 1] += c * states[i - k]
            for k, w in enumerate(row.weights):
                states[i + 1] += w * outputs[i - k]
            states[i + 1, -1] += row.offset
            if row.noise is not None:
                states[i + 1, 1 + n + i] += row.noise.scale
        return Dense(states[:, 0], states[:, 1 : n + 1], states[:, n + 1 : -1], states[:, -1])

    @classmethod
    def from_dense(
        cls,
        dense: Dense,
        schedule: NoiseSchedule,
        grid: ArrayLike,
        *,
        tau: ArrayLike,
        clock: Sequence[tuple[float, float]] | None = None,
        start: StartTransform | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The recurrent plan of a dense one: carry from earlier states, weights on all earlier data predictions.

        Without noise the carry is from z_i alone. With noise, earlier states bring their noise along.

        Args:
            dense: the coefficients; row 0 must be z_0 itself.
            schedule, grid, start, provenance: as of `Plan`.
            tau: ``"N"``.
            clock: for a stochastic plan, ``(begin, end)`` of the noise of every row.

        Raises:
            PlanError: if a row cannot be reached from the states before it.
        """
        times = np.asarray(tau, np.float64)
        rows = [_row_from_dense(dense, i, float(times[i]), None if clock is None else clock[i]) for i in range(len(times))]
        return cls(schedule, np.asarray(grid, np.float64), tuple(rows), start, provenance or {})

    # ---- files ---------------------------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan to one ``.safetensors`` file with its provenance and a checksum.

        Raises:
            OSError: if the place cannot be written; nothing half-written is left.
        """
        self._artefact().save(path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan that `save` wrote, bit for bit.

        Raises:
            ArtefactError: if the file is truncated, damaged, foreign or of a newer format.
            FileNotFoundError: if there is none.
            IsADirectoryError: for a folder; it says which plans are in it.
        """
        if Path(path).is_dir():
            inside = sorted(file.name for file in Path(path).glob("*.safetensors"))
            raise IsADirectoryError(f"{path} is a folder; give one of the plans in it: {', '.join(inside) or 'there are none'}.")
        return read_as(path, kind="plan", what="plan", unpack=_unpack, pack=lambda value: value._artefact())

    def _artefact(self) -> Artefact:
        tensors: dict[str, np.ndarray] = {"grid": self.grid, "tau": self.tau}
        for name, width in (("carry", 0), ("weights", 0), ("memory", 0)):
            entries = [getattr(row, name) for row in self.rows]
            width = max(map(len, entries))
            _pack(tensors, name, [(*entry, *[0.0] * (width - len(entry))) for entry in entries], width)
        for name in ("state_gain", "output_gain", "offset"):
            _pack(tensors, name, [(getattr(row, name),) for row in self.rows], 1)
        _pack(tensors, "noise", [(0.0 if row.noise is None else row.noise.scale,) for row in self.rows], 1)
        tensors["clock"] = np.array([(0.0, 0.0) if r.noise is None else (r.noise.begin, r.noise.end) for r in self.rows])
        if self.start is not None:
            _pack(tensors, "start", [(self.start.scale, self.start.shift)], 2)
            tensors["start.time"] = np.array([] if self.start.time is None else [self.start.time])
            if self.start.basis is not None and self.start.gains is not None:
                tensors |= {"start.basis": self.start.basis, "start.gains": self.start.gains}
        meta = {"schedule": self.schedule.config(), "provenance": json_value(self.provenance)}
        return Artefact("plan", meta, tensors)


@dataclass(frozen=True)
class Dense:
    """Every state as an affine function of z_0, the data predictions and the noises; see the module.

    Attributes:
        A: ``"N+1 *entry"``; B: ``"N+1 N *entry"``, row i has columns j < i; C: ``"N+1 N *entry"``; e: ``"N+1 *entry"``.
    """

    A: Floats
    B: Floats
    C: Floats
    e: Floats

    def __post_init__(self) -> None:
        for name in ("A", "B", "C", "e"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        rows, calls = self.B.shape[:2]
        if rows != calls + 1 or self.A.shape[:1] != (rows,) or self.C.shape[:2] != (rows, calls) or self.e.shape[:1] != (rows,):
            raise PlanError(
                f"dense coefficients need A (N+1), B (N+1, N), C (N+1, N), e (N+1); got {self.A.shape}, {self.B.shape}."
            )
        upper = np.triu_indices(rows, 0, calls)
        if self.B[upper].any() or self.C[upper].any():
            raise PlanError(
                "a dense plan may not use a prediction or a noise before it exists: B and C need zeros from the diagonal on."
            )
        if (self.A[0] != 1.0).any() or (self.e[0] != 0.0).any():
            raise PlanError(
                "row 0 of a dense plan is z_0 itself: A[0] = 1 and e[0] = 0. Put anything else into the start transform."
            )


def _check_ends(ends: Floats, schedule: NoiseSchedule) -> None:
    lams = schedule.lam(ends)
    check_grid(ends[::-1] if lams[0] > lams[1] else ends, schedule)


def _frozen(value: ArrayLike) -> Floats:
    array = np.array(value, np.float64)
    if not np.isfinite(array).all():
        raise PlanError("the numbers of a plan must be finite.")
    array.setflags(write=False)
    return array


def _entry(value: Entry, what: str) -> Entry:
    if np.ndim(value) == 0:
        number = float(value)
        if not math.isfinite(number):
            raise PlanError(f"the numbers of a plan must be finite, but its {what} is {number}.")
        return number
    try:
        return _frozen(value)
    except PlanError as error:
        raise PlanError(f"the numbers of a plan must be finite, but its {what} holds others.") from error


def _is_zero(entry: Entry) -> bool:
    return isinstance(entry, float) and entry == 0.0


def _checked_row(i: int, row: Row) -> Row:
    """The row with checked, frozen entries and no zeros at the far end of its sequences."""
    values: dict[str, Any] = {"tau": _entry(row.tau, f"tau of call {i}")}
    for name, reach in (("carry", i + 1), ("weights", i + 1), ("memory", i)):
        entries = [_entry(value, f"{name} of call {i}") for value in getattr(row, name)]
        while entries and _is_zero(entries[-1]):
            entries.pop()
        if len(entries) > reach:
            raise PlanError(f"call {i} has {name} over {len(entries)} values, but only {reach} exist by then.")
        values[name] = tuple(entries)
    for name in ("state_gain", "output_gain", "offset"):
        values[name] = _entry(getattr(row, name), f"{name} of call {i}")
    noise = row.noise
    if noise is not None:
        scale = _entry(noise.scale, f"noise of call {i}")
        begin, end = (float(_entry(edge, f"noise interval of call {i}")) for edge in (noise.begin, noise.end))  # type: ignore[arg-type]
        noise = None if _is_zero(scale) else Interval(scale, begin, end)
        if noise is not None and not 0.0 <= begin < end:
            raise PlanError(f"the noise of call {i} needs an interval 0 <= begin < end of its clock, got {begin:g} to {end:g}.")
    return Row(**values, noise=noise)


def _row_from_dense(dense: Dense, i: int, tau: float, clock: tuple[float, float] | None) -> Row:
    """Find c with A_{i+1} = sum c A and C_{i+1,k} = sum c C for k < i; then the weights on d follow."""
    target_a, target_c = dense.A[i + 1].copy(), dense.C[i + 1].copy()
    carry: list[Any] = [0.0] * (i + 1)

    def take(state: int, factor: Any) -> None:
        nonlocal target_a, target_c
        carry[i - state] = carry[i - state] + factor
        target_a = target_a - factor * dense.A[state]
        target_c = target_c - factor * dense.C[state]

    size = np.abs(dense.C).max() if dense.C.size else 0.0
    for k in range(i - 1, -1, -1):  # state k + 1 is the first that holds xi_k
        if np.abs(target_c[k]).max() > DUST * size:
            if (dense.C[k + 1, k] == 0.0).any():
                raise PlanError(f"dense row {i + 1} uses noise {k}, which no earlier state brings along.")
            take(k + 1, target_c[k] / dense.C[k + 1, k])
    if np.abs(target_a).max() > DUST * np.abs(dense.A).max():
        state = i if not np.abs(dense.C[i, :i]).any() and (dense.A[i] != 0.0).all() else 0
        take(state, target_a / dense.A[state])
    weights, offset = dense.B[i + 1].copy(), dense.e[i + 1].copy()
    for k, c in enumerate(carry):
        weights = weights - c * dense.B[i - k]
        offset = offset - c * dense.e[i - k]
    noise = None
    if np.any(dense.C[i + 1, i]):
        if clock is None:
            raise PlanError("a stochastic dense plan needs clock=, the interval of every noise.")
        noise = Interval(_number_or_array(dense.C[i + 1, i]), *clock)
    return Row(
        tau=tau,
        carry=tuple(map(_number_or_array, carry)),
        weights=tuple(_number_or_array(weights[j]) for j in range(i, -1, -1)),
        offset=_number_or_array(offset),
        noise=noise,
    )


def _number_or_array(value: Any) -> Entry:
    return float(value) if np.ndim(value) == 0 else np.asarray(value, np.float64)


def _formula(i: int, row: Row) -> str:
    parts = [f"{_short(c)} z{i - k}" for k, c in enumerate(row.carry) if not _is_zero(c)]
    plain = _is_zero(row.state_gain) and isinstance(row.output_gain, float) and row.output_gain == 1.0 and not row.memory
    letter = "d" if plain else "o"
    parts += [f"{_short(w)} {letter}{i - k}" for k, w in enumerate(row.weights) if not _is_zero(w)]
    parts += [] if _is_zero(row.offset) else [_short(row.offset)]
    parts += [] if row.noise is None else [f"{_short(row.noise.scale)} xi{i}"]
    text = " ".join(parts) or "0"
    if plain:
        return text
    memory = "".join(f" {_short(r)} o{i - k}" for k, r in enumerate(row.memory, start=1) if not _is_zero(r))
    gain = "" if _is_zero(row.state_gain) else f"{_short(row.state_gain)} z{i} "
    return f"{text}   with o{i} = {gain}{_short(row.output_gain)} d{i}{memory}"


def _short(entry: Entry) -> str:
    return f"{entry:+.5g}" if isinstance(entry, float) else f"+[{'x'.join(map(str, np.shape(entry)))}]"


def _pack(tensors: dict[str, np.ndarray], name: str, rows: Sequence[Sequence[Entry]], width: int) -> None:
    """Numbers into one table; arrays into tensors of their own, named by their place in it."""
    table = np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        for k, entry in enumerate(row):
            if isinstance(entry, float):
                table[i, k] = entry
            else:
                tensors[f"{name}/{i}/{k}"] = np.asarray(entry)
    tensors[name] = table


def _table(tensors: Mapping[str, np.ndarray], name: str, rows: int) -> list[list[Entry]]:
    table = tensors[name]
    if table.ndim != 2 or len(table) != rows or table.dtype != np.float64:
        raise ValueError(f"{name} has shape {table.shape} and type {table.dtype}")
    entries: list[list[Entry]] = [[float(value) for value in row] for row in table]
    for key, array in tensors.items():
        if key.startswith(f"{name}/"):
            i, k = (int(part) for part in key.split("/")[1:])
            if not (0 <= i < rows and 0 <= k < table.shape[1]):
                raise ValueError(f"{key} lies outside its table")
            entries[i][k] = np.asarray(array, np.float64)
    return entries


def _unpack(artefact: Artefact) -> Plan:
    tensors = artefact.tensors
    calls = len(tensors["tau"])
    if calls > MOST_CALLS:
        raise ValueError(f"it claims {calls} calls")
    names = ("carry", "weights", "memory", "state_gain", "output_gain", "offset", "noise")
    tables = {name: _table(tensors, name, calls) for name in names}
    rows = []
    for i in range(calls):
        (scale,), (begin, end) = tables["noise"][i], tensors["clock"][i]
        rows.append(
            Row(
                tau=float(tensors["tau"][i]),
                carry=tuple(tables["carry"][i]),
                weights=tuple(tables["weights"][i]),
                state_gain=tables["state_gain"][i][0],
                output_gain=tables["output_gain"][i][0],
                memory=tuple(tables["memory"][i]),
                offset=tables["offset"][i][0],
                noise=None if _is_zero(scale) else Interval(scale, float(begin), float(end)),
            )
        )
    start = None
    if "start" in tensors:
        ((scale, shift),) = _table(tensors, "start", 1)
        start = StartTransform(
            scale, shift, tensors.get("start.basis"), tensors.get("start.gains"), *tensors["start.time"].tolist()
        )
    return Plan(from_config(artefact.meta["schedule"]), tensors["grid"], tuple(rows), start, artefact.meta["provenance"])
