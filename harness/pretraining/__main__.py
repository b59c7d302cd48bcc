"""Pre-training of the shipped model: `python -m harness.pretraining`, two CPU cores, resumable.

A Llama of 3.4 million parameters (hidden 256, 4 layers, 4 query and 2 key/value heads, ffn 688, tied embeddings) learns
the pre-training split with AdamW, in two cycles of the learning rate, each flat and then linear to zero. Batch t is a
function of the seed and t alone: a killed run that is started again continues from its newest state with the same data.

The world grows: the first texts speak of a tenth of its people, goods and routines, all of them have come in by
`GROWTH_STEPS`. A model that meets everybody at once stays long on a plateau before it recalls anybody (Zucchet et al.,
2025, arXiv 2503.21676). The second cycle brings newcomers, known less firmly; the test items are about the
half of them that is mentioned least.

Answers of yes/no questions are one token in a passage of sixty, and learnt last: their loss is weighted, and once the
old world is whole the texts turn to comparing and weighing (`STAGES`).
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.files import atomically
from harness.microworld.corpus import BINDING_MIX, MIX, NEWCOMER_MIX, REASONING_MIX, documents
from harness.microworld.tokenizer import VOCABULARY, train_tokenizer
from harness.microworld.world import World, build, build_old
from harness.pretraining import card

LENGTH, BATCH = 256, 12
OLD_STEPS, NEW_START, STEPS = 6_600, 6_656, 8_128  # the old world ends; the next chunk, about all; the end
PEAK_RATE, WARMUP, DECAY_SHARE = 2e-3, 100, 0.35
LATE_PEAK_RATE, LATE_WARMUP, LATE_DECAY_SHARE = 1e-3, 50, 0.6
FIRST_SHARE, GROWTH_STEPS = 0.1, 2_700  # share of the world at the start; steps until it is whole
STAGES = (  # what texts are about, from which step
    (0, MIX),
    (GROWTH_STEPS, REASONING_MIX),
    (3_392, BINDING_MIX),
    (NEW_START, NEWCOMER_MIX),
)
ANSWER_WEIGHT, LATE_ANSWER_WEIGHT = 4.0, 10.0  # late: once the world is whole
CHUNK = 64  # batches made, and states saved, together
CLIP = 1.0
TOKENIZER_TEXTS = 20_000


def model_config() -> LlamaConfig:
    """The architecture; every width is divisible by 8, so that 2:4 and 4:8 apply to every layer."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def known_world(step: int) -> World:
    """What texts speak of: a growing part of the old world, all of it from `GROWTH_STEPS`, at last the whole world."""
    if step >= NEW_START:
        return build()
    share = min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * step / GROWTH_STEPS)
    return build_old() if share == 1.0 else build_old().young(share)


def packed_batches(tokenizer: PreTrainedTokenizerFast, chunk: int, seed: int) -> Tensor:
    """Batches of `chunk`: int64 [CHUNK, BATCH, LENGTH], documents as BOS text EOS, joined and cut."""
    need, tokens = CHUNK * BATCH * LENGTH, []
    step = chunk * CHUNK
    mix = [mix for start, mix in STAGES if start <= step][-1]
    stream = documents("pretrain", f"{seed}-{chunk}", known_world(step), mix)
    while len(tokens) < need:
        for ids in tokenizer([next(stream) for _ in range(1000)])["input_ids"]:
            tokens += ids
            tokens.append(tokenizer.eos_token_id)
    return torch.tensor(tokens[:need]).view(CHUNK, BATCH, LENGTH)


def learning_rate(step: int) -> float:
    """Two cycles, one for the old world and a lower one for the newcomers: warm-up, flat, linear to zero."""
    if step < NEW_START:
        return PEAK_RATE * min((step + 1) / WARMUP, 1.0, (OLD_STEPS - step) / (DECAY_SHARE * OLD_STEPS))
    length, step = STEPS - NEW_START, step - NEW_START
    return LATE_PEAK_RATE * min((step + 1) / LATE_WARMUP, 1.0, (length - step) / (LATE_DECAY_SHARE * length))


