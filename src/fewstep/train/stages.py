"""The updates that make up one step of training: `Stage`, an objective and what it trains.

Most methods have one. Distillation with a fake score, or an adversary, has several, which take turns within every step: each goes forward
and backward on the step's batch, with weights that the stages before it have already changed, and updates its own part of the model. What
a stage does not train needs no gradients meanwhile, though gradients pass through it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.errors import UnknownNameError
from fewstep.train.batches import Batch

__all__ = ["ADAMW", "Objective", "Stage"]

ADAMW = functools.partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.0)


class Objective(Protocol):
    """What a training method brings: a function of the model, a batch and a generator.

    An object may say more, by attributes that the loop looks for:

    - ``modules``: name -> module. Trained along (parameters that need gradients), and kept in checkpoints, but not averaged.
    - ``draw_whole(batch, generator) -> batch``: draws everything random for a whole batch. Pieces of the batch are then given their part of
      what it
      returned, so that a step in pieces, or of several processes, is that of the whole batch to rounding.
    - ``updated(model, step)``: called after its update, for targets that follow the model.
    """

    def __call__(self, model: Any, batch: Batch, generator: torch.Generator, /) -> tuple[Tensor, Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Stage:
    """One update of a step.

    Args:
        objective: ``(model, batch, generator) -> (loss, info)``, called with the whole model.
        trains: names of the modules that it updates, of a model that maps names to modules; none: all.
        optimizer: called as ``optimizer(parameters, lr=learning_rate)``; gives an optimizer, or a sequence of them. None: that of
            `fewstep.train.fit`.
        learning_rate: the highest; None: that of `fewstep.train.fit`.
        clip: largest norm of the gradient; None: that of `fewstep.train.fit`; ``math.inf``: any.
        every: the update takes place at steps that this divides.
        averaged: whether what it trains is averaged.
        watched: whether a loss far above its running level ends the run; not for losses that rise by design, as an adversary's.
    """

    objective: Objective
    trains: str | tuple[str, ...] = ()
    optimizer: Callable[..., Any] | None = None
    learning_rate: float | None = None
    clip: float | None = None
    every: int = 1
    averaged: bool = True
    watched: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"Stage needs every, a number of steps of at least 1, got {self.every!r}.")
        if not all(value is None or value > 0.0 for value in (self.learning_rate, self.clip)):
            raise ValueError(f"Stage needs a positive learning_rate and clip, got {self.learning_rate} and {self.clip}.")
        if isinstance(self.trains, str):
            object.__setattr__(self, "trains", (self.trains,))

    def trained(self, model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Name -> module of what it updates; the name of a model that is one module is empty.

        Raises:
            UnknownNameError: if the model has no such module.
        """
        if not isinstance(model, Mapping):
            if self.trains:
                raise ValueError(f"a stage trains {self.trains}, but the model is one module; pass a mapping of names to modules.")
            return {"": model}
        for name in self.trains:
            if name not in model:
                raise UnknownNameError("module to train", name, model)
        return {name: model[name] for name in (self.trains or model)}


def parameters_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """All parameters, each once."""
    found = itertools.chain.from_iterable(module.parameters() for module in modules)
    return list({id(parameter): parameter for parameter in found}.values())


def optimizers_of(make: Callable[..., Any], parameters: Sequence[Tensor], learning_rate: float) -> list[Any]:
    """What a callable gives for parameters, as a list.

    Raises:
        TypeError: if it cannot be called, or gives no optimizer.
    """
    if not callable(make):
        raise TypeError(
            "optimizer is called as optimizer(parameters, lr=...): pass a class such as torch.optim.AdamW, or a functools.partial of one; "
            f"got {repr(make) if isinstance(make, str) else 'an instance of ' + type(make).__name__}."
        )
    made = make(parameters, lr=learning_rate)
    found = list(made) if isinstance(made, (list, tuple)) else [made]
    wanted = ("param_groups", "step", "zero_grad", "state_dict", "load_state_dict")
    for optimizer in found:
        if lacking := [name for name in wanted if not hasattr(optimizer, name)]:
            raise TypeError(
                f"optimizer must give an optimizer or a sequence of them; a {type(optimizer).__name__} has no {lacking[0]}."
            )
    return found
