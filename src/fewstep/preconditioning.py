r"""EDM's preconditioning: how a raw network F becomes a data prediction at every noise level.

Source: "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364, eq. 7 and table 1). With $x = x_0 +
\sigma\varepsilon$, data of standard deviation $\sigma_d$ and $S = \sqrt{\sigma^2 + \sigma_d^2}$

$$ D(x, \sigma) = \frac{\sigma_d^2}{S^2}\, x + \frac{\sigma\,\sigma_d}{S}\, F\!\left(\frac{x}{S},\ \tfrac14 \log \sigma\right), $$

so that F has inputs and targets of unit variance. The target is minus the velocity of the variance-preserving state $x / S$.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["EDMPreconditioned", "edm_coefficients"]

SIGMA_DATA = 0.5
"""The standard deviation of images in [-1, 1], as the paper has it."""


def edm_coefficients(sigma: Any, sigma_data: float = SIGMA_DATA) -> tuple[Any, Any, Any]:
    """c_skip, c_out and c_in of D = c_skip x + c_out F(c_in x).

    Args:
        sigma: noise level, a number, array or tensor.
        sigma_data: standard deviation of the data.

    Example:
        >>> edm_coefficients(0.75, 1.0)
        (0.64, 0.6, 0.8)
    """
    total = sigma * sigma + sigma_data * sigma_data
    root = total**0.5
    return sigma_data * sigma_data / total, sigma * sigma_data / root, 1.0 / root


class EDMPreconditioned(torch.nn.Module):
    """A raw network in EDM's preconditioning, which makes it one that predicts data: ``network(x, sigma, **cond)``.

    The network itself is run in the precision of its parameters; what is around it in that of x.

    Args:
        network: F, called as ``network(x, c_noise, **cond)`` with ``c_noise`` = log(sigma) / 4, of sigma's shape.
        sigma_data: standard deviation of the data that it was trained on.

    Raises:
        TypeError: for a network that cannot be called.
        ValueError: for a standard deviation that is not positive.

    Example:
        >>> from fewstep.denoisers import Denoiser
        >>> from fewstep.schedules import EDM
        >>> denoiser = Denoiser(EDMPreconditioned(lambda x, c_noise: 0.0 * x), EDM(), predicts="data")
        >>> denoiser(torch.full((1, 2), 4.0), 0.5).tolist()  # c_skip is 1/2 where sigma is sigma_data
        [[2.0, 2.0]]
    """

    def __init__(self, network: Callable[..., Tensor], sigma_data: float = SIGMA_DATA):
        super().__init__()
        if not callable(network):
            raise TypeError(f"network must be callable as network(x, c_noise, **cond), got {type(network).__name__}.")
        if not 0.0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive, got {sigma_data:g}.")
        self.network = network
        self.sigma_data = float(sigma_data)

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        """The data prediction, ``"batch *shape"`` in x's precision."""
        level = sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        skip, out, scale = edm_coefficients(level, self.sigma_data)
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), x.dtype)
        output = self.network((scale * x).to(dtype), 0.25 * sigma.log(), **cond)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            return output  # for the denoiser to refuse
        return skip * x + out * output.to(x.dtype)
