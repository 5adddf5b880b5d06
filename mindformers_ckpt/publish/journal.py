"""The journal of a run: what it finished, each with a proof, so that a later run goes on from there.

Nothing in it is believed. A record counts when its line is whole, when it is of this plan, and when the staging files
still hold what the task wrote; every other task is done again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence

from mindformers_ckpt.engine.proof import is_proved
from mindformers_ckpt.engine.tasks import Done, SourceShare, Task, TensorHash, TensorShare
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.publish.staging import Staging


class Journal:
    """The records of finished tasks in a staging folder, for runs of one fingerprint."""

    def __init__(self, staging: Staging, fingerprint: str) -> None:
        self._staging = staging
        self._fingerprint = fingerprint

    def proved(self, plan: Plan, tasks: Sequence[Task], check: Callable[[], None]) -> list[Done]:
        """The tasks that an earlier run finished and whose bytes are in the staging files."""
        by_number = {task.number: task for task in tasks}
        recorded = {done.task: done for done in map(self._parse, self._staging.records()) if done is not None}
        candidates = [(by_number[number], done) for number, done in recorded.items() if number in by_number]
        proofs = [(task, done.proof) for task, done in candidates]
        proved = is_proved(proofs, self._staging.folder, plan.targets, check)
        return [
            done._replace(bytes_written=task.bytes_written) for (task, done), holds in zip(candidates, proved) if holds
        ]

    def start(self, done: Iterable[Done]) -> None:
        """Begin anew, with what proved true."""
        self._staging.start_records(map(self._line, done))

    def add(self, done: Done) -> None:
        """Note a finished task."""
        self._staging.record([self._line(done)])

    def _line(self, done: Done) -> str:
        values = [done.task, done.bytes_written, done.hashes, done.proof, done.shares, done.sources]
        return json.dumps([*values, self._checksum(values)])

    def _checksum(self, values: Sequence[object]) -> int:
        return zlib.crc32((self._fingerprint + json.dumps(values)).encode())

    def _parse(self, line: str) -> Done | None:
        """The record of a line, None for a line that is damaged, or of another run."""
        try:
            *values, checksum = json.loads(line)
            if checksum != self._checksum(values):
                return None
            number, written, hashes, proof, shares, sources = values
            return Done(
                number,
                written,
                tuple(TensorHash(*entry) for entry in hashes),
                proof,
                tuple(TensorShare(*entry) for entry in shares),
                tuple(SourceShare(*entry) for entry in sources),
            )
        except (ValueError, TypeError, RecursionError):
            return None
