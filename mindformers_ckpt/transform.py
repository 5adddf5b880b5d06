"""Re-slicing from one folder to another, on a disk or in an object storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.execution.options import Options, Report
from mindformers_ckpt.execution.run import Run
from mindformers_ckpt.objects.path import ObjectPath, absolute
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.progress import Progress
from mindformers_ckpt.publish.source_fingerprint import Origin

if TYPE_CHECKING:
    from mindformers_ckpt.uploads.run import ObjectRun

_PLAIN = Options()


def transform(
    plan: Plan,
    destination: Path,
    options: Options = _PLAIN,
    *,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
    companions: Callable[[Path], None] = lambda folder: None,
    file: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    origins: Iterable[Origin] | None = None,
) -> Report:
    """Run a plan and publish its result at `destination`, a folder, or with `file` the plan's only target file.

    `about` goes into the manifest, `progress` is told the bytes written and the total after every task,
    `check` is called between blocks and may raise to stop, `companions` puts further files into the folder of
    the result before it is published. For fingerprints, `shapes` are those of target tensors that the plan has in
    another form, and `origins` the tensors of the source where it is not only cut in another way.
    Raises TransferError and PublishError; then the destination is as it was.
    """
    where = absolute(destination)
    run: Run | ObjectRun
    if isinstance(where, ObjectPath):
        from mindformers_ckpt.uploads.run import ObjectRun

        run = ObjectRun(plan, where, options, about=about, file=file)
    else:
        run = Run(plan, where, options, about=about, file=file, shapes=shapes, origins=origins)
    with run:
        run.prepare(check=check)
        run.copy(progress=progress, check=check)
        return run.publish(companions)
