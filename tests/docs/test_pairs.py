"""Every page of docs/ has its twin in docs/zh: the same headings, tables, blocks, pictures and links."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from doc_pages import CHINESE, DOCS, ROOT, Block, blocks_of, text_of, without_blocks

NAMES = sorted(page.name for page in DOCS.glob("*.md"))
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#[^)]*)?\)")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
# A comment, from where it begins; of Python, of a shell and of yaml.
_COMMENT = re.compile(r"(?:^|(?<=\s))#(?=\s).*?$", re.MULTILINE)


def headings(page: Path) -> list[str]:
    """The levels of the headings, as `##`."""
    return re.findall(r"^(#+) ", without_blocks(page), re.MULTILINE)


def tables(page: Path) -> list[list[int]]:
    """The cells of every row, table by table."""
    found: list[list[int]] = [[]]
    for line in without_blocks(page).splitlines():
        if line.startswith("|"):
            found[-1].append(len(re.findall(r"(?<!\\)\|", re.sub(r"`+[^`]*`+", "", line))))
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def commands(block: Block) -> str:
    """A block without its comments and docstrings; of drawings just what comes before the words."""
    if not block.language:
        return "\n".join(re.split(r" {2,}", line.strip())[0] for line in block.text.splitlines())
    text = re.sub(r'^""".*?"""$', "", block.text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(line.rstrip() for line in _COMMENT.sub("", text).splitlines() if line.strip())


def lists(page: Path) -> Counter[str]:
    """How many entries lists have, by their marks."""
    return Counter(mark[-1] for mark in re.findall(r"^(?:-|\d+\.) ", without_blocks(page), re.MULTILINE))


def test_both_languages_have_the_same_pages() -> None:
    assert sorted(page.name for page in CHINESE.glob("*.md")) == NAMES


def test_both_languages_have_the_same_pictures() -> None:
    pictures = {path.name: path.read_bytes() for path in (DOCS / "images").iterdir()}
    assert {path.name: path.read_bytes() for path in (CHINESE / "images").iterdir()} == pictures


@pytest.mark.parametrize("name", NAMES)
def test_the_twins_are_alike(name: str) -> None:
    english, chinese = DOCS / name, CHINESE / name
    assert headings(chinese) == headings(english)
    assert tables(chinese) == tables(english)
    assert [block.language for block in blocks_of(chinese)] == [block.language for block in blocks_of(english)]
    for ours, theirs in zip(blocks_of(chinese), blocks_of(english)):
        assert commands(ours) == commands(theirs)
    assert lists(chinese) == lists(english)
    if name != "keys.md":  # made of the docstring in one language, of a page in the other
        assert Counter(_LINK.findall(text_of(chinese))) == Counter(_LINK.findall(text_of(english)))


@pytest.mark.parametrize("name", sorted({*NAMES} - {"api.md"}))
def test_the_headings_are_translated(name: str) -> None:
    """But for those that are names: of commands, of products, messages and files."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(CHINESE / name), re.MULTILINE)
    words = [title for title in titles if not _CHINESE.search(re.sub(r"`[^`]*`", "", title)) and "`" not in title]
    assert set(words) <= {"mindformers_ckpt", "inspect", "show", "doctor", "transform", "plan", "merge-strategy"}


@pytest.mark.parametrize("folder", [DOCS, CHINESE], ids=["english", "chinese"])
def test_links_lead_to_files(folder: Path) -> None:
    """Also where the repository is looked at without the site."""
    broken = [
        f"{page.name}: {target}"
        for page in folder.glob("*.md")
        for target in _LINK.findall(without_blocks(page))
        if target and not re.match(r"https?:", target) and not (folder / target).exists()
    ]
    assert broken == []


@pytest.mark.parametrize("name", ["README.md", "README_CN.md", "CONTRIBUTING.md"])
def test_links_of_the_repository_lead_to_files(name: str) -> None:
    targets = {target for target in _LINK.findall(without_blocks(ROOT / name)) if not re.match(r"https?:", target)}
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
def test_the_readme_leads_to_every_page(name: str) -> None:
    folder = "docs" if name == "README.md" else "docs/zh"
    targets = set(_LINK.findall(text_of(ROOT / name)))
    assert [page for page in NAMES if f"{folder}/{page}" not in targets and page != "index.md"] == []


def test_a_missing_row_a_changed_command_and_a_missing_heading_are_noticed(tmp_path: Path) -> None:
    text = text_of(DOCS / "offline.md")
    other = tmp_path / "offline.md"
    other.write_text(text.replace("| `--hash` |", "`--hash` "), encoding="utf-8")
    assert tables(other) != tables(DOCS / "offline.md")
    other.write_text(text.replace("--format ckpt", "--format safetensors", 1), encoding="utf-8")
    assert list(map(commands, blocks_of(other))) != list(map(commands, blocks_of(DOCS / "offline.md")))
    other.write_text(text.replace("## Exit codes", "**Exit codes**"), encoding="utf-8")
    assert headings(other) != headings(DOCS / "offline.md")
    other.write_text(text.replace("# 8 ranks, data parallel 2", "# 8 ranks"), encoding="utf-8")
    assert list(map(commands, blocks_of(other))) == list(map(commands, blocks_of(DOCS / "offline.md")))
