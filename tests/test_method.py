"""The seam between the harness and a method: number formats, freezing, and the end states after the merge."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from harness.method import PRECISIONS, VARIANTS, Method, adapt, finish
from lors.blocks import decoder_linears
from lors.sparsity import supports, zero_report

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**fields: object) -> Method:
    config = LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS, init_lora_weights=False)
    return Method(**({"name": "lora", "peft": config, "keeps_zeros": False} | fields))


def sparse(tiny_llama, dtype: torch.dtype = torch.float32, **overrides: object) -> nn.Module:
    """A random model, half of it zero."""
    model = tiny_llama(**overrides).to(dtype)
    model.config.dtype = dtype  # as from_pretrained leaves it
    generator = torch.Generator().manual_seed(1)
    for linear in decoder_linears(model).values():
        linear.weight.data.mul_(torch.rand(linear.weight.shape, generator=generator) < 0.5)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6) + 3).logits.float()


def effective_weights(adapted: nn.Module) -> dict[str, torch.Tensor]:
    """W + scale B A of every LoRA layer, from the definition, in float64."""
    weights = {}
    for name, layer in adapted.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            A, B = (getattr(layer, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
            weights[name] = layer.base_layer.weight.detach().double() + layer.scaling["default"] * B @ A
    return weights


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "method",
    [lora(), Method(name="ia3", peft=IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]))],
)
def test_one_precision_policy_for_all_adapters(tiny_llama, method: Method, precision: str) -> None:
    formats = PRECISIONS[precision]
    adapted = adapt(method, sparse(tiny_llama, formats.base), precision=precision)
    for name, parameter in adapted.named_parameters():
        trains = any(part in name for part in ("lora_", "ia3_"))
        assert parameter.requires_grad == trains, name
        assert parameter.dtype == (formats.trainable if trains else formats.base), name


def test_without_an_adapter_everything_trains_in_the_trainable_format(tiny_llama) -> None:
    method = Method(name="full", prepare=lambda model, batches, seed: model.requires_grad_(True))
    model = sparse(tiny_llama, torch.bfloat16)
    W = {name: linear.weight.detach().clone() for name, linear in decoder_linears(model).items()}
    adapted = adapt(method, model, precision="bf16_mixed")
    assert {parameter.dtype for parameter in adapted.parameters()} == {torch.float32}
    merged = finish(method, adapted, supports(model), "merged")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert all(torch.equal(linear.weight, W[name]) for name, linear in decoder_linears(merged).items())


def test_a_method_that_does_not_train_leaves_the_model_frozen_and_unchanged(tiny_llama) -> None:
    model = sparse(tiny_llama)
    before = logits(model)
    adapted = adapt(Method(name="none", trains=False), model)
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    assert torch.equal(logits(finish(Method(name="none", trains=False), adapted, supports(model), "merged")), before)


def test_prepare_gets_the_wrapped_model_the_batches_and_the_seed(tiny_llama) -> None:
    seen = {}

    def prepare(model: nn.Module, batches: list, seed: int) -> nn.Module:
        seen.update(model=model, batches=list(batches), again=list(batches), seed=seed)
        return model

    batches = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    adapted = adapt(lora(prepare=prepare), sparse(tiny_llama), batches, seed=7)
    assert seen["model"] is adapted and seen["seed"] == 7
    assert seen["batches"] == seen["again"] == batches


def test_the_seed_fixes_the_start_and_the_config_of_the_method_is_not_touched(tiny_llama) -> None:
    method = lora()
    first, second, other = (adapt(method, sparse(tiny_llama), seed=seed) for seed in (3, 3, 4))
    A = [
        model.get_base_model().model.layers[0].self_attn.q_proj.lora_A.default.weight
        for model in (first, second, other)
    ]
    assert torch.equal(A[0], A[1]) and not torch.equal(A[0], A[2])
    assert method.peft.base_model_name_or_path is None


def test_training_a_base_weight_beside_an_adapter_is_refused(tiny_llama) -> None:
    method = lora(prepare=lambda model, batches, seed: model.requires_grad_(True))
    with pytest.raises(RuntimeError, match=r"base_layer\.weight"):
        adapt(method, sparse(tiny_llama))


def test_training_nothing_is_refused(tiny_llama) -> None:
    method = lora(prepare=lambda model, batches, seed: model.requires_grad_(False))
    with pytest.raises(RuntimeError, match="no parameter is trainable"):
        adapt(method, sparse(tiny_llama))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_and_remasked_merge_follow_their_definition_with_one_rounding(tiny_llama, dtype: torch.dtype) -> None:
    method = lora(merges=("adapter", "remasked", "dense"))
    model = sparse(tiny_llama, dtype)
    M = supports(model)
    adapted = adapt(method, model, precision="bf16" if dtype == torch.bfloat16 else "float32")
    expected = effective_weights(adapted)
    results = {variant: decoder_linears(finish(method, adapted, M, variant)) for variant in ("dense", "remasked")}
    for name, W in expected.items():
        dense, remasked = results["dense"][name].weight, results["remasked"][name].weight
        assert dense.dtype == dtype
        # Half a unit in the last place of W, from one rounding; float32 arithmetic itself adds a little.
        bound = torch.finfo(dtype).eps / 2 * W.abs() * 1.01 + 1e-6
        assert ((dense.double() - W).abs() <= bound).all()
        assert torch.equal(remasked, dense * M[name])
    untouched = decoder_linears(model)["model.layers.0.self_attn.k_proj"].weight
    assert torch.equal(results["dense"]["model.layers.0.self_attn.k_proj"].weight, untouched)


def test_zeros_of_the_three_end_states_of_lora(tiny_llama) -> None:
    method = lora()
    model = sparse(tiny_llama)
    M = supports(model)
    adapted = adapt(method, model)
    reports = {variant: zero_report(M, finish(method, adapted, M, variant), "unstructured") for variant in VARIANTS[1:]}
    assert reports["remasked"]["lost"] == reports["adapter"]["lost"] == 0
    assert reports["dense"]["lost"] > 0.9 * sum(int((~M[name]).sum()) for name in M if name.endswith(tuple(TARGETS)))


def test_merging_leaves_the_adapted_model_as_it_was_unless_in_place(tiny_llama) -> None:
    method = lora()
    model = sparse(tiny_llama)
    M = supports(model)
    adapted = adapt(method, model)
    before = logits(adapted)
    merged = finish(method, adapted, M, "dense")
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert torch.equal(logits(adapted), before)
    assert torch.equal(logits(finish(method, adapted, M, "adapter")), before)
    last = finish(method, adapted, M, "dense", in_place=True)
    assert last is model
    assert torch.equal(logits(last), logits(merged))


@pytest.mark.parametrize("variant", ["adapter", "remasked", "dense"])
def test_modules_that_are_trained_in_full_end_in_the_format_of_the_model(tiny_llama, variant: str) -> None:
    """In bf16_mixed the training has them in float32, beside a bfloat16 model."""
    method = lora(peft=LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    model = sparse(tiny_llama, torch.bfloat16)
    before = supports(model)
    adapted = adapt(method, model, precision="bf16_mixed")
    head = adapted.get_base_model().lm_head.modules_to_save["default"].weight
    assert head.dtype == torch.float32
    head.data.add_(0.1)
    wanted = head.detach().to(torch.bfloat16)
    finished = finish(method, adapted.eval(), before, variant)
    assert logits(finished).isfinite().all()
    found = finished.lm_head.modules_to_save["default"] if variant == "adapter" else finished.lm_head
    assert torch.equal(found.weight, wanted)


def test_bad_end_states_and_methods_are_refused(tiny_llama) -> None:
    model = sparse(tiny_llama)
    with pytest.raises(ValueError, match="variant='folded': must be one of merged, adapter, remasked, dense"):
        finish(lora(), model, {}, "folded")
    with pytest.raises(ValueError, match=r"method\.merges=folded"):
        lora(merges=["folded"])
    with pytest.raises(ValueError, match=r"method\.merges=\[\]"):
        lora(merges=[])
    with pytest.raises(ValueError, match=r"needs method\.peft"):
        Method(name="nothing")
    with pytest.raises(ValueError, match="no module 'somewhere'"):
        finish(lora(), adapt(lora(), model), {"somewhere": torch.ones(1)}, "remasked")


def test_a_checkpoint_loaded_in_bfloat16_says_so(tiny_llama, tmp_path) -> None:
    """What ``finish`` relies on to give trained weights their format back."""
    tiny_llama().save_pretrained(tmp_path)
    loaded = type(tiny_llama()).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.config.dtype == torch.bfloat16
    assert get_peft_model(loaded, LoraConfig(target_modules=TARGETS)).config.dtype == torch.bfloat16
