"""How many cards of which size a step fits on, given its peak on one of several devices.

A peak counts tensors, and a process needs more than those: `HEADROOM` of each card stays free for it.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["CARDS", "HEADROOM", "MOST_CARDS", "cards_needed"]

GIBIBYTE = 2**30
# Memory of common cards, in GiB.
CARDS = (16, 24, 48, 80)
# CUDA context, workspaces of libraries and what the allocator keeps, in bytes: so much more than the simulated tensors
# did the authors' process hold on their A6000 (`analysis.simulated.a6000_table`, LoRA and LoRS).
HEADROOM = 3 * GIBIBYTE // 2
# Of more cards the answer is "none": what is not divided among them does not fit, or hardly.
MOST_CARDS = 64


def cards_needed(peaks: Mapping[str, int]) -> dict[int, int | None]:
    """The smallest number of cards that a step fits on, for each of `CARDS`.

    Args:
        peaks: Bytes on one of so many devices, by their number, as ``memory.train_peak_by_devices`` of a result has
            them.

    Returns:
        By size in GiB; None if no number in ``peaks`` will do.
    """

    def fits(number: str, card: int) -> bool:
        return peaks[number] + HEADROOM <= card * GIBIBYTE

    return {card: min((int(number) for number in peaks if fits(number, card)), default=None) for card in CARDS}
