#!/usr/bin/env python3
"""Write docs/messages.md and docs/zh/messages.md: every message of the library, from the source.

    python tools/message_pages.py             # write them
    python tools/message_pages.py --check     # exit with 1 when they are not what the code says

A message that docs/troubleshooting.md explains leads there: the headings of that page are messages, with `…` for what
is filled in. Heads, and what is behind the messages of a room, are in page_texts.yaml. Needs Python and pyyaml.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from generated_pages import DOCS, FOLDERS, ROOT, main, table_head, texts_of
from messages import Message, explained_by, messages_of
from rooms import read_map


def pages() -> dict[Path, str]:
    """The two pages by their files. Raises KeyError for a room that page_texts.yaml does not describe."""
    return {folder / "messages.md": _page(language) for language, folder in FOLDERS.items()}


def headings() -> list[str]:
    """The messages that the page on troubleshooting explains, as it writes them."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `(.*)`$", page, re.MULTILINE)


def anchor(heading: str) -> str:
    """The anchor of a heading, as the site and views of a repository make it."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\- ]", "", heading.lower().strip()))


def _page(language: str) -> str:
    texts, messages = texts_of("messages"), messages_of(ROOT)
    explained = {
        heading: f"[{texts['cause'][language]}](troubleshooting.md#{anchor(heading)})" for heading in headings()
    }
    parts = [texts["head"][language]]
    for room in read_map(ROOT):
        said = [message for message in messages if message.room == room]
        if said:
            parts.append(f"## {_title(room, texts, language)}\n\n{texts['rooms'][room][language]}\n")
        for file in dict.fromkeys(message.file for message in said):
            rows = [_row(message, explained) for message in said if message.file == file]
            head = table_head(texts["columns"][language])
            parts.append("\n".join([f"### `{file}`\n", head, *dict.fromkeys(rows)]) + "\n")
    return "\n".join(parts)


def _title(room: str, texts: dict[str, Any], language: str) -> str:
    """What a room does: in English as the map of CONTRIBUTING.md has it."""
    if language != "en":
        return str(texts["rooms"][room]["title"])
    drawing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    found = re.search(rf"^{room}/? {{2,}}(\S.*)$", drawing, re.MULTILINE)
    assert found is not None
    return found[1][0].upper() + found[1][1:]


def _row(message: Message, explained: dict[str, str]) -> str:
    text = " ".join(message.text.split()).replace("|", "\\|")
    shown = f"`` {text} ``" if "`" in text else f"`{text}`"
    causes = [f" → {link}" for heading, link in explained.items() if explained_by(message, heading)]
    return f"| {message.kind} | {shown}{''.join(causes[:1])} |"


if __name__ == "__main__":
    sys.exit(main(__doc__, pages, sys.argv[1:]))
