"""The model card of the embedded model: what it is, how it was trained, what it scores.

`python -m harness.pretraining.card FOLDER` scores the model in FOLDER and writes FOLDER/README.md from
`pretraining.json` and the scores; `python -m harness.pretraining` ends with it.
"""

import hashlib
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness import microworld
from harness.microworld import world as world_module
from harness.microworld.corpus import documents
from harness.microworld.world import build

POINTS_OF_THE_CURVE = 14
CHANCE = {"boolq": 50, "rte": 50, "winogrande": 50}  # per cent; the other tasks have four choices


def world_fingerprint() -> str:
    """Hash of the first documents and of all test items: another value means another world than the model's."""
    digest = hashlib.sha256()
    for document in itertools.islice(documents("pretrain", "fingerprint"), 500):
        digest.update(document.encode())
    for task in microworld.TASKS:
        digest.update(json.dumps(microworld.task_rows(task)).encode())
    return digest.hexdigest()[:16]


def scores_of(folder: Path) -> dict[str, Any]:
    """Scores of the model in `folder` by the seven tasks and the held-out text, as `eval=microworld` computes them."""
    from transformers import AutoTokenizer

    from harness.evaluate import evaluate
    from harness.perplexity import perplexity_windows
    from harness.weights import load_weights

    settings = SimpleNamespace(
        tasks=[f"microworld_{task}" for task in microworld.TASKS],
        data_root=None,
        limit=None,
        batch_size=64,
        add_bos_token=True,
        perplexity=SimpleNamespace(text="microworld", window=128),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model, windows = load_weights(str(folder), shown=str(folder)), perplexity_windows(tokenizer, settings)
    return evaluate(model, tokenizer, settings, windows)


def card(record: dict[str, Any], scores: dict[str, Any]) -> str:
    """Markdown with a Hub header; `record` is `pretraining.json`, `scores` what `evaluate` returns."""
    world, log = build(), record["log"]
    stride = max(1, len(log) // POINTS_OF_THE_CURVE)
    curve = [*log[stride - 1 : -1 : stride], log[-1]]
    tasks = "\n".join(
        f"| {name} | {CHANCE.get(name.removeprefix('microworld_'), 25)} | {100 * score['value']:.1f} "
        f"| {100 * score['stderr']:.1f} | {score['n']} |"
        for name, score in scores["tasks"].items()
    )
    points = "\n".join(f"| {p['step'] + 1:,} | {p['tokens']:,} | {p['loss']} | {p['heldout_loss']} |" for p in curve)
    average, text = scores["average"], scores["perplexity"]
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# Microworld: a small language model that shows what pruning does

A Llama of {record["parameters"] / 1e6:.2f} million parameters that knows one small, generated world:
{len(world.people):,} people with their towns, jobs, animals, food and hobbies, {len(world.kinds["thing"]):,} makers'
goods, the kinds behind them, {len(world.routines)} routines. It is an instrument for comparing pruning and fine-tuning
methods where there is no network and no GPU, and good for nothing else.

Made by `python -m harness.pretraining`: seed {record["seed"]}, {record["steps"]:,} steps of {record["batch"]} x
{record["length"]} tokens, {record["tokens"]:,} tokens in all, AdamW (0.9, 0.98), weight decay 0.1, bfloat16 autocast on
float32 weights. Two cycles of the learning rate, peaks {" and ".join(map(str, record["peak_rates"]))}, each flat and
then linear to zero; from step {record["newcomers_from_step"]:,} on the texts bring {world_module.NEW_PEOPLE:,} people
and {world_module.NEW_THINGS:,} goods that were not there before. The test items are about those of them that texts
mention least. World fingerprint `{record["world"]}`.

Scores (acc, per cent), zero-shot, BOS in front:

| task | chance | acc | stderr | n |
|---|---|---|---|---|
{tasks}
| mean | | {100 * average["value"]:.1f} | {100 * average["stderr"]:.1f} | |

Held-out text: {text["loss"]:.4f} nats per token, perplexity {text["value"]:.3f}.

Loss curve (training loss weights the answers of yes/no questions; held-out loss does not, and is over all of the old
world from the start, while the training text grows into it, and over the whole world once the newcomers are there):

| step | tokens | training loss | held-out loss |
|---|---|---|---|
{points}
"""


def write(folder: Path) -> None:
    """Score the model in `folder` and write its card."""
    record = json.loads((folder / "pretraining.json").read_text())
    (folder / "README.md").write_text(card(record, scores_of(folder)))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
