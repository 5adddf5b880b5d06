"""An index of weight files (`model.safetensors.index.json`): which file holds which tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.errors import PlanError, raise_problems
from mindformers_ckpt.formats.headers import sound_headers
from mindformers_ckpt.text_files import read_json_object
from mindformers_ckpt.words import shortened

NAME_MAP_FILE = "param_name_map.json"
# What a download that has not finished leaves in the place of a file.
_UNFINISHED = (".incomplete", ".crdownload", ".part", ".tmp", ".download", ".aria2")


def read_index(path: Path) -> dict[str, Path]:
    """Tensor -> file, as the index says. Raises PlanError when it is none, or names files that are not there."""
    content = read_json_object(path, PlanError)
    # MindFormers writes the map alone (param_name_map.json).
    weight_map = content.get("weight_map", content if path.name == NAME_MAP_FILE else None)
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise PlanError(f"{path} is not an index of weight files: its weight_map does not map tensors to file names")
    names = sorted(set(weight_map.values()))
    # File names in an index come from outside: they may not lead out of the folder.
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise PlanError(f"{path} names files outside of its folder: {foreign[:5]}")
    are_there = each(lambda name: (path.parent / name).is_file(), names)
    missing = [f"{name}{_unfinished(path.parent, name)}" for name, there in zip(names, are_there) if not there]
    raise_problems(PlanError, f"{path} names files that are not there", missing)
    return {tensor: path.parent / name for tensor, name in weight_map.items()}


def _unfinished(folder: Path, name: str) -> str:
    """What an unfinished download of a file is called, for the message."""
    found = next((f"{name}{end}" for end in _UNFINISHED if (folder / f"{name}{end}").exists()), None)
    return "" if found is None else f" ({found} is: an unfinished download)"


def is_index_of(path: Path, files: Sequence[Path]) -> bool:
    """Whether a file is an index that names exactly these files."""
    try:
        return path.suffix == ".json" and set(read_index(path).values()) == set(files)
    except PlanError:
        return False


def check_index(path: Path, owners: dict[str, Path]) -> tuple[str, ...]:
    """Compare an index with the headers of its files.

    Raises FormatError for damaged files, and PlanError where a tensor is not in the file that the index says. Tensors
    that files hold besides are left aside, as transformers does; returns the warning that says so.
    """
    headers = sound_headers(list(dict.fromkeys(owners.values())))
    held = {file: header.tensors for file, header in headers.items()}
    absent = [f"{tensor} in {file.name}" for tensor, file in owners.items() if tensor not in held[file]]
    raise_problems(PlanError, f"{path} names tensors that are not there; is it of these files?", absent)
    surplus = [f"{name} in {file.name}" for file, names in held.items() for name in names if owners.get(name) != file]
    if not surplus:
        return ()
    return (f"left aside, since {path.name} does not assign them there: {shortened(surplus)}",)
