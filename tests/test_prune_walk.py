"""The block-by-block walk, against one full forward pass of the partly pruned model per block."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from architectures import Architecture
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.live_memory import LiveTensors
from lors.blocks import block_linears, decoder_blocks, decoder_linears
from lors.pruning import block_calls, prune_model, prune_sparsegpt, prune_wanda, squared_norms, walk
from lors.sparsity import follows_pattern, sparsity_of

THREE = {"num_hidden_layers": 3, "vocab_size": 40}
WINDOWS = THREE | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA4 = {  # an input per layer and sample; the last layer reads the keys of another
    **{"global_head_dim": 8, "vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8},
    **{"num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
}
WALKED = {
    "llama": Architecture("Llama", THREE),
    "qwen2": Architecture("Qwen2", WINDOWS | {"use_sliding_window": True}),  # biases
    "gemma3": Architecture("Gemma3Text", WINDOWS, model="Gemma3ForCausalLM"),  # rotary embeddings of two kinds
    "gemma4": Architecture("Gemma4Text", WINDOWS | GEMMA4, model="Gemma4ForCausalLM"),
    "opt": Architecture("OPT", THREE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5}),
    "gpt_neox": Architecture("GPTNeoX", THREE),
}


def build(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """A random model in training mode."""
    architecture = WALKED[name]
    return replace(architecture, fields=architecture.fields | {"attn_implementation": attention}).build().train()


def tokens(samples: int = 3, length: int = 10) -> Tensor:
    return torch.randint(0, 40, (samples, length), generator=torch.Generator().manual_seed(1))


def collect(inputs: list[Tensor], _linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
    inputs.append(args[0].flatten(0, -2))


@torch.no_grad()
def prune_slowly(model: PreTrainedModel, rule, calibration: Tensor) -> None:
    """The definition: per block, run the whole model as it stands, collect the inputs of its linears, prune."""
    model.eval()
    name, blocks = decoder_blocks(model)
    for i, block in enumerate(blocks):
        linears = dict(block_linears(f"{name}.{i}", block))
        inputs: dict[str, list[Tensor]] = {key: [] for key in linears}
        hooks = [linear.register_forward_pre_hook(partial(collect, inputs[key])) for key, linear in linears.items()]
        for sample in calibration:
            model(input_ids=sample[None])
        for hook in hooks:
            hook.remove()
        for key, linear in linears.items():
            linear.weight.copy_(rule(linear.weight, torch.cat(inputs[key])))


def wanda_rule(W: Tensor, X: Tensor, pattern: str = "unstructured") -> Tensor:
    return prune_wanda(W, X.double().square().sum(0).float(), sparsity=None, pattern=pattern)


def sparsegpt_rule(W: Tensor, X: Tensor, pattern: str = "2:4") -> Tensor:
    return prune_sparsegpt(W, (X.double().T @ X.double()).float(), sparsity=None, pattern=pattern)


def assert_same_parameters(model: nn.Module, expected: nn.Module, **tolerance: float):
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in WALKED), ("gemma3", "eager")])
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


def test_every_batch_runs_twice_through_a_block_and_once_through_the_last_without_tf32(capsys, monkeypatch):
    monkeypatch.setattr(block_calls, "BATCH_TOKENS", 20)
    measured: list[int] = []  # tokens: the order of the sum is that of the samples, whatever the batch
    spy = lambda X: (measured.append(len(X)), squared_norms(X))[1]  # noqa: E731
    monkeypatch.setitem(walk.PRUNERS, "wanda", (prune_wanda, spy))
    model = build("llama")
    rows: dict[str, list[int]] = {"embed": [], "first": [], "last": [], "head": []}
    precisions = set()

    def counted(key: str, _module: nn.Module, args: tuple[Tensor, ...], *_) -> None:
        rows[key].append(len(args[0]))
        precisions.add(torch.get_float32_matmul_precision())

    model.get_input_embeddings().register_forward_hook(partial(counted, "embed"))
    model.model.layers[0].self_attn.q_proj.register_forward_hook(partial(counted, "first"))
    model.model.layers[2].self_attn.q_proj.register_forward_hook(partial(counted, "last"))
    model.lm_head.register_forward_hook(partial(counted, "head"))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        prune_model(model, "wanda", sparsity=0.5, pattern="unstructured", calibration=tokens(5))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert precisions == {"highest"}
    batches = [2, 2, 1]
    checked = [1]  # a few tokens, before the walk
    assert rows["embed"] == 2 * checked + batches
    assert rows["first"] == checked + batches + batches
    assert rows["last"] == checked + batches
    assert not rows["head"]
    assert measured == [10] * 5 * len(decoder_linears(model))
    shown = capsys.readouterr().err
    assert "prune (wanda):   0%|          | 0/25 " in shown and "25/25" in shown and "block 3/3" in shown


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="since torch 2.9")
def test_tf32_that_was_chosen_by_its_newer_name_is_off_meanwhile_and_on_again():
    """The older name cannot be read then."""
    products = torch.backends.cuda.matmul
    before, during, model = products.fp32_precision, set(), build("llama")
    model.model.layers[0].register_forward_hook(lambda *_: during.add(products.fp32_precision))
    products.fp32_precision = "tf32"
    try:
        prune_model(model, "wanda", sparsity=0.5, pattern="unstructured", calibration=tokens())
        assert during == {"ieee"} and products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("name", "pruner"), [*((name, "wanda") for name in WALKED), ("gemma4", "sparsegpt")])
def test_the_size_of_a_batch_changes_nothing(name, pruner, monkeypatch):
    expected = build(name)
    for model, batch_tokens in ((expected, 10), (build(name), 20), (build(name), 1000)):
        monkeypatch.setattr(block_calls, "BATCH_TOKENS", batch_tokens)
        prune_model(model, pruner, sparsity=0.5, pattern="unstructured", calibration=tokens())
        for key, linear in decoder_linears(model).items():
            assert torch.equal(linear.weight == 0, expected.get_submodule(key).weight == 0), key
        assert_same_parameters(model, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
def test_blocks_go_to_the_device_one_at_a_time_and_back(pruner, monkeypatch):
    model, expected = build("llama"), build("llama")
    request = {"sparsity": 0.5, "pattern": "unstructured", "calibration": tokens()}
    moves: list[tuple[int, str]] = []
    for i, block in enumerate(model.model.layers):
        monkeypatch.setattr(block, "to", lambda device, i=i: moves.append((i, str(device))))
    prune_model(model, pruner, device="cuda", **request)
    assert moves == [(i, device) for i in range(3) for device in ("cuda", "cpu")]
    prune_model(expected, pruner, device="cpu", **request)
    assert_same_parameters(model, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WALKED)
def test_blocks_of_a_model_on_the_cpu_are_pruned_on_a_gpu(name):
    model, expected = build(name), build(name).cuda()
    request = {"sparsity": 0.5, "pattern": "unstructured"}
    prune_model(model, "wanda", device="cuda", calibration=tokens(), **request)
    prune_model(expected, "wanda", calibration=tokens().cuda(), **request)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert_same_parameters(model, expected.cpu(), rtol=0, atol=0)


@pytest.mark.parametrize(("pruner", "attention"), [("sparsegpt", "sdpa"), ("wanda", "eager")])
def test_memory_is_that_of_hidden_states_and_of_the_statistics_of_one_block(pruner, attention, monkeypatch) -> None:
    """What else a block is given, masks and angles, is kept once if it is equal."""
    monkeypatch.setattr(block_calls, "BATCH_TOKENS", 32)

    def peak(samples: int, blocks: int) -> int:
        model = replace(WALKED["llama"], fields=THREE | {"attn_implementation": attention, "num_hidden_layers": blocks})
        model = model.build()
        live = LiveTensors()
        live.count(model.parameters(), "weights")
        with live:
            prune_model(model, pruner, sparsity=0.5, pattern="unstructured", calibration=tokens(samples, 32))
        return live.peak - sum(parameter.nbytes for parameter in model.parameters())

    hidden = 32 * 32 * 4  # tokens, width, bytes
    few, many = peak(4, 2), peak(12, 2)
    assert 8 * hidden <= many - few < 9 * hidden
    assert abs(peak(4, 4) - few) < hidden
    assert many < 12 * hidden + 100_000, many


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_bfloat16_model(pruner):
    model = build("llama").bfloat16()
    prune_model(model, pruner, sparsity=None, pattern="1:4", calibration=tokens())
    assert all(linear.weight.dtype == torch.bfloat16 for linear in decoder_linears(model).values())
    assert sparsity_of(model) == 0.75
    assert all(follows_pattern(linear.weight, "1:4") for linear in decoder_linears(model).values())


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
        ({"calibration": tokens() + 40}, "outside the vocabulary of 40"),
        ({"calibration": tokens() - 40}, "outside the vocabulary of 40"),
    ],
)
def test_bad_requests_change_nothing(change, message):
    model, dense = build("llama"), build("llama")
    request = {"pruner": "wanda", "sparsity": 0.5, "pattern": "unstructured", "calibration": tokens()} | change
    with pytest.raises(ValueError, match=message):
        prune_model(model, **request)
    assert_same_parameters(model, dense, rtol=0, atol=0)


def run_oddly(model: nn.Module, oddity: str, input_ids: Tensor, use_cache: bool) -> Tensor:
    """In place of the forward of a Llama without head."""
    x = model.embed_tokens(input_ids)
    angles = model.rotary_emb(x, torch.arange(x.shape[1])[None])
    seen: list[Tensor] = []
    extra: dict[str, object] = {"extra": model.store} if oddity == "left" else {}
    model.store.clear()
    for block in reversed(model.layers) if oddity == "order" else model.layers[: 2 if oddity == "skips" else 3]:
        if oddity == "keyword":
            x = block(hidden_states=x, position_embeddings=angles)
            continue
        before, x = x, block(x, position_embeddings=angles, **extra)
        if isinstance(x, tuple):
            x, rest = x
            extra = {"extra": rest} if oddity == "rest" else {}
            continue
        seen.append(x - before)
        extra = {
            "tensor": {"extra": before},
            "float": {"extra": float(x.std())},
            "nested": {"extra": (seen[0],)},
            "container": {"extra": seen},
            "left": extra,
        }.get(oddity, {})
        if oddity == "between":
            x = x + 1e-3 * before
    return model.norm(x.mul_(2))


def odd_llama(oddity: str) -> PreTrainedModel:
    model = build("llama")
    model.model.store = {}
    model.model.forward = partial(run_oddly, model.model, oddity)
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda _, args, y, i=i: model.model.store.update({i: y}))
        if oddity in ("rest", "unused rest"):
            block.forward = partial(returns_more, block.forward)
    return model


def returns_more(forward, *args, **kwargs) -> tuple[Tensor, Tensor]:
    x = forward(*args, **kwargs)
    return x, x + 1


@pytest.mark.parametrize(
    "oddity", ["between", "order", "skips", "keyword", "tensor", "float", "nested", "container", "rest"]
)
def test_models_whose_blocks_are_given_something_else_are_refused_unchanged(oddity):
    model, dense = odd_llama(oddity), build("llama")
    before = [vars(block).get("forward") for block in model.model.layers]
    message = "by keyword" if oddity == "keyword" else r"block \d of LlamaForCausalLM does not get what"
    with pytest.raises(ValueError, match=message):
        prune_model(model, "wanda", sparsity=0.5, pattern="unstructured", calibration=tokens())
    assert_same_parameters(model, dense, rtol=0, atol=0)
    assert [vars(block).get("forward") for block in model.model.layers] == before


@pytest.mark.parametrize("oddity", ["none", "left", "unused rest"])
def test_a_model_with_a_forward_of_its_own_is_pruned_like_its_twin(oddity):
    """Blocks may leave something for later ones in a dict that all of them get, or return what nobody uses."""
    model, expected = odd_llama(oddity), build("llama")
    for each in (model, expected):
        prune_model(each, "wanda", sparsity=0.5, pattern="unstructured", calibration=tokens())
    assert_same_parameters(model, expected, rtol=0, atol=0)


def test_models_that_cannot_be_pruned():
    prune = partial(prune_model, pruner="wanda", sparsity=0.5, pattern="unstructured", calibration=tokens())
    wrapped = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(ValueError, match="carries adapters"):
            prune(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: .*meta device"):
        prune(build("llama").to("meta"))


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_what_is_not_finite_or_not_reached_names_the_layer_and_leaves_no_hooks(pruner):
    request = {"sparsity": 0.5, "pattern": "unstructured", "calibration": tokens()}
    model = build("llama")
    model.model.layers[1].mlp.up_proj.bias = nn.Parameter(torch.full((48,), torch.inf))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: the .*of the inputs.* not finite"):
        prune_model(model, pruner, **request)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    model = build("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj: the weight is not finite"):
        prune_model(model, pruner, **request)
    model = build("llama")
    model.model.layers[1].mlp.expert = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.expert: no calibration token reached"):
        prune_model(model, pruner, **request)
