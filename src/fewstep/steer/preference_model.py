r"""The step-aware preference model of SPO: which of two partly denoised samples is better, by a network that is told the time.

Source: "Step-by-step Preference Optimization" (arXiv 2406.04314, section 3.2), and its published code.

Two clean samples with a label, $x^w$ preferred to $x^l$, are noised with *one* noise to *one* time, $t$ uniform. The diffusion
model predicts the data of both, and the network scores the predictions. The loss is the cross-entropy of the pair,

$$ L = -\log \frac{e^{S(D(x^w_t), t)}}{e^{S(D(x^w_t), t)} + e^{S(D(x^l_t), t)}} , $$

so a difference of scores is what the model knows of the odds at that time; close to pure noise it is close to 0.

The time enters as in adaptive normalisation of zero effect (adaLN-zero, arXiv 2212.09748), but begun as the identity: each block
computes $h + g\,F\big((1 + a)\,\text{norm}(h) + b\big)$ with shift b, scale a and gate g of the time and the label, which begin at
$a = b = 0$ and $g = 1$, so at first the network is the same at all times. For models of text the published one is a CLIP with such
layers; any network or function ``score(d, t, **cond)`` takes this one's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.denoisers import innermost
from fewstep.models import TimeFeatures
from fewstep.schedules import NoiseSchedule
from fewstep.train.trainer import FitResult, fit
from fewstep.train.watched import Spent, counted, made_for, watch

__all__ = ["StepPreference", "fit_preference"]

WIDTH, EMBEDDING, BLOCKS = 64, 64, 3
CLEAN = 0.1
"""Share of the pairs that a model sees as they are, at the time of clean data, where the last step of a run ends."""


class _Block(nn.Module):
    """h + gate F(normalised h, scaled and shifted)."""

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width, affine=False)
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.modulate = nn.Linear(embedding, 3 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)
        self.modulate.bias.data[2 * width :] = 1.0

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift, gate = self.modulate(embedding)[:, :, None, None].chunk(3, 1)
        return h + gate * self.second(functional.silu(self.first(self.norm(h) * (1.0 + scale) + shift)))


class StepPreference(nn.Module):
    """A score of data predictions, ``network(d, t, label=None) -> "batch"``, for pictures of any size.

    Args:
        channels: of a picture.
        classes: number of labels; None for a model without.
        width: channels inside, a multiple of 8.
        time_scale: what the time is multiplied by, so that it runs over about a unit interval: 1 / t_start of the schedule.

    Example:
        >>> network = StepPreference(1, classes=10)
        >>> network(torch.zeros(4, 1, 8, 8), 0.5, label=torch.arange(4)).shape
        torch.Size([4])
    """

    def __init__(self, channels: int, *, classes: int | None = None, width: int = WIDTH, time_scale: float = 1.0):
        super().__init__()
        features = TimeFeatures(EMBEDDING, time_scale)
        self.time = nn.Sequential(features, nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.label = None if classes is None else nn.Embedding(classes + 1, EMBEDDING)
        self.read = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width, EMBEDDING) for _ in range(BLOCKS))
        self.write = nn.Linear(2 * width, 1)

    def forward(self, d: Tensor, t: Any, label: Tensor | None = None) -> Tensor:
        """The scores.

        Args:
            d: ``"batch channels height width"``, data predictions.
            t: the time, one or one a sample.
            label: ``"batch"``, for a model with labels; left out, the one that stands for none.
        """
        times = torch.as_tensor(t, dtype=torch.float32, device=d.device).expand(len(d))
        embedding = self.time(times)
        if self.label is not None:
            none = torch.full((len(d),), self.label.num_embeddings - 1, device=d.device)
            embedding = embedding + self.label(none if label is None else label)
        h = self.read(d.to(self.read.weight.dtype))
        for block in self.blocks:
            h = block(h, functional.silu(embedding))
        return self.write(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))[:, 0]


def fit_preference(
    network: nn.Module,
    denoiser: Callable[..., Tensor],
    pairs: Mapping[str, Tensor],
    *,
    steps: int = 500,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    times: tuple[float, float] | None = None,
    spent: Spent | None = None,
    **options: Any,
) -> FitResult:
    """Train a step-aware preference model, in place.

    Args:
        network: ``network(d, t, **cond) -> "batch"``, such as `StepPreference`.
        denoiser: the diffusion model, or the student, whose predictions it will score.
        pairs: ``{"better": ..., "worse": ..., **cond}``: clean samples ``"pairs *shape"``, the first preferred; where ``"tie"`` holds True,
            neither is.
        times: the least and the most noisy time; left out, from the schedule's end to its start.
        spent: counts the evaluations of the diffusion model's network; kept in checkpoints.
        steps, batch_size, learning_rate, **options: of `fewstep.train.fit`.

    Returns:
        the `fewstep.train.FitResult`; its log has the loss and the accuracy, 0.5 for chance.

    Raises:
        ValueError: if better or worse samples are missing.
        TypeError: for a denoiser without a schedule.
    """
    if missing := [name for name in ("better", "worse") if name not in pairs]:
        raise ValueError(f"pairs need better and worse samples; {missing[0]!r} is missing among {sorted(pairs)}.")
    schedule = getattr(denoiser, "schedule", None)
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError("the preference model sees predictions of a denoiser with a noise schedule; this one has none.")
    low, high = times or (schedule.t_end, schedule.t_start)
    settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "warmup": min(50, steps // 10), "ema": ()}
    spent = Spent() if spent is None else spent
    entropy = watch(_PairEntropy(denoiser, schedule, float(low), float(high)), made_for(denoiser, pairs), spent)
    with counted([innermost(denoiser, "network")], spent):
        result = fit(entropy, network, dict(pairs), **{**settings, **options})
    network.eval().requires_grad_(False)
    return result


class _PairEntropy:
    """The objective."""

    def __init__(self, denoiser: Callable[..., Tensor], schedule: NoiseSchedule, low: float, high: float):
        self.denoiser, self.schedule, self.low, self.high = denoiser, schedule, low, high

    def __repr__(self) -> str:
        return f"pair entropy at times from {self.low:g} to {self.high:g}"

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        better, worse, tie = batch["better"], batch["worse"], batch.get("tie")
        cond = {name: torch.cat([v, v]) for name, v in batch.items() if name not in ("better", "worse", "tie")}
        u = torch.rand(len(better), generator=generator, dtype=torch.float64)
        t = torch.where(u < CLEAN, self.low, self.low + (u - CLEAN) / (1.0 - CLEAN) * (self.high - self.low)).repeat(2).numpy()
        with torch.no_grad():
            noise = torch.randn(better.shape, generator=generator).to(better)
            alpha, sigma = (
                torch.as_tensor(f(t)).to(better).reshape(-1, *[1] * (better.ndim - 1))
                for f in (self.schedule.alpha, self.schedule.sigma)
            )
            d = self.denoiser(alpha * torch.cat([better, worse]) + sigma * torch.cat([noise, noise]), t, **cond)
        won, lost = model(d, torch.as_tensor(t), **cond).chunk(2)
        entropy = functional.softplus(lost - won)
        if tie is not None:  # both halves of a tie are right by half; what cannot be learnt, log 2, is taken off
            entropy = torch.where(
                tie.bool(), 0.5 * (entropy + functional.softplus(won - lost)) - torch.log(entropy.new_tensor(2.0)), entropy
            )
        return entropy.mean(), {"accuracy": (won > lost).to(won.dtype).mean()}
