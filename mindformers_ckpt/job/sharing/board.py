"""What of a list of requests is in memory, and who may fill in the rest: one board for all threads of a process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Container, Iterator, Sequence

from mindformers_ckpt.engine.into_memory import Request

NO_MORE = -1


class Board:
    """Requests, the rank that reads each, and how far they are.

    The targets of a request are filled by one thread only: the one that `take` has let.
    """

    def __init__(self, requests: Sequence[Request], readers: Sequence[int], rank: int) -> None:
        self.requests, self.readers = requests, readers
        self.bytes_from: Counter[int] = Counter()  # by the rank that read them; the own one for what this one did
        self._rank = rank
        self._changed = threading.Condition()
        self._is_taken = bytearray(len(requests))
        self._left = len(requests)
        self._own_left = sum(reader == rank for reader in readers)
        self._own_done: list[int] = []

    def own(self) -> Iterator[Request]:
        """The requests that this rank is to read."""
        return self.lacking((self._rank,))

    def lacking(self, ranks: Container[int], *, backwards: bool = False) -> Iterator[Request]:
        """What is to be read for some ranks and nobody fills in yet; who gets one has taken it."""
        numbers = range(len(self.requests))
        for number in reversed(numbers) if backwards else numbers:
            if self.readers[number] in ranks and self.take(number):
                yield self.requests[number]

    def take(self, number: int) -> bool:
        """Whether the caller may fill in a request, which nobody else may do then."""
        with self._changed:
            is_free = not self._is_taken[number]
            self._is_taken[number] = True
        return is_free

    def done(self, request: Request, source: int | None = None) -> None:
        """A request that was taken is filled in, with what came from a rank, by default from the storage."""
        with self._changed:
            self._left -= 1
            self.bytes_from[self._rank if source is None else source] += request.size
            if self.readers[request.number] == self._rank:
                self._own_left -= 1
                self._own_done.append(request.number)
            self._changed.notify_all()

    @property
    def is_full(self) -> bool:
        return not self._left

    def own_done(self, position: int, seconds: float) -> int | None:
        """The number of the own request that was filled in as the `position`th; NO_MORE after the last one.

        None where there is none within that time.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._own_done) > position or not self._own_left, seconds)
            if len(self._own_done) > position:
                return self._own_done[position]
            return None if self._own_left else NO_MORE

    def wait(self, seconds: float) -> None:
        """Until something is filled in."""
        with self._changed:
            if self._left:
                self._changed.wait(seconds)
