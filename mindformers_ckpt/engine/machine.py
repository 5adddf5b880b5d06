"""How many processes this machine, or the container on it, has cores and memory for."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

# What a process that copies needs at most, whatever the size of the weights: interpreter, numpy, buffers.
MEMORY_PER_PROCESS = 150 << 20

# Limit and use of a container's memory: cgroup v2, then v1.
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def free_memory() -> int:
    """Bytes of memory that processes can still take, within the limit of the container if there is one."""
    free = psutil.virtual_memory().available
    for limit, used, stat, reclaimable in _CGROUP_FILES:
        try:
            most, held = int(Path(limit).read_text(encoding="ascii")), int(Path(used).read_text(encoding="ascii"))
            lines = dict(line.split() for line in Path(stat).read_text(encoding="ascii").splitlines())
            return min(free, max(0, most - held + int(lines.get(reclaimable, 0))))
        except (OSError, ValueError):  # no such files, or no limit ("max")
            continue
    return free


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
