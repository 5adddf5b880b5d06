"""What the path of an adapter is: the one rule for which files hold its factors, and where its settings are."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.objects.path import absolute
from mindformers_ckpt.sources.complete import only_checkpoint
from mindformers_ckpt.sources.find import find_source, instead
from mindformers_ckpt.sources.source import SUFFIXES, Source
from mindformers_ckpt.words import shortened

SETTINGS_FILE = "adapter_config.json"
# In PEFT's order (peft.utils.load_peft_weights): the first one that is there is read.
_PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PEFT_INDEXES = tuple(f"{name}.index.json" for name in _PEFT_FILES)
_RANK_FOLDER = re.compile(r"rank_\d+")


class AdapterSource(NamedTuple):
    """An adapter on disk.

    Attributes:
        files: those that hold the factors.
        settings: its adapter_config.json, None when there is none.
        notes: what was chosen where a folder holds more than one thing.
    """

    files: Source
    settings: Path | None
    notes: tuple[str, ...] = ()


def find_adapter(path: str | os.PathLike[str]) -> AdapterSource:
    """Find the adapter at `path`.

    - A file is that file; the adapter_config.json of a folder that PEFT saved stands for its folder.
    - A folder with adapter_model.safetensors or adapter_model.bin is one that PEFT saved: the first of the two is read.
    - Any other folder is a MindSpore checkpoint: rank folders, or a file.

    Raises PlanError when there is nothing at the path, or a folder holds an adapter of PEFT and a MindSpore checkpoint.
    """
    path = absolute(path)
    if path.name == SETTINGS_FILE and path.is_file():
        path = path.parent
    if path.is_file():
        return AdapterSource(find_source(path), _settings(path.parent))
    if not path.is_dir():
        raise PlanError(f"there is no adapter at {path}{instead(path)}")
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    held = [name for name in _PEFT_FILES if (path / name).is_file()]
    if held:
        return _peft_adapter(path, held, names)
    pieces = [name for name in names if name in _PEFT_INDEXES]
    if pieces:
        raise PlanError(
            f"{path / pieces[0]}: an adapter in several files cannot be read; load it with PEFT and save it as one"
        )
    return _mindspore_adapter(path, names)


def _peft_adapter(folder: Path, held: Sequence[str], names: Sequence[str]) -> AdapterSource:
    """The file that PEFT would read. A MindSpore checkpoint beside it could be meant as well: there is no rule."""
    others = [name for name in names if name.endswith(".ckpt") or _is_rank_folder(folder / name)]
    if others:
        raise PlanError(
            f"{folder} holds an adapter of PEFT ({held[0]}) and a MindSpore checkpoint ({shortened(others, 20)}); "
            "give the file or folder that is meant"
        )
    chosen = folder / held[0]
    left = [*held[1:], *(name for name in names if Path(name).suffix in SUFFIXES and name not in held)]
    notes = (f"{folder}: {held[0]} is read, as PEFT does it, and not {shortened(left, 20)}",) if left else ()
    return AdapterSource(Source(chosen, {0: (chosen,)}), _settings(folder), notes)


def _mindspore_adapter(folder: Path, names: Sequence[str]) -> AdapterSource:
    ranks = [name for name in names if _is_rank_folder(folder / name)]
    files = [name for name in names if Path(name).suffix in SUFFIXES and (folder / name).is_file()]
    if ranks and files:
        raise PlanError(
            f"{folder} holds rank folders ({shortened(ranks, 20)}) and checkpoint files ({shortened(files, 20)}); "
            "give the file or folder that is meant"
        )
    if not ranks and not files:
        nested = [name for name in names if any((folder / name / file).is_file() for file in _PEFT_FILES)]
        hint = f"; there are adapters in its folders {shortened(nested, 20)}: give one of them" if nested else ""
        raise PlanError(
            f"{folder} holds no adapter: neither {' nor '.join(_PEFT_FILES)}, nor rank_<n> folders, nor a .ckpt or "
            f".safetensors file{hint}"
        )
    return AdapterSource(only_checkpoint(find_source(folder)), _settings(folder))


def _is_rank_folder(path: Path) -> bool:
    return _RANK_FOLDER.fullmatch(path.name) is not None and path.is_dir()


def _settings(folder: Path) -> Path | None:
    path = folder / SETTINGS_FILE
    return path if path.is_file() else None
