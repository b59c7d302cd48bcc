"""The block-by-block walk, against one full forward pass of the partly pruned model per block."""

from __future__ import annotations

import copy
import weakref
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)

from lors.blocks import block_linears, decoder_blocks, decoder_linears
from lors.pruning import prune_model, prune_sparsegpt, prune_wanda, squared_norms, walk
from lors.sparsity import follows_pattern, sparsity_of, supports

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(  # biases; a full layer, then two with a sliding window
        **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4),
    "gemma3": Gemma3TextConfig(  # masks and rotary embeddings of two kinds
        **SIZES,
        num_key_value_heads=2,
        head_dim=4,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma4": Gemma4TextConfig(  # an input per layer and sample; the last layer reads the keys of another
        **SIZES,
        num_key_value_heads=2,
        head_dim=4,
        global_head_dim=4,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=1,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        dropout=0.5,
    ),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}


def build(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """A random model in training mode, with weights large enough for every layer to matter."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.train()


def tokens(samples: int = 3, length: int = 10) -> Tensor:
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


def collect(inputs: list[Tensor], _linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
    inputs.append(args[0].flatten(0, -2))


@torch.no_grad()
def prune_slowly(model: PreTrainedModel, rule, calibration: Tensor, *, sequential: bool = True) -> None:
    """The definition: per block, run the whole model as it stands, collect the inputs of its linears, prune.

    With sequential=False all statistics come from the dense model, which is what the walk must not do.
    """
    model.eval()
    name, blocks = decoder_blocks(model)
    dense = copy.deepcopy(model)
    for i in range(len(blocks)):
        source = decoder_blocks(model if sequential else dense)[1]
        linears = dict(block_linears(f"{name}.{i}", source[i]))
        inputs: dict[str, list[Tensor]] = {key: [] for key in linears}
        hooks = [linear.register_forward_pre_hook(partial(collect, inputs[key])) for key, linear in linears.items()]
        for sample in calibration:
            (model if sequential else dense)(input_ids=sample[None])
        for hook in hooks:
            hook.remove()
        for key, linear in block_linears(f"{name}.{i}", blocks[i]):
            linear.weight.copy_(rule(linear.weight, torch.cat(inputs[key])))


def wanda_rule(W: Tensor, X: Tensor, pattern: str = "unstructured") -> Tensor:
    return prune_wanda(W, X.double().square().sum(0).float(), sparsity=None, pattern=pattern)


def sparsegpt_rule(W: Tensor, X: Tensor, pattern: str = "2:4") -> Tensor:
    return prune_sparsegpt(W, (X.double().T @ X.double()).float(), sparsity=None, pattern=pattern)


def assert_same_parameters(model: nn.Module, expected: nn.Module, **tolerance: float):
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_walk_equals_full_passes_of_the_partly_pruned_model(name, attention):
    model, dense = build(name, attention), build(name, attention)
    expected = copy.deepcopy(model)
    prune_slowly(expected, wanda_rule, tokens())
    prune_model(model, "wanda", sparsity=0.5, pattern="unstructured", calibration=tokens())
    assert_same_parameters(model, expected, rtol=0, atol=0)
    assert sparsity_of(model) == 0.5
    assert model.training

    pruned = {f"{linear}.weight" for linear in decoder_linears(model)}
    for key, parameter in model.named_parameters():  # biases, norms, embeddings and head are as they were
        assert torch.equal(parameter, dense.get_parameter(key)) == (key not in pruned)


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_sparsegpt_walk_equals_full_passes(name):
    model = build(name)
    expected = copy.deepcopy(model)
    prune_slowly(expected, sparsegpt_rule, tokens())
    prune_model(model, "sparsegpt", sparsity=None, pattern="2:4", calibration=tokens(), block_size=8)
    assert_same_parameters(model, expected, rtol=1e-3, atol=1e-3)
    for key, linear in decoder_linears(model).items():
        assert torch.equal(linear.weight == 0, expected.get_submodule(key).weight == 0)
        assert follows_pattern(linear.weight, "2:4")


def test_later_blocks_see_the_pruned_ones():
    model = build("llama")
    from_dense = copy.deepcopy(model)
    prune_slowly(from_dense, wanda_rule, tokens(), sequential=False)
    prune_model(model, "wanda", sparsity=None, pattern="unstructured", calibration=tokens())
    walked, unaware = supports(model), supports(from_dense)
    first = [name for name in walked if name.startswith("model.layers.0.")]
    assert all(torch.equal(walked[name], unaware[name]) for name in first)
    for i in (1, 2):
        assert any(not torch.equal(walked[k], unaware[k]) for k in walked if k.startswith(f"model.layers.{i}."))


def test_samples_enter_one_by_one_and_their_order_is_irrelevant():
    batch, reverse = build("llama"), build("llama")
    target = {"sparsity": 0.5, "pattern": "unstructured"}
    prune_model(batch, "sparsegpt", **target, calibration=tokens(6))
    prune_model(reverse, "sparsegpt", **target, calibration=tokens(6).flip(0))
    assert_same_parameters(batch, reverse, rtol=1e-2, atol=1e-2)


def test_embeddings_run_once_per_sample_and_every_block_three_times():
    model = build("llama")
    count = {"embed": 0, "block": 0, "head": 0}

    def counted(key: str, *_) -> None:
        count[key] += 1

    model.get_input_embeddings().register_forward_hook(partial(counted, "embed"))
    model.model.layers[1].register_forward_hook(partial(counted, "block"))
    model.lm_head.register_forward_hook(partial(counted, "head"))
    prune_model(model, "wanda", sparsity=0.5, pattern="unstructured", calibration=tokens(5))
    assert count == {"embed": 5, "block": 15, "head": 0}  # recorded, measured, propagated


def test_statistics_of_one_block_at_a_time(monkeypatch):
    alive: list[weakref.ref] = []
    rule, statistic = walk.PRUNERS["sparsegpt"]
    most = 0

    def watched(X: Tensor) -> Tensor:
        nonlocal most
        result = statistic(X)
        alive.append(weakref.ref(result))
        most = max(most, sum(ref() is not None for ref in alive))
        return result

    monkeypatch.setitem(walk.PRUNERS, "sparsegpt", (rule, watched))
    prune_model(build("llama"), "sparsegpt", sparsity=0.5, pattern="unstructured", calibration=tokens())
    assert len(alive) == 3 * 7 * 3
    assert 7 <= most <= 8  # seven linears, and the part that is being added
    assert not any(ref() is not None for ref in alive)


def test_samples_share_the_arguments_that_are_equal():
    model = build("gemma4", "eager").eval()
    _, blocks = decoder_blocks(model)
    with torch.no_grad():
        hidden, calls = walk._record(model, blocks, tokens(4))
    assert len(hidden) == 4
    for call in calls:
        masks = [kwargs["attention_mask"] for _, kwargs in call]
        cosines = [kwargs["position_embeddings"][0] for _, kwargs in call]
        assert all(mask is masks[0] for mask in masks)
        assert all(cosine is cosines[0] for cosine in cosines)
        assert len({id(args[0]) for args, _ in call}) == 4  # the per-layer inputs depend on the tokens
    assert calls[0][0][1]["attention_mask"] is not calls[1][0][1]["attention_mask"]  # a window, and none


def test_statistics_are_not_rounded_to_tf32(monkeypatch):
    seen = []

    def watched(X: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return squared_norms(X)

    monkeypatch.setitem(walk.PRUNERS, "wanda", (prune_wanda, watched))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        prune_model(build("llama"), "wanda", sparsity=0.5, pattern="unstructured", calibration=tokens())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


@pytest.mark.parametrize(("samples", "length"), [(1, 10), (1, 1), (2, 3)])
@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_little_data_is_enough(pruner, samples, length):
    model = build("qwen2")
    prune_model(model, pruner, sparsity=0.5, pattern="unstructured", calibration=tokens(samples, length))
    assert sparsity_of(model) == 0.5
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_bfloat16_model(pruner):
    model = build("llama").bfloat16()
    prune_model(model, pruner, sparsity=None, pattern="1:4", calibration=tokens())
    assert all(linear.weight.dtype == torch.bfloat16 for linear in decoder_linears(model).values())
    assert sparsity_of(model) == 0.75
    assert all(follows_pattern(linear.weight, "1:4") for linear in decoder_linears(model).values())


def test_magnitude_needs_no_data_and_takes_its_group():
    model = build("opt")
    prune_model(model, "magnitude", sparsity=0.5, pattern="unstructured", calibration=None, group="row")
    for linear in decoder_linears(model).values():
        assert ((linear.weight == 0).sum(1) == linear.in_features // 2).all()


def test_progress_bar_counts_blocks(capsys):
    prune_model(build("llama"), "wanda", sparsity=0.5, pattern="unstructured", calibration=tokens())
    shown = capsys.readouterr().err
    assert "prune (wanda)" in shown
    assert "3/3" in shown


# ---- what is refused, and that nothing has changed by then


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pruner": "wander"}, "pruner='wander': allowed are magnitude, wanda, sparsegpt"),
        ({"block_size": 8}, "block_size is not an option of wanda: allowed are none"),
        ({"pruner": "sparsegpt", "group": "row"}, "allowed are block_size, damping"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"pattern": "2:4", "sparsity": 0.6}, "contradicts"),
        ({"pattern": "2:5", "sparsity": None}, r"model\.layers\.0\.self_attn\.q_proj: .*groups of 5"),
        ({"calibration": None}, "calibration: got None"),
        ({"calibration": tokens()[0]}, "calibration: got torch.int64 of shape"),
        ({"calibration": tokens().float()}, "calibration: got torch.float32"),
        ({"calibration": tokens()[:0]}, r"of shape \(0, 10\)"),
        ({"calibration": tokens() + VOCABULARY}, "outside the vocabulary of 40"),
        ({"calibration": tokens() - VOCABULARY}, "outside the vocabulary of 40"),
    ],
)
def test_bad_requests_change_nothing(change, message):
    model, dense = build("llama"), build("llama")
    request = {
        "pruner": "wanda",
        "sparsity": 0.5,
        "pattern": "unstructured",
        "calibration": tokens(),
    } | change
    with pytest.raises(ValueError, match=message):
        prune_model(model, request.pop("pruner"), **request)
    assert_same_parameters(model, dense, rtol=0, atol=0)


def test_models_that_cannot_be_pruned():
    prune = partial(prune_model, pruner="wanda", sparsity=0.5, pattern="unstructured", calibration=tokens())
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY))
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_fc is of type Conv1D, .*\(16, 64\)\), one of 8"):
        prune(gpt2)
    wrapped = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(ValueError, match="carries adapters"):
            prune(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: .*meta device"):
        prune(build("llama").to("meta"))


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_what_is_not_finite_names_the_layer_and_leaves_no_hooks(pruner):
    request = {"sparsity": 0.5, "pattern": "unstructured", "calibration": tokens()}
    model = build("llama")
    model.model.layers[1].mlp.up_proj.bias = nn.Parameter(torch.full((24,), torch.inf))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: the .*of the inputs.* not finite"):
        prune_model(model, pruner, **request)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    model = build("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj: the weight is not finite"):
        prune_model(model, pruner, **request)


def test_a_linear_that_no_token_reaches_is_named():
    model = build("llama")
    model.model.layers[1].mlp.expert = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.expert: no calibration token reached"):
        prune_model(model, "wanda", sparsity=0.5, pattern="unstructured", calibration=tokens())
