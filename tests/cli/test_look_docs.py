"""What docs/look.md and docs/cookbook.md show is what the commands print, on the model of docs/offline.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from toy import ROOT, shell

OFFLINE = (ROOT / "docs" / "offline.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, strategies and checkpoints of docs/offline.md, made by its own blocks."""
    folder = tmp_path_factory.mktemp("look")
    (folder / "tools").symlink_to(ROOT / "tools")
    (folder / "bin").mkdir()
    shim = folder / "bin/mindformers-ckpt"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m mindformers_ckpt "$@"\n')
    shim.chmod(0o755)
    for block in blocks(OFFLINE, "bash")[:3]:
        result = shell(f'PATH="$PWD/bin:$PATH"; set -euo pipefail\n{block}', folder)
        assert result.code == 0, f"{block}\n{result}"
    return folder


@pytest.mark.parametrize("name", ["look.md", "cookbook.md"])
def test_the_blocks_run_and_print_what_the_page_shows(name: str, folder: Path) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    printed = ""
    for block in blocks(page, "bash"):
        result = shell(f'PATH="$PWD/bin:$PATH"; set -euo pipefail\n{block}', folder)
        assert result.code == 0, f"{block}\n{result}"
        printed += result.out.replace(str(folder.resolve()), "…")
    lines = printed.splitlines()
    for shown in blocks(page, "text"):
        for line in shown.splitlines():
            assert line in lines, f"{line}\n{printed}"


def test_the_cookbook_answers_ten_questions() -> None:
    page = (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8")
    questions = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert len(questions) == 10
    assert all(question.endswith("?") for question in questions)
