"""The folders under the output dir that the hook clears: `strategy` and `transformed_checkpoint`.

The guide has both removed when automatic conversion is on. Here nothing is deleted before what replaces it
is complete: the old strategy folder is moved aside while the job writes its own, and comes back when the
load fails; `transformed_checkpoint` is replaced in one step when the new one is complete.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from mindformers_ckpt.errors import ConfigError, PublishError, describe_problems


class OutputDir:
    """The output dir of a job, seen by the one rank that changes it.

    The job that clears holds a lock from `clear` to `keep` or `restore`; a second job is refused.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.strategy = self.root / "strategy"
        self.transformed = self.root / "transformed_checkpoint"
        self._previous = self.root / ".strategy.previous"
        self._holder = self.root / ".checkpoint_hook.holder"
        self._lock = FileLock(self.root / ".checkpoint_hook.lock")

    def check_apart(self, load_checkpoint: str, src_strategy: str) -> None:
        """Refuse sources that lie in what would be cleared; symbolic links are resolved. Touches nothing."""
        cleared = [(folder, folder.resolve()) for folder in (self.strategy, self.transformed)]
        problems = []
        for key, value in (("load_checkpoint", load_checkpoint), ("src_strategy_path_or_dir", src_strategy)):
            real = Path(value).resolve() if value else None
            for folder, real_folder in cleared:
                if real is not None and (real.is_relative_to(real_folder) or real_folder.is_relative_to(real)):
                    what = "the last run's strategy" if folder == self.strategy else "a transformed checkpoint"
                    aim = self.root.parent / "checkpoint_source" / Path(value).name
                    problems.append(
                        f"{key}: {value} lies in {folder}, which is cleared for {what}; move it away first, "
                        f"e.g. mv {value} {aim}, and set {key} to that"
                    )
        if problems:
            headline = "the source is in a folder that automatic conversion clears; nothing was touched"
            raise ConfigError(describe_problems(headline, problems))

    def clear(self) -> None:
        """Make an empty strategy folder, with the old one moved aside. Links are removed, never followed.

        Raises PublishError when another job works here.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            holder = self._holder.read_text() if self._holder.exists() else "an unknown process"
            raise PublishError(
                f"another job ({holder}) is loading weights with the output dir {self.root}; "
                "wait for it, or give this job another output_dir"
            ) from None
        self._holder.write_text(f"process {os.getpid()} on {os.uname().nodename}")
        if self._previous.exists() or self._previous.is_symlink():
            _remove(self.strategy)  # of a run that died: what it replaced is still aside
        elif self.strategy.exists() or self.strategy.is_symlink():
            os.rename(self.strategy, self._previous)
        self.strategy.mkdir()

    def keep(self, transformed: bool) -> None:
        """The load is done: remove what it replaced. `transformed`: whether this run made a new checkpoint."""
        _remove(self._previous)
        if not transformed:
            _remove(self.transformed)
        self._release()

    def restore(self) -> None:
        """The load failed: put the old strategy back. Does nothing unless this process cleared."""
        if not self._lock.is_locked:
            return
        if self._previous.exists() or self._previous.is_symlink():
            _remove(self.strategy)
            os.rename(self._previous, self.strategy)
        self._release()

    def _release(self) -> None:
        self._holder.unlink(missing_ok=True)
        self._lock.release()


def _remove(path: Path) -> None:
    """Remove a folder with all it holds, or a link itself."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
