"""Is a result what its manifest says? Files, sizes, ranks, hashes and CRC trailers, file by file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.engine.buffers import BLOCK_BYTES
from mindformers_ckpt.errors import FormatError, PlanError, TransferError
from mindformers_ckpt.formats import Header, TensorRecord
from mindformers_ckpt.formats.ckpt_crc import verify_crc
from mindformers_ckpt.formats.headers import read_headers
from mindformers_ckpt.look.holders import ContentReader
from mindformers_ckpt.look.verify_model import Difference, Verification
from mindformers_ckpt.publish.fingerprints import folder_of
from mindformers_ckpt.publish.manifest import read_manifests
from mindformers_ckpt.publish.texts import HEADER, TEXTS, hash_of, header_hash, is_unchanged
from mindformers_ckpt.sources.source import SUFFIXES
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.words import counted

Choose = Callable[[Sequence[str]], set[str]]


class Entry(NamedTuple):
    """A file that a manifest names, and the hashes that are recorded of its tensors and of its head ("" for none)."""

    path: str
    rank: int
    size: int
    tensors: int | None
    hashes: Mapping[str, str]
    header: str = ""


class Manifest(NamedTuple):
    """What the manifests of a result say together.

    Attributes:
        texts: hashes of files that hold no weights.
        changed: the manifests that are not what was written.
    """

    entries: tuple[Entry, ...]
    target: str | None
    fingerprints: Mapping[str, Any]
    parts: int
    texts: Mapping[str, str] = {}
    changed: tuple[Path, ...] = ()


def has_manifest(folder: Path) -> bool:
    """Whether a folder is a result of this program, by its manifests."""
    return folder.is_dir() and bool(read_manifests(folder))


def read_result(folder: Path) -> Manifest:
    """What the manifests of a result say. Raises PlanError when there is none, or it is none of ours."""
    manifests = read_manifests(folder)
    if not manifests:
        raise PlanError(
            f"{folder} has no manifest.json, which would say what it should be: it is not a result of this program, "
            "or not a whole one; compare it with what it was made of (--against SOURCE)"
        )
    entries: list[Entry] = []
    texts: dict[str, str] = {}
    for name, manifest in manifests.items():
        try:
            entries += [_entry(file) for file in manifest["files"]]
            texts.update((_inner(path), str(told)) for path, told in manifest.get(TEXTS, {}).items())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{folder / name}: it does not say which files the result has ({error!r})") from None
    told = [manifest.get("target") for manifest in manifests.values()]
    kept = [manifest.get("fingerprints") for manifest in manifests.values()]
    fingerprints = kept[0] if len(kept) == 1 and isinstance(kept[0], dict) else {}
    target = told[0] if isinstance(told[0], str) else None
    changed = tuple(folder / name for name, manifest in manifests.items() if not is_unchanged(manifest))
    return Manifest(tuple(entries), target, fingerprints, len(manifests), texts, changed)


def _entry(file: Mapping[str, Any]) -> Entry:
    path, hashes, header = _inner(file["path"]), file.get("xxh3_128", {}), str(file.get(HEADER, ""))
    return Entry(path, int(file["rank"]), int(file["bytes"]), file.get("tensors"), dict(hashes), header)


def _inner(path: object) -> str:
    """A path in the folder of the result. Raises ValueError."""
    if not isinstance(path, str) or os.path.isabs(path) or ".." in path.split("/"):
        raise ValueError(f"path {path!r}")
    return path


def check_texts(folder: Path, manifest: Manifest, found: Verification) -> None:
    """Check that the manifest, and the files beside the weights that it names, are what was written."""
    for path in manifest.changed:
        found.differences.append(Difference("it is not what was written: its checksum differs", path))
    for name, recorded in manifest.texts.items():
        try:
            if hash_of((folder / name).read_bytes()) != recorded:
                found.differences.append(Difference("it is not what was written (xxh3-128 differs)", folder / name))
        except OSError as error:
            found.differences.append(Difference(f"it cannot be read: {error.strerror}", folder / name))
    if manifest.texts:
        found.checked.append(f"{counted(len(manifest.texts), 'file')} beside the weights: xxh3-128 of their bytes")


def check_files(folder: Path, manifest: Manifest, found: Verification) -> dict[str, Header]:
    """Check that all files are there, whole and readable, and no others; the headers of those that are, by path."""
    listed: list[Entry] = []
    for entry in manifest.entries:
        path = folder / entry.path
        try:
            size = path.stat().st_size
        except OSError as error:
            found.differences.append(Difference(f"it cannot be read: {error.strerror}", path, rank=entry.rank))
            continue
        if size != entry.size:
            what = f"it has {size} bytes, the manifest says {entry.size}"
            found.differences.append(Difference(what, path, rank=entry.rank))
        else:
            listed.append(entry)
    headers: dict[str, Header] = {}
    for entry, (path, header) in zip(listed, read_headers([folder / entry.path for entry in listed])):
        if isinstance(header, FormatError):
            found.differences.append(Difference(str(header), rank=entry.rank))
        # A .ckpt file leaves tensors without elements out.
        elif entry.tensors not in (None, len(header.tensors)) and header.format != "ckpt":
            what = f"it holds {len(header.tensors)} tensors, the manifest says {entry.tensors}"
            found.differences.append(Difference(what, path, rank=entry.rank))
        elif entry.header and header_hash(path) != entry.header:
            what = "its head is not what was written (xxh3-128 differs)"
            found.differences.append(Difference(what, path, rank=entry.rank))
        else:
            headers[entry.path] = header
    _check_surplus(folder, manifest, found)
    found.checked.append(f"{counted(len(manifest.entries), 'file')}: there, in their sizes, and readable; no others")
    return headers


def _check_surplus(folder: Path, manifest: Manifest, found: Verification) -> None:
    """Note weight files that are not of the result: the last one by name would be loaded."""
    own = {folder / entry.path for entry in manifest.entries}
    there = [path for path in own if path.exists()]
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path not in own):
        if not any(path.samefile(other) for other in there if path.exists()):
            found.differences.append(Difference("it is not of this result", path))


def check_ranks(manifest: Manifest, strategy: Strategy | None, found: Verification) -> None:
    """Check that the ranks of every checkpoint in a result are complete."""
    for folder in dict.fromkeys(folder_of(entry.path) for entry in manifest.entries):
        entries = [entry for entry in manifest.entries if folder_of(entry.path) == folder]
        if not all("rank_" in Path(entry.path).parent.name for entry in entries):
            continue
        ranks = {entry.rank for entry in entries}
        count = max(ranks) + 1 if strategy is None else strategy.rank_count
        absent = sorted(set(range(count)) - ranks)
        if absent:
            shown = f"{absent[:20]}{' and more' if len(absent) > 20 else ''}"
            found.differences.append(Difference(f"the manifests have no files of the ranks {shown} of {count}"))
        unsure = " (the highest rank there is taken for the last one: no strategy is known)" * (strategy is None)
        found.checked.append(f"{counted(count, 'rank')}: {'looked for' if absent else 'complete'}{unsure}")


def check_hashes(
    folder: Path,
    manifest: Manifest,
    headers: Mapping[str, Header],
    chosen: Choose,
    found: Verification,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read the contents of which hashes are recorded, or of those that `chosen` picks, and compare."""
    known = [(entry, name) for entry in manifest.entries for name in entry.hashes if entry.path in headers]
    if not known:
        return
    taken = chosen([name for _, name in known])
    looked_at = [(entry, name, headers[entry.path].tensors.get(name)) for entry, name in known if name in taken]
    done, total = 0, sum(record.spec.nbytes for _, _, record in looked_at if record is not None)
    with closing(ContentReader()) as reader:
        for entry, name, record in looked_at:
            path = folder / entry.path
            if record is None:
                found.differences.append(Difference("it is not in the file", path, name, entry.rank))
            elif _hash(reader, path, record) != entry.hashes[name]:
                what = "its bytes are not those that were written (xxh3-128 differs)"
                offset = record.segments[0].offset if record.segments else None
                found.differences.append(Difference(what, path, name, entry.rank, offset=offset))
            done += 0 if record is None else record.spec.nbytes
            if progress is not None:
                progress(done, total)
    found.checked.append(f"{counted(len(looked_at), 'tensor', of=len(known))} in files: xxh3-128 of their bytes")


