"""What can happen to a file that something else is going to trust."""

from __future__ import annotations

import os
from pathlib import Path


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def delete(file: Path) -> None:
    file.unlink()


def nest_deeply(file: Path) -> None:
    file.write_text("[" * 100_000)


def make_binary(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")


def put_a_link(file: Path) -> None:
    """To what it was, in the folder above."""
    elsewhere = file.parents[1] / f"elsewhere-{file.name}"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def put_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def put_a_folder(file: Path) -> None:
    file.unlink()
    (file / "full").mkdir(parents=True)


DAMAGES = (flip_a_bit, cut, delete, nest_deeply, make_binary, put_a_link, put_a_pipe, put_a_folder)
