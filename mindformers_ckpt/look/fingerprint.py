"""A fingerprint of a checkpoint: the same under every strategy, in every format and for every number of ranks."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from mindformers_ckpt.checksums.crc64 import finished, raw
from mindformers_ckpt.checksums.digest import TensorChecksum, digest_of
from mindformers_ckpt.look.blocks import WholeReader
from mindformers_ckpt.look.whole import checkpoint_at
from mindformers_ckpt.objects.path import PathLike
from mindformers_ckpt.progress import Progress
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.plausibility import check_contents
from mindformers_ckpt.strategy.given import StrategyLike


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of a checkpoint.

    Attributes:
        digest: SHA-256 of all names, types, shapes and checksums (see `checksums.digest`).
        tensors: the CRC-64/NVME of every whole tensor's row-major bytes, by name.
        warnings: what you should know of the choice of files.
    """

    digest: str
    tensors: tuple[TensorChecksum, ...]
    warnings: tuple[str, ...] = ()


def fingerprint(
    path: PathLike,
    strategy: StrategyLike = None,
    *,
    step: str | None = None,
    contents: str = "error",
    progress: Progress | None = None,
) -> Fingerprint:
    """Read a checkpoint and take its fingerprint.

    `strategy` is that of its rank folders, `step` chooses among several files ("3_150", or a file's name);
    `contents` says what samples that contradict the strategy are: an "error", a reason to "warn", or not looked at
    ("off"). `progress` is told the bytes that were read and the total. Of replicas one is read: `verify` compares them.
    Raises PlanError when files and strategy do not go together or some box is in no file, FormatError for damaged
    files, StrategyError, TransferError.
    """
    return fingerprint_of(checkpoint_at(path, strategy, step), contents, progress)


def fingerprint_of(checkpoint: Checkpoint, contents: str = "error", progress: Progress | None = None) -> Fingerprint:
    """The fingerprint of a checkpoint whose files were found."""
    tensors = checkpoint.whole_tensors()
    warnings = (*checkpoint.warnings, *check_contents(checkpoint, tensors, contents))
    total, done = sum(tensor.spec.nbytes for tensor in tensors.values()), 0
    found = []
    with closing(WholeReader(checkpoint)) as reader:
        for name, tensor in tensors.items():
            value = 0
            for _, content in reader.blocks(tensor):
                value = raw(content.reshape(-1).view("u1").data, value)
                done += content.nbytes
                if progress is not None:
                    progress(done, total)
            spec = tensor.spec
            found.append(TensorChecksum(name, spec.dtype.name, spec.shape, finished(value, spec.nbytes)))
    found.sort()
    return Fingerprint(digest_of(found), tuple(found), warnings)
