"""Object storage as the hook sees it: files in and out, over ModelArts' moxing or over requests of our own.

Keys are paths below the URL that a store was opened with. Errors are StoreErrors; `final` tells those that
another attempt cannot mend.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from mindformers_ckpt.engine.object_sink import part_bytes_for
from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.objects.attempts import ONCE, at_once
from mindformers_ckpt.objects.client import Client, Found
from mindformers_ckpt.objects.errors import MissingObject, ObjectError
from mindformers_ckpt.objects.path import ObjectPath
from mindformers_ckpt.words import in_one_line

Check = Callable[[], None]

_URL = re.compile(r"(obs|s3)://[^/\s]+(/\S*)?$")
# Failures of the local disk, and answers of a storage that are the same every time.
_FINAL_CODES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT})
_AT_ONCE = 4  # parts of a file: as many files at a time, and their parts, are in memory


class StoreError(TransferError):
    """A storage did not do what it was asked for. `final`: it would not in another attempt either."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class ObjectStore(Protocol):
    """Files by key. Every call is one attempt, of limited time, and raises StoreError.

    `check` is called, from any thread, while a large file is under way, and may raise to stop it.
    """

    url: str

    def put(self, file: Path, key: str, check: Check) -> None:
        """Store a file's content; the object is there whole or not at all."""

    def get(self, key: str, file: Path, check: Check) -> None:
        """Write an object's content to a file."""

    def exists(self, key: str) -> bool:
        """Whether there is an object of this key."""

    def list(self, prefix: str) -> dict[str, int]:
        """The objects below a prefix ("a/b" has "a/b/c"), or the one of just this key: key -> bytes."""

    def delete_prefix(self, prefix: str) -> None:
        """Delete all objects below a prefix."""


def check_url(url: str) -> str:
    """The URL without a slash at its end. Raises ValueError unless it is obs://bucket/… or s3://bucket/…"""
    if not _URL.match(url):
        raise ValueError(f"obs://bucket/folder or s3://bucket/folder was expected, not {url!r}")
    return url.rstrip("/")


def open_store(url: str) -> ObjectStore:
    """The store at an obs:// or s3:// URL: over moxing where it is installed (ModelArts).

    Raises ConfigError when it cannot be reached from here.
    """
    url = check_url(url)
    if importlib.util.find_spec("moxing") is not None:
        return MoxingStore(url)
    return S3Store(url)


