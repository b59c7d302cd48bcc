"""One of the two processes of ``test_distributed``, which train side by side on the CPU (gloo).

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 python tests/distributed_worker.py FOLDER

Both processes run all checks of ``CHECKS`` in the same order. A check returns what a test judges later: rank0.json
and rank1.json in FOLDER have what the checks have returned so far, or the traceback of an exception. A further check is
a function and a line in ``CHECKS``; its collective operations are those of the default group.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import process_checks
import sharding_checks
import torch
import torch.distributed as dist
from callback_loop import pruned_layers, train_with
from contract import pruned
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

import lors
from baselines.geolora import GeoLoraConfig, GeoLoraLinear, GeometricIntegrator
from lors import initialization
from lors.placement import full

WORLD, RANK = 2, int(os.environ.get("RANK", "0"))
PATIENCE = timedelta(seconds=60)  # with a process that does not come to a collective operation


def largest_difference(tensors: dict[str, Tensor]) -> float:
    """The largest difference of an entry of any tensor between the processes."""
    found: list[dict[str, Tensor]] = [{}] * WORLD
    dist.all_gather_object(found, tensors)
    one, other = found
    assert one.keys() == other.keys()
    return max((one[key].double() - other[key].double()).abs().max().item() for key in one)


# ---- GeoLoRA


def integrator(folder: Path) -> dict[str, Any]:
    """One integrator step of three layers: both processes use the first, one the second, none the third.

    Held against the formula with the mean of the gradients of both processes.
    """
    torch.manual_seed(0)
    config = GeoLoraConfig(r=3, lora_alpha=6, target_modules=["proj"], skipped_steps=0)
    model = get_peft_model(pruned_layers((11, 14), (11, 14), (11, 14)), config).double().train()
    layers = [part for part in model.modules() if isinstance(part, GeoLoraLinear)]
    inputs = torch.randn(WORLD, 6, 14, dtype=torch.float64)
    used = ([0, 1], [0])  # layers, by process
    eta, expected = 1e-3, []
    for index, layer in enumerate(layers):
        for basis in (layer.geolora_U["default"], layer.geolora_V["default"]):
            basis.copy_(torch.linalg.qr(basis).Q * (torch.arange(6) < 3))  # orthonormal in float64
        layer.geolora_S["default"].data[:3, :3] = torch.randn(3, 3, dtype=torch.float64)
        U, S, V = layer.parts("default")
        Y, M = (U @ S @ V.t()).detach(), layer.weight != 0
        T = layer.weight + layer.scaling["default"] * M * Y
        rows = torch.cat([x for x, chosen in zip(inputs, used, strict=True) if index in chosen] or [torch.zeros(1, 14)])
        G = layer.scaling["default"] * M * (2 * T @ rows.double().t() @ rows.double()) / WORLD  # of the sum of squares
        P, Q = U @ U.t(), V @ V.t()
        expected.append(Y - eta * (P @ G + G @ Q - P @ G @ Q))

    x, mine = inputs[dist.get_rank()], used[dist.get_rank()]
    optimizer = torch.optim.SGD([layer.geolora_S["default"] for layer in layers], lr=eta)
    loss = lambda: sum(layers[index](x).square().sum() for index in mine)  # noqa: E731
    train_with(GeometricIntegrator(), model, optimizer, loss, [0], of=9)
    parts = [layer.parts("default") for layer in layers]
    return {
        "difference": largest_difference({f"{i} {k}": part for i, of in enumerate(parts) for k, part in enumerate(of)}),
        "from_the_formula": max(
            (U @ S @ V.t() - Y).abs().max().item() for (U, S, V), Y in zip(parts, expected, strict=True)
        ),
    }


# ---- lors.initialize


def own_batches() -> list[dict[str, Tensor]]:
    """Other rows in every process, of other lengths, with another number of labels."""
    return batches_of(dist.get_rank())


def batches_of(rank: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    found = []
    for rows, length in (((3, 12), (1, 7)), ((2, 9),))[rank]:
        ids = torch.randint(3, 64, (rows, length), generator=generator)
        labels = ids.clone()
        labels[:, -(length // 3) :] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def lors_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Of another seed in every process, as adapters are where nobody has set one."""
    model = pruned(dtype=dtype)
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    return get_peft_model(model, lors.LorsConfig(r=4), autocast_adapter_dtype=False)


def factors(model: nn.Module) -> dict[str, Tensor]:
    """A of every layer."""
    layers = {name: part for name, part in model.named_modules() if isinstance(part, lors.LorsLinear)}
    return {name: layer.lors_A["default"].detach().clone() for name, layer in layers.items()}


