"""From a checkpoint and a target strategy to a plan: the re-slicing of every tensor."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum

from mindformers_ckpt.errors import PlanError, StrategyError, describe_problems, raise_problems
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.computations import Constant
from mindformers_ckpt.planning.missing import has_states, missing_names, patterns_of
from mindformers_ckpt.planning.model import DEFAULT_PREFIX, Place, Plan, SourceFile, TargetFile, Transfer
from mindformers_ckpt.planning.places import Places, Way, target_boxes
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.plausibility import check_contents, check_names
from mindformers_ckpt.sources.shards import LogicalTensor
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.strategy.states import with_states
from mindformers_ckpt.words import shortened


def build_plan(
    source: Checkpoint,
    target: Strategy,
    *,
    ranks: Iterable[int] | None = None,
    prefix: str = DEFAULT_PREFIX,
    format: str = "ckpt",
    allow_missing: bool | Sequence[str] = False,
    contents: str = "error",
) -> Plan:
    """Plan the re-slicing of `source` for the ranks of `target` (all of them, or `ranks`).

    The target files are `rank_<r>/<prefix><r>.<format>`. Tensors keep the source's order, those that both
    strategies name first, as MindSpore's own tool writes them. `contents` says what samples of the contents that
    contradict the source strategy are: an "error", a reason to "warn", or not looked at ("off": of many processes
    that plan the same, one is enough). `allow_missing` are names or patterns of parameters that the source may lack,
    True for all.

    Raises PlanError (or the errors of reading the source) with everything that does not fit: contents that
    contradict the source strategy, tensors that the target needs and nobody holds, shards of missing ranks,
    shapes that do not divide.
    """
    tensors = source.tensors()
    chosen = sorted(set(range(target.rank_count) if ranks is None else ranks))
    outside = [rank for rank in chosen if not 0 <= rank < target.rank_count]
    if outside:
        raise PlanError(f"ranks {outside[:8]} are not among the {target.rank_count} ranks of the target strategy")
    check_names(source, tensors)
    warnings = [*source.warnings, *check_contents(source, tensors, contents)]
    completed = _with_states(target, tensors)
    warnings += _one_sided(source, target, completed.names(), tensors)
    target = completed
    allowed = patterns_of(allow_missing)
    _check_lost(source, target, tensors, allowed)
    missing = missing_names(target.names(), tensors, allowed)
    headline = (
        f"{source.files.root} lacks parameters that the target strategy ({target.origin}) has; "
        "is it the checkpoint of this model?"
    )
    raise_problems(PlanError, headline, missing.required)
    warnings += missing.notes
    plan = _with_counters(_assemble(source, target, tensors, chosen, prefix, format), source, tensors)
    plan = replace(plan, warnings=tuple(warnings))
    plan.check()
    return plan


def _check_lost(
    source: Checkpoint, target: Strategy, tensors: Mapping[str, LogicalTensor], allowed: Sequence[str]
) -> None:
    """Refuse a source whose lost ranks alone held some parameters, where the target's own names cannot tell.

    Names that the target strategy has are `missing_names`' business.
    """
    lost_ranks = set(source.lost_ranks)
    if not lost_ranks:
        return
    size = source.strategy.stage_size
    wanted = target.names()
    lost = [
        name
        for name in missing_names(source.strategy.names(), tensors, allowed).required
        if name not in wanted
        and any(
            name in layouts and lost_ranks.intersection(range(stage * size, (stage + 1) * size))
            for stage, layouts in enumerate(source.strategy.stages)
        )
    ]
    if lost:
        source.files.raise_absent()
        ranks = sorted(lost_ranks)
        shown = f"{ranks[:8]}{' and more' if len(ranks) > 8 else ''}"
        headline = (
            f"{source.files.root} holds no files of ranks {shown}, and no other rank has the parameters of their "
            f"stage that the strategy ({source.strategy.origin}) names"
        )
        raise PlanError(describe_problems(headline, lost))


def _assemble(
    source: Checkpoint,
    target: Strategy,
    tensors: Mapping[str, LogicalTensor],
    ranks: Sequence[int],
    prefix: str,
    format: str,
) -> Plan:
    paths = source.used_files(tensors)
    found = Places(target, ranks, {path: number for number, path in enumerate(paths)})
    held: list[list[TensorSpec]] = [[] for _ in ranks]
    transfers, problems = [], []
    for name in _target_order(source.strategy, target, tensors):
        tensor = tensors[name]
        try:
            way = found.way(tensor)
        except StrategyError as error:
            problems.append(f"{name}: {error}")
            continue
        if not way.targets:
            continue
        if tensor.missing:
            problems += _lost_boxes(tensor, way)
        whole = tensor.spec
        transfers.append(Transfer(name, whole.dtype, whole.shape, found.sources(tensor, way), way.targets))
        for shape, holders in way.holders.items():
            spec = whole if shape == whole.shape else TensorSpec(name, whole.dtype, shape)
            for file in holders:
                held[file].append(spec)
    raise_problems(PlanError, f"{source.files.root} cannot be re-sliced for {target.describe()}", problems)
    headers = [source.header(path) for path in paths]
    files = tuple(SourceFile(header.path, header.size, header if header.is_likely else None) for header in headers)
    return Plan(files, rank_targets(ranks, held, prefix, format), tuple(transfers))


def _lost_boxes(tensor: LogicalTensor, way: Way) -> list[str]:
    """The boxes of a tensor that its targets need, and that no file holds."""
    return [
        f"{tensor.spec.name}{list(tensor.spec.shape)}: the box {box} is held by ranks {list(holders)}, none of whose "
        "files is there"
        for box, holders in tensor.missing
        if any(box.intersect(place.box) for place in way.targets)
    ]


def _with_counters(plan: Plan, source: Checkpoint, tensors: Mapping[str, LogicalTensor]) -> Plan:
    """The plan with the counters that the source keeps in a file of text, on every rank.

    Only where states of an optimizer are there: weights alone are not a training that goes on.
    """
    if not plan.sources or not source.files.counters or not has_states(tensors):
        return plan
    added = [
        (spec, content)
        for spec, content in source.files.counters
        if spec.name not in tensors and (source.names is None or spec.name in source.names)
    ]
    transfers = [
        Transfer(
            spec.name,
            spec.dtype,
            spec.shape,
            (Place(0, Box.whole(spec.shape), compute=Constant(spec.dtype, content)),),
            tuple(Place(file, Box.whole(spec.shape)) for file in range(len(plan.targets))),
        )
        for spec, content in added
    ]
    specs = tuple(spec for spec, _ in added)
    targets = tuple(target._replace(tensors=(*target.tensors, *specs)) for target in plan.targets)
    return replace(plan, targets=targets, transfers=(*plan.transfers, *transfers))


def rank_targets(
    ranks: Sequence[int], held: Sequence[Sequence[TensorSpec]], prefix: str, format: str
) -> tuple[TargetFile, ...]:
    """The files of ranks, by the tensors that each holds. Equal lists of tensors are one object."""
    shared: dict[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] = {}
    files = []
    for rank, specs in zip(ranks, held):
        key = tuple(specs)
        files.append(TargetFile(f"rank_{rank}/{prefix}{rank}.{format}", rank, format, shared.setdefault(key, key)))
    return tuple(files)


class Slices(Enum):
    """What the ranks of a source hold, beside what the same ranks of a target need."""

    SAME = "the same"
    SHARES = "the same or nothing"  # redundancy was removed at saving, or the files of ranks are lost
    OTHER = "other boxes"


def compare_slices(source: Checkpoint, target: Strategy) -> Slices:
    """Compare the boxes that the files of every rank hold with those that the same rank of the target needs.

    However the device matrices are written, and whatever the strategy says that files should hold.
    """
    strategy = source.strategy
    if (strategy.rank_count, strategy.stage_size) != (target.rank_count, target.stage_size):
        return Slices.OTHER
    ranks = range(strategy.rank_count)
    target = _with_states(target, source.tensors())
    found = Slices.SAME
    for name, tensor in source.tensors().items():
        try:
            needed = dict(target_boxes(tensor, target, ranks))
        except StrategyError:
            return Slices.OTHER  # building the plan tells what does not fit
        held = held_boxes(source, name, tensor)
        if any(needed.get(rank) != box for rank, box in held.items()):
            return Slices.OTHER
        if len(held) < len(needed):
            found = Slices.SHARES
    return found


def held_boxes(source: Checkpoint, name: str, tensor: LogicalTensor) -> dict[int, Box]:
    """The ranks whose files hold a tensor, each with the box it holds."""
    strategy, shape = source.strategy, tensor.spec.shape
    held: dict[int, Box] = {}
    for stage in tensor.stages:
        first = stage * strategy.stage_size
        layout = strategy.layout(name, stage) or tensor.layout
        boxes = layout.for_whole(shape).boxes(shape) if layout is not None else ()
        for position in range(strategy.stage_size):
            if source.holds(first + position, name):
                held[first + position] = boxes[position] if boxes else Box.whole(shape)
    return held


def _target_order(source: Strategy, target: Strategy, tensors: Collection[str]) -> list[str]:
    """Tensors that both strategies name first, then the rest: the order that MindSpore's tool writes."""

    named = [strategy.names() for strategy in (source, target) if not strategy.is_complete]
    if not named:
        return [*tensors]
    first = frozenset.intersection(*named)
    return [*(name for name in tensors if name in first), *(name for name in tensors if name not in first)]


