"""Compressed weights on disk: they come back bit for bit, and become torch's semi-structured tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pruned_models import adapted_model, logits, pruned_model
from safetensors import safe_open
from torch import Tensor
from torch.sparse import to_sparse_semi_structured
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass
from transformers import AutoConfig, AutoModelForCausalLM

import lors
from lors.compressed_file import FILE, semi_structured
from lors.kernels import pack
from lors.sparsity import random_support


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_compressed_weights_come_back_bit_for_bit(tmp_path: Path, pattern: str, dtype: torch.dtype) -> None:
    model = pruned_model(dtype, pattern)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[0].mlp.up_proj.weight.data[:] = 0
    lors.save_compressed(model, tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        parts = {name.rpartition(".")[2] for name in file.keys()}  # noqa: SIM118
    assert ("bits" if pattern == "unstructured" else "codes") in parts
    assert {entry.name for entry in tmp_path.iterdir()} == {FILE, "config.json", "generation_config.json"}

    weights, expected = lors.load_compressed(tmp_path), model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    again = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    again.load_state_dict(weights)
    assert dtype != torch.float32 or torch.equal(logits(again), logits(model))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "3:8", "5:16", "unstructured"])
def test_every_layout_and_odd_widths(tmp_path: Path, pattern: str) -> None:
    model = pruned_model()
    linear = model.model.layers[0].self_attn.q_proj
    shape = (7, 45 if pattern == "unstructured" else 48)
    W = torch.randn(shape) * random_support(shape, None, pattern, torch.Generator().manual_seed(0))
    linear.weight = torch.nn.Parameter(W)
    lors.save_compressed(model, tmp_path)
    assert torch.equal(lors.load_compressed(tmp_path)["model.layers.0.self_attn.q_proj.weight"], W)


def test_a_model_that_is_compressed_in_memory_is_saved_alike_and_one_with_adapters_is_refused(tmp_path: Path) -> None:
    model = adapted_model(storage="bitmap")
    with pytest.raises(ValueError, match="has adapters"):
        lors.save_compressed(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    lors.save_compressed(model.unload(), tmp_path)
    assert all(torch.equal(lors.load_compressed(tmp_path)[name], W) for name, W in pruned_model().state_dict().items())


def two_four(dtype: torch.dtype) -> Tensor:
    """A 2:4 weight in which some groups have fewer than two values."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(64, 128, generator=generator) * random_support((64, 128), None, "2:4", generator)
    return (W * (torch.rand(W.shape, generator=generator) > 0.1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_converter_gives_the_tensor_of_torch(dtype: torch.dtype) -> None:
    W = two_four(dtype)
    sparse = semi_structured(*pack(W, "2:4").parts)
    assert sparse.shape == W.shape and torch.equal(sparse.to_dense(), W)
    full = torch.where(random_support((64, 128), None, "2:4", torch.Generator().manual_seed(1)), 1, 0).to(dtype)
    ours = semi_structured(*pack(full, "2:4").parts)
    values, meta = sparse_semi_structured_from_dense_cutlass(full)
    assert torch.equal(ours.packed, values) and torch.equal(ours.meta, meta)
    with pytest.raises(ValueError, match="must be those of a 2:4 weight"):
        semi_structured(*pack(W.float(), "2:4").parts)


@pytest.mark.gpu
def test_the_converted_tensor_multiplies_as_that_of_torch() -> None:
    if torch.cuda.get_device_capability()[0] != 8:
        pytest.skip("torch's CUTLASS kernels are for capability 8.x")
    W, x = two_four(torch.bfloat16).cuda(), torch.randn(32, 128, dtype=torch.bfloat16, device="cuda")
    y = torch.nn.functional.linear(x, semi_structured(*pack(W, "2:4").parts))
    torch.testing.assert_close(y, torch.nn.functional.linear(x, W))
    torch.testing.assert_close(y, torch.nn.functional.linear(x, to_sparse_semi_structured(W)))
