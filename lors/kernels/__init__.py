"""The merged weight T = W + M (.) (s B A) in one pass over W, which may be packed.

``merge`` and ``decode`` are operators of torch with several implementations (``ops.py`` says which runs when);
``layout.py`` says how a packed weight lies in memory; ``sparse_product.py`` multiplies with a 2:4 T; ``in_use`` says
what has run.
"""

from lors.kernels.integers import BITS, integer_layout
from lors.kernels.layout import BITMAP, DENSE, PackedWeight, pack
from lors.kernels.nf4 import nf4_layout
from lors.kernels.ops import IMPLEMENTATIONS, decode, forced, implementation, mask_, merge, merge_on_grid
from lors.kernels.sparse_product import AUTO, PRODUCTS, SEMI_STRUCTURED, product
from lors.kernels.usage import in_use

__all__ = [
    "AUTO",
    "BITMAP",
    "BITS",
    "DENSE",
    "IMPLEMENTATIONS",
    "PRODUCTS",
    "SEMI_STRUCTURED",
    "PackedWeight",
    "decode",
    "forced",
    "implementation",
    "in_use",
    "integer_layout",
    "mask_",
    "merge",
    "merge_on_grid",
    "nf4_layout",
    "pack",
    "product",
]
