"""Runs that were killed, whose leftovers are then damaged, or whose source is exchanged, before `--resume`."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

from cases import tree
from child import Act, Event

from attacks.disks import COMMANDS, Benches
from attacks.kinds import Round

RESUMABLE = [name for name in COMMANDS if name not in ("job", "merge-strategy", "plan")]


class Resumes:
    """The result of `--resume` is always the one that a run without a kill gives."""

    def __init__(self, folder: Path) -> None:
        self._benches = Benches.below(folder)

    def round(self, seed: int) -> Round:
        chance = random.Random(seed)
        what, bench = self._benches.draw(chance, RESUMABLE)
        faults = []
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            at = chance.randint(bench.operations // 4, bench.operations)
            words = [*bench.case.words, "--resume"]
            bench.age()
            done = bench.run(words, Event(Act.KILL, at, at))
            if done.code not in (-signal.SIGKILL, 0):
                faults.append(f"before operation {at}: {done}")
            for _ in range(chance.choice([1, 1, 2])):
                faults_done = damage(bench.work, bench.case.out, chance)
        bench.age()
        done = bench.run([*bench.case.words, "--resume"])
        if done.code != 0:
            faults.append(f"after {faults_done}, --resume exits with {done.code}: {done.said[-300:]}")
        elif tree(bench.case.out) != bench.new:
            faults.append(f"after {faults_done}, --resume makes another result")
        if left := bench.left():
            faults.append(f"after {faults_done}, left after --resume: {left}")
        return Round(what, 1, faults)


def damage(work: Path, result: Path, chance: random.Random) -> str:
    """Change one of the files that a killed run has left beside the result; says what was done.

    A result that was killed between its renames is complete, and counts as published.
    """
    complete = [result, *result.parent.glob(f".{result.name}.new-*")]
    # Ranks have a second name in the result.
    published = {path.stat().st_ino for folder in complete for path in (folder, *folder.rglob("*")) if path.exists()}
    files = [path for path in sorted(work.rglob("*")) if path.is_file() and path.stat().st_ino not in published]
    files = [path for path in files if "lock" not in path.name and path != result]  # what it says of others is believed
    if not files:
        return "nothing"
    file = chance.choice(files)
    how = chance.choice(["truncate", "extend", "flip", "remove", "zero", "repeat"])
    data = bytearray(file.read_bytes())
    if how == "truncate":
        del data[chance.randrange(len(data) + 1) :]
    elif how == "extend":
        data += chance.choice([b"\xff\xfe", b"[" * 50_000, b"\n", b"[1e999, 1, []]\n", chance.randbytes(99)])
    elif how == "flip" and data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == "zero":
        data[:] = bytes(len(data))
    elif how == "repeat":
        data.extend(bytes(data))
    if how == "remove":
        file.unlink()
    else:
        os.truncate(file, 0)
        file.write_bytes(data)
    return f"{how} {file.relative_to(work)}"
