"""The config fields that all tuners over pruned linear layers have, most of them known from PEFT, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import ModelCard
from peft import PeftConfig
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, PeftType
from peft.utils.other import get_pattern_key

from lors.checks import check_fields, each, flag, number, one_of, option, whole
from lors.kernels import BITS, integer_layout
from lors.support import Support

__all__ = ["MaskedConfig", "MethodConfig", "QuantizedConfig", "SparseTunerConfig", "UnscaledTunerConfig"]


@dataclass
class MethodConfig(PeftConfig):
    """Config of a method that ``lors.plugin.register`` makes known to PEFT.

    Raises:
        ValueError: A field has a value that its check refuses, see ``lors.checks.option``.
    """

    registered_type: ClassVar[PeftType | None] = None
    """Set by ``register``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.registered_type
        check_fields(self)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT; the first line of the model card says which package registers the method.

        PEFT fails with ``KeyError`` before the import, when none of our code runs, so the card has to say it.
        """
        super().save_pretrained(save_directory, **kwargs)
        package = type(self).__module__.partition(".")[0]
        line = f"`import {package}` before PEFT loads this adapter: the import registers its method."
        file = Path(save_directory) / "README.md"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if line in text:
            return
        card = ModelCard(text, ignore_metadata_errors=True)
        card.text = f"{line}\n\n{card.text.lstrip()}"
        card.save(file)


@dataclass
class UnscaledTunerConfig(MethodConfig):
    """Fields shared by all methods over pruned linear layers; a bad value raises ``ValueError``."""

    keep_zeros: ClassVar[bool] = True

    r: int = option(16, "Rank of the update, or the number of rows of its factor.", whole(">= 1"))
    target_modules: list[str] | str | None = option(
        INCLUDE_LINEAR_LAYERS_SHORTHAND,
        "Names (or their endings) of the linear layers to adapt, or one regular expression, or 'all-linear' (default): "
        "every linear layer but the output head. The name of a parameter of fused experts stands for all of them.",
    )
    exclude_modules: list[str] | str | None = option(None, "Names, or one regular expression, of layers not to adapt.")
    layers_to_transform: list[int] | int | None = option(
        None, "Indices of the blocks to adapt; not with a pattern in target_modules."
    )
    layers_pattern: list[str] | str | None = option(
        None, "Name of the model's list of blocks, if layers_to_transform cannot tell it by itself."
    )
    rank_pattern: dict = option(
        dict, "Layer name or regular expression -> rank, for layers whose rank is not r.", each(whole(">= 1"))
    )
    modules_to_save: list[str] | None = option(None, "Further modules to train in full and to save with the adapter.")
    support: Support | None = option(
        None,
        "Sparsity, pattern and fingerprint of the zeros of the adapted layers, noted when the adapter is made and "
        "compared when it is loaded; leave it out for a new adapter.",
    )
    other_support: str = option(
        "warn",
        "What happens on a base with other zeros than those of support: 'warn', or 'error'.",
        one_of("warn", "error"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = self.rank_pattern or {}
        if self.target_modules is None:
            self.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
        everywhere = self.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None and not everywhere:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r}: has no effect with "
                f"target_modules={self.target_modules!r}; give target_modules as a list of names or 'all-linear'"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r}: needs layers_to_transform")
        # Sets, as PEFT's own configs have: it looks every module of the model up in them.
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)

    def layer_settings(self, name: str) -> tuple[int, float]:
        """Rank r of a layer, after ``rank_pattern``, and the scale of its update, 1."""
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern.keys(), name), self.r), 1.0


@dataclass
class SparseTunerConfig(UnscaledTunerConfig):
    """The same for a method whose update has a scale, s = lora_alpha / r."""

    lora_alpha: float = option(16, "Numerator of the scale of the update, s = lora_alpha / r.", number("> 0"))
    alpha_pattern: dict = option(
        dict,
        "Layer name or regular expression -> alpha, for layers whose alpha is not lora_alpha.",
        each(number("> 0")),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha_pattern = self.alpha_pattern or {}

    def layer_settings(self, name: str) -> tuple[int, float]:
        """Rank r and scale s = alpha / r of a layer, after ``rank_pattern`` and ``alpha_pattern``."""
        r, _ = super().layer_settings(name)
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern.keys(), name), self.lora_alpha)
        return r, alpha / r


@dataclass
class MaskedConfig(UnscaledTunerConfig):
    """The same for a method that was published without a mask, and can do without it."""

    keep_zeros: bool = option(
        True, "Put the mask of W on the update; False is the method as published, which fills the zeros.", flag
    )
    dropout: float = option(
        0.0, "Dropout of the input of the update, not of the base path; 0 with keep_zeros.", number(">= 0", "< 1")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_zeros and self.dropout > 0:
            raise ValueError(
                f"dropout={self.dropout}: must be 0 with keep_zeros=true, whose one product has one input; "
                "use keep_zeros=false"
            )


@dataclass
class QuantizedConfig(UnscaledTunerConfig):
    """The same for a method that can train for a weight of few bits."""

    bits: int | None = option(
        None,
        "Round the merged weight to a grid of so many bits (2, 4 or 8) in training and in the merge: the grid of the "
        "base if that is quantised, else one that spans its weights. None: no grid.",
        one_of(None, *BITS),
    )
    group: int = option(64, "With bits: so many weights of a row have one scale and one zero point.", whole(">= 1"))

    quantized_base: bool | None = option(
        None,
        "With bits: whether the base was quantised when the adapter was made, whose grid is then that of the base. "
        "Written at that time, and compared where the adapter is loaded; leave it out for a new one.",
    )

    @property
    def grid(self) -> str:
        """The integer layout of ``bits`` and ``group``, such as ``int4/64``; empty without one."""
        return "" if self.bits is None else integer_layout(self.bits, self.group)
