"""The tables that tests loop over. A new solver needs its row here; a test fails when one is missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from fewstep import schedules
from fewstep.train.optim4bit import AdamW4bit, SGD4bit


class SolverCase(NamedTuple):
    """What a named solver claims.

    `order`: of its deterministic part.
    `stochastic`: whether it draws noise.
    `at_least`: the one first step of low order holds the claim down; where the prediction hardly changes at the start, the order seen is
    higher, and the method's own test measures it.
    `coarse`: the number of calls from which that order can be seen on every interval and grid; it is measured from there to twice as
    many. The default is whole steps of 2, 3 and 4 calls.
    `renews`: all noise is drawn anew, at once or over a few steps: the limit of an infinite eta.
    """

    order: int
    stochastic: bool = False
    at_least: bool = False
    coarse: int = 168
    renews: bool = False


SOLVERS: dict[str, SolverCase] = {
    "auto": SolverCase(3),
    "ddim": SolverCase(1),
    "ddpm": SolverCase(1, stochastic=True),
    "deis": SolverCase(3),
    "deis_logrho": SolverCase(3, coarse=320),
    "deis_rho": SolverCase(3, coarse=320),
    "dpm_2m": SolverCase(2),
    "dpm_2s": SolverCase(2),
    "dpm_2s_ancestral": SolverCase(1, stochastic=True),
    "dpm_3m": SolverCase(3, coarse=320),
    "dpm_3s": SolverCase(3),
    "dpm_fast": SolverCase(2, coarse=672),
    "dpmpp": SolverCase(2),
    "dpmpp_1": SolverCase(1),
    "dpmpp_2m": SolverCase(2),
    "dpmpp_2m_taylor": SolverCase(2),
    "dpmpp_2m_sde": SolverCase(2, stochastic=True),
    "dpmpp_1_sde": SolverCase(1, stochastic=True),
    "dpmpp_2s": SolverCase(2),
    "dpmpp_2s_ancestral": SolverCase(1, stochastic=True),
    "dpmpp_2s_sde": SolverCase(2, stochastic=True),
    "dpmpp_3m": SolverCase(3),
    "dpmpp_3m_official": SolverCase(2),
    "dpmpp_3m_sde": SolverCase(3, stochastic=True),
    "dualfast": SolverCase(1),
    "unip_3": SolverCase(2, at_least=True),
    "unipc": SolverCase(3, at_least=True),
    "unipc_1": SolverCase(2),
    "unipc_2": SolverCase(3),
    "unipc_4": SolverCase(3, at_least=True),
    "unipc_noise": SolverCase(3, at_least=True),
    "euler_ancestral": SolverCase(1, stochastic=True),
    "flow_adams": SolverCase(3),
    "flow_adams_2": SolverCase(2),
    "flow_adams_3": SolverCase(3, coarse=336),
    "flow_euler": SolverCase(1),
    "flow_euler_ancestral": SolverCase(1, stochastic=True),
    "flow_heun": SolverCase(2, coarse=336),
    "flow_midpoint": SolverCase(2, coarse=336),
    "flow_rk4": SolverCase(4, coarse=672),
    "ipndm": SolverCase(2),
    "ipndm_3": SolverCase(2, coarse=672),
    "lcm": SolverCase(1, stochastic=True, renews=True),
    "lms": SolverCase(3, coarse=320),
    "pndm": SolverCase(2),
    "rho_heun": SolverCase(2, coarse=336),
    "rho_kutta3": SolverCase(3, coarse=504),
    "rho_midpoint": SolverCase(2, coarse=336),
    "rho_rk4": SolverCase(4, coarse=672),
    "sa": SolverCase(3, stochastic=True),
    "tcd": SolverCase(1, stochastic=True, coarse=1280, renews=True),
    "dpmpp_3s": SolverCase(3, coarse=336),
    "dpmpp_3s_sde": SolverCase(3, stochastic=True),
    "edm_euler": SolverCase(1),
    "edm_heun": SolverCase(2),
}

BETAS = np.linspace(1e-4, 0.02, 1000)
SD_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ZERO_SNR = np.cos(0.5 * np.pi * np.arange(1, 101) / 100) ** 2 * (1 - 1e-4) * (np.arange(1, 101) < 100)

SCHEDULES: dict[str, schedules.NoiseSchedule] = {
    "vp_linear": schedules.VPLinear(),
    "vp_cosine": schedules.VPCosine(),
    "vp_cosine_full": schedules.VPCosine(t_start=1.0, t_end=0.0),
    "edm": schedules.EDM(),
    "flow": schedules.Flow(),
    "flow_full": schedules.Flow(shift=3.0, t_start=1.0, t_end=0.0),
    "betas": schedules.FromBetas(BETAS.tolist()),
    "stable_diffusion": schedules.FromBetas(SD_BETAS.tolist()),
    "zero_snr": schedules.FromAlphasCumprod(ZERO_SNR.tolist()),
}
"""Every kind of schedule, with infinite lambda at either end among them."""

FINITE: dict[str, schedules.NoiseSchedule] = {
    "vp_linear": schedules.VPLinear(t_start=0.95, t_end=0.05),
    "vp_cosine": schedules.VPCosine(t_start=0.95, t_end=0.05),
    "edm": schedules.EDM(t_start=10.0, t_end=0.05),
    "flow": schedules.Flow(t_start=0.95, t_end=0.05),
    "flow_shifted": schedules.Flow(shift=3.0, t_start=0.9, t_end=0.05),
}
"""Finite intervals, on which orders are claimed. Smooth schedules only: a table has kinks, which cap the order there."""


class OptimizerCase(NamedTuple):
    """What an optimizer with rounded states claims.

    `make`: of parameters and options. `ancestor`: what it is if nothing is rounded.
    `bytes`: of the states of a tensor of a shape.
    `first_step`: how far the first step is from the ancestor's, over the largest parameter; states are still exact then.
    """

    make: Callable[..., torch.optim.Optimizer]
    ancestor: Callable[..., torch.optim.Optimizer]
    bytes: Callable[[tuple[int, ...]], float]
    first_step: float = 1e-6


def _codes_and_blocks(shape: tuple[int, ...]) -> float:
    return math.prod(shape) * (0.5 + 4 / 128)


OPTIMIZERS: dict[str, OptimizerCase] = {
    "adamw4bit": OptimizerCase(
        AdamW4bit,
        torch.optim.AdamW,
        lambda shape: _codes_and_blocks(shape) + math.prod(shape) / 2 + 4 * min(sum(shape), math.prod(shape) // 128),
    ),
    "adamw4bit, rank1": OptimizerCase(
        partial(AdamW4bit, second_moment="rank1"),
        torch.optim.AdamW,
        lambda shape: _codes_and_blocks(shape) + math.prod(shape) / 2 + 4 * sum(shape),
    ),
    "adamw4bit, block": OptimizerCase(
        partial(AdamW4bit, second_moment="block"), torch.optim.AdamW, lambda shape: 2 * _codes_and_blocks(shape)
    ),
    "adamw4bit, factored": OptimizerCase(
        partial(AdamW4bit, second_moment="factored"),
        torch.optim.AdamW,
        lambda shape: _codes_and_blocks(shape) + 4 * (shape[0] + math.prod(shape[1:])),
        first_step=0.2,  # a factored v is not v: a step differs by what the rate allows
    ),
    "sgd4bit": OptimizerCase(partial(SGD4bit, lr=0.05), partial(torch.optim.SGD, lr=0.05, momentum=0.9), _codes_and_blocks),
    "sgd4bit, nesterov": OptimizerCase(
        partial(SGD4bit, lr=0.05, nesterov=True, weight_decay=0.01),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
        _codes_and_blocks,
    ),
}
