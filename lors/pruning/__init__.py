"""Magnitude, Wanda and SparseGPT as functions on tensors, and the walk over a model."""

from lors.pruning.calibration import calibration_tokens
from lors.pruning.magnitude import prune_magnitude
from lors.pruning.sparsegpt import gram_matrix, prune_sparsegpt
from lors.pruning.walk import PRUNERS, prune_model
from lors.pruning.wanda import prune_wanda, squared_norms

__all__ = [
    "PRUNERS",
    "calibration_tokens",
    "gram_matrix",
    "prune_magnitude",
    "prune_model",
    "prune_sparsegpt",
    "prune_wanda",
    "squared_norms",
]
