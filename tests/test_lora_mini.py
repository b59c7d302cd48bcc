"""LoRA-Mini: frozen outer factors that come back from their seed, the formula of the four factors, and its scale."""

from __future__ import annotations

import json

import pytest
import torch
from contract import logits, method_of, pruned, trainable, trained
from peft import PeftModel
from safetensors.torch import load_file
from single_layers import adapted, assert_same, draw, layers, support
from torch import Tensor, nn
from torch.nn.functional import linear

from baselines.lora_mini import OUTERS, LoraMiniConfig, LoraMiniLinear
from baselines.lora_mini import draw as draw_outer
from harness.method import adapt

IN, OUT, R, ALPHA, INNER, OUTER = 24, 36, 3, 6.0, 10, 14


def layer_of(inputs: int = IN, outputs: int = OUT, **fields: object) -> LoraMiniLinear:
    options = {"r": R, "lora_alpha": ALPHA, "a": INNER, "b": OUTER} | fields
    (layer,) = layers(adapted(LoraMiniConfig(**options), (outputs, inputs)))
    return layer


def outers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "lora_mini_outer" in name}


def test_only_the_inner_factors_train_and_their_number_does_not_know_the_widths():
    method = method_of("lora_mini", "method.peft.a=6", "method.peft.b=5")
    model = trained(method, pruned())
    assert sum(p.numel() for p in trainable(model).values()) == len(layers(model)) * 4 * (6 + 5)
    assert {name.split(".")[-2] for name in trainable(model)} == {"lora_mini_A_t", "lora_mini_B_t"}
    start = outers(adapt(method, pruned()))
    assert all(torch.equal(buffer, start[name]) for name, buffer in outers(model).items())


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_output_and_gradients_are_those_of_the_four_factors(keep_zeros):
    layer = layer_of(keep_zeros=keep_zeros)
    A_t, B_t, outer = layer.lora_mini_A_t["default"], layer.lora_mini_B_t["default"], layer.lora_mini_outer["default"]
    B_t.data.copy_(draw(*B_t.shape, seed=3))
    x, M = draw(2, 5, IN).requires_grad_(), support(layer)
    expected = linear(x, layer.weight + M * (ALPHA / R * outer.B_o @ B_t @ A_t @ outer.A_o))
    assert_same(layer(x), expected, x, A_t, B_t)
    A, B = layer.factors("default")
    assert (A.shape, B.shape) == ((R, IN), (OUT, R))


def test_scales_are_those_of_lora():
    layer = layer_of(1024, 512, r=8, a=64, b=64)
    A_t, B_t, outer = layer.lora_mini_A_t["default"], layer.lora_mini_B_t["default"], layer.lora_mini_outer["default"]
    # Single precision: the factors are drawn in float32.
    torch.testing.assert_close(outer.A_o @ outer.A_o.t(), torch.eye(64).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(outer.B_o.t() @ outer.B_o, 512 / 64 * torch.eye(64).double(), atol=1e-4, rtol=0)
    rows = layer.factors("default")[0].square().sum(1)
    assert rows.mean().item() == pytest.approx(1 / 3, rel=0.2)
    assert B_t.count_nonzero() == 0 and A_t.abs().max() <= 1 / 8
    lr = 1e-3
    optimizer = torch.optim.AdamW([A_t, B_t], lr=lr, weight_decay=0.0)
    layer(draw(16, 1024)).square().sum().backward()
    optimizer.step()
    moved = layer.factors("default")[1].square().mean().sqrt().item()
    assert moved == pytest.approx(lr, rel=0.1)


@pytest.mark.parametrize("kind", OUTERS)
def test_every_kind_of_outer_factors_has_the_same_scale(kind):
    outer = layer_of(120, 200, a=20, b=30, outer=kind).lora_mini_outer["default"]
    variance = 1 / 3 if kind == "kaiming" else 1.0
    assert outer.A_o.square().sum(1).mean().item() == pytest.approx(variance, rel=0.15)
    assert outer.B_o.square().mean().item() == pytest.approx(variance / 30, rel=0.15)
    assert outer.B_o.mean().abs() < 0.1 * outer.B_o.std()


def test_every_side_layer_and_seed_has_outer_factors_of_its_own():
    def drawn(seed: int) -> list[Tensor]:
        model = adapted(LoraMiniConfig(r=2, outer_seed=seed, outer="gaussian"), (24, 24), (24, 24))
        outer = [layer.lora_mini_outer["default"] for layer in layers(model)]
        return [side / side.norm() for factors in outer for side in (factors.A_o, factors.B_o.t())]

    sides = drawn(0)
    assert all(torch.equal(*both) for both in zip(sides, drawn(0), strict=True))
    sides += drawn(1)
    assert not any(torch.allclose(sides[i], sides[j]) for i in range(8) for j in range(i))


def test_saved_outer_factors_count_whatever_the_seed_says(tmp_path):
    """That those which are not saved are drawn again is what test_contract.py saves and loads."""
    model = trained(method_of("lora_mini", "method.peft.save_outer=true"), pruned())
    model.save_pretrained(tmp_path)
    assert any("lora_mini_outer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"outer_seed": 5}))
    loaded = PeftModel.from_pretrained(pruned(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_another_random_stream_is_refused(tmp_path):
    model = trained(method_of("lora_mini"), pruned())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["outer_torch"] == torch.__version__ and len(config["outer_checksum"]) == 16
    assert not any("lora_mini_outer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    path.write_text(json.dumps(config | {"outer_seed": 1}))
    with pytest.raises(ValueError, match=r"^outer_checksum='\w+': torch .* draws other outer factors") as error:
        PeftModel.from_pretrained(pruned(), tmp_path)
    assert "\n" not in str(error.value)


def test_the_checksum_is_of_the_draw_and_not_of_its_decomposition():
    matrix, checksum = draw_outer(12, 4, "orthonormal", "0:x")
    gaussian, same = draw_outer(12, 4, "gaussian", "0:x")
    assert checksum == same
    # The columns span the same space, in the unique basis with a positive diagonal.
    R_ = matrix.t() @ gaussian
    torch.testing.assert_close(matrix @ R_, gaussian)
    torch.testing.assert_close(R_, R_.triu())
    assert (R_.diagonal() > 0).all()


def test_default_widths_follow_the_layer():
    config = LoraMiniConfig()
    assert config.inner_widths(768, 1024) == (64, 64)
    assert config.inner_widths(4096, 1025) == (128, 128)
    assert config.inner_widths(32, 15) == (16, 7)
    assert LoraMiniConfig(a=5).inner_widths(32, 15) == (5, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"a": 2}, r"^a=2: must be at least r=3 and at most 24 in 'layers\.0\.proj' \(24 -> 36\)$"),
        ({"b": 37}, r"^b=37: must be at least r=3 and at most 36"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**fields)
