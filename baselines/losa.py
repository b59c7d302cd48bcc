"""LoSA, dynamic low-rank sparse adaptation (arXiv 2502.14816): the zeros come in rounds, while the adapter learns.

A training starts from the dense weights. Before round t = 1 ... T the model as it is by then, merged, is pruned by
Wanda to a sparsity that grows to S, each block to its own,

    S_t = S - S (1 - t / T)^3                   and S_tl of block l around it by RMI (``lors.pruning.rmi``)
    W <- M (.) W,   M = support of prune(W + s M (.) (B A))                     W out x in; a zero stays a zero
    Y = X (W + s M (.) (B A))^t + bias                                          exact gradients

and blocks get ranks by how far what leaves them is from what leaves the dense one. With O_l that of the pruned model
and D_l that of the dense one (tokens x d), both fed by their own blocks before,

    E_l = mean over units j of |D_lj - O_lj|^2 / |D_lj|^2
    r_l = E_l / (sum of E) * blocks * R_t, rounded, within 1 and r, and then moved by ones to the sum blocks * R_t
    R_t = R + t - 1

A is r x in and B is out x r; of a block of rank r_l the first r_l rows and columns are the adapter, the others wait.
The rounds but the last have one tenth of the steps each (T = 5), the last one the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from harness.method import Method
from lors.blocks import decoder_blocks, decoder_linears
from lors.checks import whole
from lors.low_rank import LowRankLinear
from lors.plugin import register
from lors.pruning import prune_model
from lors.pruning.block_runs import hidden_states
from lors.pruning.layerwise import check_layerwise
from lors.sparse_config import SparseTunerConfig
from lors.sparse_layer import SparseLinear, adapted_layers

__all__ = [
    "LosaConfig",
    "LosaLinear",
    "LosaMethod",
    "LosaModel",
    "Rounds",
    "allot_ranks",
    "block_errors",
    "round_of",
    "sparsity_range",
]

LONG = 6  # rounds' worth of steps in the last one: 6,000 rows after four times 1,000 in the published code


@dataclass
class LosaConfig(SparseTunerConfig):
    """Configuration of LoSA; r is the largest rank of a block. A bad value raises ``ValueError``."""

    product_share: ClassVar[float] = 1.0  # exact gradients


class LosaLinear(LowRankLinear):
    """A linear layer with LoSA adapters: ``losa_A[name]`` is r x in, ``losa_B[name]`` is out x r.

    Attributes:
        ranks: Rank in use of an adapter; r if it has none.
    """

    adapter_layer_names = ("losa_A", "losa_B")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ranks: dict[str, int] = {}
        super().__init__(*args, **kwargs)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The rows of A and the columns of B that are in use."""
        A, B = super().factors(name)
        rank = self.ranks.get(name, len(A))
        return A[:rank], B[:, :rank]

    @torch.no_grad()
    def settle(self, name: str) -> None:
        """Make the columns of B that are not in use zero, so that the whole adapter is the one in use."""
        self.losa_B[name][:, self.ranks.get(name, self.r[name]) :] = 0


LosaModel = register("LOSA", LosaConfig, LosaLinear)


def sparsity_range(sparsity: float) -> float:
    """How far the sparsity of a block may be from that of the model; that of the published code."""
    return 0.01 if sparsity <= 0.5 else 0.02 if sparsity <= 0.6 else 0.03


