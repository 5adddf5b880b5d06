"""Several commands for one destination at the same time, one of which may be killed."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from cases import Tree, cases, tree, write_inputs
from child import NO_EVENT, Act, Child, Ended, Event, Lacks

from attacks.disks import DISKS
from attacks.kinds import Round

OPERATIONS = 90  # of which one is that of the kill


class Writers:
    """What is there in the end is the result of one of those that said so, or all ranks of all of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        write_inputs(folder)
        write_inputs(folder / "other")
        self._work = folder / "work"
        self._work.mkdir()
        self._words = _commands(folder)
        self._trees = {name: self._alone(name) for name in self._words}
        self._reset()
        for name in ("ranks 0,1", "ranks 2,3"):
            self._start(name, Lacks.NOTHING).wait()
        self._all_ranks = tree(self._work / "out")

    def round(self, seed: int) -> Round:
        chance = random.Random(seed)
        self._reset()
        disk = chance.choice(list(DISKS))
        lacks = DISKS[disk].lacks
        pair = chance.choice(PAIRS)
        names = chance.sample(pair, len(pair))
        victim = chance.randrange(len(names)) if chance.random() < 0.3 else -1
        at = chance.randint(1, OPERATIONS)
        children = []
        for number, name in enumerate(names):
            event = Event(Act.KILL, at, at) if number == victim else NO_EVENT
            children.append(self._start(name, lacks, event))
        try:
            ended = [child.wait(90) for child in children]
            faults = self._faults(names, ended, victim)
        except TimeoutError as error:
            faults = [str(error)]
        return Round(f"{' and '.join(sorted(pair))}; {disk}", len(names), [f"{names}: {fault}" for fault in faults])

    def _faults(self, names: Sequence[str], ended: Sequence[Ended], victim: int) -> list[str]:
        faults = [f"{end}" for end in ended if end.code not in (0, 1, -signal.SIGKILL) or "Traceback" in end.said]
        good = [name for name, end in zip(names, ended) if end.code == 0]
        state = tree(self._work / "out")
        wanted: list[Tree | None] = [self._trees[name] for name in good]
        if {"ranks 0,1", "ranks 2,3"} <= set(good):
            wanted = [self._all_ranks]
        if victim >= 0 and ended[victim].code != 0:
            # It may have died just after its result took its place, or just before.
            wanted += [None, self._trees[names[victim]], self._all_ranks]
        elif not good:
            faults.append(f"nobody was allowed to write: {[end.said[-200:] for end in ended]}")
        if state not in wanted:
            faults.append(f"the result is that of none of {good}: {[end.code for end in ended]} {sorted(state or {})}")
        kept = " ".join(end.said for end in ended)  # what is finished of one that is refused is kept, and it says so
        left = sorted(path.name for path in self._work.iterdir() if path.name != "out" and path.name not in kept)
        if left and victim < 0:
            faults.append(f"left: {left}")
        return faults

    def _start(self, name: str, lacks: Lacks, event: Event = NO_EVENT) -> Child:
        case, words = cases(self._folder)["transform"], self._words[name]
        return Child(lambda: case.run(words), self._work, lacks, event)

    def _alone(self, name: str) -> Tree | None:
        self._reset()
        ended = self._start(name, Lacks.NOTHING).wait()
        assert ended.code == 0, ended.said
        return tree(self._work / "out")

    def _reset(self) -> None:
        for path in self._work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _commands(folder: Path) -> dict[str, list[str]]:
    def words(source: str, strategy: str, *more: str) -> list[str]:
        paths = ["--src-checkpoint", f"{folder / source}", "--dst-strategy", f"{folder / 'in' / strategy}"]
        return ["transform", "--quiet", *paths, "--dst-checkpoint-dir", f"{folder / 'work/out'}", *more]

    return {
        "mp2pp2": words("in/full.ckpt", "mp2pp2", "--overwrite"),
        "dp2mp2": words("in/full.ckpt", "dp2mp2", "--overwrite"),
        "ranks 0,1": words("in/full.ckpt", "mp2pp2", "--ranks", "0,1"),
        "ranks 2,3": words("in/full.ckpt", "mp2pp2", "--ranks", "2,3"),
        "other ranks 2,3": words("other/in/full.ckpt", "mp2pp2", "--ranks", "2,3"),
    }


PAIRS = [
    ["mp2pp2", "dp2mp2"],
    ["mp2pp2", "dp2mp2", "mp2pp2"],
    ["ranks 0,1", "ranks 2,3"],
    ["ranks 0,1", "other ranks 2,3"],
]
