"""One process works in several threads: while some wait for reads, others write or compare.

Each takes the next task, whatever that is, when it has finished one, so that files are read in their order. The first
failure ends all.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from mindformers_ckpt.errors import TransferError

_SECONDS_BETWEEN_CHECKS = 0.05


T = TypeVar("T")
Item = TypeVar("Item")
Todo = TypeVar("Todo", contravariant=True)
Found = TypeVar("Found", covariant=True)


class Runner(Protocol[Todo, Found]):
    """What runs tasks, one at a time, as a `Copier` does."""

    def run(self, task: Todo, check: Callable[[], None], following: Todo | None) -> Found:
        """Run a task, and report; `check` is called between blocks and may raise. `following` is likely to be next."""

    def close(self) -> None:
        """Close what was opened."""


class _Work(Generic[Item, T]):
    """Tasks that several threads take, what they have finished, and the first failure."""

    def __init__(self, tasks: Sequence[Item], threads: int) -> None:
        self._left = deque(tasks)
        self._threads = threads
        self._lock = threading.Lock()
        self.done: deque[T] = deque()
        self.failure: BaseException | None = None
        self.is_stopped = False

    def take(self, own: Item | None) -> tuple[Item | None, Item | None]:
        """The task to run now, `own` where a thread has one, and the one that it is to run then: it may read ahead."""
        with self._lock:
            task = own if own is not None or not self._left else self._left.popleft()
            return task, self._left.popleft() if len(self._left) >= self._threads else None

    def check(self) -> None:
        """Raise what another thread has met."""
        if self.failure is not None:
            raise self.failure
        if self.is_stopped:
            raise TransferError("the work was stopped")

    def help(self, runner: Runner[Item, T]) -> None:
        """Run tasks, in a thread beside the caller's."""
        try:
            task, following = self.take(None)
            while task is not None:
                self.done.append(runner.run(task, self.check, following))
                task, following = self.take(following)
        except BaseException as error:  # whatever it is, the caller raises it
            with self._lock:
                self.failure = self.failure or error


def run_in_threads(
    runners: Sequence[Runner[Item, T]], tasks: Sequence[Item], check: Callable[[], None] = lambda: None
) -> Iterator[T]:
    """Run tasks with the first of `runners`, and in a thread with each of the others; yield what each found.

    `check` is called in the calling thread, between blocks.
    """
    first, *others = runners
    work: _Work[Item, T] = _Work(tasks, len(runners))

    def check_all() -> None:
        check()
        work.check()

    threads = [threading.Thread(target=work.help, args=(runner,), name="runner") for runner in others]
    try:
        for thread in threads:
            thread.start()
        task, following = work.take(None)
        while task is not None:
            yield first.run(task, check_all, following)
            while work.done:
                yield work.done.popleft()
            task, following = work.take(following)
        for thread in threads:
            while thread.is_alive():
                check_all()
                thread.join(_SECONDS_BETWEEN_CHECKS)
        work.check()
        yield from work.done
    finally:
        work.is_stopped = True
        for thread in threads:
            if thread.ident is not None:
                thread.join()
