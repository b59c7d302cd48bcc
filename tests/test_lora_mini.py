"""LoRA-Mini: frozen outer factors that come back from their seed, the subspace of the change, and its scale."""

from __future__ import annotations

import json
import math

import pytest
import torch
from contract import batch, logits, method_of, pruned, trainable, trained
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from baselines.lora_mini import OUTERS, LoraMiniConfig, LoraMiniLinear, draw
from harness.method import adapt

IN, OUT, R, ALPHA, INNER, OUTER = 24, 36, 3, 6.0, 10, 14


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(inputs: int = IN, outputs: int = OUT, **fields: object) -> LoraMiniLinear:
    """A half pruned float64 layer with an adapter as at the start."""
    base = nn.Linear(inputs, outputs, dtype=torch.float64).requires_grad_(False)
    base.weight.copy_(noise(outputs, inputs, seed=1) * (noise(outputs, inputs, seed=2) > 0))
    options = {"r": R, "lora_alpha": ALPHA, "a": INNER, "b": OUTER, "target_modules": ["q_proj"]} | fields
    model = get_peft_model(nn.ModuleDict({"q_proj": base}), LoraMiniConfig(**options), autocast_adapter_dtype=False)
    return model.base_model.model["q_proj"]


def shaken(**fields: object) -> LoraMiniLinear:
    layer = layer_of(**fields)
    layer.mini_B_t["default"].data.copy_(noise(*layer.mini_B_t["default"].shape, seed=3))
    return layer


def outers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "mini_outer" in name}


def test_only_the_inner_factors_train_and_their_number_does_not_know_the_widths():
    method = method_of("lora_mini", "method.peft.a=6", "method.peft.b=5")
    model = adapt(method, pruned(), [batch()])
    before = outers(model), logits(model.eval())
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    layers = sum(isinstance(part, LoraMiniLinear) for part in model.modules())
    assert sum(p.numel() for p in trainable(model).values()) == layers * 4 * (6 + 5)
    assert {name.split(".")[-2] for name in trainable(model)} == {"mini_A_t", "mini_B_t"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(2):
        model(**batch()).loss.backward()
        optimizer.step()
    assert all(torch.equal(buffer, before[0][name]) for name, buffer in outers(model).items())
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert not torch.equal(logits(model), before[1])


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_output_and_gradients_are_those_of_the_four_factors(keep_zeros):
    layer = shaken(keep_zeros=keep_zeros)
    W, outer = layer.weight, layer.mini_outer["default"]
    A_t, B_t = layer.mini_A_t["default"], layer.mini_B_t["default"]
    x, s = noise(2, 5, IN).requires_grad_(), ALPHA / R
    M = W != 0 if keep_zeros else torch.ones_like(W)
    expected = linear(x, W + M * (s * outer.B_o @ B_t @ A_t @ outer.A_o), layer.base_layer.bias)
    y, upstream = layer(x), noise(2, 5, OUT, seed=4)
    torch.testing.assert_close(y, expected)
    gradients, wanted = (torch.autograd.grad(out, [x, A_t, B_t], upstream) for out in (y, expected))
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference)
    G = M * (upstream.reshape(-1, OUT).t() @ x.reshape(-1, IN))
    torch.testing.assert_close(gradients[2], s * outer.B_o.t() @ G @ outer.A_o.t() @ A_t.t())


def test_the_change_stays_in_the_subspace_of_the_outer_factors_and_is_a_lora():
    layer = shaken(keep_zeros=False)
    delta, outer = layer.delta_weight(layer.weight, "default").detach(), layer.mini_outer["default"]
    for outside in (
        delta - delta @ torch.linalg.pinv(outer.A_o) @ outer.A_o,
        delta - outer.B_o @ torch.linalg.pinv(outer.B_o) @ delta,
    ):
        assert outside.norm() < 1e-10 * delta.norm()
    assert torch.linalg.matrix_rank(delta) == R
    A, B = layer.factors("default")
    assert A.shape == (R, IN) and B.shape == (OUT, R)
    torch.testing.assert_close(ALPHA / R * B @ A, delta)


def test_a_step_is_that_of_a_lora_on_the_projected_problem():
    """The b x a problem with the gradient B_o^t G A_o^t, mapped back by B_o (.) A_o; plain SGD."""
    layer, rate = shaken(keep_zeros=False), 0.1
    A_t, B_t, outer = layer.mini_A_t["default"], layer.mini_B_t["default"], layer.mini_outer["default"]
    A_o, B_o = outer.A_o, outer.B_o * math.sqrt(OUTER / OUT)  # orthonormal
    outer.B_o.copy_(B_o)
    small_A, small_B = (factor.detach().clone().requires_grad_() for factor in (A_t, B_t))
    x, G = noise(7, IN), noise(7, OUT, seed=5)
    (layer(x) * G).sum().backward()
    ((ALPHA / R * small_B @ small_A) * (B_o.t() @ (G.t() @ x) @ A_o.t())).sum().backward()
    with torch.no_grad():
        for factor in (A_t, B_t, small_A, small_B):
            factor -= rate * factor.grad
    delta = layer.delta_weight(layer.weight, "default")
    torch.testing.assert_close(delta, B_o @ (ALPHA / R * small_B @ small_A) @ A_o, rtol=1e-10, atol=1e-10)


