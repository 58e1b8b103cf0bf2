"""Training: objectives, the one loop `fit`, and the recipes of the shipped models."""

from __future__ import annotations

from fewstep.train.averages import PowerFunction, average_afterwards
from fewstep.train.batches import Rows
from fewstep.train.losses import DenoisingLoss, LabelDropout
from fewstep.train.optim4bit import AdamW4bit, SGD4bit, optimizer_state_bytes
from fewstep.train.recipes import RECIPES, Recipe, train_classifier, train_recipe
from fewstep.train.stages import Objective, Stage
from fewstep.train.trainer import FitResult, fit

__all__ = [
    "RECIPES",
    "AdamW4bit",
    "DenoisingLoss",
    "FitResult",
    "LabelDropout",
    "Objective",
    "PowerFunction",
    "Recipe",
    "Rows",
    "SGD4bit",
    "Stage",
    "average_afterwards",
    "fit",
    "optimizer_state_bytes",
    "train_classifier",
    "train_recipe",
]
