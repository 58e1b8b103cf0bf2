"""Distillation: students of few calls."""

from __future__ import annotations

from fewstep.distill.method import Method, Training

__all__ = ["Method", "Training"]
