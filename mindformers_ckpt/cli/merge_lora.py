"""`mindformers-ckpt merge-lora`: fold LoRA branches into the weights, with the parameters of the guide's script."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from mindformers_ckpt.cli.notices import amount, say, say_fingerprints, say_json, warn
from mindformers_ckpt.cli.options import (
    CACHE,
    FINGERPRINT,
    PROCESSES,
    RESUME,
    STEP,
    LocalPath,
    StrategyPath,
    check_prefix,
    json_option,
    resumable,
)
from mindformers_ckpt.cli.progress import show_progress
from mindformers_ckpt.cli.request import (
    CHECKPOINT2,
    check_outside,
    checkpoint2_prefix,
    default_format,
    read_optional_strategy,
)
from mindformers_ckpt.convert.adapters import locator
from mindformers_ckpt.errors import PlanError, PublishError, StrategyError
from mindformers_ckpt.execution import Options, affordable_processes
from mindformers_ckpt.lora import MergedBranch, plan_merge
from mindformers_ckpt.lora_scaling import Scaling, number_fault
from mindformers_ckpt.lora_settings import read_settings
from mindformers_ckpt.planning.model import DEFAULT_PREFIX, Plan
from mindformers_ckpt.publish import clear_waste
from mindformers_ckpt.sources.adapter import AdapterSource, find_adapter
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source, separate_checkpoints
from mindformers_ckpt.sources.source import Source
from mindformers_ckpt.strategy.files import MERGED_FILE, merge_strategies
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.targets.checkpoint2 import as_checkpoint2
from mindformers_ckpt.transform import transform

_PATH = LocalPath()


class _Number(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A number that single precision can hold."""

    name = "number"
    example = "16"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = self.parse(value) if isinstance(value, str) else value
        except (ValueError, ZeroDivisionError, OverflowError):
            self.fail(f"{value!r} is no number; write it like {self.example}", param, ctx)
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
@click.option("--src-ckpt-strategy", "src_strategy", type=_GivenStrategy(), help="Strategy of the source; see above.")
@click.option(
    "--src-ckpt-path-or-dir",
    "source",
    type=_PATH,
    required=True,
    help="File of complete weights, or the folder that holds rank_<n> folders.",
)
@click.option("--dst-ckpt-dir", "destination", type=_PATH, required=True, help="Empty or new folder for the result.")
@click.option(
    "--prefix",
    default=DEFAULT_PREFIX,
    show_default=True,
    callback=check_prefix,
    help="Target files are rank_<n>/<prefix><n>.ckpt.",
)
@click.option("--lora-scaling", type=_Ratio(), help="lora_alpha / lora_rank of the training, like 2 or 16/8.")
@click.option("--alpha", "--lora-alpha", "alpha", type=_Number(), help="lora_alpha; the rank is that of the factors.")
@click.option("--rank", "--lora-rank", "rank", type=click.IntRange(min=1), help="lora_rank, to check the factors.")
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
    type=click.Choice(["ckpt", "safetensors", CHECKPOINT2]),
    help="Format of the result; checkpoint2 is MindFormers' own.  "
    "[default: safetensors if all source files are, else ckpt]",
)
@STEP
@PROCESSES
@FINGERPRINT
@RESUME
@CACHE
@json_option
@click.option("--quiet", is_flag=True, help="Print errors only.")
def command(
    src_strategy: Path | None,
    source: Path,
    destination: Path,
    prefix: str,
    adapter: Path | None,
    model: str | None,
    hf_config: Path | None,
    dst_strategy: Path | None,
    merged_strategy: Path | None,
    save_format: str | None,
    step: str | None,
    processes: int,
    fingerprints: bool,
    resume: bool,
    drop_cache: bool,
    as_json: bool,
    quiet: bool,
    **scaling: Any,
) -> None:
    """Fold LoRA branches into the weights: W + scaling · B · A, without LoRA parameters.

    Of a job with a pipeline, --src-ckpt-strategy is the folder with the strategy files of all ranks, which are
    merged into merged_ckpt_strategy.ckpt there, or that file. Without a pipeline any rank's file will do, and for
    complete weights it is left out.
    """
    if merged_strategy is not None and (src_strategy is None or not src_strategy.is_dir()):
        raise click.UsageError("--merged-strategy is for a folder as --src-ckpt-strategy; leave it out.")
    chosen = _scaling(**scaling)
    if not resume:
        _check_empty(destination)
    found = None if adapter is None else find_adapter(adapter)
    chosen, notes = _completed(chosen, found)
    files = _single(source, step)
    strategy = files.strategy(_source_strategy(src_strategy, merged_strategy))
    check_outside(files, destination)
    target = read_optional_strategy(dst_strategy)
    plan, branches = plan_merge(
        Checkpoint(files, strategy),
        target,
        chosen,
        adapter=None if found is None else _adapter(found.files, strategy),
        locator=lambda weights: locator(weights, model, hf_config),
        prefix=prefix,
        format="safetensors" if save_format == CHECKPOINT2 else save_format or default_format(files),
    )
    plan = replace(plan, warnings=(*plan.warnings, *notes))
    companions: Callable[[Path], None] = partial(_add_familiar_name, plan=plan, target=target)
    if save_format == CHECKPOINT2:
        plan, companions = as_checkpoint2(plan, target, checkpoint2_prefix(prefix))
    if not quiet:
        warn(plan.warnings)
    about = {
        "lora": _record(branches, chosen, found),
        "source": strategy.describe(),
        "target": target.describe(),
        "source_path": str(source),
    }
    options = Options(
        processes=affordable_processes(processes),
        fingerprints=fingerprints,
        resume=resume,
        may_fork=True,
        drop_cache=drop_cache,
    )

    with resumable(destination), show_progress("merge", quiet=quiet) as progress:
        report = transform(plan, destination, options, about=about, progress=progress, companions=companions)
    if as_json:
        say_json({**asdict(report), "warnings": plan.warnings})
    elif not quiet:
        say(
            f"{report.files} {'file' if report.files == 1 else 'files'}, {amount(report.bytes_written)} written to "
            f"{report.destination} in {report.seconds:.2f} s"
        )
        say_fingerprints(report.fingerprints)


