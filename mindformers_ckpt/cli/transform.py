"""`mindformers-ckpt transform`: re-slice a checkpoint, with the parameters of the guide's transform_checkpoint.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mindformers_ckpt.cli.notices import amount, say, say_fingerprints, say_json, warn
from mindformers_ckpt.cli.options import (
    CACHE,
    FINGERPRINT,
    RESUME,
    LocalPath,
    json_option,
    replace_options,
    request_options,
    resumable,
)
from mindformers_ckpt.cli.progress import show_progress
from mindformers_ckpt.cli.request import Request
from mindformers_ckpt.errors import FormatError, describe_problems
from mindformers_ckpt.execution import Options, Report, affordable_processes, ranks_of
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.planning.file import Job, read_plan
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.transform import transform


@click.command("transform")
@request_options
@click.option(
    "--transform-by-rank",
    type=bool,
    default=False,
    show_default=True,
    help="Make one target rank the unit of work, instead of equal shares of bytes.",
)
@click.option(
    "--plan",
    "plan_file",
    type=LocalPath(),
    help="Run a plan that `mindformers-ckpt plan --out` wrote; it decides source, target and file names.",
)
@replace_options
@RESUME
@click.option("--hash", "hashes", is_flag=True, help="Take xxh3-128 of every written tensor into the manifest.")
@FINGERPRINT
@click.option("--fsync", is_flag=True, help="Force the result to the disk before it gets its name.")
@CACHE
@click.option(
    "--crc-check", is_flag=True, help="Verify the CRC-32 that source .ckpt files store, and append one to target files."
)
@json_option
@click.option("--quiet", is_flag=True, help="Print errors only.")
def command(
    transform_by_rank: bool,
    plan_file: Path | None,
    overwrite: bool,
    overwrite_anything: bool,
    resume: bool,
    hashes: bool,
    fingerprints: bool,
    fsync: bool,
    drop_cache: bool,
    crc_check: bool,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Re-slice a checkpoint for another parallel strategy.

    The result is rank_<n>/<prefix><n>.ckpt under the target folder, which appears only when it is complete.
    """
    request = Request(**asked)
    job, companions = _planned(plan_file) if plan_file is not None else _asked(request)
    destination = request.destination or job.destination
    if destination is None:
        raise click.UsageError("Missing option '--dst-checkpoint-dir'.")
    if not quiet:
        warn(job.plan.warnings)
    if crc_check:
        _verify_crcs(job.plan, quiet)
    options = Options(
        processes=_processes(request, quiet),
        by_rank=transform_by_rank,
        hashes=hashes,
        fingerprints=fingerprints,
        fsync=fsync,
        drop_cache=drop_cache,
        crc=crc_check,
        overwrite=overwrite,
        overwrite_anything=overwrite_anything,
        resume=resume,
        partial=job.partial,
        may_fork=True,
    )
    report = _run(job, destination, options, quiet, companions)
    if as_json:
        say_json(_as_json(report, job))
    elif not quiet:
        say(_as_text(report))
        say_fingerprints(report.fingerprints)


def _run(job: Job, destination: Path, options: Options, quiet: bool, companions: Callable[[Path], None]) -> Report:
    with resumable(destination), show_progress("transform", quiet=quiet) as progress:
        return transform(job.plan, destination, options, about=job.about, progress=progress, companions=companions)


def _asked(request: Request) -> tuple[Job, Callable[[Path], None]]:
    """What the options ask for, and what puts the texts that belong to the result into its folder."""
    prepared = request.prepare()
    return prepared.job, prepared.companions


def _planned(plan_file: Path) -> tuple[Job, Callable[[Path], None]]:
    """The job of a plan file; refuse options that it has decided already."""
    context = click.get_current_context()
    free = {"destination", "processes"}
    decided = [
        f"--{name.replace('_', '-')}"
        for name in Request.__dataclass_fields__
        if name not in free and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if decided:
        raise click.UsageError(f"the plan decides {', '.join(decided)}; make another plan, or leave --plan out")
    return read_plan(plan_file), lambda folder: None


def _processes(request: Request, quiet: bool) -> int:
    """Processes that copy: one where the processes are started by hand."""
    if request.rank_id is not None:
        return 1
    processes = affordable_processes(request.processes)
    if processes < request.processes and not quiet:
        warn([f"the free memory is enough for {processes} of {request.processes} processes; so many are used"])
    return processes


def _verify_crcs(plan: Plan, quiet: bool) -> None:
    """Compare the CRC-32 of source files with their bytes. Raises FormatError that lists all damaged files."""
    from mindformers_ckpt.formats.ckpt import verify_crc

    headers = [read_header(file.path) for file in plan.sources if file.path.suffix == ".ckpt"]
    stored = [header for header in headers if header.crc is not None]
    without = [str(header.path) for header in headers if header.crc is None]
    if without and not quiet:
        some = ", ".join(without[:3]) + (", …" if len(without) > 3 else "")
        warn([f"{len(without)} of {len(headers)} .ckpt files store no CRC-32 to verify: {some}"])
    problems = []
    total, done = sum(header.size for header in stored), 0
    with show_progress("verify CRC", quiet=quiet) as progress:
        for header in stored:
            try:
                verify_crc(header)
            except FormatError as error:
                problems.append(str(error))
            done += header.size
            if progress is not None:
                progress(done, total)
    if problems:
        raise FormatError(problems[0] if len(problems) == 1 else describe_problems("damaged files", problems))


def _as_json(report: Report, job: Job) -> dict[str, Any]:
    values = {**asdict(report), "destination": str(report.destination), "seconds": round(report.seconds, 3)}
    return {**values, "ranks": ranks_of(job.plan), "warnings": list(job.plan.warnings)}


def _as_text(report: Report) -> str:
    files = f"{report.files} {'file' if report.files == 1 else 'files'}, {amount(report.bytes_written)}"
    if report.resumed_bytes == report.bytes_written:
        return f"nothing to do: {report.destination} has {files} of this run already"
    resumed = f" ({amount(report.resumed_bytes)} of it before)" if report.resumed_bytes else ""
    return f"{files} written to {report.destination} in {report.seconds:.2f} s{resumed}"
