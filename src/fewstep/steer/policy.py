"""The network that is trained, and the denoiser of it: read, guided and limited as the one that it began as."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fewstep.adapt.adapted_network import AdaptedNetwork
from fewstep.adapt.lora import add_adapter
from fewstep.adapt.trained import HALF, in_single_precision, trainable, without_dropout
from fewstep.denoisers import Denoiser, innermost

__all__ = ["network_of", "reference_of", "trained_copy", "with_network"]


def network_of(denoiser: object) -> nn.Module:
    """The module of a denoiser, through what is around it.

    Raises:
        TypeError: if it has none.
    """
    network = innermost(denoiser, "network")
    if not isinstance(network, nn.Module):
        raise TypeError(f"{denoiser!r:.80} has no torch module that could be trained. Wrap one in fewstep.Denoiser.")
    return network


def with_network(denoiser: Any, network: nn.Module) -> Any:
    """The denoiser of another network, with the same reading, guidance and limits; both stay as they are.

    Example:
        >>> import fewstep as fs
        >>> guided = fs.guidance.ClassifierFree(fs.load("digits"), 2.0, {"label": 10})
        >>> other = with_network(guided, copy.deepcopy(guided.denoiser.network))
        >>> other.guidance_scale, other.denoiser.network is guided.denoiser.network
        (2.0, False)
    """
    made = copy.copy(denoiser)
    if isinstance(denoiser, Denoiser):
        made.network, made.calls, made._remembered = network, 0, {}
        made.network_dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), None)
        made.info = replace(denoiser.info, fingerprint=None)
        return made
    if not hasattr(denoiser, "denoiser"):
        raise TypeError(f"{denoiser!r:.80} is no fewstep.Denoiser, nor around one, so its network cannot be another.")
    made.denoiser = with_network(denoiser.denoiser, network)
    return made


def trained_copy(network: nn.Module, adapter: Any = None, *, seed: int = 0) -> nn.Module:
    """What is trained: a copy of a network, or the network with an adapter. It drops nothing out, and is in single precision, not half.

    Of a network with an adapter of its own, that keeps the weights of this adapter alone, the adapter is trained further.

    Args:
        network: it stays as it is; weights that are not trained are shared.
        adapter: `fewstep.adapt.LoraOptions` or a ``peft.LoraConfig``; None for the whole network.
        seed: of the adapter.

    Raises:
        ValueError: for an adapter on a network that is one.
    """
    if adapter is not None:
        if isinstance(network, AdaptedNetwork):
            raise ValueError("the student is an adapter already, which is trained further as it is: leave adapter out.")
        return without_dropout(AdaptedNetwork(network, _put(adapter, seed)))
    if not isinstance(network, AdaptedNetwork):
        return trainable(network)
    own = set(network.state_dict())
    shared = {id(p): p for name, p in network.named_parameters() if name not in own}
    made = in_single_precision(copy.deepcopy(network, shared), own)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name in own and parameter.is_floating_point())
    return without_dropout(made)


def reference_of(denoiser: Any, trained: nn.Module) -> Any:
    """What a policy is compared with: the denoiser it began as, in the precision of what is trained; so at first both say the same."""
    network = network_of(denoiser)
    if isinstance(trained, AdaptedNetwork) or not any(p.dtype in HALF for p in network.parameters()):
        return denoiser
    return with_network(denoiser, in_single_precision(copy.deepcopy(network)).requires_grad_(False))


def _put(adapter: Any, seed: int) -> Callable[[nn.Module], None]:
    return lambda inner: add_adapter(inner, adapter, seed=seed)


def device_like(network: nn.Module, like: Tensor) -> Tensor:
    """A tensor like another, on the device of a network."""
    return like.to(next((p.device for p in network.parameters()), like.device))