def _scaling(lora_scaling: float | None, alpha: float | None, rank: int | None, use_rslora: bool) -> Scaling:
    if lora_scaling is not None and (alpha is not None or rank is not None or use_rslora):
        raise click.UsageError("--lora-scaling is the whole factor; leave out --alpha, --rank and --use-rslora.")
    return Scaling(lora_scaling, alpha, rank, use_rslora)


def _completed(given: Scaling, adapter: AdapterSource | None) -> tuple[Scaling, tuple[str, ...]]:
    """The given scaling, or else that of the adapter's own settings, and what the user should know of the choice."""
    if adapter is None:
        return given, ()
    if adapter.settings is None:
        return given, adapter.notes
    own = read_settings(adapter.settings)  # also where its scaling is not used: it may tell that nothing can be merged
    if given.value is not None or given.alpha is not None:
        return given, (*adapter.notes, f"the scaling of {adapter.settings} is not used, but that of the options")
    if given.rank_stabilised and not own.rank_stabilised:
        note = f"--use-rslora is taken, although {adapter.settings} does not say use_rslora"
        return replace(own, rank_stabilised=True, rank=given.rank or own.rank), (*adapter.notes, note)
    if given.rank is not None:
        own = replace(own, rank=given.rank, ranks={})
    return own, adapter.notes


def _record(branches: tuple[MergedBranch, ...], scaling: Scaling, adapter: AdapterSource | None) -> dict[str, Any]:
    """What the manifest says of the merge: where factors and scaling come from, and what was done for every branch."""
    return {
        "adapter": None if adapter is None else str(adapter.files.root),
        "scaling_from": scaling.origin,
        "branches": {
            branch.module: {"weight": branch.weight, "rank": branch.rank, "scaling": branch.scaling}
            for branch in branches
        },
    }


def _check_empty(destination: Path) -> None:
    if destination.is_dir() and any(destination.iterdir()):
        with contextlib.suppress(OSError):  # a folder that cannot be written
            clear_waste(destination)
        raise PublishError(f"{destination} is not empty; give a new or an empty folder for the merged weights")


def _source_strategy(path: Path | None, merged: Path | None) -> Strategy:
    """The strategy of the source; that of a folder is merged into a file first.

    Raises StrategyError when that file cannot be written.
    """
    if path is None or not path.is_dir() or not any(path.glob("*rank_*.*")):
        return read_optional_strategy(path)
    file = merged or path / MERGED_FILE
    if merged is None and any(path.glob("*rank_*.json")):
        file = file.with_suffix(".json")
    folder = next(folder for folder in file.absolute().parents if folder.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StrategyError(
            f"{folder} cannot be written, so that the strategy files cannot be merged there; allow it, or choose "
            "another place for the merged file with --merged-strategy FILE"
        )
    return merge_strategies(path, file)


def _single(path: Path, step: str | None = None) -> Source:
    checkpoints = separate_checkpoints(find_source(path, step))
    if len(checkpoints) > 1:
        names = ", ".join(files.root.name for files in checkpoints)
        raise PlanError(f"{path} holds several checkpoints ({names}); give the file to merge")
    return checkpoints[0]


def _adapter(files: Source, strategy: Strategy) -> Checkpoint:
    """A checkpoint of LoRA parameters: complete, or cut by the strategy of the source."""
    return Checkpoint(files, files.own_strategy or (strategy if files.sharded else Strategy.complete()))


def _add_familiar_name(folder: Path, plan: Plan, target: Strategy) -> None:
    """The name under which MindFormers' script leaves its result of complete weights, for the same file."""
    if not target.is_complete:
        return
    (made,) = plan.targets
    name = folder / f"merged_lora.{made.format}"
    try:
        os.link(folder / made.path, name)
    except OSError:  # a file system without hard links
        name.symlink_to(made.path)
