"""Magnitude, Wanda and SparseGPT as functions on tensors, the walk over a model, the cache."""

from lors.prune.cache import pruned_checkpoint
from lors.prune.calibrate import PRUNERS, prune_model
from lors.prune.magnitude import prune_magnitude
from lors.prune.sparsegpt import gram_matrix, prune_sparsegpt
from lors.prune.wanda import prune_wanda, squared_norms

__all__ = [
    "PRUNERS",
    "gram_matrix",
    "prune_magnitude",
    "prune_model",
    "prune_sparsegpt",
    "prune_wanda",
    "pruned_checkpoint",
    "squared_norms",
]
