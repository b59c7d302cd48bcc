"""Magnitude, Wanda and SparseGPT, rounding to the nearest and GPTQ as functions on tensors; the walk over a model."""

from lors.pruning.calibration import calibration_tokens
from lors.pruning.magnitude import prune_magnitude
from lors.pruning.quantize import quantize_gptq, quantize_rtn
from lors.pruning.sparsegpt import gram_matrix, prune_sparsegpt
from lors.pruning.walk import PRUNERS, QUANTIZERS, prune_model, quantize_model
from lors.pruning.wanda import prune_wanda, squared_norms

__all__ = [
    "PRUNERS",
    "QUANTIZERS",
    "calibration_tokens",
    "gram_matrix",
    "prune_magnitude",
    "prune_model",
    "prune_sparsegpt",
    "prune_wanda",
    "quantize_gptq",
    "quantize_model",
    "quantize_rtn",
    "squared_norms",
]
