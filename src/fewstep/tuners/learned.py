r"""Plans fitted to a model: every coefficient and every time chosen so that the samples come out right.

A plan of N calls is a few dozen numbers. Given exact paths $x^*(t)$ of some noises (`Paths`), they are fitted in three stages, with forward
calls of the network only:

1. *Closed form.* With the times fixed, a row is a linear least-squares problem. Row i is fitted to
   $z_{i+1} = c_i z_i + \sum_{j \le i} w_{ij} d_j \approx x^*(t_{i+1})$, with the states z that the rows before it made, so it also mends
   what they did wrong. The unknowns are written as differences from a solver's row (the Adams method in the flow velocity) on the basis
   $z_i, d_i, d_i - d_{i-1}, d_{i-1} - d_{i-2}, \dots$, scaled to equal size, and drawn to zero by a small ridge.
2. *Times.* The steps between them, as fractions of the interval in lambda, are searched with CMA-ES, each trial judged by what stage 1
   makes of it.
3. *Polish.* All coefficients and the times handed to the network are improved together, on the error of the samples alone, by damped
   Gauss-Newton steps (Levenberg-Marquardt). The Jacobian has a column for every number of the plan, made by a finite difference: the
   rest of the run again with this number changed.

Errors are not squared as they are but enter as $\log(1 + e^2 / s^2)$ with s a multiple of the median error (Cauchy's loss): a few samples
that end in another mode cannot be mended by a small change, and would else drown the rest.

The noises that are fitted to are chosen where a small change of the noise makes a large change of the sample (`draw_paths`): samples that
lie between modes are few, make most of the root mean square error, and tell most about what a plan does wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.errors import PlanError, UnknownNameError
from fewstep.grids import make_grid
from fewstep.plan import Plan, Row
from fewstep.schedules import NoiseSchedule
from fewstep.solvers import Adams
from fewstep.tuners.paths import Paths
from fewstep.tuners.task import GRIDS, Task, distances
from fewstep.tuners.times import Steps, finite_ends

__all__ = ["Learned", "Numbers"]

Floats = NDArray[np.float64]
RELATIVE_STEP = {torch.float64: 1e-5, torch.float32: 3e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Finite differences, relative to the root mean square of a state, by the precision of the network."""
ROUNDED_SHIFT = 0.1
"""Finite differences of a time in lambda, where the network rounds its time to whole numbers."""
LONGEST_MOVE = 0.5
"""The most a time moves in lambda in one Gauss-Newton step."""
LEAST_GAIN = 0.003
"""Steps of the polish that lower the loss by less than this fraction are the last."""
MOST_STEPS, TRIES = 12, 4
"""Steps from one Jacobian, and how often each may be damped more."""


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

    def plan(self, schedule: NoiseSchedule, provenance: dict[str, Any]) -> Plan:
        """The plan that runs these numbers."""
        rows = tuple(Row(float(t), _entries(row[:1]), _entries(row[1:])) for t, row in zip(self.tau, self.rows, strict=True))
        return Plan(schedule, self.times, rows, provenance=provenance)


class _Polished(NamedTuple):
    """Numbers, the samples they make, and their errors, of which those above the root of the scale count less."""

    numbers: Numbers
    samples: Tensor
    errors: Floats
    scale: float

    @property
    def loss(self) -> float:
        """Cauchy's."""
        return float(np.log1p(self.errors**2 / self.scale).mean()) if np.isfinite(self.errors).all() else math.inf


