"""SHERL: where gradients end, the maths of the aggregation, the two starts, and the key-value cache."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_tiny_llama
from contract import ROWS, method_of, prune
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from baselines.sherl import SherlBlock, SherlConfig, SherlNorm, SherlPart, aggregated
from harness.live_step import live_tensor_step
from harness.meter import count_inference_flops
from harness.method import adapt

D = 32
TOKENS = torch.tensor([row["input_ids"] for row in ROWS[:4]])
BATCH = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}


def base(depth: int = 4):
    return prune(make_tiny_llama(num_hidden_layers=depth))


def adapted(depth: int = 4, noise: float = 0.0, **fields: object) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(base(depth), SherlConfig(**fields), autocast_adapter_dtype=False).eval()
    for parameter in model.parameters():
        if parameter.requires_grad and noise:
            parameter.data.add_(noise * torch.randn(parameter.shape))
    return model


def block(model: nn.Module) -> SherlBlock:
    return next(part for part in model.modules() if isinstance(part, SherlBlock))


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


# ---- gradients


def test_gradients_reach_the_side_network_and_nothing_else():
    model = adapted(noise=0.1).train()
    graphs = []
    for layer in model.get_base_model().model.layers[:3]:
        layer.register_forward_hook(lambda module, args, output: graphs.append(output.grad_fn))
    model(**BATCH).loss.backward()
    assert graphs == [None, None, None]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".sherl_" in name), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


def test_the_embeddings_get_no_gradient_even_if_they_ask_for_one():
    model = adapted(noise=0.1).train()
    embedding = model.get_base_model().model.embed_tokens.weight.requires_grad_()
    model.get_base_model().lm_head.weight = nn.Parameter(embedding.detach().clone(), requires_grad=False)
    model(**BATCH).loss.backward()
    assert embedding.grad is None


def test_the_memory_for_the_backward_pass_does_not_grow_with_the_depth():
    saved = []
    for depth in (4, 12):
        model = adapted(depth, side_layers=[depth - 3, depth - 2])
        optimizer = lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])  # noqa: E731
        saved.append(live_tensor_step(model, BATCH, optimizer)["saved_for_backward"])
    assert saved[0] == saved[1]


# ---- the aggregation


def looped(features: list[Tensor], layer: SherlBlock) -> Tensor:
    """The side network token by token and feature by feature, as the module's text has it; without the gate."""
    p = {name: getattr(layer, f"sherl_{name}")["default"] for name in (
        "down_weight", "down_bias", "mix_weight", "mix_bias", "gate_weight", "gate_bias",
        "score_weight", "score_bias", "out_weight", "out_bias")}  # fmt: skip
    result = []
    for t in range(features[0].shape[0]):
        z = []
        for k, f in enumerate(features):
            u = torch.relu(p["down_weight"][k] @ f[t] + p["down_bias"][k])
            z.append((p["mix_weight"][k] @ u + p["mix_bias"][k] + u)
                     * torch.sigmoid(p["gate_weight"][k] @ u + p["gate_bias"][k]))  # fmt: skip
        *shallow, q = z
        a = []
        for one in shallow:
            R = sum(torch.relu(one @ other / (one.norm() * other.norm())) for other in shallow)
            a.append(torch.relu(p["score_weight"] @ (one * q) + p["score_bias"]) / R)
        g = sum(weight / (sum(a) + 1e-6) * one for weight, one in zip(a, shallow, strict=True)) + q
        result.append(p["out_weight"] @ torch.relu(g) + p["out_bias"])
    return torch.stack(result)


def test_the_side_network_is_the_loop_over_tokens_and_features():
    layer = block(adapted(noise=0.3)).double()
    features = list(torch.randn(4, 7, D, dtype=torch.float64))
    x, theta = torch.randn(7, D, dtype=torch.float64), layer.sherl_theta["default"]
    expected = looped(features, layer) + torch.tanh(theta / 0.1) * x
    torch.testing.assert_close(layer.fused(features, x, "default"), expected, rtol=1e-5, atol=1e-5)


