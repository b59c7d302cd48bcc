"""masked_linear against plain autograd, its cost in FLOPs and saved bytes, and odd situations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lors.functional import masked_linear, merged_weight

IN, OUT, RANK, SCALING = 10, 7, 3, 2.5


def random_layer(seed: int = 0, dtype: torch.dtype = torch.float64, n: int = 6) -> dict[str, Tensor]:
    """x [n, in], a half-sparse weight, A, B and bias; x, A, B and bias ask for gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weight = draw(OUT, IN) * (draw(OUT, IN) > 0)
    layer = {"x": draw(n, IN), "weight": weight, "A": draw(RANK, IN), "B": draw(OUT, RANK), "bias": draw(OUT)}
    return {name: tensor if name == "weight" else tensor.requires_grad_() for name, tensor in layer.items()}


def reference(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, masked: bool = True) -> Tensor:
    """The formula of the paper, for autograd; ``masked=False`` is the unmasked LoRA."""
    update = SCALING * B @ A
    return linear(x, weight + (update * (weight != 0) if masked else update), bias)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients for one fixed cotangent: comparable between formulas with different outputs."""
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad(output, inputs, cotangent.to(output.dtype)))


INPUTS = {
    "2-D": lambda x: x,
    "3-D": lambda x: x.reshape(2, 3, IN),
    "4-D": lambda x: x.reshape(1, 2, 3, IN),
    "1-D": lambda x: x[0],
    "one row": lambda x: x[:1],
    "no row": lambda x: x[:0],
    "no row, 3-D": lambda x: x.reshape(2, 3, IN)[:, :0],
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: x.repeat(1, 2)[:, ::2],
    "expanded": lambda x: x[:1].expand(4, IN),
    "swapped batch": lambda x: x.reshape(2, 3, IN).transpose(0, 1),
}


def apply(layer: dict[str, Tensor], **options: object) -> Tensor:
    return masked_linear(**{"scaling": SCALING} | layer | options)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "straight-through"])
@pytest.mark.parametrize("kind", INPUTS)
def test_output_and_gradients_equal_autograd(kind: str, exact: bool, with_bias: bool) -> None:
    layer = random_layer()
    x, weight, A, B = (layer[name] for name in ("x", "weight", "A", "B"))
    bias = layer["bias"] if with_bias else None
    inputs = [x, A, B] + [bias] * with_bias

    output = masked_linear(INPUTS[kind](x), weight, A, B, SCALING, bias, gradient_share=float(exact))
    expected = reference(INPUTS[kind](x), weight, A, B, bias)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)

    exact_gradients = gradients(expected, inputs)
    unmasked = gradients(reference(INPUTS[kind](x), weight, A, B, bias, masked=False), inputs)
    # dX and the gradient of the bias are exact in either setting; those of A and B are LoRA's by default.
    wanted = exact_gradients if exact else [exact_gradients[0], *unmasked[1:3], *exact_gradients[3:]]
    torch.testing.assert_close(gradients(output, inputs), wanted, rtol=1e-12, atol=1e-12)


# ---- cost


def flops_of(name: str, layer: dict[str, Tensor], **options: bool) -> tuple[int, int]:
    """Counted FLOPs of forward and backward if only the tensors in ``name`` ask for gradients."""
    for key, tensor in layer.items():
        tensor.requires_grad_(key in name.split() and key != "weight")
    with FlopCounterMode(display=False) as forward:
        output = apply(layer, **options)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_flops_are_those_of_the_paper_and_nothing_needless_is_computed() -> None:
    n = 6
    U, V, Z = 2 * n * IN * OUT, 2 * RANK * IN * OUT, 2 * n * RANK * (IN + OUT)
    assert flops_of("x A B bias", random_layer(n=n)) == (U + V, U + V + 2 * Z)
    assert flops_of("x A B bias", random_layer(n=n), gradient_share=1) == (U + V, 2 * U + 3 * V)
    assert flops_of("x", random_layer(n=n)) == (U + V, U + V)
    assert flops_of("A B", random_layer(n=n)) == (U + V, 2 * Z)
    assert flops_of("A", random_layer(n=n)) == flops_of("B", random_layer(n=n)) == (U + V, Z)
    assert flops_of("bias", random_layer(n=n)) == (U + V, 0)
    # A checkpoint does not make the last layer again: its inputs are saved before anything is computed.
    layer = random_layer(n=n)
    output = checkpoint(lambda x: apply(layer | {"x": x.relu()}), layer["x"], use_reentrant=False)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == U + V + 2 * Z


def test_products_are_taken_in_the_cheaper_order() -> None:
    """A rank as wide as the layer: G^t X is formed once, and the result is the same."""
    n, layer = 50, random_layer(n=50)
    factors = {"A": torch.ones(OUT, IN, dtype=torch.float64), "B": torch.eye(OUT, dtype=torch.float64)}
    layer |= {name: tensor.requires_grad_() for name, tensor in factors.items()}
    U, V = 2 * n * IN * OUT, 2 * OUT * IN * OUT
    assert flops_of("x A B", layer) == (U + V, 2 * U + 3 * V)
    inputs = [layer["x"], layer["A"], layer["B"]]
    expected = reference(*(layer[name] for name in ("x", "weight", "A", "B", "bias")), masked=False)
    torch.testing.assert_close(gradients(apply(layer), inputs)[1:], gradients(expected, inputs)[1:])


def saved_bytes(layer: dict[str, Tensor], **options: bool) -> int:
    """Bytes that autograd keeps for the backward pass, beyond the weight, the factors and the bias."""
    given = {layer[name].untyped_storage().data_ptr() for name in ("weight", "A", "B", "bias")}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        apply(layer, **options)
    return sum(saved.values())


@pytest.mark.parametrize("exact", [True, False])
def test_only_the_input_is_saved(exact: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = random_layer(dtype=dtype)
        assert saved_bytes(layer, gradient_share=float(exact)) == dtype.itemsize * 6 * IN
        with torch.autocast("cpu", torch.bfloat16):  # in the compute type, and no copy of the weight
            assert saved_bytes(layer, gradient_share=float(exact)) == 2 * 6 * IN
        layer["A"].requires_grad_(False)
        layer["B"].requires_grad_(False)
        assert saved_bytes(layer, gradient_share=float(exact)) == 0  # the input is of no use to dX


# ---- types


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("weight_dtype", "autocast", "backward_inside"),
    [
        (torch.float32, True, False),
        (torch.float32, True, True),
        (torch.bfloat16, True, False),
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
    ],
)
def test_a_bf16_product_of_float32_operands(
    weight_dtype: torch.dtype, autocast: bool, backward_inside: bool, exact: bool
) -> None:
    """In bf16 under autocast or for a bf16 weight: T rounded once, gradients scaled and summed in float32."""
    layer = random_layer(dtype=torch.float32)
    weight = layer["weight"] = layer["weight"].to(weight_dtype)
    inputs = [layer[name] for name in ("x", "A", "B", "bias")]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = apply(layer, gradient_share=float(exact))
        if backward_inside:
            result = gradients(output, inputs)
    if not backward_inside:
        result = gradients(output, inputs)

    X, A, B, bias = (tensor.detach().to(torch.bfloat16) for tensor in inputs)
    update = SCALING * layer["B"].detach().double() @ layer["A"].detach().double()
    T = (weight.double() + update * (weight != 0)).to(torch.bfloat16)
    assert output.dtype is torch.bfloat16
    assert torch.equal(output, linear(X, T, bias))
    G = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16()
    D = (G.t() @ X) * (weight != 0)
    dA, dB = (B.t() @ D, D @ A.t()) if exact else ((G @ B).t() @ X, G.t() @ (X @ A.t()))
    wanted = [(G @ T).float(), SCALING * dA.float(), SCALING * dB.float(), G.float().sum(0)]
    for gradient, expected in zip(result, wanted, strict=True):
        assert gradient.dtype is torch.float32
        assert torch.equal(gradient, expected)


def test_autocast_changes_neither_a_float64_layer_nor_a_backward_pass_after_its_forward() -> None:
    for dtype in (torch.float64, torch.float32):
        layer = random_layer(dtype=dtype)
        inputs = [layer[name] for name in ("x", "A", "B", "bias")]
        expected = gradients(apply(layer), inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float64):
            output = apply(layer)
        with torch.autocast("cpu", torch.bfloat16):
            result = gradients(output, inputs)
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))


def test_mask_is_that_of_the_weight_before_the_cast() -> None:
    """A weight too small for float16 is still an entry of the model; -0.0 is not."""
    weight = torch.tensor([[1e-9, 0.0, -0.0, 1.0]])
    T = merged_weight(weight, torch.ones(1, 4), torch.ones(1, 1), 2.0, torch.float16)
    assert T.dtype is torch.float16
    assert T.tolist() == [[2.0, 0.0, 0.0, 3.0]]


# ---- what is refused


def test_what_autograd_cannot_do_is_refused() -> None:
    layer = random_layer()
    (dx,) = torch.autograd.grad(apply(layer).square().sum(), layer["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    output = apply(layer)
    layer["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    layer["weight"].requires_grad_()
    with pytest.raises(ValueError, match=r"weight\.requires_grad=True.*requires_grad_\(False\)"):
        apply(layer)
    with torch.no_grad():
        assert apply(layer).shape == (6, OUT)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("x", (6, IN + 1)), ("A", (2, IN + 1)), ("A", (2, IN)), ("B", (2, OUT)), ("bias", (1,)), ("weight", (IN,))],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shapes do not fit") as error:
        apply(random_layer() | {name: torch.zeros(shape)})
    assert f"{name} {shape}" in str(error.value)
    assert "\n" not in str(error.value)
