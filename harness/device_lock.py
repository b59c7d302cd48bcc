"""Who may use the device: timings want it alone.

Every run of this suite holds a lock on its device while it works: ``mode=run`` a shared one, ``mode=profile``, whose
result is time and memory, an exclusive one. So the jobs of a parallel sweep share a device, but a profile waits until
it has the device for itself, and the others wait until the profile is over. The lock is a file of the cache
(``<cache>/devices/<machine>-<device>.lock``), so it binds all runs that use one cache; it is the operating system's
and ends with its process. (`fcntl`, because filelock has no shared file lock: its reader-writer lock keeps an SQLite
database and refuses to work after a fork.) What else runs on the machine, nobody here can know.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from harness.errors import BadInput, one_line

__all__ = ["device_lock", "device_name"]


@contextmanager
def device_lock(folder: Path, device: torch.device, *, alone: bool) -> Iterator[None]:
    """Hold the device, alone or together with other runs that do not ask for it alone.

    Args:
        folder: Where the locks are; made if it is not there.
        device: The device of the run.
        alone: Whether no other run may use it meanwhile.
    """
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    # No link is followed, and a pipe does not block: others may write here.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / f"{device_name(device)}.lock", flags, 0o666)
    except OSError as error:
        raise BadInput(f"cache_root: cannot write to {folder} ({one_line(error)})") from error
    try:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            reason = "timings want the device alone" if alone else "a profile has the device for itself"
            print(f"{device}: used by another run; waiting, because {reason}")
            fcntl.flock(file, kind)
        yield
    finally:
        os.close(file)


def device_name(device: torch.device) -> str:
    """A name for a device that is the same for all processes and cannot mean another one."""
    if device.type != "cuda":
        return f"{socket.gethostname()}-{device.type}"
    # Not its number: CUDA_VISIBLE_DEVICES makes every GPU number 0 to somebody.
    return f"{socket.gethostname()}-{torch.cuda.get_device_properties(device).uuid}"
