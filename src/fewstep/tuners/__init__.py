"""Tuning: plans made for a user's own model."""

from fewstep.tuners.auto import tune
from fewstep.tuners.compensation import cascade, compensation
from fewstep.tuners.effort import Effort
from fewstep.tuners.family import Family, Gap, tune_family
from fewstep.tuners.layer_skips import layer_skips
from fewstep.tuners.learned import Learned
from fewstep.tuners.paths import Paths, trace_paths
from fewstep.tuners.result import Tuned
from fewstep.tuners.skipping import LayerSkips, Skipping, skippable
from fewstep.tuners.statistics import model_statistics
from fewstep.tuners.teleport import Skip, teleport_skip
from fewstep.tuners.time_shift import epsilon_scale, time_shift

__all__ = [
    "Effort",
    "Family",
    "Gap",
    "LayerSkips",
    "Learned",
    "Paths",
    "Skip",
    "Skipping",
    "Tuned",
    "cascade",
    "compensation",
    "epsilon_scale",
    "layer_skips",
    "model_statistics",
    "skippable",
    "teleport_skip",
    "time_shift",
    "trace_paths",
    "tune",
    "tune_family",
]
