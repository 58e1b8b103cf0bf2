"""Networks that are told one more number, such as the length of a step or the number of calls.

`Told` adds the number through a branch that begins at zero: at first nothing changes. `Telling` is a network that is told one such number
always.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distill.networks import LAYERS, called, channels_of, layer_of

__all__ = ["Telling", "Told"]

TIME_EMBEDDINGS = (
    *("time_embedding", "time_embed", "time_embedder", "timestep_embedder", "time_text_embed", "t_embedder", "time_mlp", "time"),
)
"""How networks call the module that embeds their time."""


class Told(nn.Module):
    r"""A network that is told one more number in about [0, 1]: ``network(x, time, told=number, **cond)``.

    The number d is embedded as $(\cos \omega_k d, \sin \omega_k d)$ with low angular frequencies, from 1 to `highest`: so the output is
    smooth in d, and can be differentiated by it. Two layers, the second of which begins at zero, turn that into as many channels as a
    module of the network puts out, and are added there: the network begins as it was.

    Args:
        network: any network.
        at: name of the module to whose output it is added. Left out: the last layer of what embeds the time, if that has a usual name,
            else the first linear layer or convolution.
        default: the number where none is given.
        highest: the highest angular frequency.
        size: number of cosines and sines, and half the width of the branch.

    Raises:
        ValueError: if there is no such module, or nothing to add to.

    Example:
        >>> network = Told(nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 2)), at="0")
        >>> network.network.forward = lambda x, time: network.network[2](network.network[1](network.network[0](x)))
        >>> x, time = torch.ones(3, 2), torch.ones(3)
        >>> bool((network(x, time, told=0.3) == network(x, time, told=0.7)).all())
        True
    """

    omega: Tensor

    def __init__(self, network: nn.Module, at: str | None = None, *, default: float = 1.0, highest: float = 10.0, size: int = 32):
        super().__init__()
        self.network, self.at, self.default = network, _place(network) if at is None else at, float(default)
        self.highest, self.size = float(highest), int(size)
        found = dict(network.named_modules())
        if self.at not in found:
            raise ValueError(
                f"there is no module {self.at!r} in {type(network).__name__}; it has {', '.join(list(found)[1:9])}, ..."
            )
        layer = layer_of(found[self.at])
        self.behind = isinstance(layer, nn.Linear)  # whether channels are the last dimension
        last = nn.Linear(2 * size, channels_of(layer))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.branch = nn.Sequential(nn.Linear(size, 2 * size), nn.SiLU(), last)
        weight = next(network.parameters())
        self.branch.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        exponents = torch.linspace(0.0, 1.0, size // 2, dtype=torch.float64, device="cpu")
        self.register_buffer("omega", (highest**exponents).to(weight.device), persistent=False)

    def forward(self, x: Tensor, time: Tensor, *, told: float | Tensor | None = None, **cond: Any) -> Tensor:
        """The network's output.

        Args:
            x, time, **cond: what the network takes.
            told: the number, or one a sample ``"batch"``.
        """
        number, like = self.default if told is None else told, next(self.branch.parameters())
        added = self.added(number if isinstance(number, Tensor) else like.new_full((len(x),), number))

        used: list[bool] = []

        def add(module: nn.Module, inputs: Any, output: Any) -> Any:
            used.append(True)
            if isinstance(output, (tuple, list)):
                return type(output)((self._added(output[0], added), *output[1:]))
            return self._added(output, added)

        handle = self.network.get_submodule(self.at).register_forward_hook(add)
        try:
            output = self.network(x, time, **cond)
        finally:
            handle.remove()
        if not used:
            raise ValueError(
                f"module {self.at!r} of {type(self.network).__name__} is not called as such; name a layer in it: at=..."
            )
        return output

    def added(self, told: Tensor) -> Tensor:
        """What is added to the channels for each number ``"batch"``: ``"batch channels"``."""
        like = next(self.branch.parameters())
        angle = told.to(like.dtype)[:, None] * self.omega.to(like.dtype)
        return self.branch(torch.cat([angle.cos(), angle.sin()], 1))

    @property
    def options(self) -> dict[str, Any]:
        """What makes such a network of another, as JSON values."""
        return {"at": self.at, "default": self.default, "highest": self.highest, "size": self.size}

    def _added(self, output: Tensor, added: Tensor) -> Tensor:
        if len(output) != len(added):
            if len(output) > 1 and len(output) % len(added):
                raise ValueError(f"module {self.at!r} puts out {len(output)} rows for {len(added)} samples; name another: at=...")
            added = added.repeat(len(output) // len(added), 1) if len(output) > 1 else added
        inner = [1] * (output.ndim - 2)
        shape = (len(added), *inner, added.shape[1]) if self.behind else (len(added), added.shape[1], *inner)
        return output + added.to(output.dtype).reshape(shape)


class Telling(nn.Module):
    """A network that is told a number, the same always: `Told` for one number of calls.

    Args:
        network: takes ``told``.
        number: what it is told.
        calls: the number of calls that this stands for, where it stands for one.

    Example:
        >>> class Network(nn.Module):
        ...     def forward(self, x, time, told):
        ...         return told * x
        >>> float(Telling(Network(), 0.5)(torch.ones(()), torch.ones(1)))
        0.5
    """

    number: Tensor

    def __init__(self, network: nn.Module, number: float, calls: int | None = None):
        super().__init__()
        self.network, self.told, self.told_calls = network, float(number), calls
        self.register_buffer("number", torch.tensor(self.told, dtype=torch.float64, device="cpu"))  # so that digests differ

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """The network's output."""
        return self.network(x, time, told=self.told, **cond)


def _place(network: nn.Module) -> str:
    """Where a network takes in its time."""
    named = dict(network.named_modules())
    for name in called(named, TIME_EMBEDDINGS):
        inside = [inner for inner, module in named.items() if isinstance(module, LAYERS) and f"{inner}.".startswith(f"{name}.")]
        if inside:
            return inside[-1]
    for name, module in named.items():
        if isinstance(module, LAYERS):
            return name
    raise ValueError(
        f"{type(network).__name__} has no linear layer and no convolution that a number could be added to. Name a module: at=..."
    )
