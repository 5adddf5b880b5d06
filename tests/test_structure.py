"""The rooms of the package and the arrows between them, as CONTRIBUTING.md draws them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from rooms import ENTRANCES, MOVED, allowed_from, files_of, imports_of, main, read_map, room_of, rooms_imported

ROOT = Path(__file__).parent.parent
ROOMS = read_map(ROOT)
FILES = files_of(ROOT)
MINDSPORE = {"ms", "integrations"}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT / "mindformers_ckpt"))


def test_the_map_has_every_room_once() -> None:
    assert len(ROOMS) == len(set(ROOMS))
    assert {room_of(file, ROOT) for file in FILES} == {*ROOMS, *ENTRANCES, MOVED}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_arrows_go_downwards(file: Path) -> None:
    assert rooms_imported(file, ROOT) <= allowed_from(room_of(file, ROOT), ROOMS)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_mindspore_stands_at_the_edge(file: Path) -> None:
    """MindSpore is imported by few files, and by none at its head: importing the package must not need it."""
    frameworks = {name for name in imports_of(file) if name.split(".")[0] in ("mindspore", "mindformers", "torch")}
    assert not frameworks or room_of(file, ROOT) in MINDSPORE
    at_head = ast.parse(file.read_text(encoding="utf-8")).body
    names = {alias.name for node in at_head if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in at_head if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.split(".")[0] in ("mindspore", "mindformers", "torch")}


def test_the_picture_marks_an_arrow_that_goes_upwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "CONTRIBUTING.md").write_text("```\ncli/      commands\nerrors    the tree\n```\n")
    for file, code in {
        "cli/main.py": "def f(): from mindformers_ckpt import errors",
        "errors.py": "A = _b = 1",
    }.items():
        (tmp_path / "mindformers_ckpt" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mindformers_ckpt" / file).write_text(code)
    assert main([str(tmp_path)]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:3]] == [
        ["cli", "1", "1", "1", "errors"],
        ["errors", "1", "1", "1"],
    ]
    (tmp_path / "mindformers_ckpt" / "errors.py").write_text("import mindformers_ckpt.cli.main")
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[2].split() == ["errors", "1", "1", "0", "!cli"]
    assert printed.err == "error: errors imports cli, which the map does not allow\n"
    assert main([str(tmp_path / "nowhere")]) == 2
