"""A digest of a plan: what is read and written where.

Cheap for millions of pieces: numbers are packed, not printed, and what tensors share is looked at once.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path

from mindformers_ckpt.planning.model import Place, Plan, once

_first, _second, _rest = itemgetter(0), itemgetter(1), itemgetter(2, 3, 4)
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
    packed = once(_packed)
    for transfer in plan.transfers:
        head = (transfer.name, transfer.dtype.name, transfer.shape)
        digest.update(repr(head).encode(errors="surrogateescape"))
        digest.update(packed(transfer.sources))
        digest.update(packed(transfer.targets))
    return digest.hexdigest()


def _packed(places: Sequence[Place]) -> bytes:
    """A digest of places. All boxes of a tensor have its dimensions, so that one number after the other says all."""
    boxes = list(map(_second, places))
    digest = hashlib.blake2b(array("q", [len(places)]), digest_size=16)
    digest.update(array("q", map(_first, places)))  # files
    digest.update(array("q", chain.from_iterable(map(_first, boxes))))  # starts
    digest.update(array("q", chain.from_iterable(map(_second, boxes))))  # stops
    others = list(map(_rest, places))
    if others.count(_PLAIN) < len(others):
        digest.update(repr(others).encode(errors="surrogateescape"))
    return digest.digest()
