r"""DITTO-2: control of single samples by their starting noise, which is optimised through a few-step surrogate of the sampler.

Source: "DITTO-2: Distilled Diffusion Inference-Time T-Optimization for Music Generation" (arXiv 2405.20289), after "DITTO" (arXiv
2401.12179).

For any differentiable loss of clean samples,

$$ x_T^* = \arg\min_{x_T} L\big(\text{surrogate}(x_T)\big), \qquad x_0 = \text{decode}(x_T^*) , $$

by Adam. DITTO goes back through the whole sampler, 20 calls an iteration; DITTO-2 through one call of a distilled student, and decodes in a
few calls from the noise that was found. `decode` should follow the same path as the surrogate, so it should be deterministic
(``fs.solvers.TCD(gamma=0)`` runs a consistency model so); one that draws noise anew throws a part of $x_T^*$ away. What counts is the loss
*after* decoding, so that is what is reported, beside that of the surrogate.

Noise in d dimensions has a norm near $\sigma \sqrt d$; Adam leaves this shell, and samples spoil. So each sample's noise keeps the
norm R it had at the start (`shell`): it is $R\,u / |u|$, Adam moves u, and u is scaled back to R after every step. Gradients are
then tangent to the shell. To scale back alone would not do: Adam divides each element by the size of its own gradient, most of
which points off the shell, and comes to rest where it should not.

A surrogate of one call does not see what the later calls of decoding change. `refined` of the iterations, the last ones, go through
the plan of decoding itself, which costs as many calls an iteration and takes most of this gap away.

The loop is `fewstep.train.fit`: the noise is what is trained. So it shows its progress, keeps a log and checkpoints, and goes on
bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.artefacts import write_atomically
from fewstep.denoisers import innermost
from fewstep.errors import PlanError
from fewstep.noise import check_seeds
from fewstep.plan import Plan
from fewstep.sampler import sample
from fewstep.steer.method import told_of
from fewstep.train.trainer import fit
from fewstep.train.watched import made_for, watch

__all__ = ["Optimised", "optimize_noise"]

Loss = Callable[[Tensor], Tensor]
SAME_SCALE = 1e-6
"""Relative difference up to which two noise levels are one."""


@dataclass(frozen=True, eq=False)
class Optimised:
    """Noise with the samples that it leads to.

    Attributes:
        noise: ``"batch *shape"``, the optimised starting noise.
        samples: ``"batch *shape"``, decoded from it.
        errors: ``"batch"``, the loss of the samples: after decoding.
        surrogate_errors: ``"batch"``, that of the surrogate at the same noise.
        initial_errors: ``"batch"``, that of samples decoded from the noise at the beginning.
        calls: network calls a sample of optimising and decoding, a backward pass counted as two.
        log: mean loss of the surrogate by iteration.
    """

    noise: Tensor = field(repr=False)
    samples: Tensor = field(repr=False)
    errors: Tensor
    surrogate_errors: Tensor
    initial_errors: Tensor
    calls: int
    log: list[dict[str, Any]] = field(repr=False)


def optimize_noise(
    denoiser: Callable[..., Tensor],
    loss: Loss,
    noise: Tensor,
    surrogate_plan: Plan,
    decode_plan: Plan | None = None,
    *,
    iterations: int = 70,
    refined: int = 0,
    learning_rate: float = 0.2,
    shell: bool = True,
    cond: Mapping[str, Any] | None = None,
    seeds: Iterable[int] | Tensor | None = None,
    surrogate: Callable[..., Tensor] | None = None,
    folder: str | PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = False,
    sheets: int = 0,
    **options: Any,
) -> Optimised:
    """Optimise starting noise so that the samples have what a loss asks for.

    Args:
        denoiser: ``D(x, t, **cond)``, which gradients pass through: a distilled student, or any other.
        loss: of clean samples, differentiable: ``"batch *shape"`` -> ``"batch"``, each of its own sample; see `fewstep.steer.targets`.
        noise: ``"batch *shape"``, where to begin, at the scale of the plans' start (`fewstep.draw_noise`).
        surrogate_plan: what is optimised through: one call of a student, or as many as memory bears.
        decode_plan: what is sampled from the noise that is found; left out, the surrogate's.
        iterations: of Adam, all together.
        refined: so many of them, the last, go through the plan of decoding.
        learning_rate: of Adam, in units of the noise's standard deviation.
        shell: keep the norm of each sample's noise.
        cond: conditions.
        seeds: one a sample, for plans that draw noise; it is the same in every iteration and at decoding.
        surrogate: another denoiser for the surrogate plan.
        folder: where checkpoints, the log and pictures go; the same call goes on from there, bit for bit.
        resume, progress: of `fewstep.train.fit`.
        sheets: pictures of the surrogate's samples every so many iterations; 0: none.
        **options: of `fewstep.train.fit`.

    Returns:
        an `Optimised`.

    Raises:
        PlanError: if the plans start at different noise levels, or seeds are missing.
        ValueError: if the loss is not one number a sample.
        NetworkError: if it is not finite.

    Example:
        >>> import fewstep as fs
        >>> gaussian = fs.exact.Gaussian(fs.schedules.Flow(t_end=0.0), [0.0, 0.0], 0.25)
        >>> plan = fs.make_plan("ddim", gaussian.schedule, 1, final="zero")
        >>> noise = fs.draw_noise((2,), range(3), plan, dtype=torch.float64)
        >>> found = optimize_noise(gaussian, lambda x: (x[:, 0] - 0.1).square(), noise, plan, plan, learning_rate=0.03, iterations=200)
        >>> bool((found.errors <= found.initial_errors).all()), found.calls
        (True, 601)
    """
    decode_plan = surrogate_plan if decode_plan is None else decode_plan
    told = None if seeds is None else check_seeds(seeds, len(noise))
    inner, scale = denoiser if surrogate is None else surrogate, _scale(surrogate_plan, decode_plan)
    run = partial(sample, cond=cond, seeds=told)
    if not 0 <= refined <= iterations:
        raise ValueError(f"refined is a number of the {iterations} iterations, got {refined}.")
    model = _Noise(noise / scale, shell)
    with _frozen(denoiser), _frozen(inner):
        with torch.no_grad():
            initial = loss(run(denoiser, noise, decode_plan))
            if initial.shape != noise.shape[:1]:
                raise ValueError(
                    f"the loss must be one number a sample, {tuple(noise.shape[:1])}, got shape {tuple(initial.shape)}."
                )
        place = None if folder is None else Path(folder)
        ways = ((inner, surrogate_plan, iterations - refined), (denoiser, decode_plan, refined))
        objective = _Surrogate(run, ways, loss, scale, place if sheets else None, sheets)
        with torch.no_grad():
            first = loss(run(inner, noise, surrogate_plan)) if (inner, surrogate_plan) != (denoiser, decode_plan) else initial
        told_apart = f"from {_digest(noise, initial, first)}, shell={shell}, surrogate {made_for(inner, None)}"
        result = fit(
            watch(objective, f"{made_for(denoiser, None)} {told_apart}"),
            model,
            {"row": torch.arange(1)},
            steps=iterations,
            batch_size=1,
            folder=place,
            resume=resume,
            progress=progress,
            **{**_settings(learning_rate), **options},
        )
        with torch.no_grad():
            found = model() * scale
            samples = run(denoiser, found, decode_plan)
            errors = loss(samples), loss(run(inner, found, surrogate_plan))
    calls = 3 * sum(count * plan.nfe for _, plan, count in ways) + decode_plan.nfe
    return Optimised(found, samples, errors[0], errors[1], initial, calls, result.log)


def _digest(noise: Tensor, *errors: Tensor) -> str:
    """Of the noise, and of what the loss says of its samples and of the surrogate's, to four digits."""
    told = [f"{error:.3e}" for error in torch.cat(errors).tolist()]
    return hashlib.sha256(noise.detach().cpu().double().numpy().tobytes() + " ".join(told).encode()).hexdigest()[:16]


