"""Lines that fit the terminal: folded at blanks, so that nothing is cut off and a table keeps its columns.

What goes into a pipe or a file is never folded: there a line is a line, for grep and for programs.
"""

from __future__ import annotations

import re
import shutil
from typing import IO, Any

_COLUMN = re.compile(r"\s*\S.*?\s{2,}(?=\S)")
_WORDS = re.compile(r"-\S+(?: [^-\s]\S*)?|\S+")
_WIDEST_COLUMN = 0.6  # of a line: the text of a column that begins later is continued at the left


def width_of(stream: IO[Any]) -> int | None:
    """The columns of the terminal that a stream is shown on, None where it is none."""
    try:
        return shutil.get_terminal_size().columns if stream.isatty() else None
    except (AttributeError, ValueError):  # closed, or nothing like a file
        return None


def folded(text: str, width: int | None) -> str:
    """Text whose lines have at most so many columns; only a word that is longer (a path, a digest) has more."""
    if width is None or (text.isascii() and len(text) <= width):
        return text
    return "\n".join(part for line in text.split("\n") for part in _fold(line, width))


def folded_command(command: str, width: int | None) -> list[str]:
    """The lines of a shell command, with the marks that let a shell read them as one; an option keeps its value."""
    if width is None or len(command) <= width:
        return [command]
    lines: list[str] = []
    start = " " * (len(command) - len(command.lstrip()))
    for part in _WORDS.findall(command):
        if lines and len(lines[-1]) + len(part) + 3 <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(f"{start}{part}" if not lines else f"{start}  {part}")
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _fold(line: str, width: int) -> list[str]:
    if columns_of(line) <= width:
        return [line]
    column = _COLUMN.match(line)
    indent = len(line) - len(line.lstrip()) + 2
    if column is not None and columns_of(column[0]) <= width * _WIDEST_COLUMN:
        indent = columns_of(column[0])
    indent = min(indent, int(width * _WIDEST_COLUMN))
    found, current = [], ""
    for blank, word in re.findall(r"(\s*)(\S+)", line):
        if current.strip() and columns_of(current + blank + word) > width:
            found.append(current)
            current = " " * indent + word
        else:
            current += blank + word
    return [*found, current]


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes: characters of East Asia take two, marks on others none."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
