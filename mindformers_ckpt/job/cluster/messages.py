"""What the ranks of a job and their coordinator say to each other over TCP, and how long they have patience.

A connection begins with the proofs of `proof.py`. Then 4 bytes length, big endian, and a JSON object with a "kind":

    rank -> coordinator   hello {rank, node} | gather {step, value} | hand {step, values}
                          | collect {step, value} | failed {step, text} | leave
    coordinator -> rank   welcome {rank} | refused {text} | gathered {values} | handed {value}
                          | failed {rank, step, text}

A step at which one rank hands out values, one for each rank, ends in `handed` and not in `gathered`: thousands of ranks
are told a share each, which all of them together could not be told. Where one rank collects, it alone gets `gathered`.

A hello counts as the arrival at the step "join", whose values are [name of the node, knows the secret].
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Collection
from typing import Any, NamedTuple

from mindformers_ckpt.words import spans

JOIN = "join"
MAX_VALUES = 64 << 20  # bytes of all values of one step together
MAX_MESSAGE = MAX_VALUES + (1 << 20)  # the rest: names, commas, an error's text
HEAD = struct.Struct(">I")  # the length of a message
GRACE = 5.0  # seconds a rank waits beyond the time-out, so that the coordinator's answer comes first
NOTICE = 60.0  # seconds after which a silent host counts as dead, or half the time-out if that is less
CHUNK = 1 << 16
ADVICE = "set MINDFORMERS_CKPT_MASTER=host:port, on all ranks alike, to a free port of a node of this job"

Message = dict[str, Any]


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
    return f"rank{'s' if len(ranks) > 1 else ''} {spans(ranks).replace(',', ', ')}"


def encode(message: Message) -> bytes:
    """The bytes of a message on the wire. Raises TypeError for a value that JSON does not have."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return HEAD.pack(len(body)) + body


def length_of(head: bytes | bytearray, limit: int) -> int:
    """The length of the body that follows. Raises ProtocolError when it is over the limit."""
    (length,) = HEAD.unpack_from(head)
    if length > limit:
        raise ProtocolError(f"a message of {length} bytes is announced, {limit} are allowed")
    return int(length)


def parse(body: bytes | bytearray) -> Message:
    """The message of a body. Raises ProtocolError."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:  # the latter for thousands of brackets
        raise ProtocolError(f"no JSON: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError("a message is not a JSON object")
    return message


class Decoder:
    """Cuts a stream of bytes into messages of at most `limit` bytes each."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes. Raises ProtocolError when this cannot be our protocol."""
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= HEAD.size:
            end = HEAD.size + length_of(self._buffer, self.limit)
            if len(self._buffer) < end:
                break
            messages.append(parse(self._buffer[HEAD.size : end]))
            del self._buffer[:end]
        return messages


def tune(sock: socket.socket, timeout: float) -> None:
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


def hang_up(sock: socket.socket) -> None:
    """End a connection for all that have it: other threads, forked children (of a data loader, say), the other side."""
    with contextlib.suppress(OSError):  # the other side was first
        sock.shutdown(socket.SHUT_RDWR)
