"""The coordinator of a job's ranks: a daemon thread with one asyncio loop, in the process of one of the ranks.

It learns of a killed rank at once, for a connection ends with its process. It needs the interpreter lock of its
process: while native code holds it, answers are late.

A stranger is whoever has not proved yet that he knows a key (`proof.py`). Strangers have a limited time, their number
is limited, a fixed number of bytes is read of each, and what they do changes nothing for the ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from mindformers_ckpt.job.cluster import proof
from mindformers_ckpt.job.cluster.messages import (
    ADVICE,
    CHUNK,
    GRACE,
    HEAD,
    JOIN,
    MAX_MESSAGE,
    Address,
    Message,
    ProtocolError,
    encode,
    hang_up,
    length_of,
    name_ranks,
    parse,
    tune,
)
from mindformers_ckpt.job.cluster.secret import Door

MAX_HELLO = 4096  # what a stranger may make the coordinator keep
HELLO_TIMEOUT = 10.0  # seconds in which a stranger has to prove and to introduce himself
SPARE = 64  # strangers that are borne beyond the number of ranks
RETRY = 0.1  # seconds until a connection is taken again after that was not possible
BACKLOG = 4096  # connections that wait to be taken; the system allows fewer, 4096 at most by default
LINGER = 2.0  # seconds in which a coordinator that leaves still tells late ranks of a failure


@dataclass(eq=False)
class _Peer:
    """One connection. `rank` is None for a stranger."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    rank: int | None = None
    node: str = ""
    is_trusted: bool = False
    outbox: deque[bytes] = field(default_factory=deque)
    sender: asyncio.Task[None] | None = None

    async def receive(self, limit: int) -> Message:
        """The next message. Raises EOFError at the end, ProtocolError, OSError."""
        length = length_of(await self.reader.readexactly(HEAD.size), limit)
        return parse(await self.reader.readexactly(length))

    def post(self, data: bytes) -> None:
        """Send without waiting."""
        if self.sender is not None and not self.sender.done():
            self.outbox.append(data)
        elif len(data) <= CHUNK:
            self.writer.write(data)
        else:
            self.outbox.append(data)
            self.sender = asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        with contextlib.suppress(OSError):  # a loss shows on the reading side, after what the peer has still said
            while self.outbox:
                data = memoryview(self.outbox.popleft())
                for start in range(0, len(data), CHUNK):  # a slow rank has one piece in its buffer, not 64 MiB
                    self.writer.write(data[start : start + CHUNK])
                    await self.writer.drain()

    def hang_up(self) -> None:
        hang_up(self.writer.get_extra_info("socket"))
        self.writer.transport.abort()


