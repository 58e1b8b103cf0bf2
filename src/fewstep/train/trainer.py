r"""The one training loop: `fit`, which survives anything.

A training method brings an *objective*, ``(model, batch, generator) -> (loss, info)``; the loop does the rest. Step s (1, 2, ...) depends
on the state after step s - 1, on the seed and on s alone: the batch, the noise and dropout are drawn from generators that are seeded by a
hash of (seed, purpose, s). A checkpoint therefore needs the weights, their averages, the optimizer's state and the number s; a run that was
killed at any moment and started again continues *bit for bit* as if nothing had happened (on the same machine and number of threads).

Files in `folder`: ``checkpoint.safetensors``, always one whole checkpoint (written to another name, synced, renamed), and ``log.jsonl``,
one JSON object a line. Never pickle.

*Workers of Local SGD, each a run of its own with a folder of its own,* must go on from one step. They write checkpoints at averages only,
which all have at the same steps, and keep the one before: whoever wrote that of an average has seen all others come to it, so all have
written that of the average before. At the start they agree on the newest that all have, and delete what is newer. So all may be killed at
any moment, and end with the bits of a run that was not.

*Pieces.* A step works its batch out in P = processes x `accumulate` pieces of equal size, whose losses are averaged. Pieces have rows of
their own and generators of their own, so a step depends on P and not on where the pieces are worked out: two processes give the numbers
of one process with ``accumulate=2``, to the rounding of a sum in another order, and a run may be resumed with another number of processes
if P stays. P pieces give the numbers of one whole batch, to rounding, if the objective draws nothing from its generator or has `draw_whole`
(see `fewstep.train.Objective`), and treats samples one by one (no dropout, no batch normalisation, no buffers that training changes).

The learning rate at step s of S is $\eta\,\min(s/W, 1)\,(f + (1 - f)\,c(s))$ with the floor f, which is 0 unless it is given, and
$c = \tfrac12(1 + \cos \pi (s-1)/S)$ for cosine decay, 1 for none.
The averages of the weights are those of `fewstep.train.averages`.

Sources: AdamW, "Decoupled Weight Decay Regularization" (arXiv 1711.05101); cosine decay, "SGDR" (arXiv 1608.03983).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import ArtefactError, NetworkError, UnknownNameError
from fewstep.train.averages import Averages, PowerFunction, Profile, check_profiles, snapshot_files, write_snapshot
from fewstep.train.batches import Batches, Data
from fewstep.train.checkpoints import (
    CHECKPOINT,
    HOW_AFRESH,
    digest,
    earlier_file,
    earlier_files,
    frozen,
    is_sharded,
    like,
    pack,
    rank_file,
    read_checkpoint,
    restore_optimizer,
    whole,
    write_checkpoint,
)
from fewstep.train.divergence import FACTOR, RunningLevel
from fewstep.train.local_sgd import LocalOptimizer
from fewstep.train.logs import LOG, Log, make_bar, say
from fewstep.train.processes import Processes, find_processes
from fewstep.train.randomness import derive, make_generator, purpose_of, seeded
from fewstep.train.stages import ADAMW, Objective, Stage, optimizers_of, parameters_of

__all__ = ["CHECKPOINT", "LOG", "FitResult", "fit"]

Model = nn.Module | Mapping[str, nn.Module]
FINISHED = f"this training was finished already, with step {{}}; to train again, {HOW_AFRESH}"
"""What to say of a run that has nothing left to do."""
STAGE = ("modules", "every", "clip", "learning rates", "averaged")
"""What a checkpoint says of a stage, in this order."""
SMALLEST_SCALE = 2.0**-14
"""Scale of a float16 loss below which gradients that overflow are a divergence, not a search for the scale."""


@dataclass(frozen=True, repr=False)
class FitResult:
    """What `fit` gives beside the trained model.

    Attributes:
        step: the last step that was done.
        averages: decay or `PowerFunction` -> the averaged weights, for ``model.load_state_dict``; of a model that maps names to modules,
            name -> averaged weights of that module.
        log: the records of the log, oldest first.
        weights: those of the last step, in the same form; whole, also where the model's own are spread over processes.
        main: whether this process is the first, which writes files; the only one is.
    """

    step: int
    averages: dict[Any, dict[str, Any]]
    log: list[dict[str, Any]]
    weights: dict[str, Any]
    main: bool = True

    def __repr__(self) -> str:
        """Without the weights.

        Example:
            >>> FitResult(20, {0.999: {}}, [{"step": 20, "loss": 0.25}], {})
            FitResult(step=20, averages=[0.999], last record={'step': 20, 'loss': 0.25})
        """
        return f"FitResult(step={self.step}, averages={list(self.averages)}, last record={self.log[-1] if self.log else None})"


def fit(
    objective: Objective | Stage | Sequence[Stage],
    model: Model,
    data: Data,
    *,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    warmup: int = 100,
    decay: str = "cosine",
    floor: float = 0.0,
    optimizer: Callable[..., Any] = ADAMW,
    clip: float | None = 1.0,
    ema: Profile | Sequence[Profile] = 0.999,
    precision: torch.dtype | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    checkpoint_every: int = 500,
    log_every: int = 50,
    resume: bool = True,
    progress: bool = False,
    accumulate: int = 1,
    accelerator: Any = None,
    share_gradients: bool = True,
    divergence: float | None = FACTOR,
    snapshot_every: int = 0,
    tensorboard: bool = False,
) -> FitResult:
    """Train a model, in place.

    Args:
        objective: ``(model, batch, generator) -> (loss, info)``; see `fewstep.train.DenoisingLoss`, and `fewstep.train.Objective` for
        what an
            object may add. Or one or several `fewstep.train.Stage`, done one after another in every step.
        model: the module, on the device to train on; or several by name, which objectives then find as ``model["name"]``.
        data: either tensors of equal first dimension, or `fewstep.train.Rows`, from which batches are drawn without repetition within an
            epoch; or a function ``(batch_size, generator) -> batch`` that draws everything random from the generator.
        steps: how many steps altogether, those before a resumption included.
        batch_size: samples in a step, of all processes together.
        learning_rate: the highest one.
        warmup: steps over which it rises to that.
        decay: ``"cosine"`` down to the floor at the last step, or ``"constant"``.
        floor: where the cosine ends, as a share of ``learning_rate``; 0.1 is common in the training of language models.
        optimizer: called as ``optimizer(parameters, lr=learning_rate)``; gives an optimizer, or a sequence of them. Any will do that has
            ``param_groups``, ``step``, ``zero_grad``, ``state_dict`` and ``load_state_dict``.
        clip: largest norm of the gradient, or None.
        ema: decay of the averaged weights, or a `fewstep.train.PowerFunction`; several of them; or none: ``()``.
        precision: run the network in this type where that is safe (``torch.bfloat16``); the weights stay in theirs. The loss of
            ``torch.float16`` is scaled.
        seed: of everything random.
        folder: where checkpoints and the log go; without one, nothing is written. Several processes need to see the same one.
        checkpoint_every: steps between checkpoints. The last step and Ctrl-C write one too. A worker of Local SGD that is a run of its own
            waits for the next average.
        log_every: steps between records of the log.
        resume: continue from the folder's checkpoint if there is one; False starts afresh and overwrites it.
        progress: show a bar, and say from which step a run goes on.
        accumulate: pieces that a process works its part of the batch out in, for batches larger than memory.
        accelerator: an ``accelerate.Accelerator``. Without one, a process that ``accelerate launch`` or ``torchrun`` started among others
            makes its own.
        share_gradients: average the gradients of the processes in every step. False: each trains weights of its own, and the optimizer
            brings them together, as Local SGD does.
        divergence: end the run when the loss has been more than this many times its running level for a hundred steps
            (`fewstep.train.divergence`); None: never.
        snapshot_every: steps between snapshots of the power-function averages, from which `fewstep.train.average_afterwards` makes averages
            of any length; 0: none. They need a folder.
        tensorboard: also write event files for TensorBoard, into ``folder/tensorboard``.

    Returns:
        A `FitResult`; the model itself holds the weights of the last step.

    Raises:
        NetworkError: at the first loss or gradient that is not finite, and when the loss stays far above its level; the last checkpoint
        stays. ArtefactError: if the checkpoint is damaged, or was made with other options, model or data. ValueError: for options or data
        that make no sense. TypeError: for an optimizer that is not called to make one, or data that are no tensors.
        KeyboardInterrupt: after Ctrl-C, when the current step is done and its checkpoint written. MissingExtraError: if Accelerate or
        TensorBoard is asked for and not installed.

    Example:
        >>> from fewstep.schedules import Flow
        >>> from fewstep.train.losses import DenoisingLoss
        >>> class Mean(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.value = nn.Parameter(torch.zeros(()))
        ...     def forward(self, x, time):
        ...         return self.value.expand_as(x)
        >>> model = Mean()
        >>> result = fit(DenoisingLoss(Flow(), "data"), model, {"x": torch.full((64, 2), 3.0)}, steps=200, batch_size=16, learning_rate=0.1)
        >>> round(model.value.item(), 2)
        3.0
    """
    options = Options(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        decay=decay,
        floor=floor,
        clip=clip,
        ema=check_profiles(ema),
        precision=precision,
        seed=seed,
        divergence=divergence,
        snapshot_every=snapshot_every,
    )
    if checkpoint_every < 1 or log_every < 1 or accumulate < 1:
        raise ValueError(
            "checkpoint_every, log_every and accumulate are numbers of steps or pieces, at least 1; "
            f"got {checkpoint_every}, {log_every} and {accumulate}."
        )
    if snapshot_every and folder is None:
        raise ValueError(f"snapshot_every={snapshot_every} needs a folder to write into: fit(..., folder=...).")
    given = (objective,) if isinstance(objective, Stage) else objective
    stages = tuple(given) if isinstance(given, Sequence) else (Stage(given),)
    stages = tuple(dataclasses.replace(stage, optimizer=stage.optimizer or optimizer) for stage in stages)
    processes = find_processes(accelerator, _device(model), precision)
    run = _Run(stages, model, Batches(data, batch_size, seed), options, processes, accumulate, share_gradients)
    files = _Files(None if folder is None else Path(folder), run, tensorboard)
    files.open(resume)
    main = processes.rank == 0
    if progress and main and run.step:
        say(f"going on from step {run.step} of {steps}" if run.step < steps else FINISHED.format(run.step))
    with _training(run.modules), _interruptible() as interrupted, make_bar(run.step, steps, progress and main) as bar:
        while run.step < steps:
            loss, stop = run.advance(interrupted)
            files.check()
            last = stop or run.step == steps
            if run.step % log_every == 0 or last:
                files.log.record({"step": run.step, **run.measured()})
                bar.set_postfix(loss=f"{loss:.4g}")
            if snapshot_every and run.step % snapshot_every == 0:
                files.keep_averages()
            if files.due(checkpoint_every) or last:
                files.save()
            bar.update(1)
            if stop:
                raise KeyboardInterrupt
    files.log.close()
    processes.finish(run.prepared.values())
    return FitResult(run.step, run.whole_averages(), files.log.records, run.nested(run.whole_weights()), main)


@dataclass(frozen=True)
class Options:
    """The options of `fit` that decide the numbers. A checkpoint fits a run only if they are equal."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    decay: str
    clip: float | None
    ema: tuple[Profile, ...]
    precision: torch.dtype | None
    seed: int
    divergence: float | None = FACTOR
    snapshot_every: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or self.warmup < 0:
            got = f"{self.steps}, {self.warmup} and {self.batch_size}"
            raise ValueError(f"fit needs steps and warmup of at least 0 and batch_size of at least 1, got {got}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0.0) or not (self.clip is None or self.clip > 0.0):
            raise ValueError(f"fit needs a positive learning_rate and clip, got {self.learning_rate} and {self.clip}.")
        if self.decay not in DECAYS:
            raise UnknownNameError("decay of the learning rate", self.decay, DECAYS)
        if not 0.0 <= self.floor <= 1.0 or (self.floor and self.decay == "constant"):
            raise ValueError(
                f'floor is the share of learning_rate where decay="cosine" ends, between 0 and 1, got {self.floor} with {self.decay!r}.'
            )
        if self.divergence is not None and not self.divergence > 1.0:
            raise ValueError(f"divergence is a multiple of the loss's level above 1, or None, got {self.divergence}.")
        if self.snapshot_every < 0 or (self.snapshot_every and not any(isinstance(p, PowerFunction) for p in self.ema)):
            raise ValueError(
                f"snapshot_every={self.snapshot_every} keeps averages of the power function; give ema=PowerFunction(0.05)."
            )

    def rate(self, step: int) -> float:
        """The learning rate at a step, as a fraction of the highest."""
        decayed = self.floor + (1.0 - self.floor) * DECAYS[self.decay](step, self.steps)
        return decayed * (min(step / self.warmup, 1.0) if self.warmup else 1.0)


DECAYS: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda step, steps: 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps)),
    "constant": lambda step, steps: 1.0,
}
"""Name -> fraction of the learning rate at a step of so many."""


