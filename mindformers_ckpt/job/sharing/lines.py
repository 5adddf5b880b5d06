"""Connections between ranks that share what they read: who may speak, and bytes with a limit of time.

One side listens, the other calls, and each proves with `cluster/proof.py` that it is the rank that the other one means:
the key is made of the job's secret, of what is shared, and of both ranks. So a rank that tells the address of another
one gains nothing, and of a stranger a fixed number of bytes is read, for a limited time.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
import struct
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from mindformers_ckpt.job.cluster import proof
from mindformers_ckpt.job.cluster.messages import Address, ProtocolError, tune
from mindformers_ckpt.planning.checked import number_of, text_of

PROOF_SECONDS = 10.0  # from the call to the proof
SEND_SECONDS = 10.0  # in which a receiver must take something
_BACKLOG = 128


class Pass(NamedTuple):
    """What a rank proves with: the key of the job's ranks, what is shared, and its own number."""

    key: bytes
    shared: str
    rank: int

    @property
    def number(self) -> bytes:
        """What tells the shared thing to who calls; no secret."""
        return bytes.fromhex(self.shared)[: proof.NUMBER]

    def between(self, listener: int, caller: int) -> bytes:
        return hmac.digest(self.key, json.dumps([self.shared, listener, caller]).encode(), "sha256")


def listen(host: str) -> socket.socket:
    """Listen on a free port of an address of this host. Raises OSError."""
    listener = new_socket(host)
    try:
        listener.bind((host, 0))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def address_of(host: Any, port: Any) -> Address:
    """An address that another rank told, by number. Raises TypeError or ValueError for anything else."""
    ipaddress.ip_address(text_of(host).partition("%")[0])
    if not 0 < number_of(port) < 1 << 16:
        raise ValueError(f"{port} is no port")
    return Address(host, port)


def new_socket(host: str) -> socket.socket:
    """A socket for an address, given by number."""
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)


def call(sock: socket.socket, address: Address, own: Pass, rank: int) -> None:
    """Connect to a rank, and prove who we are. Raises OSError, or ProtocolError where another one answers."""
    until = time.monotonic() + PROOF_SECONDS
    sock.settimeout(PROOF_SECONDS)
    sock.connect(address)
    challenge = _read(sock, proof.CHALLENGE, until)
    if proof.number_in(challenge) != own.number:
        raise ProtocolError("it shares something else")
    key = own.between(rank, own.rank)
    answer = proof.new_answer(key, challenge)
    sock.sendall(answer)
    if not hmac.compare_digest(_read(sock, proof.DIGEST, until), proof.confirmation(key, challenge, answer)):
        raise ProtocolError("it does not know the secret")
    _prepare(sock)


def answer(sock: socket.socket, own: Pass, callers: Iterable[int]) -> int:
    """Find out which of some ranks has called. Raises OSError, or ProtocolError where it is none of them."""
    until = time.monotonic() + PROOF_SECONDS
    sock.settimeout(PROOF_SECONDS)
    challenge = proof.new_challenge(own.number)
    sock.sendall(challenge)
    said = _read(sock, proof.ANSWER, until)
    for rank in callers:
        key = own.between(own.rank, rank)
        if proof.is_answer(key, challenge, said):
            sock.sendall(proof.confirmation(key, challenge, said))
            _prepare(sock)
            return rank
    raise ProtocolError("a stranger")


def _prepare(sock: socket.socket) -> None:
    """Make a proved connection one that waits for what comes, and not for ever for who does not take what is sent."""
    sock.settimeout(None)
    tune(sock, 2 * SEND_SECONDS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SEND_SECONDS), 0))


def _read(sock: socket.socket, count: int, until: float) -> bytes:
    """The next bytes. Raises OSError at the end of the connection or of the time."""
    memory = bytearray(count)
    view = memoryview(memory)
    while view:
        sock.settimeout(max(until - time.monotonic(), 0.001))
        view = view[receive(sock, view) :]
    return bytes(memory)


def receive(sock: socket.socket, memory: memoryview) -> int:
    """Receive what has come, and say how much. Raises ConnectionError at the end."""
    count = sock.recv_into(memory)
    if not count:
        raise ConnectionError("it has closed the connection")
    return count