def _hash(reader: ContentReader, path: Path, record: TensorRecord) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for start in range(0, record.spec.nbytes, BLOCK_BYTES):
        length = min(BLOCK_BYTES, record.spec.nbytes - start)
        digest.update(reader.read(path, record.segments, start, length).data)
    return digest.hexdigest()


def check_trailers(headers: Mapping[str, Header], share: float, chosen: Choose, found: Verification) -> None:
    """Compare the CRC-32 that files store with their bytes."""
    stored = {str(header.path): header for header in headers.values() if header.crc is not None}
    taken = chosen(list(stored)) if share < 1 else set(stored)
    for path in stored:
        if path not in taken:
            continue
        try:
            verify_crc(stored[path])
        except (FormatError, TransferError) as error:
            found.differences.append(Difference(str(error)))
    if stored:
        found.checked.append(f"{counted(len(taken), 'file', of=len(stored))}: the CRC-32 that they store")


def sampler(share: float, seed: int | None = None) -> Choose:
    """Picks a share of names at random, at least one; all of them with 1."""
    import random

    chance = random.Random(seed)

    def chosen(names: Sequence[str]) -> set[str]:
        distinct = list(dict.fromkeys(names))
        if share >= 1 or not distinct:
            return set(distinct)
        return set(chance.sample(distinct, max(1, math.ceil(share * len(distinct)))))

    return chosen
