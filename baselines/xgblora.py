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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import TrainerCallback, TrainerState

from harness.method import Method
from lors.checks import number, option, whole
from lors.functional import masked_linear, without_autocast
from lors.low_rank import LowRankConfig, LowRankLinear
from lors.placement import execution_device
from lors.plugin import register
from lors.randomness import generator_of
from lors.sparse_layer import active_layers, adapted_layers, layers_by_block
from lors.sparse_tuner import SparseTunerModel
from lors.sparsity import masked_merge

__all__ = [
    "Boosting",
    "XgbLoraConfig",
    "XgbLoraLinear",
    "XgbLoraMethod",
    "XgbLoraModel",
    "select",
    "steps_per_booster",
]

# With B = 0 at its start, a booster of one step could not move its A.
FEWEST_STEPS = 2


@dataclass
class XgbLoraConfig(LowRankConfig):
    """Configuration of XGBLoRA; a bad value raises ``ValueError``."""

    r: int = option(1, "Rank of a booster; 1 is the method.", whole(">= 1"))
    lora_alpha: float = option(2, "Numerator of the scale of a booster, s = lora_alpha / r.", number("> 0"))
    boosters: int = option(
        10,
        "T: the training is cut into at most so many boosters of equal length, at least 2 steps each.",
        whole(">= 1"),
    )
    drawn: int | None = option(
        None,
        "L_s, how many blocks a booster trains; None: a third of them, rounded up.",
        whole(">= 1", optional=True),
    )
    boosting_rate: float = option(
        1.0, "alpha_t, the share of a booster that is merged, of the last one too.", number("> 0")
    )
    penalty_weight: float = option(0.0, "lambda of the penalty lambda (|A|^2 + |B|^2).", number(">= 0"))
    seed: int = option(0, "Seed of the draws of blocks and of the starts of the boosters.", whole(">= 0"))


class XgbLoraLinear(LowRankLinear):
    """A linear layer with XGBLoRA adapters.

    ``xgblora_A[name]`` (r x in) and ``xgblora_B[name]`` (out x r) are the booster that is being trained,
    ``xgblora_merged_A[name]`` (T r x in) and ``xgblora_merged_B[name]`` (out x T r) those before it, in slots by their
    number, and ``at_work[name]`` says whether the present booster trains this layer; if it does not, its B is zero.
    """

    adapter_layer_names = ("xgblora_A", "xgblora_B")
    other_param_names = (*LowRankLinear.other_param_names, "xgblora_merged_A", "xgblora_merged_B", "at_work")

    sums_by_concatenation = False  # of the finished boosters there is a fixed number of slots
    _boosted: tuple[tuple, list[Tensor], Tensor] | None = None  # what W_t was made from, and W_t

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
        under_mask = [name for name in masked if self.at_work[name]]
        if under_mask:
            share = max(self.options[name].product_share for name in under_mask)
            y = masked_linear(x, weight, *self._stacked(under_mask), bias, gradient_share=share)
        else:
            y = linear(x, weight, bias)
        for name in names:
            if name not in masked and self.at_work[name]:
                y = y + self.branch(x, name).to(y.dtype)
            if name not in masked and masked:
                y = y + self._finished_branch(x, name).to(y.dtype)
        return y

    def expects_gradient(self, name: str) -> bool:
        """Whether the present booster trains this layer."""
        return self.at_work[name]

    def update(self, name: str, dtype: torch.dtype) -> Tensor:
        """s B A summed over all boosters, the present one included."""
        return super().update(name, dtype).add_(self._finished_update(name, dtype))

    @torch.no_grad()
    def boosted_weight(self, names: Sequence[str]) -> Tensor:
        """W_t: W_0 with all finished boosters of the adapters, in the type of W_0.

        It is zero exactly where W_0 is, if the adapters keep the zeros; either all of them do or none.
        """
        W = self.get_base_layer().weight
        slots = [part[name] for name in names for part in (self.xgblora_merged_A, self.xgblora_merged_B)]
        # Writes raise the version of a tensor, moves and copies of the model make another one.
        state = (*names, W.device, W.dtype, *(tensor._version for tensor in (W, *slots)))
        before, of, boosted = self._boosted or (None, [], None)
        if before != state or any(slot is not old for slot, old in zip(slots, of, strict=True)):
            with without_autocast(W.device.type):
                precise = W.to(torch.promote_types(W.dtype, torch.float32))
                delta = sum(self._finished_update(name, precise.dtype) for name in names)
                if self.options[names[0]].keep_zeros:
                    # A weight that boosters bring to zero stays in the support, which is read off W_t in training.
                    merged, least = masked_merge(W, delta), torch.finfo(W.dtype).tiny
                    boosted = merged.masked_fill_((merged == 0) & (W != 0), least)
                else:
                    boosted = (precise + delta).to(W.dtype)
            self._boosted = state, slots, boosted
        return boosted

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

    def _finished_update(self, name: str, dtype: torch.dtype) -> Tensor:
        """s B A summed over the finished boosters, without the mask, out x in."""
        A, B = self.xgblora_merged_A[name].to(dtype), self.xgblora_merged_B[name].to(dtype)
        return (B @ A).mul_(self.scaling[name])

    def _finished_branch(self, x: Tensor, name: str) -> Tensor:
        """s (X A^t) B^t of the finished boosters, in the type of the slots."""
        A, B = self.xgblora_merged_A[name], self.xgblora_merged_B[name]
        return linear(linear(x.to(A.dtype), A) * self.scaling[name], B)