def test_copies_of_a_feature_share_the_weight_of_one():
    torch.manual_seed(0)
    shallow, q = torch.rand(5, 3, 8, dtype=torch.float64), torch.rand(5, 8, dtype=torch.float64)
    shallow[:, 0, 4:], shallow[:, 1:, :4] = 0, 0  # the first has nothing in common with the others
    v, c = torch.rand(8, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    once = aggregated(shallow, q, v, c)
    repeated = torch.cat([shallow, shallow[:, :1], shallow[:, :1]], dim=1)
    torch.testing.assert_close(aggregated(repeated, q, v, c), once, rtol=1e-4, atol=1e-4)


def test_the_weights_of_a_token_add_up_to_one_or_to_nothing():
    shallow = torch.eye(3, dtype=torch.float64)[None]
    q = torch.zeros(1, 3, dtype=torch.float64)
    sums = [aggregated(shallow, q, torch.zeros(3).double(), torch.tensor([c]).double()).sum() for c in (1.0, -1.0)]
    assert sums[0].item() == pytest.approx(1, abs=1e-5)
    assert sums[1] == 0
    dead = aggregated(torch.zeros(1, 3, 3), torch.ones(1, 3), torch.ones(3), torch.zeros(1))
    assert torch.equal(dead, torch.ones(1, 3)), "no division of zero by zero"


def test_a_token_does_not_see_those_after_it():
    model = adapted(noise=0.1)
    other = TOKENS.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 60 + 3
    assert not torch.equal(logits(model, other)[:, 7], logits(model)[:, 7])
    torch.testing.assert_close(logits(model, other)[:, :7], logits(model)[:, :7])


# ---- the start


def test_the_faithful_start_ignores_the_hidden_state_and_has_a_norm_of_ones():
    model = adapted()
    layer, features = block(model), list(torch.randn(4, 7, D))
    one, other = (layer.fused(features, torch.randn(7, D), "default") for _ in range(2))
    assert torch.equal(one, other)
    layer.sherl_theta["default"].data.fill_(0.05)
    assert not torch.equal(layer.fused(features, torch.randn(7, D), "default"), one)
    norm = next(part for part in model.modules() if isinstance(part, SherlNorm))
    assert (norm.sherl_norm["default"].weight == 1).all()
    weights = torch.cat(
        [p.flatten() for name, p in layer.named_parameters() if ".sherl_" in f".{name}" and "weight" in name]
    )
    assert weights.std().item() == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(logits(model), logits(base()))


def test_the_identity_start_is_the_base_model_with_another_norm_too():
    assert torch.equal(logits(adapted(start="identity")), logits(base()))
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "dropout": 0.0}
    opt = OPTForCausalLM(OPTConfig(**shape, vocab_size=64, word_embed_proj_dim=32)).eval()
    nn.init.normal_(opt.model.decoder.final_layer_norm.bias)
    expected = logits(opt)
    assert torch.equal(logits(get_peft_model(opt, SherlConfig(start="identity")).eval()), expected)


@pytest.mark.parametrize("late_layers", [1, 2])
def test_cached_decoding_is_the_full_forward_pass(late_layers):
    model = adapted(noise=0.1, late_layers=late_layers).get_base_model()
    whole, cache, steps = logits(model), None, []
    with torch.no_grad():
        for part in (TOKENS[:, :5], *TOKENS[:, 5:].split(1, dim=1)):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_reloading_gives_the_same_logits_and_the_backbone_is_untouched(tmp_path):
    model = adapted(noise=0.1).train()
    before = base().state_dict()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**BATCH).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(logits(loaded), logits(model))
    after = model.get_base_model().state_dict()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in after.items() if ".sherl_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# ---- cost


@pytest.mark.parametrize(("reduction", "side_layers", "K"), [(4, None, 4), (8, [0, 2], 3)])
def test_the_parameters_are_those_of_the_formula_and_so_is_the_cost_of_a_forward_pass(reduction, side_layers, K):
    model = adapted(reduction=reduction, side_layers=side_layers)
    h = D // reduction
    expected = K * (D * h + h + 2 * (h * h + h)) + (h + 1) + (h * D + D) + 1 + D
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    more = count_inference_flops(model, BATCH) - count_inference_flops(base(), BATCH)
    redundancy = 2 * (K - 1) ** 2 * h  # products with a vector, as v . (z (.) q), are not counted
    assert more == TOKENS.numel() * (2 * (K * (D * h + 2 * h * h) + h * D) + redundancy)


