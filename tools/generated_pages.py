"""Pages that are made from the code, in two languages: their texts, written or held against the code."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - finds the package of this checkout

from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.text_files import read_yaml_mapping

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Folder of the pages of each language.
FOLDERS = {"en": DOCS, "zh": DOCS / "zh"}


def texts_of(page: str) -> dict[str, Any]:
    """The texts of a page, as tools/page_texts.yaml has them. Raises ConfigError where it has a name twice."""
    found: dict[str, Any] = read_yaml_mapping(ROOT / "tools" / "page_texts.yaml", ConfigError)[page]
    return found


def table_head(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def stale(pages: Mapping[Path, str]) -> list[str]:
    """The pages that are not what they should be, by their paths in the repository."""
    return [
        path.relative_to(ROOT).as_posix()
        for path, text in pages.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main(about: str, pages: Callable[[], Mapping[Path, str]], arguments: list[str]) -> int:
    """Write the pages, or with `--check` only say which are not what the code says."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is an old one")
    is_check = parser.parse_args(arguments).check
    made = pages()
    old = stale(made)
    if old and is_check:
        parser.exit(1, f"not what the code says: {', '.join(old)}; run the same without --check\n")
    for path, text in made.items():
        if not is_check:
            path.write_text(text, encoding="utf-8")
    return 0
