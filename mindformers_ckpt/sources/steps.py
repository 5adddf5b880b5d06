"""Names of saved files: which rank, run, epoch and step one is of.

MindSpore and MindFormers name checkpoints `<prefix>_rank_<R>[_<N>]-<E>_<S>[<mark>].ckpt`: rank R, run N (a job that
was started again counts up, where files of the earlier run are there), epoch E, step S, and a mark like `_breakpoint`
of a file that was saved when the job failed (`_get_ckpt_prefix`, `exception_save` of MindSpore 2.10). The rank is
missing where MindSpore's own callback was used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

# A longer number is not a step, and could be longer than Python reads.
_NUMBER = "[0-9]{1,18}"
_SAVED = re.compile(rf"(?P<head>.*)-(?P<epoch>{_NUMBER})_(?P<step>{_NUMBER})(?P<mark>[^0-9].*)?", re.DOTALL)
_HEAD = re.compile(rf"(?P<prefix>.*?)(?P<rank>_rank_{_NUMBER})?(?:_(?P<run>{_NUMBER}))?", re.DOTALL)
_STEP = re.compile(rf"(?P<epoch>{_NUMBER})_(?P<step>{_NUMBER})")
_DIGITS = re.compile(r"([0-9]+)")
_SUFFIX = re.compile(r"\.(ckpt|safetensors)$")


class Moment(NamedTuple):
    """When a file was saved, comparable in time: files of one moment belong together."""

    run: int
    epoch: int
    step: int
    mark: str = ""

    def __str__(self) -> str:
        run = f" of run {self.run}" if self.run else ""
        return f"{self.epoch}_{self.step}{self.mark}{run}"


class SavedName(NamedTuple):
    """The parts of a saved file's name; `rank` is None where the name does not tell."""

    prefix: str
    rank: int | None
    moment: Moment


def parse(name: str) -> SavedName | None:
    """Take a file name (with or without its suffix) apart; None when it tells no epoch and step."""
    saved = _SAVED.fullmatch(_SUFFIX.sub("", name))
    if saved is None:
        return None
    head = _HEAD.fullmatch(saved["head"])
    assert head is not None  # everything is a prefix
    rank = int(head["rank"][len("_rank_") :]) if head["rank"] else None
    moment = Moment(int(head["run"] or 0), int(saved["epoch"]), int(saved["step"]), saved["mark"] or "")
    return SavedName(head["prefix"], rank, moment)


def natural(name: str) -> list[str | int]:
    """A sort key by which `-9_1` comes before `-10_1`."""
    return [int(part) if number % 2 else part for number, part in enumerate(_DIGITS.split(name))]


def moments(files: Mapping[int, Path]) -> dict[int, SavedName | None]:
    """The parsed names of one file a rank.

    A number before the step may be the rank instead of a run ("gpt_1-5_2" in rank_1): where it is the rank's on all
    of several ranks, that is what it is.
    """
    parsed = {rank: parse(file.name) for rank, file in files.items()}
    known = {rank: name for rank, name in parsed.items() if name is not None}
    if len(known) > 1 and all(name.rank is None and name.moment.run == rank for rank, name in known.items()):
        for rank, name in known.items():
            parsed[rank] = name._replace(rank=rank, moment=name.moment._replace(run=0))
    return parsed


def alike(stems: Mapping[int, str], *, choice: bool) -> bool:
    """Whether names that tell no step, one a rank, could be of one checkpoint.

    They are the same, or differ in the rank's own number only. Where no rank had a `choice` between files other
    numbers may differ, too (those of devices of a node).
    """
    own = {
        _DIGITS.sub(lambda match, rank=rank: "#" if int(match[0]) == rank else match[0], stem)  # type: ignore[misc]
        for rank, stem in stems.items()
    }
    if len(set(stems.values())) < 2 or len(own) < 2:
        return True
    return not choice and len({_DIGITS.sub("#", stem) for stem in stems.values()}) < 2


def matching(files: Iterable[Path], wanted: str, rank: int) -> list[Path]:
    """The files of a rank's folder that `wanted` names.

    `wanted` is a file's name or an epoch and step like "3_150". A file of that very name comes first, or of that name
    with the rank's own number in it; then the files of that epoch and step, of the same run and mark where `wanted`
    tells one.
    """
    files = list(files)
    bare = _SUFFIX.sub("", wanted)
    own = re.sub(r"_rank_\d+", lambda _: f"_rank_{rank}", bare)
    for name in (wanted, bare, own):
        found = [file for file in files if name in (file.name, file.stem)]
        if found:
            return found
    step = _STEP.fullmatch(bare)
    named = parse(bare)
    if step is not None:
        moment = Moment(0, int(step["epoch"]), int(step["step"]))
    elif named is not None:
        moment = named.moment
    else:
        return []
    at_step = [(file, saved.moment) for file in files if (saved := parse(file.name)) is not None]
    at_step = [(file, found) for file, found in at_step if (found.epoch, found.step) == moment[1:3]]
    exact = [file for file, found in at_step if found == moment]
    if exact and (moment.run or moment.mark):
        return exact
    plain = [file for file, found in at_step if found.mark == moment.mark]
    return plain or [file for file, _ in at_step]
