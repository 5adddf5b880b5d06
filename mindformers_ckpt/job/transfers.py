"""Files to and from an object storage: several at a time, with attempts, a time limit and checksums.

What one node sent is described by a manifest, which is sent last: who reads the manifest finds everything
that it names. What is fetched is compared with it, by size and xxh3-128.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mindformers_ckpt.errors import TransferError, system_errors
from mindformers_ckpt.job.object_store import ObjectStore, StoreError
from mindformers_ckpt.log import log
from mindformers_ckpt.objects.attempts import Retries
from mindformers_ckpt.text_files import MAX_OWN_BYTES, read_json_object, write_json

T = TypeVar("T")
_SECONDS_BETWEEN_CHECKS = 0.1
_HASH_BLOCK = 8 << 20


# Fewer than of a single request: what is repeated here are whole files, and a job has a time limit for all of it.
_RETRIES = Retries(attempts=6, first_pause=0.5, longest_pause=30.0)


class Entry(NamedTuple):
    """An object as its sender describes it; `xxh3_128` is "" where only the size is known."""

    key: str
    bytes: int
    xxh3_128: str


@dataclass
class Transfers:
    """Transfers of one process with one store.

    Attributes:
        timeout: seconds that a call may go on trying.
        check: called by the calling thread every moment while it waits; may raise to stop.
        parallel: files at a time.
    """

    store: ObjectStore
    timeout: float
    check: Callable[[], None] = lambda: None
    retries: Retries = _RETRIES
    parallel: int = 4
    _stopped: threading.Event = field(default_factory=threading.Event)

    def send(self, files: Mapping[str, Path]) -> list[Entry]:
        """Send files (key -> file); what was sent, in their order. Raises StoreError."""
        deadline = time.monotonic() + self.timeout

        def send(item: tuple[str, Path]) -> Entry:
            key, file = item
            entry = Entry(key, file.stat().st_size, content_hash(file))
            self._persist(lambda: self.store.put(file, key, self._raise_if_stopped), deadline)
            return entry

        return self._each(files.items(), send)

    def fetch(self, files: Iterable[tuple[Entry, Path]]) -> None:
        """Fetch objects, each to its file, and compare them with what was sent. Raises StoreError."""
        deadline = time.monotonic() + self.timeout

        def fetch(item: tuple[Entry, Path]) -> None:
            entry, file = item
            self._persist(lambda: self._fetch(entry, file), deadline)

        self._each(files, fetch)

    def send_manifest(self, key: str, content: Mapping[str, Any]) -> None:
        """Send a JSON object. Everything that it names must have been sent."""
        with tempfile.TemporaryDirectory(prefix="mindformers_ckpt-") as folder:
            file = Path(folder, "manifest.json")
            write_json(file, content)
            self.send({key: file})

    def fetch_manifest(self, key: str) -> dict[str, Any]:
        """Fetch a JSON object."""
        deadline = time.monotonic() + self.timeout

        def fetch(file: Path) -> dict[str, Any]:
            self.store.get(key, file, self._raise_if_stopped)
            try:
                return read_json_object(file, StoreError, limit=MAX_OWN_BYTES)
            except StoreError as error:
                raise StoreError(f"{self.store.url}/{key} arrived damaged: {error}") from None

        with tempfile.TemporaryDirectory(prefix="mindformers_ckpt-") as folder:
            file = Path(folder, "manifest.json")
            (content,) = self._each([file], lambda file: self._persist(lambda: fetch(file), deadline))
            return content

    def sizes(self, prefix: str) -> dict[str, int]:
        """The objects below a prefix: key -> bytes."""
        deadline = time.monotonic() + self.timeout
        (found,) = self._each([prefix], lambda prefix: self._persist(lambda: self.store.list(prefix), deadline))
        return found

    def drop(self, prefix: str) -> None:
        """Delete what is below a prefix, in one attempt; what is left does no harm, so a failure is logged."""
        try:
            self.store.delete_prefix(prefix)
        except StoreError as error:
            log.warning("left behind, to be deleted by hand: %s/%s (%s)", self.store.url, prefix, error)

    def _fetch(self, entry: Entry, file: Path) -> None:
        part = file.with_name(f".{file.name}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.store.get(entry.key, part, self._raise_if_stopped)
            size = part.stat().st_size
            if size != entry.bytes or (entry.xxh3_128 and content_hash(part) != entry.xxh3_128):
                difference = f"{size} instead of {entry.bytes} bytes" if size != entry.bytes else "other contents"
                raise StoreError(f"{self.store.url}/{entry.key} did not arrive as it was sent: {difference}")
            os.replace(part, file)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{file}: cannot be written: {error.strerror}", final=True) from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _persist(self, action: Callable[[], T], deadline: float) -> T:
        """Try until it succeeds, cannot succeed, or attempts or time have run out."""
        started = time.monotonic()
        for attempt in range(1, self.retries.attempts + 1):
            try:
                return action()
            except StoreError as error:
                if error.final or self._stopped.is_set():
                    raise
                pause = self.retries.pause(attempt)
                now = time.monotonic()
                if attempt == self.retries.attempts or now + pause > deadline:
                    raise StoreError(
                        f"{error} (given up after {attempt} attempts in {now - started:.0f} s; check the storage, "
                        "its endpoint and the credentials, then run the job again)",
                        final=True,
                    ) from error
                log.warning("%s; attempt %d of %d follows", error, attempt + 1, self.retries.attempts)
                self._stopped.wait(pause)
        raise AssertionError("unreachable")

    def _each(self, items: Iterable[Any], action: Callable[[Any], T]) -> list[T]:
        """Run an action for all items, in threads; the first failure, or one of `check`, stops the others."""
        self._stopped.clear()
        pool = ThreadPoolExecutor(self.parallel, "object-storage")
        futures: list[Future[T]] = [pool.submit(action, item) for item in items]
        pending = set(futures)
        try:
            while pending:
                self.check()
                done, pending = wait(pending, _SECONDS_BETWEEN_CHECKS, FIRST_COMPLETED)
                for future in done:
                    future.result()
        finally:
            self._stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return [future.result() for future in futures]

    def _raise_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise StoreError("stopped because of another failure", final=True)


def content_hash(file: Path) -> str:
    """xxh3-128 of a file's content. Raises TransferError when it cannot be read."""
    import xxhash

    digest = xxhash.xxh3_128()
    with system_errors(TransferError, f"{file}: cannot be read"), open(file, "rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
