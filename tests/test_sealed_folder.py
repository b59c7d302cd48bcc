"""The cache of pruned models: built once, checked at every use, safe against kills, damage and rivals."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import DAMAGES, put_a_link
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from harness.sealed_folder import sealed_once

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
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text("{}")
        time.sleep(self.wait)
        if self.die:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fail:
            raise OSError("disk full")
        (Path(folder) / "model.safetensors").write_bytes(b"weights")


def test_a_sweep_prunes_once(tmp_path, caplog):
    build = Builder()
    folder = sealed_once(tmp_path / "new" / "cache", "wanda-0.5", build)
    assert folder == tmp_path / "new" / "cache" / "wanda-0.5"
    for _ in range(3):
        assert sealed_once(tmp_path / "new" / "cache", "wanda-0.5", build) == folder
    assert build.calls == 1
    sealed_once(tmp_path / "new" / "cache", "wanda-0.6", build)
    assert build.calls == 2
    assert not caplog.records
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for (name, parameter), expected in zip(loaded.named_parameters(), small_llama().parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, expected), name


def lay(name: str, content: str = "{}") -> Callable[[Path], None]:
    """What puts another file into a folder."""

    def laid(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    laid.__name__ = f"lay {name}"
    return laid


def lay_a_link(folder: Path) -> None:
    (folder / "more.safetensors").symlink_to(folder / "model.safetensors")


def take_the_seal_of_another_key(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"key": "key"', '"key": "other"'))


def put_a_file_in_place_of_the_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


DAMAGE = [
    *(("model.safetensors", damage, "model.safetensors is ") for damage in DAMAGES),
    *(("manifest.json", damage, "") for damage in DAMAGES),
    (".", put_a_link, "it is a link"),
    (".", lay("adapter_config.json"), "adapter_config.json is not in manifest.json"),
    (".", lay("sub/config.json"), "sub is not in manifest.json"),
    (".", lay_a_link, "more.safetensors is not in manifest.json"),
    (".", take_the_seal_of_another_key, "manifest.json is damaged"),
    (".", put_a_file_in_place_of_the_folder, "manifest.json is missing"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE)
def test_damage_is_noticed_once_and_repaired(tmp_path, caplog, name, damage, reason):
    """Also what ``from_pretrained`` would follow, such as an adapter beside the weights."""
    build = Builder()
    folder = sealed_once(tmp_path, "key", build)
    intact = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    assert sealed_once(tmp_path, "key", build) == folder
    assert build.calls == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == intact
    sealed_once(tmp_path, "key", build)
    assert build.calls == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{folder}: {reason}" in caplog.messages[0] and caplog.messages[0].endswith("; it is built again")


@pytest.mark.parametrize(
    "manifest",
    [None, {}, {"key": "key", "sha256": []}, {"key": "key", "sha256": {"config.json": []}}],
)
def test_a_manifest_of_another_form_is_damage(tmp_path, caplog, manifest):
    folder = sealed_once(tmp_path, "key", Files)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert sealed_once(tmp_path, "key", Files) == folder
    assert len(caplog.messages) == 1


def test_what_is_laid_where_it_is_written_is_not_followed(tmp_path):
    """Before, and while the model is made."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("")

    def lay_a_link_meanwhile() -> Files:
        (tmp_path / "key.partial").symlink_to(elsewhere)
        return Files()

    (tmp_path / "key.partial").symlink_to(elsewhere)
    with pytest.raises(FileExistsError):
        sealed_once(tmp_path, "key", lay_a_link_meanwhile)
    folder = sealed_once(tmp_path, "key", Files)
    assert not folder.is_symlink() and (folder / "manifest.json").is_file()
    assert [entry.name for entry in elsewhere.iterdir()] == ["precious"]


def test_to_an_intact_folder_nothing_is_written(tmp_path):
    """So a cache may be read-only: no lock is taken."""
    folder = sealed_once(tmp_path, "key", Files)
    (tmp_path / "key.lock").unlink()
    assert sealed_once(tmp_path, "key", lambda: pytest.fail("it is intact")) == folder
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_a_cache_that_takes_nothing_is_an_os_error_before_anything_is_built(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "cache")):
        sealed_once(tmp_path / "cache", "key", lambda: pytest.fail("too early"))


def test_a_killed_process_leaves_nothing_that_counts(tmp_path, caplog):
    victim = FORK.Process(target=sealed_once, args=(tmp_path, "key", lambda: Files(die=True)))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert not (tmp_path / "key").exists()
    folder = sealed_once(tmp_path, "key", Files)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert ["interrupted while being written" in record.getMessage() for record in caplog.records] == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_leftovers_beside_an_intact_folder_are_cleared_in_silence(tmp_path, caplog):
    sealed_once(tmp_path, "key", Files)
    (tmp_path / "key.partial").mkdir()
    sealed_once(tmp_path, "key", lambda: pytest.fail("it is intact"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]
    assert not caplog.records


def test_a_failed_build_leaves_nothing_and_its_error_passes(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        sealed_once(tmp_path, "key", lambda: Files(fail=True))
    assert [entry.name for entry in tmp_path.iterdir()] == ["key.lock"]
    assert json.loads((sealed_once(tmp_path, "key", Files) / "manifest.json").read_text())["key"] == "key"


def test_of_two_processes_one_builds(tmp_path):
    journal = tmp_path / "journal"

    def build() -> Files:
        with journal.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return Files(wait=0.3)

    rivals = [FORK.Process(target=sealed_once, args=(tmp_path / "cache", "key", build)) for _ in range(3)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join()
    assert [rival.exitcode for rival in rivals] == [0, 0, 0]
    assert len(journal.read_text().splitlines()) == 1
    folder = sealed_once(tmp_path / "cache", "key", lambda: pytest.fail("it was built already"))
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("key", ["", "..", "a/b"])
def test_a_key_is_a_file_name(tmp_path, key):
    with pytest.raises(ValueError, match="key="):
        sealed_once(tmp_path, key, Builder())
