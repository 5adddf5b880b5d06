"""Weights in several numbered files, "model-00001-of-00003.safetensors": one of them is no model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.errors import PlanError, describe_problems

_NUMBERED = re.compile(r"(.+)-([0-9]{1,18})-of-([0-9]{1,18})(\.\w+)", re.DOTALL)
_MOST_FILES = 100_000


class PartOf(NamedTuple):
    """The set that a numbered file belongs to; `total` as it is written, zeros included."""

    prefix: str
    total: str
    suffix: str

    def __str__(self) -> str:
        return f"{self.prefix}-*-of-{self.total}{self.suffix}"

    def lacking(self, names: Iterable[str]) -> list[str]:
        """The files of the set that are not among the names."""
        there = set(names)
        width = len(self.total)
        wanted = (f"{self.prefix}-{n:0{width}}-of-{self.total}{self.suffix}" for n in range(1, int(self.total) + 1))
        return [name for name in islice(wanted, _MOST_FILES) if name not in there]


def part_of(name: str) -> PartOf | None:
    """The set that a file is of by its name, None when that has no number."""
    match = _NUMBERED.fullmatch(name)
    return None if match is None else PartOf(match[1], match[3], match[4])


def is_part(name: str) -> bool:
    """Whether a file is by its name one of several of a model."""
    part = part_of(name)
    return part is not None and int(part.total) > 1


def whole_set(file: Path, files: Iterable[Path]) -> tuple[Path, ...]:
    """Those of `files` that are of the set of one of them. Raises PlanError that lists what the set lacks."""
    return tuple(sets_of(other for other in files if part_of(other.name) == part_of(file.name))[part_of(file.name)])


def sets_of(files: Iterable[Path]) -> dict[PartOf | None, list[Path]]:
    """Files by their sets, those without a number under None. Raises PlanError that lists what a set lacks."""
    found: dict[PartOf | None, list[Path]] = {}
    for file in files:
        found.setdefault(part_of(file.name), []).append(file)
    for part, members in found.items():
        if part is None:
            continue
        lacking = part.lacking(file.name for file in members)
        if lacking or int(part.total) > _MOST_FILES:
            raise PlanError(describe_problems(f"{members[0].parent} lacks weight files", lacking))
    return found
