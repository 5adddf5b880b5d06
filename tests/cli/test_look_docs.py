"""What docs/look.md and docs/cookbook.md show is what the commands print, on the model of docs/offline.md."""

from __future__ import annotations

import re

import pytest
from doc_pages import DOCS, Session, blocks_of, missing_lines, text_of


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The model, strategies and checkpoints of docs/offline.md, made by its own blocks."""
    session = Session(tmp_path_factory.mktemp("look"))
    session.run([block.text for block in blocks_of(DOCS / "offline.md", "bash")[:3]])
    return session


@pytest.mark.parametrize("name", ["look.md", "cookbook.md"])
def test_the_blocks_run_and_print_what_the_page_shows(name: str, session: Session) -> None:
    page = DOCS / name
    printed = session.run([block.text for block in blocks_of(page, "bash")], session.scratch)
    assert missing_lines(page, printed) == []


def test_the_cookbook_answers_ten_questions() -> None:
    questions = re.findall(r"^## (.*)$", text_of(DOCS / "cookbook.md"), re.MULTILINE)
    assert len(questions) == 10
    assert all(question.endswith("?") for question in questions)
