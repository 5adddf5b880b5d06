"""Complete MindSpore weights: a file, or a folder of files without rank folders.

With an index the files are one checkpoint. Without one, files that have no tensor in common are one checkpoint, too,
and of files that all repeat each other's tensors each is a checkpoint of its own (guide).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.sources.index import check_index, listed, read_index
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.source import Source

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read(listing: Listing) -> Source | None:
    """The source of a folder of complete files, None when it holds none.

    Of `model.safetensors` and an index beside it the file is read, as transformers does.
    """
    root = listing.folder
    files = listing.weight_files()
    if INDEX_FILE not in listing.file_names:
        return Source(root, {0: tuple(files)}) if files else None
    single = root / SINGLE_FILE
    if single in files and not _is_all(single, root / INDEX_FILE):
        left = f"{SINGLE_FILE} and {INDEX_FILE} are both in {root}; {SINGLE_FILE} is read, as transformers does"
        return Source(root, {0: (single,)}, warnings=(left,))
    owners = read_index(root / INDEX_FILE)
    warnings = check_index(root / INDEX_FILE, owners)
    chosen = tuple(sorted(set(owners.values())))
    others = [file for file in files if file not in chosen]
    if others:
        warnings = (*warnings, f"left aside, since {INDEX_FILE} does not name them: {listed(others)}")
    return Source(root, {0: chosen}, owners=owners, warnings=warnings)


def _is_all(single: Path, index: Path) -> bool:
    """Whether the index names that file and no other one."""
    try:
        return set(read_index(index).values()) == {single}
    except PlanError:
        return False


def separate_checkpoints(source: Source) -> list[Source]:
    """The checkpoints that a source holds: several where a folder holds several files of complete weights.

    Raises PlanError when files repeat some tensors of each other and some not, or two files would give results of the
    same name; FormatError for damaged files.
    """
    if source.sharded or len(source.by_rank[0]) == 1 or source.owners is not None:
        return [source]
    paths = source.by_rank[0]
    names = {path: set(read_header(path).tensors) for path in paths}
    pairs = list(combinations(paths, 2))
    apart = [pair for pair in pairs if names[pair[0]].isdisjoint(names[pair[1]])]
    if len(apart) == len(pairs):
        together = f"{len(paths)} files are read as one checkpoint: {', '.join(path.name for path in paths)}"
        return [replace(source, warnings=(*source.warnings, together))]
    if apart:
        first, second = apart[0]
        raise PlanError(
            f"{source.root} holds {len(paths)} files, some of which repeat tensors and some of which do not "
            f"({first.name} and {second.name} have none in common); give the file to read, or a folder with the "
            "files of one checkpoint"
        )
    if len({path.stem for path in paths}) < len(paths):
        raise PlanError(f"{source.root} holds a .ckpt and a .safetensors file of the same name; give the file to read")
    return [Source(path, {0: (path,)}) for path in paths]
