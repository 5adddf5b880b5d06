"""How the ranks of one job find each other: one TCP address, one coordinator, one connection a rank.

Every rank tries to listen on the meeting address. On the host that owns the address the first one succeeds
and runs the coordinator, a daemon thread with a single selector loop. Every rank, also that one, is a client.

Nothing is left behind: a connection ends with its process, so the coordinator learns of a killed rank at
once, and the ranks of a killed coordinator. TCP keepalive does the same for a node that is powered off.

Wire format: 4 bytes length, big endian, then a JSON object with a "kind":

    rank -> coordinator   hello {protocol, key, size, rank, node} | gather {step, value}
                          failed {rank, step, text} | leave
    coordinator -> rank   welcome {rank} | refused {text, retry} | gathered {values}
                          failed {rank, step, text}

A hello counts as the arrival at the step "join", whose values are the names of the nodes.

Limits: the job key keeps jobs apart, it is no secret (as with MindSpore's own scheduler, trust the network).
The coordinator needs the interpreter lock of its process: while native code holds it, answers are late.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import random
import resource
import select
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mindformers_ckpt.errors import ClusterError

PROTOCOL = "mindformers_ckpt cluster 1"
JOIN = "join"
MAX_VALUES = 64 << 20  # bytes of all values of one step together
MAX_MESSAGE = MAX_VALUES + (1 << 20)  # the rest: names, commas, an error's text
MAX_HELLO = 4096  # what an unknown peer may make the coordinator keep
HELLO_TIMEOUT = 10.0  # seconds in which an unknown peer has to introduce itself
LINGER = 2.0  # seconds in which a coordinator that leaves still tells late ranks of a failure
GRACE = 5.0  # seconds a rank waits beyond the time-out, so that the coordinator's answer comes first
CONNECT_TIMEOUT = 5.0  # seconds of one attempt, where packets are swallowed
FIRST_RETRY, LAST_RETRY = 0.02, 1.0  # seconds between attempts
NOTICE = 60.0  # seconds after which a silent host counts as dead, or half the time-out if that is less
CHUNK = 1 << 16
ADVICE = "set MINDFORMERS_CKPT_MASTER=host:port, on all ranks alike, to a free port of a node of this job"

Message = dict[str, Any]


class RankError(ClusterError):
    """A rank failed, died, or did not come in time.

    `rank` is the one at fault, or None where it is not one rank; `step` is the step under way, or None.
    """

    def __init__(self, message: str, rank: int | None = None, step: str | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.step = step


class ProtocolError(Exception):
    """The bytes received are not those of this protocol."""


class Address(NamedTuple):
    """A host, by name or number, and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def name_ranks(ranks: Collection[int]) -> str:
    """Write ranks for a reader: "rank 3", "ranks 3, 8-15"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def encode(message: Message) -> bytes:
    """The bytes of a message on the wire. Raises TypeError for a value that JSON does not have."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return struct.pack(">I", len(body)) + body


class Decoder:
    """Cuts a stream of bytes into messages of at most `limit` bytes each."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes. Raises ProtocolError when this cannot be our protocol."""
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= 4:
            (length,) = struct.unpack_from(">I", self._buffer)
            if length > self.limit:
                raise ProtocolError(f"a message of {length} bytes is announced, {self.limit} are allowed")
            if len(self._buffer) < 4 + length:
                break
            try:
                message = json.loads(self._buffer[4 : 4 + length])
            except ValueError as error:
                raise ProtocolError(f"no JSON: {error}") from error
            if not isinstance(message, dict):
                raise ProtocolError("a message is no JSON object")
            messages.append(message)
            del self._buffer[: 4 + length]
        return messages


def _tune(sock: socket.socket, timeout: float) -> None:
    """Send small messages at once, and give a silent host up before the time-out does."""
    notice = min(timeout / 2, NOTICE)
    probe = max(1, int(notice / 4))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    # Keepalive is silent while sent bytes wait for their acknowledgement; this limits that state.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(notice * 1000))


def _resolve(address: Address) -> tuple[socket.AddressFamily, Any]:
    """The socket family and address to use; raises OSError (gaierror) when the name is unknown."""
    family, _, _, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    return family, where


