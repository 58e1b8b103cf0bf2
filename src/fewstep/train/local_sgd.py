r"""Local SGD and Local AdamW: `LocalOptimizer`, around any optimizer, averages the parameters of workers when a rule says so.

Every worker does ``optimizer.step()`` on gradients of its own data. After the last step of a round (`fewstep.train.synchronization` has the
rules) parameters become their mean over the workers,

$$ \theta_k \leftarrow \bar\theta = \frac1K\sum_{j=1}^K \theta_j . $$

*Exact limits.* With one worker it is the plain optimizer. With H = 1 and SGD, with or without momentum, it is data-parallel training, since
the step is linear in the gradient: the mean of momentum buffers is the buffer of the mean gradient, whether or not it is averaged. AdamW
is not linear (the mean of $g_k^2$ is not the square of the mean), so H = 1 is *another* method there, even with its states averaged.

*How.* Parameters are copied into flat buckets, summed in single precision (double where they are double), divided, and copied back into
the storage they had, so that views and tied weights stay what they are; weights in bfloat16 lose no small differences on the way. One copy
of the model is held meanwhile, so that a synchronisation that fails changes nothing. Every worker also tells the step and the round it is
at: workers that went out of step are an error, not a hang or a wrong mean.

Sources: "Local SGD Converges Fast and Communicates Little" (arXiv 1805.09767); "A Quadratic Synchronization Rule for Distributed Deep
Learning" (arXiv 2310.14423); "Why (and When) does Local SGD Generalize Better than SGD?" (arXiv 2303.01215).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.train.checkpoints import HOW_AFRESH
from fewstep.train.groups import FixedGroup, WorkerGroup
from fewstep.train.slow_sde import local_sgd_drift_factor
from fewstep.train.synchronization import Synchronization

__all__ = ["LocalOptimizer", "Round", "SynchronizationError", "Traffic"]

BUCKET = 8_000_000
"""Numbers in a flat bucket, at most, unless one tensor alone has more."""
KEPT = 8
"""Checkpoints of a worker that are compared with the others'; it keeps two, and those of interruptions since."""
MODULUS = 1_000_003
"""Counters are compared modulo this prime, so that their squares are exact in double precision."""
OWN = -1
"""Where the state dictionary holds what is ours; the optimizer's parameters are 0, 1, ...; simulated workers follow at -2, -3, ..."""


class SynchronizationError(FewstepError, RuntimeError):
    """Workers that should be at the same step are not, or train different models."""


@dataclass(frozen=True)
class Round:
    r"""What is known of a round when it ends.

    Attributes:
        step: steps done.
        h: steps of the round.
        learning_rate: that of its first step.
        workers: how many were averaged.
        spread: how far the workers had gone apart, $(\frac1K\sum_k|\theta_k - \bar\theta|^2)^{1/2}$.
    """

    step: int
    h: int
    learning_rate: float
    workers: int
    spread: float

    def drift_factor(self, curvature: float) -> float:
        """`local_sgd_drift_factor` of this round. Near 1: nothing is gained by averaging this seldom but communication.

        Example:
            >>> round(Round(step=100, h=16, learning_rate=0.05, workers=4, spread=0.1).drift_factor(curvature=1.0), 3)
            2.449
        """
        return local_sgd_drift_factor(self.learning_rate, self.h, curvature, self.workers)


@dataclass
class Traffic:
    """What this worker handed to the collectives so far.

    Attributes:
        rounds: averages.
        payload_bytes: parameters and averaged states of these rounds; `CommunicationVolume.payload_bytes` says it before.
        control_bytes: the small message of every round.
        other_bytes: everything else: the start, repetitions after a loss, calls of `LocalOptimizer.average`.
    """

    rounds: int = 0
    payload_bytes: int = 0
    control_bytes: int = 0
    other_bytes: int = 0


