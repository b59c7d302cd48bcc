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

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, sentence, write_rows

from harness import shared
from harness.config import resolve
from harness.data import calibration_tokens, training_data
from harness.errors import BadInput
from harness.shared import made_once, shared_calibration, shared_rows
from harness.store import Damaged

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
    monkeypatch.setattr(shared.alpaca, "__file__", str(template))
    make()
    assert len(tokenised) == 7


# What is in a file


def flip_a_byte(file: Path) -> None:
    """Where numpy's format has no sum: in the list of the arrays, so that one of them is lost."""
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 33] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, 100)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def leave_the_content(file: Path) -> None:
    """A file of an older version has no seal."""
    file.write_bytes(file.read_bytes().partition(b"\n")[2])


def take_that_of_another_key(file: Path) -> None:
    (file.parent / "other.sealed").write_bytes(file.read_bytes())
    made_once(file.parent / "more.sealed", lambda: {"value": 7})
    file.write_bytes((file.parent / "more.sealed").read_bytes())


def put_a_folder_there(file: Path) -> None:
    file.unlink()
    (file / "full").mkdir(parents=True)


DAMAGE = [flip_a_byte, truncate, empty, leave_the_content, take_that_of_another_key, put_a_folder_there]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tokens_are_made_again_with_one_warning(damage, cfg, tokenised, tmp_path, caplog) -> None:
    run = cfg()
    before = shared_rows(run, TOKENIZER)
    [file] = (tmp_path / "cache" / "tokens").glob("*.sealed")
    damage(file)
    assert shared_rows(run, TOKENIZER) == before
    assert [f"{file}: damaged (" in line and "it is made again" in line for line in caplog.messages] == [True]
    assert shared_rows(run, TOKENIZER) == before
    assert len(tokenised) == 2 and len(caplog.messages) == 1


def test_what_is_sealed_but_of_another_form_is_made_again(cfg, tokenised, tmp_path, caplog) -> None:
    """As code that has changed would leave it."""

    def replace(**arrays: np.ndarray) -> None:
        content = shared._to_bytes(**arrays)
        file.write_bytes(shared._seal(file, content) + content)

    run = cfg()
    samples = shared_calibration(run, TOKENIZER)
    [file] = (tmp_path / "cache" / "tokens").glob("*.sealed")
    whole = np.zeros((2, 3), np.int64)
    for arrays in (
        {"tokens": whole[0]},
        {"tokens": whole.astype(float)},
        {"tokens": whole.astype(object)},
        {"other": whole},
        {"tokens": whole, "more": whole},
    ):
        replace(**arrays)
        assert torch.equal(shared_calibration(run, TOKENIZER), samples), arrays
    rows = shared_rows(run, TOKENIZER)
    file = next(other for other in file.parent.glob("*.sealed") if other != file)
    replace(lengths=np.array([2, 2]), input_ids=np.zeros(5, np.int32), labels=np.zeros(5, np.int32))
    assert shared_rows(run, TOKENIZER) == rows
    assert len(caplog.messages) == 6 and all("it is made again" in line for line in caplog.messages)
    assert tokenised == ["calibration_tokens"] * 6 + ["tokenised_rows"] * 2


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    file = tmp_path / "file.sealed"
    made_once(file, lambda: {"value": 0.25})
    content = file.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        with pytest.raises(Damaged, match=f"^{file}: damaged "):
            shared._read(file, shared._from_json)


@pytest.mark.parametrize("content", [b"[]", b"7", b"null", b'{"value": ', b"\xff", b"[" * 100_000])
def test_json_that_is_no_object_is_made_again(content: bytes, tmp_path: Path, caplog) -> None:
    file = tmp_path / "file.sealed"
    file.write_bytes(shared._seal(file, content) + content)
    assert made_once(file, lambda: {"value": 7}) == {"value": 7}
    assert len(caplog.messages) == 1
    assert made_once(file, lambda: pytest.fail("it is there")) == {"value": 7}


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    value = {"a": [0.1, None, "ü"], "b": {"c": float("inf")}}
    for _ in range(2):
        assert made_once(tmp_path / "file.sealed", lambda: value) == value
    seal, _, content = (tmp_path / "file.sealed").read_bytes().partition(b"\n")
    assert len(seal) == 64 and json.loads(content) == value


# Where it cannot be written


def file_in_place_of_the_cache(cache: Path) -> None:
    cache.write_text("")


def folder_in_place_of_the_lock(cache: Path) -> None:
    (cache / "scores" / "key.sealed.lock").mkdir(parents=True)


def link_in_place_of_the_lock(cache: Path) -> None:
    (cache / "scores").mkdir(parents=True)
    (cache / "scores" / "key.sealed.lock").symlink_to(cache / "elsewhere")


@pytest.mark.parametrize(
    "obstacle", [file_in_place_of_the_cache, folder_in_place_of_the_lock, link_in_place_of_the_lock]
)
def test_a_cache_that_takes_nothing_is_one_line_before_anything_is_made(obstacle, tmp_path: Path) -> None:
    obstacle(tmp_path / "cache")
    scores = tmp_path / "cache" / "scores"
    with pytest.raises(BadInput, match=rf"^cache_root: cannot write to {scores} \(.*\)$"):
        made_once(scores / "key.sealed", lambda: pytest.fail("too early"))
    assert not (tmp_path / "cache" / "elsewhere").exists()


def refuse_to_flush(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache" / "file.sealed"
    with monkeypatch.context() as patch, pytest.raises(BadInput, match=r"cannot write to .*No space left on device\)$"):
        patch.setattr(os, "fsync", refuse_to_flush)
        made_once(file, dict)
    assert [entry.name for entry in file.parent.iterdir()] == ["file.sealed.lock"]
    assert made_once(file, lambda: {"value": 7}) == {"value": 7}


def test_an_error_of_the_making_is_not_one_of_the_cache(tmp_path: Path) -> None:
    def fail() -> dict[str, int]:
        raise FileNotFoundError("no data")

    file = tmp_path / "file.sealed"
    with pytest.raises(FileNotFoundError, match=r"^no data$"):
        made_once(file, fail)
    assert not file.exists()
    assert made_once(file, lambda: {"value": 1}) == {"value": 1}


def test_to_an_intact_file_nothing_is_written(tmp_path: Path) -> None:
    """So a cache may be read-only: no lock is taken."""
    made_once(tmp_path / "file.sealed", lambda: {"value": 7})
    (tmp_path / "file.sealed.lock").unlink()
    made_once(tmp_path / "file.sealed", lambda: pytest.fail("it is there"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.sealed"]


def test_what_a_kill_leaves_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.kill(os.getpid(), signal.SIGKILL))
        victim = get_context("fork").Process(target=made_once, args=(tmp_path / "file.sealed", dict))
        victim.start()
        victim.join()
    assert victim.exitcode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2
    made_once(tmp_path / "file.sealed", dict)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file.sealed", "file.sealed.lock"]


# Several at once


def test_of_several_that_want_it_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    made, got = [], []

    def make() -> dict[str, int]:
        made.append(1)
        time.sleep(0.2)
        return {"value": 7}

    threads = in_threads(4, lambda: got.append(made_once(tmp_path / "deep" / "file.sealed", make)))
    for thread in threads:
        thread.join(timeout=60)
    assert got == [{"value": 7}] * 4 and len(made) == 1


def in_threads(count: int, do: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=do) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads
