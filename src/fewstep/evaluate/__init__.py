"""Judging samples and solvers: errors against the exact solution, distances of distributions, and reports of them."""

from __future__ import annotations

from fewstep.evaluate.comparison import Candidates, Comparison, Judge, Ranked, add_comparison, candidates, compare_solvers
from fewstep.evaluate.distances import (
    DISTANCES,
    KID,
    MMD,
    Distance,
    Excess,
    Frechet,
    Measured,
    SlicedWasserstein,
    Wasserstein,
    excess,
    frechet_of_gaussians,
    make_distances,
    measure,
    wasserstein_of_points,
)
from fewstep.evaluate.features import Inception, digit_features, make_features, pixels
from fewstep.evaluate.report import Report, image_grid
from fewstep.evaluate.trajectories import (
    ErrorRow,
    ObservedOrder,
    Settled,
    compare_plans,
    observed_order,
    rms_error,
    settled_solution,
)

__all__ = [
    "DISTANCES",
    "KID",
    "MMD",
    "Candidates",
    "Comparison",
    "Distance",
    "ErrorRow",
    "Excess",
    "Frechet",
    "Inception",
    "Judge",
    "Measured",
    "ObservedOrder",
    "Ranked",
    "Report",
    "Settled",
    "SlicedWasserstein",
    "Wasserstein",
    "add_comparison",
    "candidates",
    "compare_plans",
    "compare_solvers",
    "digit_features",
    "excess",
    "frechet_of_gaussians",
    "image_grid",
    "make_distances",
    "make_features",
    "measure",
    "observed_order",
    "pixels",
    "rms_error",
    "settled_solution",
    "wasserstein_of_points",
]
