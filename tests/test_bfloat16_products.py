"""Products of bfloat16 in float32: the numbers of the hardware up to one rounding, in the operations that are left."""

from __future__ import annotations

import pytest
import torch
from contract import batch, pruned
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from harness.bfloat16_products import PRODUCTS, InFloat32, bfloat16_products
from harness.live_memory import LiveTensors


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_a_product_is_rounded_once() -> None:
    A, B, c = numbers(7, 64), numbers(64, 5), numbers(5)
    with InFloat32():
        found = [A @ B, torch.addmm(c, A, B), (A[None] @ B[None])[0]]
    exact = A.double() @ B.double()
    for Y, wanted in zip(found, (exact, exact + c.double(), exact), strict=True):
        assert Y.dtype is torch.bfloat16
        assert ((Y.double() - wanted).abs() <= 0.5 * 2**-7 * wanted.abs() + 1e-5).all()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients(masked: bool) -> None:
    """As in float32; with a mask of bfloat16 too."""

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (numbers(1, 2, 8, 4 + i)[..., :4].to(dtype).requires_grad_() for i in range(3))
        mask = torch.zeros(8, 8, dtype=dtype).masked_fill_(~torch.ones(8, 8).tril().bool(), -100.0) if masked else None
        y = scaled_dot_product_attention(q, k, v, mask)
        return [y, *torch.autograd.grad(y.sum(), (q, k, v))]

    with InFloat32():
        found = gradients(torch.bfloat16)
    for tensor, wanted in zip(found, gradients(torch.float32), strict=True):
        assert tensor.dtype is torch.bfloat16
        torch.testing.assert_close(tensor.float(), wanted, rtol=0.05, atol=0.05)


class Asked(TorchDispatchMode):
    """The operations of a step on bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[object] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(arg, Tensor) and arg.dtype is torch.bfloat16 for arg in args):
            self.found.add(func)
        return func(*args, **kwargs or {})


def test_every_product_of_a_step_is_among_them() -> None:
    """Forward and backward of a model in bf16; a matrix product that is not on the list would be a slow one."""
    model = pruned(dtype=torch.bfloat16).train()
    with Asked() as asked:
        model(**batch()).loss.backward()
    products = {func for func in asked.found if any(name in str(func) for name in ("mm", "attention", "matmul"))}
    assert products and products <= PRODUCTS


def test_what_counts_sees_the_product_that_was_asked_for() -> None:
    A, B = numbers(8, 16), numbers(16, 4)
    with FlopCounterMode(display=False) as plain:
        A @ B
    with InFloat32(), FlopCounterMode(display=False) as counted:
        A @ B
    assert counted.get_total_flops() == plain.get_total_flops() == 2 * 8 * 16 * 4
    with InFloat32(), LiveTensors() as ledger:
        Y = A @ B
    assert ledger.peak == A.nbytes + B.nbytes + Y.nbytes


def test_other_types_and_fake_tensors_are_left_alone() -> None:
    A = numbers(4, 4, dtype=torch.float32)
    with InFloat32(), torch._subclasses.FakeTensorMode() as mode:
        assert (mode.from_tensor(A) @ mode.from_tensor(A)).shape == (4, 4)
    with InFloat32():
        assert (A @ A).dtype is torch.float32


def test_hardware_that_has_it_is_left_alone(monkeypatch) -> None:
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported)
        assert isinstance(bfloat16_products(torch.device("cpu")), InFloat32) is not supported
    assert not isinstance(bfloat16_products(torch.device("cuda")), InFloat32)
    assert not isinstance(bfloat16_products(torch.device("cpu"), used=False), InFloat32)
