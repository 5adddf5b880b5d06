"""Files and folders that change as a whole: exclusive temporary files, exchanged names, removal that goes on."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from glob import escape
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.disk.locks import Lock
from mindformers_ckpt.errors import did_you_mean
from mindformers_ckpt.log import log

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class FileState(NamedTuple):
    """What changes when a file is written or replaced."""

    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The state of a file; links are followed. Raises OSError."""
        status = path.stat()
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @classmethod
    def seen(cls, path: Path) -> FileState | None:
        """`of`, with None where the system does not say."""
        try:
            return cls.of(path)
        except OSError:
            return None


def replace_file(path: Path, data: bytes, *, tidy: bool = False) -> None:
    """Put a complete file in place of an old one, or leave the old one untouched. Raises OSError.

    The temporary file beside it is made exclusively. With `tidy` those that killed processes left are removed; that
    lists the folder, so it is not for a folder that every rank writes to.
    """
    half_made = path.with_name(f".{path.name}.part-{secrets.token_hex(4)}")
    lock = Lock(half_made.with_name(f"{half_made.name}.lock")) if tidy else None
    if lock is not None:
        for part in path.parent.glob(f"{escape(f'.{path.name}.part-')}*"):
            _remove_dead(part)
        lock.acquire()
    try:
        with open(os.open(half_made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as stream:
            stream.write(data)
        os.replace(half_made, path)
    finally:
        half_made.unlink(missing_ok=True)
        if lock is not None:
            lock.release()


def _remove_dead(part: Path) -> None:
    """Remove a temporary file whose writer is dead, and the writer's lock."""
    lock = Lock(part if part.name.endswith(".lock") else part.with_name(f"{part.name}.lock"))
    try:
        if lock.acquire():
            if part != lock.path:
                part.unlink(missing_ok=True)
            lock.release()
    except OSError as error:
        log.warning("%s was left by a run that died and cannot be removed: %s", part, error.strerror)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if libc.renameat2(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def existing(path: Path) -> Path:
    """What is at a path, or the nearest folder above it."""
    return next(above for above in (path, *path.absolute().parents) if above.exists())


def like_it(path: Path) -> str:
    """ " Did you mean 'x'?" for the first name of a path that is not there, where its folder holds one like it."""
    while not path.parent.is_dir() and path != path.parent:
        path = path.parent
    try:
        return did_you_mean(path.name, os.listdir(str(path.parent)))
    except OSError:  # no folder on a disk, or none that can be read
        return ""


def is_real_folder(path: Path) -> bool:
    """Whether there is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def remove(path: Path) -> None:
    """Remove a file, a link itself, or a folder with all it holds. Raises OSError, after removing what it can."""
    if not is_real_folder(path):
        path.unlink(missing_ok=True)
        return
    errors: list[OSError] = []

    def note(function: object, name: str, details: tuple[type[BaseException], BaseException, object]) -> None:
        if isinstance(details[1], OSError) and not isinstance(details[1], FileNotFoundError):
            errors.append(details[1])

    shutil.rmtree(path, onerror=note)
    if path.exists():
        raise errors[0] if errors else OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))


def link_tree(source: Path, target: Path, skip: frozenset[Path] = frozenset()) -> None:
    """Give all files of a folder a second name below `target`, which is made where it is missing.

    Files are copied where the file system has no hard links. Entries in `skip`, relative to `source`, are left out.
    """
    target.mkdir(exist_ok=True)
    for root, folders, files in os.walk(source):
        below = Path(root).relative_to(source)
        folders[:] = [name for name in folders if below / name not in skip]
        for name in folders:
            if Path(root, name).is_symlink():
                os.symlink(os.readlink(Path(root, name)), target / below / name)
            else:
                (target / below / name).mkdir(exist_ok=True)
                shutil.copymode(Path(root, name), target / below / name)
        for name in files:
            if below / name not in skip:
                _link(Path(root, name), target / below / name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def sync_tree(folder: Path) -> None:
    """Force a folder and all it holds to the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
