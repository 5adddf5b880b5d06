"""What a path turned out to be: one source of weights, of one kind, with its files by rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path

from mindformers_ckpt.errors import PlanError, describe_problems
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.sources.shards import LogicalTensor
from mindformers_ckpt.strategy.metadata import Metadata
from mindformers_ckpt.strategy.model import Strategy

SUFFIXES = (".ckpt", ".safetensors")
TORCH_SUFFIXES = (".bin", ".pth", ".pt")

# What is done about contents that contradict the strategy (sources/plausibility.py).
MODES = ("error", "warn", "off")


class Kind(Enum):
    """The kinds of sources; the value is how messages call one."""

    COMPLETE = "complete weights"
    RANK_FOLDERS = "rank folders"
    HUGGING_FACE = "a Hugging Face model"
    CHECKPOINT2 = "a checkpoint 2.0"
    TORCH_DCP = "a distributed checkpoint of PyTorch"
    HYPER_PARALLEL = "a distributed checkpoint of hyper-parallel"


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
        metadata: the layouts that the source has itself, None where it has none.
        counters: of the training, where they are in a file of text: what each is as a tensor, and its bytes.
        tensors: where files hold boxes of any sizes, and the source says which: all tensors, by name.
        weights: of those, the names of the model's weights; None where all are.
    """

    root: Path
    by_rank: Mapping[int, tuple[Path, ...]]
    kind: Kind = Kind.COMPLETE
    owners: Mapping[str, Path] | None = None
    absent: Mapping[int, str] = field(default_factory=dict)
    advice: str = ""
    warnings: tuple[str, ...] = ()
    metadata: Metadata | None = None
    counters: tuple[tuple[TensorSpec, bytes], ...] = ()
    tensors: Mapping[str, LogicalTensor] | None = None
    weights: frozenset[str] | None = None

    @property
    def sharded(self) -> bool:
        """Whether each file is one rank's."""
        return self.kind in (Kind.RANK_FOLDERS, Kind.CHECKPOINT2)

    @cached_property
    def own_strategy(self) -> Strategy | None:
        """The strategy that the source brings with it, None where it must be given."""
        return None if self.metadata is None else self.metadata.strategy()

    def strategy(self, given: Strategy) -> Strategy:
        """The strategy to read it under: its own, or else the given one (that of complete weights where none is given).

        Raises PlanError when it has one, and another is given.
        """
        own = self.own_strategy
        if own is None:
            return given
        if not given.is_complete:
            raise PlanError(
                f"{self.root} brings its own layouts ({own.origin}); leave the source strategy out ({given.origin})"
            )
        return own

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
