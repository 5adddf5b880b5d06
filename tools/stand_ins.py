"""Empty stand-ins for packages that MindFormers imports and that loading and saving of checkpoints does not call.

Its wheels are installed without their dependencies (an index may lack them, and other versions of MindSpore come with
them). A line in a .pth file of the environment imports this file; what is really installed goes before a stand-in.
Whatever is taken from one is a class without content. `bash tools/test_mindformers.sh` uses it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NAMES = frozenset(
    {
        *("PIL", "astunparse", "cv2", "datasets", "deprecated", "ftfy", "hyper_parallel", "jieba", "jinja2", "mindpet"),
        *("nltk", "pandas", "pyarrow", "regex", "rouge_chinese", "scipy", "sentencepiece", "setproctitle", "sklearn"),
        *("tensorboardX", "tiktoken", "tokenizers", "tqdm", "transformers"),
    }
)


class _Kind(type):
    """The type of what is taken from a stand-in: anything can be taken from it in turn."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (), {})

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return super().__call__()


class StandIn(ModuleType):
    """A module that has every name."""

    __version__ = "0"
    __path__: list[str] = []  # noqa: RUF012 - as modules have it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "deprecated":  # a decorator with arguments, which MindFormers uses at import
            return lambda *args, **options: lambda function: function
        return _Kind(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in where nothing else was found."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in NAMES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(_Finder())
