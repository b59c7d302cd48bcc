"""Flat-LoRA: the law of the noise, that W is never changed, and gradients at the moved point."""

from __future__ import annotations

import pytest
import torch
from callback_loop import train_with
from contract import method_of
from peft import PeftModel
from single_layers import adapted, assert_same, draw, layers, support
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from baselines.flat_lora import FlatLoraConfig, FlatLoraLinear, WeightNoise, draw_noise, noise_scale, remove_noise


def model_of(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64, **fields: object) -> PeftModel:
    """Layers with an adapter whose factors are both away from zero."""
    model = adapted(FlatLoraConfig(r=4, lora_alpha=6, **fields), *shapes, dtype=dtype)
    for parameter in factors(model):
        nn.init.normal_(parameter, std=0.1)
    return model


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def layer_of(outputs: int, inputs: int, **fields: object) -> FlatLoraLinear:
    return layers(model_of((outputs, inputs), **fields))[0]


def merged(layer: FlatLoraLinear) -> Tensor:
    """W' = W + s M (.) (B A)."""
    A, B = layer.factors("default")
    return layer.weight + layer.scaling["default"] * support(layer) * (B @ A)


# ---- the law


def test_the_scale_rises_from_zero_to_sigma_on_half_a_cosine():
    scales = [noise_scale(0.2, step, 10) for step in range(11)]
    assert scales[0] == 0
    assert (scales[5], scales[10]) == pytest.approx((0.1, 0.2))
    assert scales == sorted(scales)


@pytest.mark.parametrize("width", [64, 512])
def test_rows_of_the_noise_have_the_deviation_of_the_law_at_any_width(width):
    layer = layer_of(8, width, keep_zeros=False)
    samples = torch.cat([layer.noise_at(0.3, (seed,)).sample(layer.weight) for seed in range(40_000 // width)], dim=1)
    expected = 0.3 * merged(layer).norm(dim=1) / width**0.5
    torch.testing.assert_close(samples.std(dim=1), expected, rtol=0.03, atol=0)
    assert (samples.mean(dim=1).abs() < 4 * expected / samples.shape[1] ** 0.5).all()


@pytest.mark.parametrize(("keep_zeros", "gain"), [(False, 1.0), (True, 0.5)], ids=["dense", "masked"])
def test_the_variance_of_the_output_grows_by_sigma_squared_times_the_density(keep_zeros, gain):
    """For inputs of mean zero."""
    layer, x = layer_of(64, 128, keep_zeros=keep_zeros), draw(500, 128)
    clean, noisy = layer(x), 0.0
    for seed in range(8):
        layer.noise = layer.noise_at(0.5, (seed,))
        noisy = noisy + (layer(x) - clean).square().mean().item() / 8
    assert 1 + noisy / clean.square().mean().item() == pytest.approx(1 + 0.25 * gain, rel=0.02)


# ---- W is never changed


def test_w_and_its_zeros_survive_hundreds_of_steps_in_bfloat16_each_with_noise_of_its_own():
    model = model_of((24, 32), dtype=torch.bfloat16)
    layer, x, seen = layers(model)[0], draw(8, 32).bfloat16(), []
    before = layer.weight.clone()

    def loss() -> Tensor:
        seen.append(layer.noise)
        return layer(x).float().square().mean()

    optimizer = torch.optim.SGD(factors(model), lr=1e-3)
    train_with(WeightNoise(), model, optimizer, loss, range(201), of=201, micro_batches=2)
    assert seen[::2] == seen[1::2], "the micro-batches of a step share it"
    assert seen[0] is None and layer.noise is None
    assert len({noise.key for noise in seen[2::2]}) == 200
    assert torch.equal(layer.weight, before)


def test_the_draw_is_that_of_seed_step_and_layer_and_evaluation_does_not_see_it():
    model, x = model_of((24, 32), (24, 32)), draw(8, 32)
    layer, second = layers(model)
    expected = layer(x)

    def normal(step: int = 3, seed: int = 1) -> Tensor:
        draw_noise(model, step, 5, seed)
        return layer.noise.sample(layer.weight) / layer.noise.std[:, None]

    first = normal()
    assert not torch.equal(layer(x), expected)
    assert torch.equal(layer.eval()(x), expected)
    torch.rand(3)  # the global generator is not what it is drawn from
    assert torch.equal(normal(), first)
    assert torch.equal(first == 0, layer.weight == 0)
    for other in ({"step": 4}, {"seed": 2}):
        assert not torch.allclose(normal(**other), first), other
    assert layer.noise.key != second.noise.key
    remove_noise(model)
    assert torch.equal(layer.train()(x), expected)


def test_the_interval_leaves_steps_out_and_the_largest_step_is_perturbed():
    model = model_of((24, 32), interval=3)
    (layer,), noisy = layers(model), []
    for step in range(1, 8):
        draw_noise(model, step, steps=8, seed=0)
        noisy.append(layer.noise is not None)
    assert noisy == [False, False, True, False, False, True, False]
    with method_of("flat_lora").largest_step(model):
        torch.testing.assert_close(layer.noise.std, layer.noise_at(0.05, (0,)).std)
    assert layer.noise is None


# ---- gradients


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_gradients_are_those_of_a_dense_layer_at_the_moved_weight(keep_zeros):
    layer = layer_of(24, 32, keep_zeros=keep_zeros)
    layer.noise = layer.noise_at(0.3, (1,))
    x = draw(2, 5, 32).requires_grad_()
    expected = linear(x, merged(layer) + layer.noise.sample(layer.weight))
    assert_same(layer(x), expected, x, *layer.factors("default"))
    # As under activation checkpointing.
    again, expected = checkpoint(layer, x, use_reentrant=False), layer(x)
    assert_same(again, expected, x, *layer.factors("default"))


def test_the_estimate_has_the_value_and_the_input_gradient_of_the_exact_form():
    results, x = [], draw(5, 32).requires_grad_()
    for exact in (True, False):
        layer = layer_of(24, 32, exact_gradient=exact)
        layer.noise = layer.noise_at(0.3, (1,))
        results.append(layer(x))
    assert_same(*results, x)


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass_but_w():
    layer, kept = layer_of(24, 32), []
    layer.noise = layer.noise_at(0.3, (1,))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(draw(5, 32).requires_grad_())
    assert not [t for t in kept if t.shape == layer.weight.shape and t.data_ptr() != layer.weight.data_ptr()]
