"""Training: objectives, the one loop `fit`, and the recipes of the shipped models."""

from __future__ import annotations

from fewstep.train.averages import PowerFunction, average_afterwards
from fewstep.train.batches import Rows
from fewstep.train.groups import ElasticGroup, FixedGroup, WorkerLostError
from fewstep.train.high_order import HighOrderLoss
from fewstep.train.int4 import Int4Conversion, Int4Linear, convert_to_int4_training
from fewstep.train.local_sgd import LocalOptimizer, Round, SynchronizationError, Traffic
from fewstep.train.losses import DenoisingLoss, LabelDropout, importance_of_weight, measured_importance
from fewstep.train.optim4bit import AdamW4bit, SGD4bit, optimizer_state_bytes
from fewstep.train.recipes import RECIPES, Recipe, train_classifier, train_recipe
from fewstep.train.simulated_workers import SimulatedWorkers
from fewstep.train.slow_sde import local_sgd_drift_factor, sharpness
from fewstep.train.sparse import HybridSparseAttention, MixedSparsity, SparsitySchedule
from fewstep.train.stages import Objective, Stage
from fewstep.train.synchronization import (
    QSR,
    CommunicationVolume,
    ConstantH,
    InversePower,
    PostLocal,
    communication_volume,
    warmup_cosine,
)
from fewstep.train.trainer import FitResult, fit

__all__ = [
    "QSR",
    "RECIPES",
    "AdamW4bit",
    "CommunicationVolume",
    "ConstantH",
    "DenoisingLoss",
    "ElasticGroup",
    "FitResult",
    "FixedGroup",
    "HighOrderLoss",
    "HybridSparseAttention",
    "Int4Conversion",
    "Int4Linear",
    "InversePower",
    "LabelDropout",
    "LocalOptimizer",
    "MixedSparsity",
    "Objective",
    "PostLocal",
    "PowerFunction",
    "Recipe",
    "Round",
    "Rows",
    "SGD4bit",
    "SimulatedWorkers",
    "SparsitySchedule",
    "Stage",
    "SynchronizationError",
    "Traffic",
    "WorkerLostError",
    "average_afterwards",
    "communication_volume",
    "convert_to_int4_training",
    "fit",
    "importance_of_weight",
    "local_sgd_drift_factor",
    "measured_importance",
    "optimizer_state_bytes",
    "sharpness",
    "train_classifier",
    "train_recipe",
    "warmup_cosine",
]
