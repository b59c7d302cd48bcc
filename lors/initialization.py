"""Gradient-based initialisation of LoRS adapters (arXiv 2501.08582).

LoRS starts from the gradient that full fine-tuning of the pruned model would see. For each adapted layer with
the weight W (out x in) and the loss L of a few training batches:

    D = dL/dW at the pruned model            out x in, dense: not multiplied by the mask
    D ~ U S V^t                              randomised SVD (Halko, Martinsson, Tropp 2011, algorithm 4.4)
    A = first r columns of V, transposed     r x in, orthonormal rows
    B = 0                                    out x r

so the first step leaves the model as it is, and the first gradient of B is that of W in its r most active
input directions.

L is the mean over all label tokens of all batches: the mean loss of a batch counts by its number of label
tokens. D is summed in float32 in host memory, 4 bytes for each adapted weight; the gradient of a layer moves
there as soon as the backward pass has made it, so that only one is alive on the device.

In a data-parallel job the batches are those of all processes together. The sums of the processes are added up layer by
layer, and all get the A that process 0 finds. Where FSDP2 has sharded the weights, each process sums its part of D.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lors.placement import full, write
from lors.randomness import modes_kept
from lors.storage import gradient_weight
from lors.tuner import LorsLinear

__all__ = ["initialize"]

IGNORED_LABEL = -100  # the label of positions without a loss, in transformers and in torch's cross entropy
FAILED = -1  # in place of the number of label tokens of a process


def initialize(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    adapter_name: str = "default",
    seed: int = 0,
    oversampling: int = 4,
    power_iterations: int = 4,
) -> nn.Module:
    """Set A of every LoRS layer to the top right singular vectors of its weight's gradient, and B to zero.

    The gradient is taken with all adapters switched off, in training mode (dropout on, activation
    checkpointing as configured). Mode, ``requires_grad`` flags, gradients, devices and the global random
    state are afterwards as before. A layer that no batch reaches (an idle expert) keeps its A, and so does
    one whose gradient is zero.

    In a data-parallel job all processes must call this, each with batches of its own: what they get is what one process
    would get from all of them, the same in every process to the last bit.

    The model may be sharded by FSDP2 (``fully_shard``), with dense weights. FSDP2 settles in its first forward pass
    which number format it reduces gradients in, here that of the weights; where adapters have another one, shard the
    model anew before it is trained.

    Args:
        model: A causal language model with LoRS adapters (from ``get_peft_model``, or injected by
            transformers).
        batches: As for training: dicts with ``input_ids`` ``[b, l]``, ``attention_mask`` and ``labels`` (-100
            = no loss). 128 rows in all is what the paper's code takes. A batch without any label is skipped, and a
            process may have none with a label.
        adapter_name: The adapter to initialise; its config must say ``init="gradient"``.
        seed: Of the SVD's random projection, and of dropout.
        oversampling: The SVD works in ``min(oversampling * r, in, out)`` dimensions.
        power_iterations: Of the randomised SVD.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: No such adapter, it is merged, or its ``init`` is not "gradient"; a weight that is sharded otherwise
            or not in memory; no batch, no label in any batch of any process, a batch without ``labels``, or a loss that
            is not finite.
        RuntimeError: Another process has failed.
    """
    for name, value, least in (("oversampling", oversampling, 1), ("power_iterations", power_iterations, 0)):
        if value < least:
            raise ValueError(f"{name}={value!r}: must be at least {least}")
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # after a forward pass alone the outermost one stays whole
    layers = _layers(model, adapter_name)
    with ExitStack() as stack:
        weights = {name: stack.enter_context(gradient_weight(layer.get_base_layer())) for name, layer in layers.items()}
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(_only_trainable(model, list(weights.values())))
        torch.manual_seed(seed)
        gradients = _in_all_processes(model, list(weights.values()), batches)
    idle = []
    for name, layer in layers.items():
        A, B = layer.lors_A[adapter_name], layer.lors_B[adapter_name]
        D = _of_all_processes(gradients.get(id(weights[name])), weights[name], _meeting_device(A.device))
        with torch.no_grad():
            B.zero_()
            if D.any():
                V = _right_singular_vectors(D, len(A), seed, oversampling, power_iterations)
            else:
                V = full(A).to(D.device, torch.promote_types(A.dtype, D.dtype))
                idle.append(name)
            write(A, _of_process_0(V))
    if idle:
        message = f"{len(idle)} of {len(layers)} layers had no gradient and keep their A: {idle[0]}, ..."
        warnings.warn(message, stacklevel=2)
    return model


def _layers(model: nn.Module, adapter_name: str) -> dict[str, LorsLinear]:
    """The layers that have the adapter, by name, after checking that it can be initialised."""
    layers = {name: part for name, part in model.named_modules() if isinstance(part, LorsLinear)}
    chosen = {name: layer for name, layer in layers.items() if adapter_name in layer.lors_A}
    if not chosen:
        known = sorted({adapter for layer in layers.values() for adapter in layer.lors_A})
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no such LoRS adapter; it has {known or 'none'}")
    init = model.peft_config[adapter_name].init
    if init != "gradient":
        raise ValueError(f"init={init!r}: the config of {adapter_name!r} must say init='gradient' to be initialised so")
    if any(part.merged for part in model.modules() if isinstance(part, BaseTunerLayer)):
        raise ValueError("the model has a merged adapter: unmerge it first (model.unmerge_adapter())")
    fsdp2 = any(isinstance(part, FSDPModule) for part in model.modules())
    for name, layer in chosen.items():
        where = _out_of_reach(layer, fsdp2)
        if where is not None:
            raise ValueError(f"the weight of {name} is {where}: call lors.initialize before that")
    return chosen


def _out_of_reach(layer: LorsLinear, fsdp2: bool) -> str | None:
    """Where the weight of a layer is if this process does not hold it, or cannot read it."""
    base = layer.get_base_layer()
    weight = base._parameters.get("weight")  # a compressed layer has none
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        if not fsdp2:
            return "sharded (tensor parallelism)"
        if weight is None:
            return "compressed and sharded (FSDP2)"
    if any(parameter.is_meta for parameter in layer.parameters()):
        return "offloaded or on the meta device"
    if weight is not None and weight.shape != (base.out_features, base.in_features):
        return "sharded (FSDP1, ZeRO-3)"
    return None


@contextmanager
def _only_trainable(model: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """Make the model the pruned one in training mode, with gradients for ``weights`` only; then undo that."""
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    adapters = [part for part in model.modules() if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    enabled = [part for part in adapters if not part.disable_adapters]
    try:
        for part in enabled:
            part.enable_adapters(False)
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for weight in weights:
            weight.requires_grad_(True)
        with modes_kept(model):
            model.train()
            yield
    finally:
        for part in enabled:
            part.enable_adapters(True)
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _in_all_processes(
    model: nn.Module, weights: list[Tensor], batches: Iterable[Mapping[str, Tensor]]
) -> dict[int, Tensor]:
    """``_gradient_sums`` of this process, once all of them have theirs.

    An error in one is an error in all: the others would wait for ever for what it was to send.
    """
    error = None
    try:
        sums, tokens = _gradient_sums(model, weights, batches)
    except OtherProcessError:
        raise
    except Exception as caught:
        error, tokens = caught, FAILED
    counts = _counts(tokens, _meeting_device(weights[0].device))
    if error is not None:
        raise error
    if not any(counts):
        raise ValueError("batches: no batch has a label to learn from (empty, or all labels are -100)")
    return sums


def _gradient_sums(
    model: nn.Module, weights: list[Tensor], batches: Iterable[Mapping[str, Tensor]]
) -> tuple[dict[int, Tensor], int]:
    """Sum over all label tokens of the gradient of each weight, float32 on the CPU, by ``id`` of the weight: of this
    process, or its part of the sum of all where FSDP2 has sharded the weights.

    The mean differs from the sum by a factor that singular vectors do not see.

    Returns:
        The sums and the number of label tokens.
    """
    sums: dict[int, Tensor] = {}
    tokens = total = 0
    weights = list({id(weight): weight for weight in weights}.values())  # a tied weight counts once
    device = weights[0].device
    sharded = [weight for weight in weights if isinstance(weight, DTensor)]

    def collect(weight: Tensor) -> None:
        gradient = _local(weight.grad).to("cpu", torch.float32)
        weight.grad = None  # frees the device's copy before the backward pass makes the next
        if id(weight) in sums:
            sums[id(weight)].add_(gradient, alpha=tokens)
        else:
            sums[id(weight)] = gradient.mul_(tokens)

    with ExitStack() as hooks, torch.enable_grad():
        for weight in weights:
            if not isinstance(weight, DTensor):
                hooks.callback(weight.register_post_accumulate_grad_hook(collect).remove)
        for batch, name, here, tokens in _steps(batches, device, all_at_once=bool(sharded)):
            inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            loss = model(**inputs).loss
            # FSDP2 takes the mean of the gradients of all processes.
            (loss * (here / tokens)).backward()
            if not torch.isfinite(loss):
                raise ValueError(f"batches: the loss of {name} is {loss.item()}")
            for weight in sharded:
                if weight.grad is not None:
                    collect(weight)
            total += here
    return sums, total


def _steps(
    batches: Iterable[Mapping[str, Tensor]], device: torch.device, *, all_at_once: bool
) -> Iterator[tuple[Mapping[str, Tensor], str, int, int]]:
    """The batches that have a label token, what to call them, their label tokens, and those of the step.

    A pass through a sharded model is one of all processes (``all_at_once``): a step is one as long as any of them has a
    batch, and one that has none left takes part with two tokens that do not count. Else a step is of this process.
    """
    idle = {name: torch.zeros(1, 2, dtype=torch.int64) for name in ("input_ids", "labels")}, "no batch", 0
    labelled = _labelled(batches)
    while True:
        batch, name, here = next(labelled, idle)
        tokens = sum(_counts(here, _meeting_device(device))) if all_at_once else here
        if not tokens:
            return
        yield batch, name, here, tokens


def _labelled(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[Mapping[str, Tensor], str, int]]:
    for index, batch in enumerate(batches):
        if "labels" not in batch:
            raise ValueError(f"batches: batch {index} has no 'labels', only {sorted(batch)}")
        # Causal models predict every label but the first of a row.
        tokens = int((batch["labels"][..., 1:] != IGNORED_LABEL).sum())
        if tokens:
            yield batch, f"batch {index}", tokens


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _meeting_device(device: torch.device) -> torch.device:
    """Where the processes can exchange a tensor of ``device``: there, unless they know GPUs only (NCCL)."""
    if device.type == "cpu" and _several_processes() and dist.get_backend() == dist.Backend.NCCL:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _counts(count: int, device: torch.device) -> list[int]:
    """The count of every process; an error in all others if it is that of a failure in one."""
    if not _several_processes():
        return [count]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = count
    counts = _summed(counts).tolist()
    if FAILED in counts and count != FAILED:
        number = counts.index(FAILED)
        raise OtherProcessError(f"process {number} of {len(counts)} has failed in lors.initialize, see there")
    return counts


class OtherProcessError(RuntimeError):
    """Another process has failed, and waits for nobody."""


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _of_all_processes(D: Tensor | None, weight: Tensor, device: torch.device) -> Tensor:
    """The sum D of a weight, out x in, over all processes, from what this one has of it: a sum, a shard, or nothing."""
    D = torch.zeros_like(_local(weight), dtype=torch.float32) if D is None else D
    D = D.to(device)
    if not isinstance(weight, DTensor):
        return _summed(D)
    shape, stride = weight.shape, weight.stride()
    return DTensor.from_local(D, weight.device_mesh, weight.placements, shape=shape, stride=stride).full_tensor()


def _summed(tensor: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if _several_processes():
        dist.all_reduce(tensor)
    return tensor


def _of_process_0(tensor: Tensor) -> Tensor:
    """The tensor of process 0, in place: a decomposition may have other last bits elsewhere."""
    if _several_processes():
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
    return tensor


def _right_singular_vectors(D: Tensor, r: int, seed: int, oversampling: int, power_iterations: int) -> Tensor:
    """First r right singular vectors of D (out x in) as rows, r x in; needs r <= min(out, in).

    Random projection, power iterations with orthonormalisation, and an exact SVD in the subspace found. The
    projection has a generator of its own, the same on every device.
    """
    width = min(oversampling * r, *D.shape)
    probe = torch.randn(D.shape[1], width, generator=torch.Generator().manual_seed(seed)).to(D.device)
    Q = torch.linalg.qr(D @ probe).Q  # out x width
    for _ in range(power_iterations):
        Q = torch.linalg.qr(D.t() @ Q).Q  # in x width
        Q = torch.linalg.qr(D @ Q).Q  # out x width
    return torch.linalg.svd(Q.t() @ D, full_matrices=False).Vh[:r]
