"""What every fine-tuning method is to the harness: a PEFT config and the few things that a tuner cannot
carry.

Hydra builds a ``Method``, or a subclass of it, from a file of ``conf/method``. ``adapt`` turns the pruned model into
one that trains, ``finish`` turns the trained one into the model that is scored. Both are the same for all
methods, so that precision, freezing and the arithmetic of the merge cannot differ between the rows of a
table.

W (out x in) is the pruned weight, M = (W != 0) its support, delta W the change that the method has learned.
End states:

==========  =================================================================================================
merged      the method's own merge; W' keeps the zeros of W if ``keep_zeros``
dense       W' = W + delta W, the zeros are lost (LoRA, any method with ``method.peft.keep_zeros=false``)
remasked    W' = M * (W + delta W), the zeros are kept but the function changes (likewise)
adapter     delta W stays beside W (the same as it was trained: no zero is lost, nothing is merged); all that there is
            where W is quantised and the method does not train on its grid (``method.peft.bits``)
==========  =================================================================================================

Every merge runs in float32, one layer at a time, and is rounded once to the dtype of W.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from lors.blocks import decoder_linears
from lors.experts import experts_as_linears, fuse_experts
from lors.schedule import GradientSchedule
from lors.shared_weights import note_untied_head, untie_adapted
from lors.sparse_layer import SparseLinear
from lors.storage import CompressedLinear

__all__ = [
    "PRECISIONS",
    "VARIANTS",
    "Method",
    "Precision",
    "adapt",
    "finish",
    "round_at",
    "tuner_config",
    "wrap",
]

VARIANTS = ("merged", "adapter", "remasked", "dense")
# End states of a method unless it says otherwise, with the zeros kept and lost.
KEPT, LOST = ("merged",), ("adapter", "remasked", "dense")


@dataclass(frozen=True)
class Precision:
    """Number formats of one ``train.precision``, the same for every method.

    Attributes:
        base: Format of the frozen weights.
        trainable: Format of everything that an optimizer updates.
        autocast: Whether matrix products of a training step run in bfloat16 autocast.
    """

    base: torch.dtype
    trainable: torch.dtype
    autocast: bool


PRECISIONS: Mapping[str, Precision] = {
    "float32": Precision(base=torch.float32, trainable=torch.float32, autocast=False),
    "bf16_mixed": Precision(base=torch.bfloat16, trainable=torch.float32, autocast=True),
    "bf16": Precision(base=torch.bfloat16, trainable=torch.bfloat16, autocast=False),
}


class Method:
    """One fine-tuning method. A subclass overrides what it does otherwise than a plain PEFT tuner with AdamW.

    Attributes:
        name: The name in tables; equal to that of its file in ``conf/method``.
        peft: Config of the PEFT tuner that wraps the model; None for a method without adapter.
        keep_zeros: Whether the zeros of the pruned weight survive the method's merge.
        trains: False for the pruned model as it is.
        merges: End states to score, see the module's text; the first is the row itself, the others are its variants.
        init_rows: Training rows that ``prepare`` gets; None: ``train.init_rows``.
        max_grad_norm: In place of ``train.max_grad_norm``, for a method that prescribes its own clipping; 0: the
            optimizer clips, the Trainer does not. None: as the recipe says.
        version: Raised by a fix that changes the numbers of the method; part of the keys of its runs.
    """

    reads_rows = False
    """Whether ``prepare`` looks at training rows."""
    holds_out = False
    """Whether those rows are left out of the training, so that something can be chosen by them after it."""
    quantized_base = False
    """Whether the frozen weights are quantised; set for a run with ``prune.quantize``."""
    reads_dense = False
    """Whether it looks at the model as it was before the pruning."""
    dense: PreTrainedModel | None = None
    """That model, on the host, in the ``base`` format; set for a run (mode=run) of a method that ``reads_dense``."""
    prunes = False
    """Whether it prunes as it trains, from the dense model on: what is checked then are the zeros that its weights have
    at the end of the training. It leaves no adapter."""
    prepares_shards = False
    """Whether ``prepare`` takes a model whose weights are shared out; it changes what is trained and nothing else."""

    def __init__(
        self,
        name: str,
        peft: PeftConfig | None = None,
        *,
        keep_zeros: bool | None = None,
        trains: bool = True,
        merges: Sequence[str] | None = None,
        init_rows: int | None = None,
        max_grad_norm: float | None = None,
        version: int = 1,
    ) -> None:
        """A method from its file in ``conf/method``.

        Args:
            keep_zeros: None: what ``peft.keep_zeros`` says; a config without that field keeps them.
            merges: None: ``merged`` if the zeros are kept, else those of LoRA (adapter, remasked, dense).

        Raises:
            ValueError: Arguments that contradict each other, or an unknown end state.
        """
        of_config = getattr(peft, "keep_zeros", None)
        if None not in (keep_zeros, of_config) and keep_zeros != of_config:
            raise ValueError(f"method.keep_zeros={keep_zeros}: contradicts method.peft.keep_zeros={of_config}")
        if trains and peft is None and type(self).prepare is Method.prepare:
            raise ValueError("trains=True: must be false for a method with neither peft nor a prepare of its own")
        kept = keep_zeros if keep_zeros is not None else of_config is not False
        merges = (KEPT if kept else LOST) if merges is None else tuple(merges)
        unknown = [variant for variant in merges if variant not in VARIANTS]
        if unknown or not merges:
            wrong = unknown[0] if unknown else "[]"
            raise ValueError(f"method.merges={wrong}: must be one or more of {', '.join(VARIANTS)}")
        self.name, self.peft, self.keep_zeros, self.trains, self.merges = name, peft, kept, trains, merges
        self.init_rows, self.max_grad_norm, self.version = init_rows, max_grad_norm, version

    def prepare(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None, seed: int) -> nn.Module:
        """Set up the wrapped model (or, without ``peft``, the model itself), once, before the training.

        Args:
            model: Changed in place or replaced.
            batches: Training batches, of which the first ``init_rows`` rows are made; they may be iterated more than
                once. None where weights have no meaning or no values (simulation, benchmark): initial values and ranks
                then stay those of the config.
            seed: Seed of whatever is drawn.

        Returns:
            The model to train.
        """
        return model

    def optimizer(self, model: nn.Module, train_cfg: Any) -> torch.optim.Optimizer:
        """AdamW with one rate and one weight decay for all that is trainable.

        Args:
            model: The adapted model.
            train_cfg: ``learning_rate``, ``betas``, ``weight_decay``.
        """
        return torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=train_cfg.learning_rate,
            betas=tuple(train_cfg.betas),
            weight_decay=train_cfg.weight_decay,
        )

    def callbacks(self) -> list[TrainerCallback]:
        """New callbacks of one training; one that holds something from step to step has ``state_dict`` and
        ``load_state_dict``."""
        return [GradientSchedule()] if getattr(self.peft, "gradient_until", 1.0) < 1 else []

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A scalar that is added to the loss of every step; None: nothing is."""
        return None

    def objective(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
        """What a step minimises in place of the cross entropy, a scalar that the method computes by passes of its own;
        None: the cross entropy. Several micro-batches share it as they share the penalty."""
        return None

    def rounds(self, model: nn.Module) -> int:
        """In how many parts of nearly equal length (`round_at`) the training falls, each with the schedule of the
        learning rate from its start."""
        return 1

    def counts(self, model: nn.Module) -> dict[str, int]:
        """Numbers of parameters after the training that ``requires_grad`` does not tell, for ``parameters`` of the
        result: final ranks, everything that was trained over the run."""
        return {}

    def largest_step(self, model: nn.Module) -> AbstractContextManager | None:
        """Context in which a step needs as much memory as any step of the method does, for methods whose callbacks
        change what a step does; None: every step needs the same."""
        return None


def round_at(step: int, steps: int, rounds: int) -> tuple[int, int, int]:
    """Number of the round that a step belongs to, its first step, and the first one after it.

    Args:
        step: From 0; one beyond the end belongs to the last round.
        steps: Of the training; with fewer steps than rounds some rounds have none.
        rounds: How many there are.
    """
    number = min(step, steps - 1) * rounds // steps
    start, end = (-(-index * steps // rounds) for index in (number, number + 1))
    return number, start, end


def adapt(
    method: Method,
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    *,
    precision: str = "float32",
) -> nn.Module:
    """Make the pruned model trainable by ``method``; ``model`` is changed in place.

    Args:
        method: The method.
        model: The pruned model, in the ``base`` format of the precision.
        batches: Training batches (input_ids, attention_mask, labels) for ``method.prepare``.
        seed: Seed of the initial values.
        precision: A key of ``PRECISIONS``.

    Returns:
        The wrapped model (or the model itself for a method without adapter); exactly what the method trains
        requires a gradient, and all of it has the ``trainable`` format.

    Raises:
        ValueError: The config does not fit the model (raised by PEFT or by the tuner).
        RuntimeError: Nothing is trainable, or an adapter method trains a weight of the base model.
    """
    adapted = wrap(method, model, seed, precision=precision)
    return prepare(method, adapted, batches, seed, precision=precision) if method.trains else adapted


def prepare(
    method: Method,
    adapted: nn.Module,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    *,
    precision: str = "float32",
) -> nn.Module:
    """The second half of `adapt`: ``method.prepare`` on what `wrap` has made."""
    device = next(adapted.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=PRECISIONS[precision].autocast):
        adapted = method.prepare(adapted, batches, seed)
    _check_freezing(method, adapted)
    if method.peft is None:  # what it trains is known only now
        _cast_trainable(adapted, PRECISIONS[precision].trainable)
    return adapted


def wrap(method: Method, model: PreTrainedModel, seed: int = 0, *, precision: str = "float32") -> nn.Module:
    """The first half of `adapt`: the frozen model with the PEFT tuner of the method, before ``method.prepare``."""
    model.requires_grad_(False)
    if not method.trains:
        return model
    torch.manual_seed(seed)
    if method.peft is None:
        return model
    # PEFT's default would make some adapters float32 and leave others in the format of the base weight.
    with experts_as_linears(model):
        adapted = get_peft_model(model, tuner_config(method, model), autocast_adapter_dtype=False)
    _cast_trainable(adapted, PRECISIONS[precision].trainable)
    return adapted


def tuner_config(method: Method, model: PreTrainedModel) -> PeftConfig:
    """The method's PEFT config for a model, a copy: ``all-linear`` is every linear layer of its decoder blocks.

    PEFT would take linear layers outside of the blocks too, which are not pruned.
    """
    config = copy.deepcopy(method.peft)
    if getattr(config, "target_modules", None) == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config.target_modules = set(decoder_linears(model))
    return config


def finish(
    method: Method,
    model: nn.Module,
    supports: Mapping[str, Tensor],
    variant: str,
    *,
    in_place: bool = False,
) -> PreTrainedModel:
    """Bring the trained model to one of the end states of the module's text.

    Args:
        method: The method that ``model`` was adapted by.
        model: The trained model.
        supports: M of every decoder linear before the fine-tuning, by the name of the un-wrapped module.
        variant: One of ``VARIANTS``.
        in_place: Merge into ``model`` itself, which is unusable afterwards. Saves one copy of the weights;
            meant for the last variant.

    Returns:
        For ``adapter`` the adapted model itself; otherwise a plain model without adapters, every weight in
        the dtype that it had before the fine-tuning.

    Raises:
        ValueError: Unknown variant, or a support without its linear.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}: must be one of {', '.join(VARIANTS)}")
    if variant == "adapter":
        if not isinstance(model, PeftModel):
            return model
        _round_saved_modules(model)
        return model.get_base_model()
    result = model if in_place else copy.deepcopy(model)
    if isinstance(result, PeftModel):
        result = _merge_in_float32(result)
    elif method.trains:
        # Without an adapter the trained weights themselves go back to the format of the model (bf16_mixed).
        result = result.to(_format_of(result))
    if variant == "remasked":
        _apply_supports(result, supports)
    return result.requires_grad_(False).eval()


def _cast_trainable(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _check_freezing(method: Method, model: nn.Module) -> None:
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise RuntimeError(f"method {method.name}: no parameter is trainable")
    if not isinstance(model, PeftModel):
        return
    frozen_by_contract = (".base_layer.weight", ".original_module.weight")
    wrong = [name for name in trainable if name.endswith(frozen_by_contract)]
    if wrong:
        raise RuntimeError(f"method {method.name}: trains {wrong[0]}, a weight of the base model that must stay frozen")


def _format_of(model: PreTrainedModel) -> torch.dtype:
    """The dtype that the model was loaded in; its parameters may since have been cast for the training."""
    dtype = model.config.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.get_default_dtype()


def _merge_in_float32(model: PeftModel) -> PreTrainedModel:
    """Merge layer by layer, so that at most one layer is alive in float32; the weights are rounded once."""
    untie_adapted(model.get_base_model())
    _round_saved_modules(model)
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        if isinstance(layer.get_base_layer(), CompressedLinear) and not isinstance(layer, SparseLinear):
            kind = f"{type(layer).__module__}.{type(layer).__name__}"
            raise ValueError(f"{kind} cannot be merged into a compressed weight: leave the adapter beside it")
        dtype = layer.get_base_layer().weight.dtype
        layer.float()
        layer.merge()
        layer.get_base_layer().to(dtype)
    plain = fuse_experts(model.unload())
    note_untied_head(plain)
    return plain


def _round_saved_modules(model: PeftModel) -> None:
    """Give what ``modules_to_save`` has trained the format of what it replaces: it is used without autocast."""
    for wrapper in [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]:
        original = next(wrapper.original_module.parameters(), None)
        if original is not None:
            wrapper.to(original.dtype)


@torch.no_grad()
def _apply_supports(model: nn.Module, supports: Mapping[str, Tensor]) -> None:
    linears = decoder_linears(model)
    for name, M in supports.items():
        if name not in linears:
            raise ValueError(f"supports: the model has no linear layer {name!r} in its decoder blocks")
        W = linears[name].weight
        W.mul_(M.to(W.device))
