"""docs/guide.md tells the truth: every statement is there, and every test it names exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = re.findall(r"^\| G(\d+) \|.*\| (.*) \|$", (TESTS.parent / "docs" / "guide.md").read_text("utf-8"), re.MULTILINE)


def test_all_statements_are_there() -> None:
    assert [int(number) for number, _ in ROWS] == list(range(1, 44))


def test_the_tests_exist() -> None:
    for number, shown in ROWS:
        file = None
        for path, name in re.findall(r"`([\w/]+\.py)?(?:::(test_\w+))?`", shown):
            file = path or file
            assert file is not None, f"G{number}"
            source = (TESTS / file).read_text("utf-8")
            assert not name or f"def {name}(" in source, f"G{number}: {file}::{name}"
