"""Matches regular expressions in a process of its own, which the package ends when one of them does not end.

Run as a file, so it needs nothing but the standard library. Reads {"patterns": [...], "names": [...]} from stdin and
writes a line of JSON for every pattern as soon as it is done: the indices of the names that it matches, or what is
wrong with it as a text.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import warnings

_MEMORY = 1 << 30  # a few kilobytes are usual; "((x{1,999}){1,999}){1,999}" asks for terabytes


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # there is no such limit on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


def matches(pattern: str, names: list[str]) -> list[int] | str:
    """The indices of the names that a pattern matches, or what is wrong with it."""
    try:
        # As peft.utils.get_pattern_key does it, whose groups and anchors must keep their meaning.
        compiled = re.compile(rf"(.*\.)?({pattern})$")
        return [number for number, name in enumerate(names) if compiled.match(name)]
    except re.error as error:
        return error.msg
    except (OverflowError, RecursionError, MemoryError) as error:
        return f"it is too large ({type(error).__name__})"


def main() -> None:
    warnings.simplefilter("ignore")
    _limit_memory()
    task = json.loads(sys.stdin.buffer.read())
    for pattern in task["patterns"]:
        print(json.dumps(matches(pattern, task["names"])), flush=True)


if __name__ == "__main__":
    main()
