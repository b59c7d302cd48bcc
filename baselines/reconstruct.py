"""Local reconstruction (arXiv 2510.14444): the blocks of a pruned model learn the outputs of the dense ones, in turn.

Block b has the pruned weights W_b (each out x in), the dense weights W0_b and the hidden states H_b (tokens x d) that
enter it. Its parameters theta_b alone are trained, on unlabelled text, for

    minimise over theta_b   mean (block_b(H_b; W_b + update(theta_b)) - block_b(H_b; W0_b))^2

the mean over all tokens that are no padding and all d units. There is no cross entropy, and no gradient leaves a block:
a step needs the activations, gradients and moments of one block. The blocks come in the order of the forward pass, each
with an equal share of the steps and with the whole schedule of the learning rate.

    inputs=sequential    H_b comes from the blocks before b as they are by then, pruned and adapted
    inputs=parallel      H_b comes from the dense blocks before b

Without a PEFT config theta_b is all parameters of the block, under masked Adam: zeros stay zero, as in
``baselines.full``. With one it is the factors of its adapters, such as those of LoRS.

H_b is computed anew in every step, by a pass without gradient through the blocks before b, so that no hidden states are
kept. The dense model stays on the host, where its weights are pages of their file; the device has a copy of its block
b, and of those before it for ``parallel``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from baselines.full import hold_zeros
from harness.method import Method, round_at
from lors.blocks import decoder_blocks
from lors.checks import one_of
from lors.pruning.block_calls import Call, hidden_of, in_place_of

__all__ = ["BlockAdamW", "NextBlock", "ReconstructMethod", "Teacher", "block_error", "block_inputs"]

log = logging.getLogger("lors")

INPUTS = ("sequential", "parallel")


def block_error(block: nn.Module, dense: nn.Module, hidden: Tensor, call: Call, mask: Tensor | None = None) -> Tensor:
    """The objective of one block, a scalar of at least float32; its gradient reaches the parameters of ``block`` alone.

    Args:
        block: The pruned block.
        dense: The same block with the dense weights.
        hidden: H_b, B x T x d.
        call: The other arguments of the block.
        mask: B x T, zero for padding; None: there is none.
    """
    args, kwargs = call
    with torch.no_grad():
        target = hidden_of(dense(hidden, *args, **kwargs))
    output = hidden_of(block(hidden.detach(), *args, **kwargs))
    precise = torch.promote_types(output.dtype, torch.float32)
    errors = (output.to(precise) - target.to(precise)).square().mean(-1)  # B x T
    return errors.mean() if mask is None else (errors * mask).sum() / mask.sum()


@torch.no_grad()
def block_inputs(
    model: PreTrainedModel, number: int, batch: Mapping[str, Tensor], instead: Mapping[int, nn.Module]
) -> tuple[Tensor, Call]:
    """What enters a block when the model gets a batch; nothing behind it is computed.

    Args:
        model: A model without PEFT's wrapper.
        number: Of the block.
        batch: ``input_ids`` and ``attention_mask``, B x T.
        instead: Blocks to run in place of those of the model, by number.

    Returns:
        H_b, B x T x d, and the other arguments of the block.
    """

    def run(i: int, forward: Any, hidden: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        if i == number:
            raise _Reached(hidden, (args, kwargs))
        return instead.get(i, forward)(hidden, *args, **kwargs)

    with in_place_of(decoder_blocks(model)[1], run):
        try:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        except _Reached as reached:
            return reached.hidden, reached.call
    raise ValueError(f"{type(model).__name__} does not call its block {number}")


class _Reached(Exception):  # noqa: N818 - no error: the way out of the forward pass
    def __init__(self, hidden: Tensor, call: Call) -> None:
        self.hidden, self.call = hidden, call


class Teacher:
    """The dense blocks, and which block is at work.

    Attributes:
        number: Of the block at work.
        held: Copies of dense blocks that are on the device of the model, by number.
    """

    def __init__(self, dense: nn.ModuleList, parallel: bool) -> None:
        self.number = -1
        self.held: dict[int, nn.Module] = {}
        self._dense, self._parallel = dense, parallel

    def go_to(self, number: int, model: PreTrainedModel) -> None:
        """Put a block of the model to work."""
        if number == self.number:
            return
        device = next(model.parameters()).device
        needed = range(number + 1) if self._parallel else [number]
        kept = {i: block for i, block in self.held.items() if i in needed}
        made = {i: copy.deepcopy(self._dense[i]).to(device) for i in needed if i not in kept}
        self.number, self.held = number, kept | made
        # Where the report of the memory finds them; a module would be trained and saved with the model.
        model.teacher_weights = [parameter for block in self.held.values() for parameter in block.parameters()]

    def error(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """`block_error` of the block at work."""
        dense = self.held[self.number]
        before = {i: block for i, block in self.held.items() if i < self.number}
        hidden, call = block_inputs(model, self.number, batch, before)
        block = decoder_blocks(model)[1][self.number]
        return block_error(block, dense, hidden, call, batch["attention_mask"])


class BlockAdamW(torch.optim.AdamW):
    """AdamW that has state for the block at work alone, and forgets that of others.

    Args:
        model: A model with a `Teacher`.
        **options: Of AdamW, in place of the parameters.
    """

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        self._teacher: Teacher = model.teacher
        self._blocks = [
            [parameter for parameter in block.parameters() if parameter.requires_grad]
            for block in decoder_blocks(model)[1]
        ]
        super().__init__([parameter for block in self._blocks for parameter in block], **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of AdamW for the block at work."""
        for number, parameters in enumerate(self._blocks):
            if number != self._teacher.number:
                for parameter in parameters:
                    parameter.grad = None
                    self.state.pop(parameter, None)
        return super().step(closure)


