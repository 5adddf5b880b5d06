"""The coordinator of a job's ranks: a daemon thread with one selector loop, in the process of one of the ranks.

It learns of a killed rank at once, for a connection ends with its process. It needs the interpreter lock of its
process: while native code holds it, answers are late.
"""

from __future__ import annotations

import contextlib
import math
import resource
import selectors
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from mindformers_ckpt.job.cluster.messages import (
    ADVICE,
    CHUNK,
    GRACE,
    JOIN,
    MAX_MESSAGE,
    PROTOCOL,
    Address,
    Decoder,
    Message,
    ProtocolError,
    encode,
    hang_up,
    name_ranks,
    tune,
)

MAX_HELLO = 4096  # what an unknown peer may make the coordinator keep
HELLO_TIMEOUT = 10.0  # seconds in which an unknown peer has to introduce itself
LINGER = 2.0  # seconds in which a coordinator that leaves still tells late ranks of a failure


def _allow_open_files(count: int) -> None:
    """Raise this process's soft limit of open files, as far as the hard limit lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


@dataclass(eq=False)
class _Peer:
    sock: socket.socket
    hello_until: float
    decoder: Decoder = field(default_factory=lambda: Decoder(MAX_HELLO))
    outbox: deque[memoryview] = field(default_factory=deque)
    rank: int | None = None
    node: str = ""


class Coordinator(threading.Thread):
    """Collects the values of a step from all ranks and hands them out, or the first failure instead.

    It ends when its own rank and all others have left, `timeout` seconds after its own rank at the latest,
    `LINGER` after a failure.
    """

    def __init__(self, listener: socket.socket, rank: int, size: int, key: str, timeout: float) -> None:
        super().__init__(name="mindformers_ckpt coordinator", daemon=True)
        self._listener = listener
        self._rank, self._size, self._key, self._timeout = rank, size, key, timeout
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._unknown: set[_Peer] = set()
        self._peers: dict[int, _Peer] = {}
        self._gone: set[int] = set()
        self._step: str | None = None
        self._step_until = math.inf
        self._values: dict[int, Any] = {}
        self._failure: bytes | None = None
        self._linger_until = math.inf
        self._stopped = False
        _allow_open_files(size + 256)

    def stop(self) -> None:
        """End at once (from another thread): this rank has not joined here."""
        self._stopped = True
        with contextlib.suppress(OSError):  # it has ended already
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the selector
        self.join(GRACE)

    def run(self) -> None:
        try:
            while not self._is_finished():
                for key, events in self._selector.select(self._patience()):
                    if key.data is None:
                        self._accept()
                        continue
                    if events & selectors.EVENT_READ:
                        self._read(key.data)
                    if events & selectors.EVENT_WRITE:
                        self._flush(key.data)
                self._expire(time.monotonic())
        finally:
            self._listener.close()
            for peer in [*self._unknown, *self._peers.values()]:
                self._drop(peer)
            self._selector.close()

    def _is_finished(self) -> bool:
        if self._stopped or len(self._gone) == self._size:
            return True
        return self._rank in self._gone and time.monotonic() >= self._linger_until

    def _patience(self) -> float | None:
        """Seconds until something is due."""
        due = [self._step_until, *(peer.hello_until for peer in self._unknown)]
        if self._rank in self._gone:
            due.append(self._linger_until)
        return None if min(due) == math.inf else max(min(due) - time.monotonic(), 0.0)

    def _expire(self, now: float) -> None:
        for peer in [peer for peer in self._unknown if peer.hello_until <= now]:
            self._drop(peer)
        if self._step_until <= now:
            missing = set(range(self._size)) - self._values.keys()
            verb = "has" if len(missing) == 1 else "have"
            text = f"step {self._step!r}: {name_ranks(missing)} {verb} not arrived within {self._timeout:g} s"
            nodes = dict.fromkeys(self._peers[rank].node for rank in sorted(missing) if rank in self._peers)
            if nodes:
                text += f" (on {', '.join(nodes)})"
            host, port = self._listener.getsockname()[:2]
            if self._step == JOIN and (host.startswith("127.") or host == "::1"):
                text += f" ({Address(host, port)} is reached from one node only; if there are more, {ADVICE})"
            self._fail(missing.pop() if len(missing) == 1 else None, self._step, text)
        if self._rank in self._gone and self._linger_until <= now:
            late = set(range(self._size)) - self._gone
            waited = f"has waited {self._timeout:g} s for {name_ranks(late)} to leave, and has left"
            self._fail(self._rank, None, f"rank {self._rank}, which coordinates, {waited}")

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # the peer has given up already
            return
        except OSError as error:
            self._selector.unregister(self._listener)  # or it would wake the selector for ever
            if not self._stopped and len(self._peers) + len(self._gone) < self._size:
                text = f"rank {self._rank}, which coordinates, can take no more connections: {error}"
                self._fail(self._rank, self._step, f"{text}; raise the limit of open files (ulimit -n)")
            return
        sock.setblocking(False)
        tune(sock, self._timeout)
        peer = _Peer(sock, time.monotonic() + HELLO_TIMEOUT)
        self._unknown.add(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.sock.recv(CHUNK)
            messages = peer.decoder.feed(data)
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as error:
            self._lose(peer, str(error))
            return
        if not data:
            self._lose(peer, "its connection closed before it left")
        for message in messages:
            if peer.sock.fileno() >= 0:  # not refused, not left
                self._handle(peer, message)

    def _handle(self, peer: _Peer, message: Message) -> None:
        kind = message.get("kind")
        if peer.rank is None:
            self._welcome(peer, message)
        elif kind == "leave":
            self._drop(peer)
            self._depart(peer.rank)
        elif self._failure is not None:
            return  # no step can begin any more; the peer finds the failure in its queue
        elif kind == "gather":
            self._arrive(peer.rank, message["step"], message["value"])
        elif kind == "failed":
            self._fail(message["rank"], message["step"], message["text"])

    def _welcome(self, peer: _Peer, hello: Message) -> None:
        """Take a peer in as a rank of this job, or refuse it."""
        rank, size = hello.get("rank"), hello.get("size")
        retry = False
        if hello.get("protocol") != PROTOCOL:
            problem = f"a job that speaks {PROTOCOL!r}"
        elif hello.get("key") != self._key or not isinstance(rank, int) or not 0 <= rank < self._size:
            problem = f"another job, of {self._size} ranks (this one has {size})"
        elif rank in self._peers or rank in self._gone:
            # An earlier job that has not ended yet looks like this: the new one tries again.
            retry, problem = True, f"a job whose rank {rank} has joined already"
        else:
            problem = ""
        self._unknown.discard(peer)
        if problem or not isinstance(rank, int):
            self._post(peer, encode({"kind": "refused", "text": problem, "retry": retry}))
            self._drop(peer)
            return
        peer.rank, peer.node = rank, str(hello.get("node"))
        peer.decoder.limit = MAX_MESSAGE
        self._peers[rank] = peer
        self._post(peer, encode({"kind": "welcome", "rank": self._rank}))
        if self._failure is None:
            self._arrive(rank, JOIN, peer.node)
        else:
            self._post(peer, self._failure)

    def _arrive(self, rank: int, step: str, value: Any) -> None:
        if self._step is None:
            self._step, self._step_until = step, time.monotonic() + self._timeout
        elif step != self._step:
            waiting = f"{name_ranks(self._values)} waited at step {self._step!r}"
            self._fail(None, step, f"rank {rank} arrived at step {step!r} while {waiting}")
            return
        self._values[rank] = value
        self._conclude()

    def _conclude(self) -> None:
        """End the step if all ranks have arrived, or one never will."""
        if self._step is None:
            return
        if self._gone:
            rank = min(self._gone)
            self._fail(rank, self._step, f"{name_ranks(self._gone)} left before step {self._step!r}")
        elif len(self._values) == self._size:
            values = [self._values[rank] for rank in range(self._size)]
            self._close_step()
            self._broadcast(encode({"kind": "gathered", "values": values}))

    def _close_step(self) -> None:
        self._step, self._step_until = None, math.inf
        self._values = {}

    def _fail(self, rank: int | None, step: str | None, text: str) -> None:
        """Tell all ranks of a failure; the first one counts."""
        if self._failure is None:
            self._close_step()
            self._linger_until = min(self._linger_until, time.monotonic() + LINGER)
            self._failure = encode({"kind": "failed", "rank": rank, "step": step, "text": text})
            self._broadcast(self._failure)

    def _broadcast(self, data: bytes) -> None:
        for peer in list(self._peers.values()):
            self._post(peer, data)

    def _post(self, peer: _Peer, data: bytes) -> None:
        peer.outbox.append(memoryview(data))
        self._flush(peer)

    def _flush(self, peer: _Peer) -> None:
        if peer.sock.fileno() < 0:  # dropped while its event was in the queue
            return
        try:
            while peer.outbox:
                sent = peer.sock.send(peer.outbox[0])
                rest = peer.outbox.popleft()[sent:]
                if rest:
                    peer.outbox.appendleft(rest)
        except BlockingIOError:
            pass
        except OSError:
            peer.outbox.clear()  # the loss shows on the reading side, after what the peer has still said
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.outbox else 0)
        self._selector.modify(peer.sock, events, peer)

    def _lose(self, peer: _Peer, reason: str) -> None:
        self._drop(peer)
        if peer.rank is not None:
            during = "" if self._step is None else f" (step {self._step!r})"
            self._fail(peer.rank, self._step, f"rank {peer.rank} on {peer.node} died{during}: {reason}")
            self._depart(peer.rank)

    def _depart(self, rank: int) -> None:
        self._gone.add(rank)
        if rank == self._rank:
            self._linger_until = min(self._linger_until, time.monotonic() + self._timeout)
        self._conclude()

    def _drop(self, peer: _Peer) -> None:
        self._unknown.discard(peer)
        if peer.rank is not None:
            self._peers.pop(peer.rank, None)
        if peer.sock.fileno() >= 0:
            self._selector.unregister(peer.sock)
            hang_up(peer.sock)