class _Turn:
    """A stage in a run: its optimizers, and what it measured last."""

    def __init__(self, number: int, stage: Stage, modules: dict[str, nn.Module], options: Options):
        self.number, self.stage = number, stage
        self.names = tuple(modules)
        self.own: dict[str, nn.Module] = dict(getattr(stage.objective, "modules", None) or {})
        self.parameters = parameters_of([*modules.values(), *self.own.values()])
        rate = options.learning_rate if stage.learning_rate is None else stage.learning_rate
        self.optimizers = optimizers_of(stage.optimizer or ADAMW, self.parameters, rate)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        clip = options.clip if stage.clip is None else stage.clip
        self.largest = math.inf if clip is None else clip
        factor = options.divergence if stage.watched else None
        self.level = None if factor is None else RunningLevel(factor)
        self.loss, self.gradient_norm, self.info = math.nan, math.nan, {}
        self.record: dict[str, float] = {}  # of an update before the last checkpoint
        self.label = ""
        self.drawn: tuple[int, Mapping[str, Tensor]] | None = None  # what an objective drew for a whole batch, and at which step

    def averages(self, name: str) -> bool:
        return self.stage.averaged and name in self.names

    def check_rounds(self, steps: int) -> None:
        """Refuse a Local SGD whose last average is not that of the last step, so that workers would end with models of their own."""
        updates = steps // self.stage.every
        for optimizer in self.optimizers:
            if not isinstance(optimizer, LocalOptimizer) or not updates:
                continue
            turns = 1 if optimizer.workers.real else optimizer.workers.size  # simulated workers share the updates
            if updates != turns * optimizer.sync.total_steps:
                raise ValueError(
                    f"the workers would end with different models: fit(steps={steps}) does {updates / turns:g} optimizer steps a worker, "
                    f"the rule {type(optimizer.sync).__name__} was made for {optimizer.sync.total_steps}; make total_steps equal to them."
                )


