r"""Networks of students: a copy of the teacher's, that network with an adapter, or one that is told the guidance scale.

The embedding of the guidance scale s is that of latent consistency models ("Latent Consistency Models", arXiv 2310.04378, section 4.3),
with $w = s - 1$ and m = 256:

$$ e(w) = \big(\sin 1000 w f_j,\; \cos 1000 w f_j\big)_{j < m/2}, \qquad f_j = 10000^{-j / (m/2 - 1)} . $$

A linear map without bias adds it to what the first linear layer of the time embedding gets, as ``time_cond_proj_dim`` of diffusers does.
The map begins at zero, so the student begins as the teacher's network; diffusers' own begins random.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.adapt import adapted_network as adapt
from fewstep.adapt.adapted_network import AdaptedNetwork, part_of
from fewstep.adapt.lora import LoraOptions, add_adapter
from fewstep.adapt.trained import trainable, without_dropout
from fewstep.distill.told import Told
from fewstep.errors import FewstepError

__all__ = [
    "WRAPPERS",
    "AdaptedNetwork",
    "GuidanceEmbedded",
    "core",
    "guidance_embedding",
    "part_of",
    "sharing_copy",
    "student_network",
]

EMBEDDING = 256
"""Numbers of the embedding of the guidance scale."""
FIRST_LAYERS = ("time.1", "time_embedding.linear_1", "time_text_embed.timestep_embedder.linear_1")
"""Where the first linear layer of the time embedding is in networks that are known: ours, and those of diffusers."""


def core(network: nn.Module) -> nn.Module:
    """What an adapter goes on: of a network of diffusers its own module, without what fewstep has around it."""
    found = adapt.core(network)
    return found.network if isinstance(found, GuidanceEmbedded) else found


def sharing_copy(network: nn.Module) -> nn.Module:
    """A copy that shares the weights which need no gradient, and has its own of the others."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters() if not p.requires_grad})


class GuidanceEmbedded(nn.Module):
    """A network that takes a further condition ``guidance``, ``"batch"``: the scale s, 1 for none.

    Args:
        network: any; its time embedding has a linear layer first.
        layer: the name of that layer; left out, one that is known.

    Raises:
        FewstepError: if there is no such layer.
    """

    def __init__(self, network: nn.Module, layer: str | None = None):
        super().__init__()
        if isinstance(network, AdaptedNetwork):
            raise FewstepError(
                "a student that is told the guidance scale is a whole network: an adapter's file has no place for it."
            )
        self.network = network
        inner = core(network)
        known = dict(inner.named_modules())
        found = next((name for name in ((layer,) if layer else FIRST_LAYERS) if name in known), None)
        if found is None or not isinstance(known[found], nn.Linear):
            told = f"no linear layer {layer!r}" if layer else "none of the time embeddings that are known"
            raise FewstepError(f"a {type(inner).__name__} has {told}. Name the first linear layer of its time embedding.")
        linear: nn.Linear = known[found]  # type: ignore[assignment]
        self.layer = found
        self.project = nn.Linear(EMBEDDING, linear.in_features, bias=False, dtype=torch.float32, device=linear.weight.device)
        nn.init.zeros_(self.project.weight)
        self._now: list[Tensor] = []
        linear.register_forward_pre_hook(_Added(self._now))

    def forward(self, x: Tensor, time: Tensor, guidance: Tensor, **cond: Any) -> Tensor:
        """The prediction under a guidance scale."""
        self._now[:] = [self.project(guidance_embedding(guidance - 1.0))]
        try:
            return self.network(x, time, **cond)
        finally:
            self._now.clear()

    @property
    def options(self) -> dict[str, Any]:
        """What makes such a network of another, as JSON values."""
        return {"layer": self.layer}


class _Added:
    """Adds to the input of a layer what there is to add now. One for the wrapper and the layer, also in copies of both."""

    def __init__(self, now: list[Tensor]):
        self.now = now

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (inputs[0] + self.now[0].to(inputs[0].dtype), *inputs[1:]) if self.now else None


WRAPPERS: dict[str, Callable[..., nn.Module]] = {"GuidanceEmbedded": GuidanceEmbedded, "Told": Told}
"""Name of a class -> what makes one of a network and the options that it tells of itself."""


def guidance_embedding(w: Tensor, size: int = EMBEDDING) -> Tensor:
    """``"batch size"`` in single precision of w ``"batch"``.

    Example:
        >>> guidance_embedding(torch.zeros(1), 4).tolist()
        [[0.0, 0.0, 1.0, 1.0]]
    """
    half = size // 2
    frequencies = torch.exp(torch.arange(half, device=w.device, dtype=torch.float32) * (-math.log(1e4) / (half - 1)))
    angles = 1000.0 * w.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def student_network(network: nn.Module, adapter: Any = None, *, seed: int = 0) -> nn.Module:
    """The network that a student begins with: a trainable copy of the teacher's, or that with an adapter. It drops nothing out.

    A copy of a network in half precision is in single precision; with an adapter, only the adapter is.

    Args:
        network: the teacher's.
        adapter: `LoraOptions` or a ``peft.LoraConfig``; None for a copy, all of which is trained.
        seed: of the adapter.
    """
    if adapter is None:
        return trainable(network)
    return without_dropout(AdaptedNetwork(network, lambda inner: add_adapter(inner, adapter, seed=seed)))


def told_adapter(adapter: Any) -> dict[str, Any] | None:
    """An adapter's options as JSON values."""
    if adapter is None:
        return None
    if isinstance(adapter, LoraOptions):
        return adapter.told()
    return {"rank": adapter.r, "alpha": adapter.lora_alpha}