def _settings(learning_rate: float) -> dict[str, Any]:
    adam = partial(torch.optim.Adam, betas=(0.9, 0.999))
    return {
        "learning_rate": learning_rate,
        "optimizer": adam,
        "warmup": 0,
        "decay": "constant",
        "clip": None,
        "ema": (),
        "divergence": None,
        "log_every": 1,
    }


def _scale(surrogate: Plan, decode: Plan) -> float:
    """The noise level at which both plans start."""
    levels = [float(plan.schedule.sigma(plan.noise_time)) for plan in (surrogate, decode)]
    if abs(levels[0] - levels[1]) > SAME_SCALE * levels[1]:
        raise PlanError(
            f"the surrogate starts at noise level {levels[0]:.6g}, decoding at {levels[1]:.6g}: plan both from one start."
        )
    return levels[1]


@contextlib.contextmanager
def _frozen(denoiser: object) -> Iterator[None]:
    """Within it, the weights need no gradients."""
    network = innermost(denoiser, "network")
    parameters = [p for p in network.parameters() if p.requires_grad] if isinstance(network, nn.Module) else []
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class _Noise(nn.Module):
    """The noise in units of its standard deviation, as what is trained."""

    norms: Tensor
    done: Tensor

    def __init__(self, z: Tensor, shell: bool):
        super().__init__()
        self.z, self.shell = nn.Parameter(z.detach().clone()), shell
        self.register_buffer("norms", self._norm().detach(), persistent=False)
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))

    def _norm(self) -> Tensor:
        return self.z.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, *[1] * (self.z.ndim - 1))

    def forward(self) -> Tensor:
        return self.z * (self.norms / self._norm()) if self.shell else self.z

    @torch.no_grad()
    def back(self) -> None:
        """Back to the shell, after an iteration."""
        self.done += 1
        if self.shell:
            self.z.mul_(self.norms / self._norm())


