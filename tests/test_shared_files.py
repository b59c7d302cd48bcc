"""What many runs share is made once, by one of them, and is what each would have made."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, sentence, write_rows
from damage import cut, flip_a_bit, put_a_folder

from harness import data, sealed_file
from harness.config import resolve
from harness.data import calibration_samples, calibration_tokens, tokenised_rows, training_rows
from harness.errors import BadInput
from harness.files import Damaged
from harness.identity import with_fingerprints
from harness.sealed_file import computed_once

TOKENIZER = make_tokenizer()
VOCABULARY = len(TOKENIZER)


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
        real = getattr(data, name)
        monkeypatch.setattr(data, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    return calls


def test_rows_are_those_of_a_run_on_its_own_tokenised_once_for_all_seeds_and_methods(cfg, tokenised) -> None:
    orders = []
    for overrides in (["seed=0"], ["seed=1"], ["seed=0", "method=lora", "sparsity=0.7"]):
        run = cfg(*overrides, "data.loss_on=answer", "train.sequence_length=400")
        orders.append(training_rows(run, with_fingerprints(run), TOKENIZER, VOCABULARY))
    assert tokenised == ["tokenised_rows"]
    assert orders[0] == orders[2] != orders[1]
    alone = sorted(map(str, tokenised_rows(run.data, run.train, TOKENIZER)))
    assert [sorted(map(str, rows)) for rows in orders] == [alone] * 3


def test_text_is_tokenised_as_far_as_the_steps_need_it(cfg, tokenised, tmp_path) -> None:
    text = ["data=text", f"data.path={tmp_path}/text.jsonl", "train.sequence_length=16", "train.batch_size=2"]
    for steps in (2, 3):
        run = cfg(*text, f"train.steps={steps}")
        assert len(training_rows(run, with_fingerprints(run), TOKENIZER, VOCABULARY)) == 2 * steps
    assert len(tokenised) == 2


def test_samples_are_those_of_a_run_on_its_own_tokenised_once_for_all_pruners(cfg, tokenised) -> None:
    for pruner in ("wanda", "sparsegpt"):
        run = cfg(f"prune={pruner}")
        expected = calibration_tokens(run.prune, TOKENIZER, run.prune.seed)
        assert torch.equal(calibration_samples(run, with_fingerprints(run), TOKENIZER, VOCABULARY), expected)
    assert tokenised == ["calibration_tokens"]


def test_other_content_lengths_or_code_make_other_tokens(cfg, tokenised, tmp_path, monkeypatch) -> None:
    def make() -> None:
        run = cfg(*changes)
        training_rows(run, with_fingerprints(run), TOKENIZER, VOCABULARY)
        calibration_samples(run, with_fingerprints(run), TOKENIZER, VOCABULARY)

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
    monkeypatch.setattr(data, "MAKERS", [*data.MAKERS, template])
    make()
    assert len(tokenised) == 7


# What is in a file


def leave_the_content(file: Path) -> None:
    """A file of an older version has no seal."""
    file.write_bytes(file.read_bytes().partition(b"\n")[2])


def take_that_of_another_key(file: Path) -> None:
    computed_once(file.parent / "more.sealed", lambda: {"value": 7})
    file.write_bytes((file.parent / "more.sealed").read_bytes())


DAMAGE = [flip_a_bit, cut, leave_the_content, take_that_of_another_key, put_a_folder]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tokens_are_made_again_with_one_warning(damage, cfg, tokenised, tmp_path, caplog) -> None:
    run = cfg()
    before = training_rows(run, with_fingerprints(run), TOKENIZER, VOCABULARY)
    [file] = (tmp_path / "cache" / "tokens").glob("*.sealed")
    damage(file)
    assert training_rows(run, with_fingerprints(run), TOKENIZER, VOCABULARY) == before
    assert [f"{file}: damaged (" in line and "it is made again" in line for line in caplog.messages] == [True]
    assert training_rows(run, with_fingerprints(run), TOKENIZER, VOCABULARY) == before
    assert len(tokenised) == 2 and len(caplog.messages) == 1


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    file = tmp_path / "file.sealed"
    computed_once(file, lambda: {"value": 0.25})
    content = file.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        with pytest.raises(Damaged, match=f"^{file}: damaged "):
            sealed_file._read_sealed(file, json.loads)


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    value = {"a": [0.1, None, "ü"], "b": {"c": 7}}
    for _ in range(2):
        assert computed_once(tmp_path / "file.sealed", lambda: value | {"d": float("inf")}) == value | {"d": None}
    seal, _, content = (tmp_path / "file.sealed").read_bytes().partition(b"\n")
    assert len(seal) == 64 and json.loads(content) == value | {"d": None}


# Where it cannot be written


def test_a_cache_that_takes_nothing_is_one_line_before_anything_is_made(tmp_path: Path) -> None:
    """Here the place of the lock is taken by a link, which is not followed."""
    scores = tmp_path / "cache" / "scores"
    scores.mkdir(parents=True)
    (scores / "key.sealed.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=rf"^cache_root: cannot write to {scores} \(.*\)$"):
        computed_once(scores / "key.sealed", lambda: pytest.fail("too early"))
    assert not (tmp_path / "elsewhere").exists()


def refuse_to_flush(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache" / "file.sealed"
    with monkeypatch.context() as patch, pytest.raises(BadInput, match=r"cannot write to .*No space left on device\)$"):
        patch.setattr(os, "fsync", refuse_to_flush)
        computed_once(file, dict)
    assert [entry.name for entry in file.parent.iterdir()] == ["file.sealed.lock"]
    assert computed_once(file, lambda: {"value": 7}) == {"value": 7}


def test_an_error_of_the_making_is_not_one_of_the_cache(tmp_path: Path) -> None:
    def fail() -> dict[str, int]:
        raise FileNotFoundError("no data")

    file = tmp_path / "file.sealed"
    with pytest.raises(FileNotFoundError, match=r"^no data$"):
        computed_once(file, fail)
    assert not file.exists()
    assert computed_once(file, lambda: {"value": 1}) == {"value": 1}


def test_to_an_intact_file_nothing_is_written(tmp_path: Path) -> None:
    """So a cache may be read-only: no lock is taken."""
    computed_once(tmp_path / "file.sealed", lambda: {"value": 7})
    (tmp_path / "file.sealed.lock").unlink()
    computed_once(tmp_path / "file.sealed", lambda: pytest.fail("it is there"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.sealed"]


def test_what_a_kill_leaves_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.kill(os.getpid(), signal.SIGKILL))
        victim = get_context("fork").Process(target=computed_once, args=(tmp_path / "file.sealed", dict))
        victim.start()
        victim.join()
    assert victim.exitcode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2
    computed_once(tmp_path / "file.sealed", dict)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file.sealed", "file.sealed.lock"]


# Several at once


def test_of_several_that_want_it_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    made, got = [], []

    def make() -> dict[str, int]:
        made.append(1)
        time.sleep(0.2)
        return {"value": 7}

    threads = in_threads(4, lambda: got.append(computed_once(tmp_path / "deep" / "file.sealed", make)))
    for thread in threads:
        thread.join(timeout=60)
    assert got == [{"value": 7}] * 4 and len(made) == 1


def in_threads(count: int, do: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=do) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads
