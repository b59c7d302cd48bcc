"""Which layers an adapter is put on, and what is said of those that it is not put on."""

from __future__ import annotations

import warnings

import pytest
import torch
from architectures import ARCHITECTURES
from contract import method_of
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pruned_models import logits, pruned_model, weights
from torch import nn
from transformers import AutoModelForCausalLM

import lors
from harness.method import Method, adapt, finish, wrap
from harness.result import count_parameters
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


def test_experts_that_are_not_read_one_by_one_are_named_with_their_share() -> None:
    model = ARCHITECTURES["dbrx"].build()
    for block in model.transformer.blocks:
        block.norm_attn_norm.attn.out_proj.weight.data[:, ::2] = 0
    with pytest.warns(UserWarning, match=r"weights are no linear layers .*experts.*: .*experts\.mlp\.v1.* \d\d % of"):
        adapted = get_peft_model(model, lors.LorsConfig(r=2))
    with pytest.raises(ValueError, match=r"experts\.mlp is of type DbrxExpertGLU, with weights of its own \(w1"):
        prune_model(adapted.unload(), "magnitude", sparsity=0.5, pattern="unstructured", calibration=None)


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


@pytest.mark.parametrize("adapted_before", [True, False])
def test_weights_that_cannot_be_compressed_leave_all_as_they_are(adapted_before: bool) -> None:
    """The last ones of a block, 40 wide, follow no pattern."""
    base = pruned_model(pattern="2:4")
    base.model.layers[1].mlp.down_proj.weight.data.add_(1)
    config = lors.LorsConfig(r=2, storage="n:m")
    calls = [lambda: get_peft_model(base, config)]
    if adapted_before:
        adapted = get_peft_model(base, lors.LorsConfig(r=2))
        calls = [lambda: adapted.add_adapter("second", config), lambda: lors.compress(adapted, "n:m")]
    for call in calls:
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: storage='n:m'"):
            call()
        assert not any(isinstance(part, CompressedLinear) for part in base.modules())
        assert not adapted_before or set(adapted.peft_config) == {"default"}


# ---- tied embeddings


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("kind", "fields", "way"),
    [
        *((lors.LorsConfig, {"target_modules": ["lm_head", "q_proj"]}, way) for way in ("unload", "merge", "bench")),
        (LoraConfig, {"target_modules": ["lm_head"]}, "bench"),
        (LoraConfig, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "bench"),
    ],
)
def test_a_tied_head_is_untied_before_its_merge_and_the_config_says_so(kind, fields, way: str, tmp_path) -> None:
    model = pruned_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    embedding = model.model.embed_tokens.weight.detach().clone()
    method = Method(name="any", peft=kind(r=2, task_type="CAUSAL_LM", **fields), keep_zeros=kind is lors.LorsConfig)
    adapted = adapt(method, model)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3) if "_B" in name else parameter.data.add_(0.1)
    expected = logits(adapted.eval())
    if way == "bench":
        merged = finish(method, adapted, {}, "merged" if method.keep_zeros else "dense")
    else:
        with pytest.warns(UserWarning, match=r"a shared weight is adapted: lm_head and model\.embed_tokens are"):
            merged = adapted.merge_and_unload() if way == "unload" else adapted.merge_adapter()
        merged = merged or adapted.get_base_model()
    torch.testing.assert_close(logits(merged), expected)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert merged.config.tie_word_embeddings is False
    if way != "merge":
        merged.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


# ---- the default of the bench


@pytest.mark.parametrize("name", ["phi3", "opt", "opt_350m", "gptneox", "falcon_7b", "bloom"])
@pytest.mark.parametrize("method", ["lors", "lora", "ia3", "hira", "spp"])
def test_the_default_reaches_every_linear_layer_of_a_block_and_no_other(method: str, name: str) -> None:
    model = ARCHITECTURES[name].build()
    outside = [part for key, part in model.named_modules() if isinstance(part, nn.Linear) and "project" in key]
    adapted = wrap(method_of(method, "adapter.r=2"), model)  # unprepared
    assert count_parameters(adapted)["adapted_share"] == 1
    assert not {id(part) for part in outside} & {
        id(part.get_base_layer()) for part in adapted.modules() if isinstance(part, BaseTunerLayer)
    }


def test_the_result_says_which_share_has_an_adapter() -> None:
    model = get_peft_model(pruned_model(), lors.LorsConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    sizes = {name: W.numel() for name, W in weights(pruned_model()).items()}
    share = sum(size for name, size in sizes.items() if "q_proj" in name) / sum(sizes.values())
    assert count_parameters(model)["adapted_share"] == pytest.approx(share)
    assert count_parameters(pruned_model())["adapted_share"] is None
