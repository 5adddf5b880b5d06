"""A storage for tests: an S3 server behind a proxy that breaks what it passes on, and files in it."""

from __future__ import annotations

from pathlib import Path

from s3_server import BUCKET

from mindformers_ckpt.objects.client import client_of
from mindformers_ckpt.objects.path import as_path
from mindformers_ckpt.uploads.record import put


def send(folder: Path, name: str) -> str:
    """Put all files of a folder into the storage; the URL."""
    for file in folder.rglob("*"):
        if file.is_file():
            put(as_path(f"s3://{BUCKET}/{name}/{file.relative_to(folder)}"), file.read_bytes())  # type: ignore[arg-type]
    return f"s3://{BUCKET}/{name}"


def contents(name: str) -> dict[str, bytes]:
    """All objects below a prefix, by their keys below it."""
    client = client_of("s3")
    found = {}
    for entry in client.list(BUCKET, f"{name}/"):
        content = bytearray(entry.size)
        client.read(BUCKET, entry, 0, memoryview(content))
        found[entry.key[len(name) + 1 :]] = bytes(content)
    return found


def keys(prefix: str = "") -> set[str]:
    """All keys that begin so."""
    return {entry.key for entry in client_of("s3").list(BUCKET, prefix)}


def files(folder: Path) -> dict[str, bytes]:
    """The same of a folder on the disk."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
