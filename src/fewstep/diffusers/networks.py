r"""How a diffusers network is asked: the scale of its input, the time that it is told, and what its output says of the data.

A network of a table is told an index, one of a flow sigma times N. One in EDM's preconditioning ("Elucidating the Design Space of
Diffusion-Based Generative Models", arXiv 2206.00364) gets, of the state $x = x_0 + \sigma\varepsilon$, a function of sigma and
$x / \sqrt{\sigma^2 + \sigma_d^2}$; see `fewstep.preconditioning`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.diffusers.config import PREDICTS, betas_of, is_flow, rule_of, sigma_data_of, sigma_of_told, told_of_sigma
from fewstep.preconditioning import edm_coefficients
from fewstep.predictions import data_coefficients
from fewstep.schedules import NoiseSchedule

__all__ = ["FlowNetwork", "HostNetwork", "PreconditionedNetwork", "TableNetwork", "network_of"]

Floats = NDArray[np.float64]


class HostNetwork(abc.ABC):
    """Interface. Frozen and hashable, so that what is computed for one can be kept."""

    scales: bool = False
    """Whether the network's input is scaled."""

    @abc.abstractmethod
    def told(self, schedule: NoiseSchedule, times: Floats) -> NDArray[Any]:
        """What the network is told at these times of a schedule ``"n"``, in the precision of its own."""

    @abc.abstractmethod
    def times(self, schedule: NoiseSchedule, told: Floats) -> Floats:
        """The times at which it is told this."""

    @abc.abstractmethod
    def coefficients(self, alpha: float, sigma: float) -> tuple[float, float]:
        """A and b of d = a x + b f, with x the state, whatever the scale of the input."""

    def says_nothing_at(self, alpha: float) -> bool:
        """Whether its output does not determine the data where the state has this alpha."""
        return False

    def input_scale(self, sigma: float) -> float:
        """The factor of the state in what the network gets."""
        return 1.0

    def start_scale(self, sigma: float) -> float:
        """Deviation of the noise from which a run begins."""
        return 1.0


@dataclass(frozen=True)
class TableNetwork(HostNetwork):
    """One that is told an index of a table with `count` entries, whole or with a fraction."""

    predicts: str
    count: int
    fractional: bool

    def told(self, schedule: NoiseSchedule, times: Floats) -> NDArray[Any]:
        index = np.clip(times * self.count - 1.0, 0, self.count - 1)
        return index.astype(np.float32) if self.fractional else np.rint(index).astype(np.int64)

    def times(self, schedule: NoiseSchedule, told: Floats) -> Floats:
        return (told + 1.0) / self.count

    def coefficients(self, alpha: float, sigma: float) -> tuple[float, float]:
        return data_coefficients(self.predicts, alpha, sigma)

    def says_nothing_at(self, alpha: float) -> bool:
        return alpha == 0.0 and self.predicts == "noise"


@dataclass(frozen=True)
class FlowNetwork(HostNetwork):
    """One that is told sigma times `count`; inverted, (1 - sigma) times it, and its output then points to the data."""

    predicts: str
    count: int
    inverted: bool

    def told(self, schedule: NoiseSchedule, times: Floats) -> NDArray[Any]:
        level = schedule.alpha(times) if self.inverted else schedule.sigma(times)
        return (level * self.count).astype(np.float32)

    def times(self, schedule: NoiseSchedule, told: Floats) -> Floats:
        sigma = 1.0 - told / self.count if self.inverted else told / self.count
        with np.errstate(divide="ignore"):
            return schedule.t_of_lam(np.log1p(-sigma) - np.log(sigma))

    def coefficients(self, alpha: float, sigma: float) -> tuple[float, float]:
        a, b = data_coefficients(self.predicts, alpha, sigma)
        return (a, -b) if self.inverted else (a, b)

    def says_nothing_at(self, alpha: float) -> bool:
        return alpha == 0.0 and self.predicts == "noise"


@dataclass(frozen=True)
class PreconditionedNetwork(HostNetwork):
    """One in EDM's preconditioning, for states x_0 + sigma eps. `sign` is that of c_out, and `time` what it is told of sigma."""

    sigma_data: float
    sign: float
    time: str
    scales = True

    def told(self, schedule: NoiseSchedule, times: Floats) -> NDArray[Any]:
        return told_of_sigma(self.time, times).astype(np.float32)

    def times(self, schedule: NoiseSchedule, told: Floats) -> Floats:
        return sigma_of_told(self.time, told)

    def coefficients(self, alpha: float, sigma: float) -> tuple[float, float]:
        skip, out, _ = edm_coefficients(sigma, self.sigma_data)
        return skip, self.sign * out

    def input_scale(self, sigma: float) -> float:
        return edm_coefficients(sigma, self.sigma_data)[2]

    def start_scale(self, sigma: float) -> float:
        """That of diffusers, as if data had a deviation of 1."""
        return float(np.hypot(sigma, 1.0))


def network_of(config: Mapping[str, Any]) -> HostNetwork:
    """The network of a checked config.

    Example:
        >>> network_of({"prediction_type": "epsilon"})
        TableNetwork(predicts='noise', count=1000, fractional=False)
    """
    kind, count = config.get("prediction_type", "epsilon"), int(config.get("num_train_timesteps", 1000))
    data = sigma_data_of(config)
    if data is not None:
        return PreconditionedNetwork(data, -1.0 if kind == "v_prediction" else 1.0, config["timestep_type"])
    if is_flow(config):
        return FlowNetwork(PREDICTS[kind], count, bool(config.get("invert_sigmas")))
    return TableNetwork(PREDICTS[kind], len(betas_of(config)), _is_fractional(config))


def _is_fractional(config: Mapping[str, Any]) -> bool:
    """Whether the network is told times between the entries of its table: left out, where the rule for times is that of Euler's family."""
    said = config.get("fractional_timesteps")
    own_times = config.get("plan") is None and config.get("grid") is None
    return bool(said) if said is not None else own_times and rule_of(config).name == "euler"
