"""Work on many files: one after the other where the disk is quick, several at once where it has to be waited for."""

from __future__ import annotations

import threading
import time

import pytest

from mindformers_ckpt.disk import waiting
from mindformers_ckpt.disk.waiting import each


class Work:
    """Takes some seconds for an item; counts how many are under way at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.most = self.under_way = 0
        self.threads: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, item: int) -> int:
        with self._lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        with self._lock:
            self.under_way -= 1
        if item == 13:
            raise ValueError("13")
        return -item


@pytest.fixture(autouse=True)
def quick_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_waited", 0.0)


def test_several_at_once_where_one_has_waited() -> None:
    work = Work(0.02)
    assert list(each(work, range(10), at_once=4)) == [-item for item in range(10)]
    assert work.most <= 4
    assert len(work.threads) > 1
    meeting = threading.Barrier(2, timeout=60)  # known from the last time: the first is not alone, either
    assert sorted(each(lambda item: meeting.wait(), range(2))) == [0, 1]


@pytest.mark.parametrize(("seconds", "items"), [(0, 12), (0.02, 1)])
def test_no_threads_where_nothing_waits_or_for_a_single_item(seconds: float, items: int) -> None:
    work = Work(seconds)
    assert list(each(work, range(items), patience=60)) == [-item for item in range(items)]
    assert work.threads == {threading.get_ident()}


@pytest.mark.parametrize("seconds", [0, 0.005])
def test_what_fails_is_told_in_its_turn_and_no_thread_is_left(seconds: float) -> None:
    before = set(threading.enumerate())
    made: list[int] = []
    with pytest.raises(ValueError, match="13"):
        made.extend(each(Work(seconds), range(20)))
    begun = each(Work(seconds), range(20))
    assert [next(begun), next(begun)] == [0, -1]
    begun.close()
    assert set(threading.enumerate()) <= before
