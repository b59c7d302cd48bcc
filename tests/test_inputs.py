"""What a run reads before a model is loaded: the tokenizer, and the tokens that occur."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import compose_config, make_tokenizer, sentence, write_rows
from transformers import AutoModelForCausalLM

from harness.config import resolve
from harness.errors import BadInput
from harness.inputs import Inputs, read_inputs
from harness.method_from_config import build_method
from harness.models import Models
from harness.weights import base_format

KNOWN = len(make_tokenizer())
METHODS = sorted(file.stem for file in (Path(__file__).parents[1] / "conf/method").glob("*.yaml"))


@pytest.fixture
def read(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Inputs]:
    """Function that reads the inputs of a model whose tokenizer has more tokens than the model."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<filler>"})
    tokenizer.add_tokens(["zebra"])
    assert tokenizer.pad_token_id == KNOWN
    tokenizer.save_pretrained(folder)

    def run(*overrides: str, training: str = "the cat", calibration: str = "the dog") -> Inputs:
        rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": training, "output": sentence(1)}])
        text = write_rows(tmp_path / "text.jsonl", [{"text": f"{sentence(2, 40)} {calibration}"}])
        cfg = resolve(
            compose_config(
                *("model=hf", f"model.path={folder}", "data=alpaca", f"data.path={rows}", f"prune.text={text}"),
                *("prune.samples=4", "prune.sequence_length=16", "eval=none", f"cache_root={tmp_path}/cache"),
                *overrides,
            )
        )
        return read_inputs(cfg, build_method(cfg))

    return run


def test_tokens_that_do_not_occur_may_be_unknown_to_the_model(read) -> None:
    """The padding token, which only occurs behind the mask, is replaced."""
    inputs = read()
    assert len(inputs.tokenizer) == KNOWN + 2
    assert inputs.tokenizer.pad_token_id == inputs.tokenizer.eos_token_id < KNOWN
    assert max(max(row["input_ids"]) for row in inputs.rows) < KNOWN


@pytest.mark.parametrize(
    ("method", "precision"), [*((name, "bf16_mixed") for name in METHODS), ("lors", "float32"), ("full", "float32")]
)
def test_every_method_passes_what_is_checked_before_a_model_is_loaded(read, method: str, precision: str) -> None:
    assert read(f"method={method}", f"train.precision={precision}", "adapter.r=2").rows


@pytest.mark.parametrize(
    ("texts", "place"),
    [({"training": "the zebra"}, "the training rows"), ({"calibration": "the zebra"}, "prune.text")],
)
def test_a_token_that_occurs_and_the_model_does_not_know_is_named(read, texts, place) -> None:
    with pytest.raises(BadInput) as refusal:
        read(**texts)
    assert str(refusal.value) == (
        f"model.path: token {KNOWN + 1} ('zebra') occurs in {place}; "
        f"the tokenizer has {KNOWN + 2} tokens, the model {KNOWN}"
    )


def test_a_padding_token_that_is_chosen(read) -> None:
    assert read("model.pad_token=the").tokenizer.pad_token == "the"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_that_is_chosen_is_that_of_every_model(read, tmp_path: Path, attention: str) -> None:
    inputs = read(f"model.attn_implementation={attention}", "train.steps=6")
    cfg = resolve(compose_config("model=hf", f"model.path={inputs.source.path}", f"cache_root={tmp_path}/cache"))
    assert AutoModelForCausalLM.from_config(inputs.shape).config._attn_implementation == attention
    models = Models(cfg, inputs)
    assert models.dense("auto").config._attn_implementation == attention
    assert models.dense_key != Models(cfg, read()).dense_key


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [("bf16_mixed", "null", "bfloat16"), ("bf16_mixed", "float32", "float32"), ("bf16", "bfloat16", "bfloat16")],
)
def test_the_format_of_the_weights(precision: str, dtype: str, expected: str) -> None:
    cfg = resolve(compose_config(f"train.precision={precision}", f"model.dtype={dtype}"))
    assert base_format(cfg) == getattr(torch, expected)
