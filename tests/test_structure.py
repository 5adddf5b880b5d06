"""The rooms of the package and the arrows between them, as CONTRIBUTING.md draws them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mindformers_ckpt"

# From the ground up: a room imports rooms that stand above it in this list, never one below.
ROOMS = (
    *("printable", "errors", "text_files", "log", "progress", "disk", "patterns", "lora_names", "geometry", "formats"),
    *("strategy", "sources", "planning", "engine", "publish", "execution", "transform"),
    *("lora_scaling", "lora_settings", "lora", "convert", "job", "ms", "integrations", "cli"),
)
# Names that users type or import; each leads into a room.
ENTRANCES = {
    "__main__": {"cli"},
    "run": {"integrations"},
    "mindformers": {"integrations"},
    "__init__": {"geometry", "ms"},
}
MINDSPORE = {"ms", "integrations"}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(file: Path) -> set[str]:
    """The modules that a file imports, at its head or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "mindformers_ckpt":
            found |= {f"mindformers_ckpt.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arrows_go_downwards(file: Path) -> None:
    own = room_of(file)
    targets = {name.split(".")[1] for name in imports_of(file) if name.startswith("mindformers_ckpt.")}
    targets -= {own, "_moved", "__version__"}
    if own in ENTRANCES:
        assert targets <= ENTRANCES[own]
    elif own != "_moved":
        assert targets <= set(ROOMS[: ROOMS.index(own)])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_mindspore_stands_at_the_edge(file: Path) -> None:
    """MindSpore is imported by few files, and by none at its head: importing the package must not need it."""
    frameworks = {name for name in imports_of(file) if name.split(".")[0] in ("mindspore", "mindformers", "torch")}
    assert not frameworks or room_of(file) in MINDSPORE
    at_head = ast.parse(file.read_text(encoding="utf-8")).body
    names = {alias.name for node in at_head if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in at_head if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.split(".")[0] in ("mindspore", "mindformers", "torch")}


def test_contributing_draws_the_same_map() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawing = text.split("```")[1]
    drawn = re.findall(r"^(\w+)/?(?:\.py)? {2,}\S", drawing, re.M)
    assert [room for room in reversed(drawn) if room in ROOMS] == list(ROOMS)
    assert set(drawn) - set(ROOMS) == set()
