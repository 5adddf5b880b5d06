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
from mindformers_ckpt.sources import unified
from mindformers_ckpt.sources.huggingface import other_weights
from mindformers_ckpt.sources.index import NAME_MAP_FILE, check_index, is_index_of, read_index
from mindformers_ckpt.sources.listing import Listing, is_strategy_file
from mindformers_ckpt.sources.parts import is_part, sets_of, whole_set
from mindformers_ckpt.sources.source import Kind, Source
from mindformers_ckpt.sources.steps import matching
from mindformers_ckpt.words import shortened

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read(listing: Listing) -> Source | None:
    """The source of a folder of complete files, None when it holds none.

    Of `model.safetensors` and an index beside it the file is read, as transformers does.
    """
    root = listing.folder
    files = listing.weight_files()
    others = other_weights(listing)
    remarks = (f"{root}: left aside: {shortened(others)}",) if others else ()
    if INDEX_FILE not in listing.file_names:
        mapped = unified.read(listing)
        if mapped is not None:
            return replace(mapped, warnings=(*mapped.warnings, *remarks))
        sets_of(files)
        return Source(root, {0: tuple(files)}, warnings=remarks) if files else None
    single = root / SINGLE_FILE
    if single in files and not is_index_of(root / INDEX_FILE, [single]):
        left = f"{SINGLE_FILE} and {INDEX_FILE} are both in {root}; {SINGLE_FILE} is read, as transformers does"
        return Source(root, {0: (single,)}, warnings=(left, *remarks))
    owners = read_index(root / INDEX_FILE)
    warnings = check_index(root / INDEX_FILE, owners)
    chosen = tuple(sorted(set(owners.values())))
    surplus = [file.name for file in files if file not in chosen]
    if surplus:
        warnings = (*warnings, f"left aside, since {INDEX_FILE} does not name them: {shortened(surplus)}")
    return Source(root, {0: chosen}, owners=owners, warnings=(*warnings, *remarks))


def read_file(file: Path) -> Source:
    """The source that a file is, or is one part of: by an index beside it, or by its number.

    Raises PlanError for a strategy file, and when other parts are missing.
    """
    if is_strategy_file(file.name):
        raise PlanError(
            f"{file} is by its name a strategy file, which holds no weights; give it as the strategy (--strategy, "
            "--src-strategy), and the checkpoint here"
        )
    listing = Listing(file.parent)
    if file.suffix == ".safetensors" and INDEX_FILE in listing.file_names:
        owners = read_index(file.parent / INDEX_FILE)
        if file in owners.values() and set(owners.values()) != {file}:
            warnings = check_index(file.parent / INDEX_FILE, owners)
            warnings = (*warnings, f"{file.name} is one of the files of {INDEX_FILE}, all of which are read")
            return Source(file.parent, {0: tuple(sorted(set(owners.values())))}, owners=owners, warnings=warnings)
    mapped = unified.read(listing)
    if mapped is not None and file in mapped.files and len(mapped.files) > 1:
        warning = f"{file.name} is one of the files of {NAME_MAP_FILE}, all of which are read"
        return replace(mapped, warnings=(*mapped.warnings, warning))
    if is_part(file.name):
        files = whole_set(file, listing.weight_files((file.suffix,)))
        warnings = (f"{file.name} is one of {len(files)} files of one checkpoint, all of which are read",)
        return Source(file.parent, {0: files}, warnings=warnings)
    return Source(file, {0: (file,)})


def at_step(source: Source, wanted: str) -> Source:
    """The one file of complete weights that has the name, or is of the epoch and step, that `wanted` says.

    Raises PlanError when none is or several are, and for a Hugging Face model or an index, which have no steps.
    """
    if source.kind is Kind.HUGGING_FACE or source.owners is not None:
        raise PlanError(f"{source.root} is one model, which has no steps or runs; leave {wanted!r} out")
    found = matching(source.files, wanted, 0)
    if len(found) != 1:
        held = shortened([file.name for file in found or source.files])
        if len(source.files) == 1:
            raise PlanError(
                f"{source.root}: {held} is the only file, and not of {wanted!r}; leave the step out to read it"
            )
        fault = "could be" if found else "is none of"
        raise PlanError(f"{source.root}: {wanted!r} {fault} {held}; give the name of the file to read")
    return Source(found[0], {0: (found[0],)}, warnings=source.warnings)


def separate_checkpoints(source: Source) -> list[Source]:
    """The checkpoints that a source holds: several where a folder holds several files of complete weights.

    Raises PlanError when files repeat some tensors of each other and some not, or two files would give results of the
    same name; FormatError for damaged files.
    """
    is_one = source.sharded or source.owners is not None or source.tensors is not None
    if is_one or len(source.by_rank[0]) == 1:
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


def only_checkpoint(source: Source) -> Source:
    """The checkpoint that a source holds. Raises PlanError where it holds several."""
    checkpoints = separate_checkpoints(source)
    if len(checkpoints) > 1:
        names = shortened([files.root.name for files in checkpoints], 20)
        raise PlanError(f"{source.root} holds several checkpoints ({names}); give the file that is meant")
    return checkpoints[0]
