r"""The run of a stochastic plan as a chain of Gaussian steps, and their densities: what preference learning needs of a sampler.

A row of a plan with noise, $z_{i+1} = m_i + s_i \xi_i$, draws from the Gaussian of mean $m_i$ and standard deviation $s_i$. $m_i$
is what the row gives without its noise: affine in the states before and in the data predictions $d_j = D_\theta(z_j, \tau_j)$. So

$$ \log p_\theta(z_{i+1} \mid z_0, \dots, z_i) = -\tfrac12 \Big\langle \frac{(z_{i+1} - m_i)^2}{s_i^2} + \log 2 \pi s_i^2 \Big\rangle , $$

the mean $\langle\cdot\rangle$ over the elements of a sample, as in the published code of PSO and SPO; the logarithm proper is as many times
as large. Of two networks the ratio is

$$ \log r = \Big\langle \frac{(m_\theta - m_\text{ref}) \, (2 z_{i+1} - m_\theta - m_\text{ref})}{2 s_i^2} \Big\rangle . $$

Rows without noise, such as the last one that ends at clean data, have no density. A state that such a row made is no draw: where paths are
read again with another network, it is made again by that network; so the densities are exact for plans of any memory and for rows inside a
step. This holds for every plan whose rows draw independent noise (`PlanError` otherwise), not only for the samplers of the papers.

Sources: "Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization" (PSO, arXiv 2410.03190); "Training Diffusion Models
with Reinforcement Learning" (DDPO, arXiv 2305.13301, section 4.3) for denoising as a chain of Gaussian steps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import PlanError
from fewstep.plan import Entry, Plan
from fewstep.sampler import Hooks, sample

__all__ = ["GaussianSteps", "log_density", "log_ratio", "starting_noise"]

Denoiser = Callable[..., Tensor]


def starting_noise(
    plan: Plan, count: int, shape: Sequence[int], generator: torch.Generator, *, like: Tensor | None = None
) -> Tensor:
    """Starting noise at the scale of a plan's start, from a generator: ``"count *shape"``."""
    noise = torch.randn((count, *shape), generator=generator)
    return float(plan.schedule.sigma(plan.noise_time)) * (noise if like is None else noise.to(like.device, like.dtype))


