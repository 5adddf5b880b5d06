"""Models that users bring: functions as the guide describes them, found by name without a change of our source.

A name is looked up in, first to last:
- the folder given with `--plugin`: its `convert_weight.py` defines `convert_pt_to_ms`, its
  `convert_reversed.py` defines `convert_ms_to_pt`;
- the maps `convert_map` and `reversed_convert_map` below: name -> "package.module.function";
- installed packages with an entry point of that name in the group `mindformers_ckpt.convert` or
  `mindformers_ckpt.convert_reversed`, unless a model of ours has the name.

The functions are called by keyword: input_path, output_path, dtype and every further option of the command
line as text. One that takes a single positional argument gets a namespace of the same values.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.convert.model import find_model
from mindformers_ckpt.errors import ConfigError, TransferError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Converter = Callable[..., Any]

convert_map: dict[str, str] = {}
reversed_convert_map: dict[str, str] = {}

_FORWARD = ("convert_weight.py", "convert_pt_to_ms")
_REVERSE = ("convert_reversed.py", "convert_ms_to_pt")


def find_plugin(name: str, reverse: bool, folder: Path | None = None) -> Converter | None:
    """The user's converter of a name, None when there is none.

    Raises ConfigError when one is announced but cannot be imported.
    """
    if folder is not None:
        return _from_folder(folder, *(_REVERSE if reverse else _FORWARD))
    path = (reversed_convert_map if reverse else convert_map).get(name)
    if path is not None:
        return _from_path(path)
    if not name or find_model(name) is not None:
        return None
    group = "mindformers_ckpt.convert_reversed" if reverse else "mindformers_ckpt.convert"
    for entry in _entry_points(group):
        if entry.name == name:
            return _from_path(entry.value.replace(":", "."))
    return None


def run_plugin(
    converter: Converter, input_path: Path, output_path: Path, dtype: str | None, extra: Mapping[str, str]
) -> None:
    """Call a converter. Raises TransferError when it says that it failed, by returning False."""
    values = {"input_path": str(input_path), "output_path": str(output_path), "dtype": dtype, **extra}
    result = converter(argparse.Namespace(**values)) if _takes_namespace(converter) else converter(**values)
    if result is False:
        raise TransferError(f"{converter.__name__} returned False: the conversion failed; see its messages above")


def parse_extra(arguments: list[str]) -> dict[str, str]:
    """The options "--name value" and "--name=value" that a converter gets. Raises ConfigError for anything else."""
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or not name[2:].replace("-", "_").isidentifier():
            raise ConfigError(f"{word!r} is not an option; options of a plugin are written --name value")
        if not equals:
            if not rest:
                raise ConfigError(f"the option {word} has no value")
            value = rest.pop(0)
        found[name[2:].replace("-", "_")] = value
    return found


def _takes_namespace(converter: Converter) -> bool:
    """Whether it is called with one namespace: it has one parameter without a default, and no keywords."""
    parameters = inspect.signature(converter).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return False
    return len([p for p in parameters if p.kind is not p.VAR_POSITIONAL and p.default is p.empty]) == 1


def _from_folder(folder: Path, file_name: str, function: str) -> Converter | None:
    path = folder / file_name
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {file_name}; a plugin's folder has {_FORWARD[0]} and {_REVERSE[0]}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))  # a plugin may import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return _function(module, function, str(path))


def _from_path(path: str) -> Converter:
    module_name, _, function = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"the converter {path} cannot be imported: {error}") from error
    return _function(module, function, module_name)


def _function(module: object, name: str, where: str) -> Converter:
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{where} defines no function {name}")
    return function  # type: ignore[no-any-return]


def _entry_points(group: str) -> list[EntryPoint]:
    from importlib.metadata import entry_points  # takes as long to import as everything else here

    points: Any = entry_points()
    selected = points.select(group=group) if hasattr(points, "select") else points.get(group, ())
    return list(selected)
