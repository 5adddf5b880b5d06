"""Work that threads share: all of it is done once, and what is raised is the first failure."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from mindformers_ckpt.engine.threads import run_in_threads
from mindformers_ckpt.errors import TransferError

THREADS = 3


class Runner:
    """Does some work on numbers."""

    def __init__(self, work: Callable[[int, Callable[[], None]], int]) -> None:
        self._work = work
        self.followed: list[tuple[int, int | None]] = []

    def run(self, task: int, check: Callable[[], None], following: int | None) -> int:
        self.followed.append((task, following))
        return self._work(task, check)

    def close(self) -> None:
        pass


def test_every_task_is_run_once_and_what_follows_is_kept() -> None:
    together = threading.Barrier(THREADS, timeout=30)

    begun = threading.local()

    def work(number: int, check: Callable[[], None]) -> int:
        if not hasattr(begun, "here"):  # no thread takes all
            begun.here = together.wait()
        return -number

    runners = [Runner(work) for _ in range(THREADS)]
    assert sorted(run_in_threads(runners, range(1000))) == sorted(-number for number in range(1000))
    for runner in runners:
        for (_, following), (task, _) in zip(runner.followed, runner.followed[1:]):
            assert following in (task, None)


def test_the_first_failure_ends_the_others_and_is_raised() -> None:
    """The thread that goes on learns of it, and what it raises then is not what the caller gets."""
    together = threading.Barrier(THREADS, timeout=30)
    stopped: list[str] = []

    def work(number: int, check: Callable[[], None]) -> int:
        if together.wait() == 0:
            raise TransferError("a file is gone")
        try:
            while True:
                check()
        except TransferError as error:
            stopped.append(str(error))
            raise

    with pytest.raises(TransferError, match="a file is gone"):
        list(run_in_threads([Runner(work) for _ in range(THREADS)], range(10)))
    assert len(stopped) == THREADS - 1
