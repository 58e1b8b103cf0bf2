r"""PSO: pairwise sample optimisation, which tunes a distilled model by pairs and keeps its plan and its few steps.

Source: "Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization" (arXiv 2410.03190), and its published code.

*Online* (`PSO`). For every condition two runs of the policy, with noise of their own; the reward of their ends says which is preferred,
$\pm 1$, or neither. For each step that draws noise, with the ratio $r = p_\theta / p_\text{ref}$ of `fewstep.steer.transitions`:

$$ L = -\log \operatorname{sigmoid}\, \beta \big( \log \operatorname{clip} r_w - \log \operatorname{clip} r_l \big) . $$

*Offline* (`OfflinePSO`). For a target $x^w$ and a sample $x^l$ of the reference for the same condition, both noised with the same noise to
one of the plan's times, with $L(x) = \sigma^{-2} \langle (D(x_t, t) - x)^2 \rangle$:

$$ L = -\log \operatorname{sigmoid}\, \beta \Big( \big( L_\text{ref}^w - c L_\text{ref}^l \big) - \big( L_\theta^w - c L_\theta^l
\big) \Big) . $$

Online densities are exact for any stochastic plan; offline any plan serves. Noised data instead of runs, at all times, would be
Diffusion-DPO (arXiv 2311.12908). The paper's variant for personalisation, with the prior of DreamBooth, is left out.

Note:
    beta belongs to log-densities that are means over elements: 50 is 50 / d for the density proper, with d elements a sample. A
    clip of 0.1 ends the gradient where $|\log r|$ passes about 0.1, on either side; the share of such steps is logged as
    ``clipped``. The published code draws one noise for a whole batch; here every sample has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import PlanError
from fewstep.sampler import sample
from fewstep.steer.method import Dominance, Labels, Policy, beyond, check_pair_options, clipped, conditions_of, pair_loss, share
from fewstep.steer.transitions import GaussianSteps, log_ratio, starting_noise

__all__ = ["PSO", "OfflinePSO"]

SMALLEST_SIGMA = 0.03
"""At times closer to clean data than this the weight 1 / sigma^2 grows no more."""


@dataclass(frozen=True)
class PSO:
    """Online: pairs of the policy's own runs, told apart by a reward.

    Args:
        beta: how strongly the policy is held to prefer; larger ones keep it nearer to the reference. A negative one prefers the worse.
        clip: how far the ratio may go from 1 before it has no more gradient; None: any way.
        labels: which of two is preferred: `Dominance`, or `BradleyTerry`.

    Raises:
        ValueError: for a beta of 0, or a clip outside (0, 1).

    Example:
        >>> PSO(beta=20.0).clip
        0.1
    """

    beta: float = 50.0
    clip: float | None = 0.1
    labels: Labels = Dominance()  # noqa: RUF009 - immutable

    def __post_init__(self) -> None:
        check_pair_options(self.beta, self.clip)

    @property
    def needs_reward(self) -> bool:
        return True

    @property
    def needs_data(self) -> bool:
        return False

    def objective(self, policy: Policy) -> Any:
        """The objective for `fewstep.train.fit`."""
        return _Online(self, policy, GaussianSteps(policy.plan))


@dataclass(frozen=True, repr=False)
class _Online:
    method: PSO
    policy: Policy
    steps: GaussianSteps

    def __repr__(self) -> str:
        return repr(self.method)

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        policy, cond = self.policy, conditions_of(batch)
        count = len(next(iter(batch.values())))
        both = {name: torch.cat([value, value]) for name, value in cond.items()}
        with torch.no_grad():
            noise = self.steps.start(2 * count, policy.shape, generator, like=policy.like)
            states = self.steps.draw(policy.denoiser, noise, generator, both)
            assert policy.reward is not None
            rewards = policy.reward(states[-1], **both)
            signs = self.method.labels(rewards[:count], rewards[count:], generator)
            reference = self.steps.means_on(policy.reference, states, both)
        means = self.steps.means_on(policy.denoiser, states, both)
        loss, outside, margins = signs.new_zeros(()), [], []
        for row, mean in means.items():
            log_r = log_ratio(states[row + 1], mean, reference[row], self.steps.scale(row, mean))
            kept = clipped(log_r, self.method.clip)
            margin = signs * (kept[:count] - kept[count:])
            loss = loss + (signs.abs() * pair_loss(margin, self.method.beta)).mean()
            outside.append(beyond(log_r, self.method.clip))
            margins.append((signs * (log_r[:count] - log_r[count:])).detach().mean())
        info = {"reward": rewards.mean(), "ties": share(signs == 0), "clipped": torch.stack(outside).mean()}
        return loss / len(means), {**info, "margin": torch.stack(margins).mean()}


@dataclass(frozen=True)
class OfflinePSO:
    """Offline: targets ``"x"`` that are given, beside the reference's own samples for the same conditions (or ``"worse"``, if given).

    Args:
        beta: as of `PSO`, for losses that are means over elements.
        push: c, how much the other sample counts.

    Raises:
        ValueError: for a beta of 0 or a negative push.

    Example:
        >>> OfflinePSO().push
        0.1
    """

    beta: float = 200.0
    push: float = 0.1

    def __post_init__(self) -> None:
        check_pair_options(self.beta, None)
        if not self.push >= 0.0:
            raise ValueError(f"push must be at least 0, got {self.push}.")

    @property
    def needs_reward(self) -> bool:
        return False

    @property
    def needs_data(self) -> bool:
        return True

    def objective(self, policy: Policy) -> Any:
        """The objective for `fewstep.train.fit`."""
        return _Offline(self, policy, _noisy_times(policy.plan))


def _noisy_times(plan: Any) -> list[float]:
    """The plan's times at which there is noise, the first one included: where alpha is 0 all of the state is noise."""
    times = sorted({float(t) for t in plan.tau}, reverse=True)
    found = [t for t in times if float(plan.schedule.sigma(t)) > 0.0]
    if not found:
        raise PlanError("none of the plan's calls is at a noisy time.")
    return found


