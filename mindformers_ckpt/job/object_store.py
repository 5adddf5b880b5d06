"""Object storage as the hook sees it: files in and out, over fsspec or over ModelArts' moxing.

Keys are paths below the URL that a store was opened with. Errors are StoreErrors; `final` tells those that
another attempt cannot mend.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mindformers_ckpt.errors import ConfigError, TransferError
from mindformers_ckpt.words import in_one_line

Check = Callable[[], None]

_URL = re.compile(r"(obs|s3)://[^/\s]+(/\S*)?$")
# Failures of the local disk, and answers of a storage that are the same every time.
_FINAL_CODES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT})
_PART_BYTES = 16 << 20  # of an upload in parts: four files at a time, four parts each, are in memory
_MOST_PARTS = 9000  # S3 and OBS allow 10,000
_PARTS_AT_ONCE = 4
_ENDPOINT = "AWS_ENDPOINT_URL"


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
    """The store at an obs:// or s3:// URL: over moxing where it is installed (ModelArts), else over fsspec.

    Raises ConfigError when neither is there.
    """
    url = check_url(url)
    if importlib.util.find_spec("moxing") is not None:
        return MoxingStore(url)
    return FsspecStore(url)


class FsspecStore:
    """S3, or anything that speaks it (OBS does), over fsspec and s3fs.

    Credentials and endpoint come from botocore's environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_SESSION_TOKEN, AWS_ENDPOINT_URL (which obs:// needs).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        scheme, _, self._root = url.partition("://")
        if scheme == "obs" and not os.environ.get(_ENDPOINT):
            raise ConfigError(
                f"{url}: set {_ENDPOINT} to the OBS endpoint of the bucket's region, "
                "e.g. https://obs.cn-north-4.myhuaweicloud.com"
            )
        try:
            import asyncio

            import aiohttp
            import botocore.exceptions
            import fsspec
            import s3fs  # noqa: F401 (fsspec imports it by name)
        except ImportError as error:
            raise ConfigError(
                f"{url}: object storage needs further packages ({error}); "
                "run pip install 'mindformers_ckpt[object-storage]'"
            ) from error
        # One attempt a request, of limited time: attempts and pauses are counted in `transfers`.
        # Checksums of botocore's own are an extension that other servers than AWS refuse.
        config = {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"total_max_attempts": 1},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        self._files = fsspec.filesystem("s3", config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)
        self._files.retries = 2
        self._final = (botocore.exceptions.NoCredentialsError, botocore.exceptions.ParamValidationError)
        self._errors = (OSError, asyncio.TimeoutError, aiohttp.ClientError, botocore.exceptions.BotoCoreError)

    def put(self, file: Path, key: str, check: Check) -> None:
        part = max(_PART_BYTES, file.stat().st_size // _MOST_PARTS)
        with self._errors_of(f"sending {file} to {self.url}/{key}", check):
            self._files.put_file(
                str(file), self._path(key), callback=_checking(check), chunksize=part, max_concurrency=_PARTS_AT_ONCE
            )

    def get(self, key: str, file: Path, check: Check) -> None:
        with self._errors_of(f"fetching {self.url}/{key} to {file}", check):
            self._files.get_file(
                self._path(key),
                str(file),
                callback=_checking(check),
                chunksize=_PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )

    def exists(self, key: str) -> bool:
        with self._errors_of(f"looking for {self.url}/{key}"):
            return bool(self._files.isfile(self._path(key)))

    def list(self, prefix: str) -> dict[str, int]:
        with self._errors_of(f"listing {self.url}/{prefix}"):
            found = self._files.find(self._path(prefix), detail=True)
        start = len(self._root) + 1
        return {path[start:]: int(entry["size"]) for path, entry in found.items()}

    def delete_prefix(self, prefix: str) -> None:
        with self._errors_of(f"deleting {self.url}/{prefix}"):
            paths = self._files.find(self._path(prefix))
            if paths:
                self._files.rm(paths)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    @contextmanager
    def _errors_of(self, what: str, check: Check = lambda: None) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except self._errors as error:
            check()  # a transfer that was stopped may fail in the end for another reason
            final = isinstance(error, self._final) or getattr(error, "errno", None) in _FINAL_CODES
            # s3fs makes errors without a number of a 403 and a 404.
            final = final or isinstance(error, (PermissionError, FileNotFoundError))
            raise StoreError(f"{what}: {in_one_line(error)}", final=final) from error


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


def _checking(check: Check) -> Any:
    """A callback for fsspec that calls `check` with every part."""
    from fsspec.callbacks import Callback

    class Checking(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            check()

    return Checking()
