"""All numbers of a plan improved together, by damped Gauss-Newton steps (Levenberg-Marquardt) with forward calls only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.tuners.numbers import Numbers, combined, flat
from fewstep.tuners.objectives import Features, Matched, Paired
from fewstep.tuners.paths import Paths
from fewstep.tuners.task import Task, distances
from fewstep.tuners.times import finite_ends

__all__ = ["Polisher", "damped", "differences", "from_differences"]

Floats = NDArray[np.float64]
RELATIVE_STEP = {torch.float64: 1e-5, torch.float32: 3e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Finite differences, relative to the root mean square of a state, by the precision of the network."""
ROUNDED_SHIFT = 0.1
"""Finite differences of a time in lambda, where the network rounds its time to whole numbers."""
LONGEST_MOVE = 0.5
"""The most a time moves in lambda in one Gauss-Newton step."""
LEAST_GAIN, LEAST_STEP_GAIN = 0.003, 0.01
"""A Jacobian, and a step from it, that lowers the loss by less than this fraction is the last."""
MOST_STEPS, FIRST_TRIES, TRIES = 8, 5, 2
"""Steps from one Jacobian, and how often the first and each of the others is tried, damped more every time."""


class Objective(Protocol):
    """See `fewstep.tuners.objectives`."""

    def loss(self, samples: Tensor) -> float: ...

    def model(self, jacobian: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]: ...


