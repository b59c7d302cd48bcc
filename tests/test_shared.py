"""What many runs share is made once, by one of them, and is what each would have made."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, sentence, write_rows

from lors.harness import shared
from lors.harness.data import calibration_tokens, training_data
from lors.harness.shared import made_once, shared_calibration, shared_rows
from lors.harness.store import read_json, write_json
from lors.harness.validate import resolve

TOKENIZER = make_tokenizer()


@pytest.fixture
def cfg(composed, tiny_checkpoint, tmp_path):
    """Function from overrides to the resolved config of a run on two small files."""
    write_rows(tmp_path / "rows.jsonl", [{"instruction": sentence(i), "output": sentence(i + 1, 5)} for i in range(24)])
    write_rows(tmp_path / "text.jsonl", [{"text": sentence(i, 40)} for i in range(40)])
    common = [
        "model=hf", f"model.path={tiny_checkpoint}", "data=alpaca", f"data.path={tmp_path}/rows.jsonl",
        f"prune.text={tmp_path}/text.jsonl", "prune.samples=4", "prune.sequence_length=16", "eval=none",
        f"cache_root={tmp_path}/cache",
    ]  # fmt: skip
    return lambda *overrides: resolve(composed(*common, *overrides))


@pytest.fixture
def tokenised(monkeypatch) -> list[str]:
    """Grows by a word whenever rows or samples are tokenised."""
    calls: list[str] = []
    for name in ("tokenised_rows", "calibration_tokens"):
        real = getattr(shared, name)
        monkeypatch.setattr(shared, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    return calls


def test_rows_are_those_of_a_run_on_its_own_tokenised_once_for_all_seeds_and_methods(cfg, tokenised) -> None:
    for overrides in (["seed=0"], ["seed=1"], ["seed=0", "method=lora", "sparsity=0.7"]):
        run = cfg(*overrides, "data.loss_on=answer", "train.sequence_length=400")
        assert shared_rows(run, TOKENIZER) == training_data(run.data, run.train, TOKENIZER, run.seed)
    assert tokenised == ["tokenised_rows"]


def test_text_is_tokenised_as_far_as_the_steps_need_it(cfg, tokenised, tmp_path) -> None:
    text = ["data=text", f"data.path={tmp_path}/text.jsonl", "train.sequence_length=16", "train.batch_size=2"]
    for steps in (2, 3):
        run = cfg(*text, f"train.steps={steps}")
        assert len(shared_rows(run, TOKENIZER)) == 2 * steps
    assert len(tokenised) == 2


def test_samples_are_those_of_a_run_on_its_own_tokenised_once_for_all_pruners(cfg, tokenised) -> None:
    for pruner in ("wanda", "sparsegpt"):
        run = cfg(f"prune={pruner}")
        expected = calibration_tokens(run.prune, TOKENIZER, run.prune.seed)
        assert torch.equal(shared_calibration(run, TOKENIZER), expected)
    assert tokenised == ["calibration_tokens"]


def test_other_content_lengths_or_code_make_other_tokens(cfg, tokenised, tmp_path, monkeypatch) -> None:
    def make() -> None:
        run = cfg(*changes)
        shared_rows(run, TOKENIZER), shared_calibration(run, TOKENIZER)

    changes: list[str] = []
    make()
    changes = ["train.sequence_length=32", "prune.sequence_length=8"]
    make()
    assert len(tokenised) == 4
    write_rows(tmp_path / "rows.jsonl", [{"instruction": "new", "output": "rows"}])
    make()
    assert len(tokenised) == 5
    template = tmp_path / "template.py"
    template.write_text("# another template")
    monkeypatch.setattr(shared.template, "__file__", str(template))
    make()
    assert len(tokenised) == 7


def test_a_damaged_file_is_made_again(cfg, tokenised, tmp_path) -> None:
    before = shared_rows(cfg(), TOKENIZER)
    [file] = (tmp_path / "cache" / "tokens").glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])
    assert shared_rows(cfg(), TOKENIZER) == before
    assert len(tokenised) == 2


def test_of_several_that_want_it_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    made, got = [], []

    def make() -> dict[str, int]:
        made.append(1)
        time.sleep(0.2)
        return {"value": 7}

    def want() -> None:
        got.append(made_once(tmp_path / "deep" / "file.json", make, read_json, write_json))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert got == [{"value": 7}] * 4 and len(made) == 1


def test_a_failure_leaves_nothing_and_the_next_one_tries(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no data")

    file = tmp_path / "file.json"
    with pytest.raises(ValueError, match="no data"):
        made_once(file, fail, read_json, write_json)
    assert not file.exists()
    assert made_once(file, lambda: [1], read_json, write_json) == [1]
