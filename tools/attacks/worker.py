"""Runs rounds of one kind, one JSON line each: `python tools/attacks/worker.py KIND SECONDS SEED FOLDER [ROUND]`.

With ROUND, the seed of one round, that round alone. A line {"begin": seed} goes before each round, for the case that
the process does not survive it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "tests" / "kills")]

from attacks.kinds import KINDS  # noqa: E402


def seeds_of(kind: str, seed: int) -> Iterator[int]:
    """The seeds of all rounds."""
    chance = random.Random(f"{kind} {seed}")
    while True:
        yield chance.randrange(1 << 32)


def main(kind: str, seconds: float, seed: int, folder: Path, only: int | None = None) -> None:
    until = time.monotonic() + seconds  # loading counts, too
    attack = KINDS[kind].load(folder)
    for number in [only] if only is not None else seeds_of(kind, seed):
        print(json.dumps({"begin": number}), flush=True)
        what, executions, faults = attack.round(number)
        print(json.dumps({"what": what, "executions": executions, "faults": faults, "seed": number}), flush=True)
        if time.monotonic() > until:
            return


if __name__ == "__main__":
    words = sys.argv[1:]
    main(words[0], float(words[1]), int(words[2]), Path(words[3]), int(words[4]) if len(words) > 4 else None)
