"""Shards as PyTorch's HuggingFaceStorageWriter saves them, before they are put together (or where they are not).

    shard-{rank:05d}-model-{number:05d}-of-{total:05d}.safetensors

The header of each says under DCP_SHARDING_INFO where in its tensor each of its boxes begins. How large a tensor is no
file says: it ends where its last box does. What `enable_consolidation` puts together are ordinary weights, with an
index.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mindformers_ckpt.errors import PlanError, raise_problems
from mindformers_ckpt.formats import Header, TensorSpec
from mindformers_ckpt.formats.headers import sound_headers
from mindformers_ckpt.geometry.box import Box, hull
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.shards import LogicalTensor, Shard, from_boxes
from mindformers_ckpt.sources.source import Kind, Source
from mindformers_ckpt.text_files import parse_json

_FILE = re.compile(r"shard-(\d{1,9})-model-(\d{1,9})-of-(\d{1,9})\.safetensors")
_INFO = "DCP_SHARDING_INFO"


def is_part(name: str) -> bool:
    """Whether a file is by its name one of several ranks'."""
    return _FILE.fullmatch(name) is not None


def is_checkpoint(listing: Listing) -> bool:
    """Whether a folder is one, by the names in it."""
    return any(map(is_part, listing.file_names))


def read(listing: Listing) -> Source:
    """The source that a folder is.

    Raises FormatError for damaged files, and PlanError that lists files that must be missing, and tensors of which a
    part is nowhere or twice.
    """
    root = listing.folder
    files = [root / name for name in listing.file_names if is_part(name)]
    _check_numbers(root, files)
    boxes: dict[str, list[tuple[TensorSpec, Shard]]] = {}
    problems = []
    for path, header in sound_headers(files).items():
        try:
            for spec, shard in _shards(path, header):
                boxes.setdefault(spec.name, []).append((spec, shard))
        except ValueError as error:
            problems.append(f"{path.name}: {error}")
    tensors: dict[str, LogicalTensor] = {}
    for name, found in boxes.items():
        try:
            tensors[name] = _tensor(name, found)
        except PlanError as error:
            problems.append(f"{name}: {error}")
    raise_problems(PlanError, f"{root}: tensors that are not whole; copy or save it again", problems)
    ranks = {file.name.split("-")[1] for file in files}
    remark = f"{root}: the shards of {len(ranks)} ranks are put together; no file says whether there were more"
    others = [name for name in listing.file_names if name.endswith(".safetensors") and not is_part(name)]
    remarks = [remark, *([f"{root}: left aside: {', '.join(others[:5])}"] if others else [])]
    return Source(root, {0: tuple(files)}, Kind.TORCH_DCP, warnings=tuple(remarks), tensors=tensors)


def _check_numbers(root: Path, files: list[Path]) -> None:
    """Refuse files whose numbers say that those of a rank are missing; of numbers it holds nothing of it has none.

    Raises PlanError.
    """
    parsed = [match.groups() for file in files if (match := _FILE.fullmatch(file.name)) is not None]
    totals = sorted({int(total) for _, _, total in parsed})
    if len(totals) > 1:
        told = ", ".join(map(str, totals[:20]))
        raise PlanError(f"{root} holds files of several checkpoints by their names: of {told} files")
    ranks = {int(rank) for rank, _, _ in parsed}
    lacking = [f"shard-{rank:05d}-…" for rank in range(1, min(max(ranks), len(parsed) + 20)) if rank not in ranks]
    raise_problems(PlanError, f"{root} lacks the files of some ranks; copy all of them", lacking)


def _shards(path: Path, header: Header) -> list[tuple[TensorSpec, Shard]]:
    """The tensors of a file, each with its box. Raises ValueError when the header does not say where they are."""
    info: Any = parse_json(header.metadata.get(_INFO, "{}").encode())
    found = []
    for name, record in header.tensors.items():
        entry = info.get(name) if isinstance(info, dict) else None
        offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
        shape = record.spec.shape
        if not isinstance(offsets, list) or len(offsets) != len(shape) or not all(map(_is_offset, offsets)):
            raise ValueError(f"its header does not say under {_INFO} where {name} is")
        box = Box(tuple(offsets), tuple(map(sum, zip(offsets, shape))))
        found.append((record.spec, Shard(0, path, box, name)))
    return found


def _is_offset(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _tensor(name: str, found: list[tuple[TensorSpec, Shard]]) -> LogicalTensor:
    dtypes = {spec.dtype for spec, _ in found}
    if len(dtypes) > 1 or len({len(spec.shape) for spec, _ in found}) > 1:
        raise PlanError(f"its boxes are of different types or dimensions ({', '.join(kind.name for kind in dtypes)})")
    whole = hull([shard.box for _, shard in found])
    spec = TensorSpec(name, found[0][0].dtype, whole.stop)
    return from_boxes(spec, [shard for _, shard in found])
