"""A model: its names, its conversion tables, and what they take from its config.json."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.rules import Side, Table, check_table
from mindformers_ckpt.errors import ConfigError, did_you_mean

# Models that are asked for, and of which MindFormers has no network up to this version.
_NO_NETWORK = {"qwen3_next": "2.1"}
_LAYER = re.compile(r"\b(?:layers|blocks|h)\.(\d+)\.")

Runs = Mapping[str, Sequence[Mapping[str, int]]]


@dataclass(frozen=True)
class Facts:
    """What the tables of a model need of its config.json.

    Attributes:
        sizes: extents of axes by name, None where config.json does not tell.
        runs: the captures over which rules are repeated: "layer" -> {"n": 0}, {"n": 1}, …
        flags: conditions that hold ("tied", "bias").
    """

    sizes: Mapping[str, int | None]
    runs: Runs
    flags: frozenset[str] = frozenset()

    def holds(self, condition: str) -> bool:
        """Whether a rule's condition holds: all of its words, "flag" or "!flag"."""
        return all((word.lstrip("!") in self.flags) != word.startswith("!") for word in condition.split())


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor is of, by its name."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def count_layers(names: Iterable[str]) -> Mapping[str, Any]:
    """The number of layers, by the names of a source."""
    numbers = [number for number in map(layer_of, names) if number is not None]
    return {"num_hidden_layers": max(numbers) + 1} if numbers else {}


@dataclass(frozen=True)
class Model:
    """A model that can be converted.

    Attributes:
        name: as `--model` takes it; `aliases` are other names of it.
        model_types: its `model_type` in config.json.
        tables: by naming of the MindSpore side, the default first. Where Hugging Face has several layouts of
            the model, the naming is "<naming>:<layout>".
        facts: reads a config.json.
        layout: tells the Hugging Face layout from the config.json and the names of the source.
        counted: what follows from the names of a source where config.json does not tell it.
        canonical: a name as a table spells it, from the spelling of a file, by side.
        options: command-line options that are this model's own.
        told: those of its options that the names of MindSpore weights, or of a strategy, tell, beside those that
            were chosen (are true); None for one that does not count then.
        unfit: why no network with names of a naming could be trained with these facts; None where one can.
    """

    name: str
    tables: Mapping[str, Table]
    facts: Callable[[ModelConfig], Facts]
    aliases: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    layout: Callable[[ModelConfig, Sequence[str]], str] | None = None
    counted: Callable[[Iterable[str]], Mapping[str, Any]] = count_layers
    canonical: Mapping[Side, Callable[[str], str]] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    told: Callable[[Collection[str], Collection[str]], Mapping[str, bool | None]] = lambda names, chosen: {}
    unfit: Callable[[str, Facts], str | None] = lambda naming, facts: None

    def __post_init__(self) -> None:
        for table in self.tables.values():
            check_table(table)

    @property
    def namings(self) -> tuple[str, ...]:
        """The namings of the MindSpore side, the default first."""
        return tuple(dict.fromkeys(key.partition(":")[0] for key in self.tables))

    def naming(self, wanted: str | None, qkv_concat: bool) -> str:
        """The naming that is asked for. Raises ConfigError when the model has no such names."""
        naming = wanted or self.namings[0]
        if qkv_concat and naming != "mcore":
            naming += "+qkv_concat"
        if naming not in self.namings:
            raise ConfigError(f"{self.name} has no {naming} names; it has {', '.join(self.namings)}")
        return naming


@lru_cache(maxsize=1)
def models() -> Mapping[str, Model]:
    """All models by name: every module of `models` that defines MODEL."""
    return {model.name: model for model in _models_like("")}


def find_model(name: str) -> Model | None:
    """The model of a name or an alias; case, "-" and "." for "_" do not matter."""
    wanted = _plain(name)
    for model in _models_like(name):
        if wanted in map(_plain, (model.name, *model.aliases)):
            return model
    return None


def named_model(name: str) -> Model:
    """`find_model`. Raises ConfigError where there is none."""
    model = find_model(name)
    if model is None:
        _raise_without_network(name)
        raise ConfigError(f"unknown model {name!r}.{did_you_mean(name, models())} Known are {', '.join(models())}")
    return model


def model_of_config(config: ModelConfig) -> Model:
    """The model that a config.json is of, by its model_type. Raises ConfigError when it is none of ours."""
    kind = config.text("model_type")
    for model in _models_like(kind):
        if kind and kind in model.model_types:
            return model
    _raise_without_network(kind)
    if config.path is None:
        raise ConfigError(
            "there is no config.json that says which model this is; give its folder (--hf-config FOLDER), or the name "
            f"of the model (--model NAME): {', '.join(models())}"
        )
    known = sorted(kind for model in models().values() for kind in model.model_types)
    what = f"model_type {kind!r}" if kind else "no model_type"
    raise ConfigError(f"{config.path}: {what}; known are {', '.join(known)}")


def _raise_without_network(name: str) -> None:
    """Raise ConfigError where MindFormers has no network of a model, by its `model_type`."""
    version = _NO_NETWORK.get(_plain(name))
    if version is not None:
        raise ConfigError(
            f"MindFormers has no network of {name} (up to {version}): there are no names and shapes that its weights "
            "could be converted to"
        )


def _models_like(name: str) -> Iterator[Model]:
    """All models; those whose module is called like `name` first, since making the tables of a model takes time."""
    from mindformers_ckpt.convert import models as package

    wanted = _plain(name)

    def is_unlike(module: str) -> bool:
        return not wanted.startswith(module) and not module.startswith(wanted)

    for module in sorted((found.name for found in pkgutil.iter_modules(package.__path__)), key=is_unlike):
        model = getattr(importlib.import_module(f"{package.__name__}.{module}"), "MODEL", None)
        if isinstance(model, Model):
            yield model


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")
