"""A network with an adapter, of which the adapter alone is trained and kept: `AdaptedNetwork`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["AdaptedNetwork", "core", "part_of"]


def part_of(network: nn.Module) -> str | None:
    """Of which part of a diffusers pipeline a network is, ``"unet"`` or ``"transformer"``; None for other networks."""
    return next((part.part for part in network.modules() if hasattr(type(part), "pipelines")), None)  # type: ignore[misc]


def core(network: nn.Module) -> nn.Module:
    """What an adapter goes on: of a network of diffusers its own module, without what fewstep has around it."""
    for part in network.modules():
        if hasattr(type(part), "pipelines"):
            return part.model  # type: ignore[return-value]
    return network.network if isinstance(network, AdaptedNetwork) else network


class AdaptedNetwork(nn.Module):
    """A network with an adapter, of which the adapter alone is trained, averaged and kept in checkpoints.

    The weights of the network are not copied: they are those of the teacher, which stay as they are.

    Args:
        network: the teacher's; it is left as it is.
        put: puts the adapter on a network, in place.
    """

    def __init__(self, network: nn.Module, put: Callable[[nn.Module], None]):
        super().__init__()
        self.network = _frozen_view(network)
        put(core(self.network))
        self._own = {name for name, value in self.network.named_parameters(prefix="network") if value.requires_grad}

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """The network's prediction."""
        return self.network(x, time, **cond)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter alone."""
        prefix, whole = kwargs.get("prefix", ""), super().state_dict(*args, **kwargs)
        for name in list(whole):  # in place, for this may be a part of a larger network's
            if name.startswith(prefix) and name.removeprefix(prefix) not in self._own:
                del whole[name]
        return whole

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # pyright: ignore
        """What is not the adapter stays as it is."""
        for name, value in super().state_dict().items():
            if name not in self._own:
                state_dict[f"{prefix}{name}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)


def _frozen_view(network: nn.Module) -> nn.Module:
    """The same weights, frozen, in parameters of their own, so that the network itself can still be trained elsewhere."""
    return copy.deepcopy(network, {id(p): nn.Parameter(p.data, requires_grad=False) for p in network.parameters()})
