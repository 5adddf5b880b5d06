"""What a model's config.json says, together with the options of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindformers_ckpt.errors import ConfigError, FormatError, raise_problems
from mindformers_ckpt.formats.dtypes import DType, by_name
from mindformers_ckpt.sources.huggingface import CONFIG_FILE
from mindformers_ckpt.text_files import read_json_object

# Settings of MindSpore's networks by which the same weights lie otherwise in their parameters, with what is usual.
LAYOUT_SETTINGS = {
    "qkv_concat": True,
    "mlp_concat": True,
    "use_rearrange_rope": False,
    "use_gmm": False,
    "use_gmm_training": False,
    "use_contiguous_weight_layout_attention": False,
    "use_interleaved_weight_layout_mlp": True,
    "mla_qkv_concat": False,
    "pynative": False,
}
_LARGEST = (1 << 31) - 1
# What there is a name for each of in a checkpoint.
_COUNTED = re.compile("layer|expert")
_MOST_COUNTED = 65_536
# The number of layers, as models call it.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
# The options of the guide, and the keys of config.json that say the same.
_OPTION_KEYS = {
    "n_head": ("num_attention_heads", "n_head"),
    "hidden_size": ("hidden_size", "n_embed", "n_embd"),
    "layers": LAYERS,
}


@dataclass(frozen=True)
class ModelConfig:
    """The values of a config.json. `path` is None when there is none; then only options are known."""

    values: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def integer(self, *keys: str) -> int | None:
        """The first of the keys that is there, None when none is.

        Raises ConfigError when it is not an integer, negative, or larger than any model has it.
        """
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, type(None))):
                raise ConfigError(f"{self.path}: {key} is {value!r:.80}, an integer is expected")
            most = _MOST_COUNTED if _COUNTED.search(key) else _LARGEST
            if value is not None and not 0 <= value <= most:
                raise ConfigError(f"{self.path}: {key} is {value!r:.80}, a number from 0 to {most} is expected")
            if value is not None:
                return value
        return None

    def quotient(self, total: int | None, count: int | None, name: str, of: str = "") -> int | None:
        """`total` over `count`, None when one is not known; `name` and `of` are their keys.

        Raises ConfigError when it does not divide.
        """
        if total is None or not count:
            return None
        if total % count:
            raise ConfigError(f"{self.path}: {name} {total} is not divisible by {f'{of} {count}'.lstrip()}")
        return total // count

    def flag(self, *keys: str) -> bool:
        """Whether one of the keys is there and true."""
        return any(self.values.get(key) is True for key in keys)

    def text(self, key: str) -> str:
        """A text, "" when it is not there."""
        value = self.values.get(key)
        return value if isinstance(value, str) else ""

    def dtype(self) -> DType:
        """The element type of the model's weights, bfloat16 where it is not told. Raises ConfigError when unknown."""
        name = (self.text("dtype") or self.text("torch_dtype")).removeprefix("torch.")
        try:
            return by_name(name if name not in ("", "auto") else "bfloat16")
        except FormatError as error:
            raise ConfigError(f"{self.path}: {error}; choose one with --dtype") from None

    def quantisation(self, key: str) -> Any:
        """A value of `quantization_config`, None when it is not there."""
        section = self.values.get("quantization_config")
        return section.get(key) if isinstance(section, dict) else None

    def with_options(self, options: Mapping[str, int | None]) -> ModelConfig:
        """The configuration with options for what it lacks.

        Raises ConfigError that lists all options which contradict it.
        """
        values = dict(self.values)
        problems = []
        for option, value in options.items():
            if value is None:
                continue
            keys = _OPTION_KEYS[option]
            known = self.integer(*keys)
            if known is None:
                values[keys[0]] = value
            elif known != value:
                name = next(key for key in keys if self.values.get(key) is not None)
                problems.append(f"--{option} {value}: {self.path} says {name} {known}")
        raise_problems(ConfigError, "options contradict the model's config.json", problems)
        return ModelConfig(values, self.path)


def read_config(folder: Path | None) -> ModelConfig:
    """The config.json of a folder; an empty configuration when there is none.

    Raises ConfigError when the file cannot be read as a JSON object.
    """
    path = folder / CONFIG_FILE if folder is not None else None
    if path is None or not path.is_file():
        return ModelConfig()
    return ModelConfig(read_json_object(path, ConfigError, infinite=True), path)


def total(*terms: int | None) -> int | None:
    """The sum, None when a term is not known."""
    result = 0
    for term in terms:
        if term is None:
            return None
        result += term
    return result


def product(*factors: int | None) -> int | None:
    """The product, None when a factor is not known."""
    result = 1
    for factor in factors:
        if factor is None:
            return None
        result *= factor
    return result
