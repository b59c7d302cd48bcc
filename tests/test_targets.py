"""Which layers an adapter is put on, and what is said of those that it is not put on."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pruned_models import logits, pruned_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

import lors
from lors.pruning import prune_model
from lors.storage import CompressedLinear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "v_prog"]}, "target_modules: 'v_prog' matches no module .* did you mean v_proj"),
        ({"target_modules": ["model.layers.7.mlp.up_proj", "q_proj"]}, "target_modules: 'model.layers.7.mlp.up_proj'"),
        ({"exclude_modules": ["lm_haed"]}, "exclude_modules: 'lm_haed' matches no module .* did you mean lm_head"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save: 'lm_haed' matches no module .* did you mean lm_head"),
        ({"target_modules": ["zzz"]}, "target_modules: 'zzz' matches no module of the model; the names there are"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 9]}, "layers_to_transform: 9 is no block"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 9}, "layers_to_transform: 9 is no block"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error(options: dict, message: str) -> None:
    model = pruned_model()
    with pytest.raises(ValueError, match=message) as error:
        get_peft_model(model, lors.LorsConfig(r=2, **options))
    assert "\n" not in str(error.value)
    assert not any(isinstance(part, lors.LorsLinear) for part in model.modules())


def test_pruned_layers_without_an_adapter_are_said_once_with_their_share() -> None:
    model = pruned_model()
    linears = [part for name, part in model.named_modules() if name.endswith("proj")]
    total = sum(part.weight.numel() for part in linears)
    queries = sum(layer.self_attn.q_proj.weight.numel() for layer in model.model.layers)
    share = f"{100 * (total - queries) / total:.0f} %"
    with pytest.warns(
        UserWarning, match=f"12 pruned linear layers have no adapter.*{share} of the block wei"
    ) as caught:
        get_peft_model(model, lors.LorsConfig(r=2, target_modules=["q_proj"]))
    assert [issubclass(w.category, UserWarning) for w in caught].count(True) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(pruned_model(), lors.LorsConfig(r=2))


def test_fused_experts_are_named_with_their_share() -> None:
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=32,
            num_local_experts=4,
        )
    )
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.o_proj):
            projection.weight.data[:, ::2] = 0
    with pytest.warns(UserWarning, match=r"weights are no linear layers .*experts.*: .*experts\.down_proj.* 8\d % of"):
        adapted = get_peft_model(model, lors.LorsConfig(r=2))
    assert len(adapted.base_model.adapted_layers("default")) == 8
    with pytest.raises(ValueError, match=r"experts is of type MixtralExperts, with weights of its own \(gate_up_proj"):
        prune_model(adapted.unload(), "magnitude", sparsity=0.5, pattern="unstructured", calibration=None)


def test_a_refused_config_does_not_count_at_the_next_try() -> None:
    """93 trainable tensors in place of 42: what an earlier, refused wrapping had left behind."""
    model = pruned_model()
    with pytest.raises(ValueError, match="larger than a side"):
        get_peft_model(model, lors.LorsConfig(r=20, rank_pattern={"q_proj": 20, "k_proj": 17}))
    adapted = get_peft_model(model, lors.LorsConfig(r=2))
    assert sum(parameter.requires_grad for parameter in adapted.parameters()) == 2 * 14


# ---- shared weights


class Twins(nn.Module):
    """Two layers with one weight, or one layer in two places."""

    def __init__(self, one_module: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first if one_module else nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("one_module", [True, False])
def test_a_weight_in_two_layers_is_refused(one_module: bool) -> None:
    with pytest.raises(ValueError, match="'first' has the same weight as 'second', and a merge would change both"):
        get_peft_model(Twins(one_module), lors.LorsConfig(r=2, target_modules=["first"]))


def test_a_block_that_stands_in_two_places_is_adapted_in_both() -> None:
    model = pruned_model()
    model.model.layers[1] = model.model.layers[0]
    adapted = get_peft_model(model, lors.LorsConfig(r=2))
    layers = adapted.base_model.adapted_layers("default").values()
    assert len(layers) == 7
    for layer in layers:
        nn.init.normal_(layer.lors_B["default"], std=0.3)
    expected = logits(adapted.eval())
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected)


def test_a_refused_adapter_leaves_those_of_another_method_alone() -> None:
    """Of the same name, in the same layers."""
    from peft import LoraConfig

    base = pruned_model()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    state, config = set(model.state_dict()), model.peft_config["default"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj' has an adapter of another method"):
            get_peft_model(base, lors.LorsConfig(r=4))
    assert set(model.state_dict()) == state
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert model.peft_config == {"default": config}


@pytest.mark.parametrize("first", ["dense", "none"])
def test_weights_that_cannot_be_compressed_leave_all_as_they_are(first: str) -> None:
    """The last ones of a block, 40 wide, follow no pattern."""
    model = pruned_model(pattern="2:4")
    model.model.layers[1].mlp.down_proj.weight.data.add_(1)
    config = lors.LorsConfig(r=2, storage="n:m")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: storage='n:m': the weight"):
        if first == "dense":
            adapted = get_peft_model(model, lors.LorsConfig(r=2))
            adapted.add_adapter("second", config)
        else:
            get_peft_model(model, config)
    assert not any(isinstance(part, CompressedLinear) for part in model.modules())
    if first == "dense":
        assert set(adapted.peft_config) == {"default"}
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: storage='n:m'"):
            lors.compress(adapted, "n:m")
        assert not any(isinstance(part, CompressedLinear) for part in model.modules())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter", "bench"])
def test_a_tied_head_is_untied_before_its_merge_and_the_config_says_so(way: str, tmp_path) -> None:
    model = pruned_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    embedding = model.model.embed_tokens.weight.detach().clone()
    config = lors.LorsConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for layer in adapted.base_model.adapted_layers("default").values():
        nn.init.normal_(layer.lors_B["default"], std=0.3)
    expected = logits(adapted.eval())
    if way == "bench":
        from harness.method import Method, finish

        merged = finish(Method(name="lors", peft=config), adapted, {}, "merged")
    else:
        with pytest.warns(UserWarning, match=r"a shared weight is adapted: lm_head and model\.embed_tokens are"):
            merged = getattr(adapted, way)() or adapted.get_base_model()
    torch.testing.assert_close(logits(merged), expected)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert merged.config.tie_word_embeddings is False
    if way != "merge_adapter":
        merged.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("fields", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_the_bench_unties_for_the_methods_of_peft_too(fields: dict, tmp_path) -> None:
    from peft import LoraConfig

    from harness.method import Method, adapt, finish

    model = pruned_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    embedding = model.model.embed_tokens.weight.detach().clone()
    peft = LoraConfig(r=2, task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | fields))
    method = Method(name="lora", peft=peft, keeps_zeros=False)
    adapted = adapt(method, model)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3) if "lora" in name else parameter.data.add_(0.1)
    expected = logits(adapted.eval())
    merged = finish(method, adapted, {}, "dense")
    torch.testing.assert_close(logits(merged), expected)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


# ---- the default of the bench


@pytest.mark.parametrize("name", ["phi3", "opt", "opt_350m", "gpt_neox", "falcon_7b", "bloom"])
@pytest.mark.parametrize("method", ["lors", "lora", "ia3", "hira", "spp"])
def test_the_default_reaches_every_linear_layer_of_a_block_and_no_other(method: str, name: str) -> None:
    from architectures import ARCHITECTURES
    from contract import method_of

    from harness.method import adapt
    from harness.result import count_parameters

    model = ARCHITECTURES[name].build()
    outside = [part for key, part in model.named_modules() if isinstance(part, nn.Linear) and "project" in key]
    chosen = method_of(method, "adapter.r=2")
    adapted = adapt(dataclasses.replace(chosen, prepare=None), model)
    assert count_parameters(adapted)["adapted_share"] == 1
    assert not {id(part) for part in outside} & {
        id(part.get_base_layer()) for part in adapted.modules() if isinstance(part, BaseTunerLayer)
    }


def test_the_result_says_which_share_has_an_adapter() -> None:
    from harness.result import count_parameters

    model = get_peft_model(pruned_model(), lors.LorsConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    linears = {name: part for name, part in pruned_model().named_modules() if name.endswith("proj")}
    share = sum(part.weight.numel() for name, part in linears.items() if "q_proj" in name)
    share /= sum(part.weight.numel() for part in linears.values())
    assert count_parameters(model)["adapted_share"] == pytest.approx(share)
    assert count_parameters(pruned_model())["adapted_share"] is None
