"""What MkDocs does to every page of the site: a link that is labelled with the name of a file gets that page's title.

In the repository the name is the better label; there are no titles beside the text.
"""

from __future__ import annotations

import re
from typing import Any

_NAMED = re.compile(r"\[([\w/]+\.md)\]\((\1(?:#[^)]*)?)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    def titled(match: re.Match[str]) -> str:
        file = files.get_file_from_path(match[1])
        title = file.page.title if file is not None and file.page is not None else match[1]
        return f"[{title}]({match[2]})"

    return _NAMED.sub(titled, markdown)
