r"""Moving averages of the weights while they are trained, and averages of other lengths afterwards.

After update s the average becomes $\bar\theta \leftarrow \bar\theta + (1 - \beta_s)(\theta - \bar\theta)$. Two rules for $\beta_s$:

*A decay d*, $\beta_s = \min(d, (1 + s)/(10 + s))$, which forgets the untrained weights early.

*The power function*, $\beta_s = (1 - 1/s)^{\gamma + 1}$, whose average at s weighs the weights of update $\tau$ in proportion to
$\tau^\gamma$: it grows with the run, and the untrained weights have no part in it. Its length is told by the relative standard deviation of
that profile,

$$ \sigma_{rel} = \frac{(\gamma + 1)^{1/2}}{(\gamma + 2)(\gamma + 3)^{1/2}}, \qquad
   \gamma^3 + 7\gamma^2 + (16 - \sigma_{rel}^{-2})\gamma + 12 - \sigma_{rel}^{-2} = 0, $$

$\gamma$ being the largest real root; $\sigma_{rel} = 0.05$ gives 16.97, and 0.10 gives 6.94.

*Afterwards*: with averages of two lengths kept now and then (snapshots), the average of any other length is nearly a combination
$\sum_i x_i \bar\theta_i$ of them. With $p_{\gamma,t}(\tau) = (\gamma + 1)\tau^\gamma / t^{\gamma+1}$ on $[0, t]$, x minimises
$\int (p_{\gamma,t} - \sum_i x_i p_{\gamma_i, t_i})^2 d\tau$, with

$$ \int p_{\gamma_a,t_a} p_{\gamma_b,t_b} d\tau = \frac{(\gamma_a + 1)(\gamma_b + 1)}{(\gamma_a + \gamma_b + 1) \max(t_a, t_b)}
   \cdot \begin{cases} (t_a/t_b)^{\gamma_b} & t_a < t_b \\ (t_b/t_a)^{\gamma_a} & \text{else.} \end{cases} $$

Sources: "Score-Based Generative Modeling through Stochastic Differential Equations" (arXiv 2011.13456, appendix H) for the decay;
"Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696, section 3 and appendix C) for the power function and
the reconstruction.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.artefacts import Artefact
from fewstep.errors import ArtefactError

__all__ = ["Averages", "PowerFunction", "average_afterwards", "combination"]

SNAPSHOT = "averages-{:09d}.safetensors"
KIND = "averages"


@dataclass(frozen=True)
class PowerFunction:
    """An average of the power-function profile.

    Args:
        sigma_rel: its relative standard deviation, above 0 and below $12^{-1/2} = 0.289$, that of the plain mean of all updates.

    Raises:
        ValueError: if it lies outside.

    Example:
        >>> round(PowerFunction(0.05).gamma, 2), round(PowerFunction(0.10).gamma, 2)
        (16.97, 6.94)
        >>> PowerFunction(0.05).beta(1)
        0.0
    """

    sigma_rel: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_rel < 1.0 / math.sqrt(12.0):
            raise ValueError(f"PowerFunction needs sigma_rel above 0 and below 0.289, got {self.sigma_rel}.")

    @property
    def gamma(self) -> float:
        """The exponent of the profile."""
        inverse = self.sigma_rel**-2
        return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())

    def beta(self, update: int) -> float:
        """What is kept of the average at an update, counted from 1."""
        return (1.0 - 1.0 / update) ** (self.gamma + 1.0)


Profile = float | PowerFunction


def check_profiles(ema: Profile | Sequence[Profile]) -> tuple[Profile, ...]:
    """The averages that are asked for, as a tuple.

    Raises:
        ValueError: for a decay outside [0, 1), or one given twice.
    """
    profiles = tuple(ema) if isinstance(ema, Sequence) else (ema,)
    if not all(isinstance(profile, PowerFunction) or 0.0 <= profile < 1.0 for profile in profiles):
        raise ValueError(f"ema needs decays in [0, 1), or PowerFunction(...), got {profiles}.")
    if len(set(profiles)) < len(profiles):
        raise ValueError(f"ema names an average twice: {profiles}.")
    return profiles


def beta(profile: Profile, update: int) -> float:
    """What is kept of an average at an update, counted from 1."""
    return profile.beta(update) if isinstance(profile, PowerFunction) else min(profile, (1.0 + update) / (10.0 + update))


class Averages:
    """Averages of one state dict, one for every profile; ``values[profile][name]``."""

    def __init__(self, profiles: Iterable[Profile], state: Mapping[str, Tensor]):
        self.updates = 0
        self.values = {profile: {name: value.detach().clone() for name, value in state.items()} for profile in profiles}

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor]) -> None:
        """Bring in the weights after the next update; what is not a floating-point number is copied."""
        self.updates += 1
        for profile, average in self.values.items():
            weight = 1.0 - beta(profile, self.updates)
            for name, value in state.items():
                if value.is_floating_point():
                    average[name].lerp_(value, weight)
                else:
                    average[name].copy_(value)


def write_snapshot(folder: Path, step: int, averages: Mapping[Profile, Mapping[str, Tensor]]) -> None:
    """Keep the averages of the power function as they are after a step, in float32."""
    kept = {profile: values for profile, values in averages.items() if isinstance(profile, PowerFunction)}
    tensors = {
        f"{profile.sigma_rel}/{name}": value.detach().float().cpu().numpy()
        for profile, values in kept.items()
        for name, value in values.items()
        if value.is_floating_point()
    }
    meta = {"step": step, "sigma_rel": [profile.sigma_rel for profile in kept]}
    Artefact(KIND, meta, tensors).save(folder / SNAPSHOT.format(step))


def snapshot_files(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Step -> file of the snapshots in a folder."""
    found = sorted(Path(folder).glob(SNAPSHOT.replace("{:09d}", "[0-9]*")))
    return {int(path.stem.partition("-")[2]): path for path in found}


