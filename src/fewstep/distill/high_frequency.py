r"""HiPA, a reconstruction: the authors' code does not exist in public, and the losses here are put together from accounts of the paper.

"HiPA: Enabling One-Step Text-to-Image Diffusion Models via High-Frequency-Promoting Adaptation" (arXiv 2311.18158). A small adapter makes
one call do what many did, by regression on pairs: the noise z that the teacher's own sampler started from, and the sample that it made.
(Pairs share the noise: else the best answer is a blur.) With $\hat x = D(z, T)$,

$$ L = \text{Huber}(\hat x, x) + \lambda_s L_\text{perceptual}(\hat x, x)
     + \lambda_h \operatorname{mean} \big| |\mathcal F \hat x|_\text{high} - |\mathcal F x|_\text{high} \big|
     + \lambda_e \operatorname{mean} (S \hat x - S x)^2 , $$

with $\mathcal F$ the orthonormal Fourier transform, of which frequencies beyond a quarter of the Nyquist radius count, and S Sobel's maps
of horizontal and vertical edges. The perceptual loss needs a network with weights, which does not come along: give your own, or none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.distill.method import STUDENT, Training
from fewstep.distill.networks import device_of, read_as, schedule_of
from fewstep.distill.states import conditions
from fewstep.errors import PlanError
from fewstep.noise import draw_noise
from fewstep.plan import Plan
from fewstep.sampler import sample
from fewstep.solvers.ddim import DDIM
from fewstep.train.stages import Stage

__all__ = ["HiPA", "HighFrequencyLoss", "teacher_pairs"]

SMALLEST = 1e-8
"""Under the root of a Fourier amplitude, whose gradient at 0 is none."""
OPTIMIZER = functools.partial(torch.optim.AdamW, betas=(0.9, 0.999), weight_decay=0.01)


@dataclass(frozen=True)
class HighFrequencyLoss:
    """The distance of two images in what is fine: ``loss(prediction, target)``, an extra term for any loss that has both.

    Args:
        fourier: weight of the amplitudes of high frequencies.
        edges: weight of Sobel's maps.
        radius: where high frequencies begin, as a share of the Nyquist frequency.

    Raises:
        ValueError: for samples that are no images.

    Example:
        >>> x = torch.zeros(1, 1, 8, 8)
        >>> loss = HighFrequencyLoss()
        >>> float(loss(x, x)), float(loss(x + 0.5, x)) < 1e-6, float(loss(x, x + 0.1 * torch.randn(1, 1, 8, 8))) > 1e-3
        (0.0, True, True)
    """

    fourier: float = 0.1
    edges: float = 0.1
    radius: float = 0.25

    def __post_init__(self) -> None:
        if not (self.fourier >= 0.0 and self.edges >= 0.0 and 0.0 <= self.radius < 1.0):
            raise ValueError(
                f"HighFrequencyLoss needs weights of at least 0 and a radius in [0, 1), got {self.fourier}, {self.edges} and {self.radius}."
            )

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss ``""`` of images ``"batch channels height width"``."""
        if prediction.ndim != 4 or prediction.shape != target.shape:
            raise ValueError(
                f"the high-frequency loss compares images (batch, channels, height, width), got {tuple(prediction.shape)} and "
                f"{tuple(target.shape)}. Decode latents first: HiPA(decode=...)."
            )
        wide = torch.promote_types(prediction.dtype, torch.float32)  # the transform is not for half precision
        prediction, target = prediction.to(wide), target.to(wide)
        loss = prediction.new_zeros(())
        if self.fourier:
            loss = loss + self.fourier * (self._high(prediction) - self._high(target)).abs().mean()
        if self.edges:
            loss = loss + self.edges * (sobel(prediction) - sobel(target)).square().mean()
        return loss

    def _high(self, x: Tensor) -> Tensor:
        """Amplitudes of high frequencies."""
        height, width = x.shape[-2:]
        down = torch.fft.fftfreq(height, device=x.device)[:, None]
        right = torch.fft.rfftfreq(width, device=x.device)[None, :]
        high = (down.square() + right.square()).sqrt() > 0.5 * self.radius
        transform = torch.fft.rfft2(x, norm="ortho")[..., high]
        return (transform.real.square() + transform.imag.square() + SMALLEST).sqrt()


def sobel(x: Tensor) -> Tensor:
    """Sobel's horizontal and vertical maps of every channel, ``"batch 2*channels height-2 width-2"``.

    Example:
        >>> ramp = torch.arange(5.0).expand(1, 1, 5, 5)
        >>> sobel(ramp)[0, :, 1, 1].tolist()
        [1.0, 0.0]
    """
    channels = x.shape[1]
    slope = x.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8.0
    kernels = torch.stack([slope, slope.T])[:, None].repeat(channels, 1, 1, 1)
    return functional.conv2d(x, kernels, groups=channels)


