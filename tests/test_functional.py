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


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "straight-through"])
@pytest.mark.parametrize("kind", INPUTS)
def test_output_and_gradients_equal_autograd(kind: str, exact: bool, with_bias: bool) -> None:
    layer = random_layer()
    x, weight, A, B = (layer[name] for name in ("x", "weight", "A", "B"))
    bias = layer["bias"] if with_bias else None
    inputs = [x, A, B] + [bias] * with_bias

    output = masked_linear(INPUTS[kind](x), weight, A, B, SCALING, bias, exact_gradient=exact)
    expected = reference(INPUTS[kind](x), weight, A, B, bias)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)

    exact_gradients = gradients(expected, inputs)
    unmasked = gradients(reference(INPUTS[kind](x), weight, A, B, bias, masked=False), inputs)
    # dX and the gradient of the bias are exact in either setting; those of A and B are LoRA's by default.
    wanted = exact_gradients if exact else [exact_gradients[0], *unmasked[1:3], *exact_gradients[3:]]
    torch.testing.assert_close(gradients(output, inputs), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exact", [True, False])
def test_finite_differences(exact: bool) -> None:
    """The exact gradient, and for a dense weight the straight-through one, are derivatives of the output."""
    layer = random_layer()
    weight = layer["weight"] if exact else torch.where(layer["weight"] == 0, 1.0, layer["weight"])

    def function(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return masked_linear(x, weight, A, B, SCALING, bias, exact_gradient=exact)

    assert torch.autograd.gradcheck(function, tuple(layer[name] for name in ("x", "A", "B", "bias")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_update_is_the_pruned_layer_bit_for_bit(dtype: torch.dtype) -> None:
    layer = random_layer(dtype=dtype)
    B = torch.zeros_like(layer["B"]).requires_grad_()
    output = masked_linear(layer["x"], layer["weight"], layer["A"], B, SCALING, layer["bias"])
    assert torch.equal(output, linear(layer["x"], layer["weight"], layer["bias"]))
    dA, dB = gradients(output, [layer["A"], B])
    assert not dA.any()
    assert dB.any()


@pytest.mark.parametrize("exact", [True, False])
def test_scale_belongs_to_the_factors(exact: bool) -> None:
    """s B A is (s B) A: same output, and by the chain rule dB(s) = s dB(1) and dA(s) = dA(1)."""
    layer = random_layer()
    x, weight, A, B = (layer[name] for name in ("x", "weight", "A", "B"))
    scaled_B = (SCALING * B).detach().requires_grad_()
    output = masked_linear(x, weight, A, B, SCALING, exact_gradient=exact)
    moved = masked_linear(x, weight, A, scaled_B, 1.0, exact_gradient=exact)
    torch.testing.assert_close(output, moved)
    (dA, dB), (dA_moved, dB_moved) = gradients(output, [A, B]), gradients(moved, [A, scaled_B])
    torch.testing.assert_close(dA, dA_moved)
    torch.testing.assert_close(dB, SCALING * dB_moved)


@pytest.mark.parametrize("exact", [True, False])
def test_factors_may_be_expressions(exact: bool) -> None:
    """A gate and a core matrix inside the factors get the gradients that the chain rule gives them."""
    layer = random_layer()
    x, weight, A, B = (layer[name] for name in ("x", "weight", "A", "B"))
    gate = torch.rand(RANK, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    core = torch.eye(RANK, dtype=torch.float64).mul(0.5).requires_grad_()
    output = masked_linear(x, weight, core @ A, B * gate, SCALING, exact_gradient=exact)
    expected = reference(x, weight, core @ A, B * gate, None, masked=exact)
    torch.testing.assert_close(
        gradients(output, [A, B, gate, core]), gradients(expected, [A, B, gate, core]), rtol=1e-12, atol=1e-12
    )


def test_all_zero_weight_has_no_update_and_no_exact_gradient() -> None:
    layer = random_layer()
    weight = torch.zeros_like(layer["weight"])
    output = masked_linear(layer["x"], weight, layer["A"], layer["B"], SCALING, exact_gradient=True)
    assert not output.any()
    assert not any(gradient.any() for gradient in gradients(output, [layer["x"], layer["A"], layer["B"]]))


def flops_of(name: str, layer: dict[str, Tensor], **options: bool) -> tuple[int, int]:
    """Counted FLOPs of forward and backward if only the tensors in ``name`` ask for gradients."""
    for key, tensor in layer.items():
        tensor.requires_grad_(key in name.split() and key != "weight")
    with FlopCounterMode(display=False) as forward:
        output = masked_linear(layer["x"], layer["weight"], layer["A"], layer["B"], SCALING, layer["bias"], **options)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_flops_are_those_of_the_paper_and_nothing_needless_is_computed() -> None:
    n = 6
    U, V, Z = 2 * n * IN * OUT, 2 * RANK * IN * OUT, 2 * n * RANK * (IN + OUT)
    assert flops_of("x A B bias", random_layer(n=n)) == (U + V, U + V + 2 * Z)
    assert flops_of("x A B bias", random_layer(n=n), exact_gradient=True) == (U + V, 2 * U + 3 * V)
    assert flops_of("x", random_layer(n=n)) == (U + V, U + V)
    assert flops_of("A B", random_layer(n=n)) == (U + V, 2 * Z)
    assert flops_of("A", random_layer(n=n)) == (U + V, Z)
    assert flops_of("B", random_layer(n=n)) == (U + V, Z)
    assert flops_of("bias", random_layer(n=n)) == (U + V, 0)


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
        masked_linear(layer["x"], layer["weight"], layer["A"], layer["B"], SCALING, layer["bias"], **options)
    return sum(saved.values())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_input_is_saved(dtype: torch.dtype, exact: bool) -> None:
    layer = random_layer(dtype=dtype, n=6)
    assert saved_bytes(layer, exact_gradient=exact) == dtype.itemsize * 6 * IN
    layer["A"].requires_grad_(False)
    layer["B"].requires_grad_(False)
    assert saved_bytes(layer, exact_gradient=exact) == 0  # the input is of no use to dX


def test_autocast_saves_the_input_in_the_compute_type_and_no_copy_of_the_weight() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_bytes(random_layer(dtype=torch.float32, n=6)) == 2 * 6 * IN


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_autocast(weight_dtype: torch.dtype, backward_inside: bool, exact: bool) -> None:
    """Output in bf16, T rounded once from the operands as they are, gradients in the types of their inputs."""
    layer = random_layer(dtype=torch.float32)
    layer["weight"] = layer["weight"].to(weight_dtype)
    inputs = [layer[name] for name in ("x", "A", "B", "bias")]
    with torch.autocast("cpu", torch.bfloat16):
        output = masked_linear(
            layer["x"], layer["weight"], layer["A"], layer["B"], SCALING, layer["bias"], exact_gradient=exact
        )
        assert output.dtype is torch.bfloat16
        if backward_inside:
            result = gradients(output, inputs)
    if not backward_inside:
        result = gradients(output, inputs)
    assert_closed_forms(layer, exact, output, result)


@pytest.mark.parametrize("exact", [True, False])
def test_float32_operands_of_a_bf16_layer(exact: bool) -> None:
    """Computed in bf16, the type of the weight; the gradients are scaled and summed in float32."""
    layer = random_layer(dtype=torch.float32)
    weight = layer["weight"].to(torch.bfloat16)
    inputs = [layer[name] for name in ("x", "A", "B", "bias")]
    output = masked_linear(layer["x"], weight, layer["A"], layer["B"], SCALING, layer["bias"], exact_gradient=exact)
    assert output.dtype is torch.bfloat16
    assert_closed_forms(layer | {"weight": weight}, exact, output, gradients(output, inputs))


def assert_closed_forms(layer: dict[str, Tensor], exact: bool, output: Tensor, result: list[Tensor]) -> None:
    """Output and gradients of a bf16 product with float32 operands, bit for bit."""
    weight = layer["weight"]
    X, A, B, bias = (layer[name].detach().to(torch.bfloat16) for name in ("x", "A", "B", "bias"))
    update = SCALING * layer["B"].detach().double() @ layer["A"].detach().double()
    T = (weight.double() + update * (weight != 0)).to(torch.bfloat16)
    assert torch.equal(output, linear(X, T, bias))

    G = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16()
    D = (G.t() @ X) * (weight != 0)
    dA, dB = (B.t() @ D, D @ A.t()) if exact else ((G @ B).t() @ X, G.t() @ (X @ A.t()))
    wanted = [(G @ T).float(), SCALING * dA.float(), SCALING * dB.float(), G.float().sum(0)]
    for gradient, expected in zip(result, wanted, strict=True):
        assert gradient.dtype is torch.float32
        assert torch.equal(gradient, expected)


def test_backward_under_autocast_keeps_the_types_of_the_forward() -> None:
    layer = random_layer(dtype=torch.float32)
    inputs = [layer[name] for name in ("x", "A", "B", "bias")]

    def output() -> Tensor:
        return masked_linear(layer["x"], layer["weight"], layer["A"], layer["B"], SCALING, layer["bias"])

    expected, late = gradients(output(), inputs), output()
    with torch.autocast("cpu", torch.bfloat16):
        result = gradients(late, inputs)
    assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))


def test_float64_weight_is_left_alone_by_autocast() -> None:
    layer = random_layer()
    with torch.autocast("cpu", torch.bfloat16):
        output = masked_linear(layer["x"], layer["weight"], layer["A"], layer["B"], SCALING)
    torch.testing.assert_close(
        output, reference(layer["x"], layer["weight"], layer["A"], layer["B"], None), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    layer = random_layer(dtype=torch.float32)
    inputs = [layer[name] for name in ("x", "A", "B", "bias")]

    def block(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return masked_linear(x.relu(), layer["weight"], A, B, SCALING, bias).sin()

    results = []
    for wrapped in (block, lambda *arguments: checkpoint(block, *arguments, use_reentrant=reentrant)):
        for tensor in inputs:
            tensor.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = wrapped(*inputs).float().square().sum()
        loss.backward()
        results.append([loss, *(tensor.grad for tensor in inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_checkpoint_does_not_make_the_last_layer_again() -> None:
    """U + V less than making it again: its inputs are saved before anything is computed, and there it stops."""
    n = 6
    U, V, Z = 2 * n * IN * OUT, 2 * RANK * IN * OUT, 2 * n * RANK * (IN + OUT)
    layer = random_layer(n=n)
    arguments = [layer[name] for name in ("weight", "A", "B")]
    output = checkpoint(lambda x: masked_linear(x.relu(), *arguments, SCALING), layer["x"], use_reentrant=False)
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
    output = masked_linear(*[layer[name] for name in ("x", "weight", "A", "B")], SCALING)
    expected = reference(*[layer[name] for name in ("x", "weight", "A", "B")], None, masked=False)
    torch.testing.assert_close(gradients(output, inputs)[1:], gradients(expected, inputs)[1:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, raised by torch.compile's own imports
def test_compiles_without_a_graph_break() -> None:
    layer = random_layer(dtype=torch.float32)
    arguments = [layer[name] for name in ("x", "weight", "A", "B")]
    inputs = [layer["x"], layer["A"], layer["B"]]
    compiled = torch.compile(masked_linear, backend="aot_eager", fullgraph=True)
    output, expected = compiled(*arguments, SCALING), masked_linear(*arguments, SCALING)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, inputs), gradients(expected, inputs))


def test_meta_tensors_give_shapes() -> None:
    layer = {name: tensor.to("meta") for name, tensor in random_layer().items()}
    output = masked_linear(layer["x"], layer["weight"], layer["A"], layer["B"], SCALING, layer["bias"])
    assert output.shape == (6, OUT)
    assert torch.autograd.grad(output.sum(), layer["A"])[0].shape == (RANK, IN)


def test_second_derivative_is_refused() -> None:
    layer = random_layer()
    output = masked_linear(layer["x"], layer["weight"], layer["A"], layer["B"], SCALING)
    (dx,) = torch.autograd.grad(output.square().sum(), layer["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_weight_that_wants_a_gradient_is_refused() -> None:
    layer = random_layer()
    arguments = layer["x"], layer["weight"].requires_grad_(), layer["A"], layer["B"], SCALING
    with pytest.raises(ValueError, match=r"weight\.requires_grad=True.*requires_grad_\(False\)"):
        masked_linear(*arguments)
    with torch.no_grad():
        assert masked_linear(*arguments).shape == (6, OUT)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (6, IN + 1)),
        ("A", (RANK, IN + 1)),
        ("A", (RANK + 1, IN)),
        ("B", (RANK, OUT)),
        ("bias", (1,)),
        ("weight", (IN,)),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    layer = random_layer() | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match="shapes do not fit") as error:
        masked_linear(layer["x"], layer["weight"], layer["A"], layer["B"], SCALING, layer["bias"])
    assert f"{name} {shape}" in str(error.value)
    assert "\n" not in str(error.value)


def test_weight_changed_between_forward_and_backward_is_an_error() -> None:
    layer = random_layer()
    output = masked_linear(layer["x"], layer["weight"], layer["A"], layer["B"], SCALING)
    layer["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_mask_is_that_of_the_weight_before_the_cast() -> None:
    """A weight too small for float16 is still an entry of the model; -0.0 is not."""
    weight = torch.tensor([[1e-9, 0.0, -0.0, 1.0]])
    T = merged_weight(weight, torch.ones(1, 4), torch.ones(1, 1), 2.0, torch.float16)
    assert T.dtype is torch.float16
    assert T.tolist() == [[2.0, 0.0, 0.0, 3.0]]
