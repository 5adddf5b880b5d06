"""`mindformers-ckpt merge-strategy`: what `mindspore.parallel.merge_pipeline_strategys` does."""

from __future__ import annotations

from pathlib import Path

import click

from mindformers_ckpt.cli.notices import say, say_json
from mindformers_ckpt.cli.options import OVERWRITE_ANYTHING, LocalPath, json_option
from mindformers_ckpt.strategy.files import merge_strategies
from mindformers_ckpt.words import counted


@click.command("merge-strategy")
@click.argument("folder", type=LocalPath())
@click.argument("file", type=LocalPath())
@OVERWRITE_ANYTHING
@json_option
def command(folder: Path, file: Path, overwrite_anything: bool, as_json: bool) -> None:
    """Merge the strategy files of all ranks in FOLDER into FILE.

    FILE is what --src-strategy and --dst-strategy take for a job with a pipeline. It may be in FOLDER. An earlier
    strategy file of its name is replaced.
    """
    strategy = merge_strategies(folder, file, anything=overwrite_anything)
    stages = len(strategy.stages)
    if as_json:
        say_json(
            {
                "file": str(file),
                "ranks": strategy.rank_count,
                "stages": stages,
                "stage_size": strategy.stage_size,
                "parameters": len(strategy.names()),
            }
        )
        return
    say(f"{file}: {counted(stages, 'stage')} of {strategy.stage_size} ranks, {len(strategy.names())} parameters")
