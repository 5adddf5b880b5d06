"""What all commands show on terminals of four widths, and in a pipe: nothing is too long there, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from damage_results import flip
from toy import ROOT, command, environment, invoke, write_toy

from mindformers_ckpt.cli.folding import columns_of, folded, folded_command
from mindformers_ckpt.cli.main import _COMMANDS

WIDTHS = [60, pytest.param(80, marks=pytest.mark.slow), 120, pytest.param(200, marks=pytest.mark.slow)]
HELP = {f"{name} --help".strip(): 0 for name in ["", *_COMMANDS]}
# What they show does not depend on the width, but for where lines are folded.
TABLES = {
    "inspect result": 0,
    "inspect result --flat": 0,
    "inspect sharded --strategy dp2mp2 --name weight": 0,
    "inspect result --rank 1 --strategy mp2pp2": 0,
    "inspect mp2pp2": 0,
    "plan --src-checkpoint full.ckpt --dst-strategy mp2pp2": 0,
    "diff full.ckpt other.ckpt": 1,
    "diff full.ckpt full.safetensors": 0,
    "fingerprint full.ckpt": 0,
    "verify result": 0,
    "verify damaged": 1,
    "verify damaged --against full.ckpt --strategy mp2pp2": 1,
    "inspect absent": 1,
    "diff full.ckpt result": 1,
    "plan --src-checkpoint sharded --dst-strategy mp2pp2": 1,
}
# They draw, or measure, or show their own name.
OTHERS = {
    "convert --reversed Treu": 2,
    "show layers.0.weight --src-checkpoint full.ckpt --dst-strategy mp2pp2": 0,
    "show layers.0.weight --src-checkpoint sharded --src-strategy dp2mp2": 0,
    "doctor sharded": 0,
}
ALL = {**HELP, **TABLES, **OTHERS}
Shown = Mapping[str, "tuple[int, str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy checkpoint, a result of it, and a damaged one, in a folder with a name that fits no narrow terminal."""
    made = tmp_path_factory.mktemp("a_folder_with_a_name_that_is_long_for_a_terminal_of_sixty_columns")
    write_toy(made)
    asked = ["transform", "--src-checkpoint", "full.ckpt", "--dst-strategy", "mp2pp2", "--dst-checkpoint-dir", "result"]
    assert command([*asked, "--fingerprint"], made).code == 0
    shutil.copytree(made / "result", made / "damaged")
    shutil.copy(made / "full.ckpt", made / "other.ckpt")
    for path in (made / "damaged/rank_3/checkpoint_3.ckpt", made / "other.ckpt"):
        flip(path, path.stat().st_size - 30)
    return made


@pytest.fixture(scope="module", params=WIDTHS)
def shown(request: pytest.FixtureRequest, folder: Path) -> tuple[int, Shown]:
    """A width, and what every command shows on a terminal that is so wide."""
    program = [sys.executable, str(Path(__file__).with_name("terminal_runs.py")), str(request.param), str(folder)]
    asked = json.dumps([each.split() for each in ALL])
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(program, input=asked, env=environment(path), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return request.param, dict(zip(ALL, map(tuple, json.loads(done.stdout))))


def test_no_line_is_longer_than_the_terminal(shown: tuple[int, Shown]) -> None:
    width, found = shown
    for asked, (code, text) in found.items():
        assert code == ALL[asked], (asked, text)
        for line in text.splitlines():
            assert columns_of(line) <= width or len(line.split()) == 1, (asked, line)  # a path is not broken


def test_nothing_is_lost_by_folding(shown: tuple[int, Shown], folder: Path) -> None:
    for asked in TABLES:
        piped = invoke(asked.split(), folder)
        assert set((piped.out + piped.err).split()) <= set(shown[1][asked][1].split()), asked


def test_boxes_are_whole(shown: tuple[int, Shown]) -> None:
    for asked in OTHERS:
        if asked.startswith("show"):
            text = shown[1][asked][1]
            assert "┼" in text
            assert not set("┼─") & set(re.sub("(┼─+)+┼", "", text)), text


def test_what_goes_into_a_pipe_is_not_folded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = command(["inspect", "result"], folder).out.splitlines()
    assert f"  target strategy:  4 ranks, 2 pipeline stages of 2 ({folder}/mp2pp2)" in lines
    (line,) = command(["inspect", "absent"], folder).err.splitlines()
    assert line.startswith(f"error: there is no checkpoint at {folder}/absent; ")


def test_folding() -> None:
    assert folded("short", 10) == "short"
    assert folded("a line of words", None) == "a line of words"
    assert folded("  strategy:   a long text", 20) == "  strategy:   a long\n    text"
    assert folded("  name:  one two three", 16) == "  name:  one two\n         three"
    assert folded("/a/path/that/is/long next", 10) == "/a/path/that/is/long\n  next"
    assert folded("权重 权重 权重", 10) == "权重 权重\n  权重"
    assert folded_command("  x diff --one a --two b", 15) == ["  x diff \\", "    --one a \\", "    --two b"]
