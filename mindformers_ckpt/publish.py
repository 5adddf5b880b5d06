"""Results come into being whole: written aside, described by a manifest, put in place by one rename.

A run writes into a hidden staging folder beside the destination. Only when every file is complete does the
staging folder, with its manifest, take the destination's name. Whenever a run dies, the destination holds
the old result, intact, or nothing; the next run clears what was left in staging, or resumes it.

Every staging folder has a lock beside it, which tells a run that is alive from one that died. Runs that add
some ranks each may go on side by side; any other run has the destination for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from mindformers_ckpt.engine.copier import Done
from mindformers_ckpt.errors import PublishError
from mindformers_ckpt.text_files import MAX_OWN_BYTES, read_json_object, write_json

MANIFEST_FILE = "manifest.json"
_JOURNAL = "journal"
_PART = "part-"  # in the name of a staging folder whose run adds some ranks
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass
class Staging:
    """The staging folder of one run for a destination, held under a lock while the run writes it.

    Use it as a context manager. `resume` keeps the finished tasks of an interrupted run of the same
    `fingerprint`; otherwise leftovers are removed. `overwrite` allows a destination that is not empty and
    replaces it as a whole, `add` puts new rank folders beside the ones it has.

    Raises PublishError when the destination holds something, another process is writing it, or the folder
    around it cannot be written.
    """

    destination: Path
    fingerprint: str
    overwrite: bool = False
    resume: bool = False
    add: bool = False

    def __post_init__(self) -> None:
        self.destination = Path(os.path.abspath(self.destination))
        parent, name = self.destination.parent, self.destination.name
        self._prefix = f".{name}.staging-"
        self.folder = parent / f"{self._prefix}{_PART if self.add else ''}{self.fingerprint[:16]}"
        self._lock = _lock_of(self.folder)
        self._journal = self.folder / _JOURNAL

    def __enter__(self) -> Staging:
        destination = self.destination
        self._check_destination()
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            if not _is_free(self._lock):
                raise PublishError(f"another process is making the same result for {destination}; wait for it")
            try:
                self._clear_leftovers()
                self.folder.mkdir(exist_ok=True)
            except BaseException:
                self._release()
                raise
        except PublishError:
            raise
        except OSError as error:
            raise PublishError(
                f"{destination.parent} cannot be written ({error.strerror}); results are made beside the "
                "destination and renamed, so the folder around it must be writable"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what a failure left half-made. An interrupted or a killed run can be resumed from it."""
        if kind is not None and issubclass(kind, Exception):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def finished_tasks(self) -> dict[int, Done]:
        """The tasks that an interrupted run of the same plan finished (none unless `resume`).

        What was written before the machine restarted may not have reached the disk; then nothing counts.
        """
        if not self._journal.is_file():
            return {}
        first, *lines = self._journal.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        if first != _boot_id():
            return {}
        done = {}
        for line in lines:
            try:
                record = Done.from_json(json.loads(line))
            except ValueError:
                break  # the line that was being written when the run died
            done[record.task] = record
        return done

    def record(self, done: Iterable[Done]) -> None:
        """Note finished tasks, so that the run can be resumed after them."""
        try:
            with open(self._journal, "a", encoding="utf-8") as stream:
                if not stream.tell():
                    stream.write(_boot_id() + "\n")
                stream.writelines(json.dumps(task.to_json()) + "\n" for task in done)
        except OSError as error:
            raise PublishError(f"{self._journal}: cannot be written: {error.strerror}") from error

    def publish(self, manifest: Mapping[str, Any], *, name: str = MANIFEST_FILE, fsync: bool = False) -> None:
        """Write the manifest and put the result in place.

        A destination that is replaced is exchanged for the new one in one step, then removed.
        """
        try:
            self._journal.unlink(missing_ok=True)
            write_json(self.folder / name, manifest)
            if fsync:
                _sync_tree(self.folder)
            if self._take_name():
                pass
            elif self.add:
                self._add_entries(name)
            elif self.overwrite:
                _exchange(self.folder, self.destination)
                shutil.rmtree(self.folder)
            else:
                raise PublishError(f"{self.destination} was filled by somebody else while the result was made")
            if fsync:
                _sync(self.destination.parent)
        except PublishError:
            raise
        except OSError as error:
            raise PublishError(f"the finished result cannot be put at {self.destination}: {error.strerror}") from error

    def _check_destination(self) -> None:
        destination = self.destination
        if destination.is_symlink():
            raise PublishError(f"{destination} is a symbolic link; give the folder it points to, or remove the link")
        if destination.exists() and not destination.is_dir():
            raise PublishError(f"{destination} is a file; a folder for the results was expected")
        if os.path.ismount(destination):
            raise PublishError(f"{destination} is a mount point and cannot be replaced; give a folder below it")
        if destination.is_dir() and any(destination.iterdir()) and not (self.overwrite or self.add):
            raise PublishError(
                f"{destination} is not empty; choose another folder, or allow it to be replaced (--overwrite)"
            )

    def _clear_leftovers(self) -> None:
        """Remove the staging folders of runs that died; refuse when one is alive that would be in the way."""
        part = self._prefix + _PART
        for leftover in self.folder.parent.glob(f"{escape(self._prefix)}*"):
            if leftover == self.folder:
                if not (self.resume and self._journal.is_file()):
                    shutil.rmtree(leftover)
            elif leftover.is_dir() and not (self.add and leftover.name.startswith(part)):
                lock = _lock_of(leftover)
                if not _is_free(lock):
                    raise PublishError(f"another process is writing {self.destination} at this moment; wait for it")
                shutil.rmtree(leftover)
                _remove(lock)

    def _release(self) -> None:
        _remove(self._lock)

    def _take_name(self) -> bool:
        """Rename the staging folder to the destination, unless that holds something."""
        try:
            os.rename(self.folder, self.destination)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        return True

    def _add_entries(self, manifest_name: str) -> None:
        """Move rank folders one by one, the manifest last."""
        for folder in sorted({file.parent for file in self.folder.rglob("*") if file.is_file()} - {self.folder}):
            place = self.destination / folder.relative_to(self.folder)
            if place.exists() and not self.overwrite:
                raise PublishError(f"{place} has come into being meanwhile; allow to replace it with --overwrite")
            if place.exists():
                _exchange(folder, place)
            else:
                place.parent.mkdir(exist_ok=True)
                os.rename(folder, place)
        os.replace(self.folder / manifest_name, self.destination / manifest_name)
        shutil.rmtree(self.folder)


