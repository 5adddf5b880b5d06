"""`mindformers-ckpt transform`: re-slice a checkpoint, with the parameters of the guide's transform_checkpoint.py."""

from __future__ import annotations

from pathlib import Path

import click

from mindformers_ckpt.checkpoint import Checkpoint
from mindformers_ckpt.cli.progress import show_progress
from mindformers_ckpt.plan import DEFAULT_PREFIX, Plan, build_plan
from mindformers_ckpt.source_files import find_source
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import Options, transform


class StrategyPath(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A strategy file or folder; "None" and "" stand for complete weights, as the guide writes them."""

    name = "path"

    def convert(
        self, value: str | Path | None, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | None:
        if value is None or str(value) in ("", "None"):
            return None
        return Path(value)


def read_optional_strategy(path: Path | None) -> Strategy:
    """The strategy at a path, or that of complete weights when there is none."""
    if path is None:
        return Strategy.complete()
    from mindformers_ckpt.strategy.files import read_strategy

    return read_strategy(path)


@click.command("transform")
@click.option(
    "--src-checkpoint",
    "--src_checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="File of complete weights, or the folder that holds rank_<n> folders.",
)
@click.option(
    "--src-strategy",
    "--src_strategy",
    type=StrategyPath(),
    help="Strategy of the source: file, merged file or folder. Leave out for complete weights.",
)
@click.option(
    "--dst-checkpoint-dir",
    "--dst_checkpoint_dir",
    "--dst_checkpoint",
    "destination",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the result.",
)
@click.option(
    "--dst-strategy",
    "--dst_strategy",
    type=StrategyPath(),
    help="Strategy of the target. Leave out for complete weights.",
)
@click.option("--prefix", default=DEFAULT_PREFIX, show_default=True, help="Files are named rank_<n>/<prefix><n>.ckpt.")
@click.option(
    "--transform-process-num",
    "--transform_process_num",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes that copy.",
)
@click.option(
    "--transform-by-rank",
    "--transform_by_rank",
    type=bool,
    default=False,
    show_default=True,
    help="Make one target rank the unit of work.",
)
@click.option("--overwrite", is_flag=True, help="Replace a target folder that is not empty.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def command(
    src_checkpoint: Path,
    src_strategy: Path | None,
    destination: Path,
    dst_strategy: Path | None,
    prefix: str,
    transform_process_num: int,
    transform_by_rank: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Re-slice a checkpoint for another parallel strategy.

    The result is rank_<n>/<prefix><n>.ckpt under the target folder, which appears only when it is complete.
    """
    source = Checkpoint(find_source(src_checkpoint), read_optional_strategy(src_strategy))
    target = read_optional_strategy(dst_strategy)
    plan = build_plan(source, target, prefix=prefix)
    _warn(plan)
    options = Options(processes=transform_process_num, by_rank=transform_by_rank, overwrite=overwrite)
    about = {"source": source.strategy.describe(), "target": target.describe()}
    with show_progress("transform", quiet=quiet) as progress:
        report = transform(plan, destination, options, about=about, progress=progress)
    if not quiet:
        click.echo(
            f"{report.files} files, {report.bytes_written / 1e9:.3f} GB written to {report.destination} "
            f"in {report.seconds:.2f} s"
        )


def _warn(plan: Plan) -> None:
    for warning in plan.warnings:
        click.secho("warning: ", fg="yellow", err=True, nl=False)
        click.echo(warning, err=True)
