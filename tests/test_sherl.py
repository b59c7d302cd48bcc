"""SHERL: where gradients end, the maths of the aggregation, the start, the key-value cache, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_llama, recipe
from contract import batch, prune
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from baselines.sherl import SherlBlock, SherlConfig, SherlNorm, SherlPart, aggregated
from harness.flops import count_inference_flops
from harness.meter import training_cost
from harness.method import Method

D = 32
BATCH = batch()
TOKENS = BATCH["input_ids"]


def base(depth: int = 4):
    return prune(make_tiny_llama(num_hidden_layers=depth))


def adapted(depth: int = 4, noise: float = 0.1, **fields: object) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(base(depth), SherlConfig(**fields), autocast_adapter_dtype=False).eval()
    for parameter in model.parameters():
        if parameter.requires_grad and noise:
            parameter.data.add_(noise * torch.randn(parameter.shape))
    return model


def block(model: nn.Module) -> SherlBlock:
    return next(part for part in model.modules() if isinstance(part, SherlBlock))


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) for part in model.modules())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


# ---- gradients


def test_gradients_reach_the_side_network_and_nothing_else():
    model = adapted().train()
    # Even if the embeddings ask for a gradient.
    embedding = model.get_base_model().model.embed_tokens.weight.requires_grad_()
    model.get_base_model().lm_head.weight = nn.Parameter(embedding.detach().clone(), requires_grad=False)
    model(**BATCH).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".sherl_" in name), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


def test_the_memory_for_the_backward_pass_does_not_grow_with_the_depth():
    saved = []
    for depth in (4, 12):
        model = adapted(depth, side_layers=[depth - 3, depth - 2])
        method = Method("sherl", model.active_peft_config)
        saved.append(training_cost(model, BATCH, recipe(), method)["memory"]["saved_for_backward"])
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


def test_weights_that_are_all_zero_and_features_that_are_leave_the_deep_feature():
    shallow, q, v = torch.eye(3)[None], torch.ones(1, 3), torch.zeros(3)
    assert torch.equal(aggregated(shallow, q, v, torch.tensor([-1.0])), q)
    assert torch.equal(aggregated(0 * shallow, q, v + 1, torch.zeros(1)), q), "no division of zero by zero"


def test_features_are_the_embeddings_and_the_outputs_of_the_blocks_that_are_named():
    model = adapted(side_layers=[0, 2])
    hidden = base()(input_ids=TOKENS, output_hidden_states=True).hidden_states  # the last one is after the norm
    seen, layer = [], block(model)
    original = layer.fused
    layer.fused = lambda features, x, name: seen.append((features, x, {*layer.seen})) or original(features, x, name)
    logits(model)
    ((features, x, held),) = seen
    assert held == {0, 1, 3}
    for feature, wanted in zip([*features, x], [hidden[0], hidden[1], hidden[3], hidden[3]], strict=True):
        torch.testing.assert_close(feature, wanted)
    assert not layer.seen, "nothing is held after the forward pass"


def test_default_features_are_all_early_blocks_and_every_second_one_of_a_deep_model():
    assert SherlConfig().features(4) == [0, 1, 2]
    assert SherlConfig(late_layers=2).features(4) == [0, 1]
    assert SherlConfig().features(20) == list(range(0, 19, 2))
    assert SherlConfig().features(21) == list(range(1, 20, 2))
    assert SherlConfig(side_layers=[2, 0, 2]).features(4) == [0, 2]


# ---- the start and the cache


def test_the_start_ignores_the_hidden_state_and_has_a_norm_of_ones():
    model = adapted(noise=0.0)
    layer, features = block(model), list(torch.randn(4, 7, D))
    one, other = (layer.fused(features, torch.randn(7, D), "default") for _ in range(2))
    assert torch.equal(one, other)
    norm = next(part for part in model.modules() if isinstance(part, SherlNorm))
    assert (norm.sherl_norm["default"].weight == 1).all()
    assert (SherlNorm(nn.LayerNorm(D), "default", SherlConfig()).sherl_norm["default"].bias == 0).all()
    started = {name: part["default"] for name, part in layer.named_children() if name.startswith("sherl_")}
    weights = torch.cat([value.flatten() for name, value in started.items() if name.endswith("weight")])
    assert weights.std().item() == pytest.approx(0.01, rel=0.1)
    assert not any(value.any() for name, value in started.items() if not name.endswith("weight"))


@pytest.mark.parametrize("late_layers", [1, 2])
def test_cached_decoding_is_the_full_forward_pass(late_layers):
    model = adapted(late_layers=late_layers).get_base_model()
    whole, cache, steps = logits(model), None, []
    with torch.no_grad():
        for part in (TOKENS[:, :5], *TOKENS[:, 5:].split(1, dim=1)):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("reduction", "side_layers", "K"), [(4, None, 4), (8, [0, 2], 3)])
def test_the_parameters_are_those_of_the_formula_and_so_is_the_cost_of_a_forward_pass(reduction, side_layers, K):
    model, h = adapted(reduction=reduction, side_layers=side_layers), D // reduction
    expected = K * (D * h + h + 2 * (h * h + h)) + (h + 1) + (h * D + D) + 1 + D
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    more = count_inference_flops(model, BATCH) - count_inference_flops(base(), BATCH)
    redundancy = 2 * (K - 1) ** 2 * h  # products with a vector, as v . (z (.) q), are not counted
    assert more == TOKENS.numel() * (2 * (K * (D * h + 2 * h * h) + h * D) + redundancy)


# ---- what it does not do


def test_it_is_unloaded_with_its_hooks_and_never_merged():
    plain, model = base(), adapted()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="SHERL has no merge"):
            merge()
    assert hooks(model) == 3
    unloaded = model.unload()
    assert hooks(unloaded) == 0
    assert not any(isinstance(part, SherlPart) for part in unloaded.modules())
    assert torch.equal(logits(unloaded), logits(plain))
    assert hooks(get_peft_model(unloaded, SherlConfig())) == 3


def test_several_adapters_in_one_pass_are_refused_in_one_line():
    model = adapted()
    with pytest.raises(ValueError, match="adapter_names: SHERL has one side path"):
        model(input_ids=TOKENS, adapter_names=["default"] * len(TOKENS))
    model.add_adapter("second", SherlConfig(reduction=8))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one active adapter at a time"):
        logits(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"side_layers": []}, r"side_layers=\[\]: must be indices from 0 to 2, the early blocks"),
        ({"side_layers": [3]}, r"side_layers=\[3\]: must be indices from 0 to 2, the early blocks"),
        ({"late_layers": 4}, "late_layers=4: must be below the 4 blocks of the model"),
        ({"reduction": 64}, "reduction=64: must be at most 32, the width of the model"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_wrapped(fields, message):
    model = base()
    with pytest.raises(ValueError, match=f"^{message}$"):
        get_peft_model(model, SherlConfig(**fields))
    assert not any(isinstance(part, SherlPart) for part in model.modules())
