"""Weights that ``lors.save_compressed`` has written. This file needs torch and safetensors only, and can be copied."""

import json
import math

import torch
from safetensors import safe_open


def load_compressed(folder: str) -> dict[str, torch.Tensor]:
    """The dense weights of a folder of ``save_compressed``, by name: a state dict of the model."""
    weights = {}
    with safe_open(f"{folder}/compressed.safetensors", "pt") as file:
        header = json.loads(file.metadata()["compressed"])
        if header["version"] != 1:
            raise ValueError(f"{folder}: version {header['version']} of the layout; this reads version 1")
        for name, (layout, *shape) in header["weights"].items():
            if layout == "dense":
                weights[name] = file.get_tensor(name)
                continue
            values, width = file.get_tensor(f"{name}.values"), shape[-1]
            W = values.new_zeros(math.prod(shape[:-1]), width)  # rows x width
            if layout == "bitmap":
                bits = file.get_tensor(f"{name}.bits")  # rows x bytes
                M = bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1  # rows x bytes x 8
                W[M.flatten(1)[:, :width].bool()] = values
            else:
                n, m = map(int, layout.split(":"))
                size = {2: 1, 4: 2, 8: 4, 16: 4}[m]  # bits of an index
                codes = file.get_tensor(f"{name}.codes")  # rows x bytes
                index = codes.unsqueeze(-1) >> torch.arange(0, 8, size, dtype=torch.uint8) & 2**size - 1
                index = index.flatten(1)[:, : values.shape[1]].long()  # rows x width n/m, within a group
                W.scatter_(1, index + torch.arange(0, width, m).repeat_interleave(n), values)
            weights[name] = W.view(shape)
    return weights | {name: weights[other] for name, other in header["shared"].items()}
