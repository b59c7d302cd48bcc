"""XGBLoRA (arXiv 2410.19694), gradient boosting with rank-1 adapters, as a PEFT tuner.

T boosters of kappa steps each, K = T kappa. A booster is a LoRA of rank 1, A (1 x in), B (out x 1), on the linears of
L_s of the L blocks, drawn anew for each booster; everything else stands still. After its last step it becomes part of
the weight, the last booster too:

    W_t = W_(t-1) + alpha_t s B A,        A Kaiming uniform, B zero at its start, s = alpha / r, alpha_t = 1

and the next booster starts with fresh factors and fresh moments of AdamW, under the one learning-rate schedule. The
gradient at the merged model is the residual that it fits. A linear that is not drawn is one product with W_t.
On a pruned weight W_0, M = (W_0 != 0), a booster is s M (.) (B A), while it is trained and in the sum, unless
``keep_zeros=False``.

What has been merged is exact. A booster is far smaller than W, and added to a bfloat16 weight most of it is lost. So
all boosters are kept, in float32 and in slots of fixed shape, A (T x in) and B (out x T), zero where a booster left the
layer out, and W_t is always made from W_0 and all of them: float32 arithmetic, one rounding. W_0 is never changed; W_t
is a second copy, made again from the slots whenever they have changed, and never saved.

The factors of all layers are parameters of the optimizer throughout, as data-parallel training needs it. Those that
are not drawn take no part in the forward pass, so they have no gradient, and an optimizer leaves them alone.

    Trainer(model, callbacks=[Boosting()])
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lors.functional import masked_linear
from lors.low_rank import LowRankConfig, LowRankLinear
from lors.placement import execution_device
from lors.plugin import register
from lors.randomness import generator_of
from lors.sparse_config import check_choice
from lors.sparse_tuner import SparseTunerModel, active_layers
from lors.sparsity import masked_merge

__all__ = [
    "Boosting",
    "XgbLoraConfig",
    "XgbLoraLinear",
    "XgbLoraModel",
    "factor_penalty",
    "first_booster",
    "parameter_counts",
    "select",
    "steps_per_booster",
]

UNITS = ("block", "matrix")
# With B = 0 at its start, a booster of one step could not move its A.
FEWEST_STEPS = 2


@dataclass
class XgbLoraConfig(LowRankConfig):
    """Configuration of XGBLoRA; a bad value raises ``ValueError``."""

    r: int = field(default=1, metadata={"help": "Rank of a booster; 1 is the method."})
    boosters: int = field(
        default=10, metadata={"help": "T: the training is cut into at most so many boosters of equal length."}
    )
    unit: str = field(
        default="block", metadata={"help": "What is drawn for a booster: 'block' (all its linears) or 'matrix'."}
    )
    drawn: int | None = field(
        default=None, metadata={"help": "L_s, how many units a booster trains; None: a third of them, rounded up."}
    )
    boosting_rate: float = field(default=1.0, metadata={"help": "alpha_t, the share of a booster that is merged."})
    penalty_weight: float = field(default=0.0, metadata={"help": "lambda of the penalty lambda (|A|^2 + |B|^2)."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws of units and of the starts of the boosters."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = XGBLORA
        check_choice("unit", self.unit, UNITS)
        for name, value, least in (
            ("boosters", self.boosters, 1),
            ("drawn", 1 if self.drawn is None else self.drawn, 1),
            ("seed", self.seed, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: must be a whole number >= {least}")
        if not self.boosting_rate > 0:
            raise ValueError(f"boosting_rate={self.boosting_rate!r}: must be a number > 0")
        if not self.penalty_weight >= 0:
            raise ValueError(f"penalty_weight={self.penalty_weight!r}: must be a number >= 0")


class XgbLoraLinear(LowRankLinear):
    """A linear layer with XGBLoRA adapters.

    ``xgblora_A[name]`` (r x in) and ``xgblora_B[name]`` (out x r) are the booster that is being trained,
    ``xgblora_merged_A[name]`` (T r x in) and ``xgblora_merged_B[name]`` (out x T r) those before it, in slots by their
    number, and ``at_work[name]`` says whether the present booster trains this layer; if it does not, its B is zero.
    """

    adapter_layer_names = ("xgblora_A", "xgblora_B")
    other_param_names = (*LowRankLinear.other_param_names, "xgblora_merged_A", "xgblora_merged_B", "at_work")

    sums_by_concatenation = False  # of the finished boosters there is a fixed number of slots
    _boosted: tuple[tuple, Tensor] | None = None  # W_t, and what it was made from

    def update_layer(self, adapter_name: str, config: XgbLoraConfig, r: int, scaling: float) -> None:
        """Add an adapter without boosters, all of whose layers are at work."""
        if not hasattr(self, "at_work"):
            self.xgblora_merged_A, self.xgblora_merged_B = BufferDict(persistent=True), BufferDict(persistent=True)
            self.at_work: dict[str, bool] = {}
        self.at_work[adapter_name] = True
        super().update_layer(adapter_name, config, r, scaling)
        # After the factors have got the type of W: the slots are float32 whatever that is.
        base, slots = self.get_base_layer(), config.boosters * r
        device = execution_device(base) or base.weight.device
        self.xgblora_merged_A[adapter_name] = torch.zeros(slots, self.in_features, device=device)
        self.xgblora_merged_B[adapter_name] = torch.zeros(self.out_features, slots, device=device)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The low-rank layer on W_t; without its branch where no booster is at work.

        Beside adapters that keep the zeros, the boosters of one that does not are branches, the finished ones too: the
        mask is read off W_t.
        """
        masked = [name for name in names if self.options[name].keep_zeros]
        weight, bias = self.boosted_weight(masked or names), self.get_base_layer().bias
        working = [name for name in names if self.at_work[name]]
        under_mask = [name for name in working if name in masked]
        if under_mask:
            exact = any(self.options[name].exact_gradient for name in under_mask)
            y = masked_linear(x, weight, *self._stacked(under_mask), bias, exact_gradient=exact)
        else:
            y = linear(x, weight, bias)
        for name in working:
            if name not in masked:
                y = y + self.branch(x, name).to(y.dtype)
        for name in names if masked else ():
            if name not in masked:
                y = y + self._finished_branch(x, name).to(y.dtype)
        return y

    def expects_gradient(self, name: str) -> bool:
        """Whether the present booster trains this layer."""
        return self.at_work[name]

    def delta_weight(self, weight: Tensor, name: str) -> Tensor:
        """s M (.) (B A) summed over all boosters, the present one included."""
        A, B = self.factors(name)
        delta = self._merged_delta(weight, name) + self.scaling[name] * (B.to(weight.dtype) @ A.to(weight.dtype))
        return delta.mul_(weight != 0) if self.options[name].keep_zeros else delta

    @torch.no_grad()
    def boosted_weight(self, names: Sequence[str]) -> Tensor:
        """W_t: W_0 with all finished boosters of the adapters, in the type of W_0.

        It is zero exactly where W_0 is, if the adapters keep the zeros; either all of them do or none.
        """
        W = self.get_base_layer().weight
        slots = [part[name] for name in names for part in (self.xgblora_merged_A, self.xgblora_merged_B)]
        # Writes raise the version of a tensor, moves and copies of the model make another one.
        state = (*names, W.device, W.dtype, W._version, *((slot, slot._version) for slot in slots))
        if self._boosted is None or not _same(self._boosted[0], state):
            with torch.autocast(W.device.type, enabled=False):
                precise = W.to(torch.promote_types(W.dtype, torch.float32))
                delta = sum(self._merged_delta(precise, name) for name in names)
                if self.options[names[0]].keep_zeros:
                    # A weight that boosters bring to zero stays in the support, which is read off W_t in training.
                    merged, least = masked_merge(W, delta), torch.finfo(W.dtype).tiny
                    boosted = merged.masked_fill_((merged == 0) & (W != 0), least)
                else:
                    boosted = (precise + delta).to(W.dtype)
            self._boosted = state, boosted
        return self._boosted[1]

    @torch.no_grad()
    def merge_booster(self, name: str, number: int) -> None:
        """Put the present booster, times alpha_t, into the slot ``number``; B becomes zero, so it cannot count twice.

        A slot that is taken stays as it is.
        """
        A, B = self.factors(name)
        merged_A, merged_B = self.xgblora_merged_A[name], self.xgblora_merged_B[name]
        if B.any() and not self.taken_slots(name)[number]:
            slot = slice(number * self.r[name], (number + 1) * self.r[name])
            merged_A[slot].copy_(A)
            merged_B[:, slot].copy_(B.to(merged_B.dtype) * self.options[name].boosting_rate)
        B.zero_()

    def taken_slots(self, name: str) -> Tensor:
        """Boolean T: the slots that hold a booster."""
        slots = self.xgblora_merged_B[name].unflatten(1, (self.options[name].boosters, self.r[name]))  # out x T x r
        return (slots != 0).any(dim=2).any(dim=0)

    @torch.no_grad()
    def restart(self, name: str, generator: torch.Generator) -> None:
        """Fresh factors: A Kaiming uniform from ``generator`` (of the CPU), B zero."""
        A, B = self.factors(name)
        bound = 1 / math.sqrt(self.in_features)
        A.copy_((2 * torch.rand(A.shape, generator=generator) - 1) * bound)
        B.zero_()

    def _merged_delta(self, weight: Tensor, name: str) -> Tensor:
        """s B A summed over the finished boosters, without the mask, out x in in the type of ``weight``."""
        A, B = self.xgblora_merged_A[name].to(weight.dtype), self.xgblora_merged_B[name].to(weight.dtype)
        return (B @ A).mul_(self.scaling[name])

    def _finished_branch(self, x: Tensor, name: str) -> Tensor:
        """s (X A^t) B^t of the finished boosters, in the type of the slots."""
        A, B = self.xgblora_merged_A[name], self.xgblora_merged_B[name]
        return linear(linear(x.to(A.dtype), A) * self.scaling[name], B)


