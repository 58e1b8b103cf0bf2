"""Distillation: students of few calls."""

from __future__ import annotations

from fewstep.distill.consistency import LCM, lcm_lora
from fewstep.distill.method import STUDENT, Method, Training, read_as
from fewstep.distill.report import Comparison
from fewstep.distill.run import METHODS, distill, make_method, teacher_samples
from fewstep.distill.student import Student

__all__ = [
    "LCM",
    "METHODS",
    "STUDENT",
    "Comparison",
    "Method",
    "Student",
    "Training",
    "distill",
    "lcm_lora",
    "make_method",
    "read_as",
    "teacher_samples",
]
