"""Fingerprints in a manifest: the checksums of the whole tensors of a result, counted while they were copied."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mindformers_ckpt.checksums.digest import TensorChecksum, described, digest_of, recorded
from mindformers_ckpt.checksums.shares import checksum
from mindformers_ckpt.engine.tasks import TensorShare
from mindformers_ckpt.errors import PlanError, raise_problems
from mindformers_ckpt.geometry.box import Box, covered_volume, hull
from mindformers_ckpt.planning.computations import Constant
from mindformers_ckpt.planning.model import Plan, Transfer

KEY = "fingerprints"
_RANK_FOLDER = re.compile(r"rank_\d+")


def check_countable(plan: Plan) -> None:
    """Refuse a plan that does not pass every element of every tensor on. Raises PlanError."""
    parts: list[str] = []
    if not all(_is_whole(transfer) for transfer, _ in plan.kinds):
        parts += (transfer.name for transfer in plan.transfers if not _is_whole(transfer))
    raise_problems(
        PlanError,
        "a fingerprint is that of whole tensors, but of these the target takes a part only; leave --fingerprint out",
        parts,
    )


def _is_whole(transfer: Transfer) -> bool:
    """Whether all elements of a tensor are read, and written."""
    whole, sources = Box.whole(transfer.shape), [place.box for place in transfer.sources]
    is_written = hull([place.box for place in transfer.targets]) == whole
    return is_written and covered_volume(whole, sources) == math.prod(transfer.shape)


def describe_fingerprints(
    plan: Plan, shares: Iterable[TensorShare], shapes: Mapping[str, tuple[int, ...]], *, of_all: bool
) -> dict[str, dict[str, Any]]:
    """What a manifest says of the fingerprints: folder of a checkpoint in the result ("." for all) -> fingerprint.

    Where the source is only cut in another way, and all of it (`of_all`), `source_digest` is that of the source: the
    same, but for counters that it keeps as text. `shapes` are those of target tensors whose transfers have another form
    (a view of them).
    """
    found: dict[tuple[int, str], list[int]] = {}
    for file, name, share in shares:
        found.setdefault((file, name), []).append(share)
    folders: dict[str, list[TensorChecksum]] = {}
    in_source: dict[str, list[TensorChecksum]] = {}
    changed: set[str] = set()
    for transfer in plan.transfers:
        file = transfer.targets[0].file
        nbytes = math.prod(transfer.shape) * transfer.dtype.itemsize
        value = checksum(found[file, transfer.name], nbytes) if nbytes else 0
        shape = shapes.get(transfer.name) or _shape(plan, transfer)
        folder = folder_of(plan.targets[file].path)
        tensor = TensorChecksum(transfer.name, transfer.dtype.name, shape, value)
        folders.setdefault(folder, []).append(tensor)
        if all(isinstance(place.compute, Constant) for place in transfer.sources):
            continue
        in_source.setdefault(folder, []).append(tensor)
        if not all(place.is_plain for place in transfer.sources):
            changed.add(folder)
    return {
        folder: _as_json(tensors, in_source.get(folder, []) if of_all and folder not in changed else None)
        for folder, tensors in folders.items()
    }


def folder_of(path: str) -> str:
    """The folder of the checkpoint that a file of a result belongs to, "." for the result itself."""
    *folders, _ = path.split("/")
    if folders and _RANK_FOLDER.fullmatch(folders[-1]):
        folders.pop()
    return "/".join(folders) or "."


def recorded_checksums(entry: Mapping[str, Any]) -> list[TensorChecksum]:
    """The checksums of a fingerprint in a manifest. Raises KeyError, TypeError and ValueError for what is none."""
    return recorded(entry["tensors"])


def _shape(plan: Plan, transfer: Transfer) -> tuple[int, ...]:
    """The shape of a target tensor: that in a file which has all of it, else that of the transfer."""
    place = transfer.targets[0]
    if place.view is None and place.box == Box.whole(transfer.shape):
        for spec in plan.targets[place.file].tensors:
            if spec.name == transfer.name:
                return spec.shape
    return transfer.shape


def _as_json(tensors: list[TensorChecksum], in_source: list[TensorChecksum] | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"digest": digest_of(tensors)}
    if in_source is not None:
        entry["source_digest"] = entry["digest"] if in_source == tensors else digest_of(in_source)
    return {**entry, "tensors": described(tensors)}
