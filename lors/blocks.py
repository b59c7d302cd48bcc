"""Find the decoder blocks of a transformers model, and the linear layers inside them.

These linears, and nothing else, are what a pruner may thin out and what sparsity is counted over. A model
that carries PEFT adapters is looked through: names and layers are those of the model underneath.
"""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name (relative to the model without adapters) and list of the decoder blocks of a decoder-only model.

    The blocks are the outermost ``nn.ModuleList`` with as many entries as the config has layers.

    Raises:
        ValueError: An encoder-decoder, not a transformers model, or no list or more than one that fits.
    """
    model = _without_adapters(model)
    kind = type(model).__name__
    if getattr(model, "config", None) is None:
        raise ValueError(f"{kind} has no config: allowed are decoder-only models of transformers")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder: allowed are decoder-only models of transformers")
    depth = model.config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside_another:
            found[name] = module
    if len(found) != 1:
        candidates = ", ".join(found) or "none"
        raise ValueError(f"{kind}: cannot tell its list of {depth} decoder blocks (candidates: {candidates})")
    return found.popitem()


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` inside the decoder blocks, in the order of the model, by name without adapters.

    Under an adapter this is the frozen layer underneath. Raises ValueError for a block with weight matrices
    that are kept in another way (GPT-2's Conv1D, fused experts, quantised layers): leaving those dense in
    silence would make every sparsity figure wrong.
    """
    name, blocks = decoder_blocks(model)
    return dict(block_linears(name, blocks))


def block_linears(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears inside one module called ``name``, with their full names; errors as ``decoder_linears``."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if isinstance(module, nn.Linear):
        if not module.weight.is_floating_point():
            raise ValueError(
                f"{name} is quantised ({module.weight.dtype}): allowed are floating-point nn.Linear layers"
            )
        yield name, module
        return
    matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
    if matrices and not isinstance(module, nn.Embedding):
        raise ValueError(
            f"{name} is a {type(module).__name__}: allowed inside decoder blocks are nn.Linear layers only"
        )
    for child_name, child in module.named_children():
        yield from block_linears(f"{name}.{child_name}", child)


def _without_adapters(model: nn.Module) -> nn.Module:
    if isinstance(model, PeftModel):
        return model.get_base_model()
    if isinstance(model, BaseTuner):
        return model.model
    return model
