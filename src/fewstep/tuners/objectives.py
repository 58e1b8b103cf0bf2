r"""What a polish makes small: the errors of the samples, or these and a distance of distributions; each with its Gauss-Newton model.

`Paired` is Cauchy's loss of the distances e from the exact samples of the same noise, the mean of $\log(1 + e^2 / s^2)$ with s a multiple
of their median: a few samples that end in another mode cannot be mended by a small change, and would else drown the rest.

`Matched` adds the squared sliced Wasserstein distance between all samples and all exact samples: along a direction both sets are sorted,
and the k-th is drawn to the k-th, whichever noise it came from. That lets a sample be where another should have been, and asks for the
right spread, which least squares alone make too small where the samples cannot all be right. The directions lie in the space of the
samples, or of features of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.tuners.numbers import flat
from fewstep.tuners.sliced import directions, sliced_distance
from fewstep.tuners.task import distances

__all__ = ["Features", "Matched", "Paired"]

Features = Callable[[Tensor], Tensor]
PAIRED_SHARE = 0.1
"""Weight of the errors of the pairs beside the squared distance of the distributions."""
STEP = 1e-2
"""Of the finite differences of features, relative to the samples."""


@dataclass(frozen=True)
class Paired:
    """Errors of the samples.

    Args:
        target: ``"batch *shape"``, the exact samples.
        scale: s^2; errors above its root count less.
        weights: ``"batch"``, how much each sample counts; all the same when left out.
    """

    target: Tensor
    scale: float
    weights: NDArray[np.float64] | None = None

    def loss(self, samples: Tensor) -> float:
        """Of samples ``"batch *shape"``; inf if one is not finite."""
        errors = distances(samples, self.target)
        return float(np.average(np.log1p(errors**2 / self.scale), weights=self.weights)) if np.isfinite(errors).all() else math.inf

    def model(self, jacobian: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Matrix and gradient of the normal equations, from a Jacobian ``"numbers batch elements"``."""
        weights = 1.0 / (1.0 + distances(samples, self.target) ** 2 / self.scale)
        if self.weights is not None:
            weights = weights * self.weights / self.weights.mean()
        weights = torch.from_numpy(weights).to(jacobian.device)
        weighted = (jacobian * weights[:, None]).flatten(1)
        return weighted @ jacobian.flatten(1).T, weighted @ flat(self.target - samples).flatten()


@dataclass(frozen=True)
class Matched:
    """Squared sliced Wasserstein distance, and the errors of the pairs.

    Args:
        paired: the errors.
        features: of samples ``"batch *shape"``, ``"batch size"``; the samples themselves when left out.
    """

    paired: Paired
    features: Features | None = None

    def loss(self, samples: Tensor) -> float:
        """Of samples ``"batch *shape"``; inf if one is not finite."""
        paired = self.paired.scale * self.paired.loss(samples)
        return PAIRED_SHARE * paired + self.distance(samples) ** 2 if math.isfinite(paired) else math.inf

    def distance(self, samples: Tensor) -> float:
        """Between all samples and all exact ones."""
        return sliced_distance(self._seen(samples), self._seen(self.paired.target))

    def model(self, jacobian: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Paired`."""
        seen, wanted = self._seen(samples), self._seen(self.paired.target)
        along = directions(seen.shape[1]).to(seen.device)
        moved = torch.einsum("pne,ed->pnd", self._changes(jacobian, samples, seen), along)
        here, there = seen @ along, (wanted @ along).sort(0).values
        order = here.argsort(0)
        residual = torch.empty_like(here).scatter_(0, order, there - here.gather(0, order))
        matrix, gradient = self.paired.model(jacobian, samples)
        share, count = PAIRED_SHARE / jacobian[0].numel(), here.numel()
        matrix = share * matrix + moved.flatten(1) @ moved.flatten(1).T / count
        return matrix, share * gradient + moved.flatten(1) @ residual.flatten() / count

    @torch.no_grad()
    def _seen(self, samples: Tensor) -> Tensor:
        return flat(samples if self.features is None else self.features(samples))

    def _changes(self, jacobian: Tensor, samples: Tensor, seen: Tensor) -> Tensor:
        """The Jacobian of what is seen, by finite differences of the features."""
        if self.features is None:
            return jacobian
        size, changes = float(samples.double().square().mean().sqrt()), []
        for column in jacobian:
            h = STEP * size / max(float(column.square().mean().sqrt()), 1e-30)
            changes.append((self._seen(samples + (h * column).reshape(samples.shape).to(samples)) - seen) / h)
        return torch.stack(changes)
