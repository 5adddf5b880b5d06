"""Kills one command before each of its operations on files, and looks at what is left. To be run with the shim.

    LD_PRELOAD=shim.so python driver.py FOLDER COMMAND WAY [KILLS]

WAY is what the file system can do: see WAYS. KILLS: not all operations, but so many of them, the last ones among them.
A process that has imported everything forks a child for every run. Prints JSON: the operations of the command, and
what was wrong after which of them.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import Bench, cases, write_inputs
from child import Act, Event, Lacks

# What is lacking, and whether the shim takes it away or the folder is on such a file system.
WAYS = {
    "exchange": (Lacks.NOTHING, True),
    "three renames": (Lacks.EXCHANGE, True),
    "mounted": (Lacks.EXCHANGE, False),
    "mounted, no locks": (Lacks.EXCHANGE | Lacks.LOCKS, False),
}


def kill_everywhere(bench: Bench, kills: int | None = None) -> dict[str, Any]:
    """Kill before one operation after the other, or before some of them: half of these among the last."""
    faults = []
    every = range(1, bench.operations + 1)
    chosen: Sequence[int] = every
    if kills is not None:
        late = every[-2 * kills :]
        chosen = sorted(
            {*every[:: max(1, 2 * len(every) // kills)], *late[:: max(1, 2 * len(late) // kills)], every[-1]}
        )
    for at in chosen:
        bench.reset()
        done = bench.run(bench.case.words, Event(Act.KILL, at, at))
        if done.code != -signal.SIGKILL:
            faults.append(f"{at}: it was not killed, but ended with {done.code}")
        faults += [f"{at}: {fault}" for fault in bench.settle(resume=at % 2 == 1)]
    return {"operations": bench.operations, "kills": len(chosen), "faults": faults}


if __name__ == "__main__":
    root, name, way, *kills = sys.argv[1:]
    write_inputs(Path(root))
    lacks, by_shim = WAYS[way]
    bench = Bench(cases(Path(root))[name], lacks, by_shim=by_shim)
    print(json.dumps(kill_everywhere(bench, int(kills[0]) if kills else None)))