class Coordinator(threading.Thread):
    """Collects the values of a step from all ranks and hands them out, or the first failure instead.

    It ends when its own rank and all others have left, `timeout` seconds after its own rank at the latest,
    `LINGER` after a failure.
    """

    def __init__(self, listener: socket.socket, rank: int, size: int, door: Door, timeout: float) -> None:
        super().__init__(name="mindformers_ckpt coordinator", daemon=True)
        self._listener, self._door = listener, door
        self._rank, self._size, self._timeout = rank, size, timeout
        self._loop = asyncio.SelectorEventLoop()
        self._ended = self._loop.create_future()
        self._end_at = math.inf
        self._connections: set[asyncio.Task[None]] = set()
        self._strangers: dict[_Peer, None] = {}  # the oldest first
        self._peers: dict[int, _Peer] = {}
        self._gone: set[int] = set()
        self._have_joined = False
        self._step: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._values: dict[int, Any] = {}
        self._handed: list[Any] | None = None  # one value for each rank, where the step is one at which they are told
        self._collector: int | None = None  # the rank that alone gets the values
        self._failure: bytes | None = None
        self._lacks_files = False
        _allow_open_files(size + 4 * SPARE)

    def stop(self) -> None:
        """End at once (from another thread): this rank has not joined here."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._end)
        self.join(GRACE)

    def run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._door.close()
            self._loop.close()
            self._listener.close()

    async def _serve(self) -> None:
        self._loop.add_reader(self._listener, self._take_connection)
        await self._ended
        self._loop.remove_reader(self._listener)
        everybody = [*self._peers.values(), *self._strangers]
        last_words = [peer.sender for peer in everybody if peer.sender is not None and not peer.sender.done()]
        if last_words:
            await asyncio.wait(last_words, timeout=LINGER)
        for peer in everybody:
            peer.hang_up()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def _take_connection(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # the peer has given up already
            return
        except OSError:  # of open files, most likely; the ranks will try again
            self._lacks_files = True
            for stranger in list(self._strangers):
                stranger.hang_up()
            self._loop.remove_reader(self._listener)
            self._loop.call_later(RETRY, self._loop.add_reader, self._listener, self._take_connection)
            return
        sock.setblocking(False)
        task = self._loop.create_task(self._connect(sock))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        task.add_done_callback(lambda _: sock.close())  # also of one that the end has come before

    # One connection, from its first byte to its last.

    async def _connect(self, sock: socket.socket) -> None:
        try:
            tune(sock, self._timeout)
            peer = _Peer(*await asyncio.open_connection(sock=sock, limit=MAX_HELLO))
        except OSError:
            return
        self._strangers[peer] = None
        if len(self._strangers) > self._size + SPARE:
            next(iter(self._strangers)).hang_up()
        enough = self._loop.call_later(HELLO_TIMEOUT, peer.hang_up)
        with contextlib.suppress(Exception):  # whatever a stranger can cause
            await self._introduce(peer)
        enough.cancel()
        self._strangers.pop(peer)
        if peer.rank is not None:
            await self._listen(peer, peer.rank)
        peer.hang_up()

    async def _introduce(self, peer: _Peer) -> None:
        """Let a stranger prove that he knows a key, and only then read who he is."""
        challenge = proof.new_challenge(self._door.number)
        peer.writer.write(challenge)
        answer = await peer.reader.readexactly(proof.ANSWER)
        key = next((key for key in self._door.keys if proof.is_answer(key.content, challenge, answer)), None)
        peer.writer.write(proof.NO if key is None else proof.confirmation(key.content, challenge, answer))
        if key is not None:
            peer.is_trusted = key.is_trusted
            self._welcome(peer, await peer.receive(MAX_HELLO))

    async def _listen(self, peer: _Peer, rank: int) -> None:
        """Take what a rank says until it leaves or is lost."""
        try:
            while self._take(rank, peer, await peer.receive(MAX_MESSAGE)):
                pass
        except EOFError:
            self._lose(rank, peer, "its connection closed before it left")
        except Exception as error:
            self._lose(rank, peer, str(error) or repr(error))

    def _take(self, rank: int, peer: _Peer, message: Message) -> bool:
        """Whether the rank will say more. Raises ProtocolError for what it cannot say now."""
        kind, step = message.get("kind"), message.get("step")
        if not self._have_joined and not peer.is_trusted:
            raise ProtocolError("a rank without the secret speaks before all have joined")
        if kind == "leave":
            self._depart(rank)
            return False
        if self._failure is not None:
            return True  # no step can begin any more; the peer finds the failure in its queue
        if kind == "gather" and isinstance(step, str) and "value" in message:
            self._arrive(rank, step, message["value"])
        elif kind == "hand" and isinstance(step, str) and self._handed is None and self._is_for_all(message):
            self._handed = message["values"]
            self._arrive(rank, step, None)
        elif kind == "collect" and isinstance(step, str) and self._collector is None and "value" in message:
            self._collector = rank
            self._arrive(rank, step, message["value"])
        elif kind == "failed" and isinstance(step, (str, type(None))) and isinstance(message.get("text"), str):
            self._fail(rank, step, message["text"])
        else:
            raise ProtocolError("a message of an unknown form")
        return True

    def _is_for_all(self, message: Message) -> bool:
        values = message.get("values")
        return isinstance(values, list) and len(values) == self._size

    # Who is there.

    def _welcome(self, peer: _Peer, hello: Message) -> None:
        """Take a peer in as a rank of this job, or refuse it."""
        rank, node = hello.get("rank"), hello.get("node")
        if type(rank) is not int or not 0 <= rank < self._size or not isinstance(node, str):
            raise ProtocolError("an unknown form of hello")
        other = self._peers.get(rank)
        if other is not None and peer.is_trusted and not other.is_trusted and not self._have_joined:
            self._forget(rank, other)  # he was a stranger after all
        if rank in self._peers or rank in self._gone:
            # An earlier job that has not ended yet looks like this: the new one tries again.
            peer.writer.write(encode({"kind": "refused", "text": f"a job whose rank {rank} has joined already"}))
            return
        peer.rank, peer.node = rank, node
        self._peers[rank] = peer
        peer.post(encode({"kind": "welcome", "rank": self._rank}))
        if self._failure is None:
            self._arrive(rank, JOIN, [node, peer.is_trusted])
        else:
            peer.post(self._failure)

    def _forget(self, rank: int, peer: _Peer) -> None:
        """As if it had never come."""
        self._peers.pop(rank)
        self._values.pop(rank, None)
        peer.hang_up()

    def _lose(self, rank: int, peer: _Peer, reason: str) -> None:
        if self._peers.get(rank) is not peer:
            return  # forgotten
        if not peer.is_trusted and not self._have_joined:
            self._forget(rank, peer)  # whoever it was, the job does not end for him
            return
        during = "" if self._step is None else f" (step {self._step!r})"
        self._fail(rank, self._step, f"rank {rank} on {peer.node} died{during}: {reason}")
        self._depart(rank)

    def _depart(self, rank: int) -> None:
        self._peers.pop(rank)
        self._gone.add(rank)
        if rank == self._rank:
            self._end_within(self._timeout)
        self._conclude()
        if len(self._gone) == self._size:
            self._end()

    def _end_within(self, seconds: float) -> None:
        """Once the own rank has left, the others have so long to do the same."""
        self._end_at = min(self._end_at, self._loop.time() + seconds)
        if self._rank in self._gone:
            self._loop.call_at(self._end_at, self._give_up)

    def _give_up(self) -> None:
        late = set(range(self._size)) - self._gone
        waited = f"has waited {self._timeout:g} s for {name_ranks(late)} to leave, and has left"
        self._fail(self._rank, None, f"rank {self._rank}, which coordinates, {waited}")
        self._end()

    # What they do together.

    def _arrive(self, rank: int, step: str, value: Any) -> None:
        if self._step is None:
            self._step, self._timer = step, self._loop.call_later(self._timeout, self._expire)
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
            if self._step == JOIN:
                self._have_joined = True
                self._door.close()
            values, handed = [self._values[rank] for rank in range(self._size)], self._handed
            collector = self._collector
            self._close_step()
            if handed is None and collector is None:
                self._broadcast(encode({"kind": "gathered", "values": values}))
                return
            for rank, peer in self._peers.items():
                own = {"kind": "handed", "value": None if handed is None else handed[rank]}
                peer.post(encode({"kind": "gathered", "values": values} if rank == collector else own))

    def _expire(self) -> None:
        """The time of a step is over."""
        missing = set(range(self._size)) - self._values.keys()
        verb = "has" if len(missing) == 1 else "have"
        text = f"step {self._step!r}: {name_ranks(missing)} {verb} not arrived within {self._timeout:g} s"
        nodes = dict.fromkeys(self._peers[rank].node for rank in sorted(missing) if rank in self._peers)
        if nodes:
            text += f" (on {', '.join(nodes)})"
        if self._lacks_files:
            text += f"; rank {self._rank}, which coordinates, could not take all connections: raise ulimit -n there"
        host, port = self._listener.getsockname()[:2]
        if self._step == JOIN and (host.startswith("127.") or host == "::1"):
            text += f" ({Address(host, port)} is reached from one node only; if there are more, {ADVICE})"
        self._fail(missing.pop() if len(missing) == 1 else None, self._step, text)

    def _close_step(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._step, self._timer = None, None
        self._values, self._handed, self._collector = {}, None, None

    def _fail(self, rank: int | None, step: str | None, text: str) -> None:
        """Tell all ranks of a failure; the first one counts."""
        if self._failure is None:
            self._close_step()
            self._end_within(LINGER)
            self._failure = encode({"kind": "failed", "rank": rank, "step": step, "text": text})
            self._broadcast(self._failure)

    def _broadcast(self, data: bytes) -> None:
        for peer in self._peers.values():
            peer.post(data)


def _allow_open_files(count: int) -> None:
    """Raise this process's soft limit of open files, as far as the hard limit lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
