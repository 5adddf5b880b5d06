"""One run of a plan, from its check to its result: prepare, copy, publish. The sequence behind every command and job.

with Run(plan, destination, options) as run:
    run.prepare()              # room on the disk, the target files, what an earlier run finished
    run.copy()                 # all tasks, or the share of one node
    run.publish()              # are the sources what they were? manifest, and the name of the destination
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from mindformers_ckpt.disk.files import FileState
from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.engine import page_cache
from mindformers_ckpt.engine.buffers import BLOCK_BYTES, PIECE_BYTES, TRANSPOSE_BYTES
from mindformers_ckpt.engine.object_sink import Uploads
from mindformers_ckpt.engine.pool import copy_tasks
from mindformers_ckpt.engine.sinks import FileSink
from mindformers_ckpt.engine.tasks import Done, Task, cut_into_tasks
from mindformers_ckpt.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    PlanError,
    PublishError,
    TransferError,
)
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.objects.path import absolute
from mindformers_ckpt.planning.digest import digest_of
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.planning.source_states import changed_files, check_unchanged, states_of
from mindformers_ckpt.publish import MANIFEST_FILE, Staging, check_free_space, read_manifests
from mindformers_ckpt.publish.counted import LEFT_ASIDE, Counted
from mindformers_ckpt.publish.fingerprints import check_countable
from mindformers_ckpt.publish.journal import Journal
from mindformers_ckpt.publish.manifest import is_whole
from mindformers_ckpt.publish.results import check_addable, describe_result, partial_manifest_name
from mindformers_ckpt.publish.signature import check_key, find_bundle, left_behind
from mindformers_ckpt.publish.source_fingerprint import Origin
from mindformers_ckpt.publish.staging import Kind, Replace

Progress = Callable[[int, int], None]


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
        source_fingerprint: that of the source; "" where it was not asked for, or is not known from what was copied.
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


class Run:
    """One run of a plan, used as a context manager. A failure leaves the destination as it was.

    `about` goes into the manifest. The destination is a folder, or with `file` the plan's only target file. `shapes`
    are those of target tensors that the plan has in another form, `origins` the tensors of the source where it is not
    only cut in another way: both for fingerprints.
    Raises PlanError when the destination holds a source file, PublishError when it may not be replaced or another
    process is writing it, TransferError when a source cannot be read.
    """

    def __init__(
        self,
        plan: Plan,
        destination: Path,
        options: Options = Options(),
        *,
        about: Mapping[str, Any] | None = None,
        file: bool = False,
        identity: str | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        origins: Iterable[Origin] | None = None,
    ) -> None:
        self._started = time.monotonic()
        if options.sign is not None:
            options = replace(options, fingerprints=True)
        self.plan, self.options = plan, options
        self.destination = absolute(destination)
        self._about = dict(about or {})
        self._shapes = dict(shapes or {})
        self._origins = None if origins is None else tuple(origins)
        check_apart(plan, self.destination)
        if options.fingerprints:
            _check_countable(plan, options)
        if options.sign is not None:
            _check_signable(options.sign, file)
        self.digest = digest_of(plan)
        self._states = states_of(plan.sources)
        self.fingerprint = identity or identity_of(self.digest, self._states, options)
        self._staging = Staging(
            self.destination,
            self.fingerprint,
            self._replaceable(),
            options.resume,
            Kind.FILE if file else Kind.PART if options.partial else Kind.FOLDER,
            is_made=self._is_made,
            check=self._check_beside,
            is_ours=is_checkpoint,
        )
        self._journal = Journal(self._staging, self.fingerprint)
        self._done: dict[int, Done] = {}
        self._resumed_bytes = 0
        self._signature = ""

    def __enter__(self) -> Run:
        self._staging.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._staging.has_records and changed_files(self._states):
            self._staging.has_records = False  # what was made of two sources is of no use
        self._staging.__exit__(kind, error, trace)
        if isinstance(error, (TransferError, PublishError)) and self.is_kept:
            raise type(error)(
                f"{error}\n  What is finished is kept in {self.folder}: the same command with --resume goes on"
            ) from error

    @property
    def folder(self) -> Path:
        """Where the result is written until it is published."""
        return self._staging.folder

    @property
    def is_kept(self) -> bool:
        """Whether finished work is recorded, from which a run with `resume` can go on."""
        return self._staging.has_records and self.folder.is_dir()

    @property
    def already_made(self) -> bool:
        """Whether the destination has the whole result of this plan, so that nothing is to be done."""
        return self._staging.already_made

    @property
    def about(self) -> dict[str, Any]:
        """What the manifest says of the run."""
        return self._about

    def tasks(self) -> list[Task]:
        """The work of the whole plan."""
        return cut_into_tasks(self.plan, by_rank=self.options.by_rank, whole_tensors=self.options.hashes)

    def prepare(self, files: Sequence[int] | None = None, check: Callable[[], None] = lambda: None) -> None:
        """Make all target files, or those given, with room for their contents; find what an earlier run finished."""
        if self.already_made:
            return
        sink = FileSink(self.folder, self.plan.targets)
        if self.options.resume:
            self._staging.keep_only({target.path for target in self.plan.targets})
            done = self._journal.proved(self.plan, self.tasks(), check)
            self._done = {task.task: task for task in done}
            self._resumed_bytes = sum(task.bytes_written for task in done)
        check_free_space(self.folder, self._missing_bytes(files))
        for file in range(len(self.plan.targets)) if files is None else files:
            (sink.repair if self._done else sink.prepare)(file)
        self._journal.start(self._done.values())

    def copy(
        self,
        tasks: Iterable[Task] | None = None,
        *,
        processes: int | None = None,
        progress: Progress | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy all tasks, or those given, but for what is done. `check` is called between blocks and may raise.

        `progress` is told the bytes written and the total after every task. Raises TransferError when a source file
        is not what it was when the run began.
        """
        if self.already_made:
            return
        pending = [task for task in (self.tasks() if tasks is None else tasks) if task.number not in self._done]
        copy_into(
            self.plan,
            self.folder,
            pending,
            self.options if processes is None else replace(self.options, processes=processes),
            progress=progress,
            check=check,
            before=self._resumed_bytes,
            report=self._finished,
            proofs=self.options.keep,
        )
        check_unchanged(self._states)

    def publish(
        self,
        companions: Callable[[Path], None] = lambda folder: None,
        *,
        manifest: Mapping[str, Any] | None = None,
    ) -> Report:
        """Put the result in place, with a manifest and further files that `companions` puts into its folder."""
        if not self.already_made:
            if self.options.crc:
                _append_crcs(self.plan, self.folder)
                if self.options.drop_cache:
                    _drop(self.folder / target.path for target in self.plan.targets)
            self._add_companions(self._sign, self.folder)
            self._add_companions(companions, self.folder)
            is_file = self._staging.kind is Kind.FILE
            content = None if is_file else manifest or self._describe()
            name = partial_manifest_name(self.plan) if self.options.partial else MANIFEST_FILE
            self._staging.publish(content, name=name, fsync=self.options.fsync)
        elif self.options.sign is not None:
            self._add_companions(self._sign, self.destination)
        resumed = self.plan.bytes_written if self.already_made else self._resumed_bytes
        seconds = time.monotonic() - self._started
        plan = self.plan
        return Report(
            self.destination,
            len(plan.targets),
            plan.bytes_read,
            plan.bytes_written,
            resumed,
            seconds,
            self._counted.digests(),
            self._counted.source_digest(),
            self._signature,
        )

    def _add_companions(self, companions: Callable[[Path], None], folder: Path) -> None:
        try:
            companions(folder)
        except CheckpointError:
            raise
        except OSError as error:
            file = error.filename2 or error.filename or folder
            raise TransferError(f"{file}: cannot be written: {error.strerror}") from error

    def _sign(self, folder: Path) -> None:
        """Sign the fingerprints of the checkpoints in the result; without a key, keep the signature of the source."""
        if self.options.sign is not None:
            self._signature = self._counted.sign(folder, self.options.sign)
            return
        bundle = find_bundle(self.plan.sources[0].path) if self.plan.sources else None
        if bundle is not None and self._staging.kind is Kind.FILE:
            self._signature = left_behind(bundle, "it goes with a manifest, which a single file has not")
        elif bundle is not None:
            self._signature = self._counted.keep(bundle, folder)

    def _finished(self, task: Done) -> None:
        if self.options.keep:
            self._journal.add(task)
        self._done[task.task] = task

    def _missing_bytes(self, files: Sequence[int] | None) -> int:
        """What the target files will take on the disk, but for what they have."""
        plan = self.plan if files is None else self.plan.for_targets(files)
        held = (
            sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file()) if self._done else 0
        )
        return max(0, plan.bytes_written - held)

    def _own_manifests(self) -> list[dict[str, Any]]:
        """The manifests at the destination that are of this very plan."""
        made = read_manifests(self.destination).values()
        return [manifest for manifest in made if manifest.get("plan") == self.fingerprint]

    def _is_made(self) -> bool:
        return any(is_whole(self.destination, made) for made in self._own_manifests())

    def _replaceable(self) -> Replace:
        if self.options.overwrite_anything:
            return Replace.ANYTHING
        # With `resume` what this plan made is made again where a part of it is gone.
        is_own = self.options.resume and bool(self._own_manifests())
        return Replace.RESULTS if self.options.overwrite or is_own else Replace.NOTHING

    def _check_beside(self) -> None:
        if self.options.partial:
            may_replace = self._replaceable() is not Replace.NOTHING
            check_addable(self.plan, self.destination, self._about, may_replace, self._states)

    @cached_property
    def _counted(self) -> Counted:
        """The fingerprints of result and source; none where they were not asked for."""
        if not self.options.fingerprints:
            return Counted({}, {})
        if self.already_made:
            return Counted.recorded(self._own_manifests())
        of_all = LEFT_ASIDE not in self._about
        return Counted.of(self.plan, self._done.values(), self._shapes, self._origins, of_all=of_all)

    def _describe(self) -> dict[str, Any]:
        about = {"plan": self.fingerprint, **self._about}
        if self.options.fingerprints:
            about.update(self._counted.as_manifest())
        return describe_result(self.plan, self.folder, self._done.values(), about, self._states)


