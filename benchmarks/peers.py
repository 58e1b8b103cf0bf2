"""Other libraries' solvers behind one interface, for the benchmarks: ``run(denoiser, noise, nfe, cond) -> samples``.

Their network is asked at the exact noise level that their scheduler is at, and their tables are fine samplings of the model's own
schedule, so what is measured is the solver and its grid, not a rounding of times.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.schedules import Flow, NoiseSchedule

__all__ = ["Setting", "diffusers_settings"]

COUNT = 1000
Denoiser = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """A peer's solver with its options.

    Attributes:
        solver: who and what.
        options: what was chosen, in words.
        final: ``"t_end"`` or ``"zero"``, where it ends.
        make: the peer's scheduler for a number of calls.
        levels: alpha and sigma at its i-th call, from the scheduler.
        flow: whether it wants the flow's velocity instead of the noise.
    """

    solver: str
    options: str
    final: str
    make: Callable[[int], Any]
    levels: Callable[[Any, int], tuple[float, float]]
    schedule: NoiseSchedule
    flow: bool = False

    @torch.no_grad()
    def run(self, denoiser: Denoiser, noise: Tensor, nfe: int, cond: Mapping[str, Any]) -> Tensor:
        """Samples ``"batch *shape"`` from unit noise ``"batch *shape"`` in exactly `nfe` calls."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = self.make(nfe)
            if len(scheduler.timesteps) != nfe:
                raise ValueError(f"{self.solver} made {len(scheduler.timesteps)} calls of {nfe}.")
            x = noise
            for i, time in enumerate(scheduler.timesteps):
                alpha, sigma = self.levels(scheduler, i)
                d = denoiser(x, float(self.schedule.t_of_lam(np.log(alpha) - np.log(sigma))), **cond)
                output = (x - d) / sigma if self.flow else (x - alpha * d) / sigma
                x = scheduler.step(output, time, x, return_dict=False)[0].to(noise.dtype)
        return x


def diffusers_settings(schedule: NoiseSchedule) -> list[Setting]:
    """DDIM and DPM-Solver++ 2M and 3M of diffusers, with every spacing of times they offer, on a variance-preserving or flow schedule."""
    return _flow(schedule) if isinstance(schedule, Flow) else _preserving(schedule)


def _preserving(schedule: NoiseSchedule) -> list[Setting]:
    import diffusers

    times = np.linspace(schedule.t_end, schedule.t_start, COUNT)
    alphas = schedule.alpha(times) ** 2
    betas = 1.0 - alphas / np.concatenate([[1.0], alphas[:-1]])
    settings = []

    def ddim(nfe: int, **options: Any) -> Any:
        scheduler = diffusers.DDIMScheduler(trained_betas=betas, clip_sample=False, **options)
        scheduler.set_timesteps(nfe)
        return scheduler

    def at_entry(scheduler: Any, i: int) -> tuple[float, float]:
        t = times[int(scheduler.timesteps[i])]
        return float(schedule.alpha(t)), float(schedule.sigma(t))

    for spacing in ("leading", "trailing", "linspace"):
        for final, one in (("t_end", False), ("zero", True)):
            make = _bind(ddim, timestep_spacing=spacing, set_alpha_to_one=one)
            settings.append(Setting("diffusers DDIM", spacing, final, make, at_entry, schedule))

    def multistep(nfe: int, **options: Any) -> Any:
        scheduler = diffusers.DPMSolverMultistepScheduler(trained_betas=betas, **options)
        scheduler.set_timesteps(nfe)
        return scheduler

    def at_ratio(scheduler: Any, i: int) -> tuple[float, float]:
        ratio = float(scheduler.sigmas[i])
        return 1.0 / float(np.hypot(1.0, ratio)), ratio / float(np.hypot(1.0, ratio))

    spacings: dict[str, dict[str, Any]] = {
        "linspace": {},
        "trailing": {"timestep_spacing": "trailing"},
        "leading": {"timestep_spacing": "leading"},
        "karras": {"use_karras_sigmas": True},
        "lu_lambdas": {"use_lu_lambdas": True},
        "exponential": {"use_exponential_sigmas": True},
        "beta": {"use_beta_sigmas": True},
    }
    for order, kinds in ((2, ("midpoint", "heun")), (3, ("heun",))):
        for kind in kinds:
            for spacing, extra in spacings.items():
                for final, ends in (("zero", "zero"), ("t_end", "sigma_min")):
                    if ends == "sigma_min" and any(key.startswith("use_") for key in extra):
                        continue  # their grid already ends there: the last step would be of length 0, a call for nothing
                    make = _bind(multistep, solver_order=order, solver_type=kind, final_sigmas_type=ends, **extra)
                    told = f"{spacing}, {kind}" if order == 2 else spacing
                    settings.append(Setting(f"diffusers DPM++ {order}M", told, final, make, at_ratio, schedule))
    return settings


def _flow(schedule: Flow) -> list[Setting]:
    import diffusers

    settings = []

    def euler(nfe: int, **options: Any) -> Any:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
        scheduler.set_timesteps(nfe)
        return scheduler

    def multistep(nfe: int, **options: Any) -> Any:
        scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", **options)
        scheduler.set_timesteps(nfe)
        return scheduler

    def at_sigma(scheduler: Any, i: int) -> tuple[float, float]:
        sigma = min(float(scheduler.sigmas[i]), 1.0 - 1e-7)
        return 1.0 - sigma, sigma

    for shift in (1.0, 1.5, 2.0, 3.0):
        make = _bind(euler, shift=shift)
        settings.append(Setting("diffusers flow Euler", f"shift {shift:g}", "zero", make, at_sigma, schedule, flow=True))
        for order, kinds in ((2, ("midpoint", "heun")), (3, ("heun",))):
            for kind in kinds:
                make = _bind(multistep, solver_order=order, solver_type=kind, flow_shift=shift)
                told = f"shift {shift:g}, {kind}" if order == 2 else f"shift {shift:g}"
                settings.append(Setting(f"diffusers DPM++ {order}M", told, "zero", make, at_sigma, schedule, flow=True))
    for spacing in ("karras", "exponential", "beta"):
        make = _bind(euler, **{f"use_{spacing}_sigmas": True})
        settings.append(Setting("diffusers flow Euler", spacing, "zero", make, at_sigma, schedule, flow=True))
    return settings


def _bind(function: Callable[..., Any], **options: Any) -> Callable[[int], Any]:
    return lambda nfe: function(nfe, **options)