class GaussianSteps:
    """The steps of a stochastic plan.

    Args:
        plan: with at least one row that draws noise.

    Attributes:
        plan: the plan.
        means: the same without its noise.
        rows: numbers of the rows that draw noise.

    Raises:
        PlanError: for a plan without noise, or whose rows share some.

    Example:
        >>> import fewstep as fs
        >>> plan = fs.make_plan("lcm", fs.schedules.Flow(), 4, final="zero")
        >>> GaussianSteps(plan).rows
        (0, 1, 2)
    """

    def __init__(self, plan: Plan):
        if not plan.stochastic:
            raise PlanError(
                f"PSO and SPO learn from plans that draw noise, and this one, of {plan.nfe} call{'s' * (plan.nfe != 1)}, draws none: use a "
                "stochastic solver (lcm, ddpm, dpmpp_1_sde, ...), a consistency student with 2 calls or more, or offline PSO, which learns "
                "from targets by any plan."
            )
        _check_independent(plan)
        self.plan = plan
        self.rows = tuple(i for i, row in enumerate(plan.rows) if row.noise is not None)
        bare = tuple(dataclasses.replace(row, noise=None) for row in plan.rows)
        self.means = Plan(plan.schedule, plan.grid, bare, plan.start)  # serves every network, so it has no provenance

    def scale(self, row: int, x: Tensor) -> float | Tensor:
        """The standard deviation of a row's noise, for states like x."""
        noise = self.plan.rows[row].noise
        assert noise is not None
        return _like(noise.scale, x)

    def start(self, count: int, shape: Sequence[int], generator: torch.Generator, *, like: Tensor | None = None) -> Tensor:
        """Starting noise at the scale of the plan's start, from a generator: ``"count *shape"``."""
        return starting_noise(self.plan, count, shape, generator, like=like)

    def draw(self, denoiser: Denoiser, noise: Tensor, generator: torch.Generator, cond: Mapping[str, Any] | None = None) -> Tensor:
        """All states of a run, ``"N+1 batch *shape"``, with noise from a generator."""

        def add(i: int, t: float, x: Tensor) -> Tensor:
            return self.add_noise(i, x, generator)

        return sample(denoiser, noise, self.means, cond=cond, hooks=Hooks(state=add), trajectory=True, check=False).states

    def add_noise(self, row: int, mean: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of a row's Gaussian; the mean itself where the row draws none."""
        if row not in self.rows:
            return mean
        return mean + self.scale(row, mean) * torch.randn(mean.shape, generator=generator).to(mean.device, mean.dtype)

    def means_on(self, denoiser: Denoiser, states: Tensor, cond: Mapping[str, Any] | None = None) -> dict[int, Tensor]:
        """The means of the Gaussians along a path, for this denoiser; with gradients where the denoiser has them.

        Args:
            denoiser: ``D(x, t, **cond)``.
            states: ``"N+1 batch *shape"``, of `draw`.
            cond: conditions.

        Returns:
            number of a row that draws noise -> ``"batch *shape"``.
        """
        means: dict[int, Tensor] = {}
        last = self.rows[-1]

        def follow(i: int, t: float, x: Tensor) -> Tensor:
            if i not in self.rows:
                return x
            means[i] = x
            return states[i + 1]

        def ask(i: int) -> Denoiser:
            return denoiser if i <= last else _nothing

        sample(denoiser, states[0], self._undone, cond=cond, hooks=Hooks(state=follow, denoiser=ask), check=False)
        return means

    @property
    def _undone(self) -> Plan:
        """The means, from z_0 on: states hold it after the start transform."""
        if self.plan.start is None:
            return self.means
        return Plan(self.plan.schedule, self.plan.grid, self.means.rows)


def _nothing(x: Tensor, t: Any, **cond: Any) -> Tensor:
    """Stands for calls after the last row with noise, whose outputs nobody looks at."""
    return torch.zeros_like(x)


def _like(entry: Entry, x: Tensor) -> float | Tensor:
    return torch.as_tensor(entry).to(x.device, x.dtype) if isinstance(entry, np.ndarray) else float(entry)


def _check_independent(plan: Plan) -> None:
    """Rows that draw from one part of the clock draw the same noise, and then one is no Gaussian given the other."""
    noisy = [(row.noise.begin, row.noise.end, i) for i, row in enumerate(plan.rows) if row.noise is not None]
    noisy.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(noisy):
        if begin < end - 1e-9 * abs(end):
            raise PlanError(
                f"rows {min(first, second)} and {max(first, second)} of the plan share noise, so its steps are not Gaussian one by one. "
                "Use a solver that draws noise once a step: lcm, tcd, ddpm, dpmpp_1_sde, dpmpp_2m_sde, dpm_2s_ancestral."
            )


def log_density(x: Tensor, mean: Tensor, scale: float | Tensor) -> Tensor:
    """The logarithm of the Gaussian's density at x, mean over the elements of a sample: ``"batch"``.

    Example:
        >>> log_density(torch.zeros(1, 4), torch.zeros(1, 4), (2 * torch.pi) ** -0.5).tolist()
        [0.0]
    """
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    return (-0.5 * ((x - mean) / scale).square() - (scale * (2.0 * torch.pi) ** 0.5).log()).flatten(1).mean(1)


def log_ratio(x: Tensor, mean: Tensor, reference: Tensor, scale: float | Tensor) -> Tensor:
    """Log p(x) - log p_ref(x) of two Gaussians of one deviation, mean over the elements of a sample: ``"batch"``.

    Example:
        >>> x, one, other = torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2)
        >>> log_ratio(x, one, other, 0.5).tolist()
        [2.0]
    """
    return (
        ((mean - reference) * (2.0 * x - mean - reference) / (2.0 * torch.as_tensor(scale, device=x.device) ** 2))
        .flatten(1)
        .mean(1)
    )
