"""One process or several run the tasks of a plan: workers that are started for it, and the process that wants it.

A single process works in two threads. A worker that dies, or a task that fails, ends the whole work; no worker
outlives the process that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from mindformers_ckpt.checksums.crc64 import has_library
from mindformers_ckpt.engine.copier import Copier
from mindformers_ckpt.engine.fetcher import Fetcher
from mindformers_ckpt.engine.object_sink import ObjectSink, Uploads
from mindformers_ckpt.engine.proof import ProvingSink
from mindformers_ckpt.engine.sinks import FileSink, Sink
from mindformers_ckpt.engine.source_shares import Cuts
from mindformers_ckpt.engine.tasks import Done, Task
from mindformers_ckpt.engine.threads import Runner, run_in_threads
from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.planning.model import Plan, SourceFile, TargetFile

# multiprocessing is imported where there are worker processes: one process starts sooner without it.
if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

T = TypeVar("T")

# Of a process that is alone: while one waits for a read, the other writes.
_THREADS = 2
_SECONDS_BETWEEN_CHECKS = 0.2
# The starting process ends its workers, with SIGTERM where one is killed: that must reach them, for they may wait for a
# lock which the killed one has taken with it.
_FOR_THE_STARTER = {signal.SIGINT, signal.SIGHUP}


def copy_tasks(
    plan: Plan,
    folder: Path | Uploads,
    tasks: Sequence[Task],
    *,
    processes: int = 1,
    hashes: bool = False,
    proofs: bool = False,
    drops: bool = False,
    counted: Cuts | None = None,
    may_fork: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Generator[Done, None, None]:
    """Run tasks of a plan into prepared target files under `folder`, or into uploads, and yield each as it is done.

    A single process copies in two threads, or in one where tasks go on with each other's parts of objects; `check` is
    called in the calling one. With more than one process, `processes - 1` workers are started and this process works
    as well, each in one thread. Workers are spawned; with `may_fork` they are forked where that is safe, and start
    sooner.
    With `drops` nothing that is read or written stays in the page cache; `counted` is for checksums, as in `Copier`.
    The first failure stops everything, and so does closing the generator. Raises TransferError, also when a
    worker dies; what `check` raises goes through.
    """
    make = partial(_copier, plan.sources, folder, plan.targets, hashes, proofs, drops, counted)
    if counted is not None:
        has_library()  # imported before a fork, that no worker has to
    threads = 1 if isinstance(folder, Uploads) else _THREADS
    return run_tasks(make, tasks, Workers(processes, may_fork), threads, drops=drops, check=check)


class Workers(NamedTuple):
    """How many processes work, the starting one included; with `may_fork` they are forked where that is safe."""

    processes: int = 1
    may_fork: bool = False


def run_tasks(
    make: Callable[[Fetcher], Runner[Task, T]],
    tasks: Sequence[Task],
    workers: Workers,
    threads: int = _THREADS,
    *,
    drops: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """Have tasks run by what `make` makes, and yield what each found; `make` must be fit for other processes.

    In several `threads` where there is one process; else, and in all else, as `copy_tasks`.
    """
    processes, may_fork = workers
    is_alone = processes <= 1 or len(tasks) <= 1
    count = threads if is_alone and len(tasks) > 1 else 1
    with contextlib.ExitStack() as stack:
        fetcher = stack.enter_context(contextlib.closing(Fetcher(readers=count, drops=drops)))
        runners = [stack.enter_context(contextlib.closing(make(fetcher))) for _ in range(count)]
        if is_alone:
            yield from run_in_threads(runners, tasks, check)
        else:
            (runner,) = runners
            others = min(processes, len(tasks)) - 1
            yield from _run_with_workers(others, make, drops, tasks, runner, check, may_fork)


def _copier(
    sources: Sequence[SourceFile],
    folder: Path | Uploads,
    targets: Sequence[TargetFile],
    hashes: bool,
    proofs: bool,
    drops: bool,
    counted: Cuts | None,
    fetcher: Fetcher,
) -> Copier:
    sink: Sink
    if isinstance(folder, Uploads):
        sink = ObjectSink(folder, targets)
    else:
        sink = (ProvingSink if proofs else FileSink)(folder, targets, drops=drops)
    return Copier(sources, sink, hashes=hashes, counted=counted, fetcher=fetcher)


def _run_with_workers(
    workers: int,
    make: Callable[[Fetcher], Runner[Task, T]],
    drops: bool,
    tasks: Sequence[Task],
    runner: Runner[Task, T],
    check: Callable[[], None],
    may_fork: bool,
) -> Iterator[T]:
    """Run tasks in workers, for which `make` makes runners, and, with `runner`, in this process.

    `may_fork` is for a process without connections, which a forked worker would keep open. Raises TransferError, also
    when a worker dies; what `check` raises goes through.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    import numpy as np  # noqa: F401  # before a fork, that no worker has to

    context = multiprocessing.get_context(_start_method(may_fork))
    # No Event: it has a lock, which a killed worker might take with it.
    stop = context.RawValue(ctypes.c_bool, False)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(make, drops, stop))
    try:
        yield from _work_along(pool, workers, _run_in_worker, tasks, runner, check)
    except BrokenProcessPool as error:
        raise TransferError(
            "a worker process died; was it killed, or did the machine run out of memory? "
            "Nothing was published; run the same command again, with fewer processes if memory is short"
        ) from error
    finally:
        stop.value = True
        pool.shutdown(wait=True, cancel_futures=True)