def test_default_features_are_all_early_blocks_and_every_second_one_of_a_deep_model():
    assert SherlConfig().features(4) == [0, 1, 2]
    assert SherlConfig(late_layers=2).features(4) == [0, 1]
    assert SherlConfig().features(20) == list(range(0, 19, 2))
    assert SherlConfig().features(21) == list(range(1, 20, 2))
    assert SherlConfig(side_layers=[2, 0, 2]).features(4) == [0, 2]


def test_features_are_the_embeddings_and_the_outputs_of_the_blocks_that_are_named():
    model = adapted(side_layers=[0, 2], noise=0.1)
    hidden = base()(input_ids=TOKENS, output_hidden_states=True).hidden_states  # the last one is after the norm
    seen = []
    layer = block(model)
    original = layer.fused
    layer.fused = lambda features, x, name: seen.append((features, x)) or original(features, x, name)
    logits(model)
    (features, x) = seen[0]
    for feature, wanted in zip([*features, x], [hidden[0], hidden[1], hidden[3], hidden[3]], strict=True):
        torch.testing.assert_close(feature, wanted)
    assert not layer.seen, "nothing is held after the forward pass"


def test_no_merge_and_one_adapter_at_a_time():
    model = adapted()
    with pytest.raises(ValueError, match="SHERL has no merge"):
        model.merge_adapter()
    model.add_adapter("second", SherlConfig(reduction=8))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one active adapter at a time"):
        logits(model)


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) for part in model.modules())


def test_it_can_be_unloaded_and_takes_its_hooks_along():
    plain, model = base(), adapted(noise=0.1)
    assert not torch.equal(logits(model), logits(plain))
    with pytest.raises(ValueError, match="SHERL has no merge"):
        model.merge_and_unload()
    assert hooks(model) == 3
    unloaded = model.unload()
    assert hooks(unloaded) == 0
    assert not any(isinstance(part, SherlPart) for part in unloaded.modules())
    assert torch.equal(logits(unloaded), logits(plain))
    again = get_peft_model(unloaded, SherlConfig())
    assert hooks(again) == 3


def test_a_deleted_adapter_takes_the_hooks_along_that_no_other_needs():
    model = adapted(side_layers=[0, 1])
    assert hooks(model) == 3
    model.add_adapter("second", SherlConfig(side_layers=[1]))
    copied = copy.deepcopy(model)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert hooks(model) == 2
    assert hooks(copied) == 3
    assert logits(model).isfinite().all()
    copied.delete_adapter("second")
    assert hooks(copied) == 3


def test_several_adapters_in_one_pass_are_refused_in_one_line():
    model = adapted()
    with pytest.raises(ValueError, match="adapter_names: SHERL has one side path"):
        model(input_ids=TOKENS, adapter_names=["default"] * len(TOKENS))
    with pytest.raises(ValueError, match="add_weighted_adapter: SHERL has no update"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_a_method_of_the_suite_that_is_recorded_as_not_mergeable():
    method = method_of("sherl")
    assert method.merges == ("adapter",)
    model = adapt(method, base(), precision="bf16_mixed")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduction": 0}, "reduction=0: must be a positive whole number"),
        ({"start": "zero"}, "start='zero': must be one of faithful, identity"),
        ({"side_layers": []}, r"side_layers=\[\]: must name at least one block, or be null"),
        ({"side_layers": [3]}, r"side_layers=\[3\]: must be indices from 0 to 2, the early blocks"),
        ({"late_layers": 4}, "late_layers=4: must be below the 4 blocks of the model"),
        ({"reduction": 64}, "reduction=64: must be at most 32, the width of the model"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(fields, message):
    model = base()
    with pytest.raises(ValueError, match=message) as error:
        get_peft_model(model, SherlConfig(**fields))
    assert "\n" not in str(error.value)
    assert not any(isinstance(part, SherlBlock | SherlNorm) for part in model.modules())
