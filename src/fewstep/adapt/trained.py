"""Copies of networks that are trained, and what is done to them: single precision, and no dropout.

Copies that are trained drop nothing out, and are in single precision where the network is in half: the updates of an optimizer are smaller
than the steps of a number in half precision.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

__all__ = ["HALF", "in_single_precision", "trainable", "without_dropout"]

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
HALF = (torch.float16, torch.bfloat16)


def trainable(network: nn.Module) -> nn.Module:
    """A copy, all of whose weights are to be trained: in single precision if they are in half, and without dropout.

    Example:
        >>> made = trainable(nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16), nn.Dropout(0.5)))
        >>> made[0].weight.dtype, made[1].p
        (torch.float32, 0.0)
    """
    made = without_dropout(in_single_precision(copy.deepcopy(network)))
    for parameter in made.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return made


def in_single_precision(network: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """The network, in place, with what is in half precision in single precision.

    Args:
        network: whose weights.
        names: of the parameters and buffers that are looked at; None: all.
    """
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if tensor.dtype in HALF and (names is None or name in names):
                tensor.data = tensor.data.float()
    return network


def without_dropout(network: nn.Module) -> nn.Module:
    """The network, in place: nothing is dropped out, as nothing is when a model is sampled, but in adapters, which say how much."""
    for name, part in network.named_modules():
        if isinstance(part, DROPOUTS) and "lora_dropout" not in name:
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return network
