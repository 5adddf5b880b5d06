"""What the source files of a plan were when a run began, and whether they still are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mindformers_ckpt.disk.files import FileState
from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.errors import TransferError, raise_problems, system_errors
from mindformers_ckpt.objects.listing import look_again
from mindformers_ckpt.planning.model import SourceFile


def states_of(files: Iterable[SourceFile]) -> dict[Path, FileState]:
    """What the source files are at this moment. Raises TransferError."""
    paths = list(dict.fromkeys(file.path for file in files))
    return dict(zip(paths, each(_state_of, paths)))


def _state_of(path: Path) -> FileState:
    with system_errors(TransferError, f"{path}: cannot be read"):
        return FileState.of(path)


def check_unchanged(states: Mapping[Path, FileState]) -> None:
    """Compare files with what they were. Raises TransferError that names those which were written meanwhile."""
    look_again()
    changed = changed_files(states)
    headline = "source files were written or replaced while they were read; run the command again"
    raise_problems(TransferError, headline, changed)


def changed_files(states: Mapping[Path, FileState]) -> list[str]:
    """The files that are not what they were."""
    return [str(path) for path, now in zip(states, each(FileState.seen, list(states))) if now != states[path]]
