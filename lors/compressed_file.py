"""A pruned model on disk without its zeros: ``compressed.safetensors``, in an open layout that is read in thirty lines
(``lors.compressed_reader``).

A weight NAME ``[..., in]`` is seen as a matrix, rows x in, and lies in the smallest of these layouts, without loss but
for the sign of zeros; z of its entries are not zero:

=========  =======================================================================================================
layout     tensors of the file
=========  =======================================================================================================
dense      ``NAME``, as it is
bitmap     ``NAME.values`` [z] row by row; ``NAME.bits`` uint8 [rows, in/8]: bit k of byte j is for column 8 j + k
n:m        ``NAME.values`` [rows, in n/m]; ``NAME.codes`` uint8 [rows, in n/m * i/8]: the place of each value in its
           group of m, i = 1, 2, 4, 4 bits for m = 2, 4, 8, 16, the first in the lowest bits
=========  =======================================================================================================

Rows of bits and codes are padded to whole bytes. ``compressed`` in the metadata is JSON: ``version`` (1); ``weights``,
NAME -> [layout, *shape]; ``shared``, NAME -> the NAME that it is the same tensor as.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from transformers import PreTrainedModel

from lors.kernels import BITMAP, DENSE, pack
from lors.storage import best_layout, dense_state_dict

__all__ = ["save_compressed", "semi_structured"]

FILE = "compressed.safetensors"
VERSION = 1


def save_compressed(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Write a model without adapters as a folder with ``config.json`` and its weights without their zeros.

    ``lors.load_compressed`` gives the weights back. transformers does not read the file, and says so.

    Args:
        model: The model; merge its adapters first.
        folder: Made if it is not there. The weights are written under a temporary name and renamed.

    Raises:
        ValueError: The model has adapters.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("save_compressed: the model has adapters; give it merge_and_unload()")
    state = model.state_dict(keep_vars=True)
    dense_state_dict(model, state, "", None)
    tensors: dict[str, Tensor] = {}
    weights: dict[str, list] = {}
    names: dict[int, str] = {}
    shared = {}
    for name, tensor in state.items():
        if names.setdefault(id(tensor), name) != name:
            shared[name] = names[id(tensor)]
            continue
        tensor = tensor.detach().cpu().contiguous()
        W = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else None
        layout = best_layout(W, "auto") if W is not None and W.is_floating_point() else DENSE
        if layout == DENSE:
            tensors[name] = tensor
        else:
            places = "bits" if layout == BITMAP else "codes"
            tensors[f"{name}.values"], tensors[f"{name}.{places}"] = pack(W, layout).parts[:2]
        weights[name] = [layout, *tensor.shape]
    header = json.dumps({"version": VERSION, "weights": weights, "shared": shared})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.{secrets.token_hex(8)}.tmp"
    try:
        save_file(tensors, temporary, {"compressed": header})
        temporary.replace(folder / FILE)
    finally:
        temporary.unlink(missing_ok=True)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def semi_structured(values: Tensor, codes: Tensor) -> Tensor:
    """The tensors of a 2:4 weight as torch's semi-structured tensor (CUTLASS), without the dense weight in between.

    It can be made anywhere; torch's kernels for a product with it run on capability 8.x alone (Ampere, Ada). On Hopper
    and later ``torch.sparse.to_sparse_semi_structured`` of the dense weight is what works: cuSPARSELt's own format.

    Args:
        values: ``[out, in / 2]``, float16 or bfloat16; 32 divides out, 64 divides in.
        codes: uint8 ``[out, in / 8]``.

    Raises:
        ValueError: Another type, or another width.
    """
    from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets as reordering

    rows, kept = values.shape
    half = values.dtype in (torch.float16, torch.bfloat16)
    if not half or rows % 32 or kept % 32 or codes.shape != (rows, kept // 4):
        raise ValueError(
            f"values {values.dtype} {tuple(values.shape)}, codes {tuple(codes.shape)}: must be those of a 2:4 weight "
            "in float16 or bfloat16 with sides that 32 and 64 divide"
        )
    meta = codes.contiguous().view(torch.int16)  # four groups each, in the order of torch before CUTLASS reorders them
    places = reordering(rows, meta.shape[1], meta.dtype, meta.device)
    meta = torch.empty_like(meta.flatten()).scatter_(0, places, meta.flatten()).view_as(meta)
    return SparseSemiStructuredTensorCUTLASS(
        torch.Size((rows, 2 * kept)), values, meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
    )
