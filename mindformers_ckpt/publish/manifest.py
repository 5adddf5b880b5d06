"""Manifests: what a result consists of, and the mark that it is one of ours, and whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mindformers_ckpt.errors import PublishError
from mindformers_ckpt.text_files import MAX_OWN_BYTES, read_json_object

MANIFEST_FILE = "manifest.json"
_MARK = "mindformers_ckpt"  # the key of the version that made the result


def read_manifests(folder: Path) -> dict[str, dict[str, Any]]:
    """All manifests in a folder by name: of a whole result, or of runs that made some ranks each."""
    found = {path.name: _read(path) for path in sorted(folder.glob("manifest*.json"))}
    return {name: content for name, content in found.items() if content is not None}


def is_result(folder: Path) -> bool:
    """Whether a folder holds a result of this library, by its manifests."""
    return any(_MARK in manifest for manifest in read_manifests(folder).values())


def is_whole(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether all files of a manifest are there, in their sizes."""
    for file in manifest.get("files", ()):
        try:
            if (folder / file["path"]).stat().st_size != file["bytes"]:
                return False
        except OSError:
            return False
    return True


def without(manifest: Mapping[str, Any], folders: Collection[Path]) -> dict[str, Any] | None:
    """A manifest without the files in some folders, None when no file is left."""
    files = [file for file in manifest.get("files", ()) if Path(file["path"]).parent not in folders]
    return {**manifest, "files": files} if files else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path, PublishError, limit=MAX_OWN_BYTES)
    except PublishError:
        return None