def message_of(call: Callable[[], Any]) -> str:
    """Type and text of the exception that a call must raise."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no exception was raised")


def initialized(dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """A from other batches in every process, and A as FSDP2 puts it together from the shards of both."""
    model = lors.initialize(lors_model(dtype), own_batches())
    found = factors(model)
    torch.save(found, folder / f"factors-{dtype}-{dist.get_rank()}.pt")
    difference = largest_difference(found)
    fully_shard(model)
    gathered = {name: A.full_tensor().float() for name, A in factors(model).items()}
    return {
        "difference": difference,
        "distance_from_orthonormal": max((A @ A.t() - torch.eye(len(A))).abs().max().item() for A in gathered.values()),
    }


def without_labels(folder: Path) -> dict[str, Any]:
    """No label in the second process, then none in either."""
    empty = [entry | {"labels": torch.full_like(entry["labels"], -100)} for entry in own_batches()]
    some = lors.initialize(lors_model(), own_batches() if dist.get_rank() == 0 else empty)
    none = lors.initialize(lors_model(), own_batches() if dist.get_rank() == 0 else [])
    torch.save(factors(some), folder / f"without-labels-{dist.get_rank()}.pt")
    torch.save(factors(none), folder / f"without-batches-{dist.get_rank()}.pt")
    return {"message": message_of(lambda: lors.initialize(lors_model(), empty))}


def failing_in_one(folder: Path) -> dict[str, Any]:
    """A bad batch in the second process, the second of two; then all goes well again."""
    bad = [{"input_ids": entry["input_ids"]} for entry in own_batches()]
    batches = own_batches() + (bad if dist.get_rank() == 1 else [])
    model = lors_model()
    before = factors(model)
    message = message_of(lambda: lors.initialize(model, batches))
    changed = [name for name, A in factors(model).items() if not torch.equal(A, before[name])]
    lors.initialize(model, own_batches())
    return {"message": message, "changed": changed, "difference": largest_difference(factors(model))}


class Experts(nn.Module):
    """Three linears, of which a batch takes one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, labels: Tensor, expert: int) -> ModelOutput:
        return ModelOutput(loss=self.experts[expert](x).square().mean())


def idle_experts(folder: Path) -> dict[str, Any]:
    """Each process takes an expert of its own, and neither takes the third."""
    config = lors.LorsConfig(r=2, target_modules=r".*experts\.\d")
    model = get_peft_model(Experts(), config)
    model.experts[2].lors_A["default"].data.fill_(dist.get_rank())
    ids = torch.arange(12).reshape(3, 4)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    lors.initialize(model, [{"x": x, "labels": ids, "expert": dist.get_rank()}])
    gram = [A @ A.t() for A in factors(model).values()]
    return {
        "difference": largest_difference(factors(model)),
        "distance_from_orthonormal": [(G - torch.eye(2)).abs().max().item() for G in gram],
    }


def initialized_in_shards(dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """A of a model that is sharded before; what each process holds of the sums of gradients."""
    model = lors_model(dtype)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    with torch.no_grad():
        model(**own_batches()[0])  # what is sharded in the last place stays whole after that
    held, sums = [], initialization._gradient_sums
    initialization._gradient_sums = lambda *given: held.append(sums(*given)) or held[0]
    try:
        lors.initialize(model, own_batches())
    finally:
        initialization._gradient_sums = sums
    torch.save({name: full(A) for name, A in factors(model).items()}, folder / f"sharded-factors-{dtype}-{RANK}.pt")
    layers = [part for part in model.modules() if isinstance(part, lors.LorsLinear)]
    whole = sum(layer.in_features * layer.out_features for layer in layers)
    return {
        "sharded": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "gradients": any(parameter.grad is not None for parameter in model.parameters()),
        "share_of_the_sums": sum(gradient.numel() for gradient in held[0][0].values()) / whole,
    }


def sharded_failing_in_one(folder: Path) -> dict[str, Any]:
    """A batch without labels in the second process, while the first has begun its pass."""
    model = lors_model()
    fully_shard(model)
    batches = own_batches() if RANK == 0 else [{"input_ids": own_batches()[0]["input_ids"]}]
    return {"message": message_of(lambda: lors.initialize(model, batches))}


def compressed_and_sharded(folder: Path) -> dict[str, Any]:
    """A model whose weights are compressed and sharded already."""
    model = get_peft_model(pruned(), lors.LorsConfig(r=4, storage="bitmap"), autocast_adapter_dtype=False)
    fully_shard(model)
    before = {name: parameter.to_local().clone() for name, parameter in model.named_parameters()}
    message = message_of(lambda: lors.initialize(model, own_batches()))
    after = {name: parameter.to_local() for name, parameter in model.named_parameters()}
    return {"message": message, "changed": [name for name in before if not torch.equal(before[name], after[name])]}


CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "integrator of geolora": integrator,
    "initialize": partial(initialized, torch.float32),
    "initialize in bfloat16": partial(initialized, torch.bfloat16),
    "initialize without labels": without_labels,
    "initialize failing in one process": failing_in_one,
    "initialize with idle experts": idle_experts,
    **{
        f"initialize after sharding in {dtype}": partial(initialized_in_shards, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    },
    "initialize after sharding a compressed model": compressed_and_sharded,
    "initialize after sharding failing in one process": sharded_failing_in_one,
    **process_checks.CHECKS,
    **sharding_checks.CHECKS,
}


def outcome(check: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    try:
        return check(folder)
    except Exception:
        return {"exception": traceback.format_exc()}


def main(folder: Path) -> None:
    """Run all checks; stop where one process fails alone, because the two are then out of step."""
    rank = int(os.environ["RANK"])
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=PATIENCE)
    store = dist.FileStore(str(folder / "outcomes"), WORLD)
    results: dict[str, dict[str, Any]] = {}
    for name, check in CHECKS.items():
        results[name] = outcome(check, folder)
        (folder / f"rank{rank}.json").write_text(json.dumps(results))
        store.set(f"{name}/{rank}", "failed" if "exception" in results[name] else "passed")
        if store.get(f"{name}/0") != store.get(f"{name}/1"):
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
