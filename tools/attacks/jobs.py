"""Jobs of four ranks with the whole hook, in which something goes wrong, and the next job on the same output dir.

MindSpore's parameters are stood in for by digests of their bytes, as in tests/auto/rank.py.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from child import CRASHED, NO_EVENT, Act, Child, Ended, Event, Lacks

from attacks.disks import DISKS
from attacks.kinds import Round

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "auto"))

import rank as program
from rank_jobs import expected, free_port, model_of, old_results, results
from recorded import recorded, slices_of, write_ranks

from mindformers_ckpt.job.cluster.environment import PORT_OFFSET

RANKS = 4
OPERATIONS = 80  # of a rank at most; one of them is that of the fault
TIMEOUT = 20.0  # transform_timeout of the jobs
SECONDS = 90.0  # after which a rank hangs


class Jobs:
    """A rank is killed, or its calls fail: the others end, with the right weights or an error, and so does the next."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._output = folder / "output"
        config = recorded("dp2mp2pp2")
        tensors = model_of(config)
        source = write_ranks(folder / "llama", slices_of(config, tensors, replicated=("global_step",)))
        self._wanted = expected("pp4", tensors)
        self._keys = {
            "load_checkpoint": str(source),
            "src_strategy_path_or_dir": str(config.folder),
            "auto_trans_ckpt": True,
            "output_dir": str(self._output),
            "transform_timeout": TIMEOUT,
        }

    def round(self, seed: int) -> Round:
        chance = random.Random(seed)
        disk = chance.choice(list(DISKS))
        shutil.rmtree(self._output, ignore_errors=True)
        self._output.mkdir()
        old_results(self._output)
        victim, event, moment = _fault(chance)
        where = f"rank {victim}, {event}" if moment is None else f"rank {victim} killed after {moment:.2f} s"
        try:
            ended = self._job(DISKS[disk].lacks, victim, event, moment)
            faults = [f"{where}: {fault}" for fault in self._faults(ended, victim)]
            again = self._job(DISKS[disk].lacks)
            faults += [f"{where}, the next job: {fault}" for fault in self._faults(again, -1)]
        except TimeoutError as error:
            faults = [f"{where}: {error}"]
        faults += [f"{where}: left: {left}" for left in self._left()]
        return Round(f"four ranks; {disk}", 1, faults)

    def _job(self, lacks: Lacks, victim: int = -1, event: Event = NO_EVENT, moment: float | None = None) -> list[Ended]:
        port = free_port() - PORT_OFFSET
        ranks = []
        for rank in range(RANKS):
            own = event if rank == victim else NO_EVENT
            ranks.append(Child(self._rank(rank, port), self._output, lacks, own))
        if moment is not None:
            time.sleep(moment)
            ranks[victim].kill(signal.SIGKILL)
        return [child.wait(SECONDS) for child in ranks]

    def _rank(self, rank: int, port: int) -> Callable[[], object]:
        environment = {
            "MS_ROLE": "MS_WORKER",
            "MS_WORKER_NUM": str(RANKS),
            "MS_NODE_ID": str(rank),
            "MS_SCHED_HOST": "127.0.0.1",
            "MS_SCHED_PORT": str(port),
            "MINDFORMERS_CKPT_NODE": f"node{rank // 2}",
        }

        def run() -> int:
            os.environ.update(environment)
            try:
                return program.take_part({"config": self._keys, "live": "pp4"})
            except OSError as error:  # shown by the training script
                sys.exit(f"error: {error}")

        return run

    def _faults(self, ended: list[Ended], victim: int) -> list[str]:
        faults = []
        for rank, end in enumerate(ended):
            if end.code == 0:
                if _loaded(end.said) != self._wanted[rank]:
                    faults.append(f"rank {rank} has loaded something else")
            elif victim < 0 or end.code == CRASHED or (end.code != 1 and rank != victim):
                faults.append(f"rank {rank}: {end.code}: {end.said[-600:]}")
        made = any(end.code == 0 for end in ended)
        if made and not any("transformed_checkpoint/llama" in name for name in results(self._output)):
            faults.append("ranks have loaded, but nothing is there")
        return faults

    def _left(self) -> list[str]:
        names = {path.name for path in self._output.iterdir()}
        return sorted(names - {"strategy", "transformed_checkpoint", ".checkpoint_hook.lock"})


def _fault(chance: random.Random) -> tuple[int, Event, float | None]:
    """The rank, and what happens there at which operation, or the moment of its death."""
    victim, at = chance.randrange(RANKS), chance.randint(1, OPERATIONS if chance.random() < 0.5 else 10)
    draw = chance.random()
    if draw < 0.35:
        return victim, NO_EVENT, chance.uniform(0, 2)
    if draw < 0.7:
        return victim, Event(Act.KILL, at, at), None
    last = at if chance.random() < 0.5 else 1 << 30
    return victim, Event(Act.FAIL, at, last, chance.choice([errno.EIO, errno.ENOSPC, errno.EACCES])), None


def _loaded(said: str) -> Mapping[str, Any] | None:
    for line in reversed(said.splitlines()):
        if line.startswith('{"loaded"'):
            found: Mapping[str, Any] = json.loads(line)["loaded"]
            return found
    return None
