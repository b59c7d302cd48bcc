"""The run folder: keys, atomic files, parts, lock, and what is recorded about the machine."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from lors.harness.environment import environment
from lors.harness.store import (
    Busy,
    RunStore,
    cache_directory,
    fingerprint,
    local_path,
    read_json,
    run_key,
    write_json,
    write_text,
)
from lors.harness.validate import BadInput, resolve

ROOT = Path(__file__).parents[1]


@pytest.fixture
def key(composed) -> Callable[..., str]:
    """Function from overrides to the key of their run."""
    return lambda *overrides: run_key(resolve(composed(*overrides)))


@pytest.mark.parametrize(
    "override",
    [
        "force=true",
        "name=other",
        "runs_root=/elsewhere",
        "cache_root=/elsewhere",
        "save_merged=true",
        "launch=torchrun",
        "only=failed",
        "+train.tuned.sqft=0.1",  # the rate of another method
        "train.checkpoint_every=7",
        "sparsity=0.5",  # what null stands for
        "prune.text=microworld",  # likewise
    ],
)
def test_what_cannot_change_the_numbers_is_not_in_the_key(key, override: str) -> None:
    assert key(override) == key()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "sparsity=0.6",
        "pattern=2:4",
        "method=lora",
        "prune=magnitude",
        "prune.seed=1",
        "adapter.r=8",
        "method.peft.exact_gradient=true",
        "train.steps=151",
        "train.epochs=1",
        "eval.limit=3",
        "mode=profile",
        "data.loss_on=answer",
    ],
)
def test_what_can_change_the_numbers_is_in_the_key(key, override: str) -> None:
    assert key(override) != key()


def test_steps_do_not_count_once_epochs_replace_them(key) -> None:
    assert key("train.epochs=2", "train.steps=7") == key("train.epochs=2")


def test_a_pruner_does_not_count_where_nothing_is_pruned(key) -> None:
    assert key("sparsity=0") == key("sparsity=0", "prune=magnitude") == key("sparsity=0", "prune=none")


def test_a_profile_does_not_depend_on_data_scores_or_where_the_weights_would_be(key) -> None:
    profile = ["mode=profile", "model=llama2_7b"]
    assert key(*profile) == key(*profile, "data=alpaca", "eval=zeroshot", "model.path=my/copy")
    assert key(*profile) != key(*profile, "model.layers=2")


def test_keys_follow_the_content_of_local_sources_not_their_place(key, tmp_path: Path) -> None:
    here, there, other = (tmp_path / name for name in ("here.jsonl", "there.jsonl", "other.jsonl"))
    here.write_text('{"text": "one"}\n')
    there.write_text('{"text": "one"}\n')
    other.write_text('{"text": "two"}\n')
    keys = [key("data=text", f"data.path={file}") for file in (here, there, other)]
    assert keys[0] == keys[1] != keys[2]
    nested = [key(f"eval.perplexity.text={file}") for file in (here, there, other)]
    assert nested[0] == nested[1] != nested[2]


def test_fingerprint_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "weights").write_bytes(b"\0" * 10)
    first = fingerprint(folder)
    folder.rename(tmp_path / "moved")
    folder = tmp_path / "moved"
    (folder / "README.md").write_text("a model card says nothing about the numbers")
    (folder / ".hidden").write_text("nor does this")
    assert fingerprint(folder) == first
    (folder / "deep" / "weights").write_bytes(b"\0" * 9 + b"\1")
    assert fingerprint(folder) != first
    (folder / "deep" / "weights").write_bytes(b"\0" * 10)
    (folder / "deep" / "weights").rename(folder / "weights")
    assert fingerprint(folder) != first


def test_sources_on_this_machine_and_elsewhere(tmp_path: Path) -> None:
    assert local_path(str(tmp_path)) == tmp_path
    assert local_path("owner/name") is None
    assert local_path(None) is None


def test_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory(OmegaConf.create({"cache_root": None})) == tmp_path / "lors"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory(OmegaConf.create({"cache_root": None})) == Path.home() / ".cache" / "lors"
    assert cache_directory(OmegaConf.create({"cache_root": "here"})) == Path.cwd() / "here"


def test_results_are_strict_json_and_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path / "run")
    assert store.result() is None
    store.write({"status": "ok", "value": math.nan, "nested": [{"peak": math.inf}], "pair": (1, 2.5)})
    assert store.result() == {"status": "ok", "value": None, "nested": [{"peak": None}], "pair": [1, 2.5]}

    def crash(*_: object) -> None:
        raise RuntimeError("killed here")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(RuntimeError, match="killed here"):
        store.write({"status": "half"})
    assert store.result()["status"] == "ok"


def test_a_damaged_json_file_counts_as_none(tmp_path: Path) -> None:
    write_text(tmp_path / "cut.json", '{"status": "o')
    assert read_json(tmp_path / "cut.json") is None
    write_json(tmp_path / "whole.json", {"a": 1})
    assert json.loads((tmp_path / "whole.json").read_text()) == {"a": 1}


def test_a_finished_part_is_not_computed_again(tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, int]:
        calls.append(1)
        return {"peak": 7}

    assert RunStore(tmp_path).once("memory", compute) == {"peak": 7}
    assert RunStore(tmp_path).once("memory", compute) == {"peak": 7}
    assert len(calls) == 1
    RunStore(tmp_path).drop_progress()
    assert RunStore(tmp_path).once("memory", compute) == {"peak": 7}
    assert len(calls) == 2
    assert RunStore(tmp_path).once("nothing", lambda: None) is None


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
    assert store.finished(resolve(composed("save_merged=true"))) is None
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
    store.check_writable()
    monkeypatch.setattr(os, "fsync", full)
    for write in (store.check_writable, lambda: store.write({"status": "ok"})):
        with pytest.raises(
            BadInput, match=r"^runs_root: cannot write to .*/run \(\[Errno 28\] No space left on device\)$"
        ):
            write()
    assert list(store.directory.iterdir()) == []


def test_a_file_at_rest_is_read_once_and_a_changed_one_again(tmp_path: Path, monkeypatch) -> None:
    """A sweep asks for the fingerprint of a model once per job."""
    file, reads = tmp_path / "weights", []
    digest_of = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: reads.append(1) or digest_of(*arguments))
    file.write_bytes(b"one")
    young = fingerprint(file), fingerprint(file)
    assert len(reads) == 2, "a change within the same tick of the clock must be seen"
    os.utime(file, ns=(1, 1))
    assert {fingerprint(file), fingerprint(file), *young} == {young[0]} and len(reads) == 3
    file.write_bytes(b"two")
    os.utime(file, ns=(2, 2))
    assert fingerprint(file) != young[0]


def test_clear_keeps_the_lock_and_drop_progress_keeps_the_results(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for name in ("result.json", "steps.jsonl", "adapter/weights", "checkpoint-50/state", "parts/memory.json"):
        write_text(tmp_path / name, "x")
    store.drop_progress()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "result.json", "steps.jsonl"]
    with store.lock(waiting=lambda: None):
        store.clear()
    assert [entry.name for entry in tmp_path.iterdir()] in ([], [".lock"])


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    """The other process says that it waits, gets the lock only after this one lets go, and sees its result."""
    code = (
        "import sys; from pathlib import Path; from lors.harness.store import RunStore\n"
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
