"""Runs on pruned weights of few bits (``prune.quantize``): their end states, what lies on disk, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import batch, method_of, pruned, trained
from peft import AutoPeftModelForCausalLM, get_peft_model
from test_harness_run import NO_SCORES, folder_of, tiny  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM

import lors
from harness.config import resolve
from harness.errors import BadInput
from harness.identity import run_key
from harness.inputs import read_inputs
from harness.method import adapt, finish
from harness.method_from_config import build_method
from harness.run import execute
from harness.weights import check_files, checksum, load_weights
from lors.blocks import decoder_linears
from lors.kernels import pack
from lors.pruning import quantize_model
from lors.sparsity import supports
from lors.storage import decompress_linear, is_quantized

QUANTISED = ("prune.quantize=rtn", "prune.group_size=16")
ON_GRID = ("method.peft.bits=4", "method.peft.group=16")


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_method_on_the_grid_ends_as_one_model_of_few_bits(tiny, quantizer, no_network, monkeypatch) -> None:  # noqa: F811
    words = ["method=lors", f"prune.quantize={quantizer}", "prune.group_size=16", *ON_GRID]
    cfg = tiny(*words, "eval.tasks=[]", "eval.baselines=false", "save_base=true", "save_merged=true")
    result = execute(cfg)
    assert result["status"] == "ok", result["error"]
    assert result["end_state"] == "merged" and result["pruner"] == f"wanda-int4g16-{quantizer}"
    zeros = result["zeros"]
    assert zeros["mergeable"] and zeros["lost"] == 0 and zeros["after_prune"] >= 0.5

    folder = folder_of(result, cfg) / "merged"
    model = load_weights(str(folder), shown=str(folder))
    dense = AutoModelForCausalLM.from_pretrained(folder)  # any reader has the same numbers
    weights = result["memory"]["breakdown"]["weights"]
    assert weights < sum(tensor.nbytes for tensor in (*dense.parameters(), *dense.buffers()))
    for name, layer in decoder_linears(model).items():
        assert is_quantized(layer)
        W = layer.weight
        assert torch.equal(decoder_linears(dense)[name].weight, W)
        decompress_linear(layer)
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(model(tokens).logits, dense(tokens).logits)

    # Its adapter is refused on dense weights, off which the grid cannot be read: the logits would be others.
    monkeypatch.chdir(folder_of(result, cfg))
    with pytest.raises(ValueError, match=r"was trained on a quantised base, and this one is not: call lors.load_quant"):
        AutoPeftModelForCausalLM.from_pretrained("adapter", dtype="float32")
    (code,) = re.findall(r"^```python\n(.*?)^```", Path("adapter/README.md").read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code, names)
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(tokens).logits, dense.eval()(tokens).logits)
    with pytest.raises(ValueError, match=r"adapter/quantization.safetensors: no such file"):
        lors.load_quantized(dense, "adapter")


def test_plain_methods_leave_their_adapter_beside_quantised_weights(tiny, no_network) -> None:  # noqa: F811
    """Scored on it, too."""
    for method, *words in (("lora", "eval.tasks=[rte]", "eval.baselines=false"), ("lors", *NO_SCORES)):
        result = execute(tiny(f"method={method}", *QUANTISED, "train.steps=1", "train.timing_warmup=0", *words))
        assert result["status"] == "ok", result["error"]
        assert result["end_state"] == "adapter" and not result["variants"]
        assert result["zeros"]["lost"] is None and not result["zeros"]["mergeable"]


def test_the_method_knows_what_it_is_on(composed) -> None:
    for overrides, merges, shards in (((), ("merged",), True), (QUANTISED, ("adapter",), False)):
        method = build_method(resolve(composed("method=lors", *overrides)))
        assert (method.merges, method.prepares_shards, method.quantized_base) == (merges, shards, bool(overrides))
    assert build_method(resolve(composed("method=lors", *QUANTISED, *ON_GRID))).merges == ("merged",)


def test_what_a_run_starts_from_is_in_its_key(composed) -> None:
    def key(*overrides: str) -> str:
        return run_key(resolve(composed("method=lors", *overrides)))

    assert key("prune.quantize=none", "prune.bits=2", "method.peft.group=64") == key()
    kinds = [key(), key(*QUANTISED), key("prune.quantize=gptq"), key("prune.quantize=rtn", "prune.bits=8")]
    profiles = [key("mode=profile"), key("mode=profile", *QUANTISED)]
    assert len({*kinds, *profiles}) == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("sparsity=0",), "prune.quantize=rtn: must be none where nothing is pruned"),
        (("prune.when=after",), "prune.quantize=rtn: must be none with prune.when=after"),
        (("mode=simulate", "method=none"), "prune.quantize=rtn: must be none with mode=simulate method=none"),
        (
            ("prune=magnitude", "prune.quantize=gptq"),
            "prune.quantize=gptq: must be none, rtn or nf4 with prune=magnitude",
        ),
        (("method=full",), "prune.quantize=rtn: must be none with method=full, which trains the weights themselves"),
        (("prune.bits=3",), "prune.bits=3: must be one of 2, 4, 8"),
        (("method=spp",), "target_modules: .* is of type CompressedLinear, which SPP cannot adapt"),
        (("method.peft.bits=8",), "method.peft.bits=8, group=64: the weight of .* is int4/16"),
        (("method=sqft", "+method.peft.bits=4"), "method.peft.bits=4: must be None with form='two_products'"),
    ],
)
def test_what_cannot_be_is_one_clear_line(tiny, overrides, message) -> None:  # noqa: F811
    with pytest.raises(BadInput, match=message):
        cfg = resolve(tiny(*QUANTISED, *overrides))
        read_inputs(cfg, build_method(cfg))


def test_the_merge_of_the_harness_refuses_what_would_be_lost() -> None:
    model, before = pruned(), supports(pruned())
    quantize_model(model, "rtn", group=16)
    adapted = adapt(method_of("lora"), model, [batch()])
    with pytest.raises(ValueError, match=r"lora.* cannot be merged into a compressed weight: leave"):
        finish(method_of("lora"), adapted, before, "dense")


@pytest.mark.parametrize("safe", [True, False])
def test_peft_cannot_merge_a_lora_of_its_own(safe) -> None:
    model = pruned()
    quantize_model(model, "rtn", group=16)
    adapted = trained(method_of("lora"), model)
    with torch.no_grad():
        expected = adapted(**batch()).logits
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match="the weight is compressed, and what is written into"):
            merge(safe_merge=safe)
    with torch.no_grad():
        assert torch.equal(adapted(**batch()).logits, expected)


@pytest.mark.parametrize("name", ["lors", "sqft_gc", "sqft_nls"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_merge_of_the_harness_is_the_trained_model_and_on_the_grid(name, precision) -> None:
    """Also of a base that is not quantised, whose grid follows from its weights."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    fused = ["method.peft.form=fused"] if name == "sqft_nls" else []
    method = method_of(name, *ON_GRID, *fused)
    for quantised in (True, False):
        model = pruned(dtype=dtype)
        grids = {key: pack(layer.weight.detach(), "int4/16") for key, layer in decoder_linears(model).items()}
        if quantised:
            quantize_model(model, "rtn", group=16)
        before = supports(model)
        adapted = trained(method, model, precision)
        with torch.no_grad():
            expected = adapted(**batch()).logits
        merged = finish(method, adapted, before, "merged")
        with torch.no_grad():
            assert torch.equal(merged(**batch()).logits, expected)
        for key, layer in decoder_linears(merged).items():
            assert is_quantized(layer) == quantised
            assert not layer.weight[~before[key]].any()
            steps = (
                layer.weight.double() / grids[key].parts[0].double().repeat_interleave(16, 1)[:, : layer.in_features]
            )
            assert (steps - steps.round()).abs().max() < (0.06 if dtype is torch.bfloat16 else 1e-5)


def test_one_quantised_layer_makes_a_quantised_base() -> None:
    """A head among the targets, which no quantiser touches, changes nothing."""
    base = pruned()
    quantize_model(base, "rtn", group=16)
    config = lors.LorsConfig(bits=4, group=16, r=2, target_modules=["q_proj", "lm_head"])
    assert get_peft_model(base, config).peft_config["default"].quantized_base is True


def test_the_processes_compare_codes_too_and_a_quantised_folder_is_no_model_to_start_from(tmp_path) -> None:
    base = pruned()
    quantize_model(base, "rtn", group=16)
    before = checksum(base)
    next(iter(decoder_linears(base).values())).codes.zero_()
    assert checksum(base) != before
    lors.save_quantized(pruned(), tmp_path)
    check_files(tmp_path, base, "model.path=it")
    (tmp_path / "quantization.safetensors").touch()
    with pytest.raises(BadInput, match=r"model.path=it: its weights are quantised .* must be the model they were made"):
        check_files(tmp_path, base, "model.path=it")
