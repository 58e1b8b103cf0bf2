r"""What theory says of Local SGD, its slow SDE: how much faster than SGD it drifts to flat minima.

Near a valley of minima SGD drifts along it towards flat places, by $\tfrac{1}{2B}\nabla^3L[\hat\Sigma]$ with the total batch B. The local
steps of K workers multiply that drift by about $1 + (K-1)\,\psi(\eta H\lambda)$, $\psi(x) = (e^{-x} - 1 + x)/x$, which rises from 1 to K;
the diffusion stays. So a gain needs a small learning rate, a long run (about $\eta^{-2}$ steps), and an $\eta H\lambda$ that is not small.
In a coordinate of curvature $\lambda$ the discrete law is exact: with $q = (1 - \eta\lambda)^2$,

$$ 1 + (K-1)\left(1 - \frac{1 - q^H}{H\,(1 - q)}\right) . $$

The limit $\psi$ overestimates small H: with H = 1 the law gives 1, as it must. The theory is one of plain SGD with independent data; it is
silent on AdamW.

Source: "Why (and When) does Local SGD Generalize Better than SGD?" (arXiv 2303.01215); the discrete law is derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["local_sgd_drift_factor", "sharpness"]


def local_sgd_drift_factor(learning_rate: float, h: int, curvature: float, workers: int) -> float:
    r"""How much faster than SGD of the same total batch Local SGD drifts to flat places: between 1 and K.

    The exact law of a quadratic coordinate with noise of its own on every worker: the variance about the minimum, averaged over workers
    and steps, over that of SGD.

    Args:
        learning_rate: $\eta$.
        h: local steps H.
        curvature: $\lambda$, second derivative of the loss along the coordinate; `sharpness` measures the largest.
        workers: K.

    Raises:
        ValueError: outside $0 \le \eta\lambda < 2$, where SGD itself diverges.

    Example:
        >>> [round(local_sgd_drift_factor(0.05, h, 1.0, 4), 3) for h in (1, 4, 16, 64, 256)]
        [1.0, 1.411, 2.449, 3.52, 3.88]
    """
    if h < 1 or workers < 1:
        raise ValueError(f"h and workers are whole numbers of at least 1, got {h} and {workers}.")
    product = learning_rate * curvature
    if not 0.0 <= product < 2.0:
        raise ValueError(f"the law holds for learning_rate * curvature in [0, 2), got {product}.")
    rest = product * (2.0 - product)  # 1 - q
    if rest == 0.0:
        return 1.0
    power = 0.0 if product == 1.0 else math.exp(2.0 * h * math.log(abs(1.0 - product)))
    kept = -math.expm1(2.0 * h * math.log1p(-product)) if product < 0.5 else 1.0 - power
    return 1.0 + (workers - 1) * (1.0 - kept / (h * rest))


def sharpness(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], *, iterations: int = 20, generator: torch.Generator | None = None
) -> float:
    r"""The eigenvalue of the loss's Hessian that is largest in size, by power iteration on products of Hessian and vector.

    A coordinate of this curvature profits first from more local steps: if $\eta H\lambda$ is small even here, `local_sgd_drift_factor` is
    near 1, and no gain in generalisation is to be expected from averaging less often.

    Args:
        loss: computes the loss of a fixed batch with fixed noise.
        parameters: what it is differentiated by.
        iterations: products; each costs about two gradients.
        generator: draws the first direction.

    Returns:
        the Rayleigh quotient after the last product; 0 for a loss without curvature.

    Example:
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> round(sharpness(lambda: (x * x * torch.tensor([0.5, 3.0])).sum(), [x], generator=torch.Generator().manual_seed(0)), 4)
        6.0
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    first = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
    used = [(p, g) for p, g in zip(parameters, first, strict=True) if g is not None and g.requires_grad]
    if not used:
        return 0.0
    weights, gradients = zip(*used, strict=True)
    draws = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in weights]
    value = 0.0
    for _ in range(iterations):
        length = math.sqrt(sum(float(v.double().square().sum()) for v in draws))
        if length == 0.0:
            return 0.0
        direction = [v / length for v in draws]
        products = torch.autograd.grad(gradients, weights, direction, retain_graph=True, allow_unused=True)
        draws = [torch.zeros_like(p) if v is None else v for p, v in zip(weights, products, strict=True)]
        value = sum(float((v.double() * w.double()).sum()) for v, w in zip(draws, direction, strict=True))
    return value
