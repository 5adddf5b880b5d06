"""Reads that are under way: at once as many as there may be, and no error is lost."""

from __future__ import annotations

import threading

import pytest

from mindformers_ckpt.engine.requests import Readers

_SECONDS = 20


def test_a_thread_is_started_when_all_others_are_at_work() -> None:
    readers = Readers(3)
    names: set[str] = set()

    def read() -> int:
        names.add(str(threading.get_ident()))
        return 1

    for _ in range(10):
        assert readers.begin(read).filled() == 1
    assert len(names) <= 2  # the next may come before a thread has said that it is free
    together = threading.Barrier(3)
    requests = [readers.begin(lambda: together.wait(_SECONDS)) for _ in range(6)]
    assert sorted(request.filled() for request in requests) == [0, 0, 1, 1, 2, 2]
    assert len(readers._threads) == 3
    readers.close()


def test_whoever_needs_the_bytes_gets_the_error() -> None:
    readers = Readers(1)
    request, other = readers.begin(lambda: 1 // 0), readers.begin(lambda: 7)
    assert other.filled() == 7
    request.wait()
    with pytest.raises(ZeroDivisionError):
        request.filled()
    readers.close()


def test_reads_that_no_thread_has_taken_are_not_done_after_closing() -> None:
    readers = Readers(1)
    begun, go_on = threading.Event(), threading.Event()

    def read() -> int:
        begun.set()
        return int(go_on.wait(_SECONDS))

    first, second = readers.begin(read), readers.begin(lambda: 5)
    assert begun.wait(_SECONDS)
    closing = threading.Thread(target=readers.close)
    closing.start()
    assert second.filled() == 0
    assert closing.is_alive()
    go_on.set()
    closing.join(_SECONDS)
    assert first.filled() == 1 and not closing.is_alive()
    assert not any(thread.is_alive() for thread in readers._threads)


@pytest.mark.parametrize("there_are", [0, 2])
def test_the_threads_that_the_system_has_are_enough(there_are: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started = 0
    real = threading.Thread.start

    def start(self: threading.Thread) -> None:
        nonlocal started
        if started >= there_are:
            raise RuntimeError("can't start new thread")
        started += 1
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    readers = Readers(64)
    if not there_are:
        with pytest.raises(RuntimeError):
            readers.begin(lambda: 1)
    else:
        requests = [readers.begin(lambda: 1) for _ in range(100)]
        assert sum(request.filled() for request in requests) == 100
        assert len(readers._threads) == there_are
    readers.close()