def steps_per_booster(steps: int, boosters: int) -> int:
    """kappa: ``steps`` in at most ``boosters`` equal parts; the last one may be shorter. At least 2."""
    return max(FEWEST_STEPS, math.ceil(steps / boosters))


def select(model: nn.Module, number: int) -> list[XgbLoraLinear]:
    """Put booster ``number`` (from 0) to work: its layers, and they alone, get a gradient.

    Returns:
        Its layers, in the order of the model.
    """
    name, options, layers = _boosted_adapter(model)
    chosen = _drawn(options, layers, number)
    for layer in layers.values():
        layer.at_work[name] = layer in chosen
    return chosen


class Boosting(TrainerCallback):
    """Starts every booster before its first step, and merges it after its last one or where the training stops.

    All that it does follows from the number of the step, the length of the training and the slots, so it has no state,
    and a run that is resumed in the middle of a booster goes on with it. When a finished training is resumed, the
    Trainer may make a step too many; that one is dropped.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        """Refuse to lose the boosters of another training.

        Raises:
            ValueError: A slot that this training will need is taken.
        """
        name, options, layers = _boosted_adapter(model)
        number = _booster(state.global_step, state.max_steps, options)
        taken = any(layer.taken_slots(name)[number:].any() for layer in layers.values())
        if taken and state.global_step < state.max_steps:
            raise ValueError(
                f"adapter {name!r}: boosters of another training fill the slots from {number} on; this one needs them: "
                "resume that one with as many steps, or merge it (merge_and_unload) and train a new adapter"
            )

    def on_step_begin(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        **_: Any,
    ) -> None:
        name, options, layers = _boosted_adapter(model)
        before, number = (_booster(state.global_step - k, state.max_steps, options) for k in (1, 0))
        working = select(model, number)
        if number == before:
            return
        for index, layer in enumerate(working):
            layer.restart(name, generator_of(options.seed, number, index))
        for layer in layers.values():
            for factor in layer.factors(name):
                factor.grad = None  # zeros, which zero_grad may leave, would be enough for AdamW's weight decay
                if optimizer is not None:
                    optimizer.state.pop(factor, None)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        # The step has been counted. The Trainer evaluates and saves after this, and finds W_t.
        _name, options, _layers = _boosted_adapter(model)
        number, following = (_booster(state.global_step - k, state.max_steps, options) for k in (1, 0))
        if number != following or state.global_step >= state.max_steps:
            self._merge(model, number)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        _name, options, _layers = _boosted_adapter(model)
        self._merge(model, _booster(state.global_step - 1, state.max_steps, options))

    def _merge(self, model: nn.Module, number: int) -> None:
        """Merge the present booster in all layers, and let none of them be at work.

        Where it was not B is zero, unless the factors have come from another step, as those of the best model do.
        """
        name, _, layers = _boosted_adapter(model)
        for layer in layers.values():
            layer.merge_booster(name, number)
            layer.at_work[name] = False


class XgbLoraMethod(Method):
    """XGBLoRA in the harness."""

    def prepare(self, model: nn.Module, batches: Any, seed: int) -> nn.Module:
        """Booster 0 and every W_t, so that what is measured is any step, not the first one."""
        select(model, 0)
        name, _, layers = _boosted_adapter(model)
        for layer in layers.values():
            layer.boosted_weight([name])
        return model

    def callbacks(self) -> list[TrainerCallback]:
        """The boosting."""
        return [Boosting()]

    def penalty(self, model: nn.Module) -> Tensor | None:
        """lambda (|A|^2 + |B|^2) summed over the layers at work, a scalar."""
        name, options, layers = _boosted_adapter(model)
        if not options.penalty_weight:
            return None
        working = [layer for layer in layers.values() if layer.at_work[name]]
        norms = [factor.float().square().sum() for layer in working for factor in layer.factors(name)]
        return options.penalty_weight * torch.stack(norms).sum()

    def counts(self, model: nn.Module) -> dict[str, int]:
        """In place of the factors of all layers.

        ``trainable`` is what one booster trains (the first one), ``trained_over_run`` the parameters of all boosters,
        merged or under way, and ``adapter_bytes`` what is stored: factors and slots.
        """
        name, options, layers = _boosted_adapter(model)
        sizes, over_run, stored = {}, 0, 0
        for layer in layers.values():
            A, B = layer.factors(name)
            sizes[layer] = A.numel() + B.numel()
            over_run += sizes[layer] * int(layer.taken_slots(name).sum() + B.any())
            stored += sum(part.nbytes for part in (A, B, layer.xgblora_merged_A[name], layer.xgblora_merged_B[name]))
        trainable = sum(sizes[layer] for layer in _drawn(options, layers, 0))
        return {"trainable": trainable, "trained_over_run": over_run, "adapter_bytes": stored}


def _booster(step: int, steps: int, options: XgbLoraConfig) -> int:
    """Number of the booster that trains in step ``step`` (from 0) of ``steps``; that of the nearest step beyond."""
    return max(0, min(step, steps - 1)) // steps_per_booster(steps, options.boosters)


def _boosted_adapter(model: nn.Module) -> tuple[str, XgbLoraConfig, dict[str, XgbLoraLinear]]:
    """The adapter that is boosted, the first active one: its name, its config, and its layers by name, in order."""
    first, name = next(active_layers(model, XgbLoraLinear), (None, None))
    if first is None:
        raise ValueError("the model has no active XGBLoRA adapter")
    return name, first.options[name], adapted_layers(model, name)


def _drawn(options: XgbLoraConfig, layers: dict[str, XgbLoraLinear], number: int) -> list[XgbLoraLinear]:
    """The layers that booster ``number`` trains: they follow from the seed of the config and the number alone."""
    blocks = layers_by_block(layers)
    wanted = math.ceil(len(blocks) / 3) if options.drawn is None else options.drawn
    order = torch.randperm(len(blocks), generator=generator_of(options.seed, number)).tolist()
    chosen = {layer for index in order[:wanted] for layer in blocks[index]}
    return [layer for layer in layers.values() if layer in chosen]


class XgbLoraModel(SparseTunerModel):
    """A model with ``XgbLoraLinear`` layers; made by ``peft.get_peft_model`` from an ``XgbLoraConfig``."""

    tuner_layer_cls = XgbLoraLinear

    def _injected(self, adapter_name: str) -> None:
        """Refuse to draw more blocks than there are, besides what every tuner does."""
        super()._injected(adapter_name)
        drawn, blocks = self.peft_config[adapter_name].drawn, len(layers_by_block(self.adapted_layers(adapter_name)))
        if drawn is not None and drawn > blocks:
            raise ValueError(f"drawn={drawn}: must be at most {blocks}, the blocks with adapted layers")


register("XGBLORA", XgbLoraConfig, XgbLoraModel)
