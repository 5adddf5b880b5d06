"""Killed before every operation on files, with and without names that can be exchanged: old or new, never between.

`python tests/test_kills.py` prints the table: operations of each command, that is, kills.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent / "kills"))
from child import build

KILLS = Path(__file__).parent / "kills"
COMMANDS = (
    *("transform", "overwrite", "fsync", "ranks, first", "ranks, added", "ranks, replaced"),
    *("convert, file", "convert, folder", "merge-lora", "merge-strategy", "plan", "job"),
)
WAYS = ("exchange", "three renames")
ALWAYS = ("overwrite", "ranks, replaced", "convert, file", "job")


def drive(shim: Path, folder: Path, command: str, way: str) -> dict[str, Any]:
    """Kill a command before each of its operations; how many these are, and what was wrong."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "PYTHONPATH": str(KILLS.parents[1]),
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(KILLS / "driver.py"), str(folder), command, way],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("the shim is compiled with gcc")
    return build(tmp_path_factory.mktemp("shim"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "command", [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS if name not in ALWAYS)]
)
def test_killed_before_every_operation(shim: Path, tmp_path: Path, command: str, way: str) -> None:
    found = drive(shim, tmp_path, command, way)
    assert found["operations"] > 3
    assert found["faults"] == []


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        shim = build(Path(scratch))
        print(f"{'command':<18}" + "".join(f"{way:>26}" for way in WAYS))
        for command in COMMANDS:
            cells = []
            for way in WAYS:
                folder = Path(tempfile.mkdtemp(dir=scratch))
                found = drive(shim, folder, command, way)
                cells.append(f"{found['operations']} kills, {len(found['faults'])} faults")
            print(f"{command:<18}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
