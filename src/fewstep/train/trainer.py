r"""The one training loop: `fit`, which survives anything.

A training method brings an *objective*, ``(model, batch, generator) -> (loss, info)``; the loop does the rest. Step s (1, 2, ...) depends
on the state after step s - 1, on the seed and on s alone: the batch, the noise and dropout are drawn from generators that are seeded by a
hash of (seed, purpose, s). A checkpoint therefore needs the weights, their averages, the optimizer's state and the number s; a run that was
killed at any moment and started again continues *bit for bit* as if nothing had happened (on the same machine and number of threads).

Files in `folder`: ``checkpoint.safetensors``, always one whole checkpoint (written to another name, synced, renamed), and ``log.jsonl``,
one JSON object a line. Never pickle.

The learning rate at step s of S is $\eta\,\min(s/W, 1)\,c(s)$, with $c = \tfrac12(1 + \cos \pi (s-1)/S)$ for cosine decay, 1 for none.
The average of decay d follows $\bar\theta \leftarrow \bar\theta + (1 - d_s)(\theta - \bar\theta)$ with $d_s = \min(d, (1 + s)/(10 + s))$,
which forgets the untrained weights early.

Sources: AdamW, "Decoupled Weight Decay Regularization" (arXiv 1711.05101); cosine decay, "SGDR" (arXiv 1608.03983); averages of the weights
as in "Score-Based Generative Modeling through Stochastic Differential Equations" (arXiv 2011.13456, appendix H).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.artefacts import write_atomically
from fewstep.errors import ArtefactError, NetworkError, UnknownNameError

__all__ = ["CHECKPOINT", "LOG", "FitResult", "fit"]

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
FORMAT = 1
"""Format of the checkpoints."""

Batch = Mapping[str, Tensor]
Objective = Callable[[nn.Module, Batch, torch.Generator], tuple[Tensor, Mapping[str, Any]]]
Data = Mapping[str, Tensor] | Callable[[int, torch.Generator], Batch]

ADAMW = functools.partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.0)


@dataclass(frozen=True)
class FitResult:
    """What `fit` gives beside the trained model.

    Attributes:
        step: the last step that was done.
        averages: decay -> the averaged weights, for ``model.load_state_dict``.
        log: the records of the log, oldest first.
    """

    step: int
    averages: dict[float, dict[str, Tensor]]
    log: list[dict[str, Any]]


def fit(
    objective: Objective,
    model: nn.Module,
    data: Data,
    *,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    warmup: int = 100,
    decay: str = "cosine",
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
    clip: float | None = 1.0,
    ema: float | Sequence[float] = 0.999,
    precision: torch.dtype | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    checkpoint_every: int = 500,
    log_every: int = 50,
    resume: bool = True,
    progress: bool = False,
) -> FitResult:
    """Train a model, in place.

    Args:
        objective: ``(model, batch, generator) -> (loss, info)``; see `fewstep.train.DenoisingLoss`.
        model: the module, on the device to train on.
        data: either tensors of equal first dimension, from which batches are drawn without repetition within an epoch; or a function
            ``(batch_size, generator) -> batch`` that draws everything random from the generator.
        steps: how many steps altogether, those before a resumption included.
        batch_size: samples in a step.
        learning_rate: the highest one.
        warmup: steps over which it rises to that.
        decay: ``"cosine"`` down to zero at the last step, or ``"constant"``.
        optimizer: called as ``optimizer(parameters, lr=learning_rate)``.
        clip: largest norm of the gradient, or None.
        ema: decay of the averaged weights; several of them; or none: ``()``.
        precision: run the network in this type where that is safe (``torch.bfloat16``); the weights stay in theirs.
        seed: of everything random.
        folder: where checkpoints and the log go; without one, nothing is written.
        checkpoint_every: steps between checkpoints. The last step and Ctrl-C write one too.
        log_every: steps between records of the log.
        resume: continue from the folder's checkpoint if there is one; False starts afresh and overwrites it.
        progress: show a bar.

    Returns:
        A `FitResult`; the model itself holds the weights of the last step.

    Raises:
        NetworkError: at the first loss or gradient that is not finite; the last checkpoint stays.
        ArtefactError: if the checkpoint is damaged, or was made with other options, model or data.
        ValueError: for options or data that make no sense.
        KeyboardInterrupt: after Ctrl-C, when the current step is done and its checkpoint written.

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
        clip=clip,
        ema=tuple(ema) if isinstance(ema, Sequence) else (ema,),
        precision=precision,
        seed=seed,
    )
    if checkpoint_every < 1 or log_every < 1:
        raise ValueError(
            f"checkpoint_every and log_every are numbers of steps, at least 1; got {checkpoint_every} and {log_every}."
        )
    run = _Run(objective, model, data, optimizer(model.parameters(), lr=learning_rate), options)
    files = _Files(None if folder is None else Path(folder), run.settings())
    files.open(run, resume)
    with _training(model), _interruptible() as interrupted, _bar(run.step, steps, progress) as bar:
        while run.step < steps:
            loss = run.advance()
            stop = bool(interrupted)  # asked once: what comes later waits for the next step
            last = stop or run.step == steps
            if run.step % log_every == 0 or last:
                files.record({"step": run.step, **run.measured(loss)})
                bar.set_postfix(loss=f"{loss:.4g}")
            if run.step % checkpoint_every == 0 or last:
                files.save(run)
            bar.update(1)
            if stop:
                raise KeyboardInterrupt
    return FitResult(run.step, run.averages, files.log)


