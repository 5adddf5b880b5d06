"""Attack the library in many ways, and count: `python tools/campaign.py --minutes 3 [--seed S] [--only kills]`.

Commands are killed before their operations on files and at random moments, their calls fail, they get signals, their
disk is full, several write to one place, what a kill left is damaged before `--resume`, ranks of jobs die, strangers
come to the meeting of the ranks, and every reader gets files that are broken. All of that on file systems without
exchanged names, locks, links or room. Exit code 1 when anything happened that must not; each such round can be run
again: `--only KIND --round SEED`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kills")]

import checkout  # noqa: E402, F401 - finds the package of this checkout
from attacks.kinds import KINDS  # noqa: E402
from child import build  # noqa: E402

WORKER = ROOT / "tools" / "attacks" / "worker.py"
SLICE = 120.0  # seconds of one kind, before the next has its turn
MORE = 300.0  # seconds that a worker may take for its last round
SHOWN = 20  # faults of a kind


class Campaign:
    """Runs kinds in turn, each in processes of its own, and gathers what they report."""

    def __init__(self, seed: int, scratch: Path, shim: Path | None) -> None:
        self.seed, self._scratch, self._shim = seed, scratch, shim
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.faults: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
        self.seconds: dict[str, float] = defaultdict(float)
        self.shown: list[str] = []
        self.skipped: dict[str, str] = {}
        self._turns = 0

    def run(self, kind: str, seconds: float, only: int | None = None) -> None:
        """Attack for some seconds, or one round."""
        if KINDS[kind].shim and self._shim is None:
            self.skipped[kind] = "there is no gcc to compile the shim with"
            return
        self._turns += 1
        folder = self._scratch / f"{self._turns}"
        folder.mkdir()
        began = time.monotonic()
        words = [kind, str(seconds), str(self.seed + self._turns), str(folder), *([] if only is None else [str(only)])]
        process = subprocess.Popen(
            [sys.executable, str(WORKER), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment(kind),
        )
        try:
            said, cause = process.communicate(timeout=seconds + MORE)
        except subprocess.TimeoutExpired:
            process.kill()
            said, cause = process.communicate()
            cause += f"\nit does not end within {seconds + MORE:g} s"
        except BaseException:
            process.kill()
            raise
        self.seconds[kind] += time.monotonic() - began
        self.gather(kind, said, cause, process.returncode)
        shutil.rmtree(folder, ignore_errors=True)

    def _environment(self, kind: str) -> dict[str, str]:
        own = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if KINDS[kind].shim:
            own["LD_PRELOAD"] = str(self._shim)
        return {**os.environ, **own}

    def gather(self, kind: str, said: str, cause: str, code: int) -> None:
        """Take in the lines of a worker, its last words and its exit code."""
        lines: list[dict[str, Any]] = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        for line in lines:
            if "what" in line:
                self.counts[kind][line["what"]] += line["executions"]
                for fault in line["faults"]:
                    self._note(kind, line["what"], line["seed"], fault)
        if code != 0:
            begun = next((line["begin"] for line in reversed(lines) if "begin" in line), None)
            last = cause.strip().splitlines()[-1:] or [f"exit {code}"]
            if "CannotMountError" in last[0]:
                self.skipped[kind] = last[0].partition(": ")[2]
            else:
                self._note(kind, "the process itself", begun or 0, last[0])

    def _note(self, kind: str, what: str, seed: int, fault: str) -> None:
        self.faults[kind].append((what, seed, fault))
        if len(self.faults[kind]) <= SHOWN:
            self.shown.append(f"FAULT {kind}: {what}: {fault}\n  {_command(kind, seed)}")
            print(self.shown[-1], flush=True)

    def table(self) -> str:
        """What was attacked, how often, and how many faults there were."""
        lines = [f"{'kind':<10} {'what':<42} {'executions':>12} {'faults':>7}"]
        for kind in KINDS:
            if kind in self.skipped:
                lines.append(f"{kind:<10} skipped: {self.skipped[kind]}")
            faults = Counter(what for what, _, _ in self.faults[kind])
            for what in sorted({*self.counts[kind], *faults}):
                lines.append(f"{kind:<10} {what:<42} {self.counts[kind][what]:>12,} {faults[what]:>7}")
        return "\n".join(lines)

    def totals(self) -> str:
        """One line a kind."""
        lines = [f"{'kind':<10} {'executions':>12} {'faults':>7} {'minutes':>8}"]
        for kind in KINDS:
            if self.counts[kind] or self.faults[kind]:
                count, faults = sum(self.counts[kind].values()), len(self.faults[kind])
                lines.append(f"{kind:<10} {count:>12,} {faults:>7} {self.seconds[kind] / 60:>8.1f}")
        count, faults = sum(sum(found.values()) for found in self.counts.values()), self.fault_count
        lines.append(f"{'all':<10} {count:>12,} {faults:>7} {sum(self.seconds.values()) / 60:>8.1f}")
        return "\n".join(lines)

    @property
    def fault_count(self) -> int:
        return sum(map(len, self.faults.values()))


def _command(kind: str, seed: int) -> str:
    """What shows a fault again."""
    return f"python tools/campaign.py --only {kind} --round {seed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=None, help="left out: drawn, and printed")
    parser.add_argument("--only", choices=list(KINDS), action="append")
    parser.add_argument("--round", type=int, default=None, help="one round of the kind that --only names")
    parser.add_argument("--scratch", type=Path, default=None, help="a folder on the disk to work on")
    options = parser.parse_args()
    seed = random.randrange(1 << 31) if options.seed is None else options.seed
    kinds = options.only or list(KINDS)
    if options.round is not None and len(kinds) != 1:
        parser.error("--round goes with one --only")
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        shim = build(Path(scratch)) if shutil.which("gcc") else None
        campaign = Campaign(seed, Path(scratch), shim)
        if options.round is not None:
            campaign.run(kinds[0], 0, options.round)
        else:
            with contextlib.suppress(KeyboardInterrupt):  # what was found until then is shown
                _in_turn(campaign, kinds, options.minutes * 60)
    print(f"{campaign.table()}\n\n{campaign.totals()}")
    for shown in campaign.shown:  # again, where the end of a long log shows them
        print(shown)
    return 1 if campaign.fault_count else 0


def _in_turn(campaign: Campaign, kinds: list[str], seconds: float) -> None:
    """Give every kind its share of the time, in slices. What one takes longer, the others have less."""
    slices = max(1, round(seconds / (SLICE * len(kinds))))
    turns = [kind for _ in range(slices) for kind in kinds]
    until = time.monotonic() + seconds
    for number, kind in enumerate(turns):
        shares = sum(KINDS[other].share for other in turns[number:])
        campaign.run(kind, max(0.0, until - time.monotonic()) * KINDS[kind].share / shares)
        if kind == kinds[-1] and number + 1 < len(turns):
            print(f"{(seconds - until + time.monotonic()) / 60:.1f} minutes\n{campaign.totals()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
