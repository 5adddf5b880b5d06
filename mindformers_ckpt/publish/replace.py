"""How a complete result takes its name, whatever the file system can do, and whenever the process dies.

Where two names can be exchanged that is one step. Elsewhere it is three renames:

    .result.staging-<id>  ->  .result.new-<id>      complete, and about to take its name
    result                ->  .result.old
    .result.new-<id>      ->  result

After a kill between the last two nothing has the name: `recover`, at the next start or on another rank of the job,
gives it to the new result. After a kill before them the new one is a staging folder again.
"""

from __future__ import annotations

import errno
import os
import secrets
from glob import escape
from pathlib import Path

from mindformers_ckpt.disk import files
from mindformers_ckpt.disk.locks import Lock
from mindformers_ckpt.log import log

GATE_SECONDS = 300.0  # others hold it for the renames of a result, or the links of a part


def staging_prefix(destination: Path) -> str:
    """What the names of all staging folders for a destination begin with."""
    return f".{destination.name}.staging-"


def gate_of(destination: Path) -> Lock:
    """The lock under which runs for a destination begin, publish and recover, one at a time."""
    return Lock(destination.with_name(f".{destination.name}.lock"))


def put(folder: Path, destination: Path) -> None:
    """Give a complete folder the name of the destination; what had it before is removed. The gate must be held.

    Raises OSError; then the destination is what it was, and the folder too.
    """
    if _take_name(folder, destination):
        return
    if files.exchange(folder, destination):
        discard(folder, destination)
        return
    new, old = _new_name(folder, destination), _old_name(destination)
    if old.is_symlink() or old.exists():
        discard(old, destination)
    os.rename(folder, new)
    try:
        os.rename(destination, old)
        try:
            os.rename(new, destination)
        except OSError:
            os.rename(old, destination)
            raise
    except OSError:
        os.rename(new, folder)
        raise
    discard(old, destination)


def _take_name(folder: Path, destination: Path) -> bool:
    """Rename a folder to the destination, unless that holds something."""
    try:
        os.rename(folder, destination)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def discard(path: Path, destination: Path) -> None:
    """Remove what is of no use any more. What cannot be removed is said, and tried again by the next run."""
    waste = path
    prefix = f"{staging_prefix(destination)}removed-"
    try:
        if not path.name.startswith(prefix):
            waste = destination.with_name(prefix + secrets.token_hex(4))
            os.rename(path, waste)
        files.remove(waste)
    except OSError as error:
        log.warning(
            "%s is of an earlier run and cannot be removed (%s: %s); remove it by hand",
            waste if os.path.lexists(waste) else path,
            error.filename,
            error.strerror,
        )


def recover(destination: Path) -> None:
    """Put right what a run left that was killed while it replaced the destination. Raises OSError."""
    if _is_interrupted(destination):
        gate = gate_of(destination)
        if gate.acquire(GATE_SECONDS):
            try:
                recover_held(destination)
            finally:
                gate.release()


def recover_held(destination: Path) -> None:
    """`recover`, for who holds the gate."""
    old = _old_name(destination)
    if not os.path.lexists(destination):
        left = next((path for path in (*_news(destination), old) if files.is_real_folder(path)), None)
        if left is not None:
            os.rename(left, destination)
            which = "the old result" if left == old else "the new result, which is complete,"
            log.warning("a run was killed while it replaced %s: %s is there now", destination, which)
    for new in _news(destination):
        staging = destination.with_name(staging_prefix(destination) + new.name.partition(".new-")[2])
        if os.path.lexists(staging):
            discard(new, destination)
        else:
            os.rename(new, staging)
    if os.path.lexists(old):
        discard(old, destination)


def waste_of(destination: Path) -> list[Path]:
    """What is of no use to anybody: results that were replaced, and journals of results that are in place."""
    found = sorted(destination.parent.glob(f"{escape(staging_prefix(destination))}*"))
    removed = f"{staging_prefix(destination)}removed-"
    return [path for path in found if path.name.startswith(removed) or _is_of_nothing(path)]


def _is_of_nothing(path: Path) -> bool:
    folder, is_journal, _ = path.name.rpartition(".journal")
    return bool(is_journal) and not path.with_name(folder).exists()


def _is_interrupted(destination: Path) -> bool:
    return any(path.exists() for path in (*_news(destination), _old_name(destination)))


def _news(destination: Path) -> list[Path]:
    return sorted(destination.parent.glob(f"{escape(f'.{destination.name}.new-')}*"))


def _new_name(folder: Path, destination: Path) -> Path:
    identity = folder.name[len(staging_prefix(destination)) :]
    return destination.with_name(f".{destination.name}.new-{identity}")


def _old_name(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.old")