def _hang_up(sock: socket.socket) -> None:
    """Close, also where a forked child (of a data loader, say) still holds a copy of the descriptor."""
    with contextlib.suppress(OSError):  # the other side was first
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def listen(address: Address, size: int) -> socket.socket:
    """Listen on the address; raises OSError where it is not this host's, or another socket has it.

    SO_REUSEADDR lets a new job use the port while connections of the last one are in TIME_WAIT. On Linux it
    also lets two sockets bind one port as long as neither listens: only listen() decides.
    """
    family, where = _resolve(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(size)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _allow_open_files(count: int) -> None:
    """Raise this process's soft limit of open files, as far as the hard limit lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


class Link:
    """A rank's connection to the coordinator."""

    def __init__(self, address: Address, timeout: float) -> None:
        family, where = _resolve(address)
        self._decoder = Decoder(MAX_MESSAGE)
        self._inbox: deque[Message] = deque()
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(min(timeout, CONNECT_TIMEOUT))
            self._sock.connect(where)
            if self._sock.getsockname() == self._sock.getpeername():
                # Where nobody listens on a port of the ephemeral range, TCP can connect a socket to itself.
                raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens")
            _tune(self._sock, timeout)
        except OSError:
            self._sock.close()
            raise
        self._poller = select.poll()
        self._poller.register(self._sock, select.POLLIN)

    def send(self, message: Message, deadline: float) -> None:
        """Send a message. Raises OSError when the connection is lost, or at the deadline."""
        self._sock.settimeout(max(deadline - time.monotonic(), 0.001))
        self._sock.sendall(encode(message))

    def receive(self, deadline: float) -> Message:
        """The next message. Raises TimeoutError at the deadline, ConnectionError when the link is lost."""
        while not self._inbox:
            self._fill(deadline - time.monotonic())
        return self._inbox.popleft()

    def poll(self) -> Message | None:
        """The next message if there is one already. Raises ConnectionError when the link is lost."""
        if not self._inbox:
            with contextlib.suppress(TimeoutError):
                self._fill(0)
        return self._inbox.popleft() if self._inbox else None

    def _fill(self, timeout: float) -> None:
        if not self._poller.poll(max(0, math.ceil(timeout * 1000))):
            raise TimeoutError("no answer")
        try:
            data = self._sock.recv(CHUNK)
        except OSError as error:
            raise ConnectionError(f"connection lost: {error}") from error
        if not data:
            raise ConnectionError("connection closed")
        self._inbox += self._decoder.feed(data)

    def close(self) -> None:
        _hang_up(self._sock)


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
        _tune(sock, self._timeout)
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
            _hang_up(peer.sock)


class Meeting(NamedTuple):
    """What a rank has after it joined: its connection, who coordinates, and the coordinator if it is here."""

    link: Link
    host_rank: int
    coordinator: Coordinator | None


def meet(address: Address, rank: int, size: int, job: str, node: str, timeout: float) -> Meeting:
    """Join the ranks at the meeting address, as their coordinator if nobody else is.

    Raises RankError when something else listens there, or nothing answers within `timeout` seconds.
    """
    key = hashlib.sha256(json.dumps([*address, size, job]).encode()).hexdigest()
    hello = {"kind": "hello", "protocol": PROTOCOL, "key": key, "size": size, "rank": rank, "node": node}
    deadline = time.monotonic() + timeout
    delay = FIRST_RETRY
    coordinator: Coordinator | None = None
    cannot_listen = ""
    try:
        while True:
            if coordinator is None:
                try:
                    coordinator = Coordinator(listen(address, size), rank, size, key, timeout)
                    coordinator.start()
                except OSError as error:
                    cannot_listen = f"; rank {rank} cannot listen there: {error}"
            try:
                link, host_rank = _introduce(address, hello, deadline)
                break
            except OSError as error:
                if time.monotonic() + delay >= deadline:
                    text = f"rank {rank} found no coordinator at {address} within {timeout:g} s: {error}"
                    raise RankError(f"{text}{cannot_listen}; {ADVICE}", step=JOIN) from error
            time.sleep(delay * random.uniform(0.5, 1.0))  # thousands of ranks should not knock together
            delay = min(2 * delay, LAST_RETRY)
    except BaseException:
        if coordinator is not None:
            coordinator.stop()
        raise
    if coordinator is not None and host_rank != rank:
        # net.ipv4.ip_nonlocal_bind lets every host listen on the address; only one of them is reached.
        coordinator.stop()
        coordinator = None
    return Meeting(link, host_rank, coordinator)


def _introduce(address: Address, hello: Message, deadline: float) -> tuple[Link, int]:
    """Connect once. Raises OSError where it is worth trying again, RankError where it is not."""
    link = Link(address, max(deadline - time.monotonic(), 0.001))
    try:
        link.send(hello, deadline)
        reply = link.receive(deadline)
        if reply.get("kind") == "welcome":
            return link, reply["rank"]
        if reply.get("kind") != "refused":
            raise ProtocolError("an unexpected answer")
        if reply["retry"]:
            raise ConnectionRefusedError(errno.ECONNREFUSED, reply["text"])
        raise ProtocolError(reply["text"])
    except ProtocolError as error:
        link.close()
        raise RankError(f"something else listens on {address}: {error}; {ADVICE}", step=JOIN) from error
    except TimeoutError as error:
        link.close()
        raise RankError(f"something listens on {address} but does not answer; {ADVICE}", step=JOIN) from error
    except BaseException:
        link.close()
        raise
