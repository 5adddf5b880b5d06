"""`mindformers-ckpt merge-lora`: fold LoRA branches into the weights, with the parameters of the guide's script."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mindformers_ckpt.api.merge_lora import MergeRequest
from mindformers_ckpt.api.request import CHECKPOINT2
from mindformers_ckpt.cli.dry import say_plan
from mindformers_ckpt.cli.making import How, is_checkpoint2, making_options, next_with_checkpoint2, say_made
from mindformers_ckpt.cli.notices import say, say_json, warn
from mindformers_ckpt.cli.options import (
    ALLOW_MISSING,
    CONTENTS,
    PREFIX,
    PROCESSES,
    STEP,
    LocalPath,
    OneOf,
    StrategyPath,
    Whole,
    resumable,
)
from mindformers_ckpt.cli.progress import show_progress
from mindformers_ckpt.lora_scaling import Scaling, number_fault
from mindformers_ckpt.planning.model import Plan

_PATH = LocalPath()


class _Number(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A number that single precision can hold."""

    name = "number"
    example = "16"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = self.parse(value) if isinstance(value, str) else value
        except (ValueError, ZeroDivisionError, OverflowError):
            self.fail(f"{value!r} is not a number; write it like {self.example}", param, ctx)
        fault = number_fault(number)
        if fault is not None:
            self.fail(f"it {fault}; write it like {self.example}", param, ctx)
        return number

    def parse(self, text: str) -> float:
        return float(text)


class _Ratio(_Number):
    """A number, or a quotient like 16/8."""

    example = "2 or 16/8"

    def parse(self, text: str) -> float:
        dividend, slash, divisor = text.partition("/")
        return float(dividend) / float(divisor) if slash else float(dividend)


class _GivenStrategy(StrategyPath):
    """A strategy; "None" stands for complete weights, an empty path for a mistake."""

    def convert(
        self, value: str | Path | None, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | None:
        return super().convert(None if value is None else LocalPath().convert(value, param, ctx), param, ctx)


def _check_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("it is empty; is a variable not set? Give a name, or leave the option out")
    return value


@click.command("merge-lora")
@click.option(
    "--src-ckpt-strategy",
    "--src-strategy",
    "src_strategy",
    type=_GivenStrategy(),
    help="Strategy of the source: file, merged file or folder. None, or left out, for complete weights.",
)
@click.option(
    "--src-ckpt-path-or-dir",
    "--src-checkpoint",
    "source",
    type=_PATH,
    required=True,
    help="File of complete weights, or the folder that holds rank_<n> folders.",
)
@click.option(
    "--dst-ckpt-dir",
    "--dst-checkpoint-dir",
    "--dst-checkpoint",
    "destination",
    type=_PATH,
    required=True,
    help="Folder for the result.",
)
@PREFIX
@click.option("--lora-scaling", type=_Ratio(), help="lora_alpha / lora_rank of the training, like 2 or 16/8.")
@click.option("--alpha", "--lora-alpha", "alpha", type=_Number(), help="lora_alpha; the rank is that of the factors.")
@click.option("--rank", "--lora-rank", "rank", type=Whole(min=1), help="lora_rank, to check the factors.")
@click.option("--use-rslora", is_flag=True, help="The scaling is alpha / sqrt(rank).")
@click.option("--adapter", type=_PATH, help="Checkpoint or PEFT folder with the LoRA parameters, if not the source.")
@click.option("--model", callback=_check_name, help="Model of an adapter with Hugging Face names, as convert takes it.")
@click.option("--hf-config", type=_PATH, help="Folder of its config.json, where names alone do not tell enough.")
@click.option(
    "--dst-strategy",
    "--dst-ckpt-strategy",
    "dst_strategy",
    type=_GivenStrategy(),
    help="Cut the merged weights for this strategy, in the same pass.",
)
@click.option("--merged-strategy", type=_PATH, help="Where to put the merged strategy of a folder.")
@click.option(
    "--save-format",
    "--format",
    "format",
    type=OneOf(["ckpt", "safetensors", CHECKPOINT2]),
    help="Format of the result; checkpoint2 is MindFormers' own.  "
    "[default: safetensors if all source files are, else ckpt]",
)
@STEP
@ALLOW_MISSING
@CONTENTS
@PROCESSES
@making_options
def command(
    destination: Path,
    lora_scaling: float | None,
    alpha: float | None,
    rank: int | None,
    use_rslora: bool,
    processes: int,
    how: How,
    **asked: Any,
) -> None:
    """Fold LoRA branches into the weights: W + scaling · B · A, without LoRA parameters.

    Of a job with a pipeline, --src-ckpt-strategy is the folder with the strategy files of all ranks, which are
    merged into merged_ckpt_strategy.ckpt there, or that file. Without a pipeline any rank's file will do, and for
    complete weights it is left out.
    """
    folder = asked["src_strategy"]
    if asked["merged_strategy"] is not None and (folder is None or not folder.is_dir()):
        raise click.UsageError("--merged-strategy is for a folder as --src-ckpt-strategy; leave it out.")
    if lora_scaling is not None and (alpha is not None or rank is not None or use_rslora):
        raise click.UsageError("--lora-scaling is the whole factor; leave out --alpha, --rank and --use-rslora.")
    scaling = Scaling(lora_scaling, alpha, rank, use_rslora)
    request = MergeRequest(destination=destination, scaling=scaling, **asked)
    merge = request.prepare(dry=how.dry_run)
    if how.dry_run:
        say_plan(merge.plan, destination, how)
        return
    warn(merge.plan.warnings)
    warn(how.check_source(merge.plan))
    with resumable(destination), show_progress("merge", quiet=how.quiet) as progress:
        report = merge.run(how.options(processes), progress)
    if how.as_json:
        say_json(asdict(report))
    elif not how.quiet:
        say_made(report)
        if is_checkpoint2(merge.plan):
            say(next_with_checkpoint2(report.destination))
        else:
            say(f"next, in the yaml: load_checkpoint: {_loaded(report.destination, merge.plan)}, use_lora: False")


def _loaded(destination: Path, plan: Plan) -> Path:
    """What load_checkpoint is to be: the file of complete weights, or the folder of several ranks."""
    return destination / plan.targets[0].path if len(plan.targets) == 1 else destination
