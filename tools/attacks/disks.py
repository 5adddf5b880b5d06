"""File systems that lack something: most by the shim, a small one and one of FUSE by mounting them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from cases import Bench, cases, write_inputs
from child import Lacks

ALL = Lacks.EXCHANGE | Lacks.LOCKS | Lacks.LINKS | Lacks.ROOM_AHEAD
# What is lacking -> how often it is drawn.
DISKS: dict[str, tuple[Lacks, float]] = {
    "all": (Lacks.NOTHING, 2),
    "no exchange": (Lacks.EXCHANGE, 2),
    "no locks": (Lacks.LOCKS, 1),
    "no links": (Lacks.LINKS | Lacks.EXCHANGE, 1),
    "nothing": (ALL, 1),
}


class Benches:
    """All commands on all file systems, each made when it is drawn for the first time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._inputs: Path | None = None
        self._made: dict[tuple[str, str], Bench] = {}

    def draw(self, chance: random.Random, commands: Sequence[str]) -> tuple[str, Bench]:
        """One of these commands on some file system, with the old result in place; and what both are called."""
        command = chance.choice(commands)
        disk = chance.choices(list(DISKS), [weight for _, weight in DISKS.values()])[0]
        bench = self.get(command, disk)
        bench.reset()
        return f"{command}; {disk}", bench

    def get(self, command: str, disk: str) -> Bench:
        """A command on a file system."""
        if (command, disk) not in self._made:
            folder = self._folder / f"{len(self._made)}"
            folder.mkdir()
            if self._inputs is None:
                write_inputs(folder)
                self._inputs = folder / "in"
            else:
                shutil.copytree(self._inputs, folder / "in")
            self._made[command, disk] = Bench(cases(folder)[command], DISKS[disk][0])
        return self._made[command, disk]


COMMANDS = list(cases(Path("/")))
