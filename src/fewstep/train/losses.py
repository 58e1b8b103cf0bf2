r"""The denoising loss: noise clean data, let the network predict, weigh its squared error.

With $t$ drawn, $x_t = \alpha x_0 + \sigma\varepsilon$ and the target $f = A x_0 + B\varepsilon$ (`fewstep.predictions`), the loss is

$$ L = \operatorname{mean}_i\; w(t_i)\, \operatorname{mean}\big(f_\theta(x_{t_i}, t_i) - f_i\big)^2 . $$

One error has one size in each kind of prediction: at a fixed $x_t$ the data error is $b$ times the error of $f$, where
$x_0 = a\,x_t + b\,f$. So $b_{\text{mine}}^2 / b_{\text{kind}}^2$ is the weight that turns the loss of a network of my kind *exactly* into
the loss that a network of another kind would be trained with:

| weighting | $w$ for a network whose data error is $b$ times its own | source |
| --- | --- | --- |
| `constant` | 1: the network's own kind | |
| `noise`, `data`, `velocity`, `flow`, `score` | $b^2 / b_{\text{kind}}^2$: the loss of that kind | |
| `min_snr` | $b^2 \min(\alpha^2/\sigma^2, 5)$ | "Efficient Diffusion Training via Min-SNR Weighting", arXiv 2303.09556, eq. 8 |

Times are drawn in the schedule's own time, between `t_end` and `t_start`:

| times | u in [0, 1), $t = t_{end} + u\,(t_{start} - t_{end})$ | source |
| --- | --- | --- |
| `uniform` | independent | |
| `low_discrepancy` | one random offset, then equal gaps: uniform for each sample, less variance in the mean | arXiv 2107.00630, app. I.1 |
| `logit_normal` | logistic function of a standard normal: more of the middle | arXiv 2403.03206, section 3.1 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UnknownNameError
from fewstep.predictions import PREDICTIONS, check_prediction, data_coefficients, target_coefficients
from fewstep.schedules import NoiseSchedule

__all__ = ["TIMES", "WEIGHTINGS", "DenoisingLoss", "LabelDropout"]

MIN_SNR_GAMMA = 5.0
"""Where min-SNR clips the signal-to-noise ratio; the paper's value."""
WEIGHTINGS = ("constant", *PREDICTIONS, "min_snr")
"""Names of the weightings."""


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _low_discrepancy(count: int, generator: torch.Generator) -> Tensor:
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    return (offset + torch.arange(count, dtype=torch.float64) / count) % 1.0


def _logit_normal(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, generator=generator, dtype=torch.float64).sigmoid()


TIMES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "uniform": _uniform,
    "low_discrepancy": _low_discrepancy,
    "logit_normal": _logit_normal,
}
"""Name -> how times are drawn, on the unit interval."""


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


@dataclass(frozen=True)
class DenoisingLoss:
    """The denoising loss as an objective: ``loss, info = objective(model, batch, generator)``.

    Args:
        schedule: the noise schedule to train on.
        predicts: what the network predicts.
        weighting: one of `WEIGHTINGS`.
        times: one of `TIMES`.
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
    weighting: str = "constant"
    times: str = "uniform"
    dropout: LabelDropout | None = None

    def __post_init__(self) -> None:
        check_prediction(self.predicts)
        if self.weighting not in WEIGHTINGS:
            raise UnknownNameError("weighting", self.weighting, WEIGHTINGS)
        if self.times not in TIMES:
            raise UnknownNameError("distribution of times", self.times, TIMES)

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
        """
        x_0 = batch["x"]
        cond = {name: value for name, value in batch.items() if name != "x"}
        t = self.draw_times(len(x_0), generator)
        noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=generator.device).to(x_0.device)
        if self.dropout is not None:
            cond[self.dropout.name] = self._drop(cond[self.dropout.name], generator)
        error = self.errors(model, x_0, noise, t, cond)
        weight = torch.as_tensor(self.weight(t)).to(error)
        return (weight * error).mean(), {"squared_error": error.detach().mean()}

    def draw_times(self, count: int, generator: torch.Generator) -> np.ndarray:
        """Times for one batch, float64 ``"count"``."""
        u = TIMES[self.times](count, generator).cpu().numpy()
        return self.schedule.t_end + u * (self.schedule.t_start - self.schedule.t_end)

    def errors(self, model: Callable[..., Tensor], x_0: Tensor, noise: Tensor, t: np.ndarray, cond: Mapping[str, Any]) -> Tensor:
        """The mean squared error of every sample, without the weight, ``Float[Tensor, "batch"]``."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        A, B = target_coefficients(self.predicts, alpha, sigma)

        def column(values: np.ndarray) -> Tensor:
            return torch.as_tensor(values).to(x_0).reshape(-1, *[1] * (x_0.ndim - 1))

        x_t = column(alpha) * x_0 + column(sigma) * noise
        time = torch.as_tensor(self.schedule.network_time(t)).to(x_0)
        target = column(A) * x_0 + column(B) * noise
        output = model(x_t, time, **cond).to(x_0.dtype)
        return (output - target).square().flatten(1).mean(1)

    def weight(self, t: np.ndarray) -> np.ndarray:
        """The weight of every time, float64."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        if self.weighting == "constant":
            return np.ones_like(alpha)
        _, mine = data_coefficients(self.predicts, alpha, sigma)
        if self.weighting == "min_snr":
            return mine**2 * np.minimum((alpha / sigma) ** 2, MIN_SNR_GAMMA)
        _, theirs = data_coefficients(self.weighting, alpha, sigma)
        return (mine / theirs) ** 2

    def _drop(self, label: Tensor, generator: torch.Generator) -> Tensor:
        assert self.dropout is not None
        chance = torch.rand(label.shape, generator=generator, device=generator.device)
        return label.masked_fill((chance < self.dropout.probability).to(label.device), self.dropout.null)
