"""Tuning: plans made for a user's own model."""

from fewstep.tuners.auto import Tuned, tune
from fewstep.tuners.compensation import cascade, compensation
from fewstep.tuners.effort import Effort
from fewstep.tuners.learned import Learned
from fewstep.tuners.paths import Paths, trace_paths
from fewstep.tuners.statistics import model_statistics

__all__ = ["Effort", "Learned", "Paths", "Tuned", "cascade", "compensation", "model_statistics", "trace_paths", "tune"]
