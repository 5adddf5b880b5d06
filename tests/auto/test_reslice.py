"""How the work is shared out over nodes and processes, and how many of them a machine bears."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import pytest

from mindformers_ckpt.engine import machine
from mindformers_ckpt.engine.tasks import Task
from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.job import work
from mindformers_ckpt.job.cluster.rendezvous import RankError
from mindformers_ckpt.job.shared_disk import wait_for_files
from mindformers_ckpt.job.work import affordable, share_of, spread

GB = 1 << 30


@pytest.mark.parametrize(
    ("processes", "nodes", "shares"),
    [(1, 1, [1]), (8, 1, [8]), (1, 2, [1, 0]), (2, 2, [1, 1]), (3, 2, [2, 1]), (5, 3, [2, 2, 1]), (16, 4, [4] * 4)],
)
def test_processes_are_spread_over_the_nodes(processes: int, nodes: int, shares: list[int]) -> None:
    assert spread(processes, nodes) == shares


@pytest.mark.parametrize("count", [0, 1, 3, 7, 64])
@pytest.mark.parametrize("shares", [[1], [1, 0], [1, 1], [2, 1], [3, 3, 2]])
def test_every_task_has_one_node(count: int, shares: list[int]) -> None:
    tasks = [Task(number, (), 1) for number in range(count)]
    given = [share_of(tasks, shares, node) for node in range(len(shares))]
    assert sorted(task.number for share in given for task in share) == list(range(count))
    for share, processes in zip(given, shares):
        fair = count * processes / sum(shares)
        assert fair - processes <= len(share) <= fair + processes


@pytest.mark.parametrize(
    ("wanted", "cores", "memory", "used"),
    [(1, 1, GB, 1), (4, 8, 64 * GB, 4), (8, 2, 64 * GB, 2), (8, 64, GB, 6), (4, 4, 0, 1)],
)
def test_no_more_processes_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wanted: int, cores: int, memory: int, used: int
) -> None:
    monkeypatch.setattr(work, "usable_cores", lambda: cores)
    monkeypatch.setattr(work, "free_memory", lambda: memory)
    assert affordable(wanted) == used
    expected = f"transform_process_num: {used} processes are used on this node instead of {wanted}"
    assert (expected in caplog.text) == (used < wanted)


class _Memory:
    available = 8 * GB


@pytest.mark.parametrize(
    ("limit", "free"),
    [("max", 8 * GB), (str(4 * GB), 4 * GB - 3 * GB + GB), (str(2 * GB), 0), (str(1 << 62), 8 * GB), (None, 8 * GB)],
)
def test_the_memory_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, free: int
) -> None:
    files = {"memory.max": limit, "memory.current": str(3 * GB), "memory.stat": f"anon 5\ninactive_file {GB}\n"}
    if limit == str(2 * GB):
        files["memory.stat"] = "anon 5\ninactive_file 0\n"
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_text(content)
    names = (str(tmp_path / "memory.max"), str(tmp_path / "memory.current"), str(tmp_path / "memory.stat"))
    monkeypatch.setattr(machine, "_CGROUP_FILES", ((*names, "inactive_file"),))
    monkeypatch.setattr(psutil, "virtual_memory", _Memory)
    assert machine.free_memory() == free


def test_the_cores_are_those_that_may_be_used() -> None:
    assert 1 <= machine.usable_cores() <= (psutil.cpu_count() or 1)


def test_files_of_other_nodes_are_waited_for(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    wait_for_files([tmp_path / "there"])
    with pytest.raises(PlanError, match=r"late was written by another node, but is not seen here after 0\.2 s"):
        wait_for_files([tmp_path / "there", tmp_path / "late"], patience=0.2)


def test_nobody_waits_for_files_of_a_rank_that_failed(tmp_path: Path) -> None:
    def failed() -> None:
        raise RankError("rank 0 failed: no space left")

    with pytest.raises(RankError, match="no space left"):
        wait_for_files([tmp_path / "never"], patience=60, check=failed)


def test_folders_of_other_nodes_are_waited_for(tmp_path: Path) -> None:
    """The folders above a file may come into sight after it was written, too."""
    (tmp_path / "made" / "rank_3").mkdir(parents=True)
    (tmp_path / "made" / "rank_3" / "checkpoint_3.ckpt").touch()
    mover = threading.Timer(0.3, lambda: (tmp_path / "made").rename(tmp_path / "result"))
    mover.start()
    wait_for_files([tmp_path / "result" / "rank_3" / "checkpoint_3.ckpt"], patience=20)
    mover.join()
    with pytest.raises(PlanError, match=r"is not seen here after 0\.2 s"):
        wait_for_files([tmp_path / "never" / "rank_3" / "checkpoint_3.ckpt"], patience=0.2)
