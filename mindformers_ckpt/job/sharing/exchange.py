"""Ranks give each other what each has read: a connection for every two of them, a thread for each direction.

    header:  number of the request, its bytes, their xxh3-64; then the bytes
             (or ALIVE, 0, 0 after a second in which nothing was read: its storage is slow, the rank is there)

Blocking sockets in threads: asyncio's streams moved a fifth as much, with eight times the processor's time. A thread
receives all the time, so nobody's sending waits for anybody's reading. What comes is put into memory of the thread, and
into its place when all of it is right, so that nothing wrong is ever there; what is sent is read where it will stay.

Nothing in here fails: a connection that is lost, or says what it should not, is a rank that gives no more.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from mindformers_ckpt.engine.buffers import empty_bytes
from mindformers_ckpt.job.cluster.messages import Address, ProtocolError, hang_up
from mindformers_ckpt.job.sharing.board import NO_MORE, Board
from mindformers_ckpt.job.sharing.lines import PROOF_SECONDS, Pass, answer, call, new_socket, receive

_HEADER = struct.Struct(">IIQ")
_MOST_STRANGERS = 64
_ALIVE = (1 << 32) - 1
_TICK = 0.1
_TICKS_UNTIL_ALIVE = 10
# Since the last byte came, and since the own part is done where bytes still come, but slowly.
SILENT_SECONDS = 5.0
_LEAST_SECONDS, _MOST_SECONDS = 10.0, 30.0


class Exchange:
    """Gives and gets the requests of a board, in threads, from `__enter__` to `__exit__`.

    `lost` has what was wrong with ranks that give no more.
    """

    def __init__(self, board: Board, own: Pass, members: Mapping[int, Address], listener: socket.socket) -> None:
        self.lost: dict[int, str] = {}
        self._board, self._own, self._listener = board, own, listener
        self._peers = {rank: address for rank, address in members.items() if rank != own.rank}
        self._largest = max(request.size for request in board.requests)
        self._started = time.monotonic()
        self._own_done: float | None = None
        self._heard = dict.fromkeys(self._peers, self._started)
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._proved: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._senders: list[threading.Thread] = []
        self._is_closed = False

    def __enter__(self) -> Exchange:
        callers = {rank for rank in self._peers if rank > self._own.rank}
        if callers:
            self._start(self._let_in, callers)
        for rank in self._peers.keys() - callers:
            if self._start(self._call, rank) is None:
                self._lose(rank, "no thread could be started")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_closed = True
            sockets, threads = list(self._sockets), [*self._threads, *self._senders]
        for sock in sockets:
            hang_up(sock)
        for thread in threads:
            thread.join()

    def late(self) -> set[int]:
        """The ranks whose part is to be read here, after the own one: they are lost, silent or much slower."""
        now = time.monotonic()
        if self._own_done is None:
            self._own_done = now
        if now - self._own_done > self._patience:
            return set(self._peers)
        silent = {rank for rank, heard in self._heard.items() if now - max(heard, self._own_done) > SILENT_SECONDS}
        return silent.union(list(self.lost))

    def finish(self, check: Callable[[], None]) -> None:
        """Wait until the others have got what was read here; those that are much slower read it themselves."""
        until = time.monotonic() + self._patience
        for thread in self._senders:
            while thread.is_alive() and time.monotonic() < until:
                check()
                thread.join(_TICK)

    @property
    def _patience(self) -> float:
        """Seconds that a slow rank is waited for: half as long again as the own part took, within limits."""
        taken = (self._own_done or time.monotonic()) - self._started
        return min(max(taken / 2, _LEAST_SECONDS), _MOST_SECONDS)

    def _start(self, work: Callable[..., None], *arguments: Any, is_sender: bool = False) -> threading.Thread | None:
        """Run something in a thread; None where the system gives no more, or it is too late."""
        thread = threading.Thread(target=work, args=arguments, name="sharing", daemon=True)
        with self._lock:
            if self._is_closed:
                return None
            try:
                thread.start()
            except RuntimeError:
                return None
            (self._senders if is_sender else self._threads).append(thread)
        return thread

    def _lose(self, rank: int, reason: str) -> None:
        if not self._is_closed:
            self.lost.setdefault(rank, reason)

    # How they find each other.

    def _let_in(self, callers: set[int]) -> None:
        """Take the calls of ranks, each in a thread."""
        until, slots = time.monotonic() + PROOF_SECONDS, threading.Semaphore(_MOST_STRANGERS)
        self._listener.settimeout(_TICK)
        while not callers <= self._proved and time.monotonic() < until and not self._is_closed:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # nobody has called, or there are too many open files
                continue
            if not slots.acquire(blocking=False) or self._start(self._answer, sock, callers, slots) is None:
                sock.close()
        self._listener.close()  # who comes later is refused at once
        for rank in callers - self._proved:
            self._lose(rank, f"it has not called within {PROOF_SECONDS:g} s")

    def _answer(self, sock: socket.socket, callers: set[int], slots: threading.Semaphore) -> None:
        with self._kept(sock):
            try:
                rank = answer(sock, self._own, callers)
            except (OSError, ProtocolError):
                return  # whoever it was
            finally:
                slots.release()
            self._talk(rank, sock)

    def _call(self, rank: int) -> None:
        address = self._peers[rank]
        try:
            with self._kept(new_socket(address.host)) as sock:
                call(sock, address, self._own, rank)
                self._talk(rank, sock)
        except (OSError, ProtocolError) as error:
            self._lose(rank, f"it cannot be reached at {address}: {error}")

    @contextlib.contextmanager
    def _kept(self, sock: socket.socket) -> Iterator[socket.socket]:
        """Close a connection in the end, which another thread may have ended before."""
        with sock:
            with self._lock:
                self._sockets.add(sock)
                is_late = self._is_closed
            if is_late:
                hang_up(sock)
            try:
                yield sock
            finally:
                with self._lock:
                    self._sockets.discard(sock)
                hang_up(sock)  # also where a forked child has it open

    # What they say.

    def _talk(self, rank: int, sock: socket.socket) -> None:
        """Send to a rank and receive from it until there is nothing more."""
        with self._lock:
            is_second = rank in self._proved
            self._proved.add(rank)
        if is_second:
            return
        self._heard[rank] = time.monotonic()
        sender = self._start(self._send, rank, sock, is_sender=True)
        try:
            self._receive(rank, sock)
        except (OSError, ProtocolError) as error:
            self._lose(rank, str(error) or repr(error))
            hang_up(sock)
        if sender is not None:
            sender.join()  # the connection stays open for it

    def _send(self, rank: int, sock: socket.socket) -> None:
        """Send the own requests as they are read."""
        import xxhash

        memory, position, idle = empty_bytes(self._largest), 0, 0
        try:
            while not self._is_closed:
                number = self._board.own_done(position, _TICK)
                if number == NO_MORE:
                    sock.shutdown(socket.SHUT_WR)
                    return
                if number is None:
                    idle += 1
                    if idle % _TICKS_UNTIL_ALIVE == 0:
                        sock.sendall(_HEADER.pack(_ALIVE, 0, 0))
                else:
                    content = self._board.requests[number].content(memory)
                    digest = xxhash.xxh3_64_intdigest(content)
                    sock.sendall(_HEADER.pack(number, len(content), digest), getattr(socket, "MSG_MORE", 0))
                    sock.sendall(content)
                    position += 1
        except OSError as error:
            self._lose(rank, f"it takes nothing: {error}")
            hang_up(sock)

    def _receive(self, rank: int, sock: socket.socket) -> None:
        """Receive the requests of a rank. Raises OSError or ProtocolError when it ends before all have come."""
        import xxhash

        expected = {number for number, reader in enumerate(self._board.readers) if reader == rank}
        header, memory = memoryview(bytearray(_HEADER.size)), empty_bytes(self._largest)
        while expected:
            self._fill(rank, sock, header)
            number, size, digest = _HEADER.unpack(header)
            if number == _ALIVE and not size:
                continue
            if number not in expected or size != self._board.requests[number].size:
                raise ProtocolError("it sends what is not its part")
            content = memory[:size]
            self._fill(rank, sock, content.data)
            if xxhash.xxh3_64_intdigest(content.data) != digest:
                raise ProtocolError("what it sent was changed on the way")
            expected.remove(number)
            if self._board.take(number):
                self._board.requests[number].take(content)
                self._board.done(self._board.requests[number], rank)

    def _fill(self, rank: int, sock: socket.socket, memory: memoryview) -> None:
        while memory:
            memory = memory[receive(sock, memory) :]
            self._heard[rank] = time.monotonic()
