"""Neural low-rank adapter search (NLS) of SQFT (arXiv 2410.03750, section 3.2) on SparsePEFT layers.

``SqftConfig.rank_shares``: A and B have the largest rank R, and a rank rho of the space uses A[:rho] and B[:, :rho] at
the scale alpha / R. All layers of a decoder block have one rho. `ElasticRanks` draws one sub-network for each optimizer
step, from the seed and the number of the step alone: it is the same in the recomputation of a checkpoint, in all
micro-batches and processes, and after resuming. Between the steps, and in what is saved and merged, the sub-network is
the one that is extracted.

    Trainer(model, callbacks=[ElasticRanks()])
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from baselines.sqft import EXTRACTED, SqftLinear, elastic, extract_ranks, set_ranks
from harness.method import Method
from lors.randomness import generator_of, modes_kept
from lors.sparse_layer import active_layers

__all__ = ["ElasticRanks", "NlsMethod", "draw_ranks", "hill_climb"]

log = logging.getLogger("lors")


def draw_ranks(model: nn.Module, name: str, step: int) -> list[int]:
    """Activate the sub-network of an optimizer step (from 0), and return its entries, one for each block.

    They follow from the seed of the config and the step alone, whatever process draws them, and how often.
    """
    options, blocks = elastic(model, name)
    length = len(options.rank_shares)
    choice = torch.randint(length, (blocks,), generator=generator_of(options.seed, step)).tolist()
    set_ranks(model, name, choice)
    return choice


@torch.no_grad()
def hill_climb(model: nn.Module, name: str, score: Callable[[], float], rounds: int = 10) -> list[int]:
    """Search the sub-network with the highest score, from the middle of the space, and note it in the config.

    A round scores all neighbours (one block, one entry up or down) and goes to the best of them; the search ends where
    none is better. A round costs at most two scores for each block.

    Args:
        model: The trained model.
        name: The adapter.
        score: Called with the sub-network active and the model in evaluation mode. Not on the test data.
        rounds: At most so many moves.

    Returns:
        The entry of ``rank_shares`` for each block.
    """
    options, blocks = elastic(model, name)
    length = len(options.rank_shares)

    def scored(choice: list[int]) -> float:
        set_ranks(model, name, choice)
        return score()

    with modes_kept(model):
        model.eval()
        best = [EXTRACTED["heuristic"](length)] * blocks
        reached = scored(best)
        for _ in range(rounds):
            moves = [(i, best[i] + step) for i in range(blocks) for step in (-1, 1) if 0 <= best[i] + step < length]
            neighbours = [[*best[:i], entry, *best[i + 1 :]] for i, entry in moves]
            scores = [scored(choice) for choice in neighbours]
            if not scores or max(scores) <= reached:
                break
            reached = max(scores)
            best = neighbours[scores.index(reached)]
    options.subnetwork = best
    set_ranks(model, name, best)
    return best


class ElasticRanks(TrainerCallback):
    """One sub-network for every optimizer step; between the steps and afterwards the one that is extracted.

    What it does follows from the number of the step, so it has no state and a resumed training goes on as it would
    have.

    Args:
        score: Of ``extract='search'``, see ``hill_climb``; gets the model. None: the search is left to the caller.
    """

    def __init__(self, score: Callable[[nn.Module], float] | None = None) -> None:
        self.score = score

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        for name in _elastic_adapters(model):
            draw_ranks(model, name, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        # The Trainer evaluates and saves after this.
        for name in _elastic_adapters(model):
            extract_ranks(model, name)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        for name in _elastic_adapters(model):
            options, _blocks = elastic(model, name)
            if options.extract == "search" and self.score is not None:
                hill_climb(model, name, partial(self.score, model))
            log.info("NLS: entries of the ranks %s by block: %s", options.ranks(options.r), extract_ranks(model, name))


class NlsMethod(Method):
    """SQFT in the harness. ``extract=search`` goes by the loss of the first ``init_rows`` training rows, which are then
    left out of the training."""

    _held_out: list[Mapping[str, Tensor]] | None = None

    @property
    def reads_rows(self) -> bool:
        """Where ranks are searched for."""
        return self.peft.rank_shares is not None and self.peft.extract == "search"

    @property
    def holds_out(self) -> bool:
        """Likewise."""
        return self.reads_rows

    def prepare(self, model: nn.Module, batches: Any, seed: int) -> nn.Module:
        """Keep the rows that ranks are searched by."""
        self._held_out = list(batches) if batches is not None and self.reads_rows else None
        return model

    def callbacks(self) -> list[TrainerCallback]:
        """The ranks of NLS."""
        if self.peft.rank_shares is None:
            return []
        return [ElasticRanks(partial(_minus_loss, self._held_out) if self._held_out else None)]

    def counts(self, model: nn.Module) -> dict[str, int]:
        """``extracted``, the parameters of the sub-network that is left of an NLS."""
        if self.peft.rank_shares is None:
            return {}
        layers = active_layers(model, SqftLinear)
        return {"extracted": sum(sum(part.numel() for part in layer.factors(name)) for layer, name in layers)}

    def largest_step(self, model: nn.Module) -> Any:
        """That of the largest ranks."""
        return None if self.peft.rank_shares is None else _largest(model)


@contextmanager
def _largest(model: nn.Module) -> Iterator[None]:
    names = _elastic_adapters(model)
    for name in names:
        set_ranks(model, name, [0] * elastic(model, name)[1])
    try:
        yield
    finally:
        for name in names:
            extract_ranks(model, name)


@torch.no_grad()
def _minus_loss(batches: Sequence[Mapping[str, Tensor]], model: nn.Module) -> float:
    """Minus the mean loss of the target tokens of all batches."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    for batch in batches:
        targets = int((batch["labels"][:, 1:] != -100).sum())
        if targets:
            total += float(model(**{key: value.to(device) for key, value in batch.items()}).loss) * targets
            count += targets
    return -total / max(1, count)


def _elastic_adapters(model: nn.Module) -> list[str]:
    """The active adapters with a space of ranks."""
    pairs = active_layers(model, SqftLinear)
    return list(dict.fromkeys(name for layer, name in pairs if layer.options[name].rank_shares is not None))
