"""An object that is open for reading."""

from __future__ import annotations

import errno
import io
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from mindformers_ckpt.objects.errors import ObjectError
from mindformers_ckpt.objects.listing import Place, found_at

if TYPE_CHECKING:
    from mindformers_ckpt.objects.client import Found

_STREAM_BYTES = 1 << 20


class ObjectFile:
    """An object that is read: what it was when it was opened, or an error."""

    def __init__(self, place: Place, found: Found) -> None:
        self._place, self._found = place, found
        self.size = found.size

    @classmethod
    def at(cls, place: Place) -> ObjectFile:
        """The object at a place. Raises ObjectError, also for a folder."""
        found = found_at(place)
        if found is None:
            raise ObjectError(errno.EISDIR, "it is a folder", place.url, is_final=True)
        return cls(place, found)

    def preadv(self, memory: memoryview, start: int) -> int:
        """Fill memory, but for what is behind the end; the number of bytes. Raises ObjectError."""
        return self._place.client.read(self._place.bucket, self._found, start, memory)

    def pread(self, length: int, start: int) -> bytes:
        """Bytes of the object, fewer at its end. Raises ObjectError."""
        content = bytearray(max(0, min(length, self.size - start)))
        self.preadv(memoryview(content), start)
        return bytes(content)

    def stream(self) -> BinaryIO:
        """The object as a stream, to be closed."""
        return cast(BinaryIO, io.BufferedReader(_Stream(self), _STREAM_BYTES))


class _Stream(io.RawIOBase):
    """An object as a stream."""

    def __init__(self, file: ObjectFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = self._file.preadv(memoryview(buffer).cast("B"), self._at)
        self._at += count
        return count
