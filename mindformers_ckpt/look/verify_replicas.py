"""Reads all that ranks hold of a tensor: do replicas agree, and is the whole what was recorded of it?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from mindformers_ckpt.checksums.crc64 import finished, raw
from mindformers_ckpt.checksums.digest import TensorChecksum
from mindformers_ckpt.engine.buffers import BLOCK_BYTES, empty_bytes
from mindformers_ckpt.geometry.box import Box, blocks, offset_in
from mindformers_ckpt.look.holders import ContentReader, Holder, first_difference, holders_of
from mindformers_ckpt.look.verify_model import Difference, Verification
from mindformers_ckpt.progress import Progress
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.shards import LogicalTensor
from mindformers_ckpt.words import counted


def verify_checksums(
    checkpoint: Checkpoint,
    recorded: Mapping[str, TensorChecksum],
    chosen: set[str],
    found: Verification,
    progress: Progress | None,
) -> None:
    """Compare the checksums of whole tensors with those that are recorded, and replicas with each other."""
    tensors = checkpoint.tensors()
    _compare_names(checkpoint, tensors, recorded, found)
    taken = [name for name in tensors if name in chosen and name in recorded]
    done, total = 0, sum(tensors[name].spec.nbytes for name in taken)
    with closing(ContentReader()) as reader, closing(ContentReader()) as other:
        for name in taken:
            tensor = tensors[name]
            if tensor.missing:
                for box, ranks in tensor.missing:
                    what = f"it is in none of the files of ranks {list(ranks[:8])}"
                    found.differences.append(Difference(what, checkpoint.files.root, name, box=box))
                continue
            value = _read_whole(checkpoint, name, tensor, reader, other, found)
            if value != recorded[name].crc64nvme:
                what = (
                    f"the whole tensor is not what was written (CRC-64 {value:016x}, recorded {recorded[name].hex}): "
                    "bytes of a shard changed, or shards were exchanged"
                )
                found.differences.append(Difference(what, checkpoint.files.root, name))
            done += tensor.spec.nbytes
            if progress is not None:
                progress(done, total)
    found.checked.append(f"{counted(len(taken), 'tensor', of=len(recorded))}: fingerprint of the whole, and replicas")


def _compare_names(
    checkpoint: Checkpoint,
    tensors: Mapping[str, LogicalTensor],
    recorded: Mapping[str, TensorChecksum],
    found: Verification,
) -> None:
    root = checkpoint.files.root
    there = {name: tensor for name, tensor in tensors.items() if tensor.spec.size}
    for name, told in recorded.items():
        if name not in there:
            if 0 not in told.shape:
                found.differences.append(Difference("it is in no file", root, name))
            continue
        spec = there[name].spec
        if (spec.dtype.name, spec.shape) != (told.dtype, told.shape):
            what = f"it is {spec.dtype.name}{list(spec.shape)}, recorded is {told.dtype}{list(told.shape)}"
            found.differences.append(Difference(what, root, name))
    for name in there.keys() - recorded.keys():
        found.differences.append(Difference("the manifest does not have it", root, name))


def _read_whole(
    checkpoint: Checkpoint,
    name: str,
    tensor: LogicalTensor,
    reader: ContentReader,
    other: ContentReader,
    found: Verification,
) -> int:
    """The checksum of a whole tensor; replicas that differ are noted."""
    spec, whole = tensor.spec, Box.whole(tensor.spec.shape)
    by_box: dict[Box, list[Holder]] = {}
    for holder in holders_of(checkpoint, name, tensor):
        by_box.setdefault(holder.box, []).append(holder)
    differing: dict[Path, Difference] = {}
    value, size = 0, spec.dtype.itemsize
    content = empty_bytes(BLOCK_BYTES)
    for block in blocks(whole, max(1, BLOCK_BYTES // size)):
        out = content[: block.volume * size].view(spec.dtype.carrier).reshape(block.shape)
        for box, holders in by_box.items():
            part = box.intersect(block)
            if part is None:
                continue
            start, length = offset_in(part, box) * size, part.volume * size
            first = reader.read(holders[0].path, holders[0].segments, start, length)
            for replica in holders[1:]:
                at = first_difference(other.read(replica.path, replica.segments, start, length), first)
                if at is not None and replica.path not in differing:
                    what = f"it differs from the replica in {holders[0].path}"
                    offset = replica.offset(start + at)
                    differing[replica.path] = Difference(what, replica.path, name, replica.rank, box, offset)
            out[part.relative_to(block).slices()] = first.view(spec.dtype.carrier).reshape(part.shape)
        value = raw(out.reshape(-1).view("u1").data, value)
    found.differences += differing.values()
    return finished(value, spec.nbytes)
