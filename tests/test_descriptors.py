"""Open files within the limit of the process (`ulimit -n`), whatever the number of ranks."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from recorded import assert_ranks, random_model, write_ranks
from test_execute import parts, plan_from

from mindformers_ckpt.engine import descriptors, tasks
from mindformers_ckpt.engine.descriptors import Descriptors
from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.objects.reading import Handle
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform


def inode(handle: Handle) -> int:
    """That of an open file."""
    assert isinstance(handle, int)
    return os.fstat(handle).st_ino


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) - 1  # less the one that lists


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """Let the process open so many more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"file_{number}" for number in range(100)]
    for path in paths:
        path.touch()
    return paths


@pytest.fixture
def failed_opens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The errors of opening files for readers and sinks, as they come."""
    errors: list[int] = []
    real = os.open

    def counted(path: Path, flags: int, *rest: int, **more: int) -> int:
        try:
            return real(path, flags, *rest, **more)
        except OSError as error:
            errors.append(error.errno or 0)
            raise

    monkeypatch.setattr(os, "open", counted)
    return errors


def rows_to_columns(ranks: int) -> tuple[Strategy, Strategy]:
    """Strategies of which each target rank takes a part of every source rank's file."""
    rows = Strategy.of_stages(({"w": Layout((ranks,), ((0,), ())), "v": Layout((ranks,), ((0,), ()))},), "rows")
    columns = Strategy.of_stages(({"w": Layout((ranks,), ((), (0,))), "v": Layout((ranks,), ((), (0,)))},), "columns")
    return rows, columns


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("room", [24, 40, 100])
def test_more_ranks_than_files_may_be_open(
    processes: int, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed_opens: list[int]
) -> None:
    monkeypatch.setattr(tasks, "_SMALLEST_TASK", 1)  # several tasks, and so several readers and sinks at once
    rows, columns = rows_to_columns(64)
    model = random_model({"w": (64, 64), "v": (64, 64)})
    plan = plan_from(write_ranks(tmp_path / "source", parts(rows, model)), rows, columns)
    with room_for(room):
        transform(plan, tmp_path / "result", Options(processes))
    assert failed_opens == []
    (tmp_path / "result" / "manifest.json").unlink()
    assert_ranks(tmp_path / "result", parts(columns, model))


@pytest.mark.parametrize("room", [20, 60, 1000])
def test_files_are_kept_open_as_far_as_the_limit_allows(room: int, files: list[Path]) -> None:
    before = open_files()
    with room_for(room):
        first, second = Descriptors(os.O_RDONLY), Descriptors(os.O_RDONLY)
        for path in files:
            first.get(path)
        alone = open_files() - before
        for path in files:
            second.get(path)
            first.get(path)
        together = open_files() - before
        second.close()
        first.close()
    assert min(room // 3, 100) <= alone <= room
    assert min(room // 3, 200) <= together <= room
    assert open_files() == before


def test_files_that_others_open_meanwhile(files: list[Path]) -> None:
    """The limit is met although the room was counted: files are closed, the work goes on."""
    held = Descriptors(os.O_RDONLY)
    others: list[int] = []
    with room_for(40):
        held.get(files[0])
        held.get(files[1])
        take_all(lambda: others.append(os.open(files[0], os.O_RDONLY)))
        try:
            for path in files:
                inode(held.get(path))
        finally:
            for descriptor in others:
                os.close(descriptor)
            held.close()


def test_no_room_at_all_is_an_error_with_the_name_of_the_file(files: list[Path]) -> None:
    held = Descriptors(os.O_RDONLY)
    others: list[int] = []
    with room_for(10):
        take_all(lambda: others.append(os.open(files[0], os.O_RDONLY)))
        try:
            with pytest.raises(TransferError, match=r"file_1: cannot be opened: Too many open files.*ulimit -n"):
                held.get(files[1])
        finally:
            for descriptor in others:
                os.close(descriptor)
            held.close()


def take_all(take: Callable[[], None]) -> None:
    try:
        while True:
            take()
    except OSError:
        pass


def test_the_most_recent_files_stay_open(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "_MOST_FILES", 2)
    held = Descriptors(os.O_RDONLY)
    first = held.get(files[0])
    held.get(files[1])
    assert held.get(files[0]) == first
    held.get(files[2])
    assert held.get(files[0]) == first
    assert inode(first) == files[0].stat().st_ino
    held.close()


def test_a_forked_process_counts_its_own_files(files: list[Path]) -> None:
    with room_for(40):
        held = Descriptors(os.O_RDONLY)
        for path in files:
            held.get(path)
        child = os.fork()
        if child == 0:
            try:
                own, other = Descriptors(os.O_RDONLY), Descriptors(os.O_RDONLY)
                for path in files:
                    own.get(path)
                    other.get(path)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        held.close()
    assert os.waitstatus_to_exitcode(status) == 0
