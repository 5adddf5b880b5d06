"""File systems that are mounted for a campaign, in a mount namespace of its own process, so that nothing stays."""

from __future__ import annotations

import atexit
import ctypes
import os
from contextlib import ExitStack
from pathlib import Path

from slow_mount import mounted, why_not

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 1 << 18
_SMALL = b"size=128m"
_libc = ctypes.CDLL(None, use_errno=True)


class CannotMountError(Exception):
    """Mounting is not allowed here."""


def small(folder: Path) -> Path:
    """A small disk in memory, mounted below `folder`. Raises CannotMountError."""
    _enter_namespace()
    place = folder / "small"
    place.mkdir()
    _check(_libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, _SMALL))
    return place


def shared(folder: Path, *, locks: bool) -> Path:
    """A disk as behind a network, mounted below `folder`, until this process ends. Raises CannotMountError."""
    reason = why_not()
    if reason is not None:
        raise CannotMountError(reason)
    _enter_namespace()
    name = "locks" if locks else "no_locks"
    data, place = folder / f"data_{name}", folder / name
    data.mkdir()
    stack = ExitStack()
    stack.enter_context(mounted(data, place, scratch=folder / "slowfs", locks=locks))
    atexit.register(stack.close)
    return place


def _enter_namespace() -> None:
    _check(_libc.unshare(_CLONE_NEWNS))
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))


def _check(code: int) -> None:
    if code != 0:
        raise CannotMountError(f"this process may not mount: {os.strerror(ctypes.get_errno())}")
