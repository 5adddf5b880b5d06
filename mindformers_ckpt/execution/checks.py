"""What is looked at before a run: may it be done so, and is it one that was begun before?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from mindformers_ckpt.disk.files import FileState
from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.engine.buffers import BLOCK_BYTES, PIECE_BYTES, TRANSPOSE_BYTES
from mindformers_ckpt.errors import CheckpointError, ConfigError, FormatError, PlanError, TransferError
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.publish.fingerprints import check_countable
from mindformers_ckpt.publish.signature import check_key


def check_apart(plan: Plan, destination: Path) -> None:
    """Refuse a destination that holds a source file: publishing would replace it."""
    real = destination.resolve()
    if not real.exists():
        return
    paths = [file.path for file in plan.sources]
    for path, found in zip(paths, each(lambda path: path.resolve(), paths)):
        if found.is_relative_to(real):
            raise PlanError(f"the target folder {destination} holds the source file {path}; choose another folder")


def identity_of(digest: str, states: Mapping[Path, FileState], options: Options) -> str:
    """A digest of everything that decides which bytes are written where, and of the sources' identity."""
    from mindformers_ckpt import __version__

    # A journal counts tasks, and their cut changes with these.
    sizes = (BLOCK_BYTES, TRANSPOSE_BYTES, PIECE_BYTES)
    cut = (__version__, *sizes, options.by_rank, options.hashes, options.fingerprints, options.crc)
    whole = hashlib.blake2b(f"{digest} {cut}\n".encode(), digest_size=16)
    for path, state in states.items():
        whole.update(f"{path} {tuple(state)}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()


def is_checkpoint(path: Path) -> bool:
    """Whether a file has the form of what is written: a checkpoint that can be read."""
    try:
        return bool(read_header(path).tensors)
    except FormatError:
        return False


def add_companions(companions: Callable[[Path], None], folder: Path) -> None:
    """Put further files into the folder of a result. Raises TransferError when one cannot be written."""
    try:
        companions(folder)
    except CheckpointError:
        raise
    except OSError as error:
        file = error.filename2 or error.filename or folder
        raise TransferError(f"{file}: cannot be written: {error.strerror}") from error


def check_sees_whole(plan: Plan, options: Options) -> None:
    """Refuse ways of running a plan that do not see every tensor whole. Raises ConfigError and PlanError."""
    if options.by_rank or options.partial:
        way = "one rank is a unit of work (--transform-by-rank)" if options.by_rank else "some ranks are made only"
        raise ConfigError(f"a fingerprint is that of whole tensors, but {way}; leave one of the two out")
    check_countable(plan)


def check_recordable(options: Options, is_file: bool) -> None:
    """Refuse hashes of a result that has no manifest to hold them. Raises ConfigError."""
    if options.hashes and is_file:
        raise ConfigError("hashes are kept in a manifest, which a single file has not; name a folder for the result")


def check_signable(key: Path, is_file: bool) -> None:
    """Refuse to sign a result that has no manifest, or with what is not a key. Raises ConfigError."""
    if is_file:
        raise ConfigError("a signature goes with a manifest, which a single file has not; name a folder for the result")
    check_key(key)
