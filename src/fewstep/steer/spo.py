r"""SPO: step-aware preference optimisation, which decides about every step by itself.

Source: "Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference Optimization" (arXiv 2406.04314),
and its published code.

From the current state $x_t$ n candidates of the next state are drawn, $x^{(k)} = m + s\,\xi^{(k)}$. The network is asked about all of
them, as it must be about the next state anyway, and a *step-aware preference model* scores the data predictions,
$S_k = S(D(x^{(k)}, t'), t')$. The best and the worst are a pair if the model is sure of it: $p_b - p_w > \tau$ with
$(p_b, p_w) = \operatorname{softmax}(S_b, S_w)$.
The next state is one candidate drawn at random, whatever its score, so that pairs are of states as sampling meets them. The loss of a pair:

$$ L = -\log \operatorname{sigmoid}\, \beta \big( \log \operatorname{clip} r_b - \log \operatorname{clip} r_w \big) , $$

with both ratios of the one Gaussian they were drawn from (`fewstep.steer.transitions`). Where the label of a whole run says nothing of
a step, a pair of one state and one step is compared with itself alone.

For a Gaussian policy and a linear score with slope k per unit of $\xi$, the best and the worst of n candidates are apart by k times the
expected range of n normal numbers: 1.128, 1.693, 2.059 for n = 2, 3, 4. Tests hold the method to that.

Note:
    Counted honestly, n candidates are n network calls a step. The published code trains with beta = 10 on log-densities that are means over
    elements, and $\tau$ = 0.3 (SD 1.5) or 0.4 (SDXL).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.sampler import Hooks, sample
from fewstep.steer.method import Policy, beyond, check_pair_options, checked, clipped, conditions_of, pair_loss, told_of
from fewstep.steer.transitions import GaussianSteps, log_ratio

__all__ = ["SPO", "StepScore", "best", "scored_by", "uniform"]

StepScore = Callable[..., Tensor]
"""``score(d, t, **cond)``: of data predictions d ``"batch *shape"`` at the time t, a number each ``"batch"``, larger for better ones. A
difference of two is the logarithm of the odds that one is preferred."""
Choice = Callable[[Tensor, torch.Generator], Tensor]


def uniform(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Any of n candidates, all alike: ``"batch"`` of scores ``"n batch"``."""
    return torch.randint(len(scores), (scores.shape[1],), generator=generator).to(scores.device)


def best(scores: Tensor, generator: torch.Generator) -> Tensor:
    """The candidate of the highest score; runs lose their diversity with it."""
    return scores.argmax(0)


def scored_by(reward: Callable[..., Tensor], scale: float = 1.0) -> StepScore:
    """A score that takes data predictions of all times for clean samples: ``scale * reward(d, **cond)``.

    Example:
        >>> score = scored_by(lambda x: x.mean(1), 2.0)
        >>> score(torch.ones(1, 3), 0.7).tolist()
        [2.0]
    """
    return _Scored(reward, scale)


@dataclass(frozen=True)
class _Scored:
    reward: Callable[..., Tensor]
    scale: float

    def __repr__(self) -> str:
        return f"scored_by({told_of(self.reward)}, {self.scale!r})"

    def __call__(self, d: Tensor, t: float, **cond: Any) -> Tensor:
        return self.scale * self.reward(d, **cond)


@dataclass(frozen=True)
class SPO:
    r"""Pairs of candidates at every step, told apart by a score that knows the time.

    Args:
        score: see `StepScore`: a trained `fewstep.steer.StepPreference`, `scored_by`, or a function of your own.
        candidates: n, at least 2.
        beta, clip: as of `fewstep.steer.PSO`.
        threshold: $\tau$ in [0, 1): how sure the score must be of a pair.
        skip: so many steps with noise from the start are taken without pairs (4 of 20 in the published code, none for few steps).
        choose: which candidate is the next state, ``(scores "n batch", generator) -> index "batch"``: `uniform`, as published, or `best`.

    Raises:
        ValueError: for numbers outside their ranges.

    Example:
        >>> SPO(lambda d, t: d.mean(1), candidates=2).threshold
        0.3
    """

    score: StepScore
    candidates: int = 4
    beta: float = 10.0
    clip: float | None = 0.1
    threshold: float = 0.3
    skip: int = 0
    choose: Choice = field(default=uniform)

    def __post_init__(self) -> None:
        check_pair_options(self.beta, self.clip)
        if self.candidates < 2 or self.skip < 0 or not 0.0 <= self.threshold < 1.0:
            raise ValueError(
                f"SPO needs candidates >= 2, skip >= 0 and a threshold in [0, 1); got {self.candidates}, {self.skip}, {self.threshold}."
            )

    def __repr__(self) -> str:
        told = f"candidates={self.candidates}, beta={self.beta}, clip={self.clip}, threshold={self.threshold}, skip={self.skip}"
        return f"SPO({told_of(self.score)}, {told}, choose={told_of(self.choose)})"

    @property
    def needs_reward(self) -> bool:
        return False

    @property
    def needs_data(self) -> bool:
        return False

    def objective(self, policy: Policy) -> Any:
        """The objective for `fewstep.train.fit`.

        Raises:
            ValueError: if every step with noise is skipped.
        """
        steps = GaussianSteps(policy.plan)
        if self.skip >= len(steps.rows):
            raise ValueError(f"the plan has {len(steps.rows)} steps with noise, so skip={self.skip} leaves none to learn from.")
        return StepPairs(self, policy, steps)


