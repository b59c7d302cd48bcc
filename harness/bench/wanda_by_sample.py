"""The walk of Wanda as its authors describe it, which `harness.bench.pipeline` times ours against."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lors.blocks import block_linears, decoder_blocks

__all__ = ["prune_by_sample"]


class _Caught(Exception):  # noqa: N818 - no error: it ends a forward pass that has gone far enough
    pass


@torch.no_grad()
def prune_by_sample(model: nn.Module, calibration: Tensor, sparsity: float) -> None:
    """Wanda (arXiv 2306.11695) in the published order, one sample (1 x L) at a time.

    The inputs of the first block are caught in forward passes that end there, with the arguments of the last of them
    for all samples and blocks. Per block: a pass of all samples while hooks keep the running mean of the squared
    norms, a sort of the scores of each row, and another pass.
    """
    name, blocks = decoder_blocks(model)
    caught: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0])
        arguments.update(kwargs)
        raise _Caught

    hook = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sample in calibration:
        with suppress(_Caught):
            model(input_ids=sample[None], use_cache=False)
    hook.remove()
    inputs = torch.cat(caught)  # samples x L x d
    outputs = torch.zeros_like(inputs)

    def run(block: nn.Module) -> None:
        for j in range(len(inputs)):
            output = block(inputs[j : j + 1], **arguments)
            outputs[j] = output[0] if isinstance(output, tuple) else output

    for i, block in enumerate(blocks):
        linears = dict(block_linears(f"{name}.{i}", block))
        scaler_rows = {key: torch.zeros(linear.in_features, device=inputs.device) for key, linear in linears.items()}
        seen = dict.fromkeys(linears, 0)

        def add(key: str, _: nn.Module, args: tuple[Tensor, ...], rows=scaler_rows, seen=seen) -> None:
            X = args[0].flatten(0, -2).t().float()  # in x tokens
            rows[key] *= seen[key] / (seen[key] + 1)
            seen[key] += 1
            rows[key] += X.norm(p=2, dim=1) ** 2 / seen[key]

        hooks = [linear.register_forward_pre_hook(partial(add, key)) for key, linear in linears.items()]
        run(block)
        for hook in hooks:
            hook.remove()
        for key, linear in linears.items():
            score = linear.weight.abs() * scaler_rows[key].sqrt()
            lowest = score.sort(dim=-1, stable=True).indices[:, : int(score.shape[1] * sparsity)]
            linear.weight.scatter_(1, lowest, 0.0)
        run(block)
        inputs, outputs = outputs, inputs
