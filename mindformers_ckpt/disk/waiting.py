"""Does work on files have to wait for a disk? And if it does, several at once."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import TypeVar, Union

_AT_ONCE = 32
_PATIENCE = 0.0005
# Threads that are worth while even so, and items per second that more are started for: they wait for the interpreter.
_LEAST, _ITEMS_PER_SECOND = 8, 3000
_TMPFS = 0x01021994

_waited = 0.0  # seconds that the last item waited

A = TypeVar("A")
B = TypeVar("B")
Memory = Union[bytearray, memoryview]


def waits() -> int:
    """How often this thread has waited so far; where the system does not say, more often at every call.

    Time alone does not tell on a busy machine: the thread may not have had its turn.
    """
    if hasattr(resource, "RUSAGE_THREAD"):
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    return time.monotonic_ns()


def has_waited() -> bool:
    """Whether what was looked at last by `each` had to be waited for."""
    return _waited >= _PATIENCE


def read_at_once(descriptor: int, parts: Sequence[Memory], start: int) -> int | None:
    """Fill memory with bytes of a file that are in the page cache already; how many. None where nobody can say.

    However long a busy machine takes for it, nothing has waited for a disk.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    try:
        return os.preadv(descriptor, parts, start, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    except OSError:  # the file system cannot do it
        return os.preadv(descriptor, parts, start) if is_memory(descriptor) else None


def mount_of(descriptor: int) -> int:
    """A number of the mount that an open file is on. The state of a file has one, too, but may have to be waited for:
    on a network disk it is asked for anew after the file was read.
    """
    try:
        about = os.open(f"/proc/self/fdinfo/{descriptor}", os.O_RDONLY)
        try:
            _, _, found = os.read(about, 4096).partition(b"mnt_id:")
        finally:
            os.close(about)
        return int(found.split(maxsplit=1)[0])
    except (OSError, ValueError, IndexError):  # no Linux
        return os.fstat(descriptor).st_dev


def is_memory(descriptor: int) -> bool:
    """Whether an open file is on a file system whose files are memory, as those of /dev/shm are."""
    if sys.platform != "linux":
        return False
    found = (ctypes.c_long * 64)()  # a struct statfs, of 120 bytes, begins with the type
    return not _c_library().fstatfs(descriptor, found) and found[0] == _TMPFS


@lru_cache(maxsize=1)
def _c_library() -> ctypes.CDLL:
    """Kept, as this is asked for at every read."""
    return ctypes.CDLL(None)


def _waits_and_work() -> tuple[int, float]:
    """How often this thread has waited so far, and the seconds that it has worked."""
    if not hasattr(resource, "RUSAGE_THREAD"):
        return waits(), time.thread_time()
    used = resource.getrusage(resource.RUSAGE_THREAD)  # one call of the system for both
    return used.ru_nvcsw, used.ru_utime + used.ru_stime


def each(
    work: Callable[[A], B], items: Sequence[A], *, at_once: int = _AT_ONCE, patience: float = _PATIENCE
) -> Generator[B, None, None]:
    """What `work` makes of each item, in their order; what it raises goes through.

    Items are taken one after the other, and in threads, at most `at_once` at a time, as soon as one has waited for
    `patience` seconds, in more of them the longer it has: on a network disk each of them is a round trip, on a quick
    disk threads would only wait for each other. Where the last one of another call has waited so long, threads begin at
    once.
    """

    def timed(item: A) -> B:
        global _waited
        started, before, worked = time.perf_counter(), *_waits_and_work()
        made = work(item)
        seconds, _waited = time.perf_counter() - started, 0.0
        if seconds >= min(patience, _PATIENCE):
            after, still = _waits_and_work()
            _waited = seconds - (still - worked) if after > before else 0.0
        return made

    left = list(reversed(items))
    while left and (_waited < patience or len(left) == 1):
        yield timed(left.pop())
    if left:
        from concurrent.futures import ThreadPoolExecutor

        left.reverse()
        needed = max(_LEAST, round(_waited * _ITEMS_PER_SECOND))
        with ThreadPoolExecutor(min(at_once, needed, len(left)), "files") as pool:
            yield from pool.map(timed, left)
