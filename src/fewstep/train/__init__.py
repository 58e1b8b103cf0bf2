"""Training: objectives, the one loop `fit`, and the recipes of the shipped models."""

from __future__ import annotations

from fewstep.train.losses import DenoisingLoss, LabelDropout
from fewstep.train.recipes import RECIPES, Recipe, train_classifier, train_recipe
from fewstep.train.trainer import FitResult, fit

__all__ = ["RECIPES", "DenoisingLoss", "FitResult", "LabelDropout", "Recipe", "fit", "train_classifier", "train_recipe"]
