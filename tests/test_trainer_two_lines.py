"""The README's two-line use of the library runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from pruned_models import pruned_model, weights
from transformers import LlamaForCausalLM

README = Path(__file__).parents[1] / "README.md"


def snippet() -> str:
    """The README's Python block that wraps a model."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if "get_peft_model" in block]
    return block


def test_snippet_fine_tunes_and_keeps_the_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets a pruned ``model`` and a ``train_dataset``; its files go to a temporary folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = pruned_model()
    before = weights(model)
    rows = (torch.arange(32)[:, None] + torch.arange(12)) % 64
    names = {"model": model, "train_dataset": [{"input_ids": row, "labels": row} for row in rows]}
    exec(snippet(), names)

    assert type(names["model"]) is LlamaForCausalLM
    after = weights(names["model"])
    assert after.keys() == before.keys()
    for name, weight in after.items():
        assert not weight[before[name] == 0].any(), name
        assert not torch.equal(weight, before[name]), name


def test_library_takes_two_lines_of_it() -> None:
    """One import and one call beside what any Trainer needs."""
    needed = [line for line in snippet().splitlines() if "lors" in line and "initialize" not in line]
    assert len(needed) == 2
