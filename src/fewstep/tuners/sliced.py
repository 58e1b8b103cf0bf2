"""The sliced Wasserstein distance of two sets whose members have weights: along every direction the quantiles are compared."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.tuners.numbers import flat

__all__ = ["directions", "sliced_distance"]

Floats = NDArray[np.float64]
DIRECTIONS = 128


def directions(size: int, count: int = DIRECTIONS, seed: int = 0) -> Tensor:
    """``"size count"``: unit vectors, the same for the same seed."""
    drawn = torch.randn(size, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=0)


def sliced_distance(first: Tensor, second: Tensor, weights: Floats | None = None) -> float:
    """Sliced Wasserstein-2 distance of two sets of vectors ``"n size"`` in which the k-th have the same weight.

    Args:
        first, second: the sets.
        weights: ``"n"``; equal when left out.

    Example:
        >>> x = torch.linspace(0.0, 1.0, 50)[:, None]
        >>> round(sliced_distance(x, x.flip(0) + 3.0), 6), round(sliced_distance(x, x + 3.0, np.arange(50.0)), 6)
        (3.0, 3.0)
    """
    first, second = first.detach(), second.detach()
    if not bool(torch.isfinite(first).all()):
        return math.inf
    along = directions(first[0].numel()).to(first.device)
    a, b = ((flat(values) @ along).cpu().numpy() for values in (first, second))
    if weights is None:
        return float(np.sqrt(np.square(np.sort(a, 0) - np.sort(b, 0)).mean()))
    shares, total = weights / weights.sum(), 0.0
    for p, q in zip(a.T, b.T, strict=True):
        rank, other = np.argsort(p), np.argsort(q)
        ends, others = np.cumsum(shares[rank]), np.cumsum(shares[other])
        levels = np.sort(np.concatenate([ends, others]))
        middles = levels - np.diff(levels, prepend=0.0) / 2.0
        places, seats = (np.minimum(np.searchsorted(cuts, middles), len(cuts) - 1) for cuts in (ends, others))
        total += float(np.diff(levels, prepend=0.0) @ np.square(p[rank][places] - q[other][seats]))
    return math.sqrt(total / a.shape[1])