class Polisher:
    """Improves numbers on some paths of a task.

    Args:
        task: the model.
        paths: exact paths; all of them are used.
    """

    def __init__(self, task: Task, paths: Paths):
        self.task, self.paths = task, paths.ends() if paths.whole else paths
        self.denoiser, self.schedule = task.denoiser, task.schedule

    def with_paths(self, more: Paths, numbers: Numbers, jacobian: Tensor | None) -> tuple[Polisher, Tensor | None]:
        """On more paths, with the Jacobian of these brought along, so that only that of the new ones is made."""
        wider = Polisher(self.task, self.paths.joined(more.ends()))
        return wider, None if jacobian is None else torch.cat([jacobian, self._jacobian(numbers, more)], 1)

    def paired(self, numbers: Numbers, turns: int, robust: float, jacobian: Tensor | None = None) -> tuple[Numbers, Tensor | None]:
        """With less error of the samples.

        Args:
            numbers: where to begin.
            turns: the most Jacobians. Each serves as many steps as lower the loss, brought up to date after each by Broyden's formula,
                which costs no calls.
            robust: scale of Cauchy's loss, in medians of the errors at the beginning.
            jacobian: at these numbers, if there is one; it is changed.

        Returns:
            the numbers, and the last Jacobian.
        """
        objective = self._errors(numbers, robust)
        samples = self.run(numbers, self.paths)[0][-1]
        loss = objective.loss(samples)
        for turn in range(turns):
            before = loss
            if turn or jacobian is None:
                jacobian = self._jacobian(numbers, self.paths)
            numbers, samples, loss = self._steps_with(jacobian, numbers, samples, loss, objective)
            median = np.median(distances(samples, self.paths.target))
            self.task.report(f"polish: {turn + 1} of {turns}, median error {median:.4g}")
            if loss > (1.0 - LEAST_GAIN) * before:
                break
        return numbers, jacobian

    def matched(self, numbers: Numbers, jacobian: Tensor, robust: float, features: Features | None) -> Numbers:
        """With a smaller distance between all samples and all exact samples, see `Matched`: with the Jacobian that is at hand, which is
        changed.
        """
        objective = Matched(self._errors(numbers, robust), features)
        samples = self.run(numbers, self.paths)[0][-1]
        return self._steps_with(jacobian, numbers, samples, objective.loss(samples), objective)[0]

    def _errors(self, numbers: Numbers, robust: float) -> Paired:
        samples = self.run(numbers, self.paths)[0][-1]
        scale = max(robust * float(np.median(distances(samples, self.paths.target))), 1e-150) ** 2
        return Paired(self.paths.target, scale, self.paths.weights)

    def _steps_with(
        self, jacobian: Tensor, numbers: Numbers, samples: Tensor, loss: float, objective: Objective
    ) -> tuple[Numbers, Tensor, float]:
        """Steps from one Jacobian ``"numbers batch elements"`` until they no longer lower the loss."""
        damping = 1e-3
        for k in range(MOST_STEPS):
            matrix, gradient = (values.cpu().numpy() for values in objective.model(jacobian, samples))
            if not (np.isfinite(matrix).all() and np.isfinite(gradient).all()):
                break
            for _ in range(TRIES if k else FIRST_TRIES):
                step = damped(matrix, gradient, damping)
                moved = self._moved(numbers, step)
                found = self.run(moved, self.paths)[0][-1]
                lower = objective.loss(found)
                if lower < loss:
                    break
                damping *= 10.0
            else:
                break
            change = torch.from_numpy(step).to(jacobian.device)
            surprise = flat(found - samples) - torch.tensordot(change, jacobian, 1)
            sizes = torch.from_numpy(np.diag(matrix).copy()).to(jacobian.device).clamp_min(1e-300)
            scaled = change * sizes  # Broyden's update in the units of the damping
            jacobian += (scaled / (change @ scaled))[:, None, None] * surprise
            gained, damping = 1.0 - lower / loss, max(damping / 5.0, 1e-9)
            numbers, samples, loss = moved, found, lower
            if gained < LEAST_STEP_GAIN:
                break
        return numbers, samples, loss

    def last_row(self, numbers: Numbers, robust: float, groups: NDArray[np.intp]) -> Numbers:
        """The last row with weights of its own for every group of elements, drawn to those it has: the more, the fewer samples there are
        for a weight.
        """
        paths, shape = self.paths, tuple(self.paths.noise.shape[1:])
        states, outputs = self.run(numbers, paths)
        errors = distances(states[-1], paths.target)
        weights = paths.shares / (1.0 + errors**2 / max(robust * np.median(errors), 1e-150) ** 2)
        weights = torch.from_numpy(weights).to(states[-1].device)
        basis = torch.stack(differences([flat(term) for term in (states[-2], *reversed(outputs))]))
        weighted, residual = basis * weights[:, None], flat(paths.target - states[-1])
        matrices = torch.einsum("pne,qne->epq", weighted, basis).cpu().numpy()
        gradients = torch.einsum("pne,ne->ep", weighted, residual).cpu().numpy()
        if not (np.isfinite(matrices).all() and np.isfinite(gradients).all()):
            return numbers
        count = int(groups.max()) + 1
        changes = np.empty((len(basis), count))
        for group in range(count):
            members = groups == group
            ridge = len(basis) / (paths.count * int(members.sum()))
            changes[:, group] = from_differences(damped(matrices[members].sum(0), gradients[members].sum(0), ridge))
        own = changes[:, groups].reshape(len(basis), *shape)
        last = numbers.rows[-1].reshape(-1, *[1] * len(shape)) + own
        return replace(numbers, rows=(*numbers.rows[:-1], last))

    def run(
        self, numbers: Numbers, paths: Paths, *, states: list[Tensor] | None = None, outputs: list[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """All states and predictions; given the first of them, the rest."""
        states = [paths.noise] if states is None else list(states)
        outputs = [] if outputs is None else list(outputs)
        for i in range(len(outputs), len(numbers.rows)):
            outputs.append(self.denoiser(states[i], float(numbers.tau[i]), **paths.cond))
            states.append(combined(numbers.rows[i], states[i], outputs))
        return states, outputs

    def _jacobian(self, numbers: Numbers, paths: Paths) -> Tensor:
        """``"numbers batch elements"``: the derivative of the samples, a block of them at a time."""
        blocks = []
        for begin in range(0, paths.count, self.denoiser.block):
            part = paths.take(slice(begin, begin + self.denoiser.block))
            states, outputs = self.run(numbers, part)
            blocks.append(torch.stack([flat(column) for column in self._columns(numbers, part, states, outputs)]))
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
                changed = self.run(numbers, part, states=[*states[: i + 1], states[i + 1] + h * term], outputs=outputs[: i + 1])
                yield (changed[0][-1] - states[-1]) / h
        shift = ROUNDED_SHIFT if self.denoiser.rounds_times else relative
        for i in range(1, last + 1):
            tau = numbers.tau.copy()
            tau[i] = self._time(float(self.schedule.lam(tau[i])) + shift)
            h = float(self.schedule.lam(tau[i]) - self.schedule.lam(numbers.tau[i]))
            changed = self.run(replace(numbers, tau=tau), part, states=states[: i + 1], outputs=outputs[:i])
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


def differences(terms: list[Tensor]) -> list[Tensor]:
    """z, d_i, d_i - d_{i-1}, d_{i-1} - d_{i-2}, ..., from z, d_i, d_{i-1}, ..."""
    return [*terms[:2], *(newer - older for newer, older in itertools.pairwise(terms[1:]))]


def from_differences(found: Floats) -> Floats:
    """The weights of z, d_i, d_{i-1}, ... from those of `differences`."""
    weights = found.copy()
    weights[2:] *= -1.0
    weights[1:-1] += found[2:]
    return weights


def damped(matrix: Floats, gradient: Floats, damping: float) -> Floats:
    """The solution of the normal equations, every unknown in units of its own size, with a ridge in these units."""
    sizes = np.sqrt(np.diag(matrix))
    sizes = np.where(sizes > 0.0, sizes, 1.0)  # a term that is zero for all samples gets no weight
    scaled = matrix / np.outer(sizes, sizes) + damping * np.eye(len(matrix))
    return np.linalg.lstsq(scaled, gradient / sizes, rcond=1e-15)[0] / sizes


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
