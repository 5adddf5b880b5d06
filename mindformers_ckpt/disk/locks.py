"""Locks between processes and nodes, on files that are there only while somebody holds them.

A lock is a lock of the system on a file (`flock`), which ends with its process. A file that is unlinked while another
process opens it would give two holders; so who gets the lock looks whether the file still has its name. Where the file
system has no locks, the file itself is the lock: made exclusively, with its owner written into it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.log import log

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_POLL = 0.05
_UNSIGNED_SECONDS = 10.0  # a lock file without an owner is one that is being made, or was left by a kill just there
_NO_FOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC


class Owner(NamedTuple):
    """A process on some node: enough to tell, on that node, whether it lives."""

    pid: int
    started: str
    node: str
    boot: str
    namespace: str

    @classmethod
    def myself(cls) -> Owner:
        return cls(os.getpid(), _start_of(os.getpid()), os.uname().nodename, boot_id(), _namespace())

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        words = text.split("\n")
        if len(words) < 5 or not words[0].isdecimal():
            return None
        return cls(int(words[0]), *words[1:5])

    @classmethod
    def of_file(cls, path: Path) -> Owner | None:
        """Who is named in a file, None where nobody is."""
        return cls.parse(_read(path))

    def __str__(self) -> str:
        return "\n".join(map(str, self)) + "\n"

    @property
    def described(self) -> str:
        return f"process {self.pid} on {self.node}"

    def is_dead(self) -> bool:
        """Whether it is certain that the process has ended. Of other nodes nothing is certain."""
        me = Owner.myself()
        if self.node != me.node or not me.boot:
            return False
        if self.boot != me.boot:
            return True
        return self.namespace == me.namespace and _start_of(self.pid) != self.started


class Lock:
    """A lock at a path. Not reentrant. Symbolic links at the path are removed, never followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._mark = ""  # what this lock wrote into its file, where that is the lock
        self._is_unsigned = False  # the file that is in the way says nothing yet, where that is the lock

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self, patience: float = 0.0) -> bool:
        """Take the lock; False when another process still holds it after `patience` seconds.

        A file without an owner in it, which a process may have left that was killed just there, is waited for longer.
        Raises OSError when the file cannot be made.
        """
        until = time.monotonic() + patience
        until_signed = max(until, time.monotonic() + _UNSIGNED_SECONDS + 2)
        while not self._try():
            if time.monotonic() >= (until_signed if self._is_unsigned else until):
                return False
            time.sleep(_POLL)
        return True

    def release(self) -> None:
        """Give the lock back, and remove its file. Does nothing when it is not held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            if _is_at(descriptor, self.path):
                self.path.unlink()
        except OSError as error:
            log.warning("%s: the lock file cannot be removed: %s", self.path, error.strerror)
        finally:
            os.close(descriptor)

    def holder(self) -> str:
        """Who holds it, in words."""
        owner = Owner.of_file(self.path)
        return owner.described if owner is not None else "unknown"

    def _try(self) -> bool:
        self._is_unsigned = False
        opened = self._open()
        if opened is None:
            return False
        descriptor, is_new = opened
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return self._claim(descriptor, is_new)
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        if not _is_at(descriptor, self.path):
            os.close(descriptor)  # it was unlinked by its last holder meanwhile
            return False
        with contextlib.suppress(OSError):  # a full disk: the lock is held, only its holder has no name
            self._sign(descriptor)
        self._descriptor = descriptor
        return True

    def _open(self) -> tuple[int, bool] | None:
        """The file, and whether it is new; None when it has gone meanwhile. Raises OSError."""
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666), True
        except FileExistsError:
            pass
        try:
            return os.open(self.path, os.O_RDWR | _NO_FOLLOW), False
        except FileNotFoundError:
            return None  # released just now
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()  # a link that somebody put here
        return None

    def _sign(self, descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(Owner.myself()).encode(), 0)

    def _claim(self, descriptor: int, is_new: bool) -> bool:
        """Take the lock by the existence of its file: it is ours when we made it, or when its owner is dead."""
        if is_new:
            _say_once(self.path.parent)
            self._descriptor = descriptor
            try:
                self._sign(descriptor)
            except BaseException:
                self.release()
                raise
            return True
        text = os.pread(descriptor, 4096, 0).decode(errors="replace")
        owner, age = Owner.parse(text), time.time() - os.fstat(descriptor).st_mtime
        os.close(descriptor)
        if owner.is_dead() if owner is not None else age > _UNSIGNED_SECONDS:
            self._remove_stale(text)
            return self._try()
        self._is_unsigned = owner is None
        return False

    def _remove_stale(self, text: str) -> None:
        """Remove a dead owner's file, but not that of another process which did the same a moment before."""
        waste = self.path.with_name(f"{self.path.name}.stale-{secrets.token_hex(4)}")
        try:
            os.rename(self.path, waste)
            if _read(waste) != text:
                os.rename(waste, self.path)
            else:
                waste.unlink()
        except FileNotFoundError:
            pass  # another process was faster


_said: list[Path] = []


def _say_once(folder: Path) -> None:
    if not _said:
        _said.append(folder)
        log.warning(
            "%s is on a file system without locks: a file with its owner's name stands in for a lock. If a run on "
            "another node is killed there, remove the file that the next run names",
            folder,
        )


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:  # which may be a large one that only has the name of a lock
            return stream.read(4096).decode(errors="replace")
    except OSError:
        return ""


@cache
def boot_id() -> str:
    """What changes when the machine starts anew; "" where the system does not tell. It is read once."""
    return _read(Path("/proc/sys/kernel/random/boot_id")).strip()


def _namespace() -> str:
    """The process namespace: in another container the same number is another process."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process started, in ticks; "" when it is not there. A number may be used again."""
    status = _read(Path(f"/proc/{pid}/stat"))
    fields = status.rpartition(")")[2].split()
    return "" if len(fields) < 20 or fields[0] == "Z" else fields[19]
