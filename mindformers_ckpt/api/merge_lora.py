"""Merging of LoRA branches as a call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mindformers_ckpt.api.checked import check_arguments, options_of
from mindformers_ckpt.api.request import (
    CHECKPOINT2,
    default_format,
)
from mindformers_ckpt.api.transform import verify_crcs
from mindformers_ckpt.convert.adapters import locator
from mindformers_ckpt.disk.files import existing
from mindformers_ckpt.errors import ConfigError, StrategyError
from mindformers_ckpt.execution.options import Options, Report
from mindformers_ckpt.lora import MergedBranch, plan_merge
from mindformers_ckpt.lora_scaling import Scaling
from mindformers_ckpt.lora_settings import read_settings
from mindformers_ckpt.objects.path import PathLike, as_path, path_or_none
from mindformers_ckpt.planning.model import DEFAULT_PREFIX, Plan
from mindformers_ckpt.progress import Progress
from mindformers_ckpt.publish.source_fingerprint import Origin
from mindformers_ckpt.sources.adapter import AdapterSource, find_adapter
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.complete import only_checkpoint
from mindformers_ckpt.sources.find import check_outside, find_source
from mindformers_ckpt.sources.source import Source
from mindformers_ckpt.strategy.files import MERGED_FILE, merge_strategies
from mindformers_ckpt.strategy.given import StrategyLike, as_strategy
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.targets.checkpoint2 import as_checkpoint2
from mindformers_ckpt.transform import transform

_NO_SCALING = Scaling(None, None, None, False)


@dataclass(frozen=True)
class MergeRequest:
    """What is to be merged into what: the options of `mindformers-ckpt merge-lora`."""

    source: Path
    destination: Path
    src_strategy: StrategyLike = None
    dst_strategy: StrategyLike = None
    adapter: Path | None = None
    scaling: Scaling = _NO_SCALING
    model: str | None = None
    hf_config: Path | None = None
    merged_strategy: Path | None = None
    prefix: str = DEFAULT_PREFIX
    format: str | None = None
    step: str | None = None
    allow_missing: bool | Sequence[str] = False
    contents: str = "error"

    def prepare(self, *, dry: bool = False) -> Merge:
        """Plan the merge. Nothing is written but the merged strategy of a folder, and that not if it is `dry`."""
        found = None if self.adapter is None else find_adapter(self.adapter)
        scaling, notes = _completed(self.scaling, found)
        files = only_checkpoint(find_source(self.source, self.step))
        given = self.src_strategy
        told = as_strategy(given) if dry else _source_strategy(given, self.merged_strategy)
        strategy = files.strategy(told)
        check_outside(files, self.destination)
        target = as_strategy(self.dst_strategy)
        base = Checkpoint(files, strategy)
        plan, branches = plan_merge(
            base,
            target,
            scaling,
            adapter=None if found is None else _adapter(found.files, strategy),
            locator=lambda weights: locator(weights, self.model, self.hf_config),
            prefix=self.prefix,
            format="safetensors" if self.format == CHECKPOINT2 else self.format or default_format(files),
            allow_missing=self.allow_missing,
            contents=self.contents,
        )
        about = {
            "lora": _record(branches, scaling, found),
            "source": strategy.describe(),
            "target": target.describe(),
            "source_path": str(self.source),
        }
        plan = replace(plan, warnings=(*plan.warnings, *notes))
        companions: Callable[[Path], None] = partial(_add_familiar_name, plan=plan, target=target)
        if self.format == CHECKPOINT2:
            plan, companions = as_checkpoint2(plan, target, self.prefix)
        origins = [Origin.of(tensor.spec, tensor.spec.name, tensor.shards) for tensor in base.tensors().values()]
        return Merge(plan, about, self.destination, companions, origins)


@dataclass(frozen=True)
class Merge:
    """A merge that has been planned."""

    plan: Plan
    about: dict[str, Any]
    destination: Path
    companions: Callable[[Path], None]
    origins: Sequence[Origin]

    def run(self, options: Options, progress: Progress | None) -> Report:
        """Merge, and put the result in place."""
        report = transform(
            self.plan,
            self.destination,
            options,
            about=self.about,
            progress=progress,
            companions=self.companions,
            origins=self.origins,
        )
        return replace(report, warnings=self.plan.warnings)


def merge_lora(
    src: PathLike,
    dst: PathLike,
    *,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    adapter: PathLike | None = None,
    scaling: float | None = None,
    alpha: float | None = None,
    rank: int | None = None,
    use_rslora: bool = False,
    model: str | None = None,
    hf_config: PathLike | None = None,
    prefix: str = DEFAULT_PREFIX,
    format: str | None = None,
    step: str | None = None,
    allow_missing: bool | Sequence[str] = False,
    contents: str = "error",
    processes: int = 1,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    resume: bool = False,
    hashes: bool = False,
    fingerprints: bool = False,
    sign: PathLike | None = None,
    fsync: bool = False,
    crc: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Fold LoRA branches into the weights: W + scaling · B · A, without LoRA parameters.

    Args:
        src: file of complete weights, or the folder of `rank_<n>` folders.
        dst: folder for the result.
        src_strategy: strategy of the source. That of a folder is merged into merged_ckpt_strategy.ckpt there first.
        dst_strategy: cut the merged weights for this strategy, in the same pass; None for complete weights.
        adapter: checkpoint or PEFT folder with the LoRA parameters, if they are not in the source.
        scaling: lora_alpha / lora_rank of the training. Left out, with `alpha`, for what the adapter's settings say.
        alpha, rank, use_rslora: what the scaling is made of, instead of `scaling`.
        model, hf_config: model, and folder of config.json, of an adapter with Hugging Face names.

    The other arguments are those of `transform`. Raises CheckpointError; then `dst` is as it was.
    """
    paths = {"src": src, "dst": dst, "adapter": adapter, "hf_config": hf_config, "sign": sign}
    check_arguments(**paths, prefix=prefix, format=format, step=step, contents=contents, processes=processes)
    if scaling is not None and (alpha is not None or rank is not None or use_rslora):
        raise ConfigError("scaling is the whole factor; leave out alpha, rank and use_rslora")
    request = MergeRequest(
        as_path(src),
        as_path(dst),
        src_strategy,
        dst_strategy,
        path_or_none(adapter),
        Scaling(scaling, alpha, rank, use_rslora),
        model,
        path_or_none(hf_config),
        prefix=prefix,
        format=format,
        step=step,
        allow_missing=allow_missing,
        contents=contents,
    )
    options = options_of(
        processes,
        sign,
        overwrite=overwrite,
        overwrite_anything=overwrite_anything,
        resume=resume,
        hashes=hashes,
        fingerprints=fingerprints,
        fsync=fsync,
        crc=crc,
    )
    merge = request.prepare()
    notes = verify_crcs(merge.plan) if crc else []
    report = merge.run(options, progress)
    return replace(report, warnings=(*notes, *report.warnings))


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


def _source_strategy(given: StrategyLike, merged: Path | None) -> Strategy:
    """The strategy of the source; that of a folder is merged into a file first.

    Raises StrategyError when that file cannot be written.
    """
    path = None if isinstance(given, Strategy) else path_or_none(given)
    if path is None or not path.is_dir() or not any(path.glob("*rank_*.*")):
        return as_strategy(given)
    file = merged or path / MERGED_FILE
    if merged is None and any(path.glob("*rank_*.json")):
        file = file.with_suffix(".json")
    folder = existing(file.parent)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StrategyError(
            f"{folder} cannot be written, so that the strategy files cannot be merged there; allow it, or choose "
            "another place for the merged file with --merged-strategy FILE"
        )
    return merge_strategies(path, file)


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
