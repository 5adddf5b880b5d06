"""Who of several ranks reads what, where all of them need the same bytes. Nothing is opened here, and nobody asked.

Every rank finds the same answer by itself: their requests are the same list, and so are the ranks that share them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from mindformers_ckpt.engine.into_memory import Request


def digest_of(requests: Sequence[Request], identity: Callable[[Path], object]) -> str:
    """A digest of what is read: ranks with the same one put the same bytes of the same files into equal arrays.

    `identity` tells the files of one rank apart, and is the same for the same file on all ranks.
    """
    digest = hashlib.blake2b(digest_size=16)
    last: Path | None = None
    for request in requests:
        if request.path != last:
            last = request.path
            digest.update(repr(identity(last)).encode())
        runs = [(piece.start, piece.stop, piece.target.shape, piece.strides) for piece in request.pieces]
        digest.update(repr(runs).encode())
    return digest.hexdigest()


def shares_of(sizes: Sequence[int], members: int) -> list[int]:
    """Which member reads each request, given their bytes: each a run of requests, of about as many bytes.

    A run, so that a member opens few of the files. The shares differ by less than two requests.
    """
    total, before = max(sum(sizes), 1), 0
    shares = []
    for size in sizes:
        shares.append(min((before + size // 2) * members // total, members - 1))
        before += size
    return shares


def groups_of(digests: Sequence[str | None], nodes: Sequence[str], most: int) -> list[tuple[int, ...]]:
    """The ranks that share what they read: those of several nodes with one digest, `most` at a time.

    `digests` has a digest for each rank, None for one that does not take part. Ranks of one node are no group: the
    second one finds in the page cache what the first has read.
    """
    alike: dict[str, list[int]] = {}
    for rank, digest in enumerate(digests):
        if digest is not None:
            alike.setdefault(digest, []).append(rank)
    groups = [part for ranks in alike.values() for part in _even_parts(ranks, most)]
    return [ranks for ranks in groups if len({nodes[rank] for rank in ranks}) > 1]


def _even_parts(ranks: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """The fewest parts of at most that many ranks, about as large as each other."""
    count = -(-len(ranks) // most)
    ends = [len(ranks) * part // count for part in range(count + 1)]
    return [tuple(ranks[start:stop]) for start, stop in zip(ends, ends[1:])]
