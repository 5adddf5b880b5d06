"""The headers of thousands of files, read by all ranks of a job for the one that plans.

The heads of a `.ckpt` file are as many small reads as it has tensors, and none can be left out: a file counts as equal
to another one only when all heads are, byte for byte. One rank would read 350,000 of them for 1,024 files. So the first
rank of each node reads the headers of a share of the files, and tells a digest of each. The main rank reads one file of
every digest itself, and takes others for equal to it where they have, as it sees them, the size and the time that the
other rank saw. What a rank could not read, or saw differently, the main rank reads as if nobody had.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.errors import FormatError, PlanError
from mindformers_ckpt.formats import Header
from mindformers_ckpt.formats.headers import read_headers
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.messages import MAX_VALUES
from mindformers_ckpt.objects.path import ObjectPath
from mindformers_ckpt.planning.checked import list_of, number_of, text_of
from mindformers_ckpt.planning.rank_plan import name_from, path_in
from mindformers_ckpt.sources.checkpoint import Checkpoint

LEAST_FILES = 64  # fewer are read in the time that two steps of a job take
MOST_FILES = 100_000  # whose names can be told at once
_BYTES_OF_FILE = 128  # of what is told of one
_SUFFIXES = (".ckpt", ".safetensors")


class _Seen(NamedTuple):
    """What a rank says of a file: its size and time as it was read, its own checksum, and a digest of its header."""

    size: int
    modified: int
    crc: int | None
    digest: str

    @classmethod
    def of(cls, header: Header) -> _Seen:
        text = repr((header.format, header.size, header.crc is None, header.frames))
        digest = hashlib.blake2b(text.encode(), digest_size=16)
        return cls(header.size, header.modified, header.crc, digest.hexdigest())

    @classmethod
    def told(cls, value: Any) -> _Seen:
        """What another rank told; raises TypeError for anything else."""
        size, modified, crc, digest = list_of(value, 4)
        return cls(number_of(size), number_of(modified), None if crc is None else number_of(crc), text_of(digest))


def look_together(cluster: Cluster, source: Checkpoint | None, root: Path) -> None:
    """Have a rank of each node read headers of a source for the main rank, which alone gives it. All ranks call it.

    `root` is where this rank finds the source. Nothing is told to, or believed of, ranks that anybody may be.
    """
    helpers = cluster.leaders
    shares: dict[int, list[Path]] = {}
    if source is not None and len(helpers) > 1 and not cluster.unproved:
        most = len(helpers) * (MAX_VALUES // cluster.size // _BYTES_OF_FILE)
        paths = _worthwhile(source.unread(), root)[:most]
        shares = {rank: paths[at :: len(helpers)] for at, rank in enumerate(helpers) if paths}
    told: tuple[bool, list[str]] = (False, [])
    if cluster.size > 1:
        values = None
        if cluster.rank == MAIN_RANK:
            names = {rank: [name_from(root, path) for path in share] for rank, share in shares.items()}
            values = [(bool(shares), names.get(rank, [])) for rank in range(cluster.size)]
        told = cluster.hand_out("files to look at", values)
    if not told[0]:
        return
    try:
        share = [path_in(root, text_of(name)) for name in list_of(told[1])]
        headers = (header for _, header in read_headers(share))
        seen = [None if isinstance(header, FormatError) else _Seen.of(header) for header in headers]
        answers = cluster.gather("looked at", seen)
        if source is not None:
            _adopt(source, dict(_all_seen(shares, answers)))
    except (TypeError, ValueError) as error:
        raise PlanError(f"what another rank told of files cannot be read: {str(error)[:300]}") from None


def _all_seen(shares: Mapping[int, Sequence[Path]], answers: Sequence[Any]) -> Iterator[tuple[Path, _Seen]]:
    """What ranks say of the files that they could read."""
    for rank, share in shares.items():
        for path, value in zip(share, list_of(answers[rank], len(share))):
            if value is not None:
                yield path, _Seen.told(value)


def _worthwhile(paths: Sequence[Path], root: Path) -> list[Path]:
    """The files that ranks are to read together, those below `root`."""
    found = [path for path in paths if path.suffix in _SUFFIXES and not isinstance(path, ObjectPath)]
    found = [path for path in found if Path(os.path.abspath(path)).is_relative_to(root)]
    return found[:MOST_FILES] if len(found) >= LEAST_FILES else []


def _adopt(source: Checkpoint, seen: Mapping[Path, _Seen]) -> None:
    """Take files for what other ranks saw, where this rank has read one with such a header, and sees the same file."""
    alike: dict[str, Header | None] = {}
    for path, about in seen.items():
        if about.digest not in alike:
            alike[about.digest] = _read(source, path, about.digest)
    for path, state in zip(seen, each(_state, list(seen))):
        about, like = seen[path], alike[seen[path].digest]
        if like is not None and path != like.path and state == (about.size, about.modified):
            source.adopt(replace(like, path=path, crc=about.crc, modified=about.modified))


def _read(source: Checkpoint, path: Path, digest: str) -> Header | None:
    """The header of a file as this rank reads it, None where it is not the one with the digest."""
    try:
        header = source.header(path)
    except FormatError:  # is told with those of the other files
        return None
    return header if _Seen.of(header).digest == digest else None


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
