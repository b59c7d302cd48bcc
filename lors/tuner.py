"""LoRS as a PEFT tuner: ``LorsConfig``, ``LorsLinear``, ``LorsModel``.

A targeted linear layer with the pruned weight W (out x in) computes X (W + s * M (.) (B A))^t + bias, with M
= (W != 0), A (r x in) and B (out x r); see ``lors.functional``. No mask is stored: it is read off W, which
stays as it was until a merge. Several active adapters add up under the one mask,

    W + M (.) (s1 B1 A1 + s2 B2 A2) = W + M (.) [s1 B1, s2 B2] [A1; A2],

which is again one masked linear layer, of rank r1 + r2.

The frozen W may be kept compressed (``storage``, or ``lors.compress`` later): see ``lors.storage``. A merge writes
the merged values where the values of W were, so a compressed layer stays compressed until it is unloaded.

There is no dropout: W + s * M (.) (B A) is one matrix, and the input of its two parts cannot differ.

Reference: arXiv 2501.08582. Scale alpha / sqrt(r) as there (arXiv 2312.03732), or alpha / r as in LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lors.checks import flag, number, one_of, option
from lors.kernels import AUTO, DENSE, PRODUCTS, SEMI_STRUCTURED
from lors.low_rank import LowRankLinear
from lors.plugin import register
from lors.sparse_config import QuantizedConfig, SparseTunerConfig
from lors.sparse_tuner import SparseTunerModel
from lors.sparsity import UNSTRUCTURED, follows_pattern
from lors.storage import (
    STORAGES,
    CompressedLinear,
    check_compression,
    compress_linear,
    dense_state_dict,
)

__all__ = ["LorsConfig", "LorsLinear", "LorsModel", "compress"]


@dataclass
class LorsConfig(QuantizedConfig, SparseTunerConfig):
    """Configuration of LoRS; a bad value raises ``ValueError``."""

    lora_alpha: float = option(16, "Numerator of the scale s of the update; see scaling.", number("> 0"))
    scaling: str = option(
        "rank_stabilized",
        "'rank_stabilized': s = lora_alpha / sqrt(r), as in the paper; 'alpha_over_r': s = lora_alpha / r, as in LoRA.",
        one_of("rank_stabilized", "alpha_over_r"),
    )
    init: str = option(
        "gradient",
        "'gradient': lors.initialize(model, batches) sets A to the top right singular vectors of the gradient of the "
        "full weight; until it is called A is as for 'kaiming'. 'kaiming': A is Kaiming uniform, as in LoRA. B starts "
        "at zero in both.",
        one_of("gradient", "kaiming"),
    )
    gradient: str = option(
        "straight_through",
        "Gradients of A and B. 'straight_through': without the mask, as in the paper. 'exact': with it, for a further "
        "full matrix product and a buffer of the weight's size. 'sampled': an unbiased estimate of the exact ones, "
        "which forms that product for a share of the tokens.",
        one_of("straight_through", "exact", "sampled"),
    )
    gradient_share: float = option(0.25, "With gradient='sampled': the share of the tokens.", number("> 0", "<= 1"))
    gradient_until: float = option(
        1.0,
        "The share of the training after which the gradients are straight-through; below 1 the Trainer needs the "
        "callback lors.schedule.GradientSchedule.",
        number("> 0", "<= 1"),
    )
    exact_gradient: bool = option(False, "The older name of gradient='exact'.", flag)
    bias: str = option(
        "none",
        "Biases to train: 'none', 'all', or 'lors_only' (those of the adapted layers).",
        one_of("none", "all", "lors_only"),
    )
    storage: str = option(
        "dense",
        "How the frozen weights are kept: 'dense'; 'bitmap': non-zero values and a bitmap; 'n:m': values and indices "
        "of an n:m pattern; 'auto': the smallest of these, layer by layer. A layer on the meta device stays dense, see "
        "lors.compress; so does what another adapter has compressed.",
        one_of(*STORAGES),
    )
    forward_product: str = option(
        "dense",
        "How X T^t is computed: 'dense'; '2:4': by torch's semi-structured kernels, which need 2:4 weights and a GPU "
        "with 2:4 tensor cores; 'auto': the faster of the two, timed at the first call for a shape, dense where a "
        "weight is not 2:4 or the kernels do not run. The backward pass is dense in any case.",
        one_of(*PRODUCTS),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exact_gradient and self.gradient == "sampled":
            raise ValueError("exact_gradient=True: must be False with gradient='sampled'")

    @property
    def product_share(self) -> float:
        """The ``gradient_share`` of ``lors.masked_linear``."""
        if self.exact_gradient:
            return 1.0
        return {"straight_through": 0.0, "exact": 1.0, "sampled": self.gradient_share}[self.gradient]

    def layer_settings(self, name: str) -> tuple[int, float]:
        """Rank r and scale s of the layer called ``name``, after ``rank_pattern`` and ``alpha_pattern``."""
        r, alpha_over_r = super().layer_settings(name)
        return r, alpha_over_r * math.sqrt(r) if self.scaling == "rank_stabilized" else alpha_over_r


class LorsLinear(LowRankLinear):
    """A linear layer with LoRS adapters: ``lors_A[name]`` is r x in, ``lors_B[name]`` is out x r.

    ``lors.initialize`` replaces the first A.
    """

    adapter_layer_names = ("lors_A", "lors_B")
    progress = 0.0  # the share of the training that is done, see lors.schedule
    _is_2_4 = False  # as far as anything depends on it

    @classmethod
    def check_fit(cls, name: str, layer: nn.Linear, config: LorsConfig) -> None:
        """As for every method; ``forward_product='2:4'`` needs a weight of that pattern."""
        super().check_fit(name, layer, config)
        needed = config.forward_product == SEMI_STRUCTURED
        if needed and not layer.weight.is_meta and not follows_pattern(layer.weight, SEMI_STRUCTURED):
            raise ValueError(
                f"target_modules: {name!r}: forward_product='2:4': the weight does not follow 2:4; use 'auto'"
            )

    def update_layer(self, adapter_name: str, config: LorsConfig, r: int, scaling: float) -> None:
        """As for every method; whether W is 2:4 is looked at once, here."""
        super().update_layer(adapter_name, config, r, scaling)
        if config.forward_product == AUTO and not self._is_2_4:
            W = self.get_base_layer().weight
            self._is_2_4 = not W.is_meta and follows_pattern(W, SEMI_STRUCTURED)

    def _product_share(self, name: str) -> float:
        return super()._product_share(name) if self.progress < self.options[name].gradient_until else 0.0

    def _forward_product(self, name: str) -> str:
        chosen = self.options[name].forward_product
        return DENSE if chosen == AUTO and not self._is_2_4 else chosen


class LorsModel(SparseTunerModel):
    """A model with ``LorsLinear`` layers; made by ``peft.get_peft_model`` from a ``LorsConfig``."""

    tuner_layer_cls = LorsLinear
    other_base_layers = (CompressedLinear,)

    def _injected(self, adapter_name: str) -> None:
        super()._injected(adapter_name)
        layers = self.adapted_layers(adapter_name).items()
        _compress(
            {name: layer for name, layer in layers if not layer._stored().is_meta},
            self.peft_config[adapter_name].storage,
        )
        if dense_state_dict not in self.model._state_dict_hooks.values():
            self.model.register_state_dict_post_hook(dense_state_dict)


def compress(
    model: nn.Module, storage: str = "auto", *, sparsity: float | None = None, pattern: str = UNSTRUCTURED
) -> nn.Module:
    """Keep the frozen weights beneath all LoRS adapters compressed from now on, one layer after the other.

    Layers that are compressed already stay as they are. ``LorsConfig(storage=...)`` does the same as the adapters
    are made; ``merge_and_unload`` gives back a plain dense model.

    Args:
        model: A model with LoRS adapters, none of them merged.
        storage: One of ``lors.storage.STORAGES``.
        sparsity: Of weights on the meta device, which have no zeros to count; it is needed for them and not
            looked at otherwise.
        pattern: Likewise, ``unstructured`` or the n:m pattern.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: Unknown storage, no LoRS layer, a merged adapter, a weight that follows no n:m pattern, or a
            weight on the meta device without ``sparsity``.
    """
    one_of(*STORAGES)("storage", storage)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, LorsLinear)}
    if not layers:
        raise ValueError(
            "model: has no LoRS layer; wrap it with peft.get_peft_model(model, lors.LorsConfig(...)) first"
        )
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name}: has a merged adapter: unmerge it first (model.unmerge_adapter())")
    _compress(layers, storage, sparsity, pattern)
    return model


def _compress(
    layers: Mapping[str, LorsLinear], storage: str, sparsity: float | None = None, pattern: str = UNSTRUCTURED
) -> None:
    """Compress all layers, or none if one cannot be: ``ValueError`` with its name."""
    if storage == DENSE:
        return
    for name, layer in layers.items():
        try:
            check_compression(layer.get_base_layer(), storage, sparsity=sparsity, pattern=pattern)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for layer in layers.values():
        compress_linear(layer.get_base_layer(), storage, sparsity=sparsity, pattern=pattern)


register("LORS", LorsConfig, LorsModel)