def _with_states(target: Strategy, tensors: Mapping[str, LogicalTensor]) -> Strategy:
    if not target.names() or tensors.keys() <= target.names():
        return target
    return with_states(target, {name: tensor.spec.shape for name, tensor in tensors.items()})


def source_states(source: Checkpoint, tensors: Mapping[str, LogicalTensor]) -> list[str]:
    """Warn of states that the source strategy leaves out, and that are read as cut like their weights."""
    if source.files.metadata is not None:
        return []  # MindFormers itself leaves states out there
    return cut_like_weights("source", _like_weights(source, tensors))


def cut_like_weights(where: str, names: Sequence[str]) -> list[str]:
    """The warning of states that a strategy leaves out; none without names."""
    return [f"not in the {where} strategy, cut like their weights: {shortened(names)}"] if names else []


def _like_weights(source: Checkpoint, tensors: Mapping[str, LogicalTensor]) -> list[str]:
    named = source.strategy.names()
    unnamed = _in_order(tensors, tensors.keys() - named) if named else []
    return [name for name in unnamed if tensors[name].layout is not None]


def _in_order(names: Iterable[str], some: Container[str]) -> list[str]:
    """Some of the names, in their order."""
    return [name for name in names if name in some] if some else []


def _one_sided(
    source: Checkpoint, target: Strategy, completed: frozenset[str], tensors: Mapping[str, LogicalTensor]
) -> list[str]:
    """Warn of parameters that only one of two real strategies names, and of states that are cut though one leaves
    them out: the file decides how they are read. `completed` are the names of the target with these states."""
    in_source, in_target, held = source.strategy.names(), target.names(), tensors.keys()
    cut_too = _in_order(tensors, (completed - in_target) & held)
    warnings = [*source_states(source, tensors), *cut_like_weights("target", cut_too)]
    if source.strategy.is_complete or target.is_complete:
        return warnings
    lost = _in_order(tensors, held & (in_source - completed))
    gained = _in_order(tensors, (held & (in_target - in_source)) - {*_like_weights(source, tensors)})
    if lost:
        warnings.append(f"not in the target strategy, every target rank gets them whole: {shortened(lost)}")
    if gained:
        warnings.append(f"not in the source strategy, taken as whole in every source file: {shortened(gained)}")
    return warnings
