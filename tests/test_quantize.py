"""GPTQ on the support, against a literal one, and the walk that quantises a model."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_llama
from contract import batch, logits, pruned
from hypothesis import given
from hypothesis import strategies as st
from pruning_problems import REPEATABLE, coarse_problems, correlated
from torch import Tensor
from transformers import AutoModelForCausalLM

import lors
from lors.blocks import decoder_linears
from lors.kernels import PackedWeight, decode, merge_on_grid, pack
from lors.kernels.integers import grid_of
from lors.pruning import gram_matrix, prune_magnitude, prune_model, quantize_gptq, quantize_model, quantize_rtn
from lors.storage import CompressedLinear, is_quantized


def gptq_by_hand(W: Tensor, X: Tensor, bits: int, group: int) -> Tensor:
    """In float64: a fresh inverse of what is left of H per column, eager updates, zeros put back in their turn."""
    W, H = W.double().clone(), X.double().T @ X.double()
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    M, rows, width = W != 0, *W.shape
    for j in range(width):
        if j % group == 0:
            S, z = grid_of(W[:, j : j + group] * M[:, j : j + group], f"int{bits}/{group}")
        inverse = torch.linalg.inv(H[j:, j:])
        for i in range(rows):
            s, zero, w = float(S[i, 0]), int(z[i, 0]), float(W[i, j])
            q = s * (max(0, min(2**bits - 1, round(w / s) + zero)) - zero) if M[i, j] else 0.0
            W[i, j:] -= (w - q) / inverse[0, 0] * inverse[0]
            W[i, j] = q
    return W


@pytest.mark.parametrize(("bits", "group", "block"), [(4, 8, 128), (4, 8, 1), (2, 5, 10), (8, 24, 24), (4, 64, 7)])
@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_gptq_is_the_literal_one_whatever_the_block(bits, group, block, zeros):
    W, X = correlated(rows=6, width=24, tokens=40)
    W = prune_magnitude(W, sparsity=zeros, pattern="unstructured").double()
    packed = quantize_gptq(W, X.double().T @ X.double(), layout=f"int{bits}/{group}", block_size=block)
    torch.testing.assert_close(decode(packed), gptq_by_hand(W, X, bits, group))
    assert (decode(packed)[W == 0] == 0).all()


def test_gptq_changes_the_output_less_than_rounding():
    W, X = correlated(rows=32, width=64, tokens=200)
    W = prune_magnitude(W, sparsity=0.5, pattern="unstructured")
    near, adjusted = quantize_rtn(W, layout="int4/16"), quantize_gptq(W, gram_matrix(X), layout="int4/16")
    lost = [(X @ (decode(packed) - W).T).square().sum() for packed in (near, adjusted)]
    assert lost[1] < 0.7 * lost[0]


@REPEATABLE
@given(problem=coarse_problems(), bits=st.sampled_from([2, 4, 8]), group=st.integers(1, 9))
def test_zeros_stay_whatever_the_weight_and_the_inputs(problem, bits, group):
    W, X, _, _ = problem
    for packed in (
        quantize_rtn(W, layout=f"int{bits}/{group}"),
        quantize_gptq(W, gram_matrix(X), layout=f"int{bits}/{group}"),
    ):
        quantised = decode(packed)
        assert quantised.isfinite().all() and (quantised[W == 0] == 0).all()
        codes = packed.parts[1]
        assert codes.dtype == torch.uint8 and packed.layout == f"int{bits}/{group}"


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_model_is_quantised_block_by_block_and_computes_with_its_new_weights(quantizer):
    model, dense = pruned(), pruned()
    tokens = batch(8)["input_ids"] if quantizer == "gptq" else None
    quantize_model(model, quantizer, bits=4, group=16, calibration=tokens)
    for name, W in decoder_linears(dense).items():
        layer = decoder_linears(model)[name]
        assert is_quantized(layer) and layer.layout == "int4/16"
        assert (layer.weight[W.weight == 0] == 0).all() and not torch.equal(layer.weight, W.weight)
        W.weight.data.copy_(layer.weight)
    torch.testing.assert_close(logits(model), logits(dense))
    with pytest.raises(ValueError, match=r"q_proj: is compressed already \(int4/16\)"):
        quantize_model(model, "rtn")


def test_what_cannot_be_quantised_is_refused_before_anything_is_changed():
    model = make_tiny_llama()
    for quantizer, options, message in (
        ("fp4", {}, "quantizer='fp4': allowed are rtn, gptq, nf4"),
        ("nf4", {"bits": 2}, "bits=2: must be 4 with quantizer='nf4'"),
        ("nf4", {"group": 0}, "group=0: must be a whole number >= 1"),
        ("rtn", {"bits": 3}, "bits=3: must be one of 2, 4, 8"),
        ("rtn", {"damping": 0.1}, "damping is not an option of rtn: allowed are none"),
        ("gptq", {}, "calibration: got None"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_model(model, quantizer, **options)
    assert not any(isinstance(layer, CompressedLinear) for layer in decoder_linears(model).values())
    quantize_model(model, "rtn")
    with pytest.raises(ValueError, match="compressed"):
        prune_model(model, "magnitude", sparsity=0.5, pattern="unstructured", calibration=None)


def test_codes_of_another_model_do_not_replace_its_weights(tmp_path) -> None:
    """Nor those that an earlier model has left in the folder; a model that is refused stays as it is."""
    quantised, other = make_tiny_llama(), make_tiny_llama(seed=5)
    quantize_model(quantised, "rtn", group=16)
    lors.save_quantized(quantised, tmp_path)
    saved = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="does not belong to the model beside it"):
        lors.load_quantized(other, tmp_path)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in other.state_dict().items())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert is_quantized(lors.load_quantized(again, tmp_path).model.layers[0].mlp.up_proj)
    lors.save_quantized(other, tmp_path)
    assert not (tmp_path / "quantization.safetensors").exists()


def test_a_group_of_almost_nothing_in_float16_is_a_group_of_zeros() -> None:
    W = torch.zeros(4, 128, dtype=torch.float16)
    W[0, :64] = torch.tensor([0, 6e-8, 1.2e-7, 0] * 16, dtype=torch.float16)
    gram = torch.eye(128)
    A, B = torch.zeros(2, 128), torch.zeros(4, 2)
    for packed in (pack(W, "int4/64"), quantize_gptq(W, gram, layout="int4/64")):
        assert decode(packed).isfinite().all()
        assert merge_on_grid(packed, A, B, 1.0, "int4/64", torch.float16).isfinite().all()
    assert merge_on_grid(PackedWeight("dense", (W,), (4, 128)), A, B, 1.0, "int4/64", torch.float16).isfinite().all()
