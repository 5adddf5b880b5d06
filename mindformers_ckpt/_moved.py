"""Modules of version 0.1 under the names they had then, until 0.3: scripts of users import them.

Importing an old name gives the very module of the new one, with a DeprecationWarning that says so.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_PACKAGE = "mindformers_ckpt."
# old name -> new name, both below the package
_NAMES = {
    "auto": "job",
    "auto.cluster": "job.cluster.cluster",
    "auto.config": "job.config",
    "auto.coordinator": "job.cluster.coordinator",
    "auto.direct": "job.direct",
    "auto.hook": "ms.hook",
    "auto.hyperparameters": "job.hyperparameters",
    "auto.messages": "job.cluster.messages",
    "auto.modelarts": "job.modelarts",
    "auto.object_store": "job.object_store",
    "auto.output_dir": "job.output_dir",
    "auto.rendezvous": "job.cluster.rendezvous",
    "auto.reslice": "job.reslice",
    "auto.shared_disk": "job.shared_disk",
    "auto.transfers": "job.transfers",
    "auto.weights": "ms.weights",
    "box": "geometry.box",
    "checkpoint": "sources.checkpoint",
    "engine.shard_io": "engine.reader",
    "layout": "geometry.layout",
    "plan_file": "planning.file",
    "shard_io": "engine.reader",
    "source_files": "sources.find",
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(_PACKAGE):
            return None
        new = _NAMES.get(name[len(_PACKAGE) :])
        return None if new is None else importlib.machinery.ModuleSpec(name, _Alias(_PACKAGE + new))


class _Alias(importlib.abc.Loader):
    """Gives another module in the place of a new one."""

    def __init__(self, name: str) -> None:
        self._module = importlib.import_module(name)
        self._spec = self._module.__spec__

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        message = f"{spec.name} is {self._module.__name__} now; the old name will go in version 0.3"
        warnings.warn(message, DeprecationWarning, stacklevel=6)
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # which the import system has replaced


def install() -> None:
    """Make the old names importable."""
    sys.meta_path.insert(0, _Finder())
