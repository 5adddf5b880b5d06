"""What surrounds converted weights: indexes, and the model's other files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.sources.complete import INDEX_FILE
from mindformers_ckpt.sources.huggingface import CONFIG_FILE
from mindformers_ckpt.sources.index import NAME_MAP_FILE
from mindformers_ckpt.text_files import read_json_object, write_json

# Configuration, tokenizer and the code of a model, as Hugging Face repositories hold them beside the weights.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
_NOT_COMPANIONS = (".index.json", "manifest.json", NAME_MAP_FILE)


def write_index(plan: Plan, folder: Path) -> None:
    """The index of several safetensors files, by which `from_pretrained` finds them."""
    if len(plan.targets) == 1:
        return
    places = {spec.name: target.path for target in plan.targets for spec in target.tensors}
    index = {"metadata": {"total_size": plan.bytes_written}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / INDEX_FILE, index, indent=2)


def write_name_map(plan: Plan, folder: Path) -> None:
    """Tensor name -> file, as MindSpore Transformers looks it up in a folder of safetensors files."""
    places = {spec.name: target.path for target in plan.targets for spec in target.tensors}
    write_json(folder / NAME_MAP_FILE, places, indent=2)


def copy_companions(origin: Path | None, folder: Path, dtype: str | None, changes: Mapping[str, Any]) -> None:
    """Carry over config.json, tokenizer files and the like.

    config.json, by which `from_pretrained` loads, is put right: `dtype` is the element type that was chosen, `changes`
    are further values, and nothing is quantised any more.
    """
    if origin is None:
        return
    for pattern in _COMPANIONS:
        for file in origin.glob(pattern):
            if file.is_file() and not file.name.endswith(_NOT_COMPANIONS) and file.name != CONFIG_FILE:
                (folder / file.name).write_bytes(file.read_bytes())
    if (origin / CONFIG_FILE).is_file():
        values = read_json_object(origin / CONFIG_FILE, ConfigError, infinite=True)
        adapted = {key: value for key, value in values.items() if key != "quantization_config"} | dict(changes)
        if dtype is not None:
            adapted |= {key: dtype for key in ("dtype", "torch_dtype") if key in values and key not in changes}
        if adapted == values:
            (folder / CONFIG_FILE).write_bytes((origin / CONFIG_FILE).read_bytes())
        else:
            write_json(folder / CONFIG_FILE, adapted, indent=2)
