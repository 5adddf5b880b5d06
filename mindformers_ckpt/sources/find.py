"""Which files make up a checkpoint on disk, by rank.

A path is one file of complete weights, a folder of complete files, or a `model_dir` with
`model_dir/rank_x/*.ckpt` (guide: "src_checkpoint"). `.safetensors` may stand wherever `.ckpt` may.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

from mindformers_ckpt.errors import PlanError, describe_problems
from mindformers_ckpt.formats import read_header

SUFFIXES = (".ckpt", ".safetensors")
INDEX_FILE = "model.safetensors.index.json"
_RANK_FOLDER = re.compile(r"rank_(\d+)")
_STEP = re.compile(r"-(\d+)_(\d+)$")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class SourceFiles:
    """The files of a checkpoint.

    Attributes:
        root: the path that was given.
        by_rank: rank -> its files (several only where complete weights are spread over files).
        sharded: whether the files lie in rank folders.
        warnings: what the user should know of the choice.
    """

    root: Path
    by_rank: Mapping[int, tuple[Path, ...]]
    sharded: bool
    warnings: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The checkpoint's name: that of its file or folder, without a suffix of a checkpoint file."""
        return self.root.stem if self.root.suffix in SUFFIXES else self.root.name


def find_source(path: str | os.PathLike[str], file_name: str | None = None) -> SourceFiles:
    """Find the files of the checkpoint at `path`.

    Where a rank folder holds several files the last by default sort of the names is taken, or
    `file_name`-matching ones when that is given: a file of that name, or of that epoch and step
    ("…-3_150.ckpt" names the files that end in "-3_150" on every rank).

    Raises PlanError when there is nothing at the path, or a rank folder lacks the wanted file.
    """
    path = Path(os.path.abspath(path))
    if path.is_file():
        return SourceFiles(path, {0: (path,)}, sharded=False)
    if not path.is_dir():
        raise PlanError(f"there is no checkpoint at {path}")
    folders = _rank_folders(path)
    if folders:
        return _sharded_source(path, folders, file_name)
    return _complete_folder(path)


def is_huggingface_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a Hugging Face model: a config.json with a `model_type`, and no rank folders."""
    path = Path(path)
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config and not _rank_folders(path)


def _rank_folders(path: Path) -> dict[int, Path]:
    matches = ((entry, _RANK_FOLDER.fullmatch(entry.name)) for entry in path.iterdir())
    return {int(match[1]): entry for entry, match in matches if match is not None and entry.is_dir()}


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoint files of a folder in the default sort of their names."""
    return sorted(entry for entry in folder.iterdir() if entry.suffix in SUFFIXES and entry.is_file())


def _sharded_source(root: Path, folders: Mapping[int, Path], file_name: str | None) -> SourceFiles:
    chosen: dict[int, tuple[Path, ...]] = {}
    problems, warnings = [], []
    for rank, folder in sorted(folders.items()):
        files = checkpoint_files(folder)
        if file_name is not None:
            files = [file for file in files if _names_match(file, file_name)]
        if not files:
            wanted = f"no file for {file_name!r}" if file_name else "no checkpoint file"
            problems.append(f"rank_{rank}: {wanted} in {folder}")
            continue
        chosen[rank] = (files[-1],)
        natural = max(files, key=_natural_order)
        if natural != files[-1]:
            warnings.append(
                f"rank_{rank} holds several files; {files[-1].name} is used, the last by default sort of the "
                f"names, although {natural.name} has the higher numbers"
            )
    if problems:
        raise PlanError(describe_problems(f"{root}: files of some ranks are missing", problems))
    _check_steps(chosen)
    return SourceFiles(root, chosen, sharded=True, warnings=tuple(warnings))


def _names_match(file: Path, wanted: str) -> bool:
    if file.name == wanted or file.stem == wanted:
        return True
    step = _STEP.search(Path(wanted).stem if Path(wanted).suffix in SUFFIXES else wanted)
    return step is not None and file.stem.endswith(step[0])


def _natural_order(file: Path) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in _DIGITS.split(file.stem)]


def _check_steps(chosen: Mapping[int, tuple[Path, ...]]) -> None:
    """Refuse files of different steps: mixed, they would give weights that never existed."""
    steps: dict[str, list[int]] = {}
    for rank, (file, *_) in chosen.items():
        match = _STEP.search(file.stem)
        if match is not None:
            steps.setdefault(match[0].lstrip("-"), []).append(rank)
    if len(steps) < 2:
        return
    listed = "; ".join(f"{step}: ranks {ranks[:8]}" for step, ranks in steps.items())
    raise PlanError(
        f"the last files of the ranks are of different epochs and steps ({listed}); "
        "name the file to load, or remove the files that do not belong together"
    )


def _complete_folder(root: Path) -> SourceFiles:
    """A folder of complete files: with an index they are one checkpoint, a single file is one too."""
    index = root / INDEX_FILE
    if index.is_file():
        return SourceFiles(root, {0: _indexed_files(root, index)}, sharded=False)
    files = checkpoint_files(root)
    if not files:
        raise PlanError(
            f"{root} holds neither rank_<n> folders nor a .ckpt or .safetensors file; "
            "give the folder that holds the rank folders, or a file"
        )
    return SourceFiles(root, {0: tuple(files)}, sharded=False)


def _indexed_files(root: Path, index: Path) -> tuple[Path, ...]:
    try:
        file_of: dict[str, str] = dict(json.loads(index.read_bytes())["weight_map"])
        names = sorted(set(file_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{index} is not a safetensors index ({error!r})") from None
    if not names or not all(isinstance(name, str) for name in names):
        raise PlanError(f"{index} is not a safetensors index: its weight_map does not map tensors to file names")
    # File names in an index come from outside: they may not lead out of the folder.
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise PlanError(f"{index} names files outside of its folder: {foreign[:5]}")
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise PlanError(describe_problems(f"{index} names files that are not there", missing))
    held = {name: read_header(root / name).tensors for name in names}
    absent = [f"{tensor} in {name}" for tensor, name in file_of.items() if tensor not in held[name]]
    if absent:
        raise PlanError(describe_problems(f"{index} names tensors that are not there; is it of these files?", absent))
    return tuple(root / name for name in names)


def separate_checkpoints(files: SourceFiles) -> list[SourceFiles]:
    """The checkpoints that a source holds: several where a folder holds several files of complete weights.

    Files without a tensor name in common are one checkpoint. Where every two files have names in common,
    each file is a checkpoint of its own.

    Raises PlanError when neither holds, or two files would give results of the same name; FormatError for
    damaged files.
    """
    if files.sharded or len(files.by_rank[0]) == 1 or (files.root / INDEX_FILE).is_file():
        return [files]
    paths = files.by_rank[0]
    names = {path: set(read_header(path).tensors) for path in paths}
    pairs = list(combinations(paths, 2))
    apart = [pair for pair in pairs if names[pair[0]].isdisjoint(names[pair[1]])]
    if len(apart) == len(pairs):
        together = f"{len(paths)} files are read as one checkpoint: {', '.join(path.name for path in paths)}"
        return [replace(files, warnings=(*files.warnings, together))]
    if apart:
        first, second = apart[0]
        raise PlanError(
            f"{files.root} holds {len(paths)} files, some of which repeat tensors and some of which do not "
            f"({first.name} and {second.name} have none in common); give the file to read, or a folder with the "
            "files of one checkpoint"
        )
    if len({path.stem for path in paths}) < len(paths):
        raise PlanError(f"{files.root} holds a .ckpt and a .safetensors file of the same name; give the file to read")
    return [SourceFiles(path, {0: (path,)}, sharded=False) for path in paths]