class XgbLoraModel(SparseTunerModel):
    """A model with ``XgbLoraLinear`` layers; made by ``peft.get_peft_model`` from an ``XgbLoraConfig``."""

    prefix = "xgblora_"
    tuner_layer_cls = XgbLoraLinear


def steps_per_booster(steps: int, boosters: int) -> int:
    """kappa: ``steps`` in at most ``boosters`` equal parts; the last one may be shorter. At least 2."""
    return max(FEWEST_STEPS, math.ceil(steps / boosters))


def select(model: nn.Module, number: int) -> list[XgbLoraLinear]:
    """Put booster ``number`` (from 0) to work: its layers, and they alone, get a gradient.

    Returns:
        Its layers, in the order of the model.

    Raises:
        ValueError: More units are to be drawn than there are.
    """
    name, _ = _adapter(model)
    chosen = _drawn(model, number)
    for layer in _layers(model).values():
        layer.at_work[name] = layer in chosen
    return chosen


def first_booster(model: nn.Module, batches: Iterable[Mapping[str, Tensor]] = (), seed: int = 0) -> nn.Module:
    """``Method.prepare`` of XGBLoRA: booster 0 and every W_t, so that what is measured is any step, not the first one.

    Args:
        model: A model wrapped by ``XgbLoraModel``.
        batches: Not read.
        seed: Not used: the draw has the seed of the config.
    """
    name, _ = _adapter(model)
    select(model, 0)
    for layer in _layers(model).values():
        layer.boosted_weight([name])
    return model


class Boosting(TrainerCallback):
    """Starts every booster before its first step, and merges it after its last one or where the training stops.

    All that it does follows from the number of the step, the length of the training and the slots, so it has no state,
    and a run that is resumed in the middle of a booster goes on with it. When a finished training is resumed, the
    Trainer may make a step too many; that one is dropped.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Refuse to lose the boosters of another training.

        Raises:
            ValueError: A slot that this training will need is taken.
        """
        name, options = _adapter(model)
        number = _booster(state.global_step, state.max_steps, options)
        taken = any(layer.taken_slots(name)[number:].any() for layer in _layers(model).values())
        if taken and state.global_step < state.max_steps:
            raise ValueError(
                f"adapter {name!r}: boosters of another training fill the slots from {number} on; this one needs them: "
                "resume that one with as many steps, or merge it (merge_and_unload) and train a new adapter"
            )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        **_: Any,
    ) -> None:
        name, options = _adapter(model)
        before, number = (_booster(state.global_step - k, state.max_steps, options) for k in (1, 0))
        working = select(model, number)
        if number == before:
            return
        for index, layer in enumerate(working):
            layer.restart(name, generator_of(options.seed, number, index))
        for layer in _layers(model).values():
            for factor in layer.factors(name):
                factor.grad = None  # zeros, which zero_grad may leave, would be enough for AdamW's weight decay
                if optimizer is not None:
                    optimizer.state.pop(factor, None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        # The step has been counted. The Trainer evaluates and saves after this, and finds W_t.
        _, options = _adapter(model)
        number, following = (_booster(state.global_step - k, state.max_steps, options) for k in (1, 0))
        if number != following or state.global_step >= state.max_steps:
            _merge(model, number)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        _, options = _adapter(model)
        _merge(model, _booster(state.global_step - 1, state.max_steps, options))


def factor_penalty(model: nn.Module) -> Tensor:
    """``Method.penalty`` of XGBLoRA: lambda (|A|^2 + |B|^2) summed over the layers at work, a scalar."""
    name, options = _adapter(model)
    layers = list(_layers(model).values())
    total = torch.zeros((), device=layers[0].weight.device)
    if not options.penalty_weight:
        return total
    for layer in layers:
        if layer.at_work[name]:
            total = total + sum(factor.float().square().sum() for factor in layer.factors(name))
    return options.penalty_weight * total


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """``Method.counts`` of XGBLoRA, in place of the factors of all layers.

    ``trainable`` is what one booster trains (the first one), ``trained_over_run`` the numbers in all boosters, merged
    or under way, and ``adapter_bytes`` what is stored: factors and slots.
    """
    name, _ = _adapter(model)
    sizes, over_run, stored = {}, 0, 0
    for layer in _layers(model).values():
        A, B = layer.factors(name)
        sizes[layer] = A.numel() + B.numel()
        over_run += sizes[layer] * int(layer.taken_slots(name).sum() + B.any())
        stored += sum(part.nbytes for part in (A, B, layer.xgblora_merged_A[name], layer.xgblora_merged_B[name]))
    trainable = sum(sizes[layer] for layer in _drawn(model, 0))
    return {"trainable": trainable, "trained_over_run": over_run, "adapter_bytes": stored}


def _booster(step: int, steps: int, options: XgbLoraConfig) -> int:
    """Number of the booster that trains in step ``step`` (from 0) of ``steps``; that of the nearest step beyond."""
    return max(0, min(step, steps - 1)) // steps_per_booster(steps, options.boosters)


def _merge(model: nn.Module, number: int) -> None:
    """Merge the present booster in all layers, and let none of them be at work.

    Where it was not B is zero, unless the factors have come from another step, as those of the best model do.
    """
    name, _ = _adapter(model)
    for layer in _layers(model).values():
        layer.merge_booster(name, number)
        layer.at_work[name] = False


def _drawn(model: nn.Module, number: int) -> list[XgbLoraLinear]:
    """The layers that booster ``number`` trains: they follow from the seed of the config and the number alone."""
    layers = _layers(model)
    _, options = _adapter(model)
    units: dict[str, list[XgbLoraLinear]] = {}
    for key, layer in layers.items():
        units.setdefault(_unit(key, options.unit), []).append(layer)
    wanted = math.ceil(len(units) / 3) if options.drawn is None else options.drawn
    if wanted > len(units):
        raise ValueError(f"drawn={wanted}: the model has {len(units)} units of the kind unit={options.unit!r}")
    order = torch.randperm(len(units), generator=generator_of(options.seed, number)).tolist()
    groups = list(units.values())
    chosen = {layer for index in order[:wanted] for layer in groups[index]}
    return [layer for layer in layers.values() if layer in chosen]


def _adapter(model: nn.Module) -> tuple[str, XgbLoraConfig]:
    """Name and config of the adapter that is boosted, the first active one."""
    for layer, name in active_layers(model, XgbLoraLinear):
        return name, layer.options[name]
    raise ValueError("the model has no active XGBLoRA adapter")


def _layers(model: nn.Module) -> dict[str, XgbLoraLinear]:
    """The layers with the adapter that is boosted, by name in the order of the model."""
    name, _ = _adapter(model)
    layers = {key: part for key, part in model.named_modules() if isinstance(part, XgbLoraLinear)}
    return {key: layer for key, layer in layers.items() if name in layer.r}


def _unit(key: str, unit: str) -> str:
    """The unit that a layer belongs to: the name of its block, up to the first number in it, or its own."""
    block = re.match(r".*?\.\d+(?=\.)", key)
    return key if unit == "matrix" or block is None else block[0]


def _same(left: tuple, right: tuple) -> bool:
    """Whether two states are equal, tensors in them by identity."""
    if len(left) != len(right):
        return False
    pairs = zip(left, right, strict=True)
    return all(a[0] is b[0] and a[1] == b[1] if isinstance(a, tuple) else a == b for a, b in pairs)


XGBLORA = register("XGBLORA", XgbLoraConfig, XgbLoraModel, prefix=XgbLoraModel.prefix)
