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
layer, and all get the A that process 0 finds.
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
from torch.distributed.tensor import DTensor

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

    In a data-parallel job all processes must call this, before the model is sharded, each with batches of its own: what
    they get is what one process would get from all of them, the same in every process to the last bit.

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
        ValueError: No such adapter, it is merged, or its ``init`` is not "gradient"; a weight that is sharded or
            not in memory; no batch, no label in any batch of any process, a batch without ``labels``, or a loss that is
            not finite.
        RuntimeError: Another process has failed.
    """
    for name, value, least in (("oversampling", oversampling, 1), ("power_iterations", power_iterations, 0)):
        if value < least:
            raise ValueError(f"{name}={value!r}: must be at least {least}")
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
        D = gradients.get(id(weights[name]))
        D = torch.zeros(layer.out_features, layer.in_features) if D is None else D
        D = _summed(D.to(_meeting_device(A.device)))
        with torch.no_grad():
            B.zero_()
            if D.any():
                V = _right_singular_vectors(D, len(A), seed, oversampling, power_iterations)
            else:
                V = A.to(D.device, torch.promote_types(A.dtype, D.dtype))
                idle.append(name)
            A.copy_(_of_process_0(V))
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
    for name, layer in chosen.items():
        where = _not_whole(layer)
        if where is not None:
            raise ValueError(f"the weight of {name} is {where}: call lors.initialize before that")
    return chosen


def _not_whole(layer: LorsLinear) -> str | None:
    """Where the weight of a layer is if this process does not hold all of it, or cannot read it."""
    base = layer.get_base_layer()
    weight = base._parameters.get("weight")  # a compressed layer has none
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        return "sharded (FSDP2, tensor parallelism)"
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
    except Exception as caught:
        error, tokens = caught, FAILED
    counts = _counts(tokens, _meeting_device(weights[0].device))
    if error is not None:
        raise error
    if FAILED in counts:
        raise RuntimeError(f"process {counts.index(FAILED)} of {len(counts)} has failed in lors.initialize, see there")
    if not any(counts):
        raise ValueError("batches: no batch has a label to learn from (empty, or all labels are -100)")
    return sums


def _gradient_sums(
    model: nn.Module, weights: list[Tensor], batches: Iterable[Mapping[str, Tensor]]
) -> tuple[dict[int, Tensor], int]:
    """Sum over all label tokens of the gradient of each weight, float32 on the CPU, by ``id`` of the weight.

    The mean differs from the sum by a factor that singular vectors do not see.

    Returns:
        The sums and the number of label tokens.
    """
    sums: dict[int, Tensor] = {}
    tokens = total = 0

    def collect(weight: Tensor) -> None:
        gradient = weight.grad.to("cpu", torch.float32)
        weight.grad = None  # frees the device's copy before the backward pass makes the next
        if id(weight) in sums:
            sums[id(weight)].add_(gradient, alpha=tokens)
        else:
            sums[id(weight)] = gradient.mul_(tokens)

    with ExitStack() as hooks, torch.enable_grad():
        for weight in {id(weight): weight for weight in weights}.values():  # a tied weight is hooked once
            hooks.callback(weight.register_post_accumulate_grad_hook(collect).remove)
        for index, batch in enumerate(batches):
            tokens = _label_tokens(batch, index)
            if tokens:
                _loss(model, batch, index, weights[0].device).backward()
                total += tokens
    return sums, total


def _label_tokens(batch: Mapping[str, Tensor], index: int) -> int:
    """Number of positions with a loss: causal models predict every label but the first of a row."""
    if "labels" not in batch:
        raise ValueError(f"batches: batch {index} has no 'labels', only {sorted(batch)}")
    return int((batch["labels"][..., 1:] != IGNORED_LABEL).sum())


def _loss(model: nn.Module, batch: Mapping[str, Tensor], index: int, device: torch.device) -> Tensor:
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    loss = model(**inputs).loss
    if not torch.isfinite(loss):
        raise ValueError(f"batches: the loss of batch {index} is {loss.item()}")
    return loss


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _meeting_device(device: torch.device) -> torch.device:
    """Where the processes can exchange a tensor of ``device``: there, unless they know GPUs only (NCCL)."""
    if device.type == "cpu" and _several_processes() and dist.get_backend() == dist.Backend.NCCL:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _counts(count: int, device: torch.device) -> list[int]:
    """The count of every process."""
    if not _several_processes():
        return [count]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = count
    return _summed(counts).tolist()


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
