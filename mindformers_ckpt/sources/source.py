"""What a path turned out to be: one source of weights, of one kind, with its files by rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from mindformers_ckpt.errors import PlanError, describe_problems

SUFFIXES = (".ckpt", ".safetensors")
TORCH_SUFFIXES = (".bin", ".pth", ".pt")


class Kind(Enum):
    """The kinds of sources; the value is how messages call one."""

    COMPLETE = "complete weights"
    RANK_FOLDERS = "rank folders"
    HUGGING_FACE = "a Hugging Face model"


@dataclass(frozen=True)
class Source:
    """The files of a checkpoint.

    Attributes:
        root: the path that was given, absolute.
        by_rank: rank -> its files (several only where complete weights are spread over files).
        kind: what it is.
        owners: file of a tensor by its name, as an index says; None where every file holds what is in it.
        absent: rank -> why the source has nothing of it, of ranks whose folders are there.
        advice: what to do about absent ranks.
        warnings: what the user should know of the choice.
    """

    root: Path
    by_rank: Mapping[int, tuple[Path, ...]]
    kind: Kind = Kind.COMPLETE
    owners: Mapping[str, Path] | None = None
    absent: Mapping[int, str] = field(default_factory=dict)
    advice: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def sharded(self) -> bool:
        """Whether the files are in rank folders."""
        return self.kind is Kind.RANK_FOLDERS

    @property
    def name(self) -> str:
        """The checkpoint's name: that of its file or folder, without a suffix of a checkpoint file."""
        known = self.root.suffix in (*SUFFIXES, *TORCH_SUFFIXES)
        return (self.root.stem if known else self.root.name) or "checkpoint"

    def assigns(self, name: str, file: Path) -> bool:
        """Whether a tensor that a file holds is read from that file: where an index says so, or there is none."""
        return self.owners is None or self.owners.get(name) == file

    @property
    def files(self) -> list[Path]:
        """All files, by rank."""
        return [path for files in self.by_rank.values() for path in files]

    def raise_absent(self) -> None:
        """Raise PlanError where ranks have no file of the step that the others are at."""
        if self.absent:
            problems = [f"rank_{rank}: {reason}" for rank, reason in sorted(self.absent.items())]
            headline = f"{self.root}: files of some ranks are missing" + (f"; {self.advice}" if self.advice else "")
            raise PlanError(describe_problems(headline, problems))
