"""Text from outside, made fit for a terminal and a log.

Names of tensors, files and keys may hold anything: escape codes that a terminal obeys, newlines that forge a line of
a log, marks that reverse the order of writing, bytes that are not UTF-8. All that is shown passes through here, in
three places: the text of our errors (`errors.CheckpointError`), the log (`log`) and what the command line prints
(`cli.notices`).
"""

from __future__ import annotations

import json
import re
from typing import Any

# Our own messages of several lines indent what follows the first; a break without that comes from a name.
_OWN_BREAK = re.compile(r"\n(?=  )")
_WIDE_SPACES = "\u3000\xa0"  # not printable to Python, harmless, and frequent in Chinese text
_LONGEST_LINE = 6_000  # characters: the longest path, and what is said of it
_LONGEST_TEXT = 18_000
_BYTES = range(0xDC80, 0xDD00)  # how Python holds the bytes of a file name that are not UTF-8


def printable(text: str) -> str:
    """The text with a visible escape for every character that is not: newline, control, bidi mark, stray byte.

    A line break stays where the next line is indented by two spaces or more. What is printable already is not
    changed, so applying it twice does no harm.
    """
    if text.isprintable():
        return text
    return "\n".join("".join(map(_shown, line)) for line in _OWN_BREAK.split(text))


def shortened(text: str) -> str:
    """A message without the middle of lines that nobody reads to their end, and without the end of what has many."""
    lines: list[str] = []
    room = _LONGEST_TEXT
    for line in text.split("\n"):
        if len(line) > _LONGEST_LINE:
            line = f"{line[: _LONGEST_LINE - 1000]} … {line[-900:]}"
        room -= len(line)
        if room < 0 and lines:
            return "\n".join([*lines, "  … and more"])
        lines.append(line)
    return "\n".join(lines)


def ascii_json(value: Any) -> str:
    """JSON of plain ASCII without any control character: right for every terminal and locale.

    Names come back exactly from it, bytes that are not UTF-8 included. What JSON does not know becomes its text.
    """
    return json.dumps(value, default=str).replace("\x7f", "\\u007f")


def _shown(character: str) -> str:
    if character.isprintable() or character in _WIDE_SPACES:
        return character
    if ord(character) in _BYTES:
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
