"""What has run in this process: which implementation, and what was said of those that were passed over.

The choice is made anew for every weight, device and type (``ops.py``), and one that fails its check gives way with a
notice. A result that shall be comparable with another says both.
"""

from __future__ import annotations

import warnings

__all__ = ["in_use", "notice", "ran"]

_ran: dict[str, set[str]] = {"merge": set(), "decode": set(), "mask": set(), "product": set()}
_notices: list[str] = []


def in_use() -> dict[str, list[str]]:
    """The implementations that have run so far in this process, and the notices given.

    Returns:
        ``merge``, ``decode``, ``mask``: Names out of ``ops.IMPLEMENTATIONS``, sorted; several where small weights take
            another one than large ones; empty if there was no such operation.
        ``product``: ``2:4``, ``dense`` or both, for products X T^t that the sparse kernels were asked for.
        ``notices``: Why something faster was not taken.
    """
    return {**{operation: sorted(names) for operation, names in _ran.items()}, "notices": list(_notices)}


def ran(operation: str, implementation: str) -> None:
    """Note what has computed an operation."""
    _ran[operation].add(implementation)


def notice(text: str) -> None:
    """Warn, and keep the text for the result."""
    _notices.append(text)
    warnings.warn(f"lors: {text}", stacklevel=3)
