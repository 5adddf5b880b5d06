"""The folders under the output dir that the hook clears: `strategy` and `transformed_checkpoint`.

The guide has both removed when automatic conversion is on. Here nothing is deleted before what replaces it
is complete: the old strategy folder is moved aside while the job writes its own, and comes back when the
load fails; `transformed_checkpoint` is replaced in one step when the new one is complete.

What a killed job leaves is put right by any of its other ranks, or else by the next job.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mindformers_ckpt.disk.files import remove
from mindformers_ckpt.disk.locks import NO_LOCKS, Lock
from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.errors import CheckpointError, ConfigError, PublishError, raise_problems
from mindformers_ckpt.log import log
from mindformers_ckpt.publish.replace import recover

_ATTEMPTS = 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class OutputDir:
    """The output dir of a job.

    The rank that clears it holds a lock from `clear` to `keep` or `restore`; a second job is refused.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.strategy = self.root / "strategy"
        self.transformed = self.root / "transformed_checkpoint"
        # There from `clear` to `keep`: the old strategy folder, an empty folder where there was none.
        self._previous = self.root / ".strategy.previous"
        self._holder = self.root / ".checkpoint_hook.holder"
        self._lock = FileLock(self.root / ".checkpoint_hook.lock")
        self._plain_lock = Lock(self.root / ".checkpoint_hook.owner")  # where the file system has no locks
        self._cleared = False

    def check_apart(
        self, load_checkpoint: str, src_strategy: str, files: Iterable[Path] = (), *, strategy_only: bool = False
    ) -> None:
        """Refuse sources that are in what would be cleared; symbolic links are resolved. Touches nothing.

        `files` are those that the source consists of, `strategy_only` says that nothing but the strategy
        folder will be cleared. Raises ConfigError.
        """
        cleared = (self.strategy,) if strategy_only else (self.strategy, self.transformed)
        problems = []
        real = _Resolved()
        files = list(files) if any(folder.exists() for folder in cleared) else []  # nothing is in what is not there
        for key, value in (("load_checkpoint", load_checkpoint), ("src_strategy_path_or_dir", src_strategy)):
            if value:
                paths = {Path(value): Path(value).resolve()}
                paths.update(real.paths(files) if key == "load_checkpoint" else {})
                problems += [problem for folder in cleared for problem in self._overlap(key, value, paths, folder)]
        headline = "the source is in a folder that automatic conversion clears; nothing was touched"
        raise_problems(ConfigError, headline, problems)
        if not strategy_only and (self.transformed.is_symlink() or os.path.ismount(self.transformed)):
            raise ConfigError(
                f"{self.transformed} is a link or a mount point, which cannot be replaced as a whole; remove it, "
                "or set output_dir to a folder on the disk where the results should lie"
            )

    def _overlap(self, key: str, value: str, paths: Mapping[Path, Path], folder: Path) -> Iterator[str]:
        """What is wrong with a source if `folder` is cleared: the first fault, or nothing.

        `paths` are those of the source, and what they lead to; the first is the one that was given.
        """
        real_folder = folder.resolve()
        content = "the last run's strategy" if folder == self.strategy else "a transformed checkpoint"
        aim = self.root.parent / "checkpoint_source" / Path(value).name
        for number, (path, real) in enumerate(paths.items()):
            if real.is_relative_to(real_folder):
                what = f"{value} is in" if number == 0 else f"{path} is a file in"
                advice = f"move it away first, e.g. mkdir -p {aim.parent} && mv {value} {aim}, and set {key} to that"
                yield f"{key}: {what} {folder}, which is cleared of {content}; {advice}"
                return
            if real_folder.is_relative_to(real):
                advice = (
                    f"set output_dir to a folder outside of {value}, or {key} to the folder with the files themselves"
                )
                yield f"{key}: {value} contains {folder}, which is cleared of {content}; {advice}"
                return

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise PublishError in the place of an error of the system that comes from the output dir."""
        try:
            yield
        except CheckpointError:
            raise
        except OSError as error:
            if not self._concerns(error):
                raise
            where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
            raise PublishError(
                f"{where}{error.strerror}; output_dir is {self.root}: it must be a folder that this job can write to, "
                "on a disk with free space"
            ) from error

    def _concerns(self, error: OSError) -> bool:
        """Whether a path in the output dir, or on the way to it, is at fault; a full disk is told without a path."""
        if not isinstance(error.filename, (str, bytes)):
            return error.errno in _FULL
        path = Path(os.fsdecode(error.filename)).absolute()
        return path.is_relative_to(self.root) or self.root.is_relative_to(path)

    def clear(self) -> None:
        """Make an empty strategy folder, with the old one moved aside. Links are moved, never followed.

        Raises PublishError when another job works here.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            holder = (
                self._holder.read_text(encoding="utf-8", errors="replace")
                if self._holder.exists()
                else "an unknown process"
            )
            raise PublishError(
                f"another job ({holder}) is loading weights with the output dir {self.root}; "
                "wait for it, or give this job another output_dir"
            ) from None
        except (NotImplementedError, OSError) as error:
            self._lock_without_locks(error)
        self._cleared = True
        self._holder.unlink(missing_ok=True)  # and not written through, should it be a link
        with open(self._holder, "x", encoding="utf-8") as stream:
            stream.write(f"process {os.getpid()} on {os.uname().nodename}")
        recover(self.transformed)
        for pattern in (".removed-*", ".shared-disk-*"):  # of ranks that were killed
            for waste in self.root.glob(pattern):
                remove(waste)
        if _is_there(self._previous):
            self._discard(self.strategy)  # of a run that died: what it replaced is still aside
        elif _is_there(self.strategy):
            os.rename(self.strategy, self._previous)
        else:
            self._previous.mkdir()
        self.strategy.mkdir()

    def _lock_without_locks(self, error: NotImplementedError | OSError) -> None:
        """Take a lock that works by the existence of its file. Raises PublishError when another job has it."""
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise PublishError(f"{self.root} cannot be written: {error.strerror}") from error
        if not self._plain_lock.acquire():
            raise PublishError(
                f"another job ({self._plain_lock.holder()}) is loading weights with the output dir {self.root}; wait "
                f"for it, or give this job another output_dir. If it has died, remove {self._plain_lock.path}"
            )
        log.warning(
            "%s is on a disk without file locks: the file %s keeps other jobs out",
            self.root,
            self._plain_lock.path.name,
        )

    def keep(self, *, clear_transformed: bool = False) -> None:
        """The load is done: remove the old strategy, and the transformed checkpoint if it is stale."""
        self._discard(self._previous)
        if clear_transformed:
            self._discard(self.transformed)
        self._release()

    def restore(self, *, settled: bool = True) -> None:
        """The load failed, or an earlier job died: put the old strategy back.

        Any rank may call this; the one that cleared goes first, as long as it lives. Until the job is
        `settled` other ranks may still write their strategy, so what was set aside is then kept, and the last
        rank that comes here, or the next job, has the last word.
        """
        recover(self.transformed)
        if not self._cleared and not self._take_over():
            return
        try:
            if _is_there(self._previous):
                self._put_back(settled)
        finally:
            self._release()

    def _put_back(self, settled: bool) -> None:
        is_link = self._previous.is_symlink()
        if not is_link and not any(self._previous.iterdir()):  # there was none
            self._discard(self.strategy)
            if settled:
                self._previous.rmdir()
        elif settled or is_link:
            self._rename_to_strategy(self._previous)
        else:
            copy = self.root / f".removed-copy-{os.getpid()}"
            shutil.copytree(self._previous, copy, symlinks=True)
            self._rename_to_strategy(copy)

    def _rename_to_strategy(self, folder: Path) -> None:
        """Put a folder in the place of the strategy folder, also when a late rank makes that anew meanwhile."""
        for attempt in range(_ATTEMPTS):
            self._discard(self.strategy)
            try:
                os.rename(folder, self.strategy)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR) or attempt + 1 == _ATTEMPTS:
                    raise
            else:
                return

    def _take_over(self) -> bool:
        """Take the lock of a job that left something to put right, unless it is alive."""
        if not _is_there(self._previous):
            return False
        try:
            self._lock.acquire(timeout=0)
        except (Timeout, NotImplementedError, OSError):
            return False
        self._cleared = True
        return True

    def _release(self) -> None:
        self._cleared = False
        self._holder.unlink(missing_ok=True)
        self._plain_lock.release()
        self._lock.release()

    def _discard(self, path: Path) -> None:
        """Remove a folder in one step, as others see it; a killed removal is finished by the next job."""
        if _is_there(path):
            waste = self.root / f".removed-{path.name.lstrip('.')}-{os.getpid()}"
            remove(waste)
            os.rename(path, waste)
            remove(waste)


class _Resolved:
    """Files with all symbolic links on their way resolved; the folders that many have in common are asked for once."""

    def __init__(self) -> None:
        self._known: dict[Path, Path] = {}

    def paths(self, files: Sequence[Path]) -> dict[Path, Path]:
        """What absolute paths lead to; several are asked for at once where the disk lets a reader wait."""
        folders = list({file.parent: None for file in files})
        self._known.update(zip(folders, each(self.path, folders)))
        return dict(zip(files, each(self.path, files)))

    def path(self, path: Path) -> Path:
        """What an absolute path without ".." leads to."""
        if path not in self._known:
            above = path.parent
            inside = path if above == path else self.path(above) / path.name
            self._known[path] = inside.resolve() if inside.is_symlink() else inside
        return self._known[path]


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()
