"""What MkDocs does to every page of the site.

A link that is labelled with the name of a file gets that page's title; in the repository the name is the better label.
A line break within Chinese goes: a browser would show it as a blank.
"""

from __future__ import annotations

import re
from typing import Any

_CHINESE = r"[\u4e00-\u9fff，。；：、（）“”？！]"
_BREAK = re.compile(rf"(?<={_CHINESE})\n *(?={_CHINESE})")
_NAMED = re.compile(r"\[([\w/]+\.md)\]\((\1(?:#[^)]*)?)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    def titled(match: re.Match[str]) -> str:
        file = files.get_file_from_path(match[1])
        title = file.page.title if file is not None and file.page is not None else match[1]
        return f"[{title}]({match[2]})"

    return _BREAK.sub("", _NAMED.sub(titled, markdown))
