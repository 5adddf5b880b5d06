"""`mindformers-ckpt transform`: re-slice a checkpoint, with the parameters of the guide's transform_checkpoint.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mindformers_ckpt.api.transform import run_job
from mindformers_ckpt.cli.dry import say_plan
from mindformers_ckpt.cli.help import missing
from mindformers_ckpt.cli.making import How, is_checkpoint2, making_options, next_with_checkpoint2, say_made
from mindformers_ckpt.cli.notices import say, say_json, warn
from mindformers_ckpt.cli.options import BOOL, LocalPath, planned, request_of, request_options, resumable
from mindformers_ckpt.cli.progress import show_progress
from mindformers_ckpt.execution.options import Report
from mindformers_ckpt.planning.file import Job
from mindformers_ckpt.publish.results import ranks_of


@click.command("transform")
@request_options
@click.option(
    "--transform-by-rank",
    type=BOOL,
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
@making_options
def command(
    transform_by_rank: bool,
    plan_file: Path | None,
    how: How,
    **asked: Any,
) -> None:
    """Re-slice a checkpoint for another parallel strategy.

    The result is rank_<n>/<prefix><n>.ckpt under the target folder, which appears only when it is complete.
    """
    if plan_file is None:
        _check_given(asked)
    job = request_of(asked).prepare().job if plan_file is None else planned(plan_file, {"destination", "processes"})
    destination = asked["destination"] or job.destination
    if destination is None:
        raise click.UsageError("Missing option '--dst-checkpoint-dir'.")
    if how.dry_run:
        say_plan(job.plan, destination, how, adds_ranks=job.partial)
        return
    warn(job.plan.warnings)
    warn(how.check_source(job.plan))
    # Processes that are started by hand copy alone, each its share.
    processes = 1 if asked["rank_id"] is not None else asked["processes"]
    options = how.options(processes, by_rank=transform_by_rank)
    with resumable(destination), show_progress("transform", quiet=how.quiet) as progress:
        report = run_job(job, destination, options, progress)
    if how.as_json:
        say_json(_as_json(report, job))
    elif not how.quiet:
        say_made(report)
        say(_next_step(report.destination, asked["dst_strategy"], job))


def _as_json(report: Report, job: Job) -> dict[str, Any]:
    values = {**asdict(report), "destination": str(report.destination), "seconds": round(report.seconds, 3)}
    return {**values, "ranks": ranks_of(job.plan)}


def _next_step(destination: Path, strategy: Path | None, job: Job) -> str:
    """The keys of a training yaml under which the result is loaded."""
    if is_checkpoint2(job.plan):
        return next_with_checkpoint2(destination)
    if len(job.plan.targets) == 1 and strategy is None:
        return f"next, in the yaml: load_checkpoint: {destination / job.plan.targets[0].path}, auto_trans_ckpt: True"
    return f"next, in the yaml of a job with this strategy: load_checkpoint: {destination}, auto_trans_ckpt: False"


def _check_given(asked: Mapping[str, Any]) -> None:
    """Raise UsageError that names what is missing of what must be given, before anything is looked at."""
    needed = {"src_checkpoint": "--src-checkpoint", "destination": "--dst-checkpoint-dir"}
    lacking = [option for name, option in needed.items() if asked[name] is None]
    if lacking:
        raise click.UsageError(missing((), lacking))
