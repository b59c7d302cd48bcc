"""The cache of pruned models: built once, checked at every use, safe against kills, damage and rivals."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lors.prune import pruned_checkpoint

FORK = multiprocessing.get_context("fork")


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=32
    )
    return LlamaForCausalLM(config).bfloat16()


class Builder:
    """Builds the same model every time and counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self) -> LlamaForCausalLM:
        self.calls += 1
        return small_llama()


class Files:
    """Something that saves itself as two files, slowly or only in part."""

    def __init__(self, wait: float = 0.0, die: bool = False, fail: bool = False):
        self.wait, self.die, self.fail = wait, die, fail

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{}")
        time.sleep(self.wait)
        if self.die:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fail:
            raise OSError("disk full")
        (Path(folder) / "model.safetensors").write_bytes(b"weights")


def test_a_sweep_prunes_once(tmp_path, caplog):
    build = Builder()
    folder = pruned_checkpoint(tmp_path / "new" / "cache", "wanda-0.5", build)
    assert folder == tmp_path / "new" / "cache" / "wanda-0.5"
    for _ in range(3):
        assert pruned_checkpoint(tmp_path / "new" / "cache", "wanda-0.5", build) == folder
    assert build.calls == 1
    pruned_checkpoint(tmp_path / "new" / "cache", "wanda-0.6", build)
    assert build.calls == 2
    assert not caplog.records
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for (name, parameter), expected in zip(loaded.named_parameters(), small_llama().parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, expected), name


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def lose_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def edit_the_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 16', '"hidden_size": 32'))


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def garble_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"sha256": {"model.safe')


def strange_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1, 2]")


def binary_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00")


def empty_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def file_instead_of_folder(folder: Path) -> None:
    empty_folder(folder)
    folder.rmdir()
    folder.write_text("")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "model.safetensors is damaged"),
        (flip_a_byte, "model.safetensors is damaged"),
        (lose_the_weights, "model.safetensors is missing"),
        (edit_the_config, "config.json is damaged"),
        (lose_the_manifest, "manifest.json is missing"),
        (garble_the_manifest, "manifest.json cannot be read"),
        (strange_manifest, "manifest.json cannot be read"),
        (binary_manifest, "manifest.json cannot be read"),
        (empty_folder, "manifest.json is missing"),
        (file_instead_of_folder, "manifest.json cannot be read"),
    ],
)
def test_damage_is_noticed_once_and_repaired(tmp_path, caplog, damage, reason):
    build = Builder()
    folder = pruned_checkpoint(tmp_path, "key", build)
    intact = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert pruned_checkpoint(tmp_path, "key", build) == folder
    assert build.calls == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == intact
    pruned_checkpoint(tmp_path, "key", build)
    assert build.calls == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{folder}: {reason}; it is built again" in caplog.records[0].getMessage()


def test_a_killed_process_leaves_nothing_that_counts(tmp_path, caplog):
    victim = FORK.Process(target=pruned_checkpoint, args=(tmp_path, "key", lambda: Files(die=True)))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert not (tmp_path / "key").exists()
    folder = pruned_checkpoint(tmp_path, "key", Files)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert ["interrupted while being written" in record.getMessage() for record in caplog.records] == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_leftovers_beside_an_intact_folder_are_cleared_in_silence(tmp_path, caplog):
    pruned_checkpoint(tmp_path, "key", Files)
    (tmp_path / "key.partial").mkdir()
    pruned_checkpoint(tmp_path, "key", lambda: pytest.fail("it is intact"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]
    assert not caplog.records


def test_a_failed_build_leaves_nothing_and_its_error_passes(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        pruned_checkpoint(tmp_path, "key", lambda: Files(fail=True))
    assert not (tmp_path / "key").exists()
    assert json.loads((pruned_checkpoint(tmp_path, "key", Files) / "manifest.json").read_text())["key"] == "key"


def test_of_two_processes_one_builds(tmp_path):
    journal = tmp_path / "journal"

    def build() -> Files:
        with journal.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return Files(wait=0.3)

    rivals = [FORK.Process(target=pruned_checkpoint, args=(tmp_path / "cache", "key", build)) for _ in range(3)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join()
    assert [rival.exitcode for rival in rivals] == [0, 0, 0]
    assert len(journal.read_text().splitlines()) == 1
    folder = pruned_checkpoint(tmp_path / "cache", "key", lambda: pytest.fail("it was built already"))
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("key", ["", "..", "a/b", "/tmp/x", ".hidden"])
def test_a_key_is_a_file_name(tmp_path, key):
    with pytest.raises(ValueError, match="key="):
        pruned_checkpoint(tmp_path, key, Builder())
