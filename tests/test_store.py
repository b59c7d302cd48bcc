"""The run folder: results, atomic files, parts, lock, and what is recorded about the machine."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from harness.config import resolve
from harness.environment import environment
from harness.errors import BadInput
from harness.files import check_writable, write_json, write_text
from harness.identity import run_key
from harness.store import Busy, RunStore

ROOT = Path(__file__).parents[1]
FORCED = OmegaConf.create({"force": True})


def test_the_cache_is_that_of_the_user_unless_it_is_given(
    composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Path(resolve(composed()).cache_root) == tmp_path / "lors"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Path(resolve(composed()).cache_root) == Path.home() / ".cache" / "lors"
    assert Path(resolve(composed("cache_root=here")).cache_root) == Path.cwd() / "here"


def test_results_are_strict_json_and_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path / "run")
    assert store.result() is None
    store.write({"status": "ok", "value": math.nan, "nested": [{"peak": math.inf}], "pair": (1, 2.5)})
    assert store.result() == {
        "status": "ok", "value": None, "nested": [{"peak": None}], "pair": [1, 2.5], "key": "run"
    }  # fmt: skip

    def crash(*_: object) -> None:
        raise RuntimeError("killed here")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(RuntimeError, match="killed here"):
        store.write({"status": "failed"})
    assert store.result()["status"] == "ok"


DAMAGE = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda _: "",
    "object": lambda _: "{}",
    "list": lambda _: "[]",
    "deep": lambda _: "[" * 100_000,
    "changed": lambda text: text.replace("0.5", "0.9"),
    "status": lambda text: text.replace('"ok"', '"fine"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_one_line_and_counts_as_absent(tmp_path: Path, caplog, damage: str) -> None:
    store = RunStore(tmp_path / "run")
    store.write({"status": "ok", "accuracy": 0.5})
    assert "sha256" not in store.result()
    store.result_file.write_text(DAMAGE[damage](store.result_file.read_text()))
    assert store.result() is None
    assert str(store.result_file) in caplog.text and caplog.text.count("\n") == 1
    store.write({"status": "ok", "accuracy": 0.7})
    assert store.result()["accuracy"] == 0.7


def test_a_result_from_before_digests_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "run" / "result.json", {"key": "run", "status": "ok"})
    assert RunStore(tmp_path / "run").result() == {"key": "run", "status": "ok"}


def test_a_result_of_another_run_is_not_taken_for_this_one(tmp_path: Path) -> None:
    RunStore(tmp_path / "run").write({"status": "ok"})
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert RunStore(tmp_path / "copy").result() is None


def test_a_good_result_gives_way_only_to_a_good_one(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    store.write({"status": "ok", "round": 1, "artifacts": {"adapter": "adapter", "merged": "merged"}})
    for name in ("adapter/weights", "merged/weights", "log.txt"):
        write_text(store.directory / name, "first")
    attempt = store.attempt(FORCED)
    assert attempt.directory != store.directory
    attempt.once("memory", lambda: 7)
    assert store.attempt(FORCED).once("memory", lambda: 8) == 7, "an interrupted repetition is continued"
    attempt.write({"status": "failed", "round": 2})
    store.accept(attempt)
    assert store.result()["round"] == 1
    attempt = store.attempt(FORCED)
    assert attempt.once("memory", lambda: 8) == 8, "a failed one is not"
    attempt.write({"status": "ok", "round": 3, "artifacts": {"adapter": "adapter", "merged": None}})
    write_text(attempt.directory / "adapter" / "weights", "third")
    store.accept(attempt)
    assert store.result()["round"] == 3
    assert (store.directory / "adapter" / "weights").read_text() == "third"
    assert not (store.directory / "merged").exists() and not attempt.directory.exists()


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_kill_while_a_good_result_replaces_another_leaves_a_good_one(tmp_path: Path, monkeypatch, moves: int) -> None:
    store = RunStore(tmp_path / "run")
    store.write({"status": "ok", "round": 1, "artifacts": {"adapter": "adapter"}})
    attempt = store.attempt(FORCED)
    for name in ("adapter/weights", "log.txt"):
        write_text(attempt.directory / name, "second")
    attempt.write({"status": "ok", "round": 2, "artifacts": {"adapter": "adapter", "log": "log.txt"}})
    moved, replace = [], Path.replace

    def killed(self: Path, target: Path) -> Path:
        if len(moved) == moves:
            raise KeyboardInterrupt
        moved.append(target)
        return replace(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed)
        store.accept(attempt)
    assert store.result()["status"] == "ok"
    store.settle()
    assert store.result()["round"] == 2
    assert (store.directory / "adapter" / "weights").read_text() == "second"


def test_what_kills_have_left_goes_and_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_text(outside / "file", "keep me")
    store = RunStore(tmp_path / "run")
    write_text(store.directory / ".result.json.0123.tmp", "half")
    (store.directory / "checkpoint-abc").symlink_to(outside)
    (store.directory / "checkpoint-5").write_text("a file")
    assert store.attempt(OmegaConf.create({"force": False})).directory == store.directory
    store.drop_progress()
    assert [entry.name for entry in store.directory.iterdir()] == ["config.yaml"]
    (store.directory / "adapter").symlink_to(outside)
    store.clear()
    assert (outside / "file").read_text() == "keep me"


def test_a_temporary_file_follows_no_link(tmp_path: Path, monkeypatch) -> None:
    """Somebody else may write in a shared folder: a name that could be guessed might lie there already."""
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".file.guessed.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file", "new")
    assert victim.read_text() == "keep me"


def finished_run(composed, folder: Path, *overrides: str, **result: object) -> tuple[RunStore, DictConfig]:
    cfg = resolve(composed(f"runs_root={folder}", *overrides))
    store = RunStore.of(cfg)
    store.write({"status": "ok", "artifacts": {"merged": None}, **result})
    return store, cfg


def test_what_makes_a_run_unnecessary(composed, tmp_path: Path) -> None:
    store, cfg = finished_run(composed, tmp_path)
    assert store.directory == tmp_path / "default" / run_key(cfg)
    assert store.finished(cfg)["status"] == "ok"
    assert store.finished(resolve(composed("force=true"))) is None
    for asked in ("save_merged=true", "save_base=true"):
        assert store.finished(resolve(composed(asked))) is None
        assert store.finished(resolve(composed(asked, "mode=simulate")))["status"] == "ok", "it writes no model"
    store, cfg = finished_run(composed, tmp_path, "save_merged=true", end_state="adapter", variants={})
    assert store.finished(cfg)["status"] == "ok", "it has nothing to merge"
    store, cfg = finished_run(composed, tmp_path, status="oom")
    assert store.finished(cfg) is None
    assert RunStore(tmp_path / "nothing").finished(cfg, since=0) is None


def test_in_a_sweep_any_result_since_its_beginning_stands(composed, tmp_path: Path) -> None:
    store, cfg = finished_run(composed, tmp_path, "force=true", status="failed")
    written = store.result_file.stat().st_mtime_ns
    assert store.finished(cfg, since=written - 1)["status"] == "failed"
    assert store.finished(cfg, since=written) is None


def test_busy_is_a_run_that_another_process_is_at(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    assert not store.busy() and not store.directory.exists(), "looking leaves nothing behind"
    with store.lock():
        assert RunStore(tmp_path / "run").busy()
        with pytest.raises(Busy), RunStore(tmp_path / "run").lock():
            pass
    assert not store.busy()


def test_a_full_disk_is_one_line_and_leaves_no_half_files(tmp_path: Path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = RunStore(tmp_path / "run")
    check_writable("runs_root", store.directory)
    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: check_writable("runs_root", store.directory), lambda: store.write({"status": "ok"})):
        with pytest.raises(
            BadInput, match=r"^runs_root: cannot write to .*/run \(\[Errno 28\] No space left on device\)$"
        ):
            write()
    assert list(store.directory.iterdir()) == []


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch) -> None:
    """There filelock would make do with a file, which outlives a killed process."""

    def missing(descriptor: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(
        BadInput, match=r"^cache_root: cannot write to .*/cache \(its file system must have locks, flock"
    ):
        check_writable("cache_root", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_clear_keeps_the_lock_and_drop_progress_keeps_the_results(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for name in ("result.json", "steps.jsonl", "adapter/weights", "checkpoint-50/state", "parts/memory.sealed"):
        write_text(tmp_path / name, "x")
    store.drop_progress()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "result.json", "steps.jsonl"]
    with store.lock(waiting=lambda: None):
        store.clear()
    assert [entry.name for entry in tmp_path.iterdir()] in ([], [".lock"])


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    """The other process says that it waits, gets the lock only after this one lets go, and sees its result."""
    code = (
        "import sys; from pathlib import Path; from harness.store import RunStore\n"
        "store = RunStore(Path(sys.argv[1]))\n"
        "with store.lock(waiting=lambda: print('waiting', flush=True)): print(store.result()['status'])"
    )
    store = RunStore(tmp_path)
    with store.lock(waiting=lambda: pytest.fail("nobody else is here")):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert other.stdout.readline() == "waiting\n"
        store.write({"status": "ok"})
    assert other.communicate(timeout=60)[0] == "ok\n"


def test_environment_names_code_libraries_and_machine() -> None:
    fields = environment(torch.device("cpu"))
    for name in ("torch", "transformers", "peft", "lm_eval", "python", "device", "start"):
        assert isinstance(fields[name], str) and fields[name], name
    assert fields["threads"] == torch.get_num_threads()
    assert fields["driver"] is None
    assert set(fields) >= {"git_commit", "git_dirty"}