class _Run:
    """The state of a training run, and how it advances by a step."""

    def __init__(
        self,
        stages: tuple[Stage, ...],
        model: Model,
        batches: Batches,
        options: Options,
        processes: Processes,
        accumulate: int,
        share: bool,
    ):
        self.batches, self.options, self.processes, self.accumulate = batches, options, processes, accumulate
        self.single = not isinstance(model, Mapping)
        self.modules: dict[str, nn.Module] = {"": model} if isinstance(model, nn.Module) else dict(model)
        self.pieces = processes.count * accumulate
        if options.batch_size % self.pieces:
            raise ValueError(
                f"batch_size={options.batch_size} is cut into {processes.count} x {accumulate} equal pieces (processes x accumulate); "
                f"take a multiple of {self.pieces}."
            )
        if not stages:
            raise ValueError("fit needs an objective, or at least one Stage.")
        self.told = self._told(model)  # before anything is wrapped or spread
        self.turns = [_Turn(i, stage, stage.trained(model), options) for i, stage in enumerate(stages)]
        self._label()
        self.settings = self._settings()
        self._prepare(share)
        self.averaged = [name for name in self.modules if any(turn.averages(name) for turn in self.turns)]
        self.averages = {name: Averages(options.ema, self.modules[name].state_dict()) for name in self.averaged}
        self.step = 0

    # ---- building ----

    def _label(self) -> None:
        """Names for the log: none for the only stage, else those of what is trained."""
        labels = ["+".join(turn.names) or "loss" for turn in self.turns]
        for turn, label in zip(self.turns, labels, strict=True):
            if len(self.turns) > 1:
                turn.label = label + (f" {turn.number}" if labels.count(label) > 1 else "") + "/"

    def _prepare(self, share: bool) -> None:
        trained = {name: self.modules[name] for name in dict.fromkeys(name for turn in self.turns for name in turn.names)}
        if self.processes.count > 1 and any(
            p.requires_grad for turn in self.turns for m in turn.own.values() for p in m.parameters()
        ):
            raise ValueError(
                "an objective's own modules are trained in one process only; with several, pass them in the model: {name: module}."
            )
        optimizers = [optimizer for turn in self.turns for optimizer in turn.optimizers]
        for turn in self.turns:
            turn.check_rounds(self.options.steps)
        if share and self.processes.count > 1 and any(isinstance(o, LocalOptimizer) and o.workers.real for o in optimizers):
            raise ValueError(
                f"{self.processes.count} processes would share their gradients in every step and average their weights as well, which "
                "costs more and gains nothing; pass fit(share_gradients=False) with a LocalOptimizer."
            )
        self.prepared, ready = self.processes.prepare(trained, optimizers, share)
        for turn in self.turns:
            turn.optimizers = [ready.pop(0) for _ in turn.optimizers]
            turn.parameters = parameters_of([*(self.prepared[name] for name in turn.names), *turn.own.values()])
            for module in turn.own.values():
                module.to(self.processes.device)
        for name, module in self.modules.items():
            if name not in trained:
                module.to(self.processes.device)

    def _told(self, model: Model) -> dict[str, Any]:
        states = {name: _shapes(module.state_dict()) for name, module in self.modules.items()}
        return states[""] if self.single else states

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must have been made with, as JSON values."""
        return {
            **{field.name: str(getattr(self.options, field.name)) for field in dataclasses.fields(self.options)},
            "objective": [_name(turn.stage.objective) for turn in self.turns],
            "optimizer": [[_optimizer_told(optimizer) for optimizer in turn.optimizers] for turn in self.turns],
            "stages": [[list(turn.names), turn.stage.every, turn.largest, turn.rates, turn.stage.averaged] for turn in self.turns],
            "pieces (processes x accumulate)": self.pieces,
            "data": self.batches.told(),
            "model": self.told,
        }

    # ---- a step ----

    def advance(self, interrupted: list[bool]) -> tuple[float, bool]:
        """Do one step; return the loss of its last stage, and whether any process was asked to stop."""
        step = self.step + 1
        turns = [turn for turn in self.turns if step % turn.stage.every == 0]
        asked = [self._update(turn, step, interrupted) for turn in turns]
        if not turns:
            asked = self.processes.mean([float(bool(interrupted))])
        self._average(turns)
        self.step = step
        return (turns or self.turns)[-1].loss, any(asked)

    def _update(self, turn: _Turn, step: int, interrupted: list[bool]) -> bool:
        """The update of one stage; returns whether any process was asked to stop."""
        for optimizer, rates in zip(turn.optimizers, turn.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.options.rate(step)
            optimizer.zero_grad(set_to_none=True)
        turn.info = {}
        with self._only(turn):
            losses = [self._piece(turn, step, number) for number in range(self.accumulate)]
        turn.loss, asked = self.processes.mean([sum(losses) / self.accumulate, float(bool(interrupted))])
        if not math.isfinite(turn.loss):
            if (name := self.batches.not_finite(step)) is not None:
                raise NetworkError(
                    f"the data of step {step} hold values of {name!r} that are not finite: remove or mend these rows."
                )
            raise NetworkError(self._diverged(turn, step, f"the {turn.label}loss is {turn.loss}"))
        turn.gradient_norm = self.processes.clip(turn.optimizers, turn.parameters, turn.largest)
        scaler = self.processes.scaler
        if not math.isfinite(turn.gradient_norm) and (scaler is None or scaler.get_scale() < SMALLEST_SCALE):
            raise NetworkError(self._diverged(turn, step, f"the {turn.label}norm of the gradient is {turn.gradient_norm}"))
        level = turn.level
        if level is not None and level.far_above(turn.loss):
            told = (
                f"the {turn.label}loss has been above {level.factor:g} times its level of {level.level:.3g} for {level.above} steps"
            )
            raise NetworkError(self._diverged(turn, step, told))
        self.processes.step(turn.optimizers)
        updated = getattr(turn.stage.objective, "updated", None)
        if updated is not None:
            updated(self._view(()), step)
        return asked > 0.0

    def _piece(self, turn: _Turn, step: int, number: int) -> float:
        """Forward and backward on one piece of the batch; returns its loss."""
        seed, device, index = self.options.seed, self.processes.device, self.processes.rank * self.accumulate + number
        objective = turn.stage.objective
        generator = make_generator(seed, purpose_of("objective", turn.number, index), step)
        more = number + 1 < self.accumulate
        with contextlib.ExitStack() as stack:
            stack.enter_context(seeded(derive(seed, purpose_of("network", turn.number, index), step), device))
            if more:
                stack.enter_context(self.processes.unsynchronised([self.prepared[name] for name in turn.names]))
            with self.processes.lower_precision():
                loss, info = objective(self._view(turn.names), self._batch(turn, step, index), generator)
            for name, value in info.items():
                part = value.detach() if isinstance(value, Tensor) else value
                turn.info[name] = turn.info[name] + part if name in turn.info else part
            value = float(loss.detach())
            self.processes.backward(loss if self.accumulate == 1 else loss / self.accumulate)
        return value

    def _batch(self, turn: _Turn, step: int, index: int) -> dict[str, Tensor]:
        """The rows of one piece, on the device."""
        size, seed = self.options.batch_size, self.options.seed
        part = size // self.pieces
        first, last = index * part, (index + 1) * part
        draw = getattr(turn.stage.objective, "draw_whole", None)
        if draw is None:
            batch = self.batches.piece(step, first, last)
        else:
            if turn.drawn is None or turn.drawn[0] != step:  # for all pieces of a step once
                generator = make_generator(seed, purpose_of("objective", turn.number, 0), step)
                turn.drawn = (step, draw(self.batches.piece(step, 0, size), generator))
            batch = {name: v[first:last] if v.ndim and len(v) == size else v for name, v in turn.drawn[1].items()}
        return {name: value.to(self.processes.device) for name, value in batch.items()}

    def _view(self, names: tuple[str, ...]) -> Any:
        """The model as an objective sees it: what it trains as the processes share it, all else as it is."""
        seen = {name: self.prepared[name] if name in names else module for name, module in self.modules.items()}
        return seen[""] if self.single else seen

    @contextlib.contextmanager
    def _only(self, turn: _Turn) -> Iterator[None]:
        """Within it, what the stage does not train needs no gradients."""
        own = {id(parameter) for parameter in turn.parameters}
        others = [p for m in self.modules.values() for p in m.parameters() if p.requires_grad and id(p) not in own]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _average(self, turns: Sequence[_Turn]) -> None:
        for name in self.averaged:
            if any(turn.averages(name) for turn in turns):
                self.averages[name].update(self.modules[name].state_dict())

    def _diverged(self, turn: _Turn, step: int, what: str) -> str:
        clip = "none" if turn.largest == math.inf else f"{turn.largest:g}"
        precision = "" if self.processes.precision is None else f", train in full precision (now {self.processes.precision})"
        return (
            f"training diverged: {what} at step {step}. Lower learning_rate={turn.rates[0][0]:g}, lengthen warmup={self.options.warmup}, "
            f"clip the gradient (clip={clip}){precision}, and see that the data are about as large as 1 (images in [-1, 1]). The last "
            "checkpoint, if any, is still good."
        )

    # ---- what it tells ----

    def measured(self) -> dict[str, float]:
        """What the log says of the last step."""
        return {f"{turn.label}{name}": value for turn in self.turns for name, value in self._record(turn).items()}

    def _record(self, turn: _Turn) -> dict[str, float]:
        """What a stage measured at its last update; nothing before its first."""
        if math.isnan(turn.loss):
            return turn.record
        names = list(turn.info)
        info = self.processes.mean([float(turn.info[name]) / self.accumulate for name in names])
        rate = turn.optimizers[0].param_groups[0]["lr"]
        last = {"gradient_norm": turn.gradient_norm, "learning_rate": rate}
        return {"loss": turn.loss, **dict(zip(names, info, strict=True)), **last}

    def nested(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """By the names of the modules; for a model that is one module, of that one."""
        return values[""] if self.single and "" in values else dict(values)

    def whole_averages(self) -> dict[Any, dict[str, Any]]:
        """Profile -> averaged weights; all processes must ask."""
        return {
            profile: self.nested({name: _whole(self.averages[name].values[profile]) for name in self.averaged})
            for profile in self.options.ema
        }

    def whole_weights(self) -> dict[str, dict[str, Tensor]]:
        """The weights; all processes must ask."""
        return {name: _whole(module.state_dict()) for name, module in self.modules.items()}

    # ---- its state ----

    def state(self) -> dict[str, Any]:
        """Everything that changes from step to step."""
        return {
            "step": self.step,
            "modules": {name: dict(module.state_dict()) for name, module in self.modules.items()},
            "averages": {name: [found.updates, *found.values.values()] for name, found in self.averages.items()},
            "optimizers": [[_bare(optimizer).state_dict() for optimizer in turn.optimizers] for turn in self.turns],
            "objectives": [{name: dict(module.state_dict()) for name, module in turn.own.items()} for turn in self.turns],
            "records": [self._record(turn) for turn in self.turns],
            "levels": [None if turn.level is None else turn.level.state() for turn in self.turns],
            "scaler": None if self.processes.scaler is None else self.processes.scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        for name, module in self.modules.items():
            _load(module, state["modules"][name])
        for name, averages in self.averages.items():
            averages.updates, *kept = state["averages"][name]
            for average, saved in zip(averages.values.values(), kept, strict=True):
                for key, value in average.items():
                    value.copy_(like(getattr(saved[key], "value", saved[key]), value))
        for turn, optimizers, own, level in zip(self.turns, state["optimizers"], state["objectives"], state["levels"], strict=True):
            for optimizer, saved in zip(turn.optimizers, optimizers, strict=True):
                restore_optimizer(_bare(optimizer), saved)
            for name, module in turn.own.items():
                _load(module, own[name])
            if turn.level is not None:
                turn.level.restore(level)
        for turn, record in zip(self.turns, state["records"], strict=True):
            turn.record = record
        if self.processes.scaler is not None:
            self.processes.scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])


class _Files:
    """Checkpoint, snapshots and log of one run. Without a folder: the log in memory."""

    def __init__(self, folder: Path | None, run: _Run, tensorboard: bool):
        self.folder, self.run, self.processes = folder, run, run.processes
        self.main = run.processes.rank == 0
        self.log = Log(folder, writes=self.main, tensorboard=tensorboard)
        self.checked = folder is None
        local = [o for turn in run.turns for o in turn.optimizers if isinstance(o, LocalOptimizer) and o.workers.real]
        self.local = local if self.processes.count == 1 else []  # of workers that are runs of their own
        self.saved = self.common = 0  # steps of the last checkpoint, and of the last one at an average

    def open(self, resume: bool) -> None:
        """Bring the run to where the folder's checkpoint left it, or clear the folder."""
        if self.folder is None:
            return
        path = self.folder / CHECKPOINT
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (path.stem, LOG, "averages"):
                for left in self.folder.glob(f".{name}*.tmp"):  # of runs that were killed while they wrote
                    left.unlink(missing_ok=True)
            if not resume:
                for file in (path, *earlier_files(self.folder).values()):
                    file.unlink(missing_ok=True)
            if self.local:
                self._agree(path)
        self.processes.wait()
        if path.exists():
            self._read(path)
        self.log.rewind(self.run.step)
        if self.main:
            self._clear(self.run.step if path.exists() else None)
            for step, file in snapshot_files(self.folder).items():
                if step > self.run.step:
                    file.unlink()
        self.processes.wait()

    def _read(self, path: Path) -> None:
        values, state = read_checkpoint(path)
        self._check_settings(path, values["settings"])
        if values["apart"] is not None:
            if values["apart"] != self.processes.count:
                raise ArtefactError(
                    f"{path} is of {values['apart']} processes that had weights or states of their own; now there are "
                    f"{self.processes.count}. Start as many, or {HOW_AFRESH}."
                )
            if not self.main:
                values, state = read_checkpoint(rank_file(path.parent, state["step"], self.processes.rank))
        self.run.restore(state)

    def _agree(self, path: Path) -> None:
        """Leave the newest checkpoint that all workers have, if there is one."""
        kept = earlier_files(path.parent)
        if path.exists():
            kept[int(read_checkpoint(path)[1]["step"])] = path
        self.saved = self.common = self.local[0].common_step(list(kept))
        for step, file in kept.items():
            if step > self.common:
                file.unlink()
        if self.common:
            kept[self.common].replace(path)

    def due(self, every: int) -> bool:
        """Whether it is time for a checkpoint."""
        if not self.local:
            return self.run.step % every == 0
        return self.run.step - self.saved >= every and self._averaged()

    def _averaged(self) -> bool:
        return all(optimizer.between_rounds for optimizer in self.local)

    def check(self) -> None:
        """See after the first step, not at the first checkpoint, whether a checkpoint can hold the state."""
        if not self.checked:
            pack(self.run.state())
            self.checked = True

    def save(self) -> None:
        """Write a checkpoint; one of each process if their states differ."""
        if self.folder is None:
            return
        text, tensors = frozen(self.run.state())
        found = self.processes.gathered(int(digest(text, tensors)[:15], 16)) if self.processes.count > 1 else [0]
        apart = None if len(set(found)) == 1 else self.processes.count
        values = {"settings": self.run.settings, "apart": apart}
        if apart is not None and not self.main:
            write_checkpoint(rank_file(self.folder, self.run.step, self.processes.rank), values, text, tensors)
        self.processes.wait()  # the first process names the others' files when they are there
        if self.main:
            if self.local and self.saved:
                (self.folder / CHECKPOINT).replace(earlier_file(self.folder, self.saved))
            write_checkpoint(self.folder / CHECKPOINT, values, text, tensors)
            self._clear(self.run.step)
        self.saved = self.run.step
        self.processes.wait()

    def keep_averages(self) -> None:
        """Write a snapshot of the averages of the power function."""
        if self.folder is None:
            return
        averages = self.run.whole_averages()
        if self.main:
            flat = {p: values if self.run.single else _flat(values) for p, values in averages.items()}
            write_snapshot(self.folder, self.run.step, flat)

    def _clear(self, step: int | None) -> None:
        """Delete the processes' own files of other steps, and what is older than the average before the one at this step."""
        assert self.folder is not None
        for file in self.folder.glob("checkpoint-*-of-*.safetensors"):
            if file.name.split("-")[1] != str(step):
                file.unlink(missing_ok=True)
        if self.local and step is not None and self._averaged():
            for older, file in earlier_files(self.folder).items():
                if older < self.common:
                    file.unlink()
            self.common = step

    def _check_settings(self, path: Path, found: Mapping[str, Any]) -> None:
        mine = self.run.settings
        wrong = [key for key in sorted(mine.keys() | found.keys()) if _plain(mine.get(key)) != found.get(key)]
        if wrong:
            told = [
                _difference(key, found.get(key), _plain(mine.get(key))) for key in wrong if key != "stages" or wrong == ["stages"]
            ]
            raise ArtefactError(
                f"{path} was made with other settings: {'; '.join(told)}. Use these, another folder, or {HOW_AFRESH}."
            )


