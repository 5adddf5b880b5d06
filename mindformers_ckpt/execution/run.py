"""One run of a plan, from its check to its result: prepare, copy, publish. The sequence behind every command and job.

with Run(plan, destination, options) as run:
    run.prepare()              # room on the disk, the target files, what an earlier run finished
    run.copy()                 # all tasks, or the share of one node
    run.publish()              # are the sources what they were? manifest, and the name of the destination
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from mindformers_ckpt.engine import page_cache
from mindformers_ckpt.engine.sinks import FileSink
from mindformers_ckpt.engine.tasks import Done, Task, cut_into_tasks
from mindformers_ckpt.errors import PublishError, TransferError
from mindformers_ckpt.execution.checks import (
    add_companions,
    check_apart,
    check_recordable,
    check_sees_whole,
    check_signable,
    identity_of,
    is_checkpoint,
)
from mindformers_ckpt.execution.copying import copy_into
from mindformers_ckpt.execution.options import Options, Report, report_of
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.objects.path import absolute
from mindformers_ckpt.planning.digest import digest_of
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.planning.source_states import changed_files, check_unchanged, states_of
from mindformers_ckpt.progress import Progress
from mindformers_ckpt.publish.counted import LEFT_ASIDE, Counted
from mindformers_ckpt.publish.journal import Journal
from mindformers_ckpt.publish.manifest import MANIFEST_FILE, is_whole, read_manifests
from mindformers_ckpt.publish.results import check_addable, describe_result, partial_manifest_name
from mindformers_ckpt.publish.signature import find_bundle, left_behind
from mindformers_ckpt.publish.source_fingerprint import Origin, cuts_of
from mindformers_ckpt.publish.staging import Kind, Replace, Staging, check_free_space
from mindformers_ckpt.publish.texts import text_hashes

_PLAIN = Options()


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
        options: Options = _PLAIN,
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
        check_recordable(options, file)
        if options.fingerprints:
            check_sees_whole(plan, options)
        if options.sign is not None:
            check_signable(options.sign, file)
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
        wanted = range(len(self.plan.targets)) if files is None else files
        sink.prepare_files(wanted, repair=bool(self._done))
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
            cuts=cuts_of(self.plan, self._origins or ()) if self.options.fingerprints else {},
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
            add_companions(self._sign, self.folder)
            add_companions(companions, self.folder)
            is_file = self._staging.kind is Kind.FILE
            content = None if is_file else manifest or self._describe()
            name = partial_manifest_name(self.plan) if self.options.partial else MANIFEST_FILE
            self._staging.publish(content, name=name, fsync=self.options.fsync)
        elif self.options.sign is not None:
            add_companions(self._sign, self.destination)
        resumed = self.plan.bytes_written if self.already_made else self._resumed_bytes
        return report_of(
            self.plan,
            self.destination,
            self._started,
            resumed,
            fingerprints=self._counted.digests(),
            source_fingerprint=self._counted.source_digest(),
            signature=self._signature,
        )

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
        return describe_result(
            self.plan,
            self.folder,
            self._done.values(),
            about,
            self._states,
            texts=text_hashes(self.folder, self._staging.own_files),
            headers=self.options.hashes or self.options.fingerprints,
        )


def _drop(files: Iterable[Path]) -> None:
    """Put files on the disk, and have the system forget what it holds of them."""
    for file in files:
        with file.open("rb") as stream:
            page_cache.write_back(stream.fileno())


def _append_crcs(plan: Plan, folder: Path) -> None:
    from mindformers_ckpt.formats.ckpt_crc import append_crc

    for target in plan.targets:
        # A run that was interrupted here has appended some.
        if target.format == "ckpt" and read_header(folder / target.path).crc is None:
            append_crc(folder / target.path)
