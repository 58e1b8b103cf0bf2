"""The processes that a run is spread over: `Alone`, one process and PyTorch; `Spread`, one or many, by Accelerate.

What Accelerate is configured for (``accelerate launch``, ``torchrun``, or an ``Accelerator`` of one's own) is what happens: data-parallel
processes (DDP), weights in shards (FSDP, version 2), the device, mixed precision and its scaling of the loss. The loop asks for seven
things: prepare, run in lower precision, go backward, clip, take a step, take a mean over processes, wait.
"""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import MissingExtraError

__all__ = ["Alone", "Processes", "Spread", "find_processes"]

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Processes(abc.ABC):
    """All processes of a run, seen from one of them."""

    count: int = 1
    rank: int = 0
    device: torch.device
    precision: torch.dtype | None
    scaler: Any = None

    @abc.abstractmethod
    def prepare(
        self, modules: Mapping[str, nn.Module], optimizers: Sequence[Any], share: bool
    ) -> tuple[dict[str, nn.Module], list[Any]]:
        """Modules and optimizers as they are called in the loop. share: average the gradients of the processes."""

    def lower_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, the network runs in the precision that was asked for, where that is safe."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not None)

    def unsynchronised(self, modules: Iterable[nn.Module]) -> contextlib.AbstractContextManager[Any]:
        """Within it, gradients are added up in this process alone: more pieces of the batch follow."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""

    @abc.abstractmethod
    def clip(self, optimizers: Sequence[Any], parameters: Sequence[Tensor], largest: float) -> float:
        """Scale the gradients to a norm of at most `largest`; returns what it was."""

    @abc.abstractmethod
    def step(self, optimizers: Sequence[Any]) -> None:
        """Let optimizers take their step."""

    def mean(self, values: Sequence[float]) -> list[float]:
        """Numbers, averaged over the processes."""
        return list(values)

    def gathered(self, value: int) -> list[int]:
        """One whole number of every process, by rank; below 2^62."""
        return [value]

    @abc.abstractmethod
    def wait(self) -> None:
        """Until every process is here."""

    @abc.abstractmethod
    def finish(self, modules: Iterable[nn.Module]) -> None:
        """Undo what `prepare` put around the modules' calls."""


class Alone(Processes):
    """One process, without Accelerate. float16 has its loss scaled."""

    def __init__(self, device: torch.device, precision: torch.dtype | None):
        self.device, self.precision = device, precision
        if precision is torch.float16:
            self.scaler = torch.amp.GradScaler(device.type)

    def prepare(
        self, modules: Mapping[str, nn.Module], optimizers: Sequence[Any], share: bool
    ) -> tuple[dict[str, nn.Module], list[Any]]:
        return dict(modules), list(optimizers)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip(self, optimizers: Sequence[Any], parameters: Sequence[Tensor], largest: float) -> float:
        return _clip(self.scaler, optimizers, parameters, largest)

    def step(self, optimizers: Sequence[Any]) -> None:
        _step(self.scaler, optimizers)

    def wait(self) -> None:
        pass

    def finish(self, modules: Iterable[nn.Module]) -> None:
        pass


