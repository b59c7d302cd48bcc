"""Checks of ``distributed_worker`` on models whose weights are spread over both processes: FSDP2, FSDP1, DDP."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contract import OWN, batch, composed, logits, method_of, pruned, trained
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from harness.method import adapt
from lors.blocks import decoder_linears
from lors.placement import full
from lors.storage import CompressedLinear

# bfloat16 and a bitmap beside every method in its default form.
FORMS = [*OWN, "lors dtype=bfloat16", "lors storage=bitmap dtype=bfloat16"]
FORMS += [f"{name} keep_zeros=false" for name in OWN if "keep_zeros" in composed(name).method.peft]


def trained_model(form: str) -> nn.Module:
    """The same in both processes, with an update that is not zero."""
    name, _, dtype = form.partition(" dtype=")
    torch.manual_seed(0)
    pattern = "2:4" if "n:m" in name else "unstructured"
    precision = "bf16" if dtype else "float32"
    base = pruned(pattern, torch.bfloat16 if dtype else torch.float32)
    return trained(method_of(name), base, precision)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(layer.weight.detach()).clone() for name, layer in decoder_linears(model).items()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((value.double() - expected[name].double()).abs().max().item() for name, value in found.items())


def shard(model: PeftModel) -> None:
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)


def merged_under_fsdp2(form: str, folder: Path) -> dict[str, Any]:
    """Forward, merge, unmerge, unload of a sharded model, held against one process without FSDP."""
    alone, model = trained_model(form), trained_model(form)
    outputs, originals = logits(alone), weights(alone)
    alone.merge_adapter()
    merged_outputs, merged = logits(alone), weights(alone)
    shard(model)
    found = {"sharded": any(isinstance(parameter, DTensor) for parameter in model.parameters())}
    found["forward"] = (logits(model) - outputs).abs().max().item()
    model.merge_adapter(safe_merge=True)
    found["merged weights"] = difference(weights(model), merged)
    found["merged forward"] = (logits(model) - merged_outputs).abs().max().item()
    model.unmerge_adapter()
    found["unmerged weights"] = difference(weights(model), originals)
    found["unmerged forward"] = (logits(model) - outputs).abs().max().item()
    plain = model.merge_and_unload()
    found["unloaded weights"] = difference(weights(plain), merged)
    found["unloaded forward"] = (logits(plain) - merged_outputs).abs().max().item()
    found["unloaded weights again"] = difference(weights(plain), merged)  # a pass puts shards back in place
    found["changed"] = difference(merged, originals)
    found["keys"] = sorted(set(plain.state_dict()) ^ set(pruned().state_dict()))
    found["kinds"] = sorted({type(layer).__name__ for layer in decoder_linears(plain).values()})
    return found


def support_under_fsdp2(folder: Path) -> dict[str, Any]:
    """The fingerprint of a model that is sharded already."""
    model = trained_model("lors storage=bitmap")
    expected = model.peft_config["default"].support
    shard(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", method_of("lors").peft)
    return {"expected": expected, "found": model.peft_config["second"].support}


def trained_under_fsdp1(storage: str, folder: Path) -> dict[str, Any]:
    """A step of a model with compressed weights, and its merge, under the older FSDP."""
    alone = adapt(method_of("lors"), pruned(), [batch()], 0).train()
    torch.manual_seed(0)
    model = adapt(method_of(f"lors storage={storage}"), pruned(), [batch()], 0).train()
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    for trainee in (alone, wrapped):
        optimizer = torch.optim.SGD([p for p in trainee.parameters() if p.requires_grad], lr=1.0)
        for _ in range(2):
            optimizer.zero_grad()
            trainee(**batch()).loss.backward()
            optimizer.step()
    found = {"forward": (logits(wrapped.eval()) - logits(alone.eval())).abs().max().item()}
    packed = any(isinstance(part, CompressedLinear) for part in wrapped.modules())
    state = wrapped.state_dict()
    found |= {"packed": packed, "whole numbers": any(not p.is_floating_point() for p in wrapped.parameters())}
    found["values"] = sum(key.endswith("values") for key in state)
    alone.merge_adapter()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        wrapped.module.merge_adapter()
    found["merged"] = (logits(wrapped) - logits(alone)).abs().max().item()
    return found


def compressed_under_ddp(folder: Path) -> dict[str, Any]:
    """What DDP sends before a forward pass: not the places of compressed values."""
    model = trained_model("lors storage=bitmap").train()
    replica = nn.parallel.DistributedDataParallel(model)
    buffers = {id(buffer) for name, buffer in model.named_buffers() if name.endswith((".bits", ".offsets"))}
    sent = [buffer for buffer in replica.modules_buffers if id(buffer) in buffers]
    replica(**batch()).loss.backward()
    return {"places": len(buffers), "sent": len(sent)}


CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{f"FSDP2 {form}": partial(merged_under_fsdp2, form) for form in FORMS},
    "FSDP2 support": support_under_fsdp2,
    **{f"FSDP1 {storage}": partial(trained_under_fsdp1, storage) for storage in ("dense", "bitmap")},
    "DDP compressed": compressed_under_ddp,
}