def _lock_of(folder: Path) -> FileLock:
    return FileLock(f"{folder}.lock")


def _is_free(lock: FileLock) -> bool:
    """Take a lock unless another process holds it."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except NotImplementedError:
        pass  # a file system without locks, as some parallel ones are mounted: go on without
    return True


def _remove(lock: FileLock) -> None:
    """Give a lock back and leave no file behind."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a published result, None when there is none: the result is not ours, or not whole."""
    try:
        return read_json_object(folder / MANIFEST_FILE, PublishError, limit=MAX_OWN_BYTES)
    except PublishError:
        return None


def read_manifests(folder: Path) -> dict[str, dict[str, Any]]:
    """All manifests in a folder by name: of a whole result, or of runs that made some ranks each."""
    found = {}
    for path in sorted(folder.glob("manifest*.json")):
        with contextlib.suppress(PublishError):
            found[path.name] = read_json_object(path, PublishError, limit=MAX_OWN_BYTES)
    return found


def check_free_space(folder: Path, wanted: int) -> None:
    """Raise PublishError when the disk below `folder` has fewer than `wanted` bytes free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < wanted:
        raise PublishError(
            f"the result needs {wanted / 1e9:.2f} GB, but the disk of {existing} has {free / 1e9:.2f} GB free"
        )


def _exchange(first: Path, second: Path) -> None:
    """Swap two names in one step (renameat2), or in three renames where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
        if libc.renameat2(*arguments) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(second))
    aside = second.with_name(f".{second.name}.replaced")
    os.rename(second, aside)
    os.rename(first, second)
    os.rename(aside, first)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
