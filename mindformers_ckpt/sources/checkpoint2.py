"""Checkpoint 2.0, MindFormers' own format since 1.7: the shards of all ranks in one folder, with their layouts.

    {prefix-}model-{number:07d}-{total:07d}.safetensors
    {prefix-}opt-{number:07d}-{total:07d}.safetensors     moments, counters
    common.json                                           counters of the training
    metadata.json                                         layouts and places; absent on one card

The number is that of the rank, but where redundancy was removed, one of the files: then metadata.json alone tells whose
slices a file holds. Without it the names tell the ranks, and the strategy must be given.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.errors import PlanError, raise_problems
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.source import Kind, Source
from mindformers_ckpt.strategy.iterations import chosen_iteration, is_save_path, iteration_of
from mindformers_ckpt.strategy.metadata import METADATA_FILE, Metadata
from mindformers_ckpt.text_files import read_json_object
from mindformers_ckpt.words import shortened

COMMON_FILE = "common.json"
_FILE = re.compile(r"(?P<prefix>.+-)?(?P<side>model|opt)-(?P<number>\d{7,})-(?P<total>\d{7,})\.safetensors")
# The counters of common.json that older checkpoints hold as tensors, and which: as MindFormers 1.x saves them.
COUNTERS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "epoch_num": ("int64", ()),
    "step_num": ("int64", ()),
    "global_step": ("int32", (1,)),
    "loss_scale": ("float32", ()),
    "global_batch_size": ("int64", ()),
    "consumed_samples": ("int64", ()),
}
COMMON_NAMES = frozenset(COUNTERS)
_CODES = {"int32": "<i", "int64": "<q", "float32": "<f"}
_UNHEALTHY = 1  # `ckpt_status` of a checkpoint that was saved after a fault


class FileName(NamedTuple):
    """What the name of a file says: the side is "model" or "opt"."""

    prefix: str
    side: str
    number: int
    total: int


def parse_name(name: str) -> FileName | None:
    """The parts of a file's name, None when it is no file of a checkpoint 2.0."""
    match = _FILE.fullmatch(name)
    if match is None:
        return None
    return FileName((match["prefix"] or "")[:-1], match["side"], int(match["number"]), int(match["total"]))


def file_name(prefix: str, side: str, number: int, total: int) -> str:
    """The name of a file; the reverse of `parse_name`."""
    return f"{prefix}{'-' if prefix else ''}{side}-{number:07d}-{total:07d}.safetensors"


def is_checkpoint(listing: Listing) -> bool:
    """Whether a folder is a checkpoint of this format, or a save path of several."""
    if is_save_path(listing.names) or any(parse_name(name) is not None for name in listing.file_names):
        return True
    metadata = listing.json(METADATA_FILE) if METADATA_FILE in listing.file_names else None
    return isinstance(metadata, dict) and "state_dict_metadata" in metadata


def read(listing: Listing, wanted: str | None = None, *, weights_only: bool = False) -> Source:
    """The source of an iteration's folder, or of a save path; `wanted` names an iteration of it.

    `weights_only` leaves the files of the optimizer aside. Raises PlanError when the iteration or files are missing,
    StrategyError for a metadata.json that cannot be used.
    """
    root = listing.folder
    remarks: list[str] = []
    if is_save_path(listing.names):
        folder, remarks = chosen_iteration(root, listing.names, wanted, PlanError)
        listing = Listing(folder)
    elif wanted is not None and iteration_of(wanted) != iteration_of(root.name):
        raise PlanError(f"{root} is one checkpoint, which has no steps; leave {wanted!r} out")
    common = _common(listing)
    if common.get("ckpt_status") == _UNHEALTHY:
        remarks.append(f"{listing.folder / COMMON_FILE} says that this checkpoint was saved in an abnormal state")
    if METADATA_FILE in listing.file_names:
        return _described(root, listing, common, remarks, weights_only)
    return _by_name(root, listing, common, remarks, weights_only)


