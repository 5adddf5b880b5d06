"""Has this thread waited for a disk, or was it only not its turn? Time alone does not tell on a busy machine."""

from __future__ import annotations

import resource
import time


def waits() -> int:
    """How often this thread has waited so far; where the system does not say, more often at every call."""
    if hasattr(resource, "RUSAGE_THREAD"):
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    return time.monotonic_ns()
