"""Imported first by the scripts beside it: they run with the package of their own checkout, installed or not.

Where a dependency is missing the script ends with one line that says how to get it. Needs Python alone.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def need(*packages: str, extra: str = "") -> None:
    """End the script with one line where this Python has not these packages, which `extra` of setup.cfg brings."""
    missing = [package for package in packages if not _is_installed(package)]
    if not missing:
        return
    what = f"'{ROOT}[{extra}]'" if extra else str(ROOT)
    own = ROOT / ".venv"
    activate = f" (or activate {own})" if own.is_dir() and Path(sys.prefix).resolve() != own.resolve() else ""
    script = Path(sys.argv[0]).name
    print(f"error: {script} needs {', '.join(missing)}: python -m pip install {what}{activate}", file=sys.stderr)
    sys.exit(1)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _requirements() -> list[str]:
    """The names of the packages that setup.cfg asks for."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = setup.get("options", "install_requires", fallback="").splitlines()
    return list(dict.fromkeys(match[0] for line in lines if (match := re.match(r"[\w.-]+", line))))


def _use_checkout() -> None:
    """Put the checkout before what is installed, for this process and those that it starts."""
    if not (ROOT / "mindformers_ckpt").is_dir():
        return  # the tests of an installed wheel have taken it away
    sys.path.insert(0, str(ROOT))
    paths = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    if str(ROOT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])


need(*_requirements())
_use_checkout()