def round_of(step: int, steps: int, rounds: int) -> int:
    """Number of the round, from 1, that a step (from 0) belongs to; the last step belongs to the last round."""
    return rounds if step >= steps - 1 else min(rounds, 1 + step * (rounds - 1 + LONG) // steps)


def allot_ranks(errors: Sequence[float], mean: int, largest: int) -> list[int]:
    """Ranks r_l by errors E_l; their sum is ``mean`` times their number, or as near as 1 and ``largest`` let it be.

    What rounding leaves over goes, one each, to the blocks of the largest errors, or is taken from those of the
    smallest.
    """
    shares = np.asarray(errors, dtype=float)
    shares = shares / shares.sum() if shares.sum() > 0 else np.full(len(shares), 1 / len(shares))
    ranks = np.clip(np.round(shares * mean * len(shares)), 1, largest).astype(int)
    by_error = np.argsort(shares, kind="stable")
    while left := mean * len(ranks) - ranks.sum():
        order, limit = (by_error[::-1], largest) if left > 0 else (by_error, 1)
        open_to = [block for block in order if ranks[block] != limit][: abs(left)]
        if not open_to:
            break
        ranks[open_to] += np.sign(left)
    return ranks.tolist()


def block_errors(
    dense: PreTrainedModel, sparse: PreTrainedModel, calibration: Tensor, device: torch.device | None = None
) -> list[float]:
    """E_l of every block.

    Args:
        dense, sparse: Two models of one shape.
        calibration: Token ids, samples x length.
        device: Where blocks run, one of each model at a time; None: where they are.
    """
    models = {"outputs (dense)": dense, "outputs (pruned)": sparse}
    walks = (hidden_states(model, title, calibration, device) for title, model in models.items())
    errors = []
    for left_by_dense, left_by_sparse in zip(*walks, strict=True):
        wrong = norms = 0
        for pair in zip(left_by_dense, left_by_sparse, strict=True):
            D, of_sparse = (batch.flatten(0, -2).to("cpu", torch.float64) for batch in pair)
            wrong, norms = wrong + (D - of_sparse).square().sum(0), norms + D.square().sum(0)
        errors.append((wrong / norms).nan_to_num(0).mean().item())
    return errors[1:]  # the first is what enters the first block


class LosaMethod(Method):
    """LoSA in the harness.

    Args:
        sparsity: S; None: a half.
        pattern: ``unstructured``: blocks of one n:m pattern have one sparsity.
        rounds: T.
        first_rank: R, the mean rank of the first round; it grows by one with each.

    Raises:
        ValueError: A value that is not allowed.
    """

    reads_rows = True
    reads_dense = True
    prunes = True

    def __init__(
        self,
        name: str,
        peft: LosaConfig,
        *,
        sparsity: float | None,
        pattern: str,
        rounds: int = 5,
        first_rank: int = 6,
        **common: Any,
    ) -> None:
        super().__init__(name, peft, **common)
        whole(">= 1")("rounds", rounds)
        whole(">= 1")("first_rank", first_rank)
        self.target, self.number_of_rounds, self.first_rank = 0.5 if sparsity is None else sparsity, rounds, first_rank
        for number in range(1, rounds + 1) if self.target else ():
            S = self.sparsity_in(number)
            check_layerwise("rmi", S, pattern, outlier_threshold=1.0, sparsity_range=sparsity_range(S))

    def sparsity_in(self, number: int) -> float:
        """S_t of round ``number``, from 1."""
        return self.target - self.target * (1 - number / self.number_of_rounds) ** 3

    def prepare(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None, seed: int) -> nn.Module:
        """Put the dense weights in place of the pruned ones; without a dense model these stay, with all of r in use."""
        if self.dense is not None:
            dense = decoder_linears(self.dense)
            with torch.no_grad():
                for name, linear in decoder_linears(model.get_base_model()).items():
                    linear.weight.copy_(dense[name].weight)
            self._calibration = _samples(batches)
        return model

    def callbacks(self) -> list[TrainerCallback]:
        """The rounds, besides what every method has."""
        return [*super().callbacks(), *([] if self.dense is None else [Rounds(self)])]

    @torch.no_grad()
    def begin_round(self, model: PeftModel, number: int) -> None:
        """Prune the model for round ``number`` and give its blocks their ranks."""
        base, adapter, S = model.get_base_model(), model.active_adapter, self.sparsity_in(number)
        linears, device = decoder_linears(base), base.device
        merged = copy.deepcopy(self.dense)  # on the host
        for name, linear in decoder_linears(merged).items():
            layer = base.get_submodule(name)
            is_adapted = isinstance(layer, SparseLinear)
            linear.weight.copy_(layer.merged_weight([adapter]) if is_adapted else layer.weight)
        tokens = self._calibration.to(device)
        layerwise = {"layerwise": "rmi", "sparsity_range": sparsity_range(S)}
        prune_model(merged, "wanda", sparsity=S, calibration=tokens, device=device, **layerwise)
        for name, linear in decoder_linears(merged).items():
            linears[name].weight.mul_(linear.weight.to(device) != 0)
        errors = block_errors(self.dense, merged, tokens, device)
        ranks = allot_ranks(errors, min(self.first_rank + number - 1, self.peft.r), self.peft.r)
        blocks, _ = decoder_blocks(base)
        for name, layer in adapted_layers(base, adapter).items():
            block = int(name.removeprefix(f"{blocks}.").partition(".")[0])
            layer.ranks[adapter] = min(ranks[block], layer.r[adapter])

    def counts(self, model: nn.Module) -> dict[str, int]:
        """``after_pruning``, r_l (in + out) over all layers with the rank in use."""
        layers = (layer for layer in model.modules() if isinstance(layer, LosaLinear))
        return {"after_pruning": sum(f.numel() for layer in layers for name in layer.r for f in layer.factors(name))}


class Rounds(TrainerCallback):
    """Begins every round before its first step. It holds where the zeros are, for a run that is continued."""

    def __init__(self, method: LosaMethod) -> None:
        self._method, self._number, self._model, self._state = method, 0, None, None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        self._model = model
        if self._state is not None:
            self._put_back(self._state)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        number = round_of(state.global_step, state.max_steps, self._method.number_of_rounds)
        if number > self._number:
            self._method.begin_round(model, number)
            self._number = number

    def on_train_end(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        for layer in adapted_layers(model, model.active_adapter).values():
            layer.settle(model.active_adapter)

    def state_dict(self) -> dict[str, Any]:
        """Number of the round, ranks in use, and a bit for each weight."""
        linears = decoder_linears(self._model.get_base_model())
        bits = {name: _packed(linear.weight != 0) for name, linear in linears.items()}
        layers = adapted_layers(self._model, self._model.active_adapter)
        ranks = {name: layer.ranks.get(self._model.active_adapter) for name, layer in layers.items()}
        return {"round": self._number, "ranks": ranks, "support": bits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self._state = state

    @torch.no_grad()
    def _put_back(self, state: Mapping[str, Any]) -> None:
        self._number, adapter = state["round"], self._model.active_adapter
        for name, layer in adapted_layers(self._model, adapter).items():
            layer.ranks |= {} if state["ranks"][name] is None else {adapter: state["ranks"][name]}
        for name, linear in decoder_linears(self._model.get_base_model()).items():
            linear.weight.mul_(_unpacked(state["support"][name], linear.weight.shape).to(linear.weight.device))


def _samples(batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Rows without their padding, one after the other, cut into samples as long as the longest batch."""
    batches = list(batches)
    stream = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    length = max(batch["input_ids"].shape[1] for batch in batches)
    return stream[: len(stream) // length * length].view(-1, length)


def _packed(M: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(M.cpu().numpy()))


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()).reshape(shape)).bool()