class LocalOptimizer(torch.optim.Optimizer):
    """An optimizer whose parameters are averaged over workers.

    It has the parameter groups and the state of the optimizer inside, so schedulers of the learning rate, `GradScaler` and `fit` take it
    for one. At the start all workers get the parameters of the first. A checkpoint is one of this worker: every worker keeps its own.

    Args:
        optimizer: the optimizer of this worker.
        sync: when to average.
        process_group: over whom: a process group of `torch.distributed`, None for all its processes; or a `FixedGroup` (with a time
            limit), an `ElasticGroup` (which survives a loss) or `SimulatedWorkers`.
        average_states: names of optimizer states that are averaged with the parameters, such as ``("exp_avg", "exp_avg_sq")``. The others
            stay each worker's own, and so do all by default, as in the paper.
        monitor: called with a `Round` after each.

    Raises:
        SynchronizationError: if the workers' models differ in size; in ``step()``, if they are not at the same step.
        WorkerLostError: if a worker is lost and the group does not survive that.
        ValueError: for states that do not exist or cannot be averaged.

    Note:
        ``clip`` of `fit` limits each worker's gradient, where data-parallel training limits that of the mean; ``clip=None`` to compare.
        Buffers are not averaged: estimate the statistics of batch normalisation anew, or ``average`` them. Nor are the averaged weights
        (``ema``) that `fit` keeps: ``average`` gives their mean, which is the average of the mean.
        A step that `GradScaler` skips counts, so that workers stay in step when one of them overflows.

    Example:
        >>> from fewstep.train import QSR, SimulatedWorkers
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> local = LocalOptimizer(optimizer, QSR(alpha=0.2, h_base=2, warmup_steps=0, total_steps=8), SimulatedWorkers(4))
        >>> for _ in range(8 * 4):                                 # eight steps of four workers
        ...     local.zero_grad()
        ...     model(torch.randn(5, 3)).square().mean().backward()
        ...     local.step()
        >>> local.traffic.rounds, local.traffic.payload_bytes     # rounds of (0.2 / 0.1)^2 = 4 steps, of 4 numbers of 4 bytes
        (2, 32)
    """

    _step_supports_amp_scaling = True  # GradScaler then calls step() always, and says whether gradients overflowed

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        sync: Synchronization,
        process_group: dist.ProcessGroup | WorkerGroup | None = None,
        *,
        average_states: Sequence[str] = (),
        monitor: Callable[[Round], None] | None = None,
    ):
        if isinstance(average_states, str):
            raise ValueError(
                f"average_states is a sequence of names, got the string {average_states!r}; pass ({average_states!r},)."
            )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.sync, self.average_states, self.monitor = optimizer, sync, tuple(average_states), monitor
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.workers = process_group if isinstance(process_group, WorkerGroup) else FixedGroup(process_group)
        self.steps = self.round_start = self.round_end = 0
        self.round_rate = 0.0
        self.traffic = Traffic()
        self.workers.attach(optimizer)
        self._start()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do a local step; if it is the last of a round, average."""
        if self.steps == self.round_end:
            self.round_rate = float(self.param_groups[0]["lr"])
            self.round_start = self.steps
            self.round_end = self.steps + self.sync.period(self.steps, self.round_rate)
        with self.workers.turn():
            loss = self._local_step(closure)
        if self.workers.advance():
            self.steps += 1
            if self.steps == self.round_end:
                self._synchronize()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "workers" in self.__dict__:
            raise ValueError(
                "add parameter groups to the optimizer before LocalOptimizer takes it: workers agree on their models once."
            )
        super().add_param_group(param_group)

    @property
    def round_bytes(self) -> int:
        """Bytes that one average hands to the collectives: the parameters and `average_states`."""
        elements = [(p.numel(), _precision(p)) for p in self._parameters()]
        return sum(count * precision.itemsize for count, precision in elements) * (1 + len(self.average_states))

    @property
    def between_rounds(self) -> bool:
        """Whether the last step ended in an average."""
        return self.steps == self.round_end

    def common_step(self, steps: Sequence[int]) -> int:
        """The newest step of which all workers have a checkpoint; 0, the beginning, if none has. All workers must call it.

        Args:
            steps: those of which this worker has one.

        Raises:
            SynchronizationError: if there is none though a worker has several, as workers of one run do not.
        """
        newest = sorted(steps)[-KEPT:]

        def told() -> list[Tensor]:
            slots = torch.zeros(self.workers.size, KEPT, dtype=torch.float64)
            slots[self.workers.index, : len(newest)] = torch.tensor(newest, dtype=torch.float64)
            return [slots]

        (slots,), attempts = self.workers.total(told)
        self.traffic.other_bytes += attempts * _size([slots])
        found = [{int(step) for step in row if step > 0} for row in slots.tolist()]
        common = set.intersection(*found)
        if not common and max(len(each) for each in found) > 1:
            each = ", ".join(f"{number}: {sorted(have) or 'none'}" for number, have in enumerate(found))
            raise SynchronizationError(
                f"the workers have checkpoints of no common step (worker: steps; {each}). Start those that have one, give every worker its "
                f"own folder, or let all {HOW_AFRESH}."
            )
        return max(common, default=0)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace floating-point tensors by their mean over the workers, in place: averaged weights, statistics of batch normalisation.

        All workers must call it. Not for `SimulatedWorkers`, whose tensors are one process's.
        """
        chosen = [tensor for tensor in tensors if tensor.is_floating_point()]
        sums, attempts = self.workers.total(lambda: _flatten(chosen))
        self.traffic.other_bytes += attempts * _size(sums)
        _write([s / self.workers.size for s in sums], chosen)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer inside, with the position in the round, the traffic and simulated workers under negative numbers."""
        inner = self.optimizer.state_dict()
        own: dict[str, Any] = {"steps": self.steps, "round_start": self.round_start, "round_end": self.round_end}
        own |= {"round_rate": self.round_rate, "sync": repr(self.sync), "average_states": ",".join(self.average_states)}
        entries = [{**own, **asdict(self.traffic)}, *self.workers.state()]
        return {**inner, "state": {**inner["state"], **{OWN - i: entry for i, entry in enumerate(entries)}}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The inverse of `state_dict`.

        Raises:
            ValueError: if it is no state of a `LocalOptimizer`, or of one with another rule, other averaged states or other workers.
        """
        state = dict(state_dict["state"])
        entries = [dict(state.pop(key)) for key in sorted((k for k in state if k <= OWN), reverse=True)]
        if not entries:
            raise ValueError("this is a state of a plain optimizer, without a position in a round; load it before wrapping.")
        own, options = entries[0], (repr(self.sync), ",".join(self.average_states))
        if (own["sync"], own["average_states"]) != options:
            raise ValueError(
                f"this state was made with {own['sync']} and averaged states {own['average_states']!r}, not {options}."
            )
        self.optimizer.load_state_dict({**state_dict, "state": state})
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self.steps, self.round_start, self.round_end = (int(own[name]) for name in ("steps", "round_start", "round_end"))
        self.round_rate = float(own["round_rate"])
        self.traffic = Traffic(**{name: int(own[name]) for name in asdict(Traffic())})
        self.workers.restore(entries[1:])

    def __repr__(self) -> str:
        return f"LocalOptimizer({self.optimizer!r}, {self.sync!r}, workers={self.workers.size})"

    # ---- a step, and an average ----------------------------------------------------------------------------------------------------

    def _local_step(self, closure: Callable[[], Any] | None) -> Any:
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is not None and float(found) > 0.0:
            return None
        if scale is not None:
            for parameter in self._parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(scale.to(parameter.grad.device))
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    @torch.no_grad()
    def _start(self) -> None:
        """All workers get the first one's parameters."""
        parameters, workers = self._parameters(), self.workers
        elements = sum(p.numel() for p in parameters)
        message = torch.tensor([elements % MODULUS, (elements % MODULUS) ** 2], dtype=torch.float64)
        sums, attempts = workers.total(lambda: [message.clone()])
        self.traffic.other_bytes += attempts * _size(sums)
        if not _equal(sums[0], workers.size):
            raise SynchronizationError(f"the workers train models of different sizes; this one has {elements} numbers.")
        sums, attempts = workers.total(lambda: [b if workers.index == 0 else torch.zeros_like(b) for b in _flatten(parameters)])
        self.traffic.other_bytes += attempts * _size(sums)
        workers.each(lambda: _write(sums, parameters))

    @torch.no_grad()
    def _synchronize(self) -> None:
        (control, *sums), attempts = self.workers.total(lambda: [self._control(), *_flatten(self._averaged())])
        count, size = self.workers.size, _size(sums)
        if not (_equal(control[0:2], count) and _equal(control[2:4], count)):
            raise SynchronizationError(
                f"the workers are not at the same step: this one is at {self.steps}, after a round of {self.steps - self.round_start}. "
                "Do they have equal learning rates, the same rule, and checkpoints of the same step?"
            )
        means = [s.div_(count) for s in sums]
        self.workers.each(lambda: _write(means, self._averaged()))
        self.traffic.rounds += 1
        self.traffic.payload_bytes += size
        self.traffic.control_bytes += _size([control])
        self.traffic.other_bytes += (attempts - 1) * (size + _size([control]))
        if self.monitor is not None:
            spread = float(control[4]) / count - _squared_norm(means[: len(_buckets(self._parameters()))])
            h = self.steps - self.round_start
            self.monitor(Round(self.steps, h, self.round_rate, count, math.sqrt(max(0.0, spread))))

    def _control(self) -> Tensor:
        """What is compared, and the squared norm, of which the spread is made: the mean of |theta_k|^2, less |mean theta_k|^2."""
        step, period = self.steps % MODULUS, (self.steps - self.round_start) % MODULUS
        norm = 0.0 if self.monitor is None else _squared_norm(self._parameters())
        return torch.tensor([step, step**2, period, period**2, norm], dtype=torch.float64)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _averaged(self) -> list[Tensor]:
        """The parameters, then the states that are averaged."""
        parameters = self._parameters()
        return parameters + [self._state_of(parameter, name) for name in self.average_states for parameter in parameters]

    def _state_of(self, parameter: Tensor, name: str) -> Tensor:
        """A state; of zeros if this parameter was never stepped, as it would have begun."""
        states = self.optimizer.state.get(parameter)
        if not states:
            return torch.zeros_like(parameter)
        value = states.get(name)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != parameter.shape:
            fit = sorted(key for key, v in states.items() if isinstance(v, Tensor) and v.shape == parameter.shape)
            raise ValueError(f"average_states names {name!r}; of this optimizer, what is shaped like its parameters is {fit}.")
        return value


# ---- flat buckets ------------------------------------------------------------------------------------------------------------------


def _precision(tensor: Tensor) -> torch.dtype:
    """What is summed in: single precision, or double if the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one precision and device, up to `BUCKET` numbers together, or one tensor."""
    buckets: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        last = buckets[-1][-1] if buckets else None
        alike = last is not None and (_precision(last), last.device) == (_precision(tensor), tensor.device)
        if not alike or filled + tensor.numel() > BUCKET:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.numel()
    return buckets


def _flatten(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat([t.detach().reshape(-1).to(_precision(t)) for t in bucket]) for bucket in _buckets(tensors)]


def _write(flat: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """The inverse of `_flatten`, into the storage that the tensors have."""
    for values, bucket in zip(flat, _buckets(tensors), strict=True):
        for tensor, part in zip(bucket, values.split([t.numel() for t in bucket]), strict=True):
            tensor.detach().copy_(part.view(tensor.shape))


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _squared_norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) ** 2 for t in tensors)


def _equal(sums: Tensor, count: int) -> bool:
    """Whether numbers of this sum and sum of squares are equal, exactly: K sum x^2 = (sum x)^2."""
    total, squares = sums.tolist()
    return count * squares == total * total
