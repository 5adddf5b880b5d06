"""What MindSpore's `unified_safetensors` makes of rank folders: whole tensors in several files.

    part{n}.safetensors        the parameters that the strategy names, whole
    param_name_map.json        name -> file; conversions write one, too
    hyper_param.safetensors    what else the file of rank 0 held, as it was there: counters, in no map

`load_distributed_checkpoint` and MindFormers read such folders. Whether redundancy was removed before makes no
difference to them.
"""

from __future__ import annotations

from dataclasses import replace

from mindformers_ckpt.errors import PlanError, raise_problems
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.sources.index import NAME_MAP_FILE, check_index, read_index
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.source import Source
from mindformers_ckpt.state_names import is_never_saved
from mindformers_ckpt.words import shortened

HYPER_FILE = "hyper_param.safetensors"


def read(listing: Listing) -> Source | None:
    """The source of a folder with such a map. None where there is none, or it is one of other files.

    Raises PlanError when files that it names are missing, FormatError for damaged ones.
    """
    if NAME_MAP_FILE not in listing.file_names:
        return None
    path = listing.folder / NAME_MAP_FILE
    owners = read_index(path)
    try:
        warnings = check_index(path, owners)
    except PlanError:
        return None  # MindFormers leaves maps of other names beside weights
    chosen = [*sorted(set(owners.values()))]
    surplus = [file.name for file in listing.weight_files() if file not in chosen and file.name != HYPER_FILE]
    if surplus:
        warnings = (*warnings, f"left aside, since {NAME_MAP_FILE} does not name them: {shortened(surplus)}")
    source = Source(listing.folder, {0: tuple(chosen)}, owners=owners, warnings=warnings)
    return _with_counters(source) if HYPER_FILE in listing.file_names else source


def _with_counters(source: Source) -> Source:
    """The source with the tensors that the map leaves out."""
    path = source.root / HYPER_FILE
    assert source.owners is not None
    found = read_header(path).tensors
    twice = [name for name in found if name in source.owners]
    raise_problems(PlanError, f"{path} repeats tensors that other files hold", twice)
    kept = {name: record for name, record in found.items() if not is_never_saved(name)}
    large = [f"{name}{list(record.spec.shape)}" for name, record in kept.items() if record.spec.size > 1]
    remarks = []
    if large:
        remarks.append(
            f"{path} holds what rank 0 had of {shortened(large)}; it is read as the whole tensor, which is wrong where "
            "the strategy cut it"
        )
    owners = {**source.owners, **dict.fromkeys(kept, path)}
    files = (*source.by_rank[0], *([path] if kept else []))
    return replace(source, by_rank={0: files}, owners=owners, warnings=(*source.warnings, *remarks))
