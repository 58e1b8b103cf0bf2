"""The prediction of an exact model as any host may call it: two isotropic Gaussians in the plane."""

from __future__ import annotations

import torch

MEANS = torch.tensor([[1.0, 0.5], [-1.0, -0.3]], dtype=torch.float64)
SCALES = torch.tensor([0.4, 0.3], dtype=torch.float64)


def data_prediction(x, alpha, sigma):
    """E[x_0 | x] for two isotropic Gaussians."""
    variance = alpha**2 * SCALES**2 + sigma**2
    away = x[:, None] - alpha * MEANS
    share = torch.softmax(-0.5 * away.square().sum(-1) / variance - torch.log(variance), 1)
    means = MEANS + (alpha * SCALES**2 / variance)[:, None] * away
    return (share[..., None] * means).sum(1)