def copy_into(
    plan: Plan,
    folder: Path | Uploads,
    tasks: Sequence[Task],
    options: Options,
    *,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
    before: int = 0,
    report: Callable[[Done], None] = lambda done: None,
    proofs: bool = False,
) -> None:
    """Copy tasks into target files that are prepared, or into uploads; `report` is told each as it is done."""
    total, written = before + sum(task.bytes_written for task in tasks), before
    copied = copy_tasks(
        plan,
        folder,
        tasks,
        processes=options.processes,
        hashes=options.hashes,
        proofs=proofs,
        drops=options.drop_cache,
        fingerprints=options.fingerprints,
        may_fork=options.may_fork,
        check=check,
    )
    with contextlib.closing(copied):  # whatever goes wrong here, the workers end before the folder is removed
        for done in copied:
            report(done)
            written += done.bytes_written
            if progress is not None:
                progress(written, total)


def copy_unchanged(
    plan: Plan, folder: Path, tasks: Sequence[Task], options: Options, *, progress: Progress, check: Callable[[], None]
) -> None:
    """`copy_into`, for a rank that copies a share. Raises TransferError when a source was written meanwhile."""
    states = states_of(plan.sources)
    copy_into(plan, folder, tasks, options, progress=progress, check=check)
    check_unchanged(states)