@dataclass(frozen=True)
class Options:
    """The options of `fit` that decide the numbers. A checkpoint fits a run only if they are equal."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    decay: str
    clip: float | None
    ema: tuple[float, ...]
    precision: torch.dtype | None
    seed: int

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or self.warmup < 0:
            got = f"{self.steps}, {self.warmup} and {self.batch_size}"
            raise ValueError(f"fit needs steps and warmup of at least 0 and batch_size of at least 1, got {got}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0.0) or not (self.clip is None or self.clip > 0.0):
            raise ValueError(f"fit needs a positive learning_rate and clip, got {self.learning_rate} and {self.clip}.")
        if self.decay not in DECAYS:
            raise UnknownNameError("decay of the learning rate", self.decay, DECAYS)
        if not all(0.0 <= decay < 1.0 for decay in self.ema):
            raise ValueError(f"ema needs decays in [0, 1), got {self.ema}.")

    def rate(self, step: int) -> float:
        """The learning rate at a step, as a fraction of the highest."""
        return DECAYS[self.decay](step, self.steps) * (min(step / self.warmup, 1.0) if self.warmup else 1.0)


DECAYS: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda step, steps: 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps)),
    "constant": lambda step, steps: 1.0,
}
"""Name -> fraction of the learning rate at a step of so many."""


class _Run:
    """The state of a training run, and how it advances by a step."""

    def __init__(self, objective: Objective, model: nn.Module, data: Data, optimizer: torch.optim.Optimizer, options: Options):
        self.objective, self.model, self.optimizer, self.options = objective, model, optimizer, options
        self.data = data if callable(data) else _check_tensors(data)
        self.source = data if callable(data) else None
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.averages = {decay: {k: v.detach().clone() for k, v in model.state_dict().items()} for decay in options.ema}
        self.step = 0
        self.gradient_norm = torch.zeros(())
        self.info: Mapping[str, Any] = {}

    def advance(self) -> float:
        """Do one step; return its loss."""
        step, seed = self.step + 1, self.options.seed
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.options.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        with _seeded(_derive(seed, "network", step), self.device):
            with torch.autocast(self.device.type, self.options.precision, enabled=self.options.precision is not None):
                loss, self.info = self.objective(self.model, self._batch(step), _generator(seed, "objective", step))
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NetworkError(self._diverged(step, "loss", value))
            loss.backward()
        largest = math.inf if self.options.clip is None else self.options.clip
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        if not math.isfinite(norm := float(self.gradient_norm)):
            raise NetworkError(self._diverged(step, "norm of the gradient", norm))
        self.optimizer.step()
        self._average(step)
        self.step = step
        return value

    def measured(self, loss: float) -> dict[str, float]:
        """What the log says of the last step."""
        info = {name: float(value) for name, value in self.info.items()}
        rate = self.optimizer.param_groups[0]["lr"]
        return {"loss": loss, **info, "gradient_norm": float(self.gradient_norm), "learning_rate": rate}

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must have been made with, as JSON values."""
        data = self.data
        groups = [{k: str(v) for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]
        return {
            **{name: str(value) for name, value in dataclasses.asdict(self.options).items()},
            "objective": _name(self.objective),
            "optimizer": [type(self.optimizer).__name__, *groups],
            "data": _shapes(data) if isinstance(data, Mapping) else _name(data),
            "model": _shapes(self.model.state_dict()),
        }

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that changes from step to step: JSON values, and tensors by name."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for decay, average in self.averages.items():
            tensors.update({f"average {decay}/{name}": value for name, value in average.items()})
        numbers: dict[str, Any] = {}
        for index, entries in self.optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                (tensors if isinstance(value, Tensor) else numbers)[f"optimizer/{index}/{name}"] = value
        return {"step": self.step, "numbers": numbers}, tensors

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        entries: dict[int, dict[str, Any]] = {}
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in {**values["numbers"], **tensors}.items():
            part, _, name = key.partition("/")
            if part == "optimizer":
                index, _, name = name.partition("/")
                entries.setdefault(int(index), {})[name] = value
            else:
                parts.setdefault(part, {})[name] = value
        self.model.load_state_dict(parts.get("model", {}))
        self.averages = {
            decay: {k: v.to(self.device) for k, v in parts.get(f"average {decay}", {}).items()} for decay in self.options.ema
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})
        self.step = int(values["step"])

    def _batch(self, step: int) -> dict[str, Tensor]:
        size, seed = self.options.batch_size, self.options.seed
        if self.source is not None:
            batch = self.source(size, _generator(seed, "data", step))
        else:
            assert isinstance(self.data, Mapping)
            rows = _rows(len(next(iter(self.data.values()))), size, seed, step)
            batch = {name: values[rows] for name, values in self.data.items()}
        return {name: values.to(self.device) for name, values in batch.items()}

    @torch.no_grad()
    def _average(self, step: int) -> None:
        state = self.model.state_dict()
        for decay, average in self.averages.items():
            weight = 1.0 - min(decay, (1.0 + step) / (10.0 + step))
            for name, value in state.items():
                if value.is_floating_point():
                    average[name].lerp_(value, weight)
                else:
                    average[name].copy_(value)

    def _diverged(self, step: int, what: str, value: float) -> str:
        return (
            f"training diverged: the {what} is {value} at step {step}. Lower learning_rate={self.options.learning_rate:g}, lengthen "
            f"warmup={self.options.warmup}, or clip the gradient (clip={self.options.clip}). The last checkpoint, if any, is still good."
        )


