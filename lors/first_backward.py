"""Name the adapters that the first backward pass did not reach: they will never learn.

The usual reason is a parent module that reads the weight of a layer instead of calling the layer. Every watched factor
has a hook until the end of the first backward pass; then all of them are removed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["FirstBackward"]


class FirstBackward:
    """Watches factors until a backward pass has ended.

    Args:
        factors: The trainable factors of every layer, by the layer's name.
        expected: ``expected(name)``, whether the pass should reach that layer; asked when it has ended.
    """

    def __init__(
        self, factors: Mapping[str, Sequence[nn.Parameter]], expected: Callable[[str], bool] = lambda name: True
    ) -> None:
        self._expected = expected
        self._factors = dict(factors)
        self._unreached = set(factors)
        self._waiting = False
        self._handles = [
            parameter.register_hook(partial(self._arrived, (name, index)))
            for name, parameters in factors.items()
            for index, parameter in enumerate(parameters)
        ]
        self._seen: set[tuple[str, int]] = set()

    def __reduce__(self) -> tuple[type[FirstBackward], tuple[dict]]:
        return FirstBackward, ({},)  # a copy of a model has parameters of its own, which nobody watches

    def stop(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arrived(self, key: tuple[str, int], gradient: Tensor) -> None:
        if key in self._seen:  # a second pass has begun
            self._judge()
            return
        self._seen.add(key)
        self._unreached.discard(key[0])
        if not self._waiting:
            self._waiting = True
            Variable._execution_engine.queue_callback(self._pass_ended)

    def _pass_ended(self) -> None:
        self._waiting = False
        if not _inside_reentrant_checkpoint():
            self._judge()

    def _judge(self) -> None:
        if not self._handles:
            return
        self.stop()
        # Those that somebody has frozen in the meantime are not meant to learn.
        learning = {name for name, factors in self._factors.items() if any(part.requires_grad for part in factors)}
        names = sorted(filter(self._expected, self._unreached & learning))
        if names:
            shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            warnings.warn(
                f"{len(names)} of {len(self._factors)} adapted layers had no gradient in the first backward pass: "
                f"{shown}. If this loss depends on them and they are no experts without a token, the model uses their "
                "weights without calling them, and their adapters will not learn: put them into exclude_modules",
                stacklevel=2,
            )


def _inside_reentrant_checkpoint() -> bool:
    """Whether the pass that ends is that of one block, inside a larger one."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            return True
        frame = frame.f_back
    return False
