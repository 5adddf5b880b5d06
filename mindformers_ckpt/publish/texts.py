"""What a manifest says of all that is not the contents of tensors: heads of files, texts beside them, and itself."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mindformers_ckpt.publish.signature import BUNDLE_FILE, RECORD_FILE
from mindformers_ckpt.sources.source import SUFFIXES

TEXTS, HEADER, CHECKSUM = "texts", "header", "checksum"
_SIGNED = {RECORD_FILE, BUNDLE_FILE}  # have a check of their own, and may be added later


def hash_of(data: bytes) -> str:
    """xxh3-128 of bytes."""
    import xxhash

    return str(xxhash.xxh3_128_hexdigest(data))


def text_hashes(folder: Path, aside: Collection[Path]) -> dict[str, str]:
    """The hashes of the files in the folder of a result that hold no weights, by their paths, but for some."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_text = path.suffix not in SUFFIXES and path.name not in _SIGNED and path not in aside
        if is_text and path.is_file():
            found[path.relative_to(folder).as_posix()] = hash_of(path.read_bytes())
    return found


def header_hash(path: Path) -> str:
    """The hash of all bytes of a .safetensors file before the contents. Raises OSError."""
    with path.open("rb") as file:
        length = file.read(8)
        return hash_of(length + file.read(int.from_bytes(length, "little")))


def with_checksum(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with a hash of what it says, however that is written down."""
    content = {key: value for key, value in manifest.items() if key != CHECKSUM}
    return {**content, CHECKSUM: hash_of(json.dumps(content, sort_keys=True).encode())}


def is_unchanged(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is as it was written; one of an earlier version, without a checksum, is taken for that."""
    return CHECKSUM not in manifest or with_checksum(manifest)[CHECKSUM] == manifest[CHECKSUM]
