"""What is kept and compared beside a training: the network evaluations it took, and what its checkpoints were made for.

A forward and a backward pass cost about as much as three forward passes. A run that went on from a checkpoint has cost what the run that
was never stopped has: what was done after the checkpoint, and lost, is not counted.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.denoisers import innermost
from fewstep.identity import digest_of, identity

__all__ = ["BACKWARD", "Spent", "counted", "made_for", "watch", "weights_of"]

BACKWARD = 3
"""A forward and a backward pass cost about so many forward passes."""


class Spent(nn.Module):
    """Network evaluations so far, one sample each. A module without weights, so that checkpoints hold the number."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluations = 0

    def get_extra_state(self) -> Tensor:
        """The number, for checkpoints."""
        return torch.tensor([self.evaluations], dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """The number, of a checkpoint."""
        self.evaluations = int(state)

    def count(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook."""
        learning = torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad
        self.evaluations += (BACKWARD if learning else 1) * len(inputs[0])


@contextlib.contextmanager
def counted(networks: Iterable[Any], spent: Spent | None = None) -> Iterator[Spent]:
    """Within it, calls of networks are counted; of what is no module, none are.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> with counted([network]) as spent, torch.no_grad():
        ...     _ = network(torch.zeros(3, 2))
        >>> spent.evaluations
        3
    """
    spent = Spent() if spent is None else spent
    modules = {id(network): network for network in networks if isinstance(network, nn.Module)}
    handles = [module.register_forward_hook(spent.count) for module in modules.values()]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Watched:
    """An objective with the number of evaluations among what checkpoints keep, and what is done after its updates."""

    made_for: str
    objective: Any
    spent: Spent | None = field(repr=False)
    after: Callable[[Any, int], None] | None = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        if name in ("objective", "made_for"):
            raise AttributeError(name)
        return getattr(self.objective, name)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The objective's own, and the number of evaluations."""
        own = dict(getattr(self.objective, "modules", None) or {})
        return own if self.spent is None else {**own, "spent": self.spent}

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Any]]:
        return self.objective(model, batch, generator)

    def updated(self, model: Any, step: int) -> None:
        """Called by the loop."""
        updated = getattr(self.objective, "updated", None)
        if updated is not None:
            updated(model, step)
        if self.after is not None and self.spent is not None:
            counted = self.spent.evaluations
            self.after(model, step)
            self.spent.evaluations = counted  # pictures are not training


def watch(objective: Any, made_for: str, spent: Spent | None = None, after: Callable[[Any, int], None] | None = None) -> Any:
    """An objective for `fewstep.train.fit`, with what its checkpoints are compared by and keep.

    Args:
        objective: the objective.
        made_for: what a checkpoint must have been made for, in words: it is compared as the objective's options are.
        spent: kept in checkpoints; None: nothing is.
        after: called with the model and the number of the step after every update; what it asks the networks is not counted.
    """
    return _Watched(made_for, objective, spent, after)


def made_for(model: Any, source: Any, others: Any = None) -> str:
    """What a checkpoint of a training must have been made for: digests of a model, with its guidance and limits, and of the data.

    Args:
        model: a denoiser. Its weights are looked at, whatever it says of itself.
        source: what batches are drawn from; of a function, its name is compared elsewhere.
        others: anything else that has a repr.
    """
    known = identity(model)
    hasher = hashlib.sha256(f"{known} {weights_of(innermost(model, 'network'))} {others!r}".encode())
    data = f", data {digest_of(dict(source))[:12]}" if isinstance(source, Mapping) else ""
    return f"{known['name']} {hasher.hexdigest()[:12]}{data}"


def weights_of(network: Any) -> str:
    """A digest of a network's weights; an empty text for what has none."""
    weights = network.state_dict() if isinstance(network, nn.Module) else {}
    found = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    return digest_of(found) if found else ""
