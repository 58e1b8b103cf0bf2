"""Judging samples and solvers: errors against the exact solution, distances of distributions, and reports of them."""

from __future__ import annotations

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
)
from fewstep.evaluate.features import Inception, digit_features, make_features, pixels
from fewstep.evaluate.report import Report, image_grid
from fewstep.evaluate.trajectories import ErrorRow, compare_plans, rms_error

__all__ = [
    "DISTANCES",
    "KID",
    "MMD",
    "Distance",
    "ErrorRow",
    "Excess",
    "Frechet",
    "Inception",
    "Measured",
    "Report",
    "SlicedWasserstein",
    "Wasserstein",
    "compare_plans",
    "digit_features",
    "excess",
    "frechet_of_gaussians",
    "image_grid",
    "make_distances",
    "make_features",
    "measure",
    "pixels",
    "rms_error",
]