class _Files:
    """Checkpoint and log of one run. Without a folder: the log in memory."""

    def __init__(self, folder: Path | None, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self.log: list[dict[str, Any]] = []

    def open(self, run: _Run, resume: bool) -> None:
        """Bring the run to where the folder's checkpoint left it, or clear the folder."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f".{CHECKPOINT}.*.tmp"):  # of runs that were killed while they wrote
            left.unlink(missing_ok=True)
        path = self.folder / CHECKPOINT
        if not resume:
            path.unlink(missing_ok=True)
        if path.exists():
            values, tensors = read_checkpoint(path)
            self._check_settings(path, values["settings"])
            run.restore(values, tensors)
        self._rewind(run.step)

    def save(self, run: _Run) -> None:
        if self.folder is None:
            return
        values, tensors = run.state()
        write_checkpoint(self.folder / CHECKPOINT, {**values, "settings": self.settings}, tensors)

    def record(self, record: dict[str, Any]) -> None:
        self.log.append(record)
        if self.folder is not None:
            with open(self.folder / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _rewind(self, step: int) -> None:
        """Drop the records of steps that the checkpoint does not have, and a torn last line."""
        assert self.folder is not None
        path = self.folder / LOG
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                if record["step"] <= step:
                    self.log.append(record)
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in self.log).encode())

    def _check_settings(self, path: Path, found: Mapping[str, Any]) -> None:
        wrong = [key for key in sorted(self.settings.keys() | found.keys()) if self.settings.get(key) != found.get(key)]
        if wrong:
            told = "; ".join(f"{key} was {str(found.get(key))[:80]}, now {str(self.settings.get(key))[:80]}" for key in wrong)
            raise ArtefactError(
                f"{path} was made with other settings: {told}. Use these, another folder, or resume=False to start afresh."
            )


# ---- checkpoints -------------------------------------------------------------------------------------------------------------------


def write_checkpoint(path: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write one file with a checksum, under another name first, then renamed."""
    from safetensors.torch import save

    arrays = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(values, sort_keys=True)
    header = {"format": str(FORMAT), "checkpoint": text, "sha256": _digest(text, arrays)}
    write_atomically(path, save(arrays, metadata=header))


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_checkpoint` wrote.

    Raises:
        ArtefactError: if it is truncated, damaged or foreign.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ArtefactError(f"{path} is damaged: {error}. Delete it, or pass resume=False to start afresh.") from error
    if header.get("format") != str(FORMAT) or header.get("sha256") != _digest(header.get("checkpoint", ""), tensors):
        raise ArtefactError(f"{path} is damaged or no checkpoint of this version. Delete it, or pass resume=False to start afresh.")
    return json.loads(header["checkpoint"]), tensors


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        hasher.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


# ---- randomness and data -----------------------------------------------------------------------------------------------------------


def _derive(seed: int, purpose: str, number: int) -> int:
    """A 63-bit seed for one purpose and step; different purposes and steps have unrelated ones."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()[:8], "big") >> 1


def _generator(seed: int, purpose: str, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(_derive(seed, purpose, number))


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The ambient generator, which dropout layers use, is seeded inside and untouched outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _rows(count: int, size: int, seed: int, step: int) -> Tensor:
    """Rows of one batch: the s-th piece of one shuffle of all rows after another."""
    first, last = (step - 1) * size, step * size
    epochs = range(first // count, (last - 1) // count + 1)
    order = torch.cat([_shuffle(count, seed, epoch) for epoch in epochs])
    return order[first - epochs.start * count :][:size]


@functools.lru_cache(maxsize=4)
def _shuffle(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed, "shuffle", epoch))


def _check_tensors(data: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not data or not all(isinstance(value, Tensor) and value.ndim for value in data.values()):
        raise ValueError("data must map names to tensors of equal length, or be a function (batch_size, generator) -> batch.")
    lengths = {name: len(value) for name, value in data.items()}
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        raise ValueError(f"the tensors of data must have one equal first dimension of at least 1, got {lengths}.")
    return data


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: [str(value.dtype), *value.shape] for name, value in tensors.items()}


def _name(thing: Any) -> str:
    """What a checkpoint calls an objective or a source of data: its options if it is a dataclass, else its name."""
    return repr(thing) if dataclasses.is_dataclass(thing) else getattr(thing, "__qualname__", type(thing).__qualname__)


# ---- around the loop ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was)


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


def _bar(done: int, steps: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, initial=done, disable=not progress, unit="step")
