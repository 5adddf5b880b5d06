"""The heads of tensors in files that were looked at at samples only: compared before anything of a tensor is used.

They stand right before the contents, and where reading has to wait they are asked for together with these: looking at
all heads of all files costs no round trip of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from mindformers_ckpt.engine.fetcher import Extent
from mindformers_ckpt.formats import Header
from mindformers_ckpt.formats.headers import heads_by_content
from mindformers_ckpt.planning.model import once


class LikelyHeads:
    """Compares heads for one reader, each once."""

    def __init__(self, fill: Callable[[Path, int, memoryview], None]) -> None:
        """`fill` fills memory with bytes of a file from an offset on."""
        self._fill = fill
        self._heads = once(heads_by_content)  # files that are alike share their frames
        self._asked: set[tuple[int, str]] = set()
        self._right: set[tuple[int, str]] = set()

    def extents(self, file: int, name: str, header: Header) -> Iterator[Extent]:
        """Where the heads of a tensor are, the first time that it is asked for."""
        if header.is_likely and (file, name) not in self._asked:
            self._asked.add((file, name))
            for offset, head in self._of(name, header):
                yield Extent(header.path, offset, offset + len(head))

    def are_right(self, file: int, name: str, header: Header) -> bool:
        """Whether the heads of a tensor are what the header says."""
        if not header.is_likely or (file, name) in self._right:
            return True
        for offset, head in self._of(name, header):
            found = bytearray(len(head))
            self._fill(header.path, offset, memoryview(found))
            if found != head:
                return False
        self._right.add((file, name))
        return True

    def _of(self, name: str, header: Header) -> list[tuple[int, bytes]]:
        heads, record = self._heads(header.frames), header.tensors.get(name)
        return [] if record is None else [heads[segment.offset] for segment in record.segments]
