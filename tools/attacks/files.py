"""Commands that are killed, whose calls fail, that get signals, and whose disk is full."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from cases import Bench
from child import CRASHED, Act, Ended, Event, Lacks

from attacks.disks import COMMANDS, Benches, Disk
from attacks.kinds import Round

# What is done to a command on a bench, and what was wrong with its end.
Deed = Callable[[Bench, random.Random], list[str]]

OF_SIGNALS = [name for name in COMMANDS if name != "job"]  # the signals of a job are the trainer's
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EDQUOT)
OF_READS = (errno.EIO, errno.ESTALE)
FOR_EVER = 1 << 30


class OnFiles:
    """Rounds in which a command and a file system are drawn, something is done to it, and the next run settles it."""

    def __init__(self, benches: Benches, deeds: Sequence[Deed], commands: Sequence[str] = COMMANDS) -> None:
        self._benches, self._deeds, self._commands = benches, deeds, commands

    def round(self, seed: int) -> Round:
        chance = random.Random(seed)
        what, bench = self._benches.draw(chance, self._commands)
        try:
            faults = chance.choice(self._deeds)(bench, chance)
            faults += bench.settle(resume=chance.random() < 0.5)
        except TimeoutError as error:
            faults = [str(error)]
        return Round(what, 1, faults)


def kills(folder: Path) -> OnFiles:
    return OnFiles(Benches.below(folder), [kill])


def moments(folder: Path) -> OnFiles:
    return OnFiles(Benches.below(folder), [kill_at_a_moment])


def calls(folder: Path) -> OnFiles:
    return OnFiles(Benches.below(folder), [fail])


def signals(folder: Path) -> OnFiles:
    return OnFiles(Benches.below(folder), [interrupt], OF_SIGNALS)


def mounts(folder: Path) -> OnFiles:
    """All of these on file systems that are mounted, whose names and attributes are seconds old."""
    from attacks.mounts import shared

    bare = Lacks.EXCHANGE | Lacks.ROOM_AHEAD
    disks = {"FUSE": Disk(bare, by_shim=False), "FUSE, no locks": Disk(bare | Lacks.LOCKS, by_shim=False)}
    folders = {name: shared(folder, locks=Lacks.LOCKS not in disk.lacks) for name, disk in disks.items()}
    return OnFiles(Benches(folders, disks), [kill, kill_at_a_moment, fail, interrupt], OF_SIGNALS)


def room(folder: Path) -> OnFiles:
    from attacks.mounts import small

    return OnFiles(Benches.below(small(folder)), [fill])


def kill(bench: Bench, chance: random.Random) -> list[str]:
    """SIGKILL before an operation on files."""
    at = chance.randint(1, bench.operations)
    done = bench.run(bench.case.words, Event(Act.KILL, at, at))
    return [] if done.code in (-signal.SIGKILL, 0) else [f"before operation {at}: {done}"]


def kill_at_a_moment(bench: Bench, chance: random.Random) -> list[str]:
    """SIGKILL at some moment, also of a command with several processes."""
    words = list(bench.case.words)
    if words[0] == "transform" and chance.random() < 0.3:
        words += ["--transform-process-num", "2"]
    moment = chance.uniform(0, 1.1 * bench.seconds)
    done = bench.run(words, after=(moment, (signal.SIGKILL,)))
    return [] if done.code in (-signal.SIGKILL, 0) else [f"after {moment:.3f} s: {done}"]


def fail(bench: Bench, chance: random.Random) -> list[str]:
    """A call fails, or all from one on, as on a disk that breaks or fills up; also calls that read."""
    reads = chance.random() < 0.5
    error = chance.choice(OF_READS if reads else ERRORS)
    at = chance.randint(1, bench.operations_with_reads if reads else bench.operations)
    last = at if chance.random() < 0.6 else FOR_EVER
    done = bench.run(bench.case.words, Event(Act.FAIL, at, last, error), reads=reads)
    where = f"{os.strerror(error)} at operation {at}{' and after it' if last > at else ''}{', reads too' * reads}"
    return [f"{where}: {fault}" for fault in faults_of_failure(bench, done)]


def interrupt(bench: Bench, chance: random.Random) -> list[str]:
    """Ctrl-C and what schedulers send, at an operation or at some moment, once or twice."""
    number, twice = chance.choice(SIGNALS), chance.random() < 0.5
    if chance.random() < 0.5:
        at = chance.randint(1, bench.operations)
        event = Event(Act.SIGNAL, at, chance.randint(at, bench.operations) if twice else at, number)
        where, done = str(event), bench.run(bench.case.words, event)
    else:
        moment, numbers = chance.uniform(0, 1.1 * bench.seconds), (number, number) if twice else (number,)
        where, done = f"{numbers} after {moment:.3f} s", bench.run(bench.case.words, after=(moment, numbers))
    is_good = done.code in (0, 128 + number) and "Traceback" not in done.said
    return [] if is_good else [f"{where}: {done}"]


def fill(bench: Bench, chance: random.Random) -> list[str]:
    """A disk that fills up: some pages are left."""
    disk = bench.case.folder.parent
    filler = disk / "filler"
    pages = sum(path.stat().st_size // 4096 + 1 for path in bench.case.folder.rglob("pristine/**/*")) + 40
    left = chance.randrange(2 * pages) * 4096
    try:
        taken = os.statvfs(disk).f_bavail * 4096 - left
        with open(filler, "wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(taken, 1))
        done = bench.run(bench.case.words)
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