def _start_method(may_fork: bool) -> Literal["fork", "spawn"]:
    """A forked worker is there at once, a spawned one has to import everything: a quarter of a second.

    A fork copies locks, and those that another thread holds stay locked in the copy for ever: so only a process
    of a single thread forks. Before Python 3.11 the pool forks behind its own thread.
    """
    alone = sys.version_info >= (3, 11) and len(os.listdir("/proc/self/task")) == 1
    return "fork" if may_fork and alone else "spawn"


def _work_along(
    pool: Executor,
    workers: int,
    run: Callable[[Task, Task | None], T],
    tasks: Sequence[Task],
    runner: Runner[Task, T],
    check: Callable[[], None],
) -> Iterator[T]:
    """Feed tasks from the front to the workers, which `run` them, and take tasks from the far end meanwhile.

    The pool gets its tasks little by little: one that it has got cannot be taken back (a pool that breaks
    while it holds cancelled tasks leaves its other workers behind).
    """
    from concurrent.futures import FIRST_COMPLETED, wait

    left = deque(tasks)
    given: set[Future[T]] = set()
    own: Task | None = None  # what this process, or the worker, reads ahead, nobody else takes
    theirs: Task | None = None

    def feed() -> None:
        nonlocal theirs
        check()
        unfinished = 0
        for future in given:
            if not future.done():
                unfinished += 1
            elif future.exception() is not None:
                future.result()
        while left and unfinished < 2 * workers:
            task = left.popleft()
            # A single worker takes them in this order; which of several takes one, nobody knows.
            theirs = left[0] if left and workers == 1 else None
            with _blank_main():
                given.add(pool.submit(run, task, theirs))
            unfinished += 1

    while left or given or own:
        feed()
        task, own = own, None
        if task is None and left and left[-1] is not theirs:
            task = left.pop()
        if task is not None:
            if len(left) > 2 * workers:
                own = left.pop()
            yield runner.run(task, feed, own)
        else:
            wait(given, _SECONDS_BETWEEN_CHECKS, return_when=FIRST_COMPLETED)
        for done in [future for future in given if future.done()]:
            given.remove(done)
            yield done.result()


_worker: Runner[Task, Any] | None = None
_stop: ctypes.c_bool | None = None


def _start_worker(make: Callable[[Fetcher], Runner[Task, Any]], drops: bool, stop: ctypes.c_bool) -> None:
    global _worker, _stop
    _worker, _stop = make(Fetcher(drops=drops)), stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the starting process is gone: a worker that waits for work would not notice."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_worker(task: Task, following: Task | None) -> Any:
    assert _worker is not None
    return _worker.run(task, lambda: _end_if(_stop is not None and _stop.value), following)


def _end_if(stopped: bool) -> None:
    if stopped:
        raise TransferError("the work was stopped")


@contextlib.contextmanager
def _blank_main() -> Iterator[None]:
    """Start workers without `__main__` and without interrupts.

    spawn would import the training script, and MindSpore with it. Ctrl-C reaches all processes of a
    terminal; the starting process alone handles it and ends the workers.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_STARTER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        sys.modules["__main__"] = main
