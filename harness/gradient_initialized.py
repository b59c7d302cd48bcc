"""LoRS to the harness: its adapter starts from the gradient of training rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from tqdm.auto import tqdm

from harness.method import Method
from harness.processes import share
from lors import initialize

__all__ = ["GradientInitialized"]


class GradientInitialized(Method):
    """LoRS: A is taken from the gradient of the full weights, unless its config asks for another start."""

    reads_rows = True

    @property
    def prepares_shards(self) -> bool:
        """Not with compressed weights."""
        return self.peft.storage == "dense" and not self.quantized_base

    def prepare(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None, seed: int) -> nn.Module:
        """See `lors.initialize`."""
        if batches is None or self.peft.init != "gradient":
            return model
        return initialize(model, tqdm(share(list(batches)), desc="init", unit="batch"), seed=seed)
