"""Paths in an object storage, for code that was written for those on a disk.

What lists, looks and opens by the methods of a path works on both. What takes the name of a file to the system itself
is refused, instead of looking for a folder "s3:" on the disk.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PosixPath
from typing import IO, TYPE_CHECKING, Any, Union

from mindformers_ckpt.objects import listing
from mindformers_ckpt.objects.errors import NotOnDisk
from mindformers_ckpt.objects.file import ObjectFile
from mindformers_ckpt.objects.listing import Place

if TYPE_CHECKING:
    from mindformers_ckpt.objects.client import Found

PathLike = Union[str, "os.PathLike[str]"]

_SCHEMES = ("obs:", "s3:")


class ObjectPath(PosixPath):
    """A path whose first part is "s3:" or "obs:", its second one the bucket. Written with two slashes."""

    @property
    def place(self) -> Place:
        scheme, bucket = (*self.parts, "", "")[:2]
        return Place(scheme.rstrip(":"), bucket, "/".join(self.parts[2:]))

    def __str__(self) -> str:
        text = super().__str__()
        scheme, slash, rest = text.partition("/")
        return f"{scheme}//{rest}" if scheme in _SCHEMES and slash else text

    def __fspath__(self) -> str:
        if self.parts[:1] and self.parts[0] in _SCHEMES:
            raise NotOnDisk(f"{self} is in an object storage, a path on a disk is expected here; copy it to one first")
        return str(self)  # relative to another one

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> ObjectPath:
        return self

    def resolve(self, strict: bool = False) -> ObjectPath:
        return self

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        return _status(listing.found_at(self.place))

    def lstat(self) -> os.stat_result:
        return self.stat()

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        try:
            listing.found_at(self.place)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self.exists() and listing.found_at(self.place) is None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return self.exists() and listing.found_at(self.place) is not None

    def is_symlink(self) -> bool:
        return False

    def samefile(self, other_path: PathLike) -> bool:
        return self == absolute(other_path)

    def iterdir(self) -> Iterator[ObjectPath]:  # type: ignore[override]
        return (self / name for name in listing.names_in(self.place))

    def glob(self, pattern: str, **_: Any) -> Iterator[ObjectPath]:  # type: ignore[override]
        """The entries of this folder whose names fit; a pattern is that of a name here."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern)) if self.is_dir() else iter(())

    def rglob(self, pattern: str, **_: Any) -> Iterator[ObjectPath]:  # type: ignore[override]
        for path in self.iterdir():
            if fnmatchcase(path.name, pattern):
                yield path
            if path.is_dir():
                yield from path.rglob(pattern)

    def open(self, mode: str = "r", *_: Any, **__: Any) -> IO[Any]:  # type: ignore[override]
        if mode != "rb":
            raise NotOnDisk(f"{self} is in an object storage, where files are not written in place")
        return ObjectFile.at(self.place).stream()

    def read_bytes(self) -> bytes:
        file = ObjectFile.at(self.place)
        return file.pread(file.size, 0)


def is_url(text: object) -> bool:
    """Whether a text is the URL of an object storage."""
    return isinstance(text, str) and text.startswith(tuple(f"{scheme}//" for scheme in _SCHEMES))


def as_path(path: PathLike) -> Path:
    """A path as it was given, in an object storage where it is a URL. A Path has one slash of "s3://" only."""
    if isinstance(path, ObjectPath):
        return path
    text = os.fspath(path)
    return ObjectPath(text) if text.partition("/")[0] in _SCHEMES and "/" in text else Path(text)


def path_or_none(path: PathLike | None) -> Path | None:
    """`as_path`, with None for what is not given."""
    return None if path is None else as_path(path)


def absolute(path: PathLike) -> Path:
    """The absolute path of what was given; a path in an object storage is one."""
    found = as_path(path)
    return found if isinstance(found, ObjectPath) else Path(os.path.abspath(found))


def marker_of(folder: ObjectPath, run: str = "") -> ObjectPath:
    """The object that is there while a run puts a result in place; without `run` what the keys of all begin with."""
    return folder.with_name(f".{folder.name}.unfinished-{run}")


def may_be_mixture(folder: ObjectPath) -> bool:
    """Whether a run is putting a result at a folder, or was killed while it did."""
    return bool(folder.place.key) and bool(listing.keys_beginning(marker_of(folder).place))


def names_of(folder: Path) -> dict[str, bool]:
    """The names in a folder, and whether each is a folder; links count as what they lead to. Raises OSError."""
    if isinstance(folder, ObjectPath):
        return dict(listing.names_in(folder.place))
    with os.scandir(folder) as entries:
        return {entry.name: is_folder_entry(entry) for entry in entries}


def is_folder_entry(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder on a disk is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _status(found: Found | None) -> os.stat_result:
    """What a disk would say. The tag of the content stands in the place of the number of the file."""
    if found is None:
        return os.stat_result((stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0, 0, 0, 0, 0))
    number = int.from_bytes(hashlib.blake2b(found.tag.encode(), digest_size=7).digest(), "little")
    seconds = found.modified
    times = {"st_atime_ns": seconds * 10**9, "st_mtime_ns": seconds * 10**9, "st_ctime_ns": 0}
    return os.stat_result((stat.S_IFREG | 0o644, number, 0, 1, 0, 0, found.size, seconds, seconds, 0), times)
