"""Results in an object storage: parts of objects are put together in memory, and sent when they are whole.

An object cannot be written at a place, but in parts, in any order, by any process. A part waits in memory until all
that belongs into it has come; tasks are cut so that this is soon (`object_tasks`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from mindformers_ckpt.engine.descriptors import file_ranges
from mindformers_ckpt.engine.sinks import Layouts
from mindformers_ckpt.formats import FileLayout
from mindformers_ckpt.objects.listing import Place
from mindformers_ckpt.planning.model import TargetFile

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_PART_BYTES = 8 << 20
_MOST_PARTS = 9_000  # storages allow 10,000
_UNIT = 1 << 20
_SENT_AT_ONCE = 16


class Upload(NamedTuple):
    """A target file that is being written as an object. `done`: the numbers of the parts that the storage has."""

    place: Place
    upload: str
    part_bytes: int
    done: frozenset[int] = frozenset()

    def parts_of(self, start: int, stop: int) -> range:
        """The numbers of the parts that some bytes are in; they begin at 1."""
        return range(start // self.part_bytes + 1, (stop - 1) // self.part_bytes + 2)


class Uploads(NamedTuple):
    """What stands in the place of a folder: the uploads of all target files."""

    files: tuple[Upload, ...]


def part_bytes_for(size: int) -> int:
    """The bytes of each part of an object but the last one."""
    return max(_PART_BYTES, -(-size // _MOST_PARTS // _UNIT) * _UNIT)


class ObjectSink:
    """Writes target files as parts of objects. Raises ObjectError when the storage does not take them."""

    def __init__(self, uploads: Uploads, files: Sequence[TargetFile]) -> None:
        self._uploads = uploads.files
        self._layout = Layouts(files).of
        self._open: dict[tuple[int, int], _Part] = {}
        self._free: list[bytearray] = []
        self._sent: deque[tuple[Future[None], bytearray]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def write(self, file: int, name: str, start: int, data: memoryview) -> None:
        for offset, length in file_ranges(self._layout(file).tensors[name].segments, start, len(data)):
            self._put(file, offset, data[:length])
            data = data[length:]

    def offset(self, file: int, name: str, start: int) -> int:
        return file_ranges(self._layout(file).tensors[name].segments, start, 1)[0][0]

    def proof(self) -> str:
        return ""

    def end_task(self) -> None:
        """What was written is in the storage, unless a part waits for more."""
        if not self._open:
            self._wait(0)

    def close(self) -> None:
        self._open.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _put(self, file: int, offset: int, data: memoryview) -> None:
        upload = self._uploads[file]
        for number in upload.parts_of(offset, offset + len(data)):
            begin = (number - 1) * upload.part_bytes
            piece, data = data[: begin + upload.part_bytes - offset], data[begin + upload.part_bytes - offset :]
            if number not in upload.done:
                part = self._part(file, number)
                part.memory[offset - begin : offset - begin + len(piece)] = piece
                part.missing -= len(piece)
                if not part.missing:
                    self._send(file, number)
            offset += len(piece)

    def _part(self, file: int, number: int) -> _Part:
        if (file, number) not in self._open:
            upload, layout = self._uploads[file], self._layout(file)
            start = (number - 1) * upload.part_bytes
            size = min(upload.part_bytes, layout.size - start)
            reused = next((at for at, content in enumerate(self._free) if len(content) == size), None)
            content = bytearray(size) if reused is None else self._free.pop(reused)
            self._open[file, number] = _Part(content, size - fill_frames(layout, start, memoryview(content)))
        return self._open[file, number]

    def _send(self, file: int, number: int) -> None:
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(_SENT_AT_ONCE, "parts")
        self._wait(_SENT_AT_ONCE - 1)
        content = self._open.pop((file, number)).content
        self._sent.append((self._pool.submit(send_part, self._uploads[file], number, content), content))

    def _wait(self, most: int) -> None:
        """Until at most so many parts are on their way."""
        while len(self._sent) > most:
            sent, content = self._sent.popleft()
            sent.result()
            if len(self._free) < _SENT_AT_ONCE:
                self._free.append(content)


class _Part:
    """A part of an object in memory, and how much of it has not come yet."""

    def __init__(self, content: bytearray, missing: int) -> None:
        self.content, self.missing = content, missing
        self.memory = memoryview(content)


def send_part(upload: Upload, number: int, content: bytearray) -> None:
    """Give the storage a part of an object."""
    place = upload.place
    place.client.send(place.bucket, place.key, upload.upload, number, content)


def bare_parts(layout: FileLayout, upload: Upload) -> Iterator[tuple[int, bytearray]]:
    """The parts of a target file that hold no content of a tensor: such as are in a long header."""
    size = upload.part_bytes
    for offset, frame in layout.frames:
        for number in upload.parts_of(offset, offset + len(frame)):
            start, stop = (number - 1) * size, min(number * size, layout.size)
            if offset <= start and stop <= offset + len(frame):
                yield number, bytearray(frame[start - offset : stop - offset])


def fill_frames(layout: FileLayout, start: int, memory: memoryview) -> int:
    """Write what a file has around the contents of its tensors into a part that begins at `start`: how many bytes."""
    starts = _frame_starts(layout.frames)
    stop, count = start + len(memory), 0
    for offset, frame in layout.frames[max(0, bisect_right(starts, start) - 1) :]:
        if offset >= stop:
            break
        first, last = max(offset, start), min(offset + len(frame), stop)
        if first < last:
            memory[first - start : last - start] = frame[first - offset : last - offset]
            count += last - first
    return count


@lru_cache(maxsize=16)
def _frame_starts(frames: tuple[tuple[int, bytes], ...]) -> list[int]:
    return [offset for offset, _ in frames]
