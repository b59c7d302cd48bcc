"""X T^t + bias on the 2:4 tensor cores of a GPU, through torch's semi-structured kernels (cuSPARSELt, else CUTLASS).

T = W + M (.) (s B A) is 2:4 where W is. The kernels want it compressed, and since T is made anew in every call it is
compressed anew as well: one pass that reads 2 out in bytes and writes 9/8 out in, against a product that at best takes
half the time. Which is faster depends on the shape, so ``auto`` times both, once for each shape. The backward product
G T stays dense: T^t has its zeros along the other dimension.

The operator ``lors::linear_2_4`` is one operation for compilers, fake tensors and counters, like the merge.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured
from torch.utils.flop_counter import register_flop_formula

from lors.kernels import usage
from lors.kernels.check import capturing, milliseconds
from lors.kernels.layout import DENSE
from lors.kernels.ops import library

__all__ = ["AUTO", "PRODUCTS", "SEMI_STRUCTURED", "product", "runs"]

SEMI_STRUCTURED = "2:4"
AUTO = "auto"
# How X T^t is computed: a dense product; the 2:4 kernels; the faster of the two.
PRODUCTS = (DENSE, SEMI_STRUCTURED, AUTO)
# What both of torch's backends take: rows and columns of T.
MULTIPLE = 64
CAPABILITY = (8, 0)  # the first with 2:4 tensor cores
# (device, type, out, in, rows of X rounded up to a power of two) -> whether the sparse product is faster.
_faster: dict[tuple[torch.device, torch.dtype, int, int, int], bool] = {}


def product(x: Tensor, T: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """X T^t + bias.

    Args:
        x: ``[..., in]``.
        T: out x in, in the type of ``x``; 2:4 along ``in`` unless ``kind`` is dense.
        bias: ``[out]`` or None, likewise.
        kind: One of ``PRODUCTS``; ``auto`` is dense where the sparse kernels do not run.

    Raises:
        ValueError: ``2:4`` where the sparse kernels do not run.
    """
    if kind == DENSE:
        return linear(x, T, bias)
    return torch.ops.lors.linear_2_4(x, T, bias, kind == SEMI_STRUCTURED)


def runs(T: Tensor) -> bool:
    """Whether the sparse kernels take this weight, apart from its zeros."""
    return (
        T.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(T.device) >= CAPABILITY
        and T.dtype in (torch.bfloat16, torch.float16)
        and T.shape[0] % MULTIPLE == T.shape[1] % MULTIPLE == 0
    )


@torch.library.impl(library, "linear_2_4", "CompositeExplicitAutograd")
def _linear_2_4(x: Tensor, T: Tensor, bias: Tensor | None, forced: bool) -> Tensor:
    with torch.no_grad():
        if not x.numel() or not (forced or runs(T)):
            usage.ran("product", DENSE)
            return linear(x, T, bias)
        if not runs(T):
            raise ValueError(
                f"forward_product={SEMI_STRUCTURED!r}: needs a CUDA device of capability 8.0 or later, bfloat16 or "
                f"float16 and sides that {MULTIPLE} divides; this is {T.device}, {T.dtype}, {tuple(T.shape)}"
            )
        X = x.reshape(-1, x.shape[-1])  # n x in
        sparse = forced or _is_faster(X, T, bias)
        usage.ran("product", SEMI_STRUCTURED if sparse else DENSE)
        return (_sparse if sparse else linear)(X, T, bias).view(*x.shape[:-1], T.shape[0])


@torch.library.register_fake("lors::linear_2_4")
def _(x: Tensor, T: Tensor, bias: Tensor | None, forced: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], T.shape[0])


@register_flop_formula(torch.ops.lors.linear_2_4)
def _flops(x: list[int], T: list[int], *_: object, **__: object) -> int:
    """Those of the dense product, half of them by zeros: 2 n in out."""
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * T[0] * T[1]


def _sparse(X: Tensor, T: Tensor, bias: Tensor | None) -> Tensor:
    """cuSPARSELt takes the rows of X to lie one behind the other, whatever its strides say, and torch before 2.13 gives
    the transpose of what it makes."""
    return linear(X.contiguous(), to_sparse_semi_structured(T), bias).contiguous()


def _is_faster(X: Tensor, T: Tensor, bias: Tensor | None) -> bool:
    """Measured on these very tensors at the first call for their shape; kernels that fail are not faster.

    While a CUDA graph is captured nothing can be measured: the answer is no then, and not kept.
    """
    key = (T.device, T.dtype, *T.shape, 1 << (len(X) - 1).bit_length())
    if key not in _faster:
        if capturing(T.device):
            return False
        try:
            sparse, plain = milliseconds(T.device, lambda: _sparse(X, T, bias), lambda: linear(X, T, bias))
            _faster[key] = sparse < plain
        except Exception as error:  # not built for this device or these shapes: what is raised has no common type
            _faster[key] = False
            reason = str(error).strip().partition("\n")[0]
            usage.notice(f"no 2:4 product for {tuple(T.shape)}, the dense one is taken ({reason})")
    return _faster[key]
