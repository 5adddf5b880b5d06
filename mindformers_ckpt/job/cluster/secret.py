"""The secret of a job: from the environment, or in a file that the coordinator leaves where the ranks can read it.

A file is named after a number that the coordinator draws and says to everybody, so a rank never takes the one of an
earlier job for it. It is there from the moment that the coordinator listens until all ranks have joined. What a killed
coordinator leaves is removed by the next one on the same node.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.disk.locks import Owner
from mindformers_ckpt.job.cluster.messages import Address
from mindformers_ckpt.job.cluster.proof import NUMBER

PREFIX = ".meeting-"
NO_NUMBER = bytes(NUMBER)  # in the place of a file's number: the secret is in the environment, or there is none
_MAX_FILE = 4096
# Network file systems keep folders in a cache: what another node made may show some seconds later.
_PATIENCE = 3.0
_POLL = 0.1


class Key(NamedTuple):
    """What a rank proves with.

    `is_trusted`: whether one who knows it is a rank of this job as far as can be known. False for a key of public
    values where there is a secret. `is_secret`: whether it is made of a secret.
    """

    content: bytes
    is_trusted: bool
    is_secret: bool = False

    def of_peers(self) -> bytes | None:
        """The key with which ranks prove themselves to each other, None where anybody could know it."""
        return hmac.digest(self.content, b"peers", "sha256") if self.is_secret else None


@dataclass(frozen=True)
class Job:
    """What the ranks of a job have in common, which keeps jobs apart but is not secret."""

    address: Address
    size: int
    name: str = ""

    def key(self, secret: bytes) -> bytes:
        """A key for this job alone, also where other jobs have the same secret."""
        return hmac.digest(secret, json.dumps([*self.address, self.size, self.name]).encode(), "sha256")


@dataclass(frozen=True)
class Trust:
    """Where the secret comes from, and whether one may do without.

    Attributes:
        given: the secret of the environment; empty where there is none.
        folder: where it is left else; None where there is no such folder.
        strict: every rank can see the folder, so none is let in without the secret.
    """

    given: str = ""
    folder: Path | None = None
    strict: bool = False

    def key(self, job: Job, number: bytes) -> Key | None:
        """The key with which a rank answers a coordinator that names a number; None when it must not."""
        if self.given:
            return Key(job.key(self.given.encode()), is_trusted=True, is_secret=True)
        if self.folder is None:
            return Key(job.key(b""), is_trusted=True)
        if number == NO_NUMBER:
            key = Key(job.key(b""), is_trusted=not keeps_secrets(self.folder))
        else:
            secret = read_secret(self.folder, number, 0.0 if self.strict else _PATIENCE)
            key = Key(job.key(secret or b""), is_trusted=secret is not None, is_secret=secret is not None)
        return key if key.is_trusted or not self.strict else None


NO_SECRET = Trust()


class Door:
    """The coordinator's side: the number of the secret, the keys that open, and the file that it leaves."""

    def __init__(self, trust: Trust, job: Job, node: str) -> None:
        self.number = NO_NUMBER
        self._file: Path | None = None
        secret = trust.given.encode()
        if not secret and trust.folder is not None:
            left = leave_secret(trust.folder, f"{node} {job.address}")
            if left is not None:
                self.number, secret, self._file = left
        self.has_secret = bool(secret)
        self.keys = [Key(job.key(secret), is_trusted=True)]
        if secret and not trust.given and not trust.strict:  # there may be nodes that do not see the file
            self.keys.append(Key(job.key(b""), is_trusted=False))

    def close(self) -> None:
        """Remove the file; nobody else will need it."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.unlink()


def leave_secret(folder: Path, owner: str) -> tuple[bytes, bytes, Path] | None:
    """Draw a secret and leave it in a new file of the folder: its number, the secret, the file.

    `owner` names the node and address; what earlier coordinators there have left is removed. None where the folder
    cannot be written or does not keep files from other users.
    """
    number, secret = secrets.token_bytes(NUMBER), secrets.token_hex(32)
    file = folder / f"{PREFIX}{number.hex()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.glob(f"{PREFIX}*"):
            if _is_left(other, owner):
                other.unlink(missing_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(f"{secret}\n{owner}\n{Owner.myself()}")
            is_private = _is_private(os.fstat(descriptor))
        if is_private:
            return number, secret.encode(), file
    except OSError:
        pass
    file.unlink(missing_ok=True)
    return None


def _is_left(file: Path, owner: str) -> bool:
    """Whether a file is that of an earlier coordinator of this owner, or of a dead process."""
    named, _, process = (_read(file) or "").partition("\n")[2].partition("\n")
    left_by = Owner.parse(process)
    return named == owner or (left_by is not None and left_by.is_dead())


def read_secret(folder: Path, number: bytes, patience: float) -> bytes | None:
    """The secret of that number; None where there is none that this user, and nobody else, can have left.

    `patience`: seconds in which a file of another node may come into sight.
    """
    file, until = folder / f"{PREFIX}{number.hex()}", time.monotonic() + patience
    while (content := _read(file)) is None and time.monotonic() < until:
        with contextlib.suppress(OSError):  # opening the folder has a network file system ask the server
            os.scandir(folder).close()
        time.sleep(_POLL)
    return None if content is None else content.partition("\n")[0].encode()


def keeps_secrets(folder: Path) -> bool:
    """Whether a file can be left there that no other user can read."""
    left = leave_secret(folder, f"a trial of process {os.getpid()}")
    if left is not None:
        left[2].unlink(missing_ok=True)
    return left is not None


def _read(file: Path) -> str | None:
    """The content of a private file; None for anything else that bears the name. Follows no link, waits for no pipe."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        is_private = _is_private(os.fstat(descriptor))
        return os.read(descriptor, _MAX_FILE).decode(errors="replace") if is_private else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _is_private(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
