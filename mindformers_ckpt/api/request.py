"""From what is asked for, by options or arguments, to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mindformers_ckpt.disk.waiting import has_waited
from mindformers_ckpt.errors import ConfigError, PlanError
from mindformers_ckpt.objects.path import ObjectPath
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.file import Job
from mindformers_ckpt.planning.missing import weight_names
from mindformers_ckpt.planning.model import DEFAULT_PREFIX, Place, Plan, SourceFile, TargetFile, Transfer
from mindformers_ckpt.publish.counted import LEFT_ASIDE
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.complete import separate_checkpoints
from mindformers_ckpt.sources.find import check_outside, find_mindspore, is_huggingface_folder
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.shapes import Reference, check_shapes, shapes_of_checkpoint
from mindformers_ckpt.sources.source import Source
from mindformers_ckpt.strategy.given import StrategyLike, as_strategy
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.words import counted

if TYPE_CHECKING:
    from mindformers_ckpt.targets.checkpoint2 import Made

CHECKPOINT2 = "checkpoint2"


class Prepared(NamedTuple):
    """What a request comes to."""

    job: Job
    source: Strategy
    target: Strategy


@dataclass(frozen=True)
class Request:
    """What to make of what: the options of `mindformers-ckpt transform`, the arguments of `mc.plan`."""

    src_checkpoint: Path
    src_strategy: StrategyLike = None
    destination: Path | None = None
    step: str | None = None
    dst_strategy: StrategyLike = None
    prefix: str = DEFAULT_PREFIX
    format: str | None = None
    ranks: tuple[int, ...] | None = None
    world_size: int | None = None
    rank_id: int | None = None
    allow_missing: bool | Sequence[str] = False
    weights_only: bool = False
    contents: str = "error"
    like: Path | None = None
    processes: int = 1

    def prepare(self) -> Prepared:
        """Read headers and strategies, and plan. Nothing is written."""
        files = find_mindspore(self.src_checkpoint, self.step, weights_only=self.weights_only)
        if self.destination is not None:
            check_outside(files, self.destination)
        source = files.strategy(as_strategy(self.src_strategy))
        target = as_strategy(self.dst_strategy)
        _check_names(files, target)
        ranks = self._ranks(target)
        format = self._file_format(files)
        plans = {}
        for part in separate_checkpoints(files):
            checkpoint = Checkpoint(part, source)
            if has_waited() or isinstance(part.root, ObjectPath):  # who copies compares the heads of what it reads
                checkpoint.look_quickly()
            if self.weights_only:
                checkpoint = checkpoint.only(weight_names(checkpoint.tensors()))
            notes = () if self.like is None else check_shapes(checkpoint, _reference(self.like, checkpoint))
            plan = build_plan(
                checkpoint,
                target,
                ranks=ranks,
                prefix=self.prefix,
                format=format,
                allow_missing=self.allow_missing,
                contents=self.contents,
            )
            plans[part.name] = replace(plan, warnings=(*plan.warnings, *notes))
        plan = next(iter(plans.values())) if len(plans) == 1 else _joined(plans)
        made = None if self.format != CHECKPOINT2 else self._as_checkpoint2(plans, target)
        plan = plan if made is None else made.plan
        about = {"source": source.describe(), "target": target.describe(), "source_path": str(files.root)}
        if self.weights_only:
            about[LEFT_ASIDE] = "states of the optimizer and counters"
        partial = ranks is not None and len(set(ranks)) < target.rank_count
        destination = None if self.destination is None else self.destination.absolute()
        job = Job(plan, about, partial, destination)
        return Prepared(job if made is None else replace(job, companions=made.companions), source, target)

    def _file_format(self, files: Source) -> str:
        """The format of the target files, which those of checkpoint 2.0 are, too."""
        if self.format != CHECKPOINT2:
            return self.format or default_format(files)
        if self.ranks is not None or self.rank_id is not None:
            raise ConfigError("a checkpoint 2.0 is made of all ranks at once; leave ranks out")
        return "safetensors"

    def _as_checkpoint2(self, plans: Mapping[str, Plan], target: Strategy) -> Made:
        from mindformers_ckpt.targets.checkpoint2 import as_checkpoint2

        if len(plans) > 1:
            raise PlanError(
                f"{self.src_checkpoint} holds several checkpoints ({', '.join(list(plans)[:20])}); give the file to "
                "make a checkpoint 2.0 of"
            )
        (plan,) = plans.values()
        return as_checkpoint2(plan, target, self.prefix)

    def _ranks(self, target: Strategy) -> Sequence[int] | None:
        """The target ranks to make, None for all."""
        count = target.rank_count
        if self.world_size is not None and self.world_size != count:
            raise ConfigError(
                f"world_size is {self.world_size}, but the target strategy is for "
                f"{counted(count, 'rank')} ({target.origin}); leave world_size out, or give the strategy "
                f"of the job with {self.world_size}"
            )
        if self.rank_id is None:
            return self.ranks
        processes = min(self.processes, count)
        size = count // processes
        firsts = [number * size for number in range(processes)]
        if self.rank_id not in firsts:
            raise ConfigError(
                f"rank_id {self.rank_id} begins no share: {processes} processes for {count} ranks begin at "
                f"{', '.join(map(str, firsts))}"
            )
        last = count if self.rank_id == firsts[-1] else self.rank_id + size
        return range(self.rank_id, last)


def _reference(path: Path, source: Checkpoint) -> Reference:
    """The shapes of what --like names."""
    if not _is_config(path):
        return shapes_of_checkpoint(path)
    from mindformers_ckpt.convert.shapes import shapes_of_config

    actual = {name: tensor.spec.shape for name, tensor in source.tensors().items()}
    return Reference(path, shapes_of_config(path, actual))


def _is_config(path: Path) -> bool:
    """Whether a path is that of a config.json, or a folder that it describes: of a model, or without weights."""
    if not path.is_dir():
        return path.suffix == ".json"
    listing = Listing(path)
    is_bare = "config.json" in listing.file_names and not listing.rank_folders and not listing.weight_files()
    return is_bare or is_huggingface_folder(path)


def _check_names(files: Source, target: Strategy) -> None:
    """Refuse a distributed checkpoint of other names than the target's: its weights may be those of Hugging Face."""
    names = target.names()
    if files.tensors is not None and names and names.isdisjoint(files.tensors):
        raise PlanError(
            f"{files.root} and {target.origin} have no parameter in common ({min(files.tensors)}, … and {min(names)}, "
            "…); a model with Hugging Face's names is converted: mindformers-ckpt convert --input-path … "
            "--output-path … --dst-strategy …"
        )


def default_format(files: Source) -> str:
    """That of the source files; ckpt for a mixture."""
    return "safetensors" if all(path.suffix == ".safetensors" for path in files.files) else "ckpt"


def _joined(plans: Mapping[str, Plan]) -> Plan:
    """One plan that makes the result of each in a folder of its name."""
    sources: list[SourceFile] = []
    targets: list[TargetFile] = []
    transfers: list[Transfer] = []
    warnings: list[str] = []
    for name, plan in plans.items():
        first_source, first_target = len(sources), len(targets)
        sources += plan.sources
        targets += [target._replace(path=f"{name}/{target.path}") for target in plan.targets]
        transfers += [
            transfer._replace(
                sources=_shifted(transfer.sources, first_source), targets=_shifted(transfer.targets, first_target)
            )
            for transfer in plan.transfers
        ]
        warnings += [f"{name}: {warning}" for warning in plan.warnings]
    return replace(
        next(iter(plans.values())),
        sources=tuple(sources),
        targets=tuple(targets),
        transfers=tuple(transfers),
        warnings=tuple(warnings),
    )


def _shifted(places: Sequence[Place], by: int) -> tuple[Place, ...]:
    return tuple(place._replace(file=place.file + by) for place in places)