def affordable_processes(wanted: int) -> int:
    """So many of the wanted processes as the free memory is enough for, at least one."""
    if wanted == 1:
        return 1
    from mindformers_ckpt.engine.machine import MEMORY_PER_PROCESS, free_memory

    return max(1, min(wanted, free_memory() // MEMORY_PER_PROCESS))


def check_apart(plan: Plan, destination: Path) -> None:
    """Refuse a destination that holds a source file: publishing would replace it."""
    real = destination.resolve()
    paths = [file.path for file in plan.sources]
    for path, found in zip(paths, each(lambda path: path.resolve(), paths)):
        if found.is_relative_to(real):
            raise PlanError(f"the target folder {destination} holds the source file {path}; choose another folder")


def identity_of(digest: str, states: Mapping[Path, FileState], options: Options) -> str:
    """A digest of everything that decides which bytes are written where, and of the sources' identity."""
    from mindformers_ckpt import __version__

    # A journal counts tasks, and their cut changes with these.
    sizes = (BLOCK_BYTES, TRANSPOSE_BYTES, PIECE_BYTES)
    cut = (__version__, *sizes, options.by_rank, options.hashes, options.fingerprints, options.crc)
    whole = hashlib.blake2b(f"{digest} {cut}\n".encode(), digest_size=16)
    for path, state in states.items():
        whole.update(f"{path} {tuple(state)}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()


def is_checkpoint(path: Path) -> bool:
    """Whether a file has the form of what is written: a checkpoint that can be read."""
    try:
        return bool(read_header(path).tensors)
    except FormatError:
        return False


def _drop(files: Iterable[Path]) -> None:
    """Put files on the disk, and have the system forget what it holds of them."""
    for file in files:
        with file.open("rb") as stream:
            page_cache.write_back(stream.fileno())


def _check_countable(plan: Plan, options: Options) -> None:
    """Refuse ways of running a plan that do not see every tensor whole. Raises ConfigError and PlanError."""
    if options.by_rank or options.partial:
        way = "one rank is a unit of work (--transform-by-rank)" if options.by_rank else "some ranks are made only"
        raise ConfigError(f"a fingerprint is that of whole tensors, but {way}; leave one of the two out")
    check_countable(plan)


def _check_signable(key: Path, is_file: bool) -> None:
    """Refuse to sign a result that has no manifest, or with what is not a key. Raises ConfigError."""
    if is_file:
        raise ConfigError("a signature goes with a manifest, which a single file has not; name a folder for the result")
    check_key(key)


def _append_crcs(plan: Plan, folder: Path) -> None:
    from mindformers_ckpt.formats import ckpt

    for target in plan.targets:
        # A run that was interrupted here has appended some.
        if target.format == "ckpt" and read_header(folder / target.path).crc is None:
            ckpt.append_crc(folder / target.path)
