"""Distributed checkpoints with a `.metadata`: PyTorch's (DCP, .distcp files) and hyper-parallel's (.safetensors files).

    .metadata                  tensors, the boxes of them that are stored, and where; written last
    __{rank}_{n}.distcp        PyTorch: tensors one after the other, each as torch.save writes it
    _rank{rank}_.safetensors   hyper-parallel: a rank's boxes under the names of their tensors

The boxes may be of any sizes (uneven FSDP shards), so that no strategy says them; nor is one needed. What was saved may
be nested ({"model": …, "optim": …}): names are joined with dots, as the two libraries do, but the weights lose the name
of the dictionary that they are in. What is no tensor is left aside.

The reading of hyper-parallel's folders was written after its published source, for there is no package of it to run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ckpt.errors import PlanError, raise_problems
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.formats.distcp import SUFFIX
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.shards import LogicalTensor, Shard, from_boxes
from mindformers_ckpt.sources.source import SUFFIXES, TORCH_SUFFIXES, Kind, Source
from mindformers_ckpt.state_names import find_states
from mindformers_ckpt.words import shortened

if TYPE_CHECKING:
    from mindformers_ckpt.formats.dcp_metadata import DcpMetadata, Described

_OF_HYPER_PARALLEL = re.compile(r".*_rank\d+_\.safetensors")
_WEIGHTS = (SUFFIX, *SUFFIXES, *TORCH_SUFFIXES)
# What training scripts call the weights where they save more than these.
_WRAPPERS = ("state_dict", "model", "module")


def is_checkpoint(listing: Listing) -> bool:
    """Whether a folder is one, by the names in it: it may lack its metadata."""
    names = listing.file_names
    if any(name.endswith(SUFFIX) for name in names):
        return True
    if not any(_OF_HYPER_PARALLEL.fullmatch(name) for name in names):
        return False
    from mindformers_ckpt.formats.dcp_metadata import metadata_files

    return bool(metadata_files(listing.folder))


def is_part(name: str) -> bool:
    """Whether a file is by its name one of such a folder, so that it alone is nothing."""
    return name.endswith((SUFFIX, ".metadata")) or _OF_HYPER_PARALLEL.fullmatch(name) is not None


def read(listing: Listing, *, weights_only: bool = False) -> Source:
    """The source that a folder is; `weights_only` leaves everything beside the weights aside.

    Raises FormatError for metadata that cannot be read, and PlanError that lists missing files, and tensors of which a
    part is nowhere or twice.
    """
    from mindformers_ckpt.formats.dcp_metadata import read_metadata

    root, metadata = listing.folder, read_metadata(listing.folder)
    _check_files(listing, metadata)
    names, weights, remarks = _names(root, metadata)
    tensors: dict[str, LogicalTensor] = {}
    paths = {name: root / name for name in metadata.by_file}  # each of them one object, for millions of shards
    problems = []
    for told, described in metadata.tensors.items():
        try:
            tensors[names[told]] = _tensor(paths, names[told], told, described)
        except PlanError as error:
            problems.append(f"{told}: {error}")
    raise_problems(PlanError, f"{root}: tensors that are not whole; copy or save it again", problems)
    if weights_only:
        tensors, left = _only(tensors, weights)
        remarks += left
    if not tensors:
        raise PlanError(f"{root} holds no tensors")
    surplus = [file.name for file in listing.weight_files(_WEIGHTS) if file.name not in paths]
    if surplus:
        remarks.append(f"{root}: left aside, since {metadata.path.name} does not name them: {shortened(surplus)}")
    if metadata.others:
        remarks.append(f"{root}: left aside, since they are not tensors: {shortened(list(metadata.others))}")
    files = tuple(sorted({shard.path for tensor in tensors.values() for shard in tensor.shards}))
    kind = Kind.TORCH_DCP if metadata.is_torch else Kind.HYPER_PARALLEL
    return Source(root, {0: files}, kind, warnings=tuple(remarks), tensors=tensors, weights=weights)


def weights_of(source: Source) -> Source:
    """The same without what is beside the weights, which is said."""
    if source.tensors is None or source.weights is None:
        return source
    tensors, remarks = _only(source.tensors, source.weights)
    return Source(source.root, source.by_rank, source.kind, warnings=(*source.warnings, *remarks), tensors=tensors)


def _only(
    tensors: Mapping[str, LogicalTensor], weights: frozenset[str] | None
) -> tuple[dict[str, LogicalTensor], list[str]]:
    left = [] if weights is None else [name for name in tensors if name not in weights]
    kept = {name: tensor for name, tensor in tensors.items() if weights is None or name in weights}
    if not left or not kept:
        return dict(tensors), []
    states = find_states(left, kept)
    others = [name for name in left if name not in states.names()]
    told = [*([str(states)] if states else []), *([f"{len(others)} others ({shortened(others)})"] if others else [])]
    return kept, [f"left aside, as they are not weights of the model: {', '.join(told)}"]


def _check_files(listing: Listing, metadata: DcpMetadata) -> None:
    """Refuse files that are missing or end too early. Raises PlanError that lists them."""
    problems, there = [], set(listing.file_names)
    for name, chunks in sorted(metadata.by_file.items()):
        if name not in there:
            problems.append(f"{name} is missing")
            continue
        end = max(chunk.offset + chunk.length for _, chunk in chunks)
        try:
            size = (listing.folder / name).stat().st_size
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
            continue
        if end > size:
            problems.append(f"{name} is truncated: it has {size} bytes of {end}")
    headline = f"{listing.folder} lacks files that {metadata.path.name} names; copy all files of the checkpoint"
    raise_problems(PlanError, headline, problems)


def _tensor(paths: Mapping[str, Path], name: str, told: str, described: Described) -> LogicalTensor:
    from mindformers_ckpt.formats.dcp_metadata import chunk_name

    shards = (
        Shard(0, paths[chunk.file], chunk.box, chunk.key or chunk_name(told, chunk.box, described.shape))
        for chunk in described.chunks
    )
    return from_boxes(TensorSpec(name, described.dtype, described.shape), shards)


def _names(root: Path, metadata: DcpMetadata) -> tuple[dict[str, str], frozenset[str] | None, list[str]]:
    """Name in the metadata -> name of the tensor; the names of the weights where others are there, too; remarks.

    The weights are what is in a dictionary called "model", "state_dict" or "module", or else what is at the top.
    """
    same = {name: name for name in metadata.tensors}
    paths = {name: metadata.paths.get(name, (name,)) for name in metadata.tensors}
    wrappers = {path[:-1] for path in paths.values() if len(path) > 1 and path[-2] in _WRAPPERS}
    if len(wrappers) != 1:
        top = frozenset(name for name, path in paths.items() if len(path) == 1)
        return same, top if 0 < len(top) < len(paths) and not wrappers else None, []
    (wrapper,) = wrappers
    inside = {name: path[-1] for name, path in paths.items() if path[:-1] == wrapper}
    if _repeat([*inside.values(), *(name for name in same if name not in inside)]):
        return same, frozenset(inside), []
    remark = f"{root}: the weights are those in {'.'.join(wrapper)!r}, without that in their names"
    return {**same, **inside}, frozenset(inside.values()), [remark]


def _repeat(names: Iterable[str]) -> bool:
    names = list(names)
    return len(set(names)) < len(names)