def overlap(gamma_a: float, t_a: float, gamma_b: float, t_b: float) -> float:
    """The integral of the product of two profiles."""
    ratio = (t_a / t_b) ** gamma_b if t_a < t_b else (t_b / t_a) ** gamma_a
    return (gamma_a + 1.0) * (gamma_b + 1.0) * ratio / ((gamma_a + gamma_b + 1.0) * max(t_a, t_b))


def combination(known: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> np.ndarray:
    """Weights x of known averages (sigma_rel, step) that come nearest to a wanted one, float64 ``"len(known)"``.

    Example:
        >>> combination([(0.05, 100), (0.10, 100)], (0.10, 100)).round(6).tolist()
        [0.0, 1.0]
    """
    gammas = [(PowerFunction(sigma).gamma, float(t)) for sigma, t in known]
    goal = (PowerFunction(wanted[0]).gamma, float(wanted[1]))
    A = np.array([[overlap(*a, *b) for b in gammas] for a in gammas])
    b = np.array([overlap(*a, *goal) for a in gammas])
    scale = 1.0 / np.sqrt(A.diagonal())  # of unit norm, so that early and late snapshots count alike
    found, *_ = np.linalg.lstsq(A * scale[:, None] * scale[None, :], b * scale, rcond=1e-14)
    return found * scale


def average_afterwards(folder: str | os.PathLike[str], sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of any length, from the snapshots that a run left.

    Args:
        folder: of the run; `fewstep.train.fit` wrote ``averages-*.safetensors`` into it, with ``snapshot_every``.
        sigma_rel: relative length of the wanted average.
        step: after which step, one that has a snapshot; left out, the last one.

    Returns:
        name -> averaged weights in float32, floating-point ones only: ``model.load_state_dict(..., strict=False)`` if there are others.

    Raises:
        ArtefactError: if there are no snapshots, or fewer than two lengths in them.
        ValueError: if there is no snapshot of `step`.
    """
    files = snapshot_files(folder)
    if not files:
        raise ArtefactError(f"{folder} has no snapshots of averages; fit(..., ema=(PowerFunction(0.05), ...), snapshot_every=...).")
    goal = max(files) if step is None else step
    if goal not in files:
        raise ValueError(
            f"step must be one of the snapshots' ({', '.join(map(str, files))}), got {step}: between them there is no record."
        )
    kept = [Artefact.load(path, kind=KIND) for at, path in files.items() if at <= goal]
    known = [(sigma, artefact.meta["step"]) for artefact in kept for sigma in artefact.meta["sigma_rel"]]
    if len({sigma for sigma, _ in known}) < 2:
        raise ArtefactError(f"the snapshots in {folder} hold one length of average; a reconstruction needs two, as 0.05 and 0.10.")
    total: dict[str, np.ndarray] = {}
    weights = iter(combination(known, (sigma_rel, goal)))
    for artefact in kept:
        for sigma in artefact.meta["sigma_rel"]:
            weight = next(weights)
            for name, value in artefact.tensors.items():
                prefix, _, short = name.partition("/")
                if prefix == str(sigma):
                    total[short] = total.get(short, 0.0) + weight * value.astype(np.float64)
    return {name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in total.items()}
