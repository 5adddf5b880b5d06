"""Pages that are made from the code are what the code says; what other pages say of it is true."""

from __future__ import annotations

import re
from pathlib import Path

import message_pages
import messages
import option_pages
import pytest
import yaml
from doc_pages import CHINESE, DOCS, ROOT, blocks_of, text_of, without_blocks
from generated_pages import stale

from mindformers_ckpt.job.config import KEYS, Config

SAID = messages.messages_of(ROOT)


def test_options_and_keys_are_those_of_the_code() -> None:
    assert stale(option_pages.pages()) == [], "run: python tools/option_pages.py"


def test_messages_are_those_of_the_code() -> None:
    assert stale(message_pages.pages()) == [], "run: python tools/message_pages.py"


def test_every_message_that_is_explained_is_said() -> None:
    explained = message_pages.headings()
    assert len(explained) >= 30
    assert [text for text in explained if not any(messages.explained_by(said, text) for said in SAID)] == []
    for text in explained:  # English in both languages, since the messages are
        assert f"### `{text}`" in text_of(CHINESE / "troubleshooting.md")


def test_every_explanation_has_a_cause_and_a_way_out() -> None:
    for page, word in ((DOCS, "Do: "), (CHINESE, "处理：")):
        sections = text_of(page / "troubleshooting.md").split("\n### `")[1:]
        for section in sections:
            cause, found, remedy = section.partition("\n").__getitem__(2).partition(word)
            assert found, section
            assert len(cause.strip()) > 10, section
            assert len(remedy.strip()) > 4, section


@pytest.mark.parametrize("name", ["complete_to_sharded.md", "sharded_to_sharded.md", "to_one_card.md"])
def test_messages_that_a_page_quotes_are_said(name: str) -> None:
    """The first cells of the tables of what is refused, where they are words of a message."""
    quoted = re.findall(r"^\| `([^`]+)`", without_blocks(DOCS / name), re.MULTILINE)
    assert quoted
    for text in quoted:
        template = re.sub(r"\[[^]]*\]|\d+", "…", text)
        assert any(messages.explained_by(said, template) for said in SAID), text


def test_errors_of_broken_files_are_on_the_page() -> None:
    """Messages that the readers really give of tests/data/broken."""
    errors = [message for message in SAID if message.kind not in ("line", "notice")]
    patterns = [_pattern(message) for message in errors if max(map(len, message.text.split("…"))) > 10]
    for text in _errors_of_broken_files():
        assert any(pattern.search(text) for pattern in patterns), text


def _pattern(message: messages.Message) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, message.text.split("…"))), re.DOTALL)


def _errors_of_broken_files() -> list[str]:
    """What reading each of the broken checkpoints says."""
    from mindformers_ckpt.errors import CheckpointError
    from mindformers_ckpt.formats import read_header

    said = []
    for path in sorted((ROOT / "tests" / "data" / "broken").rglob("*")):
        if path.suffix in (".ckpt", ".safetensors"):
            try:
                read_header(path)
            except CheckpointError as error:
                said.append(str(error))
    assert said
    return said


def test_a_message_is_found_however_it_is_put_together(tmp_path: Path) -> None:
    package = tmp_path / "mindformers_ckpt"
    package.mkdir()
    (package / "room.py").write_text(
        '''"""No message, a docstring."""
def read(path, problems):
    """Nor this one here."""
    headline = f"{path} holds what nobody " + "can read"
    if problems:
        raise PlanError(describe_problems(headline, problems))
    log.warning("%s is left aside here", path)
    raise Malformed("the file ends " f"at byte {path}")
''',
        encoding="utf-8",
    )
    found = {(message.kind, message.text) for message in messages.messages_of(tmp_path)}
    assert found == {
        ("PlanError", "… holds what nobody can read"),
        ("notice", "… is left aside here"),
        ("cause", "the file ends at byte …"),
    }


def test_every_yaml_block_is_taken_by_the_hook() -> None:
    pages = [page for folder in (DOCS, CHINESE) for page in folder.glob("*.md")]
    blocks = [
        block for page in [*pages, ROOT / "README.md", ROOT / "README_CN.md"] for block in blocks_of(page, "yaml")
    ]
    assert len(blocks) > 20
    for block in blocks:
        values = yaml.safe_load(block.text)
        assert set(values) & set(KEYS), block.text
        Config.from_mapping(values)


@pytest.mark.parametrize("name", ["automatic.md", "keys.md"])
def test_every_key_is_in_the_tables(name: str) -> None:
    for folder in (DOCS, CHINESE):
        keys = re.findall(r"^\| `(\w+)` \|", without_blocks(folder / name), re.MULTILINE)
        assert set(KEYS) <= set(keys), folder


def test_every_file_of_the_code_is_on_the_page_of_files() -> None:
    """The names that constants give to files, and those that runs leave (publish/strays.py)."""
    page = text_of(DOCS / "files.md")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mindformers_ckpt").rglob("*.py"))
    lines = re.findall(r"^[A-Z_]+_FILE(?:, [A-Z_]+_FILE)* = (\"[^(\n]*)$", source, re.MULTILINE)
    names = {name for line in lines for name in re.findall(r'"([^"]+)"', line)}
    assert {"manifest.json", "fingerprint.sig"} <= names
    strays = {".staging-", ".journal", "-joined", ".new-", ".part-", ".removed-", ".strategy.previous", ".meeting-"}
    assert all(stray in source for stray in strays)
    assert sorted(name for name in {*names, *strays, ".old", ".lock", ".owner"} if name not in page) == []
