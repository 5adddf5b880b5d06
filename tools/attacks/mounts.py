"""File systems that are mounted for a campaign, in a mount namespace of its own process, so that nothing stays."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 1 << 18
_SMALL = "size=16m"


class CannotMountError(Exception):
    """Mounting is not allowed here."""


def small(folder: Path) -> Path:
    """A small disk in memory, mounted below `folder`. Raises CannotMountError."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = folder / "small"
    place.mkdir()
    at = os.fsencode(place)
    if (
        libc.unshare(_CLONE_NEWNS) != 0
        or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0
        or libc.mount(b"none", at, b"tmpfs", 0, _SMALL.encode()) != 0
    ):
        raise CannotMountError(f"a small disk cannot be mounted: {os.strerror(ctypes.get_errno())}")
    return place