@dataclass(frozen=True)
class HiPA:
    """One-step regression on the teacher's own pairs, with losses of high frequencies.

    Batches hold pairs, as `teacher_pairs` makes them: ``"noise"`` of unit variance, ``"x"``, and the conditions.

    Args:
        losses: functions ``(prediction, target) -> loss``, added; none: plain regression.
        perceptual: one more such function, such as a distance of a network's features.
        perceptual_weight: its weight.
        huber: where the Huber loss turns from square to linear.
        decode: from the network's data to images, for `losses` and `perceptual`: the decoder of latents.
        pairs, pair_calls: how many pairs `fewstep.distill.distill` draws from the teacher where no data are given, and in how many calls.

    Example:
        >>> HiPA(losses=()).needs_data
        True
    """

    losses: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (HighFrequencyLoss(),)
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    perceptual_weight: float = 1.0
    huber: float = 1.0
    decode: Callable[[Tensor], Tensor] | None = None
    pairs: int = 4096
    pair_calls: int = 16

    def __post_init__(self) -> None:
        if not (self.huber > 0.0 and self.perceptual_weight >= 0.0):
            raise ValueError(
                f"HiPA needs a positive huber and perceptual_weight >= 0, got {self.huber} and {self.perceptual_weight}."
            )
        if self.pairs < 1 or self.pair_calls < 1:
            raise ValueError(f"HiPA needs pairs and pair_calls of at least 1, got {self.pairs} and {self.pair_calls}.")

    @property
    def needs_data(self) -> bool:
        """Whether batches must hold clean data."""
        return True

    def training(self, teacher: Callable[..., Tensor], student: nn.Module) -> Training:
        """The student and its stage."""
        return Training({STUDENT: student}, (Stage(PairLoss(self, teacher), STUDENT, optimizer=OPTIMIZER),))

    def plan(self, teacher: Callable[..., Tensor], nfe: int) -> Plan:
        """One call.

        Raises:
            PlanError: for more.
        """
        if nfe != 1:
            raise PlanError(f"HiPA's student makes one call, not {nfe}.")
        schedule = schedule_of(teacher)
        return DDIM().plan(schedule, grid=[schedule.t_start, schedule.t_zero])


@dataclass(frozen=True)
class PairLoss:
    """The student's objective."""

    method: HiPA
    teacher: Callable[..., Tensor]

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        if "noise" not in batch or "x" not in batch:
            raise ValueError('HiPA learns from pairs: batches hold "noise" and "x", see fewstep.distill.teacher_pairs.')
        method, schedule = self.method, schedule_of(self.teacher)
        scale = float(schedule.sigma(schedule.t_start))
        found = read_as(self.teacher, model[STUDENT])(scale * batch["noise"], schedule.t_start, **conditions(batch))
        target = batch["x"].to(found)
        plain = functional.huber_loss(found, target, delta=method.huber)
        loss = plain
        if method.losses or method.perceptual is not None:
            pair = (found, target) if method.decode is None else (method.decode(found), method.decode(target))
            for term in method.losses:
                loss = loss + term(*pair)
            if method.perceptual is not None:
                loss = loss + method.perceptual_weight * method.perceptual(*pair)
        return loss, {"huber": plain.detach()}


@torch.no_grad()
def teacher_pairs(
    teacher: Callable[..., Tensor],
    seeds: Sequence[int],
    plan: Plan,
    *,
    cond: Mapping[str, Tensor] | None = None,
    shape: Sequence[int] | None = None,
    block: int = 256,
) -> dict[str, Tensor]:
    """Pairs of noise and the sample that the teacher makes of it.

    Args:
        teacher: denoiser.
        seeds: one a pair.
        plan: a deterministic one of enough calls, from the schedule's start.
        cond: conditions, one entry a pair; they become part of the pairs.
        shape: of a sample; left out, that of the teacher's info.
        block: the most samples of a network call.

    Returns:
        ``{"noise", "x", **cond}``, the noise of unit variance.

    Raises:
        ValueError: if nothing says the shape, or the plan draws noise, so that samples are not a function of the noise at the start.
    """
    shape = getattr(getattr(teacher, "info", None), "shape", None) if shape is None else shape
    if shape is None:
        raise ValueError("nothing says the shape of a sample: pass shape=.")
    if any(row.noise is not None for row in plan.rows):
        raise ValueError("pairs need a deterministic plan, so that a sample is a function of its noise; this one draws more.")
    device = device_of(teacher)
    cond, noise = {name: value.to(device) for name, value in (cond or {}).items()}, draw_noise(shape, seeds, device=device)
    scale = float(plan.schedule.sigma(plan.noise_time))
    samples = []
    for first in range(0, len(noise), block):
        rows = slice(first, first + block)
        samples.append(sample(teacher, scale * noise[rows], plan, cond={name: value[rows] for name, value in cond.items()}))
    return {"noise": noise, "x": torch.cat(samples), **cond}
