"""Re-slicing from one folder to another: plan, space, staging, copy, publish."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ckpt.engine.copier import Done, cut_into_tasks
from mindformers_ckpt.engine.pool import copy_tasks
from mindformers_ckpt.engine.shard_io import BLOCK_BYTES, TRANSPOSE_BYTES, FileSink
from mindformers_ckpt.errors import PlanError, PublishError, TransferError
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.publish import MANIFEST_FILE, Staging, check_free_space, read_manifests

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """How to run a plan.

    Attributes:
        processes: processes that copy, this one included (`transform_process_num`).
        by_rank: one target rank is the unit of work (`transform_by_rank`), instead of equal shares of bytes.
        hashes: take xxh3-128 of every written tensor into the manifest.
        fsync: force everything to the disk before the result is put in place.
        crc: append the CRC-32 trailer that `mindspore.load_checkpoint(crc_check=True)` verifies.
        overwrite: replace a destination that is not empty.
        resume: go on after the finished tasks of an interrupted run of the same plan; nothing is left to do
            when the destination holds its whole result.
        partial: the plan makes some of the ranks only; they are put beside the ones that are there.
        may_fork: start processes by fork where that is safe. Not for a process with connections to others.
    """

    processes: int = 1
    by_rank: bool = False
    hashes: bool = False
    fsync: bool = False
    crc: bool = False
    overwrite: bool = False
    resume: bool = False
    partial: bool = False
    may_fork: bool = False


@dataclass(frozen=True)
class Report:
    """What a run did."""

    destination: Path
    files: int
    bytes_read: int
    bytes_written: int
    resumed_bytes: int
    seconds: float


def transform(
    plan: Plan,
    destination: Path,
    options: Options = Options(),
    *,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
    companions: Callable[[Path], None] = lambda folder: None,
) -> Report:
    """Run a plan and publish its result at `destination`.

    `about` goes into the manifest, `progress` is told the bytes written and the total after every task,
    `check` is called between blocks and may raise to stop, `companions` puts further files into the folder of
    the result before it is published. Raises TransferError and PublishError; then the destination is as it was.
    """
    started = time.monotonic()
    destination = Path(destination).absolute()
    check_apart(plan, destination)
    fingerprint = fingerprint_of(plan, options)
    about = about or {}
    made = read_manifests(destination)
    if options.resume and any(manifest.get("plan") == fingerprint for manifest in made.values()):
        return _report(plan, destination, plan.bytes_written, started)
    if options.partial:
        check_addable(plan, destination, about, made, options.overwrite)
    staging = Staging(destination, fingerprint, options.overwrite, options.resume, add=options.partial)
    with staging:
        finished = staging.finished_tasks()
        resumed = sum(task.bytes_written for task in finished.values())
        check_free_space(staging.folder, plan.bytes_written - resumed)
        done = write_files(
            plan,
            staging.folder,
            options,
            finished=finished,
            record=staging.record,
            progress=progress,
            check=check,
        )
        manifest = describe_result(plan, staging.folder, fingerprint, done, about)
        companions(staging.folder)
        name = MANIFEST_FILE if not options.partial else partial_manifest_name(plan)
        staging.publish(manifest, name=name, fsync=options.fsync)
    return _report(plan, destination, resumed, started)


def _report(plan: Plan, destination: Path, resumed: int, started: float) -> Report:
    seconds = time.monotonic() - started
    return Report(destination, len(plan.targets), plan.bytes_read, plan.bytes_written, resumed, seconds)


def ranks_of(plan: Plan) -> list[int]:
    """The target ranks that a plan makes, in order."""
    return sorted({target.rank for target in plan.targets})


def affordable_processes(wanted: int) -> int:
    """So many of the wanted processes as the free memory is enough for, at least one."""
    if wanted == 1:
        return 1
    from mindformers_ckpt.engine.machine import MEMORY_PER_PROCESS, free_memory

    return max(1, min(wanted, free_memory() // MEMORY_PER_PROCESS))


def write_files(
    plan: Plan,
    folder: Path,
    options: Options,
    *,
    finished: dict[int, Done] | None = None,
    record: Callable[[list[Done]], None] = lambda done: None,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[Done]:
    """Write the target files of a plan under `folder`, all but the tasks already `finished`."""
    done = dict(finished or {})
    tasks = cut_into_tasks(plan, by_rank=options.by_rank, whole_tensors=options.hashes)
    total = plan.bytes_written
    written = sum(task.bytes_written for task in done.values())
    sink = FileSink(folder, plan.targets)
    if not done:
        for file in range(len(plan.targets)):
            sink.prepare(file)
        record([])
    pending = [task for task in tasks if task.number not in done]
    copied = copy_tasks(
        plan,
        folder,
        pending,
        processes=options.processes,
        hashes=options.hashes,
        may_fork=options.may_fork,
        check=check,
    )
    with contextlib.closing(copied):  # whatever goes wrong here, the workers end before the folder is removed
        for task in copied:
            record([task])
            done[task.task] = task
            written += task.bytes_written
            if progress is not None:
                progress(written, total)
    if options.crc:
        _append_crcs(sink, plan)
    return list(done.values())


def check_apart(plan: Plan, destination: Path) -> None:
    """Refuse a destination that holds a source file: publishing would replace it."""
    real = destination.resolve()
    inside = [file.path for file in plan.sources if file.path.resolve().is_relative_to(real)]
    if inside:
        raise PlanError(f"the target folder {destination} holds the source file {inside[0]}; choose another folder")


def check_addable(
    plan: Plan, destination: Path, about: dict[str, Any], made: dict[str, dict[str, Any]], overwrite: bool
) -> None:
    """Refuse to put ranks beside those of another run, or (without `overwrite`) over ranks that are there.

    `made` are the manifests at the destination. Raises PublishError.
    """
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    if not made:
        raise PublishError(f"{destination} holds something else than the other ranks; choose another folder")
    for name, manifest in made.items():
        if any(manifest.get(key) != value for key, value in about.items()):
            raise PublishError(
                f"{destination} holds ranks of another source or target ({name}); they cannot be mixed: "
                "choose another folder"
            )
    taken = sorted({Path(target.path).parent for target in plan.targets if (destination / target.path).parent.exists()})
    if taken and not overwrite:
        listed = ", ".join(map(str, taken[:8]))
        raise PublishError(f"{destination} already holds {listed}; allow to replace them with --overwrite")


def fingerprint_of(plan: Plan, options: Options) -> str:
    """A digest of everything that decides which bytes are written where, and of the sources' identity."""
    from mindformers_ckpt import __version__

    # A journal counts tasks, and their cut changes with these.
    digest = hashlib.blake2b(f"{__version__} {BLOCK_BYTES} {TRANSPOSE_BYTES}\n".encode(), digest_size=16)
    for file in plan.sources:
        try:
            status = file.path.stat()
        except OSError as error:
            raise TransferError(f"{file.path}: cannot be read: {error.strerror}") from error
        digest.update(f"{file.path} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    for target in plan.targets:
        digest.update(f"{target.path} {target.format} {target.metadata}\n".encode(errors="surrogateescape"))
    for transfer in plan.transfers:
        digest.update(repr(transfer).encode())
    digest.update(f"{options.by_rank} {options.hashes} {options.crc}".encode())
    return digest.hexdigest()


def describe_result(
    plan: Plan, folder: Path, fingerprint: str, done: Collection[Done], about: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a result: what was made of what, and the files with their sizes and hashes."""
    from mindformers_ckpt import __version__

    hashes: dict[int, dict[str, str]] = {}
    for task in done:
        for tensor in task.hashes:
            hashes.setdefault(tensor.file, {})[tensor.name] = tensor.digest
    files = []
    for number, target in enumerate(plan.targets):
        size = (folder / target.path).stat().st_size
        entry = {"path": target.path, "rank": target.rank, "bytes": size, "tensors": len(target.tensors)}
        if number in hashes:
            entry["xxh3_128"] = hashes[number]
        files.append(entry)
    return {
        "mindformers_ckpt": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "plan": fingerprint,
        **about,
        "sources": [{"path": str(file.path), "bytes": file.size} for file in plan.sources],
        "files": files,
    }


def partial_manifest_name(plan: Plan) -> str:
    """Manifest name of a run that makes some ranks only: several such runs share a destination."""
    ranks = ranks_of(plan)
    spans = f"{ranks[0]}-{ranks[-1]}"
    if len(ranks) <= ranks[-1] - ranks[0]:
        spans += "_" + hashlib.blake2b(repr(ranks).encode(), digest_size=4).hexdigest()  # some in between are not
    return f"manifest_rank_{spans}.json"


def _append_crcs(sink: FileSink, plan: Plan) -> None:
    from mindformers_ckpt.formats import ckpt

    for number, target in enumerate(plan.targets):
        # A run that was interrupted here has appended some.
        if target.format == "ckpt" and read_header(sink.path(number)).crc is None:
            ckpt.append_crc(sink.path(number))