@dataclass(frozen=True)
class Learned:
    """The three stages and how long each may take.

    Args:
        trials: of times in stage 2; 0 leaves it out.
        trial_paths: the paths that a trial is made on; the rows on the best times are fitted to all.
        polish: the most Jacobians; 0 leaves stage 3 out.
        ridge: how strongly rows are drawn to the solver's, relative to the mean square of every term.
        entries: ``"channel"``, ``"element"``, both or none: after the polish the last row is fitted once more in closed form, with weights
            for every channel or element. Other rows keep one number for all: their states are what the polish has made room for.
        robust: scales s of Cauchy's loss, in medians of the samples' errors: the polish is made with each, always from the searched times.
    """

    trials: int = 100
    trial_paths: int = 256
    polish: int = 4
    ridge: float = 1e-8
    robust: tuple[float, ...] = (10.0,)
    entries: tuple[str, ...] = ("channel", "element")

    def __post_init__(self) -> None:
        if self.trials < 0 or self.polish < 0:
            raise ValueError(f"trials and polish are counts, got {self.trials} and {self.polish}.")
        for name in self.entries:
            if name not in ("channel", "element"):
                raise UnknownNameError("entry", name, ("channel", "element"))
        if not (self.ridge > 0.0 and self.robust and min(self.robust) > 0.0):
            raise ValueError(f"ridge and robust must be positive, got {self.ridge:g} and {self.robust}.")

    def stages(self, task: Task, nfe: int, start: Numbers | None = None) -> Iterator[tuple[str, Numbers]]:
        """The numbers after every stage: of all three, or of the polish alone if there are numbers to start from."""
        if start is not None:
            alike = tuple(row.reshape(len(row), -1).mean(1) for row in start.rows)
            yield from self._polished(task, _Fitter(task, task.fit, self), Numbers(start.tau, start.end, alike), "start, polish")
            return
        fitter, some = _Fitter(task, task.fit, self), _Fitter(task, task.fit.take(slice(self.trial_paths)), self)
        begun, loss = min((some.closed_form(times) for times in _grids(task, nfe)), key=lambda found: found[1])
        numbers, _ = fitter.closed_form(begun.times)
        yield "closed form", numbers
        if self.trials and nfe > 1:
            numbers, _ = fitter.closed_form(some.search(begun, loss).times)
            yield "times", numbers
        if self.polish:
            yield from self._polished(task, fitter, numbers, "polish")

    def _polished(self, task: Task, fitter: _Fitter, numbers: Numbers, stage: str) -> Iterator[tuple[str, Numbers]]:
        for robust in self.robust:
            polished = fitter.polish(numbers, robust)
            yield f"{stage}, s = {robust:g} medians", polished
            for name, groups in self._groups(task):
                yield f"{stage}, s = {robust:g} medians, last row per {name}", fitter.last_row(polished, robust, groups)

    def _groups(self, task: Task) -> Iterator[tuple[str, NDArray[np.intp]]]:
        """The ways to part the elements of a sample that were asked for: the number of the group of every element."""
        shape = tuple(task.fit.noise.shape[1:])
        elements = np.arange(math.prod(shape))
        if "channel" in self.entries and len(shape) > 1 and shape[0] > 1:
            yield "channel", elements // math.prod(shape[1:])
        if "element" in self.entries and len(elements) > 1:
            yield "element", elements


def _grids(task: Task, nfe: int) -> list[Floats]:
    """Where the search may begin."""
    return [make_grid(grid, task.schedule, nfe, final=task.final) for grid in GRIDS]


