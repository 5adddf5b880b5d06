"""Work that two threads share: while one waits for a read, the other compares."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from mindformers_ckpt.errors import TransferError

THREADS = 2
T = TypeVar("T")


class _Items(Iterator[T]):
    """Items that threads take in their order, until one of them fails."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()
        self.is_stopped = False

    def __next__(self) -> T:
        self.check()
        with self._lock:
            return next(self._items)

    def check(self) -> None:
        if self.is_stopped:
            raise TransferError("the work was stopped")


def in_threads(items: Iterable[T], work: Callable[[Iterator[T], Callable[[], None]], None]) -> None:
    """Have each thread `work` on the items that it takes, one at a time. The first failure ends all, and is raised.

    `work` gets the items, and what it calls in between to learn that it is to stop.
    """
    shared = _Items(items)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work(shared, shared.check)
        except BaseException as error:  # whatever it is, the caller raises it
            failures.append(error)
            shared.is_stopped = True

    threads = [threading.Thread(target=run, name="comparer") for _ in range(THREADS)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        shared.is_stopped = True
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failures:
        raise failures[0]