def _described(root: Path, listing: Listing, common: Mapping[str, Any], remarks: list[str], bare: bool) -> Source:
    """The source that metadata.json describes. A rank that lacks a file has none."""
    from mindformers_ckpt.strategy.files import read_metadata  # protobuf

    metadata = read_metadata(listing.folder / METADATA_FILE)
    there = set(listing.file_names)
    by_rank: dict[int, tuple[Path, ...]] = {}
    absent: dict[int, str] = {}
    for rank, named in metadata.files_by_rank().items():
        names = [name for name in _with_counters(named, rank, there) if not (bare and _is_optimizer(name))]
        lacking = [name for name in names if name not in there]
        if lacking:
            absent[rank] = f"{', '.join(lacking)} of {METADATA_FILE} is missing in {listing.folder}"
        elif names:
            by_rank[rank] = tuple(listing.folder / name for name in names)
    read = {path.name for paths in by_rank.values() for path in paths}
    surplus = [name for name in sorted(there) if name.endswith(".safetensors") and name not in read]
    if surplus and not bare and not absent:
        remarks.append(f"{listing.folder}: left aside, since {METADATA_FILE} does not name them: {shortened(surplus)}")
    source = Source(
        root,
        by_rank,
        Kind.CHECKPOINT2,
        absent=absent,
        advice="copy all files of the checkpoint",
        warnings=tuple(remarks),
        metadata=metadata,
        counters=counters_in(common),
    )
    if not by_rank:
        source.raise_absent()
        raise PlanError(f"{listing.folder} describes no file that could be read")
    return source


def _with_counters(named: Iterable[str], rank: int, there: Iterable[str]) -> list[str]:
    """The files of a rank, with that of its optimizer where it holds counters only, which are not described."""
    names = list(named)
    for found in [parse_name(name) for name in names]:
        if found is not None and found.number == rank:
            twin = file_name(found.prefix, "opt", rank, found.total)
            if twin in there and twin not in names:
                names.append(twin)
    return names


def _by_name(root: Path, listing: Listing, common: Mapping[str, Any], remarks: list[str], bare: bool) -> Source:
    """The source whose ranks are in the names of its files."""
    parsed = {name: found for name in listing.file_names if (found := parse_name(name)) is not None}
    if not parsed:
        raise PlanError(f"{listing.folder} holds no file of a checkpoint 2.0, but {listing.describe()}")
    problems = []
    prefixes = sorted({found.prefix for found in parsed.values()})
    totals = sorted({found.total for found in parsed.values()})
    if len(prefixes) > 1:
        problems.append(f"the files are of several checkpoints by their names: {', '.join(map(repr, prefixes[:20]))}")
    if len(totals) > 1:
        problems.append(f"the files are of jobs of different numbers of ranks: {', '.join(map(str, totals[:20]))}")
    raise_problems(PlanError, f"{listing.folder} has no {METADATA_FILE}, and", problems)
    by_rank: dict[int, tuple[Path, ...]] = {}
    for name, found in sorted(parsed.items(), key=lambda item: (item[1].number, item[1].side)):
        if not (bare and found.side == "opt"):
            by_rank[found.number] = (*by_rank.get(found.number, ()), listing.folder / name)
    absent = {rank: f"no file of rank {rank} in {listing.folder}" for rank in range(totals[0]) if rank not in by_rank}
    advice = f"copy all files of the checkpoint, {METADATA_FILE} too"
    return Source(
        root,
        by_rank,
        Kind.CHECKPOINT2,
        absent=absent,
        advice=advice,
        warnings=tuple(remarks),
        counters=counters_in(common),
    )


def _common(listing: Listing) -> dict[str, Any]:
    """The content of common.json, {} where there is none. Raises PlanError when it cannot be read."""
    if COMMON_FILE not in listing.file_names:
        return {}
    return read_json_object(listing.folder / COMMON_FILE, PlanError)


def counters_in(common: Mapping[str, Any]) -> tuple[tuple[TensorSpec, bytes], ...]:
    """The numbers of a common.json as the tensors that older formats keep them in. Raises PlanError."""
    found = []
    for name, (dtype, shape) in COUNTERS.items():
        value = common.get(name)
        if type(value) is int or (type(value) is float and dtype == "float32"):
            try:
                content = struct.pack(_CODES[dtype], value)
            except (struct.error, OverflowError) as error:
                raise PlanError(f"{COMMON_FILE}: {name} is {value!r:.40}, which no counter is ({error})") from None
            found.append((TensorSpec(name, by_name(dtype), shape), content))
    return tuple(found)


def _is_optimizer(name: str) -> bool:
    found = parse_name(name)
    return found is not None and found.side == "opt"


def contradictions(metadata: Metadata, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What a file holds otherwise than metadata.json says; `shapes` are those of its tensors."""
    problems = []
    for slice in metadata.by_file.get(path.name, ()):
        tensor = metadata.tensors[slice.name]
        shape = shapes.get(slice.name)
        expected = tensor.shape if tensor.layout is None else tensor.layout.box(tensor.shape, 0).shape
        if shape is None:
            problems.append(f"{path.name} lacks {slice.name}, which {METADATA_FILE} says is there")
        # A tensor that stages share may be cut by the optimizer on one of them only.
        elif shape != expected and (metadata.is_in_place(slice) or shape != tensor.shape):
            problems.append(f"{path.name}: {slice.name} is {list(shape)}, {METADATA_FILE} says {list(expected)}")
    return problems
