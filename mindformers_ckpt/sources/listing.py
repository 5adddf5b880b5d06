"""What a folder holds, asked once: names of weight files and of rank folders, without hidden and unfinished ones."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mindformers_ckpt.errors import FormatError, PlanError, describe_problems
from mindformers_ckpt.sources.source import SUFFIXES
from mindformers_ckpt.text_files import read_json

_RANK_FOLDER = re.compile(r"rank_(\d+)")
# Strategy files have the suffix of checkpoints (MindSpore's and MindFormers' names).
_STRATEGY_FILE = re.compile(r".*ckpt_strategy.*\.ckpt|.*strategy_rank_\d+.*\.ckpt")


@dataclass(frozen=True)
class Listing:
    """The entries of a folder, in the default sort of their names. Hidden ones (also macOS' `._` files) do not count.

    Raises PlanError when the folder cannot be read.
    """

    folder: Path

    @cached_property
    def _entries(self) -> dict[str, bool]:
        """Name -> whether it is a folder; links count as what they lead to."""
        try:
            with os.scandir(self.folder) as entries:
                found = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
        except OSError as error:
            raise PlanError(f"{self.folder}: cannot be read: {error.strerror}") from error
        return dict(sorted(found.items()))

    @property
    def names(self) -> list[str]:
        """The names of all entries."""
        return list(self._entries)

    @property
    def file_names(self) -> list[str]:
        """The names of what is no folder."""
        return [name for name, is_folder in self._entries.items() if not is_folder]

    def weight_files(self, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
        """The regular files with the suffix of a checkpoint, without strategy files."""
        chosen = [name for name in self.file_names if os.path.splitext(name)[1] in suffixes]
        paths = (self.folder / name for name in chosen if _STRATEGY_FILE.fullmatch(name) is None)
        return [path for path in paths if path.is_file()]

    @cached_property
    def strategy_files(self) -> list[Path]:
        """The files with the name of a strategy file."""
        return [self.folder / name for name in self.file_names if _STRATEGY_FILE.fullmatch(name) is not None]

    @cached_property
    def rank_folders(self) -> dict[int, Path]:
        """Rank -> its folder. Raises PlanError where two folders are of the same rank (`rank_0` and `rank_00`)."""
        found: dict[int, Path] = {}
        problems = []
        for name, is_folder in self._entries.items():
            match = _RANK_FOLDER.fullmatch(name) if is_folder else None
            if match is None:
                continue
            rank = int(match[1])
            if rank in found:
                problems.append(f"{found[rank].name} and {name} are both rank {rank}")
            found[rank] = self.folder / name
        if problems:
            headline = f"{self.folder} holds several folders of one rank; remove those that do not belong to it"
            raise PlanError(describe_problems(headline, problems))
        return dict(sorted(found.items()))

    def json(self, name: str) -> Any:
        """The content of a JSON file; None when there is none, or it is no JSON."""
        try:
            return read_json(self.folder / name, FormatError, infinite=True)
        except FormatError:
            return None

    def describe(self, limit: int = 8) -> str:
        """What is there, for messages."""
        names = self.names
        if not names:
            return "nothing"
        return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def rank_of(folder: Path) -> int | None:
    """The rank whose folder this is by its name, None when it is none."""
    match = _RANK_FOLDER.fullmatch(folder.name)
    return None if match is None else int(match[1])
