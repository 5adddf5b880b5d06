"""File systems that lack something, and the commands on them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cases import Bench, cases, write_inputs
from child import Lacks


class Disk(NamedTuple):
    """A file system: what it lacks, how often it is drawn, and whether the shim has to take that away."""

    lacks: Lacks
    weight: float = 1
    by_shim: bool = True


DISKS = {
    "all": Disk(Lacks.NOTHING, 2),
    "no exchange": Disk(Lacks.EXCHANGE, 2),
    "no locks": Disk(Lacks.LOCKS),
    "no links": Disk(Lacks.LINKS | Lacks.EXCHANGE),
    "nothing": Disk(Lacks.EXCHANGE | Lacks.LOCKS | Lacks.LINKS | Lacks.ROOM_AHEAD),
}
COMMANDS = list(cases(Path("/")))


class Benches:
    """All commands on some file systems, each made when it is drawn for the first time.

    `folders` has a folder for each file system.
    """

    def __init__(self, folders: Mapping[str, Path], disks: Mapping[str, Disk] = DISKS) -> None:
        self._folders, self._disks = folders, disks
        self._inputs: Path | None = None
        self._made: dict[tuple[str, str], Bench] = {}

    @classmethod
    def below(cls, folder: Path) -> Benches:
        """On the file system of one folder, from which the shim takes something away."""
        return cls(dict.fromkeys(DISKS, folder))

    def draw(self, chance: random.Random, commands: Sequence[str]) -> tuple[str, Bench]:
        """One of these commands on some file system, with the old result in place; and what both are called."""
        command = chance.choice(commands)
        disk = chance.choices(list(self._disks), [disk.weight for disk in self._disks.values()])[0]
        bench = self._get(command, disk)
        bench.reset()
        return f"{command}; {disk}", bench

    def _get(self, command: str, name: str) -> Bench:
        if (command, name) not in self._made:
            folder, disk = self._folders[name] / f"{len(self._made)}", self._disks[name]
            folder.mkdir()
            if self._inputs is None:
                write_inputs(folder)
                self._inputs = folder / "in"
            else:
                shutil.copytree(self._inputs, folder / "in")
            self._made[command, name] = Bench(cases(folder)[command], disk.lacks, by_shim=disk.by_shim)
        return self._made[command, name]
