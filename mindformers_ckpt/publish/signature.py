"""Signatures of fingerprints: who says that these are the tensors of a checkpoint.

A signed result has two more files: the record of its fingerprint, a line of JSON for each tensor, and a bundle of the
OpenSSF model signing format (OMS) over it. Where a checkpoint is re-sliced, the record stays the same to the byte, so
that the bundle of the source is one of the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mindformers_ckpt.checksums.digest import TensorChecksum, record_of
from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.errors import ConfigError, PublishError

RECORD_FILE, BUNDLE_FILE = "fingerprint.jsonl", "fingerprint.sig"


def check_key(key: Path) -> None:
    """Sign something, so that a key that cannot be used is found before hours of work. Raises ConfigError."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sign(Path(folder), [], key)


def sign(folder: Path, tensors: Iterable[TensorChecksum], key: Path) -> None:
    """Write the record of tensors into a folder, and a bundle made with a private key (PEM, elliptic curve).

    Raises ConfigError where the key cannot be used or the library is not installed.
    """
    signing = _library("signing")
    record = folder / RECORD_FILE
    record.write_bytes(record_of(tensors))
    try:
        signing.Config().use_elliptic_key_signer(private_key=key).sign(record, folder / BUNDLE_FILE)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{key}: cannot sign: {error}; openssl ecparam -name prime256v1 -genkey -noout -out key.pem makes one"
        ) from error


def find_bundle(file: Path) -> Path | None:
    """The bundle of the checkpoint that a file belongs to: in its folder, or in that of the rank folders."""
    places = [folder / BUNDLE_FILE for folder in (file.parent, file.parent.parent)]
    return next((path for path, is_there in zip(places, each(lambda path: path.is_file(), places)) if is_there), None)


def take_over(bundle: Path, folder: Path, tensors: Iterable[TensorChecksum]) -> bool:
    """Copy the bundle of a source into the folder of a result whose record is the same; whether it was."""
    record = record_of(tensors)
    theirs = bundle.with_name(RECORD_FILE)
    if not theirs.is_file() or theirs.stat().st_size != len(record) or theirs.read_bytes() != record:
        return False
    (folder / RECORD_FILE).write_bytes(record)
    (folder / BUNDLE_FILE).write_bytes(bundle.read_bytes())
    return True


def left_behind(bundle: Path, why: str) -> str:
    """What a report says of the signature of a source that the result does not have."""
    return f"left behind: {bundle}: {why}"


def check_signature(folder: Path, tensors: Iterable[TensorChecksum], public_key: Path) -> None:
    """Check that the holder of a key signed these very tensors. Raises PublishError where that is not so.

    Raises ConfigError where the public key cannot be read or the library is not installed.
    """
    import tempfile

    verifying = _library("verifying")
    bundle = folder / BUNDLE_FILE
    if not bundle.is_file():
        raise PublishError(f"{folder} is not signed: there is no {BUNDLE_FILE}")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{public_key}: is not the PEM file of a public key: {error}") from error
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / RECORD_FILE
        record.write_bytes(record_of(tensors))
        copy = Path(scratch) / BUNDLE_FILE  # of what may be in an object storage
        copy.write_bytes(bundle.read_bytes())
        try:
            config.verify(record, copy)
        except Exception as error:  # whatever a bundle from outside makes the library raise
            raise PublishError(f"{bundle}: is not a signature of these tensors by this key: {error}") from error


def _library(part: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{part}")
    except ImportError as error:
        raise ConfigError(
            f"signatures need the model-signing library ({error}); pip install 'mindformers_ckpt[sign]'"
        ) from error
