r"""Denoisers of azula as fewstep's, and back.

azula's denoisers live on schedules of their own, with times from 0 (data) to 1 (noise), and return a posterior with a mean. In terms of
$y = x/\alpha$ and $\sigma/\alpha$ every schedule is `EDM`, so an azula denoiser becomes one on `EDM`; plans for it are saved and loaded as
any other. The other way, azula's time runs linearly from the denoiser's ``schedule.t_end`` to ``t_start``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from fewstep.denoisers import Denoiser, ModelInfo
from fewstep.errors import MissingExtraError
from fewstep.identity import digest_of
from fewstep.schedules import EDM, NoiseSchedule

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["from_azula", "to_azula"]

HALVINGS = 60


def from_azula(denoiser: Any) -> Denoiser:
    r"""An azula denoiser as a fewstep denoiser of $y = x/\alpha$ on `EDM`.

    Args:
        denoiser: an ``azula.denoise.Denoiser``. What it takes besides ``(x_t, t)`` are the conditions.

    Returns:
        a denoiser on ``EDM(sigma_min, sigma_max)``, the ratios sigma / alpha at azula's times 0 and 1. azula's state at time t is
        ``denoiser.schedule(t)[0]`` times fewstep's.

    Raises:
        ValueError: if azula's schedule has no finite ratio at time 1.

    Example:
        ``fs.sample(from_azula(denoiser), noise, plan)`` with ``plan = fs.make_plan("unipc", from_azula(denoiser).schedule, nfe=8)``.
    """

    def network(y: Tensor, t: Tensor, **cond: Any) -> Tensor:
        alpha, _ = denoiser.schedule(t)
        return denoiser(alpha.reshape(alpha.shape + (1,) * (y.ndim - alpha.ndim if alpha.ndim else 0)) * y, t, **cond).mean

    def time_of(sigma: Any) -> np.ndarray:
        wanted = torch.as_tensor(np.asarray(sigma, np.float64))
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            below = _ratio(denoiser, middle) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (0.5 * (low + high)).numpy()

    least, most = _ratio(denoiser, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    if not math.isfinite(most):
        raise ValueError("azula's schedule has alpha = 0 at time 1, which no sigma / alpha can express. Give it an alpha_min.")
    schedule = EDM(least, most) if least > 0.0 else EDM(1e-3, most, t_end=0.0)
    weights = denoiser.state_dict()
    info = ModelInfo(name=type(denoiser).__name__, fingerprint=digest_of(weights) if weights else None)
    return Denoiser(network, schedule, predicts="data", network_time=time_of, scalar_time=True, info=info)


def _ratio(denoiser: Any, t: Tensor) -> Tensor:
    alpha, sigma = denoiser.schedule(t)
    return (sigma / alpha).detach().cpu().double()


def to_azula(denoiser: Callable[..., Tensor]) -> Any:
    """A fewstep denoiser as an ``azula.denoise.Denoiser``, for azula's samplers and guidance.

    Args:
        denoiser: ``D(x, t, **cond)`` with a ``schedule``; a guided or an exact one as well.

    Returns:
        an ``azula.denoise.Denoiser`` whose posterior has no variance, with the schedule as azula wants it.

    Raises:
        MissingExtraError: if azula is not installed.
        TypeError: if the denoiser says no schedule.

    Example:
        ``azula.sample.DDIMSampler(to_azula(denoiser), steps=16)(x_1)``
    """
    schedule = getattr(denoiser, "schedule", None)
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"to_azula needs a denoiser with a fewstep schedule, got {type(denoiser).__name__}.")
    try:
        from azula.denoise import Denoiser as AzulaDenoiser
        from azula.denoise import DiracPosterior
        from azula.noise import Schedule as AzulaSchedule
    except ImportError as error:
        raise MissingExtraError("azula", "azula", "an azula denoiser") from error

    def time_of(t: Tensor) -> np.ndarray:
        share = t.detach().cpu().double().numpy()
        return schedule.t_end + share * (schedule.t_start - schedule.t_end)

    class Scheduled(AzulaSchedule):
        """The schedule at azula's times."""

        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            times = time_of(t)
            return torch.as_tensor(schedule.alpha(times)).to(t), torch.as_tensor(schedule.sigma(times)).to(t)

    class Wrapped(AzulaDenoiser):
        """The denoiser; a network that is a module is a part of it."""

        def __init__(self) -> None:
            super().__init__()
            self.schedule = Scheduled()
            network = getattr(denoiser, "network", None)
            self.network = network if isinstance(network, torch.nn.Module) else None

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Any:
            times = time_of(t)
            return DiracPosterior(mean=denoiser(x_t, times if times.ndim else float(times), **kwargs))

    return cast(Any, Wrapped())
