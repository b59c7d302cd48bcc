"""Errors that a user mends: one line each."""

from __future__ import annotations

__all__ = ["BadInput", "one_line"]


class BadInput(ValueError):  # noqa: N818 - named for what happened
    """A value that the user has to change; the message is one line that names it and says what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
