"""Judging samples and solvers: errors against the exact solution, and reports of them."""

from __future__ import annotations

from fewstep.evaluate.report import Report, image_grid
from fewstep.evaluate.trajectories import ErrorRow, compare_plans, rms_error

__all__ = ["ErrorRow", "Report", "compare_plans", "image_grid", "rms_error"]