@dataclass(frozen=True, repr=False)
class StepPairs:
    """The objective of SPO; `draw` is its way through the steps."""

    method: SPO
    policy: Policy
    steps: GaussianSteps

    def __repr__(self) -> str:
        return repr(self.method)

    def __call__(self, model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        policy, cond, method = self.policy, conditions_of(batch), self.method
        with torch.no_grad():
            noise = self.steps.start(len(next(iter(batch.values()))), policy.shape, generator, like=policy.like)
            states, pairs = self.draw(noise, cond, generator)
            reference = self.steps.means_on(policy.reference, states, cond)
        means = self.steps.means_on(policy.denoiser, states, cond)
        loss, kept, outside, spread = states.new_zeros(()), [], [], []
        for row, (better, worse, sure, apart) in pairs.items():
            scale = self.steps.scale(row, better)
            log_r = [log_ratio(x, means[row], reference[row], scale) for x in (better, worse)]
            won, lost = (clipped(value, method.clip) for value in log_r)
            loss = loss + (sure * pair_loss(won - lost, method.beta)).sum() / sure.sum().clamp(min=1.0)
            kept.append(sure.mean())
            spread.append(apart.mean())
            outside.append(beyond(torch.cat(log_r), method.clip))
        info = {"kept": torch.stack(kept).mean(), "clipped": torch.stack(outside).mean(), "apart": torch.stack(spread).mean()}
        return loss / len(pairs), {**info, **{f"kept_{row}": value for row, value in zip(pairs, kept, strict=True)}}

    def draw(
        self, noise: Tensor, cond: Mapping[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[int, tuple[Tensor, ...]]]:
        """A run, and the pairs on its way.

        Returns:
            the states ``"N+1 batch *shape"``; and for the number of a row (better, worse, sure, apart): two candidates
            ``"batch *shape"``, 1.0 where they are a pair and 0.0 where not, and the difference of their scores ``"batch"``.
        """
        policy, steps, n = self.policy, self.steps, self.method.candidates
        tau, grid, watched = policy.plan.tau, policy.plan.grid, set(steps.rows[self.method.skip :])
        known: dict[int, Tensor] = {}
        pairs: dict[int, tuple[Tensor, ...]] = {}
        many = {name: torch.cat([value] * n) for name, value in cond.items()}

        def branch(i: int, t: float, mean: Tensor) -> Tensor:
            if i not in watched:
                return steps.add_noise(i, mean, generator)
            drawn = torch.stack([steps.add_noise(i, mean, generator) for _ in range(n)])
            last = i + 1 == len(tau)
            time = float(grid[-1]) if last else float(tau[i + 1])
            flat = drawn.flatten(0, 1)
            predicted = flat if last else policy.denoiser(flat, time, **many)
            scores = checked(self.method.score(predicted, time, **many), len(flat), "a score").reshape(n, -1)
            pairs[i] = _pair(drawn, scores, self.method.threshold)
            chosen, places = self.method.choose(scores, generator), torch.arange(mean.shape[0], device=mean.device)
            if not last:
                known[i + 1] = predicted.reshape(drawn.shape)[chosen, places]
            return drawn[chosen, places]

        def ask(i: int) -> Any:
            return policy.denoiser if i not in known else lambda x, t, **_: known[i]

        hooks = Hooks(state=branch, denoiser=ask)
        run = sample(policy.denoiser, noise, steps.means, cond=cond, hooks=hooks, trajectory=True, check=False)
        return run.states, pairs


def _pair(drawn: Tensor, scores: Tensor, threshold: float) -> tuple[Tensor, ...]:
    """The best and the worst of candidates ``"n batch *shape"`` by scores ``"n batch"``, and whether the score is sure of them."""
    places = torch.arange(drawn.shape[1], device=drawn.device)
    apart = scores.amax(0) - scores.amin(0)
    sure = ((0.5 * apart).tanh() > threshold).to(drawn.dtype)  # softmax of two: p_b - p_w = tanh of half their difference
    return drawn[scores.argmax(0), places], drawn[scores.argmin(0), places], sure, apart
