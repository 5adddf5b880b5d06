"""What a folder holds, asked once: names of weight files and of rank folders, without hidden and unfinished ones."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.errors import FormatError, PlanError, raise_problems, system_errors
from mindformers_ckpt.objects.path import ObjectPath, is_folder_entry, names_of
from mindformers_ckpt.sources.source import SUFFIXES
from mindformers_ckpt.text_files import read_json
from mindformers_ckpt.words import shortened

_RANK_FOLDER = re.compile(r"rank_([0-9]+)")
# Names that people give to the folder of a rank by mistake: "Rank_0", "rank_0 ", "rank0", digits of other scripts.
_ALMOST_RANK_FOLDER = re.compile(r"\s*rank[\s_-]*\d+\s*", re.IGNORECASE)
# Strategy files have the suffix of checkpoints (MindSpore's and MindFormers' names).
_STRATEGY_FILE = re.compile(r".*ckpt_strategy.*\.ckpt|.*strategy_rank_\d+.*\.ckpt")


@dataclass(frozen=True)
class Listing:
    """The entries of a folder, in the default sort of their names. Hidden ones (also macOS' `._` files) do not count.
    What is neither a folder nor a regular file counts as a file: whoever reads it says what is wrong.

    Raises PlanError when the folder cannot be read.
    """

    folder: Path
    _known: Mapping[str, bool] | None = field(default=None, compare=False, repr=False)
    # What others have found in folders of it: the name of such a folder -> its entries.
    told: Mapping[str, Mapping[str, bool]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def entries(self) -> Mapping[str, bool]:
        """Name -> whether it is a folder."""
        # Whether the disk lets a reader wait is known from the first folder on.
        return next(each(_entries_of, [self.folder])) if self._known is None else self._known

    @property
    def names(self) -> list[str]:
        """The names of all entries."""
        return list(self.entries)

    @property
    def file_names(self) -> list[str]:
        """The names of what is no folder."""
        return [name for name, is_folder in self.entries.items() if not is_folder]

    def weight_files(self, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
        """The files with the suffix of a checkpoint, without strategy files."""
        chosen = (name for name in self.file_names if os.path.splitext(name)[1] in suffixes)
        return [self.folder / name for name in chosen if not is_strategy_file(name)]

    @cached_property
    def almost_weights(self) -> list[str]:
        """What does not count, but has almost the name of a weight file: "x.CKPT", a folder "x.ckpt"."""
        found = []
        for name, is_folder in self.entries.items():
            suffix = os.path.splitext(name)[1]
            if is_folder and suffix in SUFFIXES:
                found.append(f"{name} (a folder)")
            elif not is_folder and suffix not in SUFFIXES and suffix.lower() in SUFFIXES:
                found.append(f"{name} (suffixes are written in lower case)")
        return found

    @cached_property
    def strategy_files(self) -> list[Path]:
        """The files with the name of a strategy file."""
        return [self.folder / name for name in self.file_names if is_strategy_file(name)]

    @cached_property
    def rank_folders(self) -> dict[int, Path]:
        """Rank -> its folder.

        Raises PlanError where two folders are of the same rank (`rank_0` and `rank_00`), or a folder with weights has
        almost the name of a rank's.
        """
        found: dict[int, Path] = {}
        problems = []
        for name, is_folder in self.entries.items():
            if not is_folder:
                continue
            match = _RANK_FOLDER.fullmatch(name)
            if match is None:
                if _ALMOST_RANK_FOLDER.fullmatch(name) and Listing(self.folder / name).weight_files():
                    problems.append(f"{name!r} is almost the name of a rank's folder, which is rank_<n>")
                continue
            rank = int(match[1])
            if rank in found:
                problems.append(f"{found[rank].name} and {name} are both rank {rank}")
            found[rank] = self.folder / name
        headline = (
            f"{self.folder} holds folders whose rank is not clear; rename them, or remove those that do not belong"
        )
        raise_problems(PlanError, headline, problems)
        return dict(sorted(found.items()))

    @cached_property
    def of_ranks(self) -> dict[int, Listing]:
        """Rank -> what its folder holds. Raises what `rank_folders` raises."""
        folders, told = self.rank_folders, self.told
        own = [folder for folder in folders.values() if folder.name not in told]
        found = {**told, **dict(zip((folder.name for folder in own), each(_entries_of, own)))}
        return {rank: Listing(folder, found[folder.name]) for rank, folder in folders.items()}

    @cached_property
    def lost_ranks(self) -> dict[int, str]:
        """Ranks in the place of whose folder there is something else: rank -> what."""
        found = {}
        for name in self.file_names:
            match = _RANK_FOLDER.fullmatch(name)
            if match is not None:
                path = self.folder / name
                found[int(match[1])] = f"{path} is {'a link that leads nowhere' if path.is_symlink() else 'no folder'}"
        return found

    def json(self, name: str) -> Any:
        """The content of a JSON file; None when there is none, or it is no JSON."""
        try:
            return read_json(self.folder / name, FormatError, infinite=True)
        except FormatError:
            return None

    def describe(self, limit: int = 8) -> str:
        """What is there, for messages."""
        return shortened(self.names, limit) or "nothing"


def is_strategy_file(name: str) -> bool:
    """Whether a file is a strategy by its name."""
    return _STRATEGY_FILE.fullmatch(name) is not None


def _entries_of(folder: Path) -> dict[str, bool]:
    """The entries of a folder: name -> whether it is one, too, sorted by name; links count as what they lead to.

    Raises PlanError.
    """
    with system_errors(PlanError, f"{folder}: cannot be read"):
        names = names_of(folder) if isinstance(folder, ObjectPath) else _names_on_disk(folder)
    return {name: is_folder for name, is_folder in sorted(names.items()) if not name.startswith(".")}


def _names_on_disk(folder: Path) -> dict[str, bool]:
    """As `names_of`; where the disk has to be waited for, several links are followed at once."""
    with os.scandir(folder) as entries:
        found = list(entries)
    return dict(zip((entry.name for entry in found), each(is_folder_entry, found)))


def rank_of(folder: Path) -> int | None:
    """The rank whose folder this is by its name, None when it is none."""
    match = _RANK_FOLDER.fullmatch(folder.name)
    return None if match is None else int(match[1])
