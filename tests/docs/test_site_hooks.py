"""What tools/site_hooks.py makes of the text of a page."""

from __future__ import annotations

from types import SimpleNamespace

from site_hooks import on_page_markdown

PAGES = {"offline.md": SimpleNamespace(page=SimpleNamespace(title="离线转换"))}


def made(text: str) -> str:
    return on_page_markdown(text, page=None, config=None, files=SimpleNamespace(get_file_from_path=PAGES.get))


def test_names_of_files_become_titles() -> None:
    assert made("见 [offline.md](offline.md#plan)。") == "见 [离线转换](offline.md#plan)。"
    assert made("[here](offline.md), [other.md](other.md)") == "[here](offline.md), [other.md](other.md)"


def test_line_breaks_within_chinese_go() -> None:
    assert made("一个段落，\n分为两行。\n\n另一个") == "一个段落，分为两行。\n\n另一个"
    assert made("- 第一项\n  仍是第一项\n- 第二项") == "- 第一项仍是第一项\n- 第二项"
    assert made("two lines\nof English") == "two lines\nof English"
