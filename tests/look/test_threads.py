"""Work that threads share: all of it is done once, and what is raised is the first failure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.look.threads import THREADS, in_threads


def test_every_item_is_taken_once() -> None:
    together = threading.Barrier(THREADS, timeout=30)
    taken: list[int] = []

    def work(items: Iterator[int], check: Callable[[], None]) -> None:
        together.wait()
        taken.extend(items)

    in_threads(range(1000), work)
    assert sorted(taken) == list(range(1000))


def test_the_first_failure_ends_the_others_and_is_raised() -> None:
    """The thread that goes on learns of it, and what it raises then is not what the caller gets."""
    together = threading.Barrier(THREADS, timeout=30)
    stopped: list[str] = []

    def work(items: Iterator[int], check: Callable[[], None]) -> None:
        if together.wait() == 0:
            raise TransferError("a file is gone")
        try:
            while True:
                check()
        except TransferError as error:
            stopped.append(str(error))
            raise

    with pytest.raises(TransferError, match="a file is gone"):
        in_threads(range(10), work)
    assert stopped == ["the work was stopped"] * (THREADS - 1)
