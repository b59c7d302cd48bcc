"""LoRS: fine-tune a pruned language model with a low-rank adapter, and keep its zeros (arXiv 2501.08582).

Importing this package registers LoRS with PEFT, which cannot load an adapter of it before. It needs torch, transformers
and peft, nothing else.
"""

from lors.bitsandbytes_nf4 import take_nf4
from lors.compressed_file import save_compressed
from lors.compressed_reader import load_compressed
from lors.functional import masked_linear
from lors.initialization import initialize
from lors.pruning import prune_model as prune
from lors.pruning import quantize_model as quantize
from lors.quantized_file import load_quantized, save_quantized
from lors.sparsity import check
from lors.tuner import LorsConfig, LorsLinear, LorsModel, compress

__version__ = "0.1.0"
__all__ = ["LorsConfig", "LorsLinear", "LorsModel", "check", "compress", "initialize", "load_compressed"]
__all__ += ["load_quantized", "masked_linear", "prune", "quantize", "save_compressed", "save_quantized", "take_nf4"]
