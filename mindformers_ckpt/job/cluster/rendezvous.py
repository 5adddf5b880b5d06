"""How the ranks of one job find each other: one TCP address, one coordinator, one connection a rank.

Every rank tries to listen on the meeting address. On the host that owns the address the first one succeeds
and runs the coordinator (`coordinator.py`). Every rank, also that one, is a client.

Nothing is left behind: a connection ends with its process, so the coordinator learns of a killed rank at
once, and the ranks of a killed coordinator. TCP keepalive does the same for a node that is powered off.

Both sides prove that they know the key of the job (`proof.py`, `secret.py`) before anything else is said.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import math
import random
import select
import socket
import time
from collections import deque
from typing import Any, NamedTuple

from mindformers_ckpt.errors import ClusterError
from mindformers_ckpt.job.cluster import proof
from mindformers_ckpt.job.cluster.coordinator import BACKLOG, Coordinator
from mindformers_ckpt.job.cluster.messages import (
    ADVICE,
    CHUNK,
    JOIN,
    MAX_MESSAGE,
    Address,
    Decoder,
    Message,
    ProtocolError,
    encode,
    hang_up,
    tune,
)
from mindformers_ckpt.job.cluster.secret import NO_NUMBER, Door, Job, Key, Trust
from mindformers_ckpt.log import log

CONNECT_TIMEOUT = 5.0  # seconds of one attempt, where packets are swallowed
CHALLENGE_TIMEOUT = 10.0  # seconds until the coordinator has to speak
SECRET = "MINDFORMERS_CKPT_SECRET"
FIRST_RETRY, LAST_RETRY = 0.02, 1.0  # seconds between attempts


class RankError(ClusterError):
    """A rank failed, died, or did not come in time.

    `rank` is the one at fault, or None where it is not one rank; `step` is the step under way, or None.
    """

    def __init__(self, message: str, rank: int | None = None, step: str | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.step = step


def _resolve(address: Address) -> tuple[socket.AddressFamily, Any]:
    """The socket family and address to use; raises OSError (gaierror) when the name is unknown."""
    family, _, _, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    return family, where


def listen(address: Address) -> socket.socket:
    """Listen on the address; raises OSError where it is not this host's, or another socket has it.

    SO_REUSEADDR lets a new job use the port while connections of the last one are in TIME_WAIT. On Linux it
    also lets two sockets bind one port as long as neither listens: only listen() decides.
    """
    family, where = _resolve(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


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
            tune(self._sock, timeout)
        except OSError:
            self._sock.close()
            raise
        self._poller = select.poll()
        self._poller.register(self._sock, select.POLLIN)

    @property
    def host(self) -> str:
        """The address of this host, as it is seen from the coordinator's."""
        return str(self._sock.getsockname()[0])

    def send(self, message: Message, deadline: float) -> None:
        """Send a message. Raises OSError when the connection is lost, or at the deadline."""
        self.write(encode(message), deadline)

    def write(self, data: bytes, deadline: float) -> None:
        """Send bytes. Raises as `send` does."""
        self._sock.settimeout(max(deadline - time.monotonic(), 0.001))
        self._sock.sendall(data)

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

    def read_exactly(self, count: int, deadline: float) -> bytes:
        """The next bytes, before any message. Raises as `receive` does."""
        data = bytearray()
        while len(data) < count:
            data += self._read(count - len(data), deadline - time.monotonic())
        return bytes(data)

    def _fill(self, timeout: float) -> None:
        self._inbox += self._decoder.feed(self._read(CHUNK, timeout))

    def _read(self, limit: int, timeout: float) -> bytes:
        if not self._poller.poll(max(0, math.ceil(timeout * 1000))):
            raise TimeoutError("no answer")
        try:
            data = self._sock.recv(limit)
        except OSError as error:
            raise ConnectionError(f"connection lost: {error}") from error
        if not data:
            raise ConnectionError("connection closed")
        return data

    def close(self) -> None:
        hang_up(self._sock)
        self._sock.close()


class Meeting(NamedTuple):
    """What a rank has after it joined.

    Its connection, who coordinates, the key that both have proved to know, and the coordinator if it is here.
    """

    link: Link
    host_rank: int
    key: Key
    coordinator: Coordinator | None


