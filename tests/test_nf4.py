"""Weights on the sixteen numbers of NF4: by definition, against bitsandbytes, under adapters, on disk, in a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_harness_run import SHORT, tiny  # noqa: F401 - a fixture
from test_integers import sparse
from torch import nn
from transformers import AutoModelForCausalLM

import lors
from baselines.sqft import SqftConfig
from harness.config import resolve
from harness.errors import BadInput
from harness.inputs import read_inputs
from harness.method_from_config import build_method
from harness.run import execute
from lors.blocks import decoder_linears
from lors.kernels import decode, nf4_layout, pack
from lors.kernels.nf4 import NUMBERS
from lors.storage import is_quantized

TOKENS = torch.arange(5, 45).view(2, 20)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    height=st.integers(1, 5),
    width=st.integers(1, 40),
    block=st.sampled_from([1, 3, 8, 64]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_number_is_the_nearest_of_sixteen_and_zero_stays_zero(seed, height, width, block, dtype):
    W = sparse(height, width, seed, dtype)
    packed = pack(W, nf4_layout(block))
    found = decode(packed)
    assert torch.equal(found[W == 0], torch.zeros(int((W == 0).sum()), dtype=dtype))
    for row, of_row in zip(W.tolist(), found.tolist(), strict=True):
        for start in range(0, width, block):
            numbers, got = row[start : start + block], of_row[start : start + block]
            largest = max(map(abs, numbers)) or 1.0
            for w, g in zip(numbers, got, strict=True):
                nearest = min(abs(largest * v - w) for v in NUMBERS)
                assert abs(g - w) <= nearest + 2 * torch.finfo(dtype).eps * largest
    assert torch.equal(decode(pack(found, nf4_layout(block))), found)
    assert packed.nbytes == height * (-(-width // block) * W.element_size() + -(-width // 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_layers_of_bitsandbytes_are_taken_over_number_for_number(dtype, nested):
    """The largest weight of a block has a number of its type, so nothing is lost but by double quantisation."""
    bnb = pytest.importorskip("bitsandbytes")
    W = sparse(64, 192, 3).to(dtype)
    layer = bnb.nn.Linear4bit(192, 64, quant_type="nf4", compute_dtype=dtype)
    layer.weight = bnb.nn.Params4bit(W.clone(), requires_grad=False, quant_type="nf4", compress_statistics=nested)
    layer = layer.to("cpu")
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    bias = layer.bias
    lors.take_nf4(nn.Sequential(layer))
    assert is_quantized(layer) and layer.layout == "nf4/64" and layer.bias is bias
    if nested:
        assert torch.allclose(layer.weight, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(layer.weight, expected)
        assert torch.equal(decode(pack(W, "nf4/64")), expected)
    assert torch.equal(layer.weight == 0, expected == 0)


def test_a_model_of_bitsandbytes_is_tuned_and_its_zeros_are_kept(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    plain = make_tiny_llama(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4)
    lors.prune(plain, "magnitude", sparsity=0.5)
    plain.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    with pytest.raises(ValueError, match=r"is quantised \(torch.uint8\).*lors.take_nf4 takes NF4 of bitsandbytes"):
        get_peft_model(model, lors.LorsConfig(r=4))
    lors.take_nf4(model)
    own = AutoModelForCausalLM.from_pretrained(tmp_path)
    lors.quantize(own, "nf4")
    assert torch.equal(model(TOKENS).logits, own(TOKENS).logits)
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    zeros = {name: layer.weight == 0 for name, layer in decoder_linears(plain).items()}
    for config in (lors.LorsConfig(r=4, init="kaiming"), SqftConfig(r=4), LoraConfig(r=4, target_modules="all-linear")):
        tuned = get_peft_model(model, config)
        loss = tuned(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.parameters() if p.requires_grad)
        with pytest.raises(ValueError, match="leave"):
            with torch.no_grad():
                for name, parameter in tuned.named_parameters():
                    parameter += 0.1 * ("_B" in name or "lora_B" in name)
            tuned.merge_and_unload()
        model = tuned.unload()
        assert all((layer.weight == 0)[zeros[name]].all() for name, layer in decoder_linears(model).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "fp4"}, r"0: fp4, blocks of 64: must be nf4, and divide 128"),
        ({"blocksize": 96}, r"0: nf4, blocks of 96: must be nf4, and divide 128"),
        ({"packing_format_for_cpu": True}, "0: must be on its device, and not have been run on a CPU"),
    ],
)
def test_what_cannot_be_taken_is_refused_and_left(changes, message):
    state = {"quant_type": "nf4", "blocksize": 64, "nested": False} | changes
    layer = type("Linear4bit", (nn.Linear,), {})(128, 4)
    layer.weight = nn.Parameter(torch.zeros(4 * 64, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = SimpleNamespace(**state)
    with pytest.raises(ValueError, match=message):
        lors.take_nf4(nn.Sequential(layer))
    assert type(layer).__name__ == "Linear4bit"
    with pytest.raises(ValueError, match="no layer of type Linear4bit"):
        lors.take_nf4(nn.Sequential(nn.Linear(2, 2)))


def test_a_folder_has_the_dense_numbers_and_the_codes(tmp_path):
    model = make_tiny_llama().bfloat16()
    lors.quantize(model, "nf4", group=16)
    lors.save_quantized(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    again = lors.load_quantized(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), tmp_path)
    for name, layer in decoder_linears(again).items():
        assert layer.layout == "nf4/16"
        assert torch.equal(layer.weight, decoder_linears(plain)[name].weight)


@pytest.mark.parametrize("method", ["lora", "lors"])
def test_a_run_leaves_its_adapter_beside_the_weights(tiny, method, no_network):  # noqa: F811
    result = execute(tiny(f"method={method}", "prune.quantize=nf4", "prune.group_size=16", *SHORT))
    assert result["status"] == "ok", result["error"]
    assert result["end_state"] == "adapter" and result["pruner"] == "wanda-nf4g16"
    assert result["zeros"]["after_prune"] >= 0.5


def test_a_step_is_simulated_and_profiled_on_nf4(composed, tmp_path):
    for mode in ("simulate", "profile"):
        cfg = composed(
            *("method=lors", f"mode={mode}", "prune.quantize=nf4", "prune.group_size=16", "train.steps=1"),
            *("train.timing_warmup=0", "train.batch_size=1", "train.sequence_length=16", "model=tinyllama_1b"),
            *("model.layers=1", "model.shape.hidden_size=64", "model.shape.intermediate_size=96"),
            *("model.shape.vocab_size=128", "adapter.r=4"),
            *(f"runs_root={tmp_path}/runs", f"cache_root={tmp_path}/cache"),
        )
        assert execute(cfg)["status"] == "ok"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("prune.bits=8",), "prune.bits=8: must be 4 with prune.quantize=nf4"),
        (("method.peft.bits=4",), "prune.quantize=nf4: must be rtn or gptq with method.peft.bits"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny, overrides, message):  # noqa: F811
    with pytest.raises(BadInput, match=message):
        cfg = resolve(tiny("method=lors", "prune.quantize=nf4", *overrides))
        read_inputs(cfg, build_method(cfg))
