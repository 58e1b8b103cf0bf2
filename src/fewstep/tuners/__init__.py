"""Tuning: plans made for a user's own model."""

from fewstep.tuners.auto import Tuned, tune
from fewstep.tuners.compensation import cascade, compensation
from fewstep.tuners.effort import Effort
from fewstep.tuners.family import Family, Gap, tune_family
from fewstep.tuners.learned import Learned
from fewstep.tuners.paths import Paths, trace_paths
from fewstep.tuners.statistics import model_statistics

__all__ = [
    "Effort",
    "Family",
    "Gap",
    "Learned",
    "Paths",
    "Tuned",
    "cascade",
    "compensation",
    "model_statistics",
    "trace_paths",
    "tune",
    "tune_family",
]
