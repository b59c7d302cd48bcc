"""What an adapter notes of the zeros of its base, and what it says on another one."""

from __future__ import annotations

import hashlib
import json
import warnings

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from pruned_models import adapted_model, logits, pruned_model
from transformers import PreTrainedModel

import lors
from lors.support import support_of


def test_the_fingerprint_is_the_hash_of_names_shapes_and_bits() -> None:
    weights = {"b": torch.randn(3, 10), "a": torch.randn(5, 4)}
    for W in weights.values():
        W[torch.rand(W.shape) < 0.5] = -0.0
    expected = hashlib.sha256()
    for name in ("a", "b"):
        W = weights[name].numpy()
        expected.update(f"{name}\0{W.shape[0]}x{W.shape[1]}\0".encode())
        expected.update(np.packbits(W != 0, axis=1, bitorder="little").tobytes())
    found = support_of({name: lambda W=W: W for name, W in weights.items()})
    assert found["sha256"] == expected.hexdigest()
    zeros = sum(int((W == 0).sum()) for W in weights.values())
    assert found["sparsity"] == pytest.approx(zeros / 50)
    assert found["pattern"] == "unstructured"


@pytest.mark.parametrize(
    ("kept", "m", "pattern"), [(2, 4, "2:4"), (1, 4, "1:4"), (4, 8, "4:8"), (1, 2, "1:2"), (4, 4, "unstructured")]
)
def test_an_nm_pattern_is_told(kept: int, m: int, pattern: str) -> None:
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(64, 32 // m, m, generator=generator).argsort(-1).argsort(-1)
    W = (torch.rand(64, 32, generator=generator) + 1) * (order < kept).flatten(1)
    assert support_of({"W": lambda: W})["pattern"] == pattern


def test_dtype_storage_and_a_merged_adapter_do_not_change_it() -> None:
    found = {
        adapted_model(pruned_model(dtype, "2:4"), storage=storage).peft_config["default"].support["sha256"]
        for dtype in (torch.float32, torch.bfloat16)
        for storage in ("dense", "bitmap", "n:m")
    }
    packed = adapted_model(pruned_model(torch.float32, "2:4"), storage="n:m")
    packed.merge_adapter()
    packed.add_adapter("second", lors.LorsConfig(r=2))
    assert found == {packed.peft_config["second"].support["sha256"]}


def dense_model() -> PreTrainedModel:
    model = pruned_model()
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    return model


@pytest.mark.parametrize("kind", ["lors", "sqft"])
def test_another_base_gives_one_line_or_an_error(kind: str, tmp_path) -> None:
    from baselines.sqft import SqftConfig

    config = lors.LorsConfig(r=4) if kind == "lors" else SqftConfig(r=4)
    model = get_peft_model(pruned_model(), config)
    assert config.support is None, "the config of the user is not written to"
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["support"]
    assert saved["pattern"] == "unstructured"
    assert saved["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert len(saved["sha256"]) == 64

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(pruned_model(pattern="2:4"), config)  # one config serves several models
        PeftModel.from_pretrained(pruned_model(), tmp_path)
        PeftModel.from_pretrained(pruned_model(torch.bfloat16), tmp_path)
    changed, dense = pruned_model(), dense_model()
    W = changed.model.layers[1].mlp.up_proj.weight
    W.data[tuple((W != 0).nonzero()[0])] = 0  # one zero more
    for other, described in ((pruned_model(pattern="2:4"), "2:4"), (dense, "sparsity 0,"), (changed, "sparsity 0.5")):
        with pytest.warns(UserWarning, match=r"'default' was made for a base with other zeros") as caught:
            PeftModel.from_pretrained(other, tmp_path)
        assert [issubclass(w.category, UserWarning) for w in caught].count(True) == 1
        assert described in str(next(w for w in caught if issubclass(w.category, UserWarning)).message)
    strict = PeftConfig.from_pretrained(tmp_path)
    strict.other_support = "error"
    base = pruned_model(pattern="2:4")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="was made for a base with other zeros"):
        PeftModel.from_pretrained(base, tmp_path, config=strict)
    assert [name for name, _ in base.named_modules()] == names


def test_a_dense_model_is_told_that_it_has_no_zero_to_keep() -> None:
    with pytest.warns(UserWarning, match="have no zero to keep") as caught:
        get_peft_model(dense_model(), lors.LorsConfig(r=2))
    assert [issubclass(w.category, UserWarning) for w in caught].count(True) == 1


def test_the_card_says_what_to_import(tmp_path) -> None:
    adapted_model().save_pretrained(tmp_path / "lors")
    adapted_model().save_pretrained(tmp_path / "lors")  # again: the line is there once
    from baselines.spp import SppConfig

    get_peft_model(pruned_model(), SppConfig(r=2)).save_pretrained(tmp_path / "spp")
    for folder, package in (("lors", "lors"), ("spp", "baselines")):
        text = (tmp_path / folder / "README.md").read_text()
        body = text.split("---\n", 2)[2].lstrip()
        assert body.splitlines()[0].startswith(f"`import {package}` before PEFT loads this adapter")
        assert text.count("before PEFT loads") == 1
        assert "library_name: peft" in text
    assert logits(PeftModel.from_pretrained(pruned_model(), tmp_path / "lors")).isfinite().all()
