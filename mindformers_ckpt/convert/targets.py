"""Where converted tensors go: one file, files of bounded size, or the ranks of a strategy."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

from mindformers_ckpt.convert.planning import Conversion, Converted
from mindformers_ckpt.errors import PlanError, StrategyError, describe_problems, raise_problems
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.geometry.axes import runs
from mindformers_ckpt.geometry.box import Box, hull
from mindformers_ckpt.planning.build import cut_like_weights, rank_targets
from mindformers_ckpt.planning.missing import missing_names, patterns_of
from mindformers_ckpt.planning.model import DEFAULT_PREFIX, Place, Plan, TargetFile, Transfer, View
from mindformers_ckpt.planning.places import target_boxes
from mindformers_ckpt.sources.shards import LogicalTensor
from mindformers_ckpt.state_names import find_states
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.strategy.states import with_states

Metadata = tuple[tuple[str, str], ...]


def whole_files(
    conversion: Conversion, name: str, format: str, *, limit: int | None = None, metadata: Metadata = ()
) -> Plan:
    """Complete weights in a file of this name, or in several of at most `limit` bytes.

    With a limit, `name` gets the number of the file: "model-{number:05d}-of-{count:05d}.safetensors"; a single
    file is "model.safetensors". A tensor over the limit has a file of its own.
    """
    files: list[list[Converted]] = [[]]
    held = 0
    for converted in conversion.tensors:
        if limit is not None and files[-1] and held + converted.spec.nbytes > limit:
            files.append([])
            held = 0
        files[-1].append(converted)
        held += converted.spec.nbytes
    targets, transfers = [], []
    for number, content in enumerate(files):
        path = f"{name}.{format}" if limit is not None else name
        if len(files) > 1:
            path = f"{name}-{number + 1:05d}-of-{len(files):05d}.{format}"
        targets.append(TargetFile(path, number, format, tuple(item.spec for item in content), metadata))
        for converted in content:
            place = Place(number, Box.whole(converted.transfer.shape))
            transfers.append(converted.transfer._replace(targets=(place,)))
    return Plan(conversion.files, tuple(targets), tuple(transfers), conversion.warnings)


def rank_files(
    conversion: Conversion,
    target: Strategy,
    *,
    prefix: str = DEFAULT_PREFIX,
    format: str,
    origin: str,
    allow_missing: bool | Sequence[str] = False,
) -> Plan:
    """The files that re-slicing the complete weights would make: `rank_<r>/<prefix><r>.<format>`.

    Raises PlanError that lists parameters of the strategy which the weights lack, and shapes that do not divide.
    """
    told = target.names()
    target = with_states(target, {item.spec.name: item.spec.shape for item in conversion.tensors})
    chosen = range(target.rank_count)
    logical = {item.spec.name: LogicalTensor(item.spec, (), (), None, item.stages) for item in conversion.tensors}
    absent = missing_names(target.names(), logical, patterns_of(allow_missing))
    states = find_states(absent.required, target.names())
    required = [name for name in absent.required if name not in states.names()]
    if required:
        lack = f"{origin} lacks parameters that the target strategy ({target.origin}) has"
        raise PlanError(describe_problems(f"{lack}; {_advice(required, logical)}", required))
    notes = [*absent.notes, *cut_like_weights("target", sorted(target.names() - told))]
    if states:
        notes.append(f"the target strategy names states of a training run, which start anew: {states}")
    held: list[list[TensorSpec]] = [[] for _ in chosen]
    named = target.names()
    transfers, problems = [], []
    # The order of `build_plan`: what the strategy names comes first.
    order = sorted(conversion.tensors, key=lambda item: not target.is_complete and item.spec.name not in named)
    for converted in order:
        spec = converted.spec
        try:
            boxes = target_boxes(logical[spec.name], target, chosen)
        except StrategyError as error:
            problems.append(f"{spec.name}: {error}")
            continue
        if boxes:
            transfers.append(_cut(converted, boxes))
        for rank, box in boxes:
            held[rank].append(TensorSpec(spec.name, spec.dtype, box.shape))
    raise_problems(PlanError, f"the weights cannot be cut for {target.describe()}", problems)
    files = rank_targets(chosen, held, prefix, format)
    return Plan(conversion.files, files, tuple(transfers), (*conversion.warnings, *notes))


def _advice(required: Collection[str], held: Collection[str]) -> str:
    """What may be wrong where a strategy has names that converted weights have not."""
    is_mcore, is_made_mcore = (any(name.startswith("decoder.") for name in names) for names in (required, held))
    if is_mcore != is_made_mcore:
        asked, made = ("mcore", "legacy") if is_mcore else ("legacy", "mcore")
        return f"the strategy has {asked} names, the result would have {made} names: give --naming {asked}"
    return "is it the strategy of a job with this model?"


def _cut(converted: Converted, boxes: Sequence[tuple[int, Box]]) -> Transfer:
    """The transfer with target places for boxes of the real shape, (file, box) each.

    A box that is not one box of the view is several.
    """
    pieces: dict[Box, list[tuple[Box, View | None]]] = {}
    targets = []
    for file, box in boxes:
        if box not in pieces:
            pieces[box] = list(_in_view(box, converted))
        targets += [Place(file, part, view=view) for part, view in pieces[box]]
    wanted = hull([place.box for place in targets])
    sources = tuple(
        place
        for place in converted.transfer.sources
        if place.box.volume == 0 or place.box.intersect(wanted) is not None
    )
    return converted.transfer._replace(sources=sources, targets=tuple(targets))


def _in_view(box: Box, converted: Converted) -> Iterator[tuple[Box, View | None]]:
    """A box of the tensor's real shape as boxes of its view, each with its place in the shard."""
    space, at = converted.transfer.shape, 0
    by_dimension = []
    for first, last, count in zip(box.start, box.stop, converted.groups):
        by_dimension.append(list(runs(first, last, space[at : at + count])))
        at += count
    for choice in itertools.product(*by_dimension):
        part = Box(
            tuple(index for run in choice for index in run.start), tuple(index for run in choice for index in run.stop)
        )
        inner = Box(tuple(run.first for run in choice), tuple(run.last for run in choice)).relative_to(box)
        whole = inner == Box.whole(box.shape)
        yield part, None if whole else View(box.shape, inner, ())
