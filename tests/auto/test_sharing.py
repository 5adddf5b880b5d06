"""Ranks of several nodes read the same bytes once between them, and nothing that another rank does is a wrong byte."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_file import MIB, SECRET, Counted, assert_read, pieces_of
from test_cluster import free_address

from mindformers_ckpt.engine.into_memory import Piece, Request, fill_arrays, requests_of
from mindformers_ckpt.engine.shares import digest_of
from mindformers_ckpt.job.cluster import proof
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.messages import Address, ProtocolError
from mindformers_ckpt.job.cluster.secret import Trust
from mindformers_ckpt.job.sharing import exchange, lines, reads
from mindformers_ckpt.job.sharing.lines import Pass
from mindformers_ckpt.job.sharing.reads import fill_together, filling

ROOT = Path(__file__).parents[2]
KEY = b"k" * 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(1).bytes(7 * MIB + 12345))
    return path


def run_job(nodes: Sequence[str], work: Callable[[Cluster], Any], trust: Trust = SECRET) -> list[Any]:
    """What `work` gives on each rank of a job, each a thread."""
    address = free_address()

    def run(rank: int) -> Any:
        with Cluster.connect(rank, len(nodes), address, 20, node=nodes[rank], trust=trust) as cluster:
            return work(cluster)

    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(run, range(len(nodes))))


def read_in_job(file: Path, *, start: Callable[[int], int] = lambda rank: 0, is_on: bool = True) -> Any:
    """Work of a rank: it reads the file from its own place on; the bytes that it read from the storage."""

    def work(cluster: Cluster) -> int:
        fetcher = Counted()
        pieces, arrays = pieces_of(file, start(cluster.rank))
        filling(cluster, file.parent, is_on=is_on)(fetcher, pieces, cluster.check)
        fetcher.close()
        assert_read(file, arrays, start(cluster.rank))
        return fetcher.bytes

    return work


def bytes_of(file: Path, start: int = 0) -> int:
    """What is read from the storage where nobody helps."""
    fetcher = Counted()
    pieces, _ = pieces_of(file, start)
    fill_arrays(fetcher, pieces, lambda: None)
    fetcher.close()
    return fetcher.bytes


# ----------------------------------------------------------------------------------------------- sharing


def test_the_ranks_of_several_nodes_read_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mindformers_ckpt")
    counts = run_job(["a", "b", "c"], read_in_job(file))
    assert sum(counts) == bytes_of(file)
    assert max(counts) - min(counts) <= 2 * MIB  # 8 requests for three
    said = [record.getMessage() for record in caplog.records if "GB from the storage" in record.getMessage()]
    assert len(said) == 3
    assert all("came from 2 other ranks" in line for line in said)


def test_two_groups_at_once_of_several_ranks_a_node(file: Path) -> None:
    counts = run_job(["a", "a", "b", "b"], read_in_job(file, start=lambda rank: rank % 2 * 4096))
    assert counts[0] + counts[2] == bytes_of(file)
    assert counts[1] + counts[3] == bytes_of(file, 4096)
    assert min(counts) > 2 * MIB


def test_only_what_is_the_same_as_a_whole_is_shared(file: Path) -> None:
    """Ranks whose reads are alike in part read for themselves."""
    counts = run_job(["a", "b", "c"], read_in_job(file, start=lambda rank: rank // 2))
    assert counts[0] + counts[1] == bytes_of(file)
    assert counts[2] == bytes_of(file, 1)


@pytest.mark.parametrize("why", ["off", "one node", "no secret"])
def test_what_keeps_ranks_from_sharing(file: Path, why: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mindformers_ckpt")
    nodes = ["a", "a"] if why == "one node" else ["a", "b"]
    trust = Trust() if why == "no secret" else SECRET
    counts = run_job(nodes, read_in_job(file, is_on=why != "off"), trust)
    assert counts == [bytes_of(file)] * 2
    told = "ranks 0-1 read the same bytes on several nodes, each for itself, because the job has no secret; set MINDF"
    assert (told in caplog.text) == (why == "no secret")
    assert "GB from the storage" not in caplog.text


def test_what_is_in_memory_on_all_nodes_is_not_shared(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mindformers_ckpt")
    monkeypatch.setattr(Counted, "has_to_wait", lambda self, extents: False)
    assert run_job(["a", "b"], read_in_job(file)) == [bytes_of(file)] * 2
    assert "ranks 0-1 have what they read in memory, each reads for itself" in caplog.text


def test_a_copy_with_another_time_is_another_file(file: Path, tmp_path: Path) -> None:
    """Nodes may have copies of their own, which are not proved to be equal."""
    copies = [tmp_path / str(rank) / "weights" for rank in range(2)]
    for number, copy in enumerate(copies):
        copy.parent.mkdir()
        copy.write_bytes(file.read_bytes())
        os.utime(copy, ns=(1, 1 + number))

    def work(cluster: Cluster) -> Any:
        return read_in_job(copies[cluster.rank])(cluster)

    assert run_job(["a", "b"], work) == [bytes_of(file)] * 2
    os.utime(copies[1], ns=(1, 1))
    assert sum(run_job(["a", "b"], work)) == bytes_of(file)


def test_a_rank_that_cannot_listen_reads_for_itself(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(host: str) -> socket.socket:
        raise OSError("no more files")

    monkeypatch.setattr(reads, "listen", refuse)
    assert run_job(["a", "b"], read_in_job(file)) == [bytes_of(file)] * 2


# ------------------------------------------------------------------------------------ ranks that fail


MEMBER = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, "tests/auto")
from shared_file import SECRET, Counted, assert_read, pieces_of
from mindformers_ckpt.job.cluster.messages import Address
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.sharing import exchange
from mindformers_ckpt.job.sharing.reads import filling
rank, port, path, what = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
exchange.SILENT_SECONDS = 2.0
with Cluster.connect(rank, 3, Address("127.0.0.1", port), 20, node=str(rank), trust=SECRET) as cluster:
    fetcher, (pieces, arrays) = Counted(slow=0.02), pieces_of(path)
    calls = []
    def check():
        calls.append(time.monotonic())
        if rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), getattr(signal, what))
    started = time.monotonic()
    filling(cluster, path.parent, is_on=True)(fetcher, pieces, check)
    assert_read(path, arrays)
    print(json.dumps([time.monotonic() - started, fetcher.bytes]), flush=True)
"""


