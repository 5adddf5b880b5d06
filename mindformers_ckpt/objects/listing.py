"""What a storage holds, asked once: a folder is listed with all that is below it, and its names are kept.

A request to list has a thousand names, so that a checkpoint of a thousand ranks takes as many requests as it has
thousands of files, whoever looks at however many of them.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from mindformers_ckpt.objects.errors import MissingObject, ObjectError

# Whoever reads from disks only starts sooner without it.
if TYPE_CHECKING:
    from mindformers_ckpt.objects.client import Client, Found

_MOST_OBJECTS = 2_000_000


class Place(NamedTuple):
    """A bucket of a storage, and a key or the name of a folder in it, without a slash at its end."""

    scheme: str
    bucket: str
    key: str

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    @property
    def client(self) -> Client:
        from mindformers_ckpt.objects.client import client_of

        return client_of(self.scheme)


class _Tree:
    """All objects below a folder."""

    def __init__(self, place: Place) -> None:
        self.files: dict[str, Found] = {}
        self.folders: dict[str, dict[str, bool]] = {}  # name -> whether it is a folder
        start = f"{place.key}/" if place.key else ""
        for found in place.client.list(place.bucket, start):
            if len(self.files) >= _MOST_OBJECTS:
                text = f"it holds over {_MOST_OBJECTS:,} objects; give a folder further down"
                raise ObjectError(errno.EFBIG, text, place.url, is_final=True)
            self._add(found)

    def _add(self, found: Found) -> None:
        # A key that ends in a slash is how tools of storages note a folder; one with an empty name in it is no path.
        if found.key.endswith("/") or "//" in found.key:
            return
        self.files[found.key] = found
        name, is_folder = found.key, False
        while True:
            folder, slash, last = name.rpartition("/")
            names = self.folders.setdefault(folder, {})
            was_known = last in names
            names[last] = names.get(last, False) or is_folder
            if was_known or not slash:
                return
            name, is_folder = folder, True


_lock = threading.RLock()
_trees: dict[Place, _Tree | None] = {}  # None: to be listed again
_files: dict[Place, Found | None] = {}  # None: there is no object


def found_at(place: Place) -> Found | None:
    """The object at a place; None where it is a folder. Raises MissingObject where there is nothing."""
    if not place.bucket:
        raise _missing(place, "there is no such bucket")
    tree = _tree_over(place._replace(key=place.key.rpartition("/")[0])) if "/" in place.key else None
    if tree is None:
        found = _asked(place)
        if found is not None:
            return found
        tree = _tree_of(place)
    if place.key in tree.folders or not place.key:
        return None
    if place.key in tree.files:
        return tree.files[place.key]
    raise _missing(place, "there is no such object")


def names_in(place: Place) -> Mapping[str, bool]:
    """The names in a folder, and whether each is a folder. Raises MissingObject where there is none."""
    names = (_tree_over(place) or _tree_of(place)).folders.get(place.key)
    if names is None and place.key:
        raise _missing(place, "there is no such folder")
    return names or {}


def keys_beginning(place: Place) -> list[str]:
    """The keys that begin as a place does, at this moment."""
    return [found.key for found in place.client.list(place.bucket, place.key)]


def _asked(place: Place) -> Found | None:
    """The object at a place, asked by itself, for no listing tells; None for a folder, and for nothing."""
    if place not in _files and place.key:
        try:
            _files[place] = place.client.head(place.bucket, place.key)[0]
        except MissingObject:
            _files[place] = None
    return _files.get(place)


def _missing(place: Place, text: str) -> MissingObject:
    return MissingObject(errno.ENOENT, text, place.url, is_final=True)


def files_below(place: Place) -> dict[str, Found]:
    """All objects below a folder by their keys, asked anew."""
    with _lock:
        _trees.pop(place, None)
        return dict(_tree_of(place).files)


def look_again() -> None:
    """Ask anew for all that is known, when somebody wants to know it."""
    with _lock:
        _files.clear()
        for place in _trees:
            _trees[place] = None


def _tree_over(place: Place) -> _Tree | None:
    """What is known of a place by the listing of a folder that it is in."""
    key = place.key
    while True:
        folder = place._replace(key=key)
        if folder in _trees:
            return _tree_of(folder)
        if not key:
            return None
        key = key.rpartition("/")[0]


def _tree_of(place: Place) -> _Tree:
    with _lock:
        tree = _trees.get(place)
        if tree is None:
            tree = _trees[place] = _Tree(place)
        return tree
