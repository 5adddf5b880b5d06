"""Reads that are under way, many at once.

What `concurrent.futures` would do, with less of it: a read of a megabyte takes 200 µs of the processor, and a future
a quarter of that.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable


class Request:
    """A read that is under way."""

    __slots__ = ("_done", "_failure", "_filled", "_read")

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._filled = 0
        self._failure: BaseException | None = None
        self._done = threading.Lock()  # held until the read has ended
        self._done.acquire()

    def filled(self) -> int:
        """How many bytes have come, once the read has ended. Raises what the read raised."""
        self.wait()
        if self._failure is not None:
            raise self._failure
        return self._filled

    def wait(self) -> None:
        """Until the read has ended."""
        if self._done.locked():
            with self._done:
                pass

    def run(self) -> None:
        """Do the read, in the thread that has taken it."""
        try:
            self._filled = self._read()
        except BaseException as error:  # whoever needs the bytes raises it
            self._failure = error
        finally:
            self._done.release()

    def drop(self) -> None:
        """End it without a byte; nobody has taken it."""
        self._done.release()


class Readers:
    """Threads that take one read after the other; one more is started, up to `most`, when all others are at work."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._asked: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._free = 0  # threads that wait for a read; below zero, reads that wait for a thread
        self._threads: list[threading.Thread] = []

    def begin(self, read: Callable[[], int]) -> Request:
        """Have a read done. Raises RuntimeError when not even one thread can be started."""
        request = Request(read)
        with self._lock:
            if self._free <= 0 and len(self._threads) < self._most:
                self._start()
            self._free -= 1
        self._asked.put(request)
        return request

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._threads:
                raise
            self._most = len(self._threads)  # the system has no more of them
            return
        self._threads.append(thread)
        self._free += 1

    def _work(self) -> None:
        while True:
            request = self._asked.get()
            if request is None:
                return
            request.run()
            with self._lock:
                self._free += 1

    def close(self) -> None:
        """Wait for the reads that threads have taken; the others are not done any more."""
        with contextlib.suppress(queue.Empty):
            while (request := self._asked.get_nowait()) is not None:
                request.drop()
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join()
