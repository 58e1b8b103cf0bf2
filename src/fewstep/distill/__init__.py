"""Distillation: students of few calls."""

from __future__ import annotations

from fewstep.distill.consistency import LCM
from fewstep.distill.distribution import DMD2, Adversary
from fewstep.distill.flow_map import FiniteDifference, ForwardMode, FreeFlow
from fewstep.distill.high_frequency import HighFrequencyLoss, HiPA, teacher_pairs
from fewstep.distill.method import STUDENT, Method, Training
from fewstep.distill.networks import read_as
from fewstep.distill.report import Comparison
from fewstep.distill.run import METHODS, distill, make_method, teacher_samples
from fewstep.distill.student import Student
from fewstep.distill.told import Told
from fewstep.distill.trajectory import TDM

__all__ = [
    "DMD2",
    "LCM",
    "METHODS",
    "STUDENT",
    "TDM",
    "Adversary",
    "Comparison",
    "FiniteDifference",
    "ForwardMode",
    "FreeFlow",
    "HiPA",
    "HighFrequencyLoss",
    "Method",
    "Student",
    "Told",
    "Training",
    "distill",
    "make_method",
    "read_as",
    "teacher_pairs",
    "teacher_samples",
]