class _Fitter:
    """The stages on some paths of a task."""

    def __init__(self, task: Task, paths: Paths, options: Learned):
        self.task, self.paths, self.options = task, paths, options
        self.denoiser, self.schedule = task.denoiser, task.schedule

    # ---- closed form ---------------------------------------------------------------------------------------------------------------

    def closed_form(self, times: Floats) -> tuple[Numbers, float]:
        """The rows on these times ``"N+1"``, and the loss of the samples they make."""
        paths, count = self.paths, len(times) - 1
        state, outputs, rows = paths.noise, [], []
        for i, prior in enumerate(self._prior(times)):
            outputs.append(self.denoiser(state, float(times[i]), **paths.cond))
            target = paths.target if i == count - 1 else paths.at(float(times[i + 1]))
            rows.append(_least_squares([state, *reversed(outputs)], target, prior, self.options.ridge))
            state = _combined(rows[-1], state, outputs)
        return Numbers(times[:-1].copy(), float(times[-1]), tuple(rows)), self._loss(state)

    def _prior(self, times: Floats) -> list[Floats]:
        """A solver's rows on these times, in the same form."""
        plan = Adams(order=2, prediction="flow", corrector="none").plan(self.schedule, grid=times, final=self.task.final)
        plan = Plan.from_dense(plan.dense(), self.schedule, plan.grid, tau=plan.tau)
        return [np.array([*row.carry, *row.weights], np.float64) for row in plan.rows]

    def _loss(self, samples: Tensor) -> float:
        """What the search compares: the mean of the roots of the samples' errors, squared. It is tolerant of outliers and has no scale."""
        each = distances(samples, self.paths.target)
        return float(np.sqrt(each).mean() ** 2) if np.isfinite(each).all() else math.inf

    # ---- times ---------------------------------------------------------------------------------------------------------------------

    def search(self, numbers: Numbers, loss: float) -> Numbers:
        """Better times than those, by CMA-ES over the logarithms of the steps in lambda."""
        steps = Steps(self.schedule, numbers.times, finite_ends(self.schedule, self.paths.times))
        options = {"trials": self.options.trials, "seed": self.task.seed, "report": self.task.report}
        return steps.search(self.closed_form, (numbers, loss), **options)[0]

    # ---- polish --------------------------------------------------------------------------------------------------------------------

    def polish(self, numbers: Numbers, robust: float) -> Numbers:
        """All numbers together, by damped Gauss-Newton steps on the samples' errors.

        A Jacobian serves as many steps as lower the loss, brought up to date after each by Broyden's formula, which costs no calls.
        """
        samples = self._run(numbers, self.paths)[0][-1]
        scale = (robust * float(np.median(distances(samples, self.paths.target)))) ** 2
        best = _Polished(numbers, samples, distances(samples, self.paths.target), scale)
        for turn in range(self.options.polish):
            before = best.loss
            best = self._steps_with(self._jacobian(best.numbers), best)
            self.task.report(f"polish: {turn + 1} of {self.options.polish}, median error {np.median(best.errors):.4g}")
            if best.loss > (1.0 - LEAST_GAIN) * before:
                break
        return best.numbers

    def _steps_with(self, jacobian: Tensor, best: _Polished) -> _Polished:
        """Steps from one Jacobian ``"numbers batch elements"`` until they no longer lower the loss."""
        damping = 1e-3
        for _ in range(MOST_STEPS):
            weights = torch.from_numpy(1.0 / (1.0 + best.errors**2 / best.scale)).to(jacobian.device)
            weighted = (jacobian * weights[:, None]).flatten(1)
            matrix = (weighted @ jacobian.flatten(1).T).cpu().numpy()
            gradient = (weighted @ _flat(self.paths.target - best.samples).flatten()).cpu().numpy()
            if not (np.isfinite(matrix).all() and np.isfinite(gradient).all()):
                return best
            for _ in range(TRIES):
                step = _damped(matrix, gradient, damping)
                moved = self._moved(best.numbers, step)
                samples = self._run(moved, self.paths)[0][-1]
                found = _Polished(moved, samples, distances(samples, self.paths.target), best.scale)
                if found.loss < best.loss:
                    break
                damping *= 10.0
            else:
                return best
            change = torch.from_numpy(step).to(jacobian.device)
            surprise = _flat(found.samples - best.samples) - torch.tensordot(change, jacobian, 1)
            sizes = torch.diagonal(torch.from_numpy(matrix)).to(jacobian.device).clamp_min(1e-300)
            scaled = change * sizes  # Broyden's update in the units of the damping
            jacobian += (scaled / (change @ scaled))[:, None, None] * surprise
            gained, best, damping = 1.0 - found.loss / best.loss, found, max(damping / 5.0, 1e-9)
            if gained < LEAST_GAIN:
                break
        return best

    def last_row(self, numbers: Numbers, robust: float, groups: NDArray[np.intp]) -> Numbers:
        """The last row with weights of its own for every group of elements, drawn to those it has: the more, the fewer samples there are
        for a weight.
        """
        paths, shape = self.paths, tuple(self.paths.noise.shape[1:])
        states, outputs = self._run(numbers, paths)
        errors = distances(states[-1], paths.target)
        weights = torch.from_numpy(1.0 / (1.0 + errors**2 / (robust * np.median(errors)) ** 2)).to(states[-1].device)
        basis = torch.stack(_differences([_flat(term) for term in (states[-2], *reversed(outputs))]))
        weighted, residual = basis * weights[:, None], _flat(paths.target - states[-1])
        matrices = torch.einsum("pne,qne->epq", weighted, basis).cpu().numpy()
        gradients = torch.einsum("pne,ne->ep", weighted, residual).cpu().numpy()
        if not (np.isfinite(matrices).all() and np.isfinite(gradients).all()):
            return numbers
        count = int(groups.max()) + 1
        changes = np.empty((len(basis), count))
        for group in range(count):
            members = groups == group
            ridge = len(basis) / (paths.count * int(members.sum()))
            changes[:, group] = _from_differences(_damped(matrices[members].sum(0), gradients[members].sum(0), ridge))
        own = changes[:, groups].reshape(len(basis), *shape)
        last = numbers.rows[-1].reshape(-1, *[1] * len(shape)) + own
        return replace(numbers, rows=(*numbers.rows[:-1], last))

    def _run(
        self, numbers: Numbers, paths: Paths, *, states: list[Tensor] | None = None, outputs: list[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """All states and predictions; given the first of them, the rest."""
        states = [paths.noise] if states is None else list(states)
        outputs = [] if outputs is None else list(outputs)
        for i in range(len(outputs), len(numbers.rows)):
            outputs.append(self.denoiser(states[i], float(numbers.tau[i]), **paths.cond))
            states.append(_combined(numbers.rows[i], states[i], outputs))
        return states, outputs

    def _jacobian(self, numbers: Numbers) -> Tensor:
        """``"numbers batch elements"``: the derivative of the samples, a block of them at a time."""
        blocks = []
        for begin in range(0, self.paths.count, self.denoiser.block):
            part = self.paths.take(slice(begin, begin + self.denoiser.block))
            states, outputs = self._run(numbers, part)
            blocks.append(torch.stack([_flat(column) for column in self._columns(numbers, part, states, outputs)]))
        return torch.cat(blocks, 1)

    def _columns(self, numbers: Numbers, part: Paths, states: list[Tensor], outputs: list[Tensor]) -> Iterator[Tensor]:
        """The derivative of the samples with respect to every number: the rows', then the times' from the second on, in lambda."""
        last, relative = len(numbers.rows) - 1, self._relative_step()
        for i in range(last + 1):
            for term in [states[i], *reversed(outputs[: i + 1])]:
                if i == last:
                    yield term
                    continue
                h = relative * _rms(states[i + 1]) / max(_rms(term), 1e-30)
                changed = self._run(numbers, part, states=[*states[: i + 1], states[i + 1] + h * term], outputs=outputs[: i + 1])
                yield (changed[0][-1] - states[-1]) / h
        shift = ROUNDED_SHIFT if self.denoiser.rounds_times else relative
        for i in range(1, last + 1):
            tau = numbers.tau.copy()
            tau[i] = self._time(float(self.schedule.lam(tau[i])) + shift)
            h = float(self.schedule.lam(tau[i]) - self.schedule.lam(numbers.tau[i]))
            changed = self._run(replace(numbers, tau=tau), part, states=states[: i + 1], outputs=outputs[:i])
            yield (changed[0][-1] - states[-1]) / h if h else torch.zeros_like(states[-1])

    def _moved(self, numbers: Numbers, step: Floats) -> Numbers:
        """The numbers after a step."""
        rows, tau, k = [], numbers.tau.copy(), 0
        for row in numbers.rows:
            rows.append(row + step[k : k + len(row)])
            k += len(row)
        for i, change in enumerate(step[k:], start=1):
            tau[i] = self._time(float(self.schedule.lam(tau[i])) + float(np.clip(change, -LONGEST_MOVE, LONGEST_MOVE)))
        return replace(numbers, rows=tuple(rows), tau=tau)

    def _time(self, lam: float) -> float:
        """The time at a lambda, or the nearest between the first and the last."""
        low, high = finite_ends(self.schedule, self.paths.times)
        return float(self.schedule.t_of_lam(min(max(lam, low), high)))

    def _relative_step(self) -> float:
        return RELATIVE_STEP.get(self.denoiser.precision or self.paths.states.dtype, RELATIVE_STEP[torch.float32])


def _least_squares(terms: list[Tensor], target: Tensor, prior: Floats, ridge: float) -> Floats:
    """The weights of z, d_i, ..., d_0 that come nearest to the target, drawn to the prior on the basis of differences."""
    flat = [_flat(term).reshape(-1) for term in terms]
    known = np.zeros(len(terms))
    known[: len(prior)] = prior[: len(terms)]
    residual = _flat(target).reshape(-1) - sum(float(weight) * term for weight, term in zip(known, flat, strict=True) if weight)
    columns = torch.stack(_differences(flat))
    matrix, gradient = (columns @ columns.T).cpu().numpy(), (columns @ residual).cpu().numpy()
    if not (np.isfinite(matrix).all() and np.isfinite(gradient).all()):
        return known  # the trial is lost: its samples are not finite either
    return known + _from_differences(_damped(matrix, gradient, ridge))


def _differences(terms: list[Tensor]) -> list[Tensor]:
    """z, d_i, d_i - d_{i-1}, d_{i-1} - d_{i-2}, ..."""
    return [*terms[:2], *(newer - older for newer, older in itertools.pairwise(terms[1:]))]


def _from_differences(found: Floats) -> Floats:
    """The weights of z, d_i, d_{i-1}, ... from those of `_differences`."""
    weights = found.copy()
    weights[2:] *= -1.0
    weights[1:-1] += found[2:]
    return weights


def _entries(row: Floats) -> tuple[Any, ...]:
    return tuple(row.tolist()) if row.ndim == 1 else tuple(row)


def _damped(matrix: Floats, gradient: Floats, damping: float) -> Floats:
    """The solution of the normal equations, every unknown in units of its own size, with a ridge in these units."""
    sizes = np.sqrt(np.diag(matrix)) + 1e-300
    scaled = matrix / np.outer(sizes, sizes) + damping * np.eye(len(matrix))
    return np.linalg.lstsq(scaled, gradient / sizes, rcond=1e-15)[0] / sizes


def _combined(row: Floats, state: Tensor, outputs: list[Tensor]) -> Tensor:
    total = float(row[0]) * state
    for weight, output in zip(row[1:].tolist(), reversed(outputs), strict=True):
        total.add_(output, alpha=weight)
    return total


def _flat(values: Tensor) -> Tensor:
    return values.double().reshape(len(values), -1)


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
