"""What is at a path: checkpoint, Hugging Face model, adapter, strategy, plan or result, by its headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.errors import CheckpointError, FormatError, PlanError, describe_problems
from mindformers_ckpt.formats import DType, Header
from mindformers_ckpt.formats.headers import look_quickly
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.look.facts import counter_facts, manifest_facts, model_facts, step_facts, strategy_facts
from mindformers_ckpt.look.odd import odd_things
from mindformers_ckpt.look.parameters import KINDS, Parameter, find_parameters, kinds_of
from mindformers_ckpt.objects.path import PathLike, absolute
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.complete import only_checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.sources.listing import Listing, is_strategy_file
from mindformers_ckpt.sources.source import Kind, Source
from mindformers_ckpt.strategy.files import MERGED_FILE, is_strategy_folder, read_strategy
from mindformers_ckpt.strategy.given import StrategyLike, strategy_or_none
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.text_files import MAX_OWN_BYTES, read_json
from mindformers_ckpt.words import counted, shortened, spans


class Total(NamedTuple):
    """How much of one kind: tensors, and their bytes without replicas."""

    tensors: int
    nbytes: int


class Held(NamedTuple):
    """What the file of a rank holds of a tensor: its box of the whole, and where the content begins in the file."""

    name: str
    dtype: DType
    box: Box
    path: Path
    offset: int


@dataclass(frozen=True)
class Inspection:
    """What is at a path.

    Attributes:
        path: what was looked at.
        what: what it is: "rank folders", "complete weights", "a Hugging Face model", "an adapter", "a strategy",
            "a plan" or "a result".
        facts: label -> text, in the order to read them: strategy, mesh, step, files, ….
        strategy: the strategy it is read with; None where none is needed, or none is known.
        parameters: all tensors, in the order of the files.
        odd: what is not as in an ordinary checkpoint, a line each.
    """

    path: Path
    what: str
    facts: Mapping[str, str]
    strategy: Strategy | None = None
    parameters: tuple[Parameter, ...] = ()
    odd: tuple[str, ...] = ()
    _files: Checkpoint | None = field(default=None, repr=False)

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage."""
        return 1 if self.strategy is None else self.strategy.stage_size

    @property
    def totals(self) -> dict[str, Total]:
        """Kind ("weights", "optimizer states", …) -> how much there is of it."""
        sums = {kind: [0, 0] for kind in KINDS}
        for parameter in self.parameters:
            sums[parameter.kind][0] += 1
            sums[parameter.kind][1] += parameter.nbytes
        return {kind: Total(*both) for kind, both in sums.items() if both[0]}

    def only(self, pattern: str) -> Inspection:
        """The same with those parameters only whose names fit a pattern with `*` and `?`; or hold the text itself."""
        is_plain = not any(mark in pattern for mark in "*?[")
        fitting = tuple(
            parameter
            for parameter in self.parameters
            if (pattern in parameter.name if is_plain else fnmatchcase(parameter.name, pattern))
        )
        if not fitting:
            some = shortened([parameter.name for parameter in self.parameters], 5)
            raise PlanError(f"{self.path}: no parameter is called like {pattern!r}; there are {some}")
        return replace(self, parameters=fitting)

    def held_by(self, rank: int) -> list[Held]:
        """What the files of a rank hold of the parameters. Raises PlanError when the rank has no file."""
        if self._files is None or rank not in self._files.files.by_rank:
            ranks = "none" if self._files is None else spans(self._files.files.by_rank)
            raise PlanError(f"{self.path} holds no file of rank {rank}; ranks with files: {ranks}")
        records = self._files.records_of(rank)
        found = []
        for parameter in self.parameters:
            if parameter.told is not None:
                found += [
                    Held(parameter.name, parameter.dtype, shard.box, shard.path, self._files.offset_of(shard))
                    for shard in parameter.told.shards
                ]
            elif parameter.name in records:
                path, record = records[parameter.name]
                offset = record.segments[0].offset if record.segments else 0
                found.append(
                    Held(parameter.name, parameter.dtype, self._box(parameter, rank, record.spec.shape), path, offset)
                )
        return found

    def _box(self, parameter: Parameter, rank: int, shape: tuple[int, ...]) -> Box:
        if parameter.layout is None:
            return Box.whole(shape)
        return parameter.layout.for_whole(parameter.shape).box(parameter.shape, rank % self.stage_size)

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON has it. Ranks are spans: "0-7,12"."""
        return {
            "path": str(self.path),
            "what": self.what,
            "facts": dict(self.facts),
            "ranks": None if self.strategy is None else self.strategy.rank_count,
            "stages": None if self.strategy is None else len(self.strategy.stages),
            "totals": {kind: total._asdict() for kind, total in self.totals.items()},
            "odd": list(self.odd),
            "parameters": [
                {
                    "name": parameter.name,
                    "kind": parameter.kind,
                    "dtype": parameter.dtype.name,
                    "shape": list(parameter.shape),
                    "nbytes": parameter.nbytes,
                    "cut": None if parameter.pieces is None else list(parameter.pieces),
                    "stages": list(parameter.stages),
                    "ranks": spans(parameter.ranks),
                    "replicas": parameter.replicas,
                }
                for parameter in self.parameters
            ],
        }


def inspect(path: PathLike, strategy: StrategyLike = None, *, step: str | None = None) -> Inspection:
    """Look at a checkpoint, Hugging Face folder, adapter, strategy, plan or result; what is it, and what is in it?

    Of files the headers are read, and the values of a few counters ("global_step"). `strategy` is that of rank folders;
    left out, one in a folder `strategy` in them or beside them is taken, which the facts say. `step` chooses among
    several files. Raises CheckpointError when there is nothing that can be read.
    """
    path = absolute(path)
    if step is None and strategy is None:
        other = _of_file(path) if path.is_file() else _of_folder(path) if path.is_dir() else None
        if other is not None:
            return other
    return _checkpoint(path, strategy, step)


def _of_file(path: Path) -> Inspection | None:
    """What a file is that holds no weights; None for one that does."""
    if path.suffix == ".json":
        return _json_file(path)
    if path.suffix == ".ckpt" and (is_strategy_file(path.name) or path.name == MERGED_FILE or not _is_record(path)):
        return _strategy(path)
    return None


def _is_record(path: Path) -> bool:
    """Whether a file begins as a checkpoint does, or as nothing that is a strategy."""
    with path.open("rb") as stream:
        return stream.read(1) not in (b"\x08", b"\x12")


def _json_file(path: Path) -> Inspection | None:
    from mindformers_ckpt.sources.adapter import SETTINGS_FILE

    if path.name == SETTINGS_FILE:
        return _adapter(path)
    content = read_json(path, FormatError, limit=MAX_OWN_BYTES, infinite=True)
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds no JSON object; give a checkpoint, strategy, plan or manifest")
    if "mindformers_ckpt_plan" in content:
        return _plan(path)
    if "parallel_layout_item" in content:
        return _strategy(path)
    if "mindformers_ckpt" in content:
        return Inspection(path, "the manifest of a result", manifest_facts(content))
    if path.name.endswith(".index.json"):
        return None
    if "model_type" in content:
        return _checkpoint(path.parent, None, None)
    raise FormatError(f"{path} is neither a strategy, a plan, a manifest, an index nor the config.json of a model")


def _of_folder(path: Path) -> Inspection | None:
    from mindformers_ckpt.sources.adapter import SETTINGS_FILE

    listing = Listing(path)
    if listing.rank_folders or listing.weight_files():
        is_adapter = any(name.startswith("adapter_model.") for name in listing.file_names)
        return _adapter(path) if is_adapter and not listing.rank_folders else None
    if SETTINGS_FILE in listing.file_names:
        return _adapter(path)
    return _strategy(path) if is_strategy_folder(path) else None


# ------------------------------------------------------------------------------------------- no weights


def _strategy(path: Path) -> Inspection:
    strategy = read_strategy(path)
    return Inspection(path, "a strategy", strategy_facts(strategy), strategy)


def _plan(path: Path) -> Inspection:
    from mindformers_ckpt.planning.file import read_plan

    job = read_plan(path)
    plan = job.plan
    facts = {
        **{label: str(text) for label, text in job.about.items()},
        "destination": str(job.destination or "not given"),
        "files": f"{len(plan.files_read)} to read, {len(plan.targets)} to write",
        "read": f"{plan.bytes_read:,} bytes of tensors",
        "write": f"{plan.bytes_written:,} bytes of tensors",
    }
    kinds = kinds_of(transfer.name for transfer in plan.transfers)
    parameters = tuple(
        Parameter(
            transfer.name,
            transfer.dtype,
            transfer.shape,
            kinds[transfer.name],
            None,
            (0,),
            tuple(sorted({plan.targets[place.file].rank for place in transfer.targets})),
            len(transfer.targets),
        )
        for transfer in plan.transfers
    )
    return Inspection(path, "a plan", facts, None, parameters, plan.warnings)


def _adapter(path: Path) -> Inspection:
    from mindformers_ckpt.lora_settings import read_settings
    from mindformers_ckpt.sources.adapter import find_adapter

    adapter = find_adapter(path)
    facts, odd = {}, list(adapter.notes)
    if adapter.settings is not None:
        facts["settings"] = str(adapter.settings)
        try:
            scaling = read_settings(adapter.settings)
            facts["rank"], facts["alpha"] = str(scaling.rank), str(scaling.alpha)
            if scaling.rank_stabilised:
                facts["rsLoRA"] = "alpha / sqrt(rank)"
        except CheckpointError as error:
            odd.append(str(error))
    found = _source(adapter.files, Strategy.complete() if not adapter.files.sharded else None, {})
    return replace(found, path=path, what="an adapter", facts={**facts, **found.facts}, odd=(*odd, *found.odd))


# ------------------------------------------------------------------------------------------- weights


def _checkpoint(path: Path, strategy: StrategyLike, step: str | None) -> Inspection:
    found = only_checkpoint(find_source(path, step))
    given = strategy_or_none(strategy)
    facts: dict[str, str] = {}
    if found.own_strategy is not None:
        given = found.strategy(given or Strategy.complete())
    elif given is None and found.kind is Kind.RANK_FOLDERS:
        near = _strategy_beside(found)
        if near is not None:
            facts["strategy"] = f"{near.origin} (found there; --strategy gives another)"
            given = near
    return _source(found, given, facts)


def _strategy_beside(source: Source) -> Strategy | None:
    from mindformers_ckpt.strategy.nearby import strategy_near

    ranks = max((*source.by_rank, *source.absent), default=0) + 1
    return strategy_near(source.root, ranks) if ranks > 1 else None


def _source(source: Source, strategy: Strategy | None, facts: dict[str, str]) -> Inspection:
    from mindformers_ckpt.publish.manifest import read_manifests

    ranks = max((*source.by_rank, *source.absent), default=0) + 1
    used = strategy or (Strategy(({},), ranks, "not known") if source.sharded else Strategy.complete())
    # A source that tells its own boxes has told all that is shown.
    found = dict(look_quickly(source.files) if source.tensors is None else ())
    headers = {path: header for path, header in found.items() if isinstance(header, Header)}
    damaged = [str(error) for error in found.values() if isinstance(error, FormatError)]
    if not headers and source.tensors is None:
        raise FormatError(damaged[0] if len(damaged) == 1 else describe_problems("no file can be read", damaged))
    files = Checkpoint(source, used, _headers=headers)
    parameters, problems = find_parameters(files, headers)
    if source.root.is_dir():
        for manifest in list(read_manifests(source.root).values())[:1]:
            facts.update(manifest_facts(manifest) if "mindformers_ckpt" in manifest else {})
    if source.sharded:
        facts.update(strategy_facts(used))
        if strategy is None and ranks > 1:
            facts["ranks"] = f"{ranks}; their strategy is not known: shapes are those of shards (--strategy tells more)"
    if source.kind is Kind.HUGGING_FACE:
        facts.update(model_facts(source.root))
    facts.update(step_facts(source))
    facts.update(counter_facts(files, parameters))
    sizes = (header.size for header in headers.values())
    size = sum(sizes if source.tensors is None else (path.stat().st_size for path in source.files))
    facts["files"] = f"{counted(len(source.files), 'file')}, {size:,} bytes"
    is_known = strategy is not None or ranks == 1
    notes = (*source.warnings, *damaged, *problems, *odd_things(source, files, parameters, is_known))
    known = used if is_known else None
    return Inspection(source.root, source.kind.value, facts, known, tuple(parameters), notes, files)
