"""The headers of many files; several are read at once where the disk lets a reader wait, as one over a network does."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.errors import FormatError, raise_problems
from mindformers_ckpt.formats.tensor_file import Header, read_header

_AT_ONCE = 8
# Seconds that a file is waited for. Of a quick disk a file has many heads, each with a wait of its own.
_WAIT = 0.05


def read_headers(paths: Sequence[Path]) -> Generator[tuple[Path, Header | FormatError], None, None]:
    """Read the headers of files as `read_header` does, and yield each with its path, or what is wrong with the file.

    They come in the order of `paths`. At most 8 files are open, with a request each. A file is compared with the
    one that was read last, which is cheap where neighbours in `paths` have equal tensors.
    """
    last: Header | None = None

    def read(path: Path) -> Header | FormatError:
        nonlocal last
        try:
            last = header = read_header(path, last)
        except FormatError as error:
            return error
        return header

    yield from zip(paths, each(read, paths, at_once=_AT_ONCE, patience=_WAIT))


def sound_headers(paths: Sequence[Path]) -> dict[Path, Header]:
    """The headers of files. Raises FormatError that tells of all damaged ones together."""
    found: dict[Path, Header] = {}
    problems = []
    for path, header in read_headers(paths):
        if isinstance(header, FormatError):
            problems.append(str(header))
        else:
            found[path] = header
    if len(problems) == 1:
        raise FormatError(problems[0])
    raise_problems(FormatError, "checkpoint files cannot be read", problems)
    return found
