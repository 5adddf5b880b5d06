"""Work on many files: one after the other where the disk is quick, several at once where it has to be waited for."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from mindformers_ckpt.disk import waiting
from mindformers_ckpt.disk.waiting import each, mount_of


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


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="another mount is needed")
def test_files_of_a_mount_have_its_number(tmp_path: Path) -> None:
    with (
        tempfile.TemporaryFile(dir="/dev/shm") as other,
        tempfile.TemporaryFile(dir=tmp_path) as first,
        (tmp_path / "second").open("wb") as second,
    ):
        assert mount_of(first.fileno()) == mount_of(second.fileno()) != mount_of(other.fileno())


@pytest.mark.parametrize(("waited", "least", "most"), [(0.001, 2, 8), (0.006, 9, 18), (0.1, 19, 32)])
def test_more_threads_the_longer_an_item_waits(
    waited: float, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_waited", waited)
    work = Work(0.02)
    list(each(work, range(20, 120)))
    assert least <= len(work.threads) <= most
