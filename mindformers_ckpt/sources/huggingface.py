"""A Hugging Face model: a cloned repository, or a weight file in one. transformers' order says which files count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mindformers_ckpt.errors import FormatError, PlanError, describe_problems
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.sources.index import check_index, read_index
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.source import TORCH_SUFFIXES, Kind, Source

CONFIG_FILE = "config.json"
# In the order in which transformers looks (`_get_resolved_checkpoint_files`, 4.46 to 5): the first that is there.
_STANDARD = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_WEIGHTS = (".safetensors", *TORCH_SUFFIXES)
_MOST_FILES = 100_000
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")
# Files of other contents or other layouts that repositories keep beside the weights.
_OTHERS = ("adapter_model", "consolidated", "training_args", "optimizer", "scheduler", "rng_state")


def is_model(listing: Listing) -> bool:
    """Whether a folder is a model: a config.json with a `model_type`, and weights that MindSpore did not write."""
    config: Any = listing.json(CONFIG_FILE) if CONFIG_FILE in listing.file_names else None
    if not isinstance(config, dict) or "model_type" not in config or listing.rank_folders:
        return False
    if any(name in listing.file_names for name in _STANDARD):
        return not _is_of_mindspore(listing.folder / "model.safetensors")
    files = listing.weight_files(_WEIGHTS)
    return bool(files) and not any(map(_is_of_mindspore, files))


def _is_of_mindspore(file: Path) -> bool:
    """Whether MindSpore, or a conversion to it, wrote a .safetensors file: its metadata says so."""
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        return read_header(file).metadata.get("format") == "ms"
    except FormatError:
        return False  # reading it tells what is wrong


def read(listing: Listing) -> Source:
    """The weights of a folder. Raises PlanError when files are missing, there are none, or there are several sets."""
    root = listing.folder
    there = [name for name in _STANDARD if name in listing.file_names]
    if there:
        return _standard(listing, there)
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        files = [file for file in listing.weight_files(suffixes) if not file.name.startswith(_OTHERS)]
        if files:
            _check_numbers(root, files)
            return Source(root, {0: tuple(files)}, Kind.HUGGING_FACE)
    raise PlanError(
        f"{root} holds no .safetensors, .bin, .pth or .pt file (it holds {listing.describe()}); give a cloned Hugging "
        "Face repository"
    )


def read_file(file: Path) -> Source:
    """The weights that a file is, or is one part of."""
    listing = Listing(file.parent)
    if file.suffix not in _WEIGHTS:
        return read(listing)
    whole = _NUMBERED.fullmatch(file.name) is not None
    for name in _STANDARD:
        if name.endswith(".json") and name in listing.file_names:
            whole = whole or file in read_index(file.parent / name).values()
    return read(listing) if whole else Source(file, {0: (file,)}, Kind.HUGGING_FACE)


def _standard(listing: Listing, there: Sequence[str]) -> Source:
    """The first of the names that transformers knows; the others are left aside, which is said."""
    root, name = listing.folder, there[0]
    warnings: tuple[str, ...] = ()
    owners = None
    if name.endswith(".json"):
        owners = read_index(root / name)
        warnings = check_index(root / name, owners)
        files = tuple(sorted(set(owners.values())))
    else:
        files = (root / name,)
    suffix = files[0].suffix
    rest = [file for file in listing.weight_files((suffix,)) if not file.name.startswith(_OTHERS) and file not in files]
    # A model.safetensors.index.json that goes with the one file is no other set.
    other_sets = [other for other in there[1:] if not _is_index_of(root / other, files)]
    left = [*other_sets, *(file.name for file in rest if file.name not in other_sets)]
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        warnings = (*warnings, f"{root}: {name} is read, as transformers does; left aside: {shown}")
    return Source(root, {0: files}, Kind.HUGGING_FACE, owners, warnings=warnings)


def _is_index_of(path: Path, files: Sequence[Path]) -> bool:
    try:
        return path.suffix == ".json" and set(read_index(path).values()) == set(files)
    except PlanError:
        return False


def _check_numbers(folder: Path, files: Sequence[Path]) -> None:
    """Refuse "model-00001-of-00003" without its companions, and files of several sets."""
    sets: dict[tuple[str, str, str], set[str]] = {}
    single = []
    for file in files:
        match = _NUMBERED.fullmatch(file.name)
        if match is None:
            single.append(file.name)
            continue
        sets.setdefault((match[1], match[3], match[4]), set()).add(file.name)
    if len(sets) + bool(single) > 1:
        groups = [f"{prefix}-*-of-{count}{suffix}" for prefix, count, suffix in sets] + single[:5]
        raise PlanError(
            describe_problems(f"{folder} holds several sets of weights; give a file of the one to read", groups)
        )
    for (prefix, count, suffix), names in sets.items():
        wanted = (f"{prefix}-{number:0{len(count)}}-of-{count}{suffix}" for number in range(1, int(count) + 1))
        lacking = [name for name in islice(wanted, _MOST_FILES) if name not in names]
        if lacking or int(count) > _MOST_FILES:
            raise PlanError(describe_problems(f"{folder} lacks weight files", lacking))
