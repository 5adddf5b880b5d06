"""The copying of a run: tasks into target files that are there, by this process or several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from mindformers_ckpt.engine.object_sink import Uploads
from mindformers_ckpt.engine.pool import copy_tasks
from mindformers_ckpt.engine.source_shares import Cuts
from mindformers_ckpt.engine.tasks import Done, Task
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.planning.source_states import check_unchanged, states_of
from mindformers_ckpt.progress import Progress

_NO_CUTS: Cuts = {}


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
    cuts: Cuts = _NO_CUTS,
) -> None:
    """Copy tasks into target files that are prepared, or into uploads; `report` is told each as it is done.

    `cuts` are those of the source, for fingerprints.
    """
    total, written = before + sum(task.bytes_written for task in tasks), before
    copied = copy_tasks(
        plan,
        folder,
        tasks,
        processes=options.processes,
        hashes=options.hashes,
        proofs=proofs,
        drops=options.drop_cache,
        counted=cuts if options.fingerprints else None,
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
