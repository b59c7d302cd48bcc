"""Flat-LoRA: the law of the noise, that W is never changed, and gradients at the moved point."""

from __future__ import annotations

import pytest
import torch
from callback_loop import pruned_layers, train_with
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from baselines.flat_lora import FlatLoraConfig, Noise, WeightNoise, draw_noise, fully_noisy, noise_scale, remove_noise
from baselines.masked_lora import MaskedLoraConfig

R = 4


def adapted(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64, **fields: object) -> PeftModel:
    """Layers with an adapter whose factors are both away from zero."""
    torch.manual_seed(0)
    config = FlatLoraConfig(**({"r": R, "lora_alpha": 6, "target_modules": ["proj"]} | fields))
    model = get_peft_model(pruned_layers(*shapes, dtype=dtype), config, autocast_adapter_dtype=False)
    for parameter in factors(model):
        nn.init.normal_(parameter, std=0.1)
    return model


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def layer_of(model: PeftModel) -> nn.Module:
    return model.base_model.model["layers"][0]["proj"]


def merged(layer: nn.Module) -> Tensor:
    """W' = W + s M (.) (B A)."""
    A, B = layer.factors("default")
    update = layer.scaling["default"] * B @ A
    return layer.weight + (update * (layer.weight != 0) if layer.options["default"].keep_zeros else update)


# ---- the law


def test_the_scale_rises_from_zero_to_sigma_on_half_a_cosine():
    scales = [noise_scale(0.2, step, 10) for step in range(11)]
    assert scales[0] == 0
    assert scales[5] == pytest.approx(0.1)
    assert scales[10] == pytest.approx(0.2)
    assert scales == sorted(scales)


