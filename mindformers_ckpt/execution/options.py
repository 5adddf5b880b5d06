"""How a plan is to be run, and what a run did."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindformers_ckpt.planning.model import Plan


@dataclass(frozen=True)
class Options:
    """How to run a plan.

    Attributes:
        processes: processes that copy, this one included (`transform_process_num`).
        by_rank: one target rank is the unit of work (`transform_by_rank`), instead of equal shares of bytes.
        hashes: take xxh3-128 of every written tensor into the manifest.
        fingerprints: count the checksum of every whole tensor while it is copied, into the manifest.
        sign: a private key (PEM) to sign the fingerprints with, which are counted then.
        fsync: force everything to the disk before the result is put in place.
        crc: append the CRC-32 trailer that `mindspore.load_checkpoint(crc_check=True)` verifies.
        overwrite: replace an earlier result at the destination.
        overwrite_anything: replace whatever is at the destination.
        resume: go on after the finished tasks of an interrupted run of the same plan; nothing is left to do
            when the destination holds its whole result.
        partial: the plan makes some of the ranks only; they are put beside the ones that are there.
        may_fork: start processes by fork where that is safe. Not for a process with connections to others.
        drop_cache: leave nothing of what is read and written in the page cache.
        keep: keep what is finished when the run fails, for `resume`.
    """

    processes: int = 1
    by_rank: bool = False
    hashes: bool = False
    fingerprints: bool = False
    sign: Path | None = None
    fsync: bool = False
    crc: bool = False
    overwrite: bool = False
    overwrite_anything: bool = False
    resume: bool = False
    partial: bool = False
    may_fork: bool = False
    drop_cache: bool = False
    keep: bool = True


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        destination: where the result is.
        files: number of files in it.
        bytes_read, bytes_written: bytes of tensors, `resumed_bytes` of the latter by an earlier run.
        seconds: how long it took.
        fingerprints: digests of the checkpoints in the result, by their folders (mostly "."), where they are asked for.
        source_fingerprint: that of the source; "" where it was not asked for, or is not known from what was read.
        signature: what became of signatures: "made with …", "taken over from …" or "left behind: …"; "" without any.
        warnings: what the user should know of choices that were made.
    """

    destination: Path
    files: int
    bytes_read: int
    bytes_written: int
    resumed_bytes: int
    seconds: float
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    source_fingerprint: str = ""
    signature: str = ""
    warnings: tuple[str, ...] = ()


def report_of(plan: Plan, destination: Path, began: float, resumed: int, **told: Any) -> Report:
    """What a run of a plan did that began at a time of `time.monotonic`; `told` are the fields with defaults."""
    return Report(
        destination,
        len(plan.targets),
        plan.bytes_read,
        plan.bytes_written,
        resumed,
        time.monotonic() - began,
        **told,
    )


def affordable_processes(wanted: int) -> int:
    """So many of the wanted processes as the free memory is enough for, at least one."""
    if wanted == 1:
        return 1
    from mindformers_ckpt.engine.machine import MEMORY_PER_PROCESS, free_memory

    return max(1, min(wanted, free_memory() // MEMORY_PER_PROCESS))
