"""The headers of many files; several are read at once where the disk lets a reader wait, as one over a network does.

The heads of a `.ckpt` file are as many small reads as it has tensors. Files of a stage have the same ones, and who only
wants to know what is there compares most files with another one at samples (`look_quickly`). Such a header is likely,
not certain: whoever reads the contents compares all heads (`wrong_headers`), or reads the header again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from mindformers_ckpt.disk.files import FileState
from mindformers_ckpt.disk.waiting import each, has_waited
from mindformers_ckpt.errors import FormatError, raise_problems
from mindformers_ckpt.formats.tensor_file import Header, read_header, scan

K = TypeVar("K")

_AT_ONCE = 8
# Seconds that a file is waited for. Of a quick disk a file has many heads, each with a wait of its own.
_WAIT = 0.05
_WAIT_QUICK = 0.002  # of one that is looked at quickly
# Heads at which a file is compared with one of its size that was read whole; few where all are compared later.
_SAMPLES, _FEW_SAMPLES = 16, 2
MANY_FILES = 64  # whose heads, all of them, take longer than the rest of the planning
_KINDS = 4  # headers that the next file is compared with


class HeaderReader:
    """Reads the headers of many files: each is compared with those of the last ones that differ from one another.

    Ranks have files with equal tensors, one after the other, or some of each kind (weights, optimizer states).
    """

    def __init__(self) -> None:
        self._known: tuple[Header, ...] = ()

    def read(self, path: Path) -> Header:
        """As `read_header`; for several threads, too."""
        header = read_header(path, *self._known)
        others = [other for other in self._known if other.tensors is not header.tensors]
        self._known = (header, *others[: _KINDS - 1])
        return header


def read_headers(paths: Sequence[Path]) -> Generator[tuple[Path, Header | FormatError], None, None]:
    """Read the headers of files as `read_header` does, and yield each with its path, or what is wrong with the file.

    They come in the order of `paths`. At most 8 files are open, with a request each.
    """
    yield from zip(paths, each(_or_error(HeaderReader().read), paths, at_once=_AT_ONCE, patience=_WAIT))


def are_sampled(paths: Sequence[Path]) -> bool:
    """Whether files are better looked at quickly: because they are many, or looking at them had to wait."""
    return len(paths) >= MANY_FILES or has_waited()


def look_quickly(
    paths: Sequence[Path], samples: int = _SAMPLES
) -> Generator[tuple[Path, Header | FormatError], None, None]:
    """As `read_headers`, but files are compared at samples with others of their size, each of which was read whole.

    Of a `.ckpt` file so many heads are compared, and where they are equal the header that is taken over `is_likely`.
    """
    states = dict(zip(paths, each(FileState.seen, paths)))
    whole: dict[tuple[str, int], list[tuple[Header, Header]]] = {}  # each with some of its heads

    def look(path: Path) -> Header:
        state = states[path]
        if state is None:
            return read_header(path)  # which says what is wrong
        known = whole.get((path.suffix, state.size), [])
        if known:
            header = replace(scan(path, *(some for _, some in known)), modified=state.modified)
        else:
            header = read_header(path)  # which is not read again soon
        own = header, sampled(header, samples)
        like, some = next((pair for pair in known if pair[0].tensors is header.tensors), own)
        # The next file is mostly like this one. An entry that another thread makes now may be lost: it is read again.
        whole[path.suffix, state.size] = [(like, some), *(pair for pair in known if pair[0] is not like)]
        is_likely = like is not header and some is not like
        return replace(header, frames=like.frames, is_likely=True) if is_likely else header

    sizes = {path: (path.suffix, state.size) for path, state in states.items() if state is not None}
    firsts = list({sizes.get(path, path): path for path in reversed(paths)}.values())
    found = dict(zip(firsts, each(_or_error(look), firsts, at_once=_AT_ONCE, patience=_WAIT)))
    others = [path for path in paths if path not in found]
    found.update(zip(others, each(_or_error(look), others, patience=_WAIT_QUICK)))
    yield from ((path, found[path]) for path in paths)


def wrong_headers(headers: Mapping[K, Header]) -> dict[K, Header]:
    """The true headers in the place of those that are likely and wrong: all heads are compared.

    Raises FormatError where such a file cannot be read.
    """
    likely = [(number, header) for number, header in headers.items() if header.is_likely]
    found = each(lambda item: scan(item[1].path, item[1]), likely)
    return {number: true for (number, header), true in zip(likely, found) if true.tensors is not header.tensors}


@lru_cache(maxsize=64)
def heads_by_content(frames: tuple[tuple[int, bytes], ...]) -> dict[int, tuple[int, bytes]]:
    """The heads of a .ckpt file (offset, bytes), by the offset of the content that comes after each."""
    return {offset + len(head): (offset, head) for offset, head in frames}


def sound_headers(paths: Sequence[Path], *, likely: bool = False) -> dict[Path, Header]:
    """The headers of files; with `likely` by `look_quickly`. Raises FormatError that tells of all damaged ones."""
    found: dict[Path, Header] = {}
    problems = []
    for path, header in look_quickly(paths, _FEW_SAMPLES) if likely else read_headers(paths):
        if isinstance(header, FormatError):
            problems.append(str(header))
        else:
            found[path] = header
    if len(problems) == 1:
        raise FormatError(problems[0])
    raise_problems(FormatError, "checkpoint files cannot be read", problems)
    return found


def _or_error(read: Callable[[Path], Header]) -> Callable[[Path], Header | FormatError]:
    """`read`, which returns the error where a file cannot be read."""

    def answer(path: Path) -> Header | FormatError:
        try:
            return read(path)
        except FormatError as error:
            return error

    return answer


def sampled(header: Header, count: int) -> Header:
    """A header with so many of the frames alone, evenly spread; itself where it has no more."""
    frames = header.frames
    if len(frames) <= count:
        return header
    chosen = (number * (len(frames) - 1) // (count - 1) for number in range(count))
    return replace(header, frames=tuple(frames[number] for number in chosen))
