"""One process copies in several threads: while some wait for reads, others write.

Each takes the next task when it has finished one, so that the files are read in their order. The first failure ends
all.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from mindformers_ckpt.engine.copier import Copier
from mindformers_ckpt.engine.tasks import Done, Task
from mindformers_ckpt.errors import TransferError

_SECONDS_BETWEEN_CHECKS = 0.05


class _Work:
    """Tasks that several threads take, what they have finished, and the first failure."""

    def __init__(self, tasks: Sequence[Task], threads: int) -> None:
        self._left = deque(tasks)
        self._threads = threads
        self._lock = threading.Lock()
        self.done: deque[Done] = deque()
        self.failure: BaseException | None = None
        self.is_stopped = False

    def take(self, own: Task | None) -> tuple[Task | None, Task | None]:
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

    def help(self, copier: Copier) -> None:
        """Run tasks, in a thread beside the caller's."""
        try:
            task, following = self.take(None)
            while task is not None:
                self.done.append(copier.run(task, self.check, following))
                task, following = self.take(following)
        except BaseException as error:  # whatever it is, the caller raises it
            with self._lock:
                self.failure = self.failure or error


def copy_with_threads(copiers: Sequence[Copier], tasks: Sequence[Task], check: Callable[[], None]) -> Iterator[Done]:
    """Run tasks with the first of `copiers`, and in a thread with each of the others; yield each as it is done.

    `check` is called in the calling thread, between blocks.
    """
    first, *others = copiers
    work = _Work(tasks, len(copiers))

    def check_all() -> None:
        check()
        work.check()

    threads = [threading.Thread(target=work.help, args=(copier,), name="copier") for copier in others]
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