class Spread(Processes):
    """The processes of an ``accelerate.Accelerator``.

    Raises:
        ValueError: for a configuration that the loop cannot keep exact.
    """

    def __init__(self, accelerator: Any, precision: torch.dtype | None):
        self.accelerator = accelerator
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                f"the Accelerator accumulates over {accelerator.gradient_accumulation_steps} steps; leave that at 1 and pass "
                "fit(accumulate=...), which keeps batches and noise those of a single process."
            )
        if accelerator.mixed_precision not in PRECISIONS:
            raise ValueError(f"mixed_precision must be one of {sorted(PRECISIONS)}, got {accelerator.mixed_precision!r}.")
        self.precision = PRECISIONS[accelerator.mixed_precision]
        if precision is not None and precision is not self.precision:
            raise ValueError(
                f"fit(precision={precision}) contradicts the Accelerator's mixed_precision={accelerator.mixed_precision!r}; set it there."
            )
        self.shards = str(accelerator.distributed_type).endswith("FSDP")
        if self.shards and not accelerator.is_fsdp2:
            raise ValueError("weights in shards need version 2 of FSDP: set fsdp_version: 2 in the configuration of accelerate.")
        self.count, self.rank, self.device = accelerator.num_processes, accelerator.process_index, accelerator.device
        self.scaler = accelerator.scaler
        self.share = True

    def prepare(
        self, modules: Mapping[str, nn.Module], optimizers: Sequence[Any], share: bool
    ) -> tuple[dict[str, nn.Module], list[Any]]:
        if self.shards and (len(modules) > 1 or not share):
            raise ValueError(f"weights in shards (FSDP) can be those of one module, with shared gradients; got {sorted(modules)}.")
        self.share = share
        if not share:
            return self._apart(modules), list(optimizers)
        prepared = self.accelerator.prepare(*modules.values(), *optimizers)
        found = list(prepared) if len(modules) + len(optimizers) > 1 else [prepared]
        return dict(zip(modules, found[: len(modules)], strict=True)), found[len(modules) :]

    def _apart(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Modules of each process' own, which begin alike."""
        from accelerate.utils import broadcast

        for module in modules.values():
            module.to(self.device)
            for value in (*module.parameters(), *module.buffers()):
                value.data.copy_(broadcast(value.data.clone(), from_process=0))
        return dict(modules)

    def unsynchronised(self, modules: Iterable[nn.Module]) -> contextlib.AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        for module in modules:
            stack.enter_context(self.accelerator.no_sync(module))
        return stack

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, optimizers: Sequence[Any], parameters: Sequence[Tensor], largest: float) -> float:
        if not self.share:  # Accelerate knows nothing of these optimizers, nor of what is to be unscaled
            return _clip(self.scaler, optimizers, parameters, largest)
        norm = self.accelerator.clip_grad_norm_(parameters, largest)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def step(self, optimizers: Sequence[Any]) -> None:
        _step(None if self.share else self.scaler, optimizers)  # what Accelerate wraps has the scaler in it

    def mean(self, values: Sequence[float]) -> list[float]:
        if self.count == 1:
            return list(values)
        return self.accelerator.reduce(torch.tensor(values, dtype=self._wide(), device=self.device), "mean").tolist()

    def gathered(self, value: int) -> list[int]:
        return self.accelerator.gather(torch.tensor([value], device=self.device)).tolist()

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def finish(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)

    def _wide(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64


def _clip(scaler: Any, optimizers: Sequence[Any], parameters: Sequence[Tensor], largest: float) -> float:
    """Undo the scaling of the loss, if there is one, then clip."""
    if scaler is not None:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    return float(torch.nn.utils.clip_grad_norm_(parameters, largest))


def _step(scaler: Any, optimizers: Sequence[Any]) -> None:
    for optimizer in optimizers:
        optimizer.step() if scaler is None else scaler.step(optimizer)
    if scaler is not None:
        scaler.update()


def find_processes(accelerator: Any, device: torch.device, precision: torch.dtype | None) -> Processes:
    """The processes of an Accelerator; of the launcher that started this process among others; or this one alone.

    Raises:
        MissingExtraError: if a launcher started several processes and Accelerate is not installed.
    """
    if accelerator is not None:
        return Spread(accelerator, precision)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Alone(device, precision)
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtraError("accelerate", "train", "Training with several processes") from error
    told = os.environ.get("ACCELERATE_MIXED_PRECISION")
    mixed = told or next((name for name, dtype in PRECISIONS.items() if dtype is precision), "no")
    return Spread(Accelerator(cpu=device.type == "cpu" and not torch.cuda.is_available(), mixed_precision=mixed), precision)
