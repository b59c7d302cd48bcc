"""Weights that are all there, or none: transformers fills what a checkpoint lacks with random numbers and goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from lors.harness.errors import BadInput

__all__ = ["load_weights"]

NAMED = 3  # weights that a message names


def load_weights(path: str, revision: str | None = None, *, shown: str, **options: Any) -> PreTrainedModel:
    """A model whose every weight comes from its checkpoint, and whose checkpoint holds no other ones.

    Args:
        path: Folder, or name on the Hub.
        revision: On the Hub.
        shown: What the message says of where it comes from, such as ``model.path=here``.
        options: Of ``from_pretrained``; ``device_map="meta"`` reads names and shapes only.

    Raises:
        BadInput: Weights are missing, or left over, or have another shape.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        revision=revision,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, with the others
        trust_remote_code=False,
        **options,
    )
    wrong = [
        f"{len(names)} {what} ({_first(names)})"
        for key, what in (
            ("missing_keys", "missing from the files"),
            ("unexpected_keys", "that the model does not have"),
            ("mismatched_keys", "of another shape than config.json says"),
        )
        if (names := sorted(_name(entry) for entry in report[key]))
    ]
    if wrong or report.get("error_msgs"):
        found = "; ".join(wrong) or " ".join(report["error_msgs"])
        raise BadInput(f"{shown}: config.json and weights do not belong together: weights {found}")
    return model


def _name(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry[0])


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
