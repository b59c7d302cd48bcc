"""Checks of ``distributed_worker`` on what the harness does in several processes: it trains, scores and agrees."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import make_tokenizer, recipe
from contract import TRAINED, batch, method_of, pruned
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from harness import processes
from harness.checkpoints import newest_intact
from harness.data import IGNORED, Row, collator, random_data
from harness.errors import BadInput
from harness.log_likelihood import PromptSharingLM
from harness.meter import Meter, training_cost
from harness.method import adapt
from harness.perplexity import held_out_perplexity, perplexity
from harness.shards import can_shard, collect, sharded
from harness.train import train
from harness.weights import random_model

# What makes a method do all that it can within six steps.
BUSY = {
    "geolora": ["method.peft.coefficient_steps=2", "method.peft.skipped_steps=0"],
    "flat_lora": ["method.peft.sigma=0.5"],
    # Boosters of two steps, and of both blocks.
    "xgblora": ["method.peft.seed=1", "method.peft.penalty_weight=0.01"],
}
RECIPE = recipe(
    steps=6, batch_size=4, gradient_accumulation=2, checkpoint_every=2, learning_rate=1e-2, sequence_length=16
)


SHARDED = [name for name in TRAINED if can_shard(method_of(name))]


def rows() -> list[Row]:
    """Of several lengths, some without a target here and there; ten make an epoch of a step and a quarter."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for i in range(10):
        ids = torch.randint(3, 64, (3 + i * 7 % 8,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [IGNORED, IGNORED if i % 3 else ids[1], *ids[2:]]})
    return found


def training(name: str, folder: Path) -> dict[str, Any]:
    """What a training leaves: the lines of its steps, and the sum of all that it has changed."""
    method = method_of(name, *BUSY.get(name, []))
    model = adapt(method, pruned(), [batch()])
    pad = collator(make_tokenizer(), "longest", RECIPE.sequence_length)
    outcome = train(model, rows(), pad, RECIPE, method, Meter(1), folder / "trainings" / name, seed=3)
    return {"history": outcome.history, "weights": size(model)}


def sharded_training(name: str, folder: Path) -> dict[str, Any]:
    """The same with shards, begun anew from the last checkpoint but one; how much of the weights is here."""
    method = method_of(name)
    found: dict[str, Any] = {}
    for attempt in ("at once", "continued"):
        whole = adapt(method, pruned(), [batch()])
        found["before"] = size(whole)
        model = sharded(whole)
        places = [buffer for buffer in model.buffers() if not buffer.is_floating_point()]  # of compressed values
        found["sharded"] = all(isinstance(tensor, DTensor) for tensor in [*model.parameters(), *places])
        found["share"] = bytes_of(model) / bytes_of(whole)
        pad = collator(make_tokenizer(), "longest", RECIPE.sequence_length)
        place = folder / "sharded" / name
        outcome = train(model, rows(), pad, RECIPE, method, Meter(1), place, seed=3)
        found["untouched"] = size(whole) == found["before"]
        collect(model, whole)
        found[attempt] = {"history": outcome.history, "weights": size(whole)}
        processes.gathered(None)
        processes.from_first(lambda place=place: shutil.rmtree(newest_intact(place)))
    return found


SHAPE = LlamaConfig(
    hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, max_position_embeddings=256,
)  # fmt: skip
# Method and fields of `train`, of steps whose memory is measured and simulated.
COSTS = [
    ("lors", {}), ("full", {}), ("spp", {}), ("lors storage=bitmap", {"activation_checkpointing": True}),
    ("full", {"activation_checkpointing": True}), ("hira", {"activation_checkpointing": True}),
]  # fmt: skip
COST_RECIPE = {"batch_size": 2, "gradient_accumulation": 1, "sequence_length": 128}


def sharded_cost(name: str, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Memory and FLOPs of a step, whole and sharded."""
    method, cfg = method_of(name), recipe(**COST_RECIPE, **fields)
    adapted = adapt(method, random_model(SHAPE, torch.float32, 0.5, "unstructured", seed=0))
    step = collator(None, "fixed", cfg.sequence_length)(random_data(SHAPE.vocab_size, cfg, seed=0)[: cfg.batch_size])
    found = {"whole": training_cost(adapted, step, cfg, method)}
    return found | {"sharded": training_cost(sharded(adapted), step, cfg, method)}


def bytes_of(model: nn.Module) -> int:
    """Of the parameters that this process holds."""
    held = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(parameter.nbytes for parameter in held)


def size(model: nn.Module) -> float:
    return sum(value.double().abs().sum().item() for value in model.state_dict().values())


class SmallVocabulary(PromptSharingLM):
    """For a model that knows 64 tokens."""

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        return [3 + len(word) for word in string.split()]


def scores(folder: Path, placed: Callable[[nn.Module], nn.Module] = lambda model: model) -> dict[str, Any]:
    """Perplexities of windows and of rows, an odd number of batches of both; log-likelihoods of answers."""
    windows = torch.randint(3, 64, (9, 512), generator=torch.Generator().manual_seed(1))
    held_out = [row for row in rows() for _ in range(100)]
    model = placed(pruned().eval())
    lm = SmallVocabulary(model, make_tokenizer(), batch_size=4, add_bos_token=False, progress=False)
    items = [(("", ""), prompt, answer) for prompt in ([3, 4], [5, 6, 7], [8]) for answer in ([9], [10, 11], [12])]
    with torch.no_grad():
        return {
            "windows": perplexity(model, windows),
            "rows": held_out_perplexity(model, held_out),
            "answers": {"losses": [score for score, _ in lm._loglikelihood_tokens(items)]},
            "sharded": any(isinstance(parameter, DTensor) for parameter in model.parameters()),
        }


def agreement(folder: Path) -> dict[str, Any]:
    """What each says of a value that is another in the second process; then of one that is the same."""
    processes.agree({"config": "key", "model": [1, 2]})
    try:
        processes.agree({"config": "key", "model": [1, dist.get_rank()]})
    except BadInput as error:
        return {"message": str(error)}
    return {"message": None}


def failing_first(folder: Path) -> dict[str, Any]:
    """What both have of a computation of the first that fails; then of one that does not."""

    def fail(kind: type[Exception]) -> str:
        try:
            processes.from_first(lambda: (_ for _ in ()).throw(kind("name=value: must be other")))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    found = {"refused": fail(BadInput), "failed": fail(OSError)}
    found["nested"] = processes.from_first(lambda: processes.from_first(lambda: 7) + 1)
    return found | {"later": processes.from_first(lambda: processes.rank()), "all": processes.gathered(dist.get_rank())}


CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{f"training of {name}": partial(training, name) for name in TRAINED},
    **{f"sharded training of {name}": partial(sharded_training, name) for name in SHARDED},
    **{f"sharded cost of {name} {fields}": partial(sharded_cost, name, fields) for name, fields in COSTS},
    "scores": scores,
    "scores of shards": partial(scores, placed=sharded),
    "agreement": agreement,
    "failing first": failing_first,
}
