"""`mindformers-ckpt plan`: what transform would do, without doing it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from mindformers_ckpt.api.request import CHECKPOINT2, Prepared
from mindformers_ckpt.cli.dry import file_bytes, free_bytes, refusals
from mindformers_ckpt.cli.notices import amount, say, say_json, warn
from mindformers_ckpt.cli.options import OVERWRITE_ANYTHING, LocalPath, json_option, request_of, request_options
from mindformers_ckpt.execution.checks import check_apart
from mindformers_ckpt.geometry.box import Box, hull
from mindformers_ckpt.planning.file import Job, write_plan
from mindformers_ckpt.planning.model import Place, Plan, once
from mindformers_ckpt.publish.results import ranks_of
from mindformers_ckpt.words import counted, shortened

_MOST_FILES = 20  # that are named


@dataclass(frozen=True)
class Summary:
    """What a plan would do.

    Attributes:
        source, target: the two sides in words.
        destination: folder for the result, when it is given.
        files_read, files_written: number of files.
        files: the files that are read, relative to the source.
        ranks: target ranks.
        bytes_read: bytes of tensors that are read, each once.
        bytes_needed: bytes of tensors that the targets are made of, replicas counted once.
        over_read: bytes_read / bytes_needed.
        bytes_written: bytes of tensors in the target files, replicas included.
        disk_needed: size of the target files.
        disk_free: free bytes where the destination would be; None when that is not given.
        memory_needed: bytes, at most, of all processes.
        parameters: number of tensors.
        renamed: tensors of another name in the source: name -> name there.
        dropped: tensors of the source that no target file can hold.
        replicated: tensors that every target rank gets whole.
        one_sided: tensors that one of the two strategies names and the other does not.
        warnings: choices that were made.
        refusals: why transform would not begin as things are.
    """

    source: str
    target: str
    destination: str | None
    files_read: int
    files_written: int
    files: list[str]
    ranks: list[int]
    bytes_read: int
    bytes_needed: int
    over_read: float
    bytes_written: int
    disk_needed: int
    disk_free: int | None
    memory_needed: int
    parameters: int
    renamed: dict[str, str]
    dropped: list[str]
    replicated: list[str]
    one_sided: list[str]
    warnings: list[str]
    refusals: list[str]


@click.command("plan")
@request_options
@click.option("--out", type=LocalPath(), help="Write the plan to this file, for transform --plan.")
@OVERWRITE_ANYTHING
@json_option
def command(out: Path | None, overwrite_anything: bool, as_json: bool, **asked: Any) -> None:
    """Say what transform would do, and write nothing but the plan file that is asked for.

    An earlier plan file of its name is replaced.

    Parameters are those of transform.
    """
    request = request_of(asked)
    if out is not None and request.format == CHECKPOINT2:
        raise click.UsageError("A plan file cannot hold the texts of a checkpoint 2.0; run transform instead.")
    prepared = request.prepare()
    job = prepared.job
    if job.destination is not None:
        check_apart(job.plan, job.destination)
    summary = summarize(prepared, request.processes if request.rank_id is None else 1)
    if out is not None:
        write_plan(job, out, anything=overwrite_anything)
    if as_json:
        say_json(asdict(summary))
        return
    warn(summary.warnings)
    for name, text in _lines(summary, with_files=job.partial):
        say(f"{name + ':':<12} {text}")
    if out is not None:
        say(f"Written to {out}; run it with: mindformers-ckpt transform --plan {out}")


def summarize(prepared: Prepared, processes: int) -> Summary:
    from mindformers_ckpt.engine.machine import MEMORY_PER_PROCESS

    job = prepared.job
    plan = job.plan
    needed = sum(_volume(transfer.targets) * transfer.dtype.itemsize * count for transfer, count in plan.kinds)
    size = file_bytes(plan)
    free = None if job.destination is None else free_bytes(job.destination)
    problems = [] if job.destination is None else refusals(job.destination, size, adds_ranks=job.partial)
    return Summary(
        source=job.about["source"],
        target=job.about["target"],
        destination=None if job.destination is None else str(job.destination),
        files_read=len(plan.files_read),
        files_written=len(plan.targets),
        files=_files(job),
        ranks=ranks_of(plan),
        bytes_read=plan.bytes_read,
        bytes_needed=needed,
        over_read=round(plan.bytes_read / needed, 3) if needed else 1.0,
        bytes_written=plan.bytes_written,
        disk_needed=size,
        disk_free=free,
        memory_needed=processes * MEMORY_PER_PROCESS,
        parameters=len(plan.transfers),
        renamed=_renamed(plan),
        dropped=_dropped(plan),
        replicated=_replicated(plan),
        one_sided=_one_sided(prepared),
        warnings=list(plan.warnings),
        refusals=problems,
    )


def _files(job: Job) -> list[str]:
    """The files that are read, relative to the source."""
    root = str(job.about.get("source_path", ""))
    paths = [str(job.plan.sources[number].path) for number in job.plan.files_read]
    return [path[len(root) + 1 :] if path.startswith(f"{root}/") else path for path in paths]


def _volume(targets: tuple[Place, ...]) -> int:
    """How many elements of a tensor its targets need, replicas counted once."""
    boxes = {place.box for place in targets}
    # Stages that share a tensor may cut it differently: then boxes overlap.
    return min(sum(box.volume for box in boxes), hull(list(boxes)).volume)


def _renamed(plan: Plan) -> dict[str, str]:
    renamed = once(_names)
    if not any(renamed(transfer.sources) for transfer, _ in plan.kinds):  # as mostly, and there may be very many
        return {}
    return {transfer.name: name for transfer in plan.transfers for name in renamed(transfer.sources)}


def _names(sources: tuple[Place, ...]) -> list[str]:
    """The names that places of a tensor have in their files, where they are others than its own."""
    return [place.tensor for place in sources if place.tensor]


def _dropped(plan: Plan) -> list[str]:
    """Tensors without elements, which a .ckpt cannot hold."""
    files = (target.tensors for target in plan.targets if target.format == "ckpt")
    return sorted({spec.name for tensors in files for spec in tensors if 0 in spec.shape})


def _replicated(plan: Plan) -> list[str]:
    """Tensors that every target rank has whole, where there are several."""
    boxes = once(_only_box)
    if len(plan.targets) < 2:
        return []
    everywhere = (transfer for transfer in plan.transfers if len(transfer.targets) == len(plan.targets))
    return [transfer.name for transfer in everywhere if boxes(transfer.targets) == Box.whole(transfer.shape)]


def _only_box(places: tuple[Place, ...]) -> Box | None:
    """The box that all places have, None where they have different ones."""
    boxes = {place.box for place in places}
    return boxes.pop() if len(boxes) == 1 else None


def _one_sided(prepared: Prepared) -> list[str]:
    """Tensors of the plan that one of two strategies names: the other takes them for replicated, or cuts states of
    an optimizer like their weights."""
    if prepared.source.is_complete or prepared.target.is_complete:
        return []
    in_one = prepared.source.names() ^ prepared.target.names()
    return [transfer.name for transfer in prepared.job.plan.transfers if transfer.name in in_one]


def _lines(summary: Summary, *, with_files: bool) -> list[tuple[str, str]]:
    """The summary for people: a name and a text a line."""
    details = [
        f"{len(names)} {what} ({shortened(names, 3)})"
        for what, names in (
            ("whole on every target rank", summary.replicated),
            ("in one strategy only", summary.one_sided),
            ("renamed", summary.renamed),
            ("dropped (no elements)", summary.dropped),
        )
        if names
    ]
    free = "" if summary.disk_free is None else f", {amount(summary.disk_free)} are free"
    return [
        ("source", f"{summary.source}; {counted(summary.files_read, 'file')} to read"),
        ("target", f"{summary.target}; {counted(summary.files_written, 'file')} to write"),
        *([("files", shortened(summary.files, _MOST_FILES))] if with_files else []),
        ("read", f"{amount(summary.bytes_read)} of tensors, {summary.over_read:.2f} x what is needed"),
        ("write", f"{amount(summary.bytes_written)} of tensors, replicas included"),
        ("parameters", "; ".join([str(summary.parameters), *details])),
        ("disk", f"{amount(summary.disk_needed)} needed{free}"),
        ("memory", f"{amount(summary.memory_needed)} at most, whatever the size of the weights"),
        ("result", summary.destination or "no target folder given"),
        *(("refused", f"{problem} (by transform, as things are)") for problem in summary.refusals),
    ]