# ---- what things are called, and tensors -------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _difference(key: str, was: Any, now: Any) -> str:
    """What to say of a setting; of stages, the first entry that differs."""
    if key == "stages" and was and len(was) == len(now):
        number = next(i for i, (old, new) in enumerate(zip(was, now, strict=True)) if old != new)
        entry = next(name for name, old, new in zip(STAGE, was[number], now[number], strict=True) if old != new)
        was, now = (stages[number][STAGE.index(entry)] for stages in (was, now))
        key = f"{entry} of stage {number}"
    return f"{key} was {str(was)[:80]}, now {str(now)[:80]}"


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Shape and dtype of each; of many, a digest, for messages are short and headers have an end."""
    told = {name: [str(value.dtype), *value.shape] for name, value in tensors.items()}
    if len(told) <= 64:
        return told
    return {"tensors": len(told), "sha256": hashlib.sha256(str(sorted(told.items())).encode()).hexdigest()}


def _name(thing: Any) -> str:
    """What a checkpoint calls an objective: its options if it is a dataclass, else its name. Never an address in memory."""
    name = repr(thing) if dataclasses.is_dataclass(thing) else getattr(thing, "__qualname__", type(thing).__qualname__)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", name)


def _optimizer_told(optimizer: Any) -> list[Any]:
    groups = [{k: str(v) for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    return [type(optimizer).__name__, *groups]


def _bare(optimizer: Any) -> Any:
    """An optimizer without Accelerate's wrapper."""
    return optimizer.optimizer if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer


def _whole(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(value.detach()) for name, value in values.items()}


def _flat(values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, inner in values.items() for key, value in inner.items()}


def _load(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Load weights, spread over the processes as the module's own are."""
    now = module.state_dict()
    tensors = {name: getattr(value, "value", value) for name, value in saved.items()}
    module.load_state_dict({name: like(v, now[name]) if is_sharded(now.get(name)) else v for name, v in tensors.items()})


def _device(model: Model) -> torch.device:
    modules = model.values() if isinstance(model, Mapping) else [model]
    return next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))


# ---- around the loop ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _training(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    was = {name: module.training for name, module in modules.items()}
    for module in modules.values():
        module.train()
    try:
        yield
    finally:
        for name, module in modules.items():
            module.train(was[name])


@contextlib.contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """Ctrl-C fills the list instead of raising, so that the step ends; a second one raises at once."""
    asked: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(*_: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