def meet(job: Job, rank: int, node: str, trust: Trust, timeout: float) -> Meeting:
    """Join the ranks at the meeting address, as their coordinator if nobody else is.

    Raises RankError when something else listens there, or nothing answers within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    delay = FIRST_RETRY
    coordinator: Coordinator | None = None
    cannot_listen, is_told = "", False
    try:
        while True:
            if coordinator is None:
                try:
                    coordinator = _coordinate(job, rank, node, trust, timeout)
                except OSError as error:
                    cannot_listen = f"; rank {rank} cannot listen there: {error}"
            try:
                link, host_rank, key = _introduce(job, rank, node, trust, deadline)
                break
            except OSError as error:
                if time.monotonic() + delay >= deadline:
                    text = f"rank {rank} found no coordinator at {job.address} within {timeout:g} s: {error}"
                    raise RankError(f"{text}{cannot_listen}; {ADVICE}", step=JOIN) from error
                if isinstance(error, PermissionError) and not is_told:
                    is_told = True
                    log.warning("rank %d waits up to %g s: %s", rank, timeout, error)
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
    return Meeting(link, host_rank, key, coordinator)


def _coordinate(job: Job, rank: int, node: str, trust: Trust, timeout: float) -> Coordinator:
    """Listen on the address and coordinate. Raises OSError where another does, or that is not possible here."""
    listener = listen(job.address)
    door = Door(trust, job, node)
    if trust.folder is not None and not door.has_secret:
        log.warning(
            "no secret can be left in %s, so whoever reaches %s could take part in this job; set %s, alike on all "
            "ranks",
            *(trust.folder, job.address, SECRET),
        )
    coordinator = Coordinator(listener, rank, job.size, door, timeout)
    coordinator.start()
    return coordinator


def _introduce(job: Job, rank: int, node: str, trust: Trust, deadline: float) -> tuple[Link, int, Key]:
    """Connect once. Raises OSError where it is worth trying again, RankError where it is not."""
    link = Link(job.address, max(deadline - time.monotonic(), 0.001))
    try:
        key = _prove(link, job, trust, deadline)
        link.send({"kind": "hello", "rank": rank, "node": node}, deadline)
        reply = link.receive(deadline)
        if reply.get("kind") == "refused":
            raise ConnectionRefusedError(errno.ECONNREFUSED, str(reply.get("text")))
        host_rank = reply.get("rank")
        if reply.get("kind") != "welcome" or type(host_rank) is not int:
            raise ProtocolError("an unexpected answer")
    except ProtocolError as error:
        link.close()
        raise RankError(f"something else listens on {job.address}: {error}; {ADVICE}", step=JOIN) from error
    except TimeoutError as error:
        link.close()
        raise RankError(f"something listens on {job.address} but does not answer; {ADVICE}", step=JOIN) from error
    except BaseException:
        link.close()
        raise
    return link, host_rank, key


def _prove(link: Link, job: Job, trust: Trust, deadline: float) -> Key:
    """Show that this is a rank of the job, and see that the other side is its coordinator.

    Raises PermissionError where the secret that it names is not to be found: an earlier job may not have ended yet.
    """
    challenge = _wait_for_challenge(link, deadline)
    number = proof.number_in(challenge)
    key = trust.key(job, number)
    if key is None:
        which = (
            "no secret" if number == NO_NUMBER else f"its secret in no file of {trust.folder} that this rank can read"
        )
        raise PermissionError(
            errno.EACCES,
            f"who listens on {job.address} has left {which}: another job or user, or a rank with another output_dir",
        )
    answer = proof.new_answer(key.content, challenge)
    link.write(answer, deadline)
    reply = link.read_exactly(proof.DIGEST, deadline)
    if not hmac.compare_digest(reply, proof.confirmation(key.content, challenge, answer)):
        raise ProtocolError(f"another job (this one has {job.size} ranks), or one with another secret")
    return key


def _wait_for_challenge(link: Link, deadline: float) -> bytes:
    """Raises ConnectionError when none comes for a while: a crowded system may have lost the connection."""
    patience = time.monotonic() + CHALLENGE_TIMEOUT
    try:
        return link.read_exactly(proof.CHALLENGE, min(patience, deadline))
    except TimeoutError as error:
        if patience < deadline:
            raise ConnectionError(f"no answer within {CHALLENGE_TIMEOUT:g} s") from error
        raise
