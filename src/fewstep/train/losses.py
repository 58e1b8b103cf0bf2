r"""The denoising loss: noise clean data, let the network predict, weigh its squared error.

With $t$ drawn (`fewstep.train.times`), $x_t = \alpha x_0 + \sigma\varepsilon$ and the target $f = A x_0 + B\varepsilon$
(`fewstep.predictions`), the loss is

$$ L = \operatorname{mean}_i\; w(t_i)\, \operatorname{mean}\big(f_\theta(x_{t_i}, t_i) - f_i\big)^2 $$

with a weight from `fewstep.train.weightings`. The bound of the likelihood is the loss with ``weighting="noise"`` and ``times="lambda"``,
times the range of lambda, in nats a dimension: $\int |\varepsilon_\theta - \varepsilon|^2\,\mathrm d\lambda$ (arXiv 2107.00630).
i-DODE's velocity parameterisation of it ("Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs", arXiv 2305.03935) is
a network that predicts ``"velocity"`` (or ``"flow"`` on the straight path), with the times of `importance_of_weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import NetworkError
from fewstep.predictions import check_prediction, target_coefficients
from fewstep.schedules import NoiseSchedule
from fewstep.train.times import TIMES, ImportanceTimes, LowDiscrepancy, Times, make_times
from fewstep.train.weightings import WEIGHTINGS, Weighting, make_weighting

__all__ = ["TIMES", "WEIGHTINGS", "DenoisingLoss", "LabelDropout", "importance_of_weight", "measured_importance"]


NOISE, TIMES_DRAWN = "drawn noise", "drawn times"
"""Entries of a batch with what `DenoisingLoss.draw_whole` drew."""


@dataclass(frozen=True)
class LabelDropout:
    """Replace a label by the null label now and then, so that one network learns the conditional and the unconditional prediction.

    Args:
        null: the null label.
        probability: of replacing.
        name: which condition.
    """

    null: int
    probability: float = 0.1
    name: str = "label"

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"LabelDropout needs a probability in [0, 1], got {self.probability}.")


class Noised(NamedTuple):
    """One batch, noised.

    Attributes:
        x_t: ``"batch *shape"``, the noisy states.
        time: ``"batch"``, what the network is told.
        target: ``"batch *shape"``, what it should predict.
        x_0: ``"batch *shape"``, the clean data.
        t: float64 ``"batch"``, the schedule's times.
        weight: float64 ``"batch"``, of the squared error, importance sampling included.
        cond: the conditions.
    """

    x_t: Tensor
    time: Tensor
    target: Tensor
    x_0: Tensor
    t: np.ndarray
    weight: np.ndarray
    cond: dict[str, Any]

    def output(self, model: Callable[..., Tensor], x: Tensor | None = None) -> Tensor:
        """What the network says of x, or of the noisy states, ``"batch *shape"``.

        Raises:
            NetworkError: if that has not the target's shape, which would be broadcast in silence; if the network cannot take float64.
        """
        given = self.x_t if x is None else x
        try:
            found = model(given, self.time, **self.cond)
        except RuntimeError as error:
            weights = {str(p.dtype) for p in model.parameters()} if isinstance(model, torch.nn.Module) else set()
            if given.dtype is not torch.float64 or not weights or "torch.float64" in weights:
                raise
            raise NetworkError(
                f'the data are float64, the network\'s weights {", ".join(sorted(weights))}: pass data["x"].float(), or network.double().'
            ) from error
        if not isinstance(found, Tensor):
            raise NetworkError(f"the network returned {type(found).__name__}, not a tensor. Wrap it so that it does.")
        if found.shape != self.target.shape:
            raise NetworkError(
                f"the network returned shape {tuple(found.shape)}, but what it should predict has shape {tuple(self.target.shape)}."
            )
        return found.to(self.x_0.dtype)

    def errors(self, model: Callable[..., Tensor]) -> Tensor:
        """The mean squared error of every sample, without the weight, ``"batch"``."""
        return (self.output(model) - self.target).square().flatten(1).mean(1)


@dataclass(frozen=True)
class DenoisingLoss:
    """The denoising loss as an objective: ``loss, info = objective(model, batch, generator)``.

    Args:
        schedule: the noise schedule to train on.
        predicts: what the network predicts.
        weighting: a name of `WEIGHTINGS`, or a `fewstep.train.weightings.Weighting`.
        times: a name of `TIMES`, or a `fewstep.train.times.Times`.
        dropout: of a label, for classifier-free guidance.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> objective = DenoisingLoss(VPLinear(), "noise")
        >>> loss, info = objective(lambda x, time: 0.0 * x, {"x": torch.zeros(512, 2)}, torch.Generator().manual_seed(0))
        >>> 0.7 < float(loss) < 1.3  # the mean square of standard normal noise
        True
    """

    schedule: NoiseSchedule
    predicts: str
    weighting: str | Weighting = "constant"
    times: str | Times = "uniform"
    dropout: LabelDropout | None = None

    def __post_init__(self) -> None:
        check_prediction(self.predicts)
        make_weighting(self.weighting)
        make_times(self.times)

    def __call__(
        self, model: Callable[..., Tensor], batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch.

        Args:
            model: network, called as ``model(x_t, time, **cond)``.
            batch: ``"x"`` holds the clean data ``"batch *shape"``; everything else is a condition.
            generator: of the times, the noise and the dropped labels, all drawn on its device.

        Returns:
            the loss, and ``{"squared_error"}``: the mean squared error without the weight.

        Raises:
            NetworkError: if what the network returns has another shape than the data, or its weights another precision.
            ValueError: if the batch has no ``"x"``, or no floating-point one.
        """
        drawn = self.prepare(batch, generator)
        error = drawn.errors(model)
        weight = torch.as_tensor(drawn.weight).to(error)
        return (weight * error).mean(), {"squared_error": error.detach().mean()}

    def draw_whole(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Everything random of one batch: times, noise and dropped labels, in this order, as further entries of the batch.

        `fewstep.train.fit` calls it once a step, so that a step in pieces draws as the whole does.
        """
        x_0, drawn = self._clean(batch), dict(batch)
        t, factor = make_times(self.times).draw(self.schedule, len(x_0), generator)
        drawn[NOISE] = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=generator.device).to(x_0.device)
        if self.dropout is not None:
            drawn[self.dropout.name] = self._drop(drawn[self.dropout.name], generator)
        # as bits, because not every device has float64
        times = np.ascontiguousarray(np.stack([t, factor], 1)).view(np.int64)
        drawn[TIMES_DRAWN] = torch.from_numpy(times).to(x_0.device)
        return drawn

    def _clean(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The clean data of a batch, if they and what is dropped are there."""
        for name in ("x", *(() if self.dropout is None else (self.dropout.name,))):
            if name not in batch:
                raise ValueError(
                    f"the data have no {name!r}, which the denoising loss needs; they have {', '.join(batch) or 'nothing'}."
                )
        x = batch["x"]
        if not x.is_floating_point():
            raise ValueError(
                f'the data have "x" as {x.dtype}; the denoising loss needs floating-point numbers about as large as 1: of bytes, pass '
                "x.float() / 127.5 - 1."
            )
        return x

    def prepare(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Noised:
        """One batch, noised with what was drawn for it, or is drawn now."""
        cond: dict[str, Any] = dict(batch if NOISE in batch else self.draw_whole(batch, generator))
        x_0, noise, bits = (cond.pop(name) for name in ("x", NOISE, TIMES_DRAWN))
        t, factor = bits.cpu().numpy().view(np.float64).T
        return self.noised(x_0, noise, t, self.weight(t) * factor, cond)

    def noised(self, x_0: Tensor, noise: Tensor, t: np.ndarray, weight: np.ndarray, cond: Mapping[str, Any]) -> Noised:
        """Clean data ``"batch *shape"`` with noise ``"batch *shape"`` at times ``"batch"``."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        A, B = target_coefficients(self.predicts, alpha, sigma)
        x_t = column(alpha, x_0) * x_0 + column(sigma, x_0) * noise
        target = column(A, x_0) * x_0 + column(B, x_0) * noise
        return Noised(x_t, torch.as_tensor(self.schedule.network_time(t)).to(x_0), target, x_0, t, weight, dict(cond))

    def weight(self, t: np.ndarray) -> np.ndarray:
        """The weight of every time, float64."""
        return make_weighting(self.weighting).weight(self.predicts, self.schedule.alpha(t), self.schedule.sigma(t))

    def _drop(self, label: Tensor, generator: torch.Generator) -> Tensor:
        assert self.dropout is not None
        chance = torch.rand(label.shape, generator=generator, device=generator.device)
        return label.masked_fill((chance < self.dropout.probability).to(label.device), self.dropout.null)


def column(values: np.ndarray, x: Tensor) -> Tensor:
    """One number a sample, to multiply x with."""
    return torch.as_tensor(values).to(x).reshape(-1, *[1] * (x.ndim - 1))


# ---- importance sampling of the times ------------------------------------------------------------------------------------------------


def importance_of_weight(
    objective: DenoisingLoss, error: Callable[[np.ndarray], np.ndarray] | None = None, *, bins: int = 512
) -> Times:
    """Times with a density proportional to the weight times an error that is known; the objective stays what it is.

    Args:
        objective: the loss; its times are the distribution that the mean is over.
        error: the root mean square of the network's squared error at times ``"n"``, up to a factor; constant when left out, as i-DODE takes
            it for the velocity.
        bins: on which the density is constant.

    Returns:
        a distribution for ``DenoisingLoss(times=...)``, drawn with low discrepancy.

    Example:
        >>> from fewstep.schedules import VPLinear
        >>> likelihood = DenoisingLoss(VPLinear(), "velocity", "noise", "lambda")
        >>> times = importance_of_weight(likelihood)
        >>> t, _ = times.at(VPLinear(), np.array([0.5]))
        >>> ends = VPLinear().sigma([VPLinear().t_start, VPLinear().t_end])
        >>> bool(abs(VPLinear().sigma(t)[0] / ends.prod() ** 0.5 - 1) < 1e-3)  # log sigma is uniform
        True
    """
    base = _base(objective)
    middle, _ = base.at(objective.schedule, (np.arange(bins) + 0.5) / bins)
    scale = np.ones_like(middle) if error is None else np.asarray(error(middle), np.float64)
    return LowDiscrepancy(ImportanceTimes(base, tuple((objective.weight(middle) * scale).tolist())))


@torch.no_grad()
def measured_importance(
    objective: DenoisingLoss,
    model: Callable[..., Tensor],
    data: Mapping[str, Tensor],
    *,
    bins: int = 32,
    samples: int = 128,
    plain: float = 0.05,
    seed: int = 0,
) -> Times:
    """Times with a density proportional to the weight times the error, which is measured; the objective stays what it is.

    Args:
        objective: the loss; its times are the distribution that the mean is over.
        model: the network as it is now. Measure again when its errors have changed.
        data: ``"x"`` and conditions, tensors with one entry a sample.
        bins: on which the density is constant.
        samples: noised samples a bin; the network is called once a bin.
        plain: share of the draws that the objective's own distribution keeps, so that no loss is ever multiplied with more than 1 / plain.
        seed: of the samples, times and noise.

    Returns:
        a distribution for ``DenoisingLoss(times=...)``, drawn with low discrepancy.

    Raises:
        ValueError: for a share outside (0, 1].
    """
    if not 0.0 < plain <= 1.0:
        raise ValueError(f"plain is a share in (0, 1], got {plain:g}.")
    base, generator = _base(objective), torch.Generator().manual_seed(seed)
    squares = np.empty(bins)
    for k in range(bins):
        rows = torch.randint(len(data["x"]), (samples,), generator=generator)
        t, _ = base.at(objective.schedule, (k + torch.rand(samples, generator=generator, dtype=torch.float64).numpy()) / bins)
        batch = {name: values[rows.to(values.device)] for name, values in data.items()}
        x_0 = batch.pop("x")
        noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device)
        noised = objective.noised(x_0, noise, t, objective.weight(t), batch)
        squares[k] = ((noised.weight * noised.errors(model).cpu().double().numpy()) ** 2).mean()
    masses = np.sqrt(squares)
    return LowDiscrepancy(ImportanceTimes(base, tuple(((1.0 - plain) * masses / masses.mean() + plain).tolist())))


def _base(objective: DenoisingLoss) -> Times:
    """The distribution that the objective is the mean over, without what only changes how it is drawn."""
    times = make_times(objective.times)
    while isinstance(times, (LowDiscrepancy, ImportanceTimes)):
        times = times.times if isinstance(times, LowDiscrepancy) else times.base
    return times
