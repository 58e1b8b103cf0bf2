"""To the device and back, without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device", "to_host"]


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host; of a CUDA tensor one that is complete only when an event recorded after it has happened."""
    if tensor.device.type != "cuda":
        return tensor.detach().to("cpu", copy=True)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; on CUDA, copied behind the work that is already there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