class S3Store:
    """S3, or anything that speaks it (OBS does). Requests are made once: attempts are counted in `transfers`."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError where packages or an endpoint are missing."""
        self.url = url
        place = ObjectPath(url).place
        self._bucket, self._root = place.bucket, place.key
        self._client = Client(place.scheme, ONCE)

    def put(self, file: Path, key: str, check: Check) -> None:
        with self._errors_of(f"sending {file} to {self.url}/{key}", check), open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size <= part_bytes_for(size):
                self._client.put(self._bucket, self._key(key), stream.read())
            else:
                self._put_parts(stream.fileno(), size, self._key(key), check)

    def _put_parts(self, descriptor: int, size: int, key: str, check: Check) -> None:
        length = part_bytes_for(size)
        upload = self._client.begin(self._bucket, key, {})

        def send(start: int) -> None:
            check()
            content = os.pread(descriptor, length, start)
            self._client.send(self._bucket, key, upload, start // length + 1, content)

        try:
            at_once(send, range(0, size, length), _AT_ONCE)
            parts = self._client.parts(self._bucket, key, upload)
            if sum(part.size for part in parts.values()) != size:
                raise StoreError(f"{self._client.url(self._bucket, key)}: the storage lacks parts that were sent")
            self._client.complete(self._bucket, key, upload, [parts[number] for number in sorted(parts)])
        except BaseException:
            with contextlib.suppress(ObjectError):  # the failure before is what is wrong
                self._client.abort(self._bucket, key, upload)
            raise

    def get(self, key: str, file: Path, check: Check) -> None:
        with self._errors_of(f"fetching {self.url}/{key} to {file}", check), open(file, "wb") as stream:
            found, _ = self._client.head(self._bucket, self._key(key))
            length = part_bytes_for(found.size)

            def fetch(start: int) -> None:
                check()
                content = memoryview(bytearray(min(length, found.size - start)))
                self._client.read(self._bucket, found, start, content)
                while content:
                    count = os.pwrite(stream.fileno(), content, start)
                    content, start = content[count:], start + count

            at_once(fetch, range(0, found.size, length), _AT_ONCE)

    def exists(self, key: str) -> bool:
        with self._errors_of(f"looking for {self.url}/{key}"):
            return self._found(key) is not None

    def list(self, prefix: str) -> dict[str, int]:
        with self._errors_of(f"listing {self.url}/{prefix}"):
            return self._below(prefix)

    def delete_prefix(self, prefix: str) -> None:
        with self._errors_of(f"deleting {self.url}/{prefix}"):
            at_once(lambda key: self._client.delete(self._bucket, self._key(key)), self._below(prefix), _AT_ONCE)

    def _below(self, prefix: str) -> dict[str, int]:
        folder = self._key(f"{prefix}/" if prefix else "")
        start = len(self._key(""))
        found = {entry.key[start:]: entry.size for entry in self._client.list(self._bucket, folder)}
        alone = self._found(prefix) if prefix and not found else None
        return found if alone is None else {prefix: alone.size}

    def _found(self, key: str) -> Found | None:
        try:
            return self._client.head(self._bucket, self._key(key))[0]
        except MissingObject:
            return None

    def _key(self, key: str) -> str:
        return f"{self._root}/{key}" if self._root else key

    @contextmanager
    def _errors_of(self, what: str, check: Check = lambda: None) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except ObjectError as error:
            check()  # a transfer that was stopped may fail in the end for another reason
            raise StoreError(f"{what}: {error.strerror}", final=error.is_final) from error
        except OSError as error:
            raise StoreError(f"{what}: {in_one_line(error)}", final=error.errno in _FINAL_CODES) from error


class MoxingStore:
    """OBS over moxing, the library that ModelArts' images come with, which knows endpoint and credentials.

    It can be installed nowhere else, so this class is tested against a stand-in of the functions that it
    calls: `mox.file.copy`, `exists`, `is_directory`, `list_directory(recursive=True)`, `get_size` and
    `remove`. moxing has time-outs and attempts of its own, and cannot be stopped within a file.
    """

    def __init__(self, url: str) -> None:
        import moxing

        self.url = url
        self._file = moxing.file

    def put(self, file: Path, key: str, check: Check) -> None:
        with self._errors_of(f"sending {file} to {self.url}/{key}"):
            self._file.copy(str(file), self._path(key))

    def get(self, key: str, file: Path, check: Check) -> None:
        with self._errors_of(f"fetching {self.url}/{key} to {file}"):
            self._file.copy(self._path(key), str(file))

    def exists(self, key: str) -> bool:
        with self._errors_of(f"looking for {self.url}/{key}"):
            return bool(self._file.exists(self._path(key))) and not self._file.is_directory(self._path(key))

    def list(self, prefix: str) -> dict[str, int]:
        with self._errors_of(f"listing {self.url}/{prefix}"):
            path = self._path(prefix)
            if not self._file.exists(path):
                return {}
            keys = [prefix]
            if self._file.is_directory(path):
                names = self._file.list_directory(path, recursive=True)
                found = [f"{prefix}/{name}".lstrip("/") for name in names if not name.endswith("/")]
                keys = [key for key in found if not self._file.is_directory(self._path(key))]
            return {key: int(self._file.get_size(self._path(key))) for key in keys}

    def delete_prefix(self, prefix: str) -> None:
        with self._errors_of(f"deleting {self.url}/{prefix}"):
            if self._file.exists(self._path(prefix)):
                self._file.remove(self._path(prefix), recursive=True)

    def _path(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    @contextmanager
    def _errors_of(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # moxing documents no types of errors
            final = getattr(error, "errno", None) in _FINAL_CODES
            raise StoreError(f"{what}: {in_one_line(error)}", final=final) from error
