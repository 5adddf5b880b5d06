"""What a result says of itself, and whether ranks may be put beside those of another run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mindformers_ckpt.disk.files import FileState
from mindformers_ckpt.engine.tasks import Done
from mindformers_ckpt.errors import PublishError
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.publish.manifest import read_manifests, without
from mindformers_ckpt.publish.texts import HEADER, TEXTS, header_hash


def ranks_of(plan: Plan) -> list[int]:
    """The target ranks that a plan makes, in order."""
    return sorted({target.rank for target in plan.targets})


def check_addable(
    plan: Plan, destination: Path, about: Mapping[str, Any], overwrite: bool, states: Mapping[Path, FileState]
) -> None:
    """Refuse to put ranks beside those of another run, or (without `overwrite`) over ranks that are there.

    Ranks go together when their manifests say the same of source and target, and of every source file that both
    read. Raises PublishError.
    """
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    made = read_manifests(destination)
    if not made:
        raise PublishError(f"{destination} holds something else than the other ranks; choose another folder")
    own = {Path(target.path).parent for target in plan.targets}
    sources = {entry["path"]: entry for entry in _describe_sources(plan, states)}
    for name, manifest in made.items():
        others = without(manifest, own)
        if others is None:
            continue
        is_other = any(manifest.get(key) != value for key, value in about.items())
        theirs = manifest.get("sources", ())
        if is_other or any(sources.get(entry["path"], entry) != entry for entry in theirs if "modified" in entry):
            raise PublishError(
                f"{destination} holds ranks of another source or target ({name}); they cannot be mixed: "
                "choose another folder"
            )
    taken = sorted(str(folder) for folder in own if (destination / folder).exists())
    if taken and not overwrite:
        listed = ", ".join(taken[:8])
        raise PublishError(f"{destination} already holds {listed}; allow to replace them with --overwrite")


def describe_result(
    plan: Plan,
    folder: Path,
    done: Collection[Done],
    about: Mapping[str, Any],
    states: Mapping[Path, FileState],
    *,
    texts: Mapping[str, str] | None = None,
    headers: bool = False,
) -> dict[str, Any]:
    """The manifest of a result: what was made of what, and the files with their sizes and hashes.

    `texts` are the hashes of files beside the weights; with `headers` those of the files' heads are taken.
    """
    from mindformers_ckpt import __version__

    hashes: dict[int, dict[str, str]] = {}
    for task in done:
        for tensor in task.hashes:
            hashes.setdefault(tensor.file, {})[tensor.name] = tensor.digest
    files = []
    for number, target in enumerate(plan.targets):
        size = (folder / target.path).stat().st_size
        entry = {"path": target.path, "rank": target.rank, "bytes": size, "tensors": len(target.tensors)}
        if number in hashes:
            entry["xxh3_128"] = hashes[number]
        if headers and target.format == "safetensors":  # every byte of a .ckpt file's heads says something of a tensor
            entry[HEADER] = header_hash(folder / target.path)
        files.append(entry)
    return {
        "mindformers_ckpt": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **about,
        "sources": _describe_sources(plan, states),
        "files": files,
        **({TEXTS: dict(texts)} if texts else {}),
    }


def partial_manifest_name(plan: Plan) -> str:
    """Manifest name of a run that makes some ranks only: several such runs share a destination."""
    ranks = ranks_of(plan)
    spans = f"{ranks[0]}-{ranks[-1]}"
    if len(ranks) <= ranks[-1] - ranks[0]:
        spans += "_" + hashlib.blake2b(repr(ranks).encode(), digest_size=4).hexdigest()  # some in between are not
    return f"manifest_rank_{spans}.json"


def _describe_sources(plan: Plan, states: Mapping[Path, FileState]) -> list[dict[str, Any]]:
    return [
        {"path": str(file.path), "bytes": file.size, "modified": states[file.path].modified} for file in plan.sources
    ]
