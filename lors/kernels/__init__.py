"""The merged weight T = W + M (.) (s B A) in one pass over W, which may be packed.

``merge`` and ``decode`` are operators of torch with several implementations (``ops.py`` says which runs when);
``layout.py`` says how a packed weight lies in memory.
"""

from lors.kernels.layout import BITMAP, DENSE, PackedWeight, pack
from lors.kernels.ops import IMPLEMENTATIONS, decode, forced, implementation, merge

__all__ = [
    "BITMAP",
    "DENSE",
    "IMPLEMENTATIONS",
    "PackedWeight",
    "decode",
    "forced",
    "implementation",
    "merge",
    "pack",
]
