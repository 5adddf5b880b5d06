"""The names of the parameters of all ranks, for the rank that plans for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.messages import MAX_VALUES


def names_of_all(cluster: Cluster, names: AbstractSet[str]) -> set[str]:
    """The names of all ranks together. All ranks call it.

    Of ranks with equal names (those of a pipeline stage) the lowest tells them, in as many steps as they take.
    """
    pieces = _pieces(sorted(names), MAX_VALUES // cluster.size)
    digest = hashlib.blake2b(json.dumps(pieces).encode(), digest_size=16).hexdigest()
    told = cluster.gather("digest of names", [digest, len(pieces)])
    tells = [about[0] for about in told].index(digest) == cluster.rank
    found: set[str] = set()
    for number in range(max(count for _, count in told)):
        own = pieces[number] if tells and number < len(pieces) else []
        found.update(name for names in cluster.gather("names", own) for name in names)
    return found


def _pieces(names: Iterable[str], limit: int) -> list[list[str]]:
    """Names in lists of at most `limit` bytes of JSON each."""
    pieces: list[list[str]] = []
    held = limit
    for name in names:
        size = len(json.dumps(name)) + 2
        if held + size > limit:
            pieces.append([])
            held = 2
        pieces[-1].append(name)
        held += size
    return pieces
