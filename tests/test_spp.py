"""SPP: its three organisations against the formula written out, its errors, and the life of an adapter."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from baselines.spp import ORGANISATIONS, SppConfig, SppLinear, blockwise_update, plain_update, scaled_weight

IN, OUT, R, ALPHA = 10, 12, 4, 6.0


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pruned_linear(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    layer = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(draw(OUT, IN, seed=1) * (draw(OUT, IN, seed=2) > 0))
    if bias:
        layer.bias.copy_(draw(OUT, seed=3))
    return layer


def adapted(organisation: str = "plain", dtype: torch.dtype = torch.float64, **fields: object) -> SppLinear:
    """A layer with an adapter whose factors are both away from zero."""
    config = SppConfig(**({"r": R, "lora_alpha": ALPHA, "organisation": organisation} | fields))
    layer = SppLinear(pruned_linear(dtype=dtype), "default", config, config.r, config.lora_alpha / config.r)
    layer.spp_w["default"].data.copy_(draw(config.r, IN, seed=4))
    layer.spp_c["default"].data.copy_(draw(OUT, 1, seed=5))
    return layer


def effective_weight(layer: SppLinear) -> Tensor:
    """W_ij (1 + s w_gj c_i) with g = floor(i r / out), entry by entry as the paper defines it."""
    W, w, c = layer.weight, layer.spp_w["default"], layer.spp_c["default"]
    s, block = layer.scaling["default"], [i * len(w) // OUT for i in range(OUT)]
    return torch.stack([W[i] * (1 + s * w[block[i]] * c[i, 0]) for i in range(OUT)])


def trained_gradients(output: Tensor, layer: SppLinear, x: Tensor) -> list[Tensor]:
    inputs = [x, layer.spp_w["default"], layer.spp_c["default"]]
    return list(torch.autograd.grad(output, inputs, draw(*output.shape, seed=6)))


@pytest.mark.parametrize("organisation", ORGANISATIONS)
@pytest.mark.parametrize("r", [r for r in range(1, OUT + 1) if OUT % r == 0])
def test_output_and_gradients_are_those_of_the_formula(organisation, r):
    layer = adapted(organisation, r=r)
    x = draw(2, 3, IN).requires_grad_()
    y, expected = layer(x), linear(x, effective_weight(layer), layer.bias)
    torch.testing.assert_close(y, expected)
    for gradient, reference in zip(trained_gradients(y, layer, x), trained_gradients(expected, layer, x), strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("organisation", ["checkpoint", "blockwise"])
def test_organisations_agree_under_the_same_dropout(organisation):
    results = []
    for name in ("plain", organisation):
        layer = adapted(name, dropout=0.4).train()
        x = draw(5, IN).requires_grad_()
        torch.manual_seed(0)
        y = layer(x)
        torch.rand(7)  # the generator moves on before the backward pass draws again
        results.append([y, *trained_gradients(y, layer, x)])
    for value, reference in zip(*results, strict=True):
        torch.testing.assert_close(value, reference)


@pytest.mark.parametrize("organisation", ORGANISATIONS)
def test_dropout_leaves_the_base_path_alone(organisation):
    layer = adapted(organisation, dropout=0.9).train()
    x = draw(5, IN)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), linear(x, effective_weight(layer), layer.bias))
    layer.train()
    layer.spp_c["default"].data.zero_()
    assert torch.equal(layer(x), layer.base_layer(x))


def test_at_the_start_only_the_column_factor_has_a_gradient():
    config = SppConfig(r=R, lora_alpha=ALPHA)
    layer = SppLinear(pruned_linear(), "default", config, R, ALPHA / R)
    x = draw(5, IN).requires_grad_()
    _, dw, dc = trained_gradients(layer(x), layer, x)
    assert dw.count_nonzero() == 0
    assert dc.count_nonzero() == OUT
    assert layer.spp_w["default"].abs().max() <= IN**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_formula_rounded_once(dtype):
    layer = adapted(dtype=dtype)
    W = layer.weight.clone()
    factors = [layer.spp_w["default"].float(), layer.spp_c["default"].float()]
    expected = (W.float() + layer.scaling["default"] * scaled_weight(W.float(), *factors)).to(dtype)
    layer.merge()
    assert torch.equal(layer.weight, expected)
    assert (layer.weight[W == 0] == 0).all()
    layer.unmerge()
    assert torch.equal(layer.weight, W)


def test_a_weight_scaled_to_zero_is_one_more_zero():
    """c = -1 / (s E) makes W_eff zero where W is not; nothing may become NaN, and no zero may be filled."""
    layer = adapted(dtype=torch.bfloat16)
    W = layer.weight.clone()
    layer.spp_w["default"].data.fill_(2.0)
    layer.spp_c["default"].data.fill_(-1 / (2.0 * layer.scaling["default"]))
    layer.merge(safe_merge=True)
    assert (layer.weight[W == 0] == 0).all()
    assert layer.weight.float().abs().max() <= W.float().abs().max() * 2**-7


def test_no_temporary_of_the_weights_size_in_the_blockwise_update():
    """Forward and backward; a single row makes everything but the weight small."""
    wide, rows = 512, 8
    W, x = draw(wide, wide), draw(1, wide).requires_grad_()
    w, c = draw(rows, wide).requires_grad_(), draw(wide, 1).requires_grad_()

    class LargestResult(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != W.data_ptr():
                    self.numel = max(self.numel, tensor.numel())
            return result

    largest = {}
    for update in (plain_update, blockwise_update):
        with LargestResult() as results:
            update(x, W, w, c).sum().backward()
        largest[update] = results.numel
    assert largest[plain_update] == wide * wide
    assert largest[blockwise_update] == rows * wide  # the gradient of w itself


def test_several_adapters_add_up_and_come_off_again():
    layer = adapted("checkpoint")
    base = layer.base_layer(draw(5, IN))
    layer.update_layer("second", SppConfig(r=3, lora_alpha=3, organisation="blockwise"), 3, 1.0)
    layer.spp_c["second"].data.copy_(draw(OUT, 1, seed=7))
    x, W = draw(5, IN), layer.weight.clone()
    changes = []
    for name in ("default", "second"):
        layer.set_adapter(name)
        changes.append(layer(x) - base)
    layer.set_adapter(["default", "second"])
    together = layer(x)
    torch.testing.assert_close(together, base + changes[0] + changes[1])

    layer.merge(adapter_names=["second"])
    layer.merge(adapter_names=["default"])  # scales the original weight, not the one that is merged already
    torch.testing.assert_close(layer(x), together)
    layer.unmerge()
    assert torch.equal(layer.weight, W)
    layer.delete_adapter("default")
    torch.testing.assert_close(layer(x), base + changes[1])


def test_r_must_divide_the_output_width_and_the_error_says_where():
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 12), "k_proj": nn.Linear(8, 10)})
    with pytest.raises(ValueError, match=r"r=4: .* 'k_proj', 10;") as error:
        get_peft_model(model, SppConfig(r=4, target_modules=["q_proj", "k_proj"]))
    assert "\n" not in str(error.value)
    assert isinstance(model["q_proj"], nn.Linear)  # nothing was replaced
    fitting = SppConfig(r=4, rank_pattern={"k_proj": 5}, target_modules=["q_proj", "k_proj"])
    wrapped = get_peft_model(model, fitting)
    assert wrapped.get_nb_trainable_parameters()[0] == (4 * 8 + 12) + (5 * 8 + 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0: the rank must be a positive integer"),
        ({"r": 2.0}, "r=2.0: the rank must be a positive integer"),
        ({"lora_alpha": -1}, "lora_alpha=-1: alpha must be a positive number"),
        ({"dropout": 1.0}, "dropout=1.0: must be a probability"),
        ({"organisation": "gc"}, "organisation='gc': must be one of plain, checkpoint, blockwise"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "layers_to_transform"),
        ({"layers_pattern": "layers", "target_modules": ["q_proj"]}, "needs layers_to_transform"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        SppConfig(**fields)
    assert "\n" not in str(error.value)


def test_only_plain_linear_layers_are_adapted():
    with pytest.raises(ValueError, match=r"'emb' is of type Embedding: allowed are nn.Linear"):
        get_peft_model(nn.ModuleDict({"emb": nn.Embedding(8, 12)}), SppConfig(r=4, target_modules=["emb"]))
