"""Ranks of several nodes that need the same bytes read them from the storage once between them.

Each tells a digest of what it reads, and where it listens. Those with one digest are a group: each reads a share from
the storage, gives it to the others, and reads by itself what does not come from them (`exchange.py`). So a rank that is
dead, slow or cut off costs the others seconds, and never the load.

It takes a secret of the job, since bytes of others become weights; and reading that has to wait: what all nodes have in
the page cache is read from there.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.engine.fetcher import Extent, Fetcher
from mindformers_ckpt.engine.into_memory import Fill, Piece, Request, fill_arrays, fill_requests, requests_of
from mindformers_ckpt.engine.shares import digest_of, groups_of, shares_of
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.messages import Address, name_ranks
from mindformers_ckpt.job.cluster.rendezvous import SECRET
from mindformers_ckpt.job.sharing.board import Board
from mindformers_ckpt.job.sharing.exchange import Exchange
from mindformers_ckpt.job.sharing.lines import Pass, address_of, listen
from mindformers_ckpt.log import log
from mindformers_ckpt.planning.checked import list_of, text_of
from mindformers_ckpt.planning.rank_plan import name_from

# Each of them costs 2 MiB of memory at most, for what comes from it and what goes there.
MOST_MEMBERS = 32
_SECONDS_BETWEEN_CHECKS = 0.05


class _Told(NamedTuple):
    """What a rank tells: a digest of what it reads, where it listens (None: nowhere), whether it has to wait for it."""

    digest: str | None
    address: Address | None
    has_to_wait: bool

    @classmethod
    def of(cls, value: Any) -> _Told:
        """What another rank told. Of one that tells something else nothing is known, as all ranks see."""
        try:
            digest, host, port, has_to_wait = list_of(value, 4)
            address = address_of(host, port) if port else None
            return cls(None if digest is None else text_of(digest), address, has_to_wait is True)
        except (TypeError, ValueError):
            return cls(None, None, False)


def filling(cluster: Cluster, root: Path, *, is_on: bool) -> Fill:
    """What fills arrays with what this rank reads below `root`, from the storage and from other ranks.

    All ranks of the job must call what they get, once.
    """
    return partial(_fill, cluster, root, is_on) if len(set(cluster.nodes)) > 1 else fill_arrays


def _fill(
    cluster: Cluster,
    root: Path,
    is_on: bool,
    fetcher: Fetcher,
    pieces: Iterable[Piece],
    check: Callable[[], None],
) -> None:
    requests = list(requests_of(pieces))
    with ExitStack() as stack:
        digest = _digest(requests, root) if is_on and requests else None
        listener = None if digest is None else _listener(cluster)
        if listener is not None:
            stack.enter_context(listener)
        members = _members(cluster, digest, listener, listener is not None and _has_to_wait(fetcher, requests))
        if members and digest and listener and cluster.peer_key:
            own = Pass(cluster.peer_key, digest, cluster.rank)
            fill_together(fetcher, requests, own, members, listener, check)
        else:
            fill_requests(fetcher, iter(requests), check, lambda request: None)


def fill_together(
    fetcher: Fetcher,
    requests: Sequence[Request],
    own: Pass,
    members: dict[int, Address],
    listener: socket.socket,
    check: Callable[[], None],
) -> None:
    """Read a share of the requests, get the others from the members of a group, this rank being one of them."""
    ranks = sorted(members)
    readers = [ranks[share] for share in shares_of([request.size for request in requests], len(ranks))]
    board = Board(requests, readers, own.rank)
    with Exchange(board, own, members, listener) as exchange:
        fill_requests(fetcher, board.own(), check, board.done)
        while not board.is_full:
            check()
            fill_requests(fetcher, board.lacking(exchange.late(), backwards=True), check, board.done)
            board.wait(_SECONDS_BETWEEN_CHECKS)
        exchange.finish(check)
    _report(own.rank, board, exchange)


def _listener(cluster: Cluster) -> socket.socket | None:
    """Where others call, None where they must not, or no address can be had."""
    if cluster.peer_key is None:
        return None
    try:
        return listen(cluster.host)
    except OSError as error:
        log.warning("rank %d shares nothing with other ranks, it cannot listen: %s", cluster.rank, error)
        return None


def _digest(requests: Sequence[Request], root: Path) -> str | None:
    """What tells others what is read; None where a file cannot be looked at."""
    paths = list(dict.fromkeys(request.path for request in requests))
    try:
        states = dict(zip(paths, each(Path.stat, paths)))
    except OSError:  # whoever reads it has a message
        return None
    # Copies that nodes have of their own are other files, unless they were made with their times.
    return digest_of(requests, lambda path: (name_from(root, path), states[path].st_size, states[path].st_mtime_ns))


def _has_to_wait(fetcher: Fetcher, requests: Sequence[Request]) -> bool:
    """Whether reading has to wait for a disk, as far as one place tells."""
    request = requests[len(requests) // 2]
    return fetcher.has_to_wait([Extent(request.path, request.start, request.stop)])


def _members(
    cluster: Cluster, digest: str | None, listener: socket.socket | None, has_to_wait: bool
) -> dict[int, Address]:
    """The ranks that share with this one, and where they listen; none where it reads for itself."""
    port = 0 if listener is None else listener.getsockname()[1]
    told = [_Told.of(value) for value in cluster.gather("what is read", [digest, cluster.host, port, has_to_wait])]
    if cluster.peer_key is None:
        _tell_of_secret(cluster, told)
        return {}
    digests = [about.digest if about.address is not None else None for about in told]
    for ranks in groups_of(digests, cluster.nodes, MOST_MEMBERS):
        if cluster.rank not in ranks:
            continue
        if any(told[rank].has_to_wait for rank in ranks):
            return {rank: address for rank in ranks if (address := told[rank].address) is not None}
        if cluster.rank == ranks[0]:
            log.info("share_reads: %s have what they read in memory, each reads for itself", name_ranks(ranks))
    return {}


def _tell_of_secret(cluster: Cluster, told: Sequence[_Told]) -> None:
    """Say what a secret would save."""
    groups = groups_of([about.digest for about in told], cluster.nodes, len(told))
    if groups and cluster.rank == MAIN_RANK:
        log.info(
            "share_reads: %s read the same bytes on several nodes, each for itself, because the job has no secret; set "
            "%s, alike on all ranks, and they read them once between them",
            *(name_ranks(groups[0]), SECRET),
        )


def _report(rank: int, board: Board, exchange: Exchange) -> None:
    """Say what came from where, and what was to come from another rank and did not."""
    own = board.bytes_from[rank]
    expected = sum(request.size for request in board.requests if board.readers[request.number] == rank)
    others = {other: count for other, count in board.bytes_from.items() if other != rank}
    log.info(
        "rank %d: %.3f GB of weights came from %d other ranks that need the same, %.3f GB from the storage "
        "(share_reads: auto)",
        *(rank, sum(others.values()) / 1e9, len(others), own / 1e9),
    )
    if own > expected:
        reasons = [f"rank {other}: {reason}" for other, reason in sorted(exchange.lost.items())]
        log.warning(
            "rank %d read %.3f GB itself that other ranks were to read, but did not give in time%s",
            *(rank, (own - expected) / 1e9, f" ({'; '.join(reasons[:20])})" if reasons else ""),
        )