@pytest.mark.parametrize("width", [64, 512])
def test_rows_of_the_noise_have_the_deviation_of_the_law_at_any_width(width):
    layer = layer_of(adapted((8, width), keep_zeros=False))
    samples = torch.cat([layer.noise_at(0.3, (seed,)).sample(layer.weight) for seed in range(40_000 // width)], dim=1)
    expected = 0.3 * merged(layer).norm(dim=1) / width**0.5
    torch.testing.assert_close(samples.std(dim=1), expected, rtol=0.03, atol=0)
    assert (samples.mean(dim=1).abs() < 4 * expected / samples.shape[1] ** 0.5).all()


@pytest.mark.parametrize(("fields", "gain"), [
    ({"keep_zeros": False}, 1.0),
    ({"divisor": "kept"}, 1.0),
    ({"divisor": "width"}, 0.5),  # times the density
    ({"mask_noise": False}, 1.0),
])  # fmt: skip
@pytest.mark.parametrize("width", [64, 256])
def test_the_variance_of_the_output_grows_by_sigma_squared(width, fields, gain):
    """For inputs of mean zero, whatever the width."""
    model = adapted((64, width), **fields)
    layer, x = layer_of(model).train(), torch.randn(500, width, dtype=torch.float64)
    with torch.no_grad():
        clean, noisy = layer(x), 0.0
        for seed in range(8):
            layer.noise = layer.noise_at(0.5, (seed,))
            noisy = noisy + (layer(x) - clean).square().mean() / 8
        layer.noise = None
    assert 1 + noisy / clean.square().mean() == pytest.approx(1 + 0.25 * gain, rel=0.02)


# ---- W is never changed


def test_w_and_its_zeros_survive_hundreds_of_perturbed_steps_in_bfloat16():
    model = adapted((24, 32), (24, 32), dtype=torch.bfloat16)
    before = [part["proj"].weight.clone() for part in model.base_model.model["layers"]]
    layer, x = layer_of(model).train(), torch.randn(8, 32, dtype=torch.bfloat16)
    seen = []

    def loss() -> Tensor:
        seen.append(layer.noise)
        return layer(x).float().square().mean()

    train_with(WeightNoise(), model, torch.optim.SGD(factors(model), lr=1e-3), loss, range(201), of=201)
    assert seen[0] is None
    assert all(isinstance(noise, Noise) for noise in seen[1:])
    assert layer.noise is None
    for part, W in zip(model.base_model.model["layers"], before, strict=True):
        assert torch.equal(part["proj"].weight, W)
    zeros = layer.weight == 0
    layer.merge()
    assert (layer.weight[zeros] == 0).all()


def test_evaluation_does_not_see_the_noise_and_a_draw_can_be_repeated():
    model = adapted((24, 32))
    layer, x = layer_of(model), torch.randn(8, 32, dtype=torch.float64)
    expected = layer.eval()(x)
    draw_noise(model, step=3, steps=5, seed=1)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(layer.train()(x), expected)
    assert torch.equal(layer(x), layer(x))
    first = layer.noise.sample(layer.weight)
    torch.rand(3)  # the global generator is not what it is drawn from
    draw_noise(model, step=3, steps=5, seed=1)
    assert torch.equal(layer.noise.sample(layer.weight), first)
    assert ((first == 0) == (layer.weight == 0)).all()
    normal = first / layer.noise.std[:, None]
    for key in ({"step": 4}, {"seed": 2}, {"process": 1}):
        draw_noise(model, **({"step": 3, "steps": 5, "seed": 1} | key))
        assert not torch.allclose(layer.noise.sample(layer.weight) / layer.noise.std[:, None], normal), key
    remove_noise(model)
    assert torch.equal(layer(x), expected)


def test_layers_of_one_shape_have_different_noise_and_the_interval_leaves_steps_out():
    model = adapted((24, 32), (24, 32), interval=3)
    noisy = []
    for step in range(1, 8):
        draw_noise(model, step, steps=8, seed=0)
        noisy.append(layer_of(model).noise is not None)
    assert noisy == [False, False, True, False, False, True, False]
    draw_noise(model, 3, steps=8, seed=0)
    one, other = (part["proj"] for part in model.base_model.model["layers"])
    assert not torch.allclose(one.noise.sample(one.weight) / one.noise.std[:, None],
                              other.noise.sample(other.weight) / other.noise.std[:, None])  # fmt: skip


# ---- gradients


@pytest.mark.parametrize("fields", [{}, {"keep_zeros": False}, {"mask_noise": False}], ids=str)
def test_gradients_are_those_of_a_dense_layer_at_the_moved_weight(fields):
    layer = layer_of(adapted((24, 32), **fields)).train()
    layer.noise = layer.noise_at(0.3, (1,))
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    reference = linear(x, merged(layer) + layer.noise.sample(layer.weight), layer.bias)
    inputs = [x, *layer.factors("default")]
    weights = torch.randn(2, 5, 24, dtype=torch.float64)
    expected = torch.autograd.grad((reference * weights).sum(), inputs)
    output = layer(x)
    torch.testing.assert_close(output, reference)
    for gradient, wanted in zip(torch.autograd.grad((output * weights).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
    again = checkpoint(layer, x, use_reentrant=False)  # as under activation checkpointing
    assert torch.equal(again, output)
    for gradient, wanted in zip(torch.autograd.grad((again * weights).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_the_estimate_gives_the_value_and_the_input_gradient_of_the_exact_form_and_unmasked_gradients():
    outputs, x = [], torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    for exact in (True, False):
        layer = layer_of(adapted((24, 32), exact_gradient=exact)).train()
        layer.noise = layer.noise_at(0.3, (1,))
        y = layer(x)
        outputs.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.factors("default")])))
    exact, estimate = outputs
    torch.testing.assert_close(estimate[:2], exact[:2])
    A, B = layer.factors("default")
    G, s = 2 * estimate[0], layer.scaling["default"]
    torch.testing.assert_close(estimate[2], s * (G @ B).t() @ x)
    torch.testing.assert_close(estimate[3], s * G.t() @ (x @ A.t()))


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass_but_w():
    layer = layer_of(adapted((24, 32))).train()
    layer.noise = layer.noise_at(0.3, (1,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(5, 32, dtype=torch.float64, requires_grad=True))
    assert not [t for t in kept if t.shape == layer.weight.shape and t.data_ptr() != layer.weight.data_ptr()]


def test_micro_batches_of_a_step_share_their_noise_and_steps_do_not():
    model, seen = adapted((24, 32)), []
    layer, x = layer_of(model).train(), torch.randn(8, 32, dtype=torch.float64)

    def loss() -> Tensor:
        seen.append(layer.noise.sample(layer.weight))
        return layer(x).square().mean()

    train_with(WeightNoise(), model, torch.optim.SGD(factors(model), 0.1), loss, [3, 4], of=5, micro_batches=2)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[1], seen[2])


def test_without_noise_the_training_is_that_of_masked_lora_bit_for_bit():
    x, results = torch.randn(6, 40), []
    for config in (
        FlatLoraConfig(r=R, target_modules=["proj"], sigma=0.0),
        MaskedLoraConfig(r=R, target_modules=["proj"]),
    ):
        torch.manual_seed(0)
        model = get_peft_model(pruned_layers((24, 40), dtype=torch.float32), config).train()
        layer = layer_of(model)
        optimizer = torch.optim.AdamW(factors(model), lr=1e-2)
        train_with(WeightNoise(), model, optimizer, lambda layer=layer: layer(x).square().mean(), range(5), of=5)
        results.append(factors(model))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_costliest_step_is_perturbed_and_leaves_nothing_behind():
    model = adapted((24, 32), interval=7)
    with fully_noisy(model):
        torch.testing.assert_close(layer_of(model).noise.std, layer_of(model).noise_at(0.05, (0,)).std)
    assert layer_of(model).noise is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma": -1}, "sigma=-1: must be a number >= 0"),
        ({"interval": 0}, "interval=0: must be a positive number of steps"),
        ({"divisor": "n"}, "divisor='n': must be one of width, kept"),
        ({"mask_noise": None}, "mask_noise=None: must be True or False"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        FlatLoraConfig(**fields)
    assert "\n" not in str(error.value)