@pytest.mark.parametrize("what", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_dies_or_stops_costs_the_others_seconds(file: Path, what: str) -> None:
    """It has read two of its three requests; the others read by themselves what does not come."""
    port = free_address().port
    members = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", MEMBER, str(rank), str(port), str(file), what],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        for rank in (0, 2):
            output, _ = members[rank].communicate(timeout=30)
            seconds, count = json.loads(output)
            assert seconds < 8
            assert bytes_of(file) / 3 - MIB < count < bytes_of(file) * 0.9
    finally:
        for member in members:
            member.kill()
            member.communicate()


def pair(file: Path, *, slow: float = 0.0) -> tuple[list[Request], list[Any], Counted, str]:
    pieces, arrays = pieces_of(file)
    requests = list(requests_of(pieces))
    return requests, arrays, Counted(slow), digest_of(requests, str)


class Other(threading.Thread):
    """Rank 1 beside rank 0: connects and proves who it is, then does something else than it should."""

    def __init__(self, address: Address, shared: str, act: Callable[[socket.socket], None]) -> None:
        super().__init__(daemon=True)
        self.address, self.shared, self.act = address, shared, act
        self.is_over = threading.Event()
        self.start()

    def run(self) -> None:
        with socket.socket() as sock:
            lines.call(sock, self.address, Pass(KEY, self.shared, 1), 0)
            if self.act is not leave:
                self.act(sock)
                self.is_over.wait(10)


def header(number: int, size: int, digest: int = 0) -> bytes:
    return exchange._HEADER.pack(number, size, digest)


SILENT = "did not give in time\n"  # no reason is known


def leave(sock: socket.socket) -> None:
    """Close the connection."""


def sends(data: Callable[[list[Request]], bytes]) -> Callable[[list[Request]], Callable[[socket.socket], None]]:
    def make(requests: list[Request]) -> Callable[[socket.socket], None]:
        def act(sock: socket.socket) -> None:
            with contextlib.suppress(OSError):  # the other side has had enough
                sock.sendall(data(requests))
                while sock.recv(1 << 16):
                    pass

        return act

    return make


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (sends(lambda requests: os.urandom(4096)), "is not its part"),
        (sends(lambda requests: header(0, requests[0].size)), "is not its part"),  # that of rank 0
        (sends(lambda requests: header(len(requests), 1)), "is not its part"),
        (sends(lambda requests: header(len(requests) - 1, 1)), "is not its part"),
        (sends(lambda requests: header(len(requests) - 1, (1 << 32) - 1)), "is not its part"),
        (sends(lambda requests: header(7, requests[7].size, 5) + bytes(requests[7].size)), "was changed on the way"),
        (sends(lambda requests: header(7, requests[7].size, 5) + bytes(9)), SILENT),
        (sends(lambda requests: b""), SILENT),
        (lambda requests: leave, ""),
    ],
    ids=["noise", "my part", "no number", "short", "long", "garbage", "half", "silence", "ends"],
)
def test_what_another_rank_may_send(
    file: Path, act: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exchange, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(exchange, "_LEAST_SECONDS", 0.7)
    requests, arrays, fetcher, shared = pair(file)
    with lines.listen("127.0.0.1") as listener:
        address = Address(*listener.getsockname())
        other = Other(address, shared, act(requests))
        started = time.monotonic()
        members = {0: address, 1: Address("127.0.0.1", 1)}
        fill_together(fetcher, requests, Pass(KEY, shared, 0), members, listener, lambda: None)
    assert 0.5 * (reason == SILENT) < time.monotonic() - started < 5
    assert_read(file, arrays)
    assert fetcher.bytes == bytes_of(file)
    assert reason in caplog.text
    assert "GB itself that other ranks were to read" in caplog.text
    other.is_over.set()
    other.join(5)
    assert not other.is_alive()
    fetcher.close()


def test_strangers_are_told_nothing_and_keep_nobody_out(file: Path) -> None:
    """They connect and say nothing, or noise, or prove another key; the rank that comes after them is let in."""
    requests, arrays, fetcher, shared = pair(file)
    theirs, their_arrays, their_fetcher, _ = pair(file)
    with lines.listen("127.0.0.1") as listener, lines.listen("127.0.0.1") as second, ThreadPoolExecutor(2) as pool:
        address = Address(*listener.getsockname())
        members = {0: address, 1: Address(*second.getsockname())}
        silent = [socket.create_connection(address) for _ in range(10)]
        noisy = socket.create_connection(address)
        noisy.sendall(os.urandom(proof.ANSWER))
        liar = socket.socket()
        wrong = pool.submit(lines.call, liar, address, Pass(b"x" * 32, shared, 1), 0)
        first = pool.submit(fill_together, fetcher, requests, Pass(KEY, shared, 0), members, listener, lambda: None)
        with pytest.raises((OSError, ProtocolError)):
            wrong.result()
        fill_together(their_fetcher, theirs, Pass(KEY, shared, 1), members, second, lambda: None)
        first.result()
        assert len(noisy.recv(4096)) == proof.CHALLENGE
        for sock in [*silent, noisy, liar]:
            sock.close()
    assert_read(file, arrays)
    assert_read(file, their_arrays)
    assert fetcher.bytes + their_fetcher.bytes == bytes_of(file)
    fetcher.close()
    their_fetcher.close()


def test_a_rank_that_tells_the_address_of_another_one_is_nobody(file: Path) -> None:
    """Rank 2 calls rank 1 at the address of rank 0, which knows the same secret."""
    _, _, _, shared = pair(file)
    with lines.listen("127.0.0.1") as listener, ThreadPoolExecutor(1) as pool, socket.socket() as sock:
        asked = pool.submit(lines.call, sock, Address(*listener.getsockname()), Pass(KEY, shared, 2), 1)
        taken, _ = listener.accept()
        with taken, pytest.raises(ProtocolError, match="a stranger"):
            lines.answer(taken, Pass(KEY, shared, 0), [1, 2])
        with pytest.raises((OSError, ProtocolError)):
            asked.result()


@pytest.mark.parametrize(
    "told", [None, ["a"], [1, "127.0.0.1", 1, True], ["a", "localhost", 1, True], ["a", "::1", -1, True]]
)
def test_what_a_rank_tells_is_checked(told: Any) -> None:
    assert reads._Told.of(told) == (None, None, False)
    assert reads._Told.of(["a", "::1", 1, True]) == ("a", ("::1", 1), True)


def test_a_rank_whose_storage_is_slow_says_that_it_is_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request takes it longer than a rank may be silent; nobody reads it in its place."""
    monkeypatch.setattr(exchange, "SILENT_SECONDS", 0.7)
    monkeypatch.setattr(exchange, "_TICKS_UNTIL_ALIVE", 2)
    array = np.zeros(2 * MIB, np.uint8)
    requests, theirs = (list(requests_of([Piece(file, 0, 2 * MIB, array)])) for array in (array, array.copy()))
    shared, fetcher, their_fetcher = digest_of(requests, str), Counted(), Counted(slow=1.5)
    with lines.listen("127.0.0.1") as listener, lines.listen("127.0.0.1") as second, ThreadPoolExecutor(1) as pool:
        members = {0: Address(*listener.getsockname()), 1: Address(*second.getsockname())}
        slow = pool.submit(fill_together, their_fetcher, theirs, Pass(KEY, shared, 1), members, second, lambda: None)
        fill_together(fetcher, requests, Pass(KEY, shared, 0), members, listener, lambda: None)
        slow.result()
    assert (fetcher.bytes, their_fetcher.bytes) == (MIB, MIB)
    assert array.tobytes() == file.read_bytes()[: 2 * MIB]
    fetcher.close()
    their_fetcher.close()


def test_a_much_slower_rank_is_helped_from_the_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives what it has; what it has not come to the other one reads itself."""
    monkeypatch.setattr(exchange, "_LEAST_SECONDS", 1.8)
    requests, arrays, fetcher, shared = pair(file)
    theirs, their_arrays, their_fetcher, _ = pair(file, slow=1.2)
    with lines.listen("127.0.0.1") as listener, lines.listen("127.0.0.1") as second, ThreadPoolExecutor(1) as pool:
        members = {0: Address(*listener.getsockname()), 1: Address(*second.getsockname())}
        slow = pool.submit(fill_together, their_fetcher, theirs, Pass(KEY, shared, 1), members, second, lambda: None)
        started = time.monotonic()
        fill_together(fetcher, requests, Pass(KEY, shared, 0), members, listener, lambda: None)
        assert time.monotonic() - started < 6
        slow.result()
    assert_read(file, arrays)
    assert_read(file, their_arrays)
    assert bytes_of(file) / 2 < fetcher.bytes < bytes_of(file)
    fetcher.close()
    their_fetcher.close()


def test_where_no_threads_can_be_had_a_rank_reads_for_itself(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "SILENT_SECONDS", 0.2)
    requests, arrays, fetcher, shared = pair(file)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with lines.listen("127.0.0.1") as listener:
        members = {rank: Address(*listener.getsockname()) for rank in range(3)}
        monkeypatch.setattr(threading.Thread, "start", refuse)
        fill_together(fetcher, requests, Pass(KEY, shared, 1), members, listener, lambda: None)
    assert_read(file, arrays)
    assert fetcher.bytes == bytes_of(file)
    fetcher.close()


def test_a_failure_of_the_job_ends_the_waiting(file: Path) -> None:
    """Nobody calls, and `check` raises: the threads end at once."""
    requests, _, fetcher, shared = pair(file)
    calls = iter(range(10))

    def check() -> None:
        if next(calls) == 6:
            raise KeyboardInterrupt

    before = set(threading.enumerate())
    with lines.listen("127.0.0.1") as listener:
        members = {0: Address(*listener.getsockname()), 1: Address("127.0.0.1", 1)}
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            fill_together(fetcher, requests, Pass(KEY, shared, 0), members, listener, check)
    assert time.monotonic() - started < 2
    assert set(threading.enumerate()) <= before
    fetcher.close()
