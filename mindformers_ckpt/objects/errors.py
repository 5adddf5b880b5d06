"""What can go wrong with an object storage."""

from __future__ import annotations

from mindformers_ckpt.errors import CheckpointError, TransferError
from mindformers_ckpt.printable import printable


class ObjectError(TransferError):
    """A storage did not do what it was asked for. `is_final`: it would not in another attempt either.

    It has the fields of an OSError, so that code for files says what is wrong with an object in its own words.
    """

    def __init__(self, number: int, text: str, place: str, *, is_final: bool) -> None:
        super().__init__(number, text, place)
        self.is_final = is_final

    def __str__(self) -> str:
        return printable(f"{self.filename}: {self.strerror}")

    def __reduce__(self) -> tuple[object, ...]:
        return _made, (type(self), self.errno, self.strerror, self.filename, self.is_final)


class MissingObject(ObjectError, FileNotFoundError):
    """There is no such object, folder, bucket or upload."""


class NotOnDisk(CheckpointError):
    """A path in an object storage was given to what only works on a disk."""


def _made(kind: type[ObjectError], number: int, text: str, place: str, is_final: bool) -> ObjectError:
    return kind(number, text, place, is_final=is_final)
