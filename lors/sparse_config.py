"""The config fields that all tuners over pruned linear layers have, most of them known from PEFT, and their checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key

from lors.plugin import say_import
from lors.support import Support

__all__ = [
    "SparseTunerConfig",
    "UnscaledTunerConfig",
    "check_choice",
    "check_dropout",
    "check_flag",
]


@dataclass
class UnscaledTunerConfig(PeftConfig):
    """Fields shared by all methods; a bad value raises ``ValueError``. A subclass sets ``peft_type``.

    A method that can also fill the zeros declares ``keep_zeros`` as a field, with the default True.
    """

    keep_zeros: ClassVar[bool] = True

    r: int = field(default=16, metadata={"help": "Rank of the update, or the number of rows of its factor."})
    target_modules: list[str] | str | None = field(
        default=INCLUDE_LINEAR_LAYERS_SHORTHAND,
        metadata={
            "help": "Names (or their endings) of the linear layers to adapt, or one regular expression, or "
            "'all-linear' (default): every linear layer but the output head."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or one regular expression, of layers not to adapt."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the blocks to adapt; not with a pattern in target_modules."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the model's list of blocks, if layers_to_transform cannot tell it by itself."},
    )
    rank_pattern: dict = field(
        default_factory=dict,
        metadata={"help": "Layer name or regular expression -> rank, for layers whose rank is not r."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save with the adapter."}
    )

    support: Support | None = field(
        default=None,
        metadata={
            "help": "Sparsity, pattern and fingerprint of the zeros of the adapted layers, noted when the adapter is "
            "made and compared when it is loaded; leave it out for a new adapter."
        },
    )
    other_support: str = field(
        default="warn",
        metadata={"help": "What happens on a base with other zeros than those of support: 'warn', or 'error'."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = self.rank_pattern or {}
        check_choice("other_support", self.other_support, ("warn", "error"))
        check_flag("keep_zeros", self.keep_zeros)
        for name, r in {"r": self.r, **_labelled("rank_pattern", self.rank_pattern)}.items():
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"{name}={r!r}: the rank must be a positive integer")
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

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT; the model card beside it says what to import before PEFT can load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        say_import(type(self), save_directory)


@dataclass
class SparseTunerConfig(UnscaledTunerConfig):
    """The same for a method whose update has a scale, s = lora_alpha / r."""

    lora_alpha: float = field(
        default=16, metadata={"help": "Numerator of the scale of the update, s = lora_alpha / r."}
    )
    alpha_pattern: dict = field(
        default_factory=dict,
        metadata={"help": "Layer name or regular expression -> alpha, for layers whose alpha is not lora_alpha."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha_pattern = self.alpha_pattern or {}
        for name, alpha in {
            "lora_alpha": self.lora_alpha,
            **_labelled("alpha_pattern", self.alpha_pattern),
        }.items():
            if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
                raise ValueError(f"{name}={alpha!r}: alpha must be a positive number")

    def layer_settings(self, name: str) -> tuple[int, float]:
        """Rank r and scale s = alpha / r of a layer, after ``rank_pattern`` and ``alpha_pattern``."""
        r, _ = super().layer_settings(name)
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern.keys(), name), self.lora_alpha)
        return r, alpha / r


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


def check_dropout(value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a probability below 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"dropout={value!r}: must be a probability with 0 <= dropout < 1")


def check_flag(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be True or False")


def _labelled(field_name: str, pattern: dict) -> dict[str, Any]:
    """The entries of a pattern, named as a user would find them in an error."""
    return {f"{field_name}[{name!r}]": value for name, value in pattern.items()}
