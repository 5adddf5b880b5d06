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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path += [str(Path(__file__).parent / "kills"), str(Path(__file__).parents[1] / "tools")]
from child import build
from slow_mount import mounted, why_not

KILLS = Path(__file__).parent / "kills"
COMMANDS = (
    *("transform", "overwrite", "fsync", "ranks, first", "ranks, added", "ranks, replaced"),
    *("convert, file", "convert, folder", "merge-lora", "merge-strategy", "plan", "job"),
)
WAYS = ("exchange", "three renames")
ON_A_MOUNT = ("overwrite",)
ALWAYS = ("overwrite", "ranks, replaced", "convert, file", "job")


def drive(shim: Path, folder: Path, command: str, way: str, kills: int | None = None) -> dict[str, Any]:
    """Kill a command before each of its operations, or some; how many these are, and what was wrong."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "PYTHONPATH": str(KILLS.parents[1]),
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(KILLS / "driver.py"), str(folder), command, way, *([] if kills is None else [str(kills)])],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def always(chosen: Sequence[str]) -> list[Any]:
    """All commands; those that are not chosen are slow tests."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("the shim is compiled with gcc")
    return build(tmp_path_factory.mktemp("shim"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", always(ALWAYS))
@pytest.mark.parametrize("kills", [16, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "every"])
def test_killed_before_every_operation(shim: Path, tmp_path: Path, command: str, way: str, kills: int | None) -> None:
    """`some` are half of them the last operations, those that publish."""
    found = drive(shim, tmp_path, command, way, kills)
    assert found["operations"] > 3
    assert found["faults"] == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["mounted", "mounted, no locks"])
@pytest.mark.parametrize("command", always(ON_A_MOUNT))
def test_killed_on_a_mount(shim: Path, tmp_path: Path, command: str, way: str) -> None:
    """The same on a file system of FUSE, with attributes that are seconds old."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    (tmp_path / "data").mkdir()
    lacks_locks = way.endswith("no locks")
    with mounted(tmp_path / "data", tmp_path / "mount", scratch=tmp_path / "slowfs", locks=not lacks_locks):
        found = drive(shim, tmp_path / "mount", command, way, 4)
    assert found["kills"] > 2
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
