"""Checkpoints on a disk that is full, cut off, or has strange things lying in it."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from callback_loop import with_callbacks
from conftest import recipe
from damage import cut, put_a_link
from test_train import assert_same_weights, fit, kill_at, lora, without_times
from torch import nn
from transformers import TrainerCallback

from harness import sealed_folder
from harness.checkpoints import drop_older, newest_intact, whole_or_gone
from harness.sealed_folder import seal
from harness.train import TrainOutcome

SHORT = recipe(steps=3, checkpoint_every=1, batch_size=1, gradient_accumulation=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, TrainOutcome]:
    """The model and the outcome of a training that nothing has disturbed."""
    return fit(lora(), tmp_path_factory.mktemp("whole"), SHORT)


def assert_goes_on(folder: Path, whole: tuple[nn.Module, TrainOutcome]) -> None:
    """The same command ends as the undisturbed training."""
    model, outcome = fit(lora(), folder, SHORT)
    assert_same_weights(whole[0], model)
    assert without_times(outcome.history) == without_times(whole[1].history)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trained.pt").write_bytes(b"weights")
    seal(path)
    return path


# ---- what counts


def put_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


@pytest.mark.parametrize(("name", "damage"), [("trained.pt", cut), (".", put_a_link), (".", put_a_file)])
def test_only_what_was_sealed_counts_and_nothing_else_stays_in_the_way(tmp_path, caplog, name, damage):
    """test_sealed_folder has all that can be wrong with a seal."""
    older, newer = checkpoint(tmp_path / "run", 2), checkpoint(tmp_path / "run", 10)
    damage(newer / name)
    assert newest_intact(tmp_path / "run") == older
    assert [record.getMessage() for record in caplog.records] == [
        f"{newer} is damaged or unfinished: going back to the checkpoint before it"
    ]
    assert not os.path.lexists(newer)
    if damage is put_a_link:
        assert len(list((tmp_path / "elsewhere-checkpoint-10").iterdir())) == 2, "a link is not followed"


STRAYS = {"checkpoint-abc": True, "checkpoint-": True, "checkpoint-05": True, "checkpoint-3.bak": False,
          "checkpoint-٣": False, "tmp-checkpoint-4": True, ".trained.pt.1.tmp": False}  # fmt: skip


def lay_strays(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, is_folder in STRAYS.items():
        (folder / name).mkdir() if is_folder else (folder / name).write_text("not ours")
    (folder / "checkpoint-link").symlink_to(folder)


def test_what_has_another_name_is_left_alone_with_a_line(tmp_path, caplog):
    lay_strays(tmp_path)
    newest = [checkpoint(tmp_path, step) for step in (1, 2, 9, 10)]
    assert newest_intact(tmp_path) == newest[-1]
    said = {record.getMessage() for record in caplog.records}
    strays = {*STRAYS, "checkpoint-link"}
    assert said == {
        f"{tmp_path / name} is no checkpoint of this run: left alone" for name in strays if name[:11] == "checkpoint-"
    }
    drop_older(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {*strays, "checkpoint-9", "checkpoint-10"}


def test_a_run_goes_on_among_stray_entries(tmp_path, whole):
    """The Trainer's own rotation counts them as checkpoints and deletes real ones for them."""
    lay_strays(tmp_path)
    os.utime(tmp_path / "checkpoint-abc", (2**32, 2**32))
    kill_at(2, lora(), tmp_path, SHORT)
    (tmp_path / "steps.jsonl").unlink()
    for name in ("checkpoint-3", "steps.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "target")
    (tmp_path / "checkpoint-4").write_text("")
    assert_goes_on(tmp_path, whole)
    assert {path.name for path in tmp_path.iterdir()} == {
        *STRAYS, "checkpoint-link", "checkpoint-2", "checkpoint-3", "steps.jsonl"
    }  # fmt: skip


def test_a_seal_is_written_beside_and_renamed(tmp_path):
    path = tmp_path / "checkpoint-1"
    path.mkdir()
    (path / "trained.pt").write_bytes(b"weights")
    (path / "manifest.json").symlink_to(tmp_path / "target")
    seal(path)
    assert not (tmp_path / "target").exists() and not (path / "manifest.json").is_symlink()
    assert newest_intact(tmp_path) == path


# ---- a full disk


class Then(TrainerCallback):
    """Does something at the start of the step after `step`."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step = step
        self.action = action

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()


def assert_one_line_and_nothing_lost(error: OSError, folder: Path, reason: str) -> None:
    line = rf"{folder}/checkpoint-3: cannot be written \(.*{reason}.*\); [\d.]+ MiB were free"
    assert re.fullmatch(line, str(error))
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", full)


def no_space_for_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.TrainerState.save_to_json", full)


def no_space_for_the_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_folder, "write_json", full)


@pytest.mark.parametrize("fault", [no_space_for_the_weights, no_space_for_the_state, no_space_for_the_seal])
def test_a_full_disk_is_one_line_and_the_next_start_goes_on(tmp_path, monkeypatch, whole, fault):
    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        fit(with_callbacks(lora(), Then(2, lambda: fault(patch))), tmp_path, SHORT)
    assert_one_line_and_nothing_lost(caught.value, tmp_path, "No space left on device")
    assert_goes_on(tmp_path, whole)


def test_a_file_that_the_system_cuts_off_is_one_line_too(tmp_path, whole):
    """PyTorch's writer says of it "unexpected pos 576 vs 534"; here the system allows no file above 4096 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = Then(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1])))
    try:
        with pytest.raises(OSError) as caught:
            fit(with_callbacks(lora(), limit), tmp_path, SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_line_and_nothing_lost(caught.value, tmp_path, "")
    assert_goes_on(tmp_path, whole)


def test_no_memory_left_stays_that(tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match="CUDA"), whole_or_gone(tmp_path / "checkpoint-1"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_older_checkpoint_goes_when_the_new_one_is_sealed(tmp_path, monkeypatch):
    """Not before: until then it is the one to go back to."""
    seen = []

    def watched(path: Path) -> None:
        seen.append({entry.name for entry in path.parent.glob("checkpoint-*")})
        seal(path)

    monkeypatch.setattr("harness.checkpoints.seal", watched)
    fit(lora(), tmp_path, SHORT)
    assert seen[-1] == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert {entry.name for entry in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
