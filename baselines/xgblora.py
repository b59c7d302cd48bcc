"""XGBLoRA (arXiv 2410.19694), gradient boosting with rank-1 adapters, as a PEFT tuner.

T boosters of kappa steps each, K = T kappa. A booster is a LoRA of rank 1, A (1 x in), B (out x 1), on the linears of
L_s of the L blocks, drawn anew for each booster; everything else is frozen. Then it becomes part of the weight:

    W_t = W_(t-1) + alpha_t s B A,        A Kaiming uniform, B zero at its start, s = alpha / r, alpha_t = 1

and the next booster starts with fresh factors and fresh moments of AdamW, under the one learning-rate schedule. The
gradient at the merged model is the residual that it fits. A linear that is not drawn is one product with W_t.
On a pruned weight W_0, M = (W_0 != 0), a booster is s M (.) (B A), while it is trained and in the sum, unless
``keep_zeros=False``.

What has been merged is exact. A booster is far smaller than W, and added to a bfloat16 weight most of it is lost. So
all boosters are kept, in float32 and in slots of fixed shape, A (T x in) and B (out x T), zero where a booster left the
layer out, and W_t is always made from W_0 and all of them: float32 arithmetic, one rounding. W_0 is never changed; W_t
is a second copy, made again from the slots whenever they have changed, and never saved.

    Trainer(model, optimizers=(all_factors_adamw(model, recipe), None), callbacks=[Boosting()])
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
from lors.harness.randomness import generator_of
from lors.low_rank import LowRankConfig, LowRankLinear
from lors.plugin import register
from lors.sparse_tuner import SparseTunerModel, check_choice
from lors.sparsity import masked_merge

__all__ = [
    "Boosting",
    "XgbLoraConfig",
    "XgbLoraLinear",
    "XgbLoraModel",
    "all_factors_adamw",
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
    ``xgblora_merged_A[name]`` (T r x in) and ``xgblora_merged_B[name]`` (out x T r) those before it, and
    ``at_work[name]`` says whether the present booster trains this layer; if it does not, its B is zero.
    """

    adapter_layer_names = ("xgblora_A", "xgblora_B")
    other_param_names = (*LowRankLinear.other_param_names, "xgblora_merged_A", "xgblora_merged_B", "at_work")

    _boosted: tuple[tuple, Tensor] | None = None  # W_t, and what it was made from

    def update_layer(self, adapter_name: str, config: XgbLoraConfig, r: int, scaling: float) -> None:
        """Add an adapter without boosters, all of whose layers are at work."""
        if not hasattr(self, "at_work"):
            self.xgblora_merged_A, self.xgblora_merged_B = BufferDict(persistent=True), BufferDict(persistent=True)
            self.at_work: dict[str, bool] = {}
        self.at_work[adapter_name] = True
        super().update_layer(adapter_name, config, r, scaling)
        # After the factors have got the type of W: the slots are float32 whatever that is.
        slots, device = config.boosters * r, self.get_base_layer().weight.device
        self.xgblora_merged_A[adapter_name] = torch.zeros(slots, self.in_features, device=device)
        self.xgblora_merged_B[adapter_name] = torch.zeros(self.out_features, slots, device=device)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The low-rank layer on W_t; without its branch where no booster is at work."""
        weight, bias = self.boosted_weight(names), self.get_base_layer().bias
        working = [name for name in names if self.at_work[name]]
        if not working:
            return linear(x, weight, bias)
        A, B, scaling = self._stacked(working)
        if self._keep_zeros(names):
            exact = any(self.options[name].exact_gradient for name in working)
            return masked_linear(x, weight, A, B, scaling, bias, exact_gradient=exact)
        y = linear(x, weight, bias)
        for name in working:
            y = torch.add(y, self._branch(x, name).to(y.dtype), alpha=self.scaling[name])
        return y

    def delta_weight(self, weight: Tensor, name: str) -> Tensor:
        """s M (.) (B A) summed over all boosters, the present one included."""
        A, B = self.factors(name)
        delta = self._merged_delta(weight, name) + self.scaling[name] * (B.to(weight.dtype) @ A.to(weight.dtype))
        return delta.mul_(weight != 0) if self.options[name].keep_zeros else delta

    @torch.no_grad()
    def boosted_weight(self, names: Sequence[str]) -> Tensor:
        """W_t: W_0 with all finished boosters of the adapters, in the type of W_0; zero exactly where W_0 is."""
        W = self.get_base_layer().weight
        slots = [part[name] for name in names for part in (self.xgblora_merged_A, self.xgblora_merged_B)]
        # Writes raise the version of a tensor, moves and copies of the model make another one.
        state = (*names, W.device, W.dtype, W._version, *((slot, slot._version) for slot in slots))
        if self._boosted is None or not _same(self._boosted[0], state):
            with torch.autocast(W.device.type, enabled=False):
                precise = W.to(torch.promote_types(W.dtype, torch.float32))
                delta = sum(self._merged_delta(precise, name) for name in names)
                if self._keep_zeros(names):
                    # A weight that boosters bring to zero stays in the support, which is read off W_t in training.
                    merged, least = masked_merge(W, delta), torch.finfo(W.dtype).tiny
                    boosted = merged.masked_fill_((merged == 0) & (W != 0), least)
                else:
                    boosted = (precise + delta).to(W.dtype)
            self._boosted = state, boosted
        return self._boosted[1]

    @torch.no_grad()
    def merge_booster(self, name: str, number: int) -> None:
        """Put the present booster into the slot ``number``; its B becomes zero, so it cannot count twice."""
        A, B = self.factors(name)
        slot = slice(number * self.r[name], (number + 1) * self.r[name])
        self.xgblora_merged_A[name][slot].copy_(A)
        self.xgblora_merged_B[name][:, slot].copy_(B * self.options[name].boosting_rate)
        B.zero_()

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

    def _keep_zeros(self, names: Sequence[str]) -> bool:
        return all(self.options[name].keep_zeros for name in names)


class XgbLoraModel(SparseTunerModel):
    """A model with ``XgbLoraLinear`` layers; made by ``peft.get_peft_model`` from an ``XgbLoraConfig``."""

    prefix = "xgblora_"
    tuner_layer_cls = XgbLoraLinear


def steps_per_booster(steps: int, boosters: int) -> int:
    """kappa: ``steps`` in at most ``boosters`` equal parts; the last one may be shorter. At least 2."""
    return max(FEWEST_STEPS, math.ceil(steps / boosters))


def select(model: nn.Module, number: int) -> list[XgbLoraLinear]:
    """Put booster ``number`` (from 0) to work: its layers, and they alone, get a gradient.

    Which units it trains follows from the seed of the config and the number alone.

    Returns:
        Its layers, in the order of the model.

    Raises:
        ValueError: More units are to be drawn than there are.
    """
    layers = _layers(model)
    name, options = _adapter(next(iter(layers.values())))
    units: dict[str, list[XgbLoraLinear]] = {}
    for key, layer in layers.items():
        units.setdefault(_unit(key, options.unit), []).append(layer)
    wanted = math.ceil(len(units) / 3) if options.drawn is None else options.drawn
    if wanted > len(units):
        raise ValueError(f"drawn={wanted}: the model has {len(units)} units of the kind unit={options.unit!r}")
    order = torch.randperm(len(units), generator=generator_of(options.seed, number)).tolist()
    groups = list(units.values())
    chosen = {id(layer) for index in order[:wanted] for layer in groups[index]}
    for layer in layers.values():
        layer.at_work[name] = id(layer) in chosen
        for factor in layer.factors(name):
            factor.requires_grad_(layer.at_work[name])
    return [layer for layer in layers.values() if layer.at_work[name]]


def first_booster(model: nn.Module, batches: Iterable[Mapping[str, Tensor]] = (), seed: int = 0) -> nn.Module:
    """``Method.prepare`` of XGBLoRA: booster 0 and every W_t, so that what is measured is any step, not the first one.

    Args:
        model: A model wrapped by ``XgbLoraModel``.
        batches: Not read.
        seed: Not used: the draw has the seed of the config.
    """
    select(model, 0)
    for layer in _layers(model).values():
        layer.boosted_weight(layer.active_adapters)
    return model


class Boosting(TrainerCallback):
    """Merges a booster and starts the next one, before the first step of each.

    All that it does follows from the step's number and the length of the training, so it has no state, and a run
    that is resumed in the middle of a booster goes on with it.
    """

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        **_: Any,
    ) -> None:
        name, options = _adapter(next(iter(_layers(model).values())))
        number, step = divmod(state.global_step, steps_per_booster(state.max_steps, options.boosters))
        if step == 0 and number > 0:
            for layer in select(model, number - 1):
                layer.merge_booster(name, number - 1)
        working = select(model, number)
        if step == 0 and number > 0:
            for index, layer in enumerate(working):
                layer.restart(name, generator_of(options.seed, number, index))
            for layer in _layers(model).values() if optimizer is not None else ():
                for factor in layer.factors(name):
                    optimizer.state.pop(factor, None)


def all_factors_adamw(model: nn.Module, train_cfg: Any) -> torch.optim.AdamW:
    """``Method.optimizer`` of XGBLoRA: AdamW over the factors of all layers, at work or not.

    Those that are not have no gradient and no moments.

    Args:
        model: A model wrapped by ``XgbLoraModel``.
        train_cfg: ``learning_rate``, ``betas``, ``weight_decay``.
    """
    factors = {id(factor) for layer in _layers(model).values() for factor in layer.factors(_adapter(layer)[0])}
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad or id(parameter) in factors],
        lr=train_cfg.learning_rate,
        betas=tuple(train_cfg.betas),
        weight_decay=train_cfg.weight_decay,
    )


def factor_penalty(model: nn.Module) -> Tensor:
    """``Method.penalty`` of XGBLoRA: lambda (|A|^2 + |B|^2) summed over the layers at work, a scalar."""
    layers = list(_layers(model).values())
    name, options = _adapter(layers[0])
    total = torch.zeros((), device=layers[0].weight.device)
    if not options.penalty_weight:
        return total
    for layer in layers:
        if layer.at_work[name]:
            total = total + sum(factor.float().square().sum() for factor in layer.factors(name))
    return options.penalty_weight * total


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """``Method.counts`` of XGBLoRA: ``trained_over_run``, the numbers in all boosters, finished and present."""
    total = 0
    for layer in _layers(model).values():
        name, options = _adapter(layer)
        slots = layer.xgblora_merged_B[name].unflatten(1, (options.boosters, layer.r[name]))  # out x T x r
        boosters = int((slots != 0).any(dim=2).any(dim=0).sum()) + layer.at_work[name]
        total += boosters * layer.r[name] * (layer.in_features + layer.out_features)
    return {"trained_over_run": total}


def _layers(model: nn.Module) -> dict[str, XgbLoraLinear]:
    """The layers with an active adapter, by name in the order of the model."""
    layers = {key: part for key, part in model.named_modules() if isinstance(part, XgbLoraLinear)}
    layers = {key: layer for key, layer in layers.items() if layer._own(layer.active_adapters)}
    if not layers:
        raise ValueError("the model has no active XGBLoRA adapter")
    return layers


def _adapter(layer: XgbLoraLinear) -> tuple[str, XgbLoraConfig]:
    """Name and config of the adapter that is boosted, the first active one."""
    name = layer._own(layer.active_adapters)[0]
    return name, layer.options[name]


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
