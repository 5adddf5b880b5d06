"""Kills one command before each of its operations on files, and looks at what is left. To be run with the shim.

    LD_PRELOAD=shim.so python driver.py FOLDER COMMAND EXCHANGE

A process that has imported everything forks a child for every run. Prints JSON: the operations of the command, and
what was wrong after which of them.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from cases import Bench, cases, write_inputs
from child import Act, Event, Lacks


def kill_everywhere(bench: Bench) -> dict[str, Any]:
    """Kill before one operation after the other."""
    faults = []
    for at in range(1, bench.operations + 1):
        bench.reset()
        done = bench.run(bench.case.words, Event(Act.KILL, at, at))
        if done.code != -signal.SIGKILL:
            faults.append(f"{at}: it was not killed, but ended with {done.code}")
        faults += [f"{at}: {fault}" for fault in bench.settle(resume=at % 2 == 1)]
    return {"operations": bench.operations, "faults": faults}


if __name__ == "__main__":
    root, name, way = sys.argv[1:]
    write_inputs(Path(root))
    lacks = Lacks.NOTHING if way == "exchange" else Lacks.EXCHANGE
    print(json.dumps(kill_everywhere(Bench(cases(Path(root))[name], lacks))))
