"""The tensors of a model on disk: a Hugging Face folder, or MindSpore files, by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.convert.config import CONFIG_FILE
from mindformers_ckpt.errors import FormatError, PlanError, describe_problems
from mindformers_ckpt.formats import TensorSpec, read_header
from mindformers_ckpt.publish import MANIFEST_FILE, read_manifests
from mindformers_ckpt.sources.find import find_source

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")
# In order: what is read when a folder has no index.
_PATTERNS = ("model.safetensors", "model-*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.bin", "*.pth")
# Files of other contents or other layouts that repositories keep beside the weights.
_OTHERS = ("adapter_model", "consolidated", "training_args", "optimizer", "scheduler", "rng_state")


class Found(NamedTuple):
    """A tensor on disk; `spec` has the name of the file."""

    path: Path
    spec: TensorSpec


@dataclass(frozen=True)
class Weights:
    """All tensors of a source, by the name that tables use.

    Attributes:
        root: the path that was given.
        folder: the folder that may hold the model's config.json.
        tensors: name -> where it is.
    """

    root: Path
    folder: Path
    tensors: Mapping[str, Found]


def read_weights(root: Path, files: Sequence[Path], canonical: Callable[[str], str] = lambda name: name) -> Weights:
    """Read the headers of all files. Raises FormatError and PlanError with everything that is wrong."""
    tensors: dict[str, Found] = {}
    damaged, problems = [], []
    for path in files:
        try:
            header = read_header(path)
        except FormatError as error:
            damaged.append(str(error))
            continue
        for record in header.tensors.values():
            name = canonical(record.spec.name)
            if name in tensors:
                problems.append(f"{name}: in {tensors[name].path.name} and in {path.name}")
            tensors[name] = Found(path, record.spec)
    if damaged:
        raise FormatError(damaged[0] if len(damaged) == 1 else describe_problems("files cannot be read", damaged))
    if problems:
        raise PlanError(describe_problems(f"{root} holds several weights, name the file to convert", problems))
    return Weights(root, root if root.is_dir() else root.parent, tensors)


def huggingface_files(path: Path) -> list[Path]:
    """The weight files of a Hugging Face folder, or of the folder that a given file is a part of.

    An index decides; without one the safetensors files are taken, or else those of PyTorch. Numbered files
    must be all there. Raises PlanError when files are missing or there are none.
    """
    if not path.exists():
        raise PlanError(f"there is nothing at {path}")
    if path.is_file() and not _is_part(path):
        return [path]
    folder = path if path.is_dir() else path.parent
    for name in _INDEXES:
        if (folder / name).is_file():
            return _indexed(folder / name)
    for pattern in _PATTERNS:
        files = sorted(file for file in folder.glob(pattern) if not file.name.startswith(_OTHERS))
        if files:
            _check_numbers(folder, files)
            return files
    raise PlanError(f"{folder} holds no .safetensors, .bin, .pth or .pt file; give a cloned Hugging Face repository")


def _is_part(path: Path) -> bool:
    """Whether a file stands for its folder: it has no weights, or is one of several."""
    if path.suffix not in (".safetensors", ".bin", ".pth", ".pt"):
        return True
    indexes = (path.parent / name for name in _INDEXES if (path.parent / name).is_file())
    return bool(_NUMBERED.fullmatch(path.name)) or any(path in _indexed(index) for index in indexes)


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{index} is no index of weight files ({error!r})") from None
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise PlanError(f"{index} names files outside of its folder: {foreign[:5]}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise PlanError(describe_problems(f"{index} names files that are not there", missing))
    return [index.parent / name for name in names]


def _check_numbers(folder: Path, files: Iterable[Path]) -> None:
    """Refuse "model-00001-of-00003" without its companions."""
    names = {file.name for file in files}
    wanted = set()
    for match in filter(None, map(_NUMBERED.fullmatch, names)):
        count, width = int(match[3]), len(match[2])
        wanted |= {f"{match[1]}-{number:0{width}}-of-{match[3]}{match[4]}" for number in range(1, count + 1)}
    if wanted - names:
        raise PlanError(describe_problems(f"{folder} lacks weight files", sorted(wanted - names)))


def mindspore_files(path: Path) -> list[Path]:
    """The files of complete MindSpore weights. Raises PlanError when they are cut for several ranks."""
    source = find_source(path)
    if len(source.by_rank) > 1:
        raise PlanError(
            f"{path} holds the shards of {len(source.by_rank)} ranks; merge them first: mindformers-ckpt transform "
            "--src-checkpoint … --src-strategy … --dst-checkpoint-dir …"
        )
    return list(next(iter(source.by_rank.values())))


def recorded_naming(root: Path, files: Sequence[Path]) -> str | None:
    """What a conversion wrote of the naming of MindSpore files: in a .safetensors file, or a folder's manifest."""
    record: Mapping[str, Any] = {}
    if files[0].suffix == ".safetensors":
        record = read_header(files[0]).metadata
    elif root.is_dir():
        record = read_manifests(root).get(MANIFEST_FILE, {})
    naming = record.get("naming") if "model" in record else None
    return naming if isinstance(naming, str) else None


def config_folder(weights: Path, given: Path | None) -> Path | None:
    """The folder whose config.json describes the weights: the given one, or the weights' own."""
    if given is not None:
        folder = given.parent if given.name == CONFIG_FILE else given
        if not (folder / CONFIG_FILE).is_file():
            raise PlanError(f"{given} holds no {CONFIG_FILE}")
        return folder
    return weights if (weights / CONFIG_FILE).is_file() else None
