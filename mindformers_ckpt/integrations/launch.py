"""Run a MindFormers script with our engine under its `TransformCkpt`.

    python -m mindformers_ckpt.run run_mindformer.py --config finetune.yaml --auto_trans_ckpt True
    msrun --worker_num=8 --local_worker_num=8 python -m mindformers_ckpt.run run_mindformer.py --config finetune.yaml

The script runs as __main__ with its own arguments. Nothing else changes: MindFormers is imported when the
script imports it. MINDFORMERS_CKPT_TIMEOUT: seconds that ranks wait for each other at a step (7200).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from mindformers_ckpt.errors import CheckpointError, ConfigError
from mindformers_ckpt.integrations.checkpoint2 import CHECKPOINT2
from mindformers_ckpt.integrations.joining import LOADING
from mindformers_ckpt.integrations.mindformers import MODULE, check_installed, install_in, join_early_in, load_in
from mindformers_ckpt.integrations.settings import settings

_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    MODULE: install_in,
    LOADING: join_early_in,
    CHECKPOINT2: load_in,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script that the first argument names with the others.

    Returns 1 for wrong input and for an error of ours that the script does not catch, 2 for usage.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if not arguments or arguments[0].startswith("-"):
        print(f"{__doc__}\nerror: the script comes first, its options after it", file=sys.stderr)
        return 2
    script = Path(arguments[0])
    try:
        check_installed()
        settings()
        _check_script(script)
        return _run(script, arguments)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(script: Path, arguments: list[str]) -> int:
    """Run the script as `python script` does, with our engine."""
    sys.meta_path.insert(0, _Finder())
    sys.argv = arguments
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _check_script(script: Path) -> None:
    if not script.is_file():
        raise ConfigError(
            f"there is no script {str(script)!r} in {Path.cwd()}; the script comes first, its options after it"
        )
    if script.suffix in (".sh", ".bash"):
        raise ConfigError(
            f"{script} is a shell script; start it with bash, and write `python -m mindformers_ckpt.run` before the "
            "name of the Python script that it starts"
        )
    if script.name == "transform_checkpoint.py":
        raise ConfigError(
            f"{script} holds a TransformCkpt of its own, which cannot be replaced; `mindformers-ckpt transform` takes "
            "the same options"
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Lets our engine be installed at the moment the script imports MindFormers, not earlier.

    What the script sets before (environment, context) must still come first.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _AFTER_IMPORT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _AFTER_IMPORT[name])
        return spec


class _Loader(importlib.abc.Loader):
    """Loads a module as the loader that it stands before, then installs."""

    def __init__(self, loader: importlib.abc.Loader, install: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._install = install

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._install(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)
