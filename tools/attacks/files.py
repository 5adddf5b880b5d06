"""Commands that are killed, whose calls fail, that get signals, and whose disk is full."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

from cases import Bench
from child import CRASHED, Act, Ended, Event

from attacks.disks import COMMANDS, Benches
from attacks.kinds import Round

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EDQUOT)
OF_READS = (errno.EIO, errno.ESTALE)
SECONDS = 60.0  # in which everything ends


class _OnFiles:
    """What these kinds have in common: a command and a file system are drawn, and settled in the end."""

    commands: Sequence[str] = COMMANDS

    def __init__(self, folder: Path) -> None:
        self._benches = Benches(folder)

    def round(self, seed: int) -> Round:
        chance = random.Random(seed)
        what, bench = self._benches.draw(chance, self.commands)
        try:
            faults = self.attack(bench, chance)
            faults += bench.settle(resume=chance.random() < 0.5)
        except TimeoutError as error:
            faults = [str(error)]
        return Round(what, 1, faults)

    def attack(self, bench: Bench, chance: random.Random) -> list[str]:
        raise NotImplementedError


class Kills(_OnFiles):
    """SIGKILL before an operation on files."""

    def attack(self, bench: Bench, chance: random.Random) -> list[str]:
        at = chance.randint(1, bench.operations)
        done = bench.run(bench.case.words, Event(Act.KILL, at, at))
        return [] if done.code in (-signal.SIGKILL, 0) else [f"before operation {at}: {done}"]


class Moments(_OnFiles):
    """SIGKILL at some moment, also of a command with several processes."""

    def attack(self, bench: Bench, chance: random.Random) -> list[str]:
        words = list(bench.case.words)
        if words[0] == "transform" and chance.random() < 0.3:
            words += ["--transform-process-num", "2"]
        moment = chance.uniform(0, 1.1 * bench.seconds)
        done = bench.run(words, after=(moment, (signal.SIGKILL,)))
        return [] if done.code in (-signal.SIGKILL, 0) else [f"after {moment:.3f} s: {done}"]


class Calls(_OnFiles):
    """A call fails, or all from one on, as on a disk that breaks or fills up; also calls that read."""

    def attack(self, bench: Bench, chance: random.Random) -> list[str]:
        reads = chance.random() < 0.5
        error = chance.choice(OF_READS if reads else ERRORS)
        at = chance.randint(1, bench.operations_with_reads if reads else bench.operations)
        last = at if chance.random() < 0.6 else 1 << 30
        done = bench.run(bench.case.words, Event(Act.FAIL, at, last, error), reads=reads, seconds=SECONDS)
        where = f"{os.strerror(error)} at operation {at}{' and after it' if last > at else ''}{', reads too' * reads}"
        return [f"{where}: {fault}" for fault in faults_of_failure(bench, done)]


class Signals(_OnFiles):
    """Ctrl-C and what schedulers send, at an operation or at some moment, once or twice."""

    commands: Sequence[str] = [name for name in COMMANDS if name != "job"]  # the signals of a job are the trainer's

    def attack(self, bench: Bench, chance: random.Random) -> list[str]:
        number, twice = chance.choice(SIGNALS), chance.random() < 0.5
        if chance.random() < 0.5:
            at = chance.randint(1, bench.operations)
            last = chance.randint(at, bench.operations) if twice else at
            event = Event(Act.SIGNAL, at, last, number)
            where, done = f"{event}", bench.run(bench.case.words, event, seconds=SECONDS)
        else:
            moment = chance.uniform(0, 1.1 * bench.seconds)
            signals = (number, number) if twice else (number,)
            where = f"{signals} after {moment:.3f} s"
            done = bench.run(bench.case.words, after=(moment, signals), seconds=SECONDS)
        if done.code not in (0, 128 + number) or "Traceback" in done.said:
            return [f"{where}: {done}"]
        return []


class Room(_OnFiles):
    """A disk that fills up: a small one, with some pages left."""

    def __init__(self, folder: Path) -> None:
        from attacks.mounts import small

        self._disk = small(folder)
        super().__init__(self._disk)

    def attack(self, bench: Bench, chance: random.Random) -> list[str]:
        filler = self._disk / "filler"
        pages = sum(path.stat().st_size // 4096 + 1 for path in bench.case.folder.rglob("pristine/**/*")) + 40
        left = chance.randrange(2 * pages) * 4096
        try:
            room = os.statvfs(self._disk).f_bavail * 4096 - left
            with open(filler, "wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, max(room, 1))
            done = bench.run(bench.case.words, seconds=SECONDS)
        finally:
            filler.unlink()
        return [f"{left} bytes are left: {fault}" for fault in faults_of_failure(bench, done)]


def faults_of_failure(bench: Bench, done: Ended) -> list[str]:
    """What is wrong with the end of a command whose calls failed."""
    if done.code == 0:
        return [] if bench.state() == bench.new else [f"exit 0, but the result is not there: {done.said[-300:]}"]
    if done.code == CRASHED or "Traceback" in done.said:
        return [f"not an error of ours: {done.said[-500:]}"]
    return [] if done.code == 1 and "error" in done.said else [str(done)]
