"""Locks whose files go with them, and files that are replaced whole."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindformers_ckpt.disk import locks
from mindformers_ckpt.disk.files import replace_file
from mindformers_ckpt.disk.locks import Lock, Owner

# Adds one to a number in a file, many times, each under the lock.
COUNTING = """
import errno, fcntl, sys
from pathlib import Path
from mindformers_ckpt.disk.locks import Lock

if sys.argv[2] == "no locks":
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "no locks available")
    fcntl.flock = refuse
folder = Path(sys.argv[1])
for _ in range(60):
    lock = Lock(folder / "lock")
    assert lock.acquire(60)
    number = int((folder / "number").read_text())
    (folder / "number").write_text(str(number + 1))
    lock.release()
"""


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("kind", ["locks", "no locks"])
def test_one_holder_at_a_time_though_the_file_comes_and_goes(kind: str, tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    command = [sys.executable, "-c", COUNTING, str(tmp_path), kind]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert (tmp_path / "number").read_text() == "240"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


def test_a_holder_is_named(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.acquire()
    assert not second.acquire()
    assert second.holder() == f"process {os.getpid()} on {os.uname().nodename}"
    first.release()
    assert second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_lost_its_file_is_no_lock(tmp_path: Path) -> None:
    """Who waited on the old file does not hold the lock of the new one."""
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.acquire()
    (tmp_path / "lock").unlink()
    assert second.acquire()
    first.release()
    assert (tmp_path / "lock").exists()
    assert not Lock(tmp_path / "lock").acquire()
    second.release()


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "lock").symlink_to("victim")
    lock = Lock(tmp_path / "lock")
    assert lock.acquire(1)
    assert not lock.path.is_symlink()
    lock.release()
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_dead_owner_is_found_out(no_locks: None, tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = Owner.myself()._replace(pid=child.pid)
    (tmp_path / "lock").write_text(str(dead))
    lock = Lock(tmp_path / "lock")
    assert lock.acquire()
    lock.release()
    # The number is in use again, by another process.
    (tmp_path / "lock").write_text(str(Owner.myself()._replace(started="1")))
    assert lock.acquire()
    lock.release()


@pytest.mark.parametrize("change", [{"node": "elsewhere"}, {"namespace": "pid:[1]"}])
def test_an_owner_elsewhere_may_live(change: dict[str, str], no_locks: None, tmp_path: Path) -> None:
    owner = Owner.myself()._replace(pid=2**22, started="1", **change)
    (tmp_path / "lock").write_text(str(owner))
    assert not Lock(tmp_path / "lock").acquire(0.2)
    assert (tmp_path / "lock").exists()


def test_the_stand_in_is_said_once(
    no_locks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "_said", [])
    for name in ("a", "b"):
        lock = Lock(tmp_path / name)
        assert lock.acquire()
        lock.release()
    assert caplog.text.count("is on a file system without locks") == 1


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o000])
def test_a_replaced_file_has_the_mode_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        replace_file(tmp_path / "file", b"new", tidy=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_parts_of_dead_writers_are_removed_and_others_kept(tmp_path: Path) -> None:
    for name in (".file.part-dead", ".file.part-gone.lock", ".file.part-alive"):
        (tmp_path / name).touch()
    alive = Lock(tmp_path / ".file.part-alive.lock")
    assert alive.acquire()
    replace_file(tmp_path / "file", b"new", tidy=True)
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".file.part-alive", ".file.part-alive.lock"}
    alive.release()


def test_a_lock_of_a_process_that_died_before_it_signed_is_waited_for(
    no_locks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is believed for some seconds, in which a process that lives would have written its name."""
    monkeypatch.setattr(locks, "_UNSIGNED_SECONDS", 0.5)
    (tmp_path / "lock").touch()
    lock = Lock(tmp_path / "lock")
    assert lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lasting = tmp_path / "lock"
    lasting.touch()
    os.utime(lasting, (time.time() + 100, time.time() + 100))  # a clock that is ahead: the wait ends all the same
    assert not Lock(lasting).acquire()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which no file can be made")
def test_a_folder_that_takes_no_files_is_not_a_lock_of_another() -> None:
    """/proc says that the new file does not exist, though its folder does."""
    began = time.monotonic()
    with pytest.raises(OSError, match=r"\.x\.lock"):
        Lock(Path("/proc/.x.lock")).acquire(5)
    assert time.monotonic() - began < 2
