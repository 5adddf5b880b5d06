"""What a run leaves in the page cache: all that it read and wrote, or next to nothing (`--cache drop`)."""

from __future__ import annotations

import os

from mindformers_ckpt.objects.reading import Handle

CAN_DROP = hasattr(os, "posix_fadvise")


def drop(descriptor: Handle, start: int = 0, length: int = 0) -> None:
    """Have the system forget pages of a file that are on the disk, all of them by default."""
    if CAN_DROP and isinstance(descriptor, int):
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def write_back(descriptor: int) -> None:
    """Have what was written put on the disk, and forgotten."""
    os.fdatasync(descriptor)
    drop(descriptor)