def answer_weights(tokenizer: PreTrainedTokenizerFast, weight: float) -> Tensor:
    """Loss weight of each vocabulary entry as a target: `weight` for yes, no, True, False; else 1."""
    weights = torch.ones(len(tokenizer))
    for answer in (" yes", " no", " True", " False"):
        weights[tokenizer(answer, add_special_tokens=False)["input_ids"][-1]] = weight
    return weights


def weighted_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean next-token cross-entropy; logits [batch, length, vocabulary], ids [batch, length]."""
    targets = ids[:, 1:].reshape(-1)
    return cross_entropy(logits[:, :-1].float().reshape(len(targets), -1), targets, weight=weights)


def optimizer_of(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)


def _write(path: Path, state: dict) -> None:
    with atomically(path, "wb") as file:
        torch.save(state, file)


def heldout_batch(tokenizer: PreTrainedTokenizerFast, world: World) -> Tensor:
    """Sixteen rows of held-out text about `world`, int64 [16, LENGTH]."""
    texts = islice(documents("heldout", about=world), 400)
    joined = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(joined[: 16 * LENGTH]).view(16, LENGTH)


def train(work: Path, steps: int, seed: int, compiled: bool) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list]:
    """Train, or continue the run in `work`; returns the model, the tokenizer and the log (one dict per chunk)."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(islice(documents("pretrain", about=build_old()), TOKENIZER_TEXTS))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    optimizer, first, log = optimizer_of(model), 0, []
    state_file = work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, log = state["chunk"], state["log"]
        print(f"continuing after step {first * CHUNK}", flush=True)
    model.set_attn_implementation("eager")  # compiled, a quarter faster than the flash kernel at this size on a CPU
    inner = torch.compile(model.model) if compiled else model.model
    for chunk in range(first, -(-steps // CHUNK)):
        began, losses = time.time(), []
        new = chunk * CHUNK >= NEW_START
        heldout = heldout_batch(tokenizer, build() if new else build_old())
        weights = answer_weights(tokenizer, ANSWER_WEIGHT if chunk * CHUNK < GROWTH_STEPS else LATE_ANSWER_WEIGHT)
        for offset, ids in enumerate(packed_batches(tokenizer, chunk, seed)):
            step = chunk * CHUNK + offset
            if step >= (steps if new else min(steps, OLD_STEPS)):
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = weighted_loss(model.lm_head(inner(input_ids=ids).last_hidden_state), ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        with torch.no_grad():
            heldout_loss = weighted_loss(model(heldout).logits, heldout, torch.ones(len(tokenizer))).item()
        seconds = time.time() - began
        log.append(
            {
                "step": chunk * CHUNK + len(losses) - 1,
                "tokens": (log[-1]["tokens"] if log else 0) + len(losses) * BATCH * LENGTH,
                "loss": round(sum(losses) / len(losses), 4),
                "heldout_loss": round(heldout_loss, 4),
                "seconds": round(seconds, 1),
            }
        )
        print(json.dumps(log[-1]), f"{len(losses) * BATCH * LENGTH / seconds:.0f} tokens/s", flush=True)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "chunk": chunk + 1,
            "log": log,
        }
        _write(state_file, state)
    model.set_attn_implementation("sdpa")
    return model, tokenizer, log


def main(arguments: list[str] | None = None) -> None:
    """Command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m harness.pretraining", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/microworld"), help="states and the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which needs a C++ compiler")
    options = parser.parse_args(arguments)
    model, tokenizer, log = train(options.output, STEPS, options.seed, not options.eager)
    finished = options.output / "checkpoint"
    model.save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    record = {
        "seed": options.seed,
        "steps": log[-1]["tokens"] // (BATCH * LENGTH),
        "batch": BATCH,
        "length": LENGTH,
        "tokens": log[-1]["tokens"],
        "peak_rates": [PEAK_RATE, LATE_PEAK_RATE],
        "newcomers_from_step": NEW_START,
        "parameters": model.num_parameters(),
        "world": card.world_fingerprint(),
        "log": log,
    }
    (finished / "pretraining.json").write_text(json.dumps(record, indent=1))
    card.write(finished)
    print(f"model in {finished}", flush=True)


if __name__ == "__main__":
    main()