class _Surrogate:
    """The objective: losses of samples are added up, so each sample is optimised by itself."""

    def __init__(self, run: Any, ways: Sequence[tuple[Any, Plan, int]], loss: Loss, scale: float, folder: Path | None, sheets: int):
        self.run, self.ways, self.loss, self.scale, self.folder, self.sheets = run, ways, loss, scale, folder, sheets
        self.samples: Tensor | None = None
        through = ", ".join(f"{count} through {plan.digest[:12]}" for _, plan, count in ways if count)
        self.told = f"DITTO-2: {through}, by {told_of(loss)}"

    def __repr__(self) -> str:
        return self.told

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        first, then = self.ways
        denoiser, plan, _ = first if int(getattr(model, "module", model).done) < first[2] else then
        x = self.run(denoiser, model() * self.scale, plan, check=False)
        errors = self.loss(x)
        self.samples = x.detach()
        return errors.sum(), {"error": errors.detach().mean(), "worst": errors.detach().max()}

    def updated(self, model: Any, step: int) -> None:
        """Called by the loop."""
        getattr(model, "module", model).back()
        if self.folder is not None and step % self.sheets == 0:
            self._draw(step)

    def _draw(self, step: int) -> None:
        from fewstep.evaluate.report import image_grid

        assert self.samples is not None
        assert self.folder is not None
        denoiser = self.ways[1][0]
        decode, data_range = (
            getattr(denoiser, "decode", None),
            getattr(getattr(denoiser, "info", None), "data_range", None),
        )
        pictures = self.samples if decode is None else decode(self.samples)
        sheet = image_grid(pictures.nan_to_num().cpu(), data_range or (-1.0, 1.0), columns=min(16, len(pictures)))
        write_atomically(self.folder / f"samples-{step:07d}.png", sheet)
