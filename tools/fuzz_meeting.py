"""Throw strangers at the meeting of a job's ranks, and see that they disturb nothing. On the loopback device only.

    python tools/fuzz_meeting.py --streams 1000000       # mutated handshakes, garbage, half-open connections
    python tools/fuzz_meeting.py --ranks 2000            # so many ranks at once, and how long they take to join

A job of three ranks shares values and hands them out all the time. Before the last of them joins, and after it,
strangers connect and send what `streams` makes. The job has to end with the right values on every rank.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401 - finds the package of this checkout
import click

from mindformers_ckpt.job.cluster import proof
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.messages import Address, encode
from mindformers_ckpt.job.cluster.rendezvous import listen
from mindformers_ckpt.job.cluster.secret import Job, Trust

SIZE = 3
AT_ONCE, STAYING = 50, 30  # strangers
EARLY = 5000  # at most, before the last rank joins
GARBAGE = (
    *(b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"SSH-2.0-x\r\n", b"\0" * 4, b"\xff" * 4, b""),
    *(struct.pack(">I", 4000) + b"[" * 4000, struct.pack(">I", 4000) + b'{"a":' * 800, b"[" * 100_000),
    *(encode({"kind": kind}) for kind in ("hello", "leave", "gather", "hand", "failed", "welcome")),
)
HELLOS = (
    encode({"kind": "hello", "rank": 2, "node": "evil"}),
    encode({"kind": "failed", "rank": 0, "step": "x", "text": "\x1b[31mgive me money"}),
    encode({"kind": "gather", "step": "share 1", "value": {"folder": "/evil"}}),
    encode({"kind": "hand", "step": "told 1", "values": [{"folder": "/evil"}] * SIZE}),
    encode({"kind": "leave"}),
)


class Stranger(NamedTuple):
    """What one connection does: whether it waits for the challenge, what it sends, in which pieces, how it ends."""

    kind: str
    waits: bool
    answer: Callable[[bytes], bytes]  # challenge -> bytes
    cuts: tuple[int, ...]
    end: str  # "reset", "close", "half" (no more from here) or "stay"


def strangers(address: Address, seed: int) -> Iterator[Stranger]:
    """Connections without end, the same for the same seed. None of them knows the secret of the job."""
    chance = random.Random(seed)
    public_key = Job(address, SIZE).key(b"")
    guesses = [public_key, bytes(32), Job(address, SIZE).key(b"secret"), Job(address, 2).key(b"")]
    while True:
        kind = chance.choice(["garbage", "noise", "guess", "mutated guess", "echo", "half-open"])
        key, seed_of_it, tail = chance.choice(guesses), chance.random(), b"".join(chance.sample(HELLOS, 2))

        def answer(
            challenge: bytes, kind: str = kind, key: bytes = key, seed: float = seed_of_it, tail: bytes = tail
        ) -> bytes:
            dice = random.Random(seed)
            if kind == "garbage":
                return dice.choice(GARBAGE)
            if kind == "noise":
                return dice.randbytes(dice.choice([1, 63, 64, 65, 100, 5000]))
            if kind == "echo":
                return challenge * dice.randrange(1, 4)
            if kind == "half-open":
                return dice.randbytes(dice.randrange(proof.ANSWER))
            whole = proof.new_answer(key, challenge) + tail
            return mutate(whole, dice) if kind == "mutated guess" else whole

        cuts = tuple(sorted(chance.randrange(100) for _ in range(chance.choice([0, 0, 0, 1, 3]))))
        end = chance.choice(["reset", "reset", "close", "half", "stay"])
        yield Stranger(kind, "guess" in kind or kind == "echo", answer, cuts, end)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Some bits flipped, bytes cut out, doubled, or put in."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 8)):
        place, action = chance.randrange(len(changed) + 1), chance.randrange(4)
        if action == 0 and place < len(changed):
            changed[place] ^= 1 << chance.randrange(8)
        elif action == 1:
            del changed[place : place + chance.randrange(1, 9)]
        elif action == 2:
            changed[place:place] = changed[place : place + chance.randrange(1, 33)]
        else:
            changed[place:place] = chance.randbytes(chance.randrange(1, 9))
    return bytes(changed)


class Crowd:
    """Strangers that connect to an address, some hundred at a time."""

    def __init__(self, address: Address, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._address = address
        self._visitors = strangers(address, seed)
        self._open: deque[asyncio.StreamWriter] = deque()

    def attack(self, count: int) -> None:
        """`count` connections. Raises AssertionError when a guess is let in, or told anything."""
        asyncio.run(self._attack(count))

    async def _attack(self, count: int) -> None:
        numbers = iter(range(count))

        async def visit_in_turn() -> None:
            for number in numbers:
                await self._visit(next(self._visitors), number)

        await asyncio.gather(*[visit_in_turn() for _ in range(AT_ONCE)])
        while self._open:
            self._close_oldest()

    async def _visit(self, stranger: Stranger, number: int) -> None:
        self.counts[stranger.kind] += 1
        # One address has 28,000 ports, and a closed connection keeps its port for a minute.
        origin = (f"127.{number >> 8 & 127 | 64}.{number & 255}.9", 0)
        try:
            reader, writer = await asyncio.open_connection(*self._address, local_addr=origin)
        except OSError:
            self.counts["not taken"] += 1
            return
        try:
            await asyncio.wait_for(self._talk(stranger, reader, writer), 30)
        except (OSError, EOFError):
            self.counts["cut off"] += 1
        if stranger.end != "stay":
            writer.transport.abort() if stranger.end == "reset" else writer.close()
            return
        self._open.append(writer)
        if len(self._open) > STAYING:
            self._close_oldest()

    def _close_oldest(self) -> None:
        writer = self._open.popleft()
        writer.transport.abort()

    async def _talk(self, stranger: Stranger, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        challenge = await reader.readexactly(proof.CHALLENGE) if stranger.waits else bytes(proof.CHALLENGE)
        data, begin = stranger.answer(challenge), 0
        for end in (*stranger.cuts, len(data)):
            writer.write(data[begin:end])
            await writer.drain()
            begin = max(begin, end)
        if stranger.end == "half":
            writer.write_eof()
        if stranger.kind == "guess":
            said = await reader.read(1 << 16)
            assert said in (b"", proof.NO), f"a stranger is told {said!r}"


def fuzz(count: int, seed: int, trust: Trust) -> dict[str, object]:
    """Run a job under `count` strangers. Raises AssertionError when it is disturbed; returns figures."""
    address, over = free_address(), threading.Event()
    crowd = Crowd(address, seed)

    def work(rank: int) -> int:
        with Cluster.connect(rank, SIZE, address, 600.0, trust=trust) as cluster:
            assert cluster.unproved == ()
            steps, go_on = 0, True
            while go_on:
                values = cluster.gather(f"share {steps}", [rank, steps, over.is_set()])
                assert [value[:2] for value in values] == [[other, steps] for other in range(SIZE)]
                told = [[other, steps] for other in range(SIZE)] if rank == 0 else None
                assert cluster.hand_out(f"told {steps}", told) == [rank, steps]
                steps, go_on = steps + 1, not values[0][2]
                time.sleep(0.05)
            return steps

    began = time.monotonic()
    with ThreadPoolExecutor(SIZE) as pool:
        ranks = [pool.submit(work, rank) for rank in range(SIZE - 1)]
        wait_for_listener(address)
        try:
            early = min(count // 2, EARLY)
            crowd.attack(early)
            ranks.append(pool.submit(work, SIZE - 1))
            crowd.attack(count - early)
        finally:
            over.set()
        steps = {future.result(timeout=60) for future in ranks}
    seconds = time.monotonic() - began
    assert len(steps) == 1
    return {"streams": count, "steps of the job": steps.pop(), "seconds": round(seconds, 1), **crowd.counts}


def free_address() -> Address:
    """A port nobody listens on, below the ephemeral ones."""
    while True:
        address = Address("127.0.0.1", random.randrange(20000, 32000))
        try:
            listen(address).close()
        except OSError:
            continue
        return address


def wait_for_listener(address: Address) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(address) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"nobody listens on {address}")


def many(size: int, trust: Trust) -> dict[str, object]:
    """So many ranks in threads of this process: seconds until all have joined, and of three steps after that."""
    threading.stack_size(256 << 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 3 * size + 500)), hard))
    address, joined, done = free_address(), [0.0] * size, [0.0] * size

    def work(rank: int) -> None:
        with Cluster.connect(rank, size, address, 300.0, node=f"n{rank // 8}", trust=trust) as cluster:
            joined[rank] = time.monotonic()
            for step in range(3):
                assert len(cluster.gather(f"step {step}", {"folder": "x" * 60} if rank == 0 else None)) == size
            done[rank] = time.monotonic()

    began = time.monotonic()
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(done), f"{done.count(0.0)} ranks failed"
    return {
        "ranks": size,
        "seconds to join": round(max(joined) - began, 2),
        "seconds of 3 steps": round(max(done) - max(joined), 2),
    }


@click.command()
@click.option("--streams", default=0, help="Strangers that connect.")
@click.option("--seed", default=1, show_default=True)
@click.option("--ranks", default=0, help="Ranks of a job that join at once.")
def main(streams: int, seed: int, ranks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trust = Trust(folder=Path(folder), strict=True)
        if streams:
            print(json.dumps(fuzz(streams, seed, trust)))
        if ranks:
            print(json.dumps(many(ranks, trust)))
        left = [path.name for path in Path(folder).iterdir()]
    if left:
        sys.exit(f"left behind: {left}")


if __name__ == "__main__":
    main()