class NextBlock(TrainerCallback):
    """Puts the block of each step to work. It follows from the number of the step, so a killed run goes on there."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        depth = len(decoder_blocks(model)[1])
        if state.max_steps < depth:
            log.warning("%d steps for %d blocks: not every block is reconstructed", state.max_steps, depth)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        number, _, _ = round_at(state.global_step, state.max_steps, len(decoder_blocks(model)[1]))
        plain = _without_wrapper(model)
        plain.teacher.go_to(number, plain)


class ReconstructMethod(Method):
    """Local reconstruction in the harness.

    Args:
        inputs: ``sequential``: a block gets what the adapted blocks before it give; ``parallel``: what dense ones give.

    Raises:
        ValueError: A value that is not allowed.
    """

    reads_dense = True

    def __init__(self, name: str, peft: PeftConfig | None = None, *, inputs: str = "sequential", **common: Any) -> None:
        super().__init__(name, peft, **common)
        one_of(*INPUTS)("inputs", inputs)
        self.inputs = inputs

    def prepare(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None, seed: int) -> nn.Module:
        """Un-freeze the blocks, unless they have adapters, and hand the model its teacher.

        Where there is no dense model (profile, simulation) the blocks as they are stand in for it: same cost, no error.
        The middle one is at work, so that what is measured is a step of mean cost.

        Raises:
            ValueError: A block has nothing to train.
        """
        plain = _without_wrapper(model)
        name, blocks = decoder_blocks(plain)
        dense = _without_adapters(blocks) if self.dense is None else decoder_blocks(self.dense)[1]
        dense = dense.requires_grad_(False).eval()
        if self.peft is None:
            blocks.requires_grad_(True)
            hold_zeros(plain)
        elif (watching := getattr(model.base_model, "_first_backward", None)) is not None:
            watching.stop()  # it would name the blocks that are not at work
        for number, block in enumerate(blocks):
            if not any(parameter.requires_grad for parameter in block.parameters()):
                raise ValueError(f"target_modules={self.peft.target_modules}: {name}.{number} has nothing to train")
        plain.teacher = Teacher(dense, self.inputs == "parallel")
        plain.teacher.go_to(len(blocks) // 2, plain)
        return model

    def optimizer(self, model: nn.Module, train_cfg: Any) -> BlockAdamW:
        """One group, for one block at a time."""
        return BlockAdamW(
            _without_wrapper(model),
            lr=train_cfg.learning_rate,
            betas=tuple(train_cfg.betas),
            weight_decay=train_cfg.weight_decay,
        )

    def callbacks(self) -> list[TrainerCallback]:
        """The walk from block to block, besides those of every method."""
        return [*super().callbacks(), NextBlock()]

    def objective(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The error of the block at work."""
        plain = _without_wrapper(model)
        return plain.teacher.error(plain, batch)

    def rounds(self, model: nn.Module) -> int:
        """One for each block."""
        return len(decoder_blocks(model)[1])


def _without_adapters(blocks: nn.ModuleList) -> nn.ModuleList:
    """A copy of the blocks as they were before PEFT has wrapped them."""
    copied = copy.deepcopy(blocks)
    for name, part in list(copied.named_modules()):
        if isinstance(part, BaseTunerLayer):
            parent, _, own = name.rpartition(".")
            setattr(copied.get_submodule(parent), own, part.get_base_layer())
    return copied


def _without_wrapper(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model
