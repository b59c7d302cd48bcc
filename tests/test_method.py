"""The seam between the harness and a method: number formats, freezing, defaults, and the end states after the merge."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from baselines.full import FullMethod
from harness.method import PRECISIONS, VARIANTS, Method, adapt, finish
from lors.blocks import decoder_linears
from lors.sparsity import supports, zero_report

METHODS = Path(__file__).parents[1] / "conf/method"
TARGETS = ["q_proj", "v_proj", "down_proj"]
# Keys of conf/method whose value is not the default of the class, and why.
OTHER_THAN_DEFAULT = {
    ("gelora", "init_rows"): "dimensions need more rows than a gradient",
    ("ia3", "feedforward_modules"): "PEFT's own default depends on the model",
    ("lora", "keep_zeros"): "PEFT's config has no such field",
    ("lora", "merges"): "its three end states are three rows of the tables",
    ("lora_rite", "max_grad_norm"): "the optimizer clips",
    ("perp", "parts"): "a list, which no signature should have",
    ("none", "trains"): "the only one that does not",
    ("reconstruct_lors", "init"): "the gradient is one of the whole model",
    ("reconstruct_lors", "gradient"): "its masked product is paid for one block at a time",
    ("sherl", "merges"): "nothing can be merged",
    # Several rows of one class.
    ("lors_plus", "gradient"): "a row of its own",
    ("lors_plus", "gradient_until"): "a row of its own",
    ("lors_plus", "init"): "a row of its own",
    ("spp_blockwise", "organisation"): "a row of its own",
    ("spp_gc", "organisation"): "a row of its own",
    ("sqft_fused", "form"): "a row of its own",
    ("sqft_gc", "form"): "a row of its own",
    ("sqft_gc", "checkpoint"): "a row of its own",
    ("sqft_nls", "rank_shares"): "a row of its own",
}


def lora(prepare: Callable | None = None, **fields: object) -> Method:
    config = LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS, init_lora_weights=False)
    method = Method(**({"name": "lora", "peft": config, "keep_zeros": False} | fields))
    method.prepare = prepare or method.prepare
    return method


def sparse(tiny_llama, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model, half of it zero."""
    model = tiny_llama().to(dtype)
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


def test_an_option_has_one_default() -> None:
    """In the file of the method and in its class, but for what follows other keys and the table above."""
    other = set()
    for file in METHODS.glob("*.yaml"):
        method = OmegaConf.to_container(OmegaConf.load(file))
        for node in (method, method.get("peft")):
            if node is None:
                continue
            parameters = {}
            for kind in reversed(get_class(node["_target_"]).__mro__[:-1]):
                parameters |= inspect.signature(kind).parameters
            for name in node.keys() - {"_target_", "name", "peft", "task_type"}:
                follows = isinstance(node[name], str) and "${" in node[name]
                if not follows and node[name] != parameters[name].default:
                    other.add((file.stem, name))
    assert other == OTHER_THAN_DEFAULT.keys()


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
    model = sparse(tiny_llama, torch.bfloat16)
    W = {name: linear.weight.detach().clone() for name, linear in decoder_linears(model).items()}
    adapted = adapt(FullMethod("full"), model, precision="bf16_mixed")
    assert {parameter.dtype for parameter in adapted.parameters()} == {torch.float32}
    merged = finish(FullMethod("full"), adapted, supports(model), "merged")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert all(torch.equal(linear.weight, W[name]) for name, linear in decoder_linears(merged).items())


def test_prepare_gets_the_wrapped_model_the_batches_and_the_seed(tiny_llama) -> None:
    seen = {}

    def prepare(model: nn.Module, batches: list, seed: int) -> nn.Module:
        seen.update(model=model, batches=batches, seed=seed)
        return model

    batches = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    adapted = adapt(lora(prepare), sparse(tiny_llama), batches, seed=7)
    assert seen == {"model": adapted, "batches": batches, "seed": 7}


def test_the_seed_fixes_the_start_and_the_config_of_the_method_is_not_touched(tiny_llama) -> None:
    method = lora()
    A = [
        adapt(method, sparse(tiny_llama), seed=seed).base_model.model.model.layers[0].self_attn.q_proj.lora_A
        for seed in (3, 3, 4)
    ]
    first, second, other = (factor.default.weight for factor in A)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert method.peft.base_model_name_or_path is None


@pytest.mark.parametrize(("trains", "message"), [(True, r"base_layer\.weight"), (False, "no parameter is trainable")])
def test_training_a_base_weight_or_nothing_is_refused(tiny_llama, trains: bool, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        adapt(lora(lambda model, batches, seed: model.requires_grad_(trains)), sparse(tiny_llama))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_and_remasked_merge_follow_their_definition_with_one_rounding(tiny_llama, dtype: torch.dtype) -> None:
    method, model = lora(), sparse(tiny_llama, dtype)
    M = supports(model)
    adapted = adapt(method, model, precision="bf16" if dtype == torch.bfloat16 else "float32")
    expected = effective_weights(adapted)
    ends = {variant: finish(method, adapted, M, variant) for variant in VARIANTS[1:]}
    dense, remasked = (decoder_linears(ends[variant]) for variant in ("dense", "remasked"))
    for name, W in expected.items():
        assert dense[name].weight.dtype == dtype
        # Half a unit in the last place of W, from one rounding; float32 arithmetic itself adds a little.
        bound = torch.finfo(dtype).eps / 2 * W.abs() * 1.01 + 1e-6
        assert ((dense[name].weight.double() - W).abs() <= bound).all()
        assert torch.equal(remasked[name].weight, dense[name].weight * M[name])
    lost = {variant: zero_report(M, end, "unstructured")["lost"] for variant, end in ends.items()}
    assert lost["remasked"] == lost["adapter"] == 0
    assert lost["dense"] > 0.9 * sum(int((~M[name]).sum()) for name in expected)


def test_a_merge_in_place_is_that_of_a_copy(tiny_llama) -> None:
    """test_contract has that the model stays as it was without."""
    method, model = lora(), sparse(tiny_llama)
    M = supports(model)
    adapted = adapt(method, model)
    merged = logits(finish(method, adapted, M, "dense"))
    last = finish(method, adapted, M, "dense", in_place=True)
    assert last is model and torch.equal(logits(last), merged)


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
    with pytest.raises(ValueError, match=r"^trains=True: must be false for a method with neither peft nor"):
        Method(name="nothing")
    with pytest.raises(ValueError, match="no linear layer 'somewhere'"):
        finish(lora(), adapt(lora(), model), {"somewhere": torch.ones(1)}, "remasked")


def test_a_checkpoint_loaded_in_bfloat16_says_so(tiny_llama, tmp_path) -> None:
    """What ``finish`` relies on to give trained weights their format back."""
    tiny_llama().save_pretrained(tmp_path)
    loaded = type(tiny_llama()).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.config.dtype == torch.bfloat16
    assert get_peft_model(loaded, LoraConfig(target_modules=TARGETS)).config.dtype == torch.bfloat16
