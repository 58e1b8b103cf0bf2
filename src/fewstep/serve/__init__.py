"""Serving: an engine that makes the samples of many requests in the same network calls, and its queues."""

from __future__ import annotations

from fewstep.serve.engine import Engine
from fewstep.serve.queues import SSMW, Choice, LongestQueue, MaxWeight, Policy, Queue, SoftMW, Uniform
from fewstep.serve.requests import CancelledError, EngineClosedError, Preview, QueueFullError, Request, Ticket, kind_of
from fewstep.serve.schedulers import SCHEDULERS, Arrangement, ByKind, FirstInFirstOut, Scheduler, ShortestRemaining, make_scheduler
from fewstep.serve.statistics import Statistics
from fewstep.serve.students import served_student

__all__ = [
    "SCHEDULERS",
    "SSMW",
    "Arrangement",
    "ByKind",
    "CancelledError",
    "Choice",
    "Engine",
    "EngineClosedError",
    "FirstInFirstOut",
    "LongestQueue",
    "MaxWeight",
    "Policy",
    "Preview",
    "Queue",
    "QueueFullError",
    "Request",
    "Scheduler",
    "ShortestRemaining",
    "SoftMW",
    "Statistics",
    "Ticket",
    "Uniform",
    "kind_of",
    "make_scheduler",
    "served_student",
]
