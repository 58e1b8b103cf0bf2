"""Steering: preferences of samples, and control of single ones, for models of few steps."""

from __future__ import annotations

from fewstep.steer.ditto import Optimised, optimize_noise
from fewstep.steer.method import BradleyTerry, Dominance, Labels, Policy, PreferenceMethod, Reward
from fewstep.steer.prefer import Judged, Preferred, prefer
from fewstep.steer.preference_model import StepPreference, fit_preference
from fewstep.steer.pso import PSO, OfflinePSO
from fewstep.steer.rewards import REWARDS, make_reward
from fewstep.steer.spo import SPO, best, scored_by, uniform
from fewstep.steer.targets import TARGETS, ClassTarget, IntensityTarget, MaskedPixels
from fewstep.steer.transitions import GaussianSteps, log_density, log_ratio

__all__ = [
    "PSO",
    "REWARDS",
    "SPO",
    "TARGETS",
    "BradleyTerry",
    "ClassTarget",
    "Dominance",
    "GaussianSteps",
    "IntensityTarget",
    "Judged",
    "Labels",
    "MaskedPixels",
    "OfflinePSO",
    "Optimised",
    "Policy",
    "PreferenceMethod",
    "Preferred",
    "Reward",
    "StepPreference",
    "best",
    "fit_preference",
    "log_density",
    "log_ratio",
    "make_reward",
    "optimize_noise",
    "prefer",
    "scored_by",
    "uniform",
]