def test_scales_are_those_of_lora():
    layer = layer_of(1024, 512, r=8, a=64, b=64)
    A_t, B_t, outer = layer.mini_A_t["default"], layer.mini_B_t["default"], layer.mini_outer["default"]
    # Single precision: the factors are drawn in float32.
    torch.testing.assert_close(outer.A_o @ outer.A_o.t(), torch.eye(64).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(outer.B_o.t() @ outer.B_o, 512 / 64 * torch.eye(64).double(), atol=1e-4, rtol=0)
    rows = layer.factors("default")[0].square().sum(1)
    assert rows.mean().item() == pytest.approx(1 / 3, rel=0.2)
    assert B_t.count_nonzero() == 0 and A_t.abs().max() <= 1 / 8
    lr = 1e-3
    optimizer = torch.optim.AdamW([A_t, B_t], lr=lr, weight_decay=0.0)
    layer(noise(16, 1024)).square().sum().backward()
    optimizer.step()
    moved = layer.factors("default")[1].square().mean().sqrt().item()
    assert moved == pytest.approx(lr, rel=0.1)


@pytest.mark.parametrize("kind", OUTERS)
def test_every_kind_of_outer_factors_has_the_same_scale(kind):
    layer = layer_of(120, 200, a=20, b=30, outer=kind)
    outer = layer.mini_outer["default"]
    variance = 1 / 3 if kind == "kaiming" else 1.0
    assert outer.A_o.square().sum(1).mean().item() == pytest.approx(variance, rel=0.15)
    assert outer.B_o.square().mean().item() == pytest.approx(variance / 30, rel=0.15)
    if kind == "svd":
        U, _, V = torch.linalg.svd(layer.weight)
        assert (outer.A_o @ V[:20].t()).det().abs().item() == pytest.approx(1, abs=1e-3)
        assert (outer.B_o.t() @ U[:, :30] * math.sqrt(30 / 200)).det().abs().item() == pytest.approx(1, abs=1e-3)


def test_layers_and_seeds_differ_unless_shared():
    def factors_of(**fields: object) -> tuple[Tensor, Tensor]:
        base = nn.ModuleDict({name: nn.Linear(24, 24) for name in ("q_proj", "k_proj")})
        config = LoraMiniConfig(r=2, target_modules=["q_proj", "k_proj"], **fields)
        layers = get_peft_model(base, config).base_model.model
        return tuple(layers[name].mini_outer["default"].A_o for name in ("q_proj", "k_proj"))

    first, second = factors_of()
    assert torch.equal(first, factors_of()[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, factors_of(outer_seed=1)[0])
    first, second = factors_of(share_outer=True)
    assert first is second


@pytest.mark.parametrize("save_outer", [False, True])
def test_loading_draws_the_outer_factors_again_or_reads_them(save_outer, tmp_path):
    model = trained(method_of("lora_mini", f"method.peft.save_outer={str(save_outer).lower()}"), pruned())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("mini_outer" in name for name in saved) == save_outer
    if save_outer:  # what was saved counts, whatever the seed says
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"outer_seed": 5}))
    loaded = PeftModel.from_pretrained(pruned(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits(loaded.eval()), logits(model))
    drawn = outers(loaded)
    assert all(torch.equal(buffer, drawn[name]) for name, buffer in outers(model).items())


def test_another_random_stream_is_refused(tmp_path):
    model = trained(method_of("lora_mini"), pruned())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["outer_torch"] == torch.__version__ and len(config["outer_checksum"]) == 16
    path.write_text(json.dumps(config | {"outer_seed": 1}))
    with pytest.raises(ValueError, match=r"^outer_checksum='\w+': torch .* draws other outer factors") as error:
        PeftModel.from_pretrained(pruned(), tmp_path)
    assert "\n" not in str(error.value)


def test_the_checksum_is_of_the_draw_and_not_of_its_decomposition():
    matrix, checksum = draw(12, 4, "orthonormal", "0:x")
    gaussian, same = draw(12, 4, "gaussian", "0:x")
    assert checksum == same
    # The columns span the same space, in the unique basis with a positive diagonal.
    R_ = matrix.t() @ gaussian
    torch.testing.assert_close(matrix @ R_, gaussian)
    torch.testing.assert_close(R_, R_.triu())
    assert (R_.diagonal() > 0).all()


def test_the_scale_can_make_up_for_the_density():
    half = layer_of(keep_zeros=True, rescale_by_density=True)
    density = (half.weight != 0).double().mean().item()
    assert half.scaling["default"] == pytest.approx(ALPHA / R / math.sqrt(density))
    assert layer_of(keep_zeros=False, rescale_by_density=True).scaling["default"] == ALPHA / R


def test_default_widths_follow_the_layer():
    config = LoraMiniConfig()
    assert config.inner_widths(768, 1024) == (64, 64)
    assert config.inner_widths(4096, 1025) == (128, 128)
    assert config.inner_widths(32, 15) == (16, 7)
    assert LoraMiniConfig(a=5).inner_widths(32, 15) == (5, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"a": 2}, r"^a=2: must be at least r=3 and at most 24 in 'q_proj' \(24 -> 36\)$"),
        ({"b": 37}, r"^b=37: must be at least r=3 and at most 36"),
        ({"b": 30, "outer": "svd"}, r"^b=30: must be at least r=3 and at most 24"),
        ({"a": 0}, "^a=0: must be a positive integer or null$"),
        ({"outer": "random"}, "^outer='random': must be one of orthonormal, gaussian, kaiming, svd$"),
        ({"share_outer": True, "outer": "svd"}, "^share_outer=True: must be false with outer='svd'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**fields)
