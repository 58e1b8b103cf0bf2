"""Tuning: plans made for a user's own model."""

from fewstep.tuners.auto import Tuned, tune
from fewstep.tuners.compensation import cascade, compensation
from fewstep.tuners.effort import Effort
from fewstep.tuners.family import Family, Gap, tune_family
from fewstep.tuners.layer_skips import layer_skips
from fewstep.tuners.learned import Learned
from fewstep.tuners.paths import Paths, trace_paths
from fewstep.tuners.skipping import LayerSkips, Skipping, skippable
from fewstep.tuners.statistics import model_statistics

__all__ = [
    "Effort",
    "Family",
    "Gap",
    "LayerSkips",
    "Learned",
    "Paths",
    "Skipping",
    "Tuned",
    "cascade",
    "compensation",
    "layer_skips",
    "model_statistics",
    "skippable",
    "trace_paths",
    "tune",
    "tune_family",
]
