"""The zeros of a run: those that it starts from, and what has become of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from harness.errors import BadInput
from harness.method import Method
from lors.sparsity import UNSTRUCTURED, follows_pattern, zero_report
from lors.support import support_of

__all__ = ["check_zeros", "starting_sparsity"]

log = logging.getLogger("lors")

# A model with a smaller share of zeros is dense: a few weights are exactly zero by chance, in half precision above all.
SURELY_SPARSE = 5e-3


def starting_sparsity(cfg: DictConfig, supports: Mapping[str, Tensor]) -> dict[str, Any]:
    """``support`` of the model to be fine-tuned; of one that comes sparse its ``sparsity`` and ``pattern``, too.

    Raises:
        BadInput: The model, which was to be taken as it is, is not as sparse as the config says.
    """
    support = support_of({name: partial(supports.__getitem__, name) for name in supports})
    fields: dict[str, Any] = {"support": support}
    if cfg.prune.name != "none":
        return fields
    measured = support["sparsity"]
    follows = all(follows_pattern(M, cfg.pattern) for M in supports.values())
    if cfg.sparsity is not None and (abs(cfg.sparsity - measured) > SURELY_SPARSE or not follows):
        raise BadInput(
            f"sparsity={cfg.sparsity:g} pattern={cfg.pattern}: must be what the model has with prune=none, "
            f"{measured:g} and {support['pattern']}; or leave them out"
        )
    if measured > SURELY_SPARSE:
        pattern = support["pattern"] if cfg.pattern == UNSTRUCTURED else cfg.pattern
        log.info("the model comes with %.2f %% zeros, pattern %s", 100 * measured, pattern)
        fields |= {"sparsity": measured, "pattern": pattern}
    return fields


def check_zeros(
    result: Mapping[str, Any], method: Method, variant: str, model: nn.Module, supports: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Zeros before and after the fine-tuning, of the model in one of its end states (``variant``).

    Args:
        result: ``sparsity``, ``pattern`` and ``config`` of the run.
        supports: M of every decoder linear before the fine-tuning.

    Returns:
        ``requested`` and what ``lors.sparsity.zero_report`` returns; with ``prune.layerwise``, or of a method that
        prunes, also ``blocks``, the sparsity of each after the pruning; of such a method its name as ``pruned_by``;
        ``mergeable`` says that the model is merged and every zero is kept. Beside an unmerged adapter there is nothing
        to count after the merge: None.

    Raises:
        RuntimeError: The merge of a method that keeps zeros has lost some.
    """
    report = zero_report(supports, model, result["pattern"])
    if variant == "adapter":
        report |= {"after_merge": None, "lost": None, "gained": None}
    if method.prunes:
        report["pruned_by"] = method.name
    if result["config"]["prune"].get("layerwise") or method.prunes:
        report["blocks"] = _by_block(supports)
    kept = report["lost"] == 0
    if variant == "merged" and method.keep_zeros and not kept:
        raise RuntimeError(f"method {method.name} has keep_zeros: true and lost {report['lost']} zeros in its merge")
    return {"requested": result["sparsity"], **report, "mergeable": kept}


def _by_block(supports: Mapping[str, Tensor]) -> list[float]:
    """Sparsity of every decoder block, whose number is the first one in the names of its linears."""
    zeros, sizes = Counter(), Counter()
    for name, M in supports.items():
        block = int(next(part for part in name.split(".") if part.isdigit()))
        zeros[block] += M.numel() - int(M.count_nonzero())
        sizes[block] += M.numel()
    return [zeros[block] / sizes[block] for block in sorted(sizes)]
