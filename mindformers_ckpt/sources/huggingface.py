"""A Hugging Face model: a cloned repository, or a weight file in one. transformers' order says which files count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.errors import FormatError, PlanError, describe_problems
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.sources.index import check_index, is_index_of, read_index
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.parts import is_part, part_of, sets_of, whole_set
from mindformers_ckpt.sources.source import SUFFIXES, TORCH_SUFFIXES, Kind, Source
from mindformers_ckpt.words import shortened

CONFIG_FILE = "config.json"
# In the order in which transformers looks (`_get_resolved_checkpoint_files`, 4.46 to 5): the first that is there.
_STANDARD = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_WEIGHTS = (".safetensors", *TORCH_SUFFIXES)
# Files of other contents or other layouts that repositories keep beside the weights.
_OTHERS = ("adapter_model", "consolidated", "training_args", "optimizer", "scheduler", "rng_state")


def is_model(listing: Listing) -> bool:
    """Whether a folder is a model: a config.json with a `model_type`, and weights that MindSpore did not write.

    Raises PlanError where that cannot be told, since config.json cannot be read.
    """
    if CONFIG_FILE not in listing.names or listing.rank_folders or not _holds_foreign_weights(listing):
        return False
    config: Any = listing.json(CONFIG_FILE)
    if not isinstance(config, dict):
        raise PlanError(
            f"{listing.folder / CONFIG_FILE} cannot be read as JSON, so that it is not known whether this is a Hugging "
            "Face model; restore it, or move it away where these are weights with MindSpore's names"
        )
    return "model_type" in config


def _holds_foreign_weights(listing: Listing) -> bool:
    """Whether there are weights that transformers would read, and MindSpore did not write them."""
    first = next((name for name in _STANDARD if name in listing.file_names), None)
    if first is not None and not first.endswith(".safetensors.index.json"):
        return not _is_of_mindspore(listing.folder / first)
    files = listing.weight_files(_WEIGHTS)
    return (first is not None or bool(files)) and not any(each(_is_of_mindspore, files))


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
            return Source(root, {0: tuple(files)}, Kind.HUGGING_FACE, warnings=_left_aside(listing, files))
    raise PlanError(
        f"{root} holds no .safetensors, .bin, .pth or .pt file (it holds {listing.describe()}); give a cloned Hugging "
        "Face repository"
    )


def read_file(file: Path) -> Source:
    """The weights that a file is, or is one part of: those of its index, or of its numbered set."""
    listing = Listing(file.parent)
    if file.suffix not in _WEIGHTS:
        return _standard(listing, [file.name]) if file.name in _STANDARD else read(listing)
    for name in _STANDARD:
        if name.endswith(".json") and name in listing.file_names and file in read_index(file.parent / name).values():
            return _standard(listing, [name])
    if is_part(file.name):
        files = whole_set(file, listing.weight_files((file.suffix,)))
        return Source(file.parent, {0: files}, Kind.HUGGING_FACE, warnings=_left_aside(listing, files))
    return Source(file, {0: (file,)}, Kind.HUGGING_FACE)


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
    # A model.safetensors.index.json that goes with the one file is no other set.
    other_sets = [other for other in there[1:] if not is_index_of(root / other, files)]
    warnings = (*warnings, *_left_aside(listing, files, other_sets, f"{name} is read, as transformers does; "))
    return Source(root, {0: files}, Kind.HUGGING_FACE, owners, warnings=warnings)


def _left_aside(
    listing: Listing, files: Sequence[Path], others: Sequence[str] = (), reason: str = ""
) -> tuple[str, ...]:
    """The warning that names other weights of the folder than `files`; the names of `others` come first."""
    weights = [file.name for file in listing.weight_files((*SUFFIXES, *TORCH_SUFFIXES)) if file not in files]
    rest = [name for name in weights if not name.startswith(_OTHERS) and name not in others]
    left = [*others, *rest, *listing.almost_weights]
    if not left:
        return ()
    return (f"{listing.folder}: {reason}left aside: {shortened(left)}",)


def other_weights(listing: Listing) -> list[str]:
    """The weight files of PyTorch in a folder that is read as MindSpore's, and what only looks like weights."""
    files = (file.name for file in listing.weight_files(TORCH_SUFFIXES) if not file.name.startswith(_OTHERS))
    return [*files, *listing.almost_weights]


def _check_numbers(folder: Path, files: Sequence[Path]) -> None:
    """Refuse files of several sets, and a set that is not whole."""
    parts = {part_of(file.name) for file in files}
    if len(parts) > 1:
        groups = list(dict.fromkeys(str(part_of(file.name) or file.name) for file in files))
        raise PlanError(
            describe_problems(f"{folder} holds several sets of weights; give a file of the one to read", groups)
        )
    sets_of(files)
