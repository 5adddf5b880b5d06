"""The staging folder of a run: results are written in it, beside the destination, and renamed when they are complete.

Whenever a run dies, the destination holds the old result, intact, or the new one; the next run for the destination
clears what was left, or resumes it. A staging folder has a lock in it, which tells a run that is alive from one that
died. Runs that add some ranks each may go on side by side; any other run has the destination for itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Any

from mindformers_ckpt.disk import files
from mindformers_ckpt.disk.locks import Lock
from mindformers_ckpt.errors import PublishError, system_errors
from mindformers_ckpt.publish.manifest import (
    MANIFEST_FILE,
    is_result,
    read_manifests,
    without,
)
from mindformers_ckpt.publish.replace import GATE_SECONDS, discard, gate_of, put, recover_held, staging_prefix, waste_of
from mindformers_ckpt.publish.texts import with_checksum
from mindformers_ckpt.text_files import write_records

_JOURNAL = "journal"
_LOCK = "lock"
_PART = "part-"  # in the name of a staging folder whose run adds some ranks
_JOINED = "-joined"  # of ranks that are put together


class Kind(Enum):
    """What a run makes: a folder, some rank folders of one, or a single file."""

    FOLDER = "folder"
    PART = "part"
    FILE = "file"


class Replace(Enum):
    """What of a destination that is not empty may be replaced."""

    NOTHING = 0
    RESULTS = 1  # earlier results of this library
    ANYTHING = 2


@dataclass
class Staging:
    """The staging folder of one run for a destination, held under a lock while the run writes it.

    Use it as a context manager. `resume` keeps what an earlier run of the same `fingerprint` recorded; otherwise
    leftovers are removed. `is_made` is asked, before anything is made, whether the destination has the result
    already: then there is no staging folder with `resume`, and `already_made` says so. `check` is called at the
    beginning and again before the result is put in place, each time when nobody else can publish; it may raise to
    refuse.
    `is_ours` says of a file at the destination whether it has the form of a result.

    Raises PublishError when the destination may not be replaced, another process is writing it, or the folder
    around it cannot be written.
    """

    destination: Path
    fingerprint: str
    replace: Replace = Replace.NOTHING
    resume: bool = False
    kind: Kind = Kind.FOLDER
    is_made: Callable[[], bool] = lambda: False
    check: Callable[[], None] = lambda: None
    is_ours: Callable[[Path], bool] = lambda path: False

    def __post_init__(self) -> None:
        self.destination = Path(os.path.abspath(self.destination))
        self._prefix = staging_prefix(self.destination)
        part = _PART if self.kind is Kind.PART else ""
        self.folder = self.destination.with_name(f"{self._prefix}{part}{self.fingerprint[:16]}")
        self._lock = Lock(self.folder / _LOCK)
        self._journal = self.folder / _JOURNAL
        # The journal of a result that is being put in place: it must not be in the result.
        self._journal_aside = self.folder.with_name(f"{self.folder.name}.journal")
        self.already_made = False
        self.has_records = False

    def __enter__(self) -> Staging:
        self._check_form()
        with self._written(f"{self.destination.parent} cannot be written"):
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            with self._gate():
                recover_held(self.destination)
                is_made = self.is_made()
                self._remove_waste(is_made)
                self.already_made = self.resume and is_made
                if not self.already_made:
                    self._check_content()
                    self.check()
                self._clear_leftovers()
                if not self.already_made:
                    self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the folder of a failed run, unless it can be resumed from what was recorded."""
        if kind is not None and self._lock.is_held and not self.has_records:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def records(self) -> list[str]:
        """What an interrupted run recorded, a line each (none unless `resume`)."""
        try:
            return self._journal.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def record(self, lines: Iterable[str]) -> None:
        """Note finished work, so that the run can be resumed after it."""
        text = "".join(f"{line}\n" for line in lines)
        refused = system_errors(PublishError, f"{self._journal}: cannot be written")
        with refused, open(self._journal, "a", encoding="utf-8") as stream:
            stream.write(text)
        self.has_records = self.has_records or bool(text)

    def keep_only(self, paths: Collection[str]) -> None:
        """Remove what a run that died left beside the target files: companions, a manifest, temporary files."""
        kept = {*(self.folder / path for path in paths), *self.own_files}
        for path in self.folder.rglob("*"):
            if path not in kept and not files.is_real_folder(path):
                path.unlink()

    def start_records(self, lines: Iterable[str]) -> None:
        """Begin the records anew, with those lines of an earlier run that proved true."""
        text = "".join(f"{line}\n" for line in lines)
        with system_errors(PublishError, f"{self._journal}: cannot be written"):
            files.replace_file(self._journal, text.encode())
        self.has_records = bool(text)

    @property
    def own_files(self) -> set[Path]:
        """What is in the folder for the time of the run only."""
        return {self._journal, self._lock.path}

    def publish(
        self,
        manifest: Mapping[str, Any] | None,
        *,
        name: str = MANIFEST_FILE,
        fsync: bool = False,
    ) -> None:
        """Write the manifest and put the result in place; what was there is removed."""
        with self._written(f"the finished result cannot be put at {self.destination}"), self._gate():
            self._check_form()
            self._check_content(meanwhile=True)
            self.check()
            if manifest is not None:
                write_records(self.folder / name, with_checksum(manifest))
            self._lock.release()
            if self.kind is not Kind.FILE and os.path.lexists(self._lock.path):
                raise PublishError(f"{self._lock.path} cannot be removed, and would be in the result")
            os.rename(self._journal, self._journal_aside)
            try:
                if fsync:
                    files.sync_tree(self.folder)
                self._put(fsync)
                if fsync:
                    files.sync(self.destination.parent)
            except BaseException:
                if self.folder.is_dir():
                    os.rename(self._journal_aside, self._journal)
                    self._lock.acquire()
                raise
            self._journal_aside.unlink()

    def _put(self, fsync: bool) -> None:
        if self.kind is Kind.FILE:
            os.replace(self.folder / self.destination.name, self.destination)
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.kind is Kind.PART and files.is_real_folder(self.destination):
            self._put_part(fsync)
        else:
            put(self.folder, self.destination)

    def _put_part(self, fsync: bool) -> None:
        """Put a folder in place that has the ranks that were there, and those of this run.

        A link for every file that is there, in every run that adds some. Moving the new rank folders into the
        destination would be fewer steps, but readers that know no manifests (MindSpore) would find what a killed run
        has moved, or a mixture of old and new ranks: the destination would not change as a whole.
        """
        joined = self.folder.with_name(f"{self.folder.name}{_JOINED}")
        if os.path.lexists(joined):
            files.remove(joined)
        files_here = {file.relative_to(self.folder) for file in self.folder.rglob("*") if file.is_file()}
        own = {file.parent for file in files_here} - {Path()}
        manifests = read_manifests(self.destination)
        try:
            files.link_tree(self.destination, joined, frozenset({*own, *files_here, *map(Path, manifests)}))
            for name, manifest in manifests.items():
                kept = without(manifest, own)
                if kept is not None:
                    write_records(joined / name, with_checksum(kept))
            files.link_tree(self.folder, joined)
            shutil.copymode(self.folder, joined)
            if fsync:
                files.sync_tree(joined)
            put(joined, self.destination)
        except BaseException:
            shutil.rmtree(joined, ignore_errors=True)
            raise
        discard(self.folder, self.destination)

    def _check_form(self) -> None:
        """Refuse a destination that cannot be replaced, whatever it holds."""
        destination = self.destination
        if destination.is_symlink():
            raise PublishError(f"{destination} is a symbolic link; give what it points to, or remove the link")
        if destination.exists() and destination.is_dir() == (self.kind is Kind.FILE):
            form, wanted = ("folder", "a file") if destination.is_dir() else ("file", "a folder for the results")
            raise PublishError(f"{destination} is a {form}; {wanted} was expected")
        if os.path.ismount(destination):
            raise PublishError(f"{destination} is a mount point and cannot be replaced; give a folder below it")
        with contextlib.suppress(FileNotFoundError):  # the working directory is gone
            if Path.cwd().resolve().is_relative_to(destination.resolve()):
                raise PublishError(f"{destination} is the current folder, or one around it; give a folder of its own")

    def _check_content(self, *, meanwhile: bool = False) -> None:
        """Refuse a destination that holds what may not be replaced."""
        destination = self.destination
        if self.kind is Kind.PART or not destination.exists() or self.replace is Replace.ANYTHING:
            return
        is_file = self.kind is Kind.FILE
        if destination.stat().st_size == 0 if is_file else not any(destination.iterdir()):
            return
        if self.replace is Replace.NOTHING:
            if meanwhile:
                raise PublishError(f"{destination} was filled by somebody else while the result was made")
            state, other = ("exists", "name") if is_file else ("is not empty", "folder")
            advice = f"choose another {other}, or allow it to be replaced (--overwrite)"
            raise PublishError(f"{destination} {state}; {advice}")
        if not (self.is_ours(destination) if is_file else is_result(destination)):
            raise not_ours(destination, is_file)

    @contextlib.contextmanager
    def _gate(self) -> Iterator[None]:
        gate = gate_of(self.destination)
        if not gate.acquire(GATE_SECONDS):
            raise PublishError(
                f"another process is putting a result at {self.destination} ({gate.holder()}) and does not end; if it "
                f"has died, remove {gate.path}"
            )
        try:
            yield
        finally:
            gate.release()

    @contextlib.contextmanager
    def _written(self, what: str) -> Iterator[None]:
        try:
            yield
        except PublishError:
            raise
        except OSError as error:
            where, advice = "" if error.filename is None else f"{error.filename}: ", ""
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                where = ""
                advice = (
                    "; results are made beside the destination and renamed, so the folder around it must be writable"
                )
            raise PublishError(f"{what} ({where}{error.strerror}){advice}") from error

    def _open(self) -> None:
        """Make the staging folder, or take over that of an earlier run, and lock it."""
        is_new = not self._is_resumable()
        if is_new:
            self.folder.mkdir()  # exclusively: nothing that somebody else has put here is written to
        try:
            self._lock.acquire()
            if self._journal_aside.exists():  # the run that made it died while it put the result in place
                os.rename(self._journal_aside, self._journal)
            self._journal.touch()
            self.has_records = self._journal.stat().st_size > 0
        except BaseException:
            self._lock.release()
            if is_new:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _remove_waste(self, is_made: bool) -> None:
        """Remove what is of no use to anybody: results that were replaced, and what is left of one that is in place."""
        if is_made and files.is_real_folder(self.folder) and not self._is_alive(self.folder):
            discard(self.folder, self.destination)
        # Ranks are put together by who holds the gate, as this run does: such a folder is a dead run's.
        joined = self.folder.parent.glob(f"{escape(self._prefix)}*{_JOINED}")
        for path in (*waste_of(self.destination), *joined):
            discard(path, self.destination)

    def _clear_leftovers(self) -> None:
        """Remove the staging folders of runs that died; refuse when one is alive that would be in the way."""
        for leftover in sorted(self.folder.parent.glob(f"{escape(self._prefix)}*")):
            if not files.is_real_folder(leftover):
                if leftover != self._journal_aside or not self._is_resumable():
                    discard(leftover, self.destination)
            elif self._is_alive(leftover):
                self._check_beside(leftover)
            elif not (self.resume and self._may_be_resumed(leftover)):
                discard(leftover, self.destination)

    def _is_resumable(self) -> bool:
        """Whether the own staging folder is that of an earlier run, made by the same user, with a journal."""
        has_journal = any(path.is_file() and not path.is_symlink() for path in (self._journal, self._journal_aside))
        return (
            self.resume
            and not self.already_made
            and has_journal
            and files.is_real_folder(self.folder)
            and self.folder.stat().st_uid == os.geteuid()
        )

    def _may_be_resumed(self, folder: Path) -> bool:
        """Whether a dead run's folder is kept: it is resumed now, or later by a run that adds other ranks."""
        if folder == self.folder:
            return self._is_resumable()
        return self.kind is Kind.PART and folder.name.startswith(self._prefix + _PART) and (folder / _JOURNAL).is_file()

    def _is_alive(self, folder: Path) -> bool:
        lock = Lock(folder / _LOCK)
        if not lock.path.exists():
            return False
        if not lock.acquire():
            return True
        lock.release()
        return False

    def _check_beside(self, other: Path) -> None:
        """Refuse to run beside another run, unless both add ranks."""
        holder = Lock(other / _LOCK).holder()
        if other == self.folder:
            raise PublishError(f"another process is making the same result for {self.destination} ({holder})")
        if not (self.kind is Kind.PART and other.name.startswith(self._prefix + _PART)):
            raise PublishError(f"another process is writing {self.destination} at this moment ({holder}); wait for it")


def not_ours(destination: Path, is_file: bool) -> PublishError:
    """The refusal to replace what this library did not make."""
    what = "is not a checkpoint file" if is_file else "is not an earlier result (it has no manifest.json)"
    return PublishError(
        f"{destination} {what}, so that --overwrite does not replace it; choose another name, or allow whatever is "
        "there to be removed (--overwrite-anything)"
    )


def check_free_space(folder: Path, wanted: int) -> None:
    """Raise PublishError when the disk below `folder` has fewer than `wanted` bytes free."""
    there = files.existing(folder)
    free = shutil.disk_usage(there).free
    if free < wanted:
        raise PublishError(
            f"the result needs {wanted / 1e9:.2f} GB, but the disk of {there} has {free / 1e9:.2f} GB free; make room "
            "there, or choose a folder on another disk"
        )
