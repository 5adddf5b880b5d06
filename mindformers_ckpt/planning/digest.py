"""A digest of a plan: what is read and written where. Cheap for millions of pieces: numbers are packed, not printed."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.model import Place, Plan

_file, _box, _rest = itemgetter(0), itemgetter(1), itemgetter(2, 3, 4)
_PLAIN = ("", None, None)


def digest_of(plan: Plan, root: Path | None = None) -> str:
    """A digest of what a plan reads and writes, whatever the times of the files.

    With `root` source files are named relative to it: alike on all nodes, wherever their sources are.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in plan.sources:
        path = str(file.path) if root is None else os.path.relpath(file.path, root)
        digest.update(os.fsencode(f"{path}\0{file.size}\n"))
    for target in plan.targets:
        about = (target.path, target.rank, target.format, target.metadata, len(target.tensors))
        digest.update(repr(about).encode(errors="surrogateescape"))
    boxes = _Boxes()
    for transfer in plan.transfers:
        head = (transfer.name, transfer.dtype.name, transfer.shape)
        digest.update(repr(head).encode(errors="surrogateescape"))
        for places in (transfer.sources, transfer.targets):
            digest.update(array("q", [len(places)]))
            digest.update(array("q", map(_file, places)))
            digest.update(boxes.numbers(places))
            if not all(map(_PLAIN.__eq__, map(_rest, places))):
                digest.update(repr([_rest(place) for place in places]).encode(errors="surrogateescape"))
    for box in boxes.known:
        digest.update(array("q", (len(box.start), *box.start, *box.stop)))
    return digest.hexdigest()


class _Boxes:
    """Numbers for boxes: equal ones have one number. Many places share one box object, which is found by identity."""

    def __init__(self) -> None:
        self.known: dict[Box, int] = {}
        self._by_identity: dict[int, int] = {}

    def numbers(self, places: Sequence[Place]) -> array[int]:
        """The numbers of the boxes of some places, which must live as long as this object."""
        boxes = list(map(_box, places))
        identities = list(map(id, boxes))
        new = dict(zip(identities, boxes))
        for identity in new.keys() - self._by_identity.keys():
            self._by_identity[identity] = -1
        for identity, box in new.items():  # in the order of the places, which is alike everywhere
            if self._by_identity[identity] < 0:
                self._by_identity[identity] = self.known.setdefault(box, len(self.known))
        return array("q", map(self._by_identity.__getitem__, identities))