@dataclass(frozen=True, repr=False)
class _Offline:
    method: OfflinePSO
    policy: Policy
    times: list[float]

    def __repr__(self) -> str:
        return repr(self.method)

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        policy, cond, better = self.policy, conditions_of(batch), batch["x"].to(self.policy.like)
        count, schedule = len(better), policy.plan.schedule
        both = {name: torch.cat([value, value]) for name, value in cond.items()}
        with torch.no_grad():
            worse = batch["worse"].to(better) if "worse" in batch else self._own(better, cond, generator)
            drawn = torch.randint(len(self.times), (count,), generator=generator)
            t = np.asarray(self.times)[torch.cat([drawn, drawn]).numpy()]
            alpha, sigma = (_column(values, better) for values in (schedule.alpha(t), schedule.sigma(t)))
            noise = torch.randn(better.shape, generator=generator).to(better)
            clean, weight = torch.cat([better, worse]), sigma.flatten().clamp(min=SMALLEST_SIGMA) ** -2
            x = alpha * clean + sigma * torch.cat([noise, noise])
            reference = self._losses(policy.reference(x, t, **both), clean, weight)
        now = self._losses(policy.denoiser(x, t, **both), clean, weight)
        push = self.method.push
        margin = (reference[:count] - push * reference[count:]) - (now[:count] - push * now[count:])
        info = {
            "margin": margin.detach().mean(),
            "loss_better": now[:count].detach().mean(),
            "loss_worse": now[count:].detach().mean(),
        }
        return pair_loss(margin, self.method.beta).mean(), info

    def _own(self, better: Tensor, cond: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """Samples of the reference."""
        plan, reference = self.policy.plan, self.policy.reference
        noise = starting_noise(plan, len(better), better.shape[1:], generator, like=better)
        if plan.stochastic:
            return GaussianSteps(plan).draw(reference, noise, generator, cond)[-1]
        return sample(reference, noise, plan, cond=cond, check=False)

    @staticmethod
    def _losses(d: Tensor, clean: Tensor, weight: Tensor) -> Tensor:
        return weight * (d - clean).square().flatten(1).mean(1)


def _column(values: Any, x: Tensor) -> Tensor:
    """Numbers ``"batch"``, to be multiplied with x."""
    return torch.as_tensor(np.asarray(values, np.float64)).to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))
