#!/usr/bin/env python3
"""Print the rooms of the package, what each imports, and how large it is.

    python tools/rooms.py              # this checkout
    python tools/rooms.py FOLDER       # another one, to compare

The map is the drawing in CONTRIBUTING.md; tests/test_structure.py holds the imports against it. Exits with 1 when an
arrow goes upwards. Needs Python only.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

PACKAGE = "mindformers_ckpt"
# Names that users type or import; each leads into a room.
ENTRANCES: Mapping[str, set[str]] = {
    "__main__": {"cli"},
    "run": {"integrations"},
    "mindformers": {"integrations"},
    # The public names, wherever they stand.
    "__init__": {"api", "convert", "errors", "execution", "geometry", "look", "ms", "planning", "strategy"},
}
# Where names stood before, for those who still import them.
MOVED = "_moved"


def read_map(root: Path) -> tuple[str, ...]:
    """The rooms as CONTRIBUTING.md draws them, from the top: a room imports only rooms that come after it."""
    drawing = (root / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    return tuple(re.findall(r"^(\w+)/? {2,}\S", drawing, re.MULTILINE))


def files_of(root: Path) -> list[Path]:
    return sorted((root / PACKAGE).rglob("*.py"))


def room_of(file: Path, root: Path) -> str:
    return file.relative_to(root / PACKAGE).with_suffix("").parts[0]


def imports_of(file: Path) -> set[str]:
    """The modules that a file imports, at its head or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            found |= {f"{PACKAGE}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
    return found


def rooms_imported(file: Path, root: Path) -> set[str]:
    """The other rooms that a file imports from."""
    rooms = {name.split(".")[1] for name in imports_of(file) if name.startswith(f"{PACKAGE}.")}
    return rooms - {room_of(file, root), MOVED, "__version__"}


def allowed_from(room: str, rooms: tuple[str, ...]) -> set[str]:
    """The rooms that a room may import from."""
    if room in ENTRANCES:
        return ENTRANCES[room]
    return set(rooms[rooms.index(room) + 1 :] if room in rooms else rooms if room == MOVED else ())


class Room(NamedTuple):
    files: int
    lines: int
    public_names: int
    arrows: set[str]


def public_names(file: Path) -> int:
    """How many functions, classes and constants a file defines for others."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return sum(not name.startswith("_") for name in names)


def survey(root: Path) -> dict[str, Room]:
    """Every room of the package with its size and its arrows."""
    found: dict[str, Room] = {}
    for file in files_of(root):
        room = found.get(room_of(file, root), Room(0, 0, 0, set()))
        lines = len(file.read_text(encoding="utf-8").splitlines())
        arrows = room.arrows | rooms_imported(file, root)
        found[room_of(file, root)] = Room(
            room.files + 1, room.lines + lines, room.public_names + public_names(file), arrows
        )
    return found


def picture(found: Mapping[str, Room], rooms: tuple[str, ...]) -> Iterable[str]:
    """The lines to print: entrances, then the rooms from the top; arrows that go upwards are marked."""
    width = max(map(len, found))
    yield f"{'':{width}} {'files':>5} {'lines':>6} {'names':>5}  imports"
    order = [room for room in (*ENTRANCES, *rooms) if room in found]
    for name in (*order, *sorted(set(found) - set(order))):
        room = found[name]
        allowed = allowed_from(name, rooms)
        downwards = [arrow for arrow in rooms if arrow in room.arrows & allowed]
        arrows = [*downwards, *(f"!{arrow}" for arrow in sorted(room.arrows - allowed))]
        unknown = "" if name in order or name == MOVED else "   (not in the map)"
        line = f"{name:{width}} {room.files:5} {room.lines:6,} {room.public_names:5}  {' '.join(arrows)}{unknown}"
        yield line.rstrip()
    total = [sum(values) for values in zip(*(room[:3] for room in found.values()))]
    yield f"{'':{width}} {total[0]:5} {total[1]:6,} {total[2]:5}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).resolve().parent.parent)
    root = parser.parse_args(arguments).folder
    if not (root / PACKAGE).is_dir() or not (root / "CONTRIBUTING.md").is_file():
        print(f"{parser.format_usage()}error: {root} holds no {PACKAGE}/ and CONTRIBUTING.md", file=sys.stderr)
        return 2
    found, rooms = survey(root), read_map(root)
    print(*picture(found, rooms), sep="\n")
    upwards = {name: room.arrows - allowed_from(name, rooms) for name, room in found.items()}
    for name, arrows in upwards.items():
        if arrows:
            print(f"error: {name} imports {', '.join(sorted(arrows))}, which the map does not allow", file=sys.stderr)
    return int(any(upwards.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
