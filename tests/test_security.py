"""Nothing that lies in a model folder, a cache or a data set is executed, and nothing is written through a link."""

from __future__ import annotations

import ast
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from harness.device_lock import device_lock, device_name
from harness.errors import BadInput
from harness.run import execute

ROOT = Path(__file__).parents[1]
# What takes code from the Hub or from a folder unless it is told not to.
LOADERS = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "kind", "datasets")


def calls(file: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def test_every_loader_is_told_to_trust_no_code() -> None:
    checked = 0
    for file in [
        path for folder in ("lors", "harness", "baselines", "analysis") for path in (ROOT / folder).rglob("*.py")
    ]:
        for call in calls(file):
            name = call.func
            loads = isinstance(name, ast.Attribute) and name.attr in ("from_pretrained", "from_config", "load_dataset")
            if loads and isinstance(name.value, ast.Name) and name.value.id in LOADERS:
                options = {option.arg: option.value for option in call.keywords}
                trust = options.get("trust_remote_code")
                assert isinstance(trust, ast.Constant) and trust.value is False, f"{file}:{call.lineno}"
                checked += 1
    assert checked > 5


def test_code_in_a_model_folder_is_not_executed(composed, tiny_checkpoint, tmp_path, monkeypatch) -> None:
    """Neither without asking nor by the answer that somebody pipes in."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    mapping = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unknown", "auto_map": mapping}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(BadInput, match=r"^model\.path="):
        execute(composed("model=hf", f"model.path={folder}", f"cache_root={tmp_path}/c", f"runs_root={tmp_path}/r"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("laid", ["link", "pipe"])
def test_the_lock_of_a_device_is_no_link_and_no_pipe(tmp_path, laid: str) -> None:
    device = torch.device("cpu")
    place = tmp_path / f"{device_name(device)}.lock"
    place.symlink_to(tmp_path / "victim") if laid == "link" else os.mkfifo(place)
    if laid == "link":
        with (
            pytest.raises(BadInput, match="cache_root: cannot write"),
            device_lock(tmp_path, device, alone=True),
        ):
            pass
        assert not (tmp_path / "victim").exists()
    else:
        with device_lock(tmp_path, device, alone=True):
            pass
