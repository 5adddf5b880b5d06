"""The pages of docs/: their headings, tables and blocks, and a shell that runs the blocks as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CHINESE = DOCS / "zh"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = "----- end of block -----"


class Block(NamedTuple):
    """A block of code of a page: its language ("" where none is named) and its text."""

    language: str
    text: str


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in order; those of some languages only, where they are named."""
    found = [Block(*match) for match in _BLOCK.findall(text_of(page))]
    return [block for block in found if not languages or block.language in languages]


def without_blocks(page: Path) -> str:
    """The text of a page around its blocks: a comment in one is no heading."""
    return _BLOCK.sub("", text_of(page))


class Printed(NamedTuple):
    """What a block printed. Names of the scratch folder are `…`, as pages write them."""

    block: str
    out: str
    err: str


class Session:
    """A shell in which the blocks of pages run one after the other, as a reader pastes them.

    It begins in a folder that stands for the root of the repository: `tools` is there. What the blocks make goes to
    scratch folders of their own (`mktemp -d`), which are below `folder`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "repository"
        self._scratch = folder / "scratch"
        for path in (self.root, self._scratch, folder / "bin"):
            path.mkdir()
        (self.root / "tools").symlink_to(ROOT / "tools")
        command = folder / "bin" / "mindformers-ckpt"
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mindformers_ckpt "$@"\n')
        command.chmod(0o755)

    @property
    def scratch(self) -> Path:
        """The folder that the blocks have made for themselves."""
        (folder,) = self._scratch.iterdir()
        return folder

    @property
    def left(self) -> list[str]:
        """What the blocks have left behind."""
        return sorted(path.name for path in (*self._scratch.iterdir(), *self.root.iterdir()) if path.name != "tools")

    def run(self, blocks: Sequence[str], start: Path | None = None) -> list[Printed]:
        """Run blocks in one shell, from `start`, else from the root. Fails where one of them does."""
        script = "".join(f"{block}\necho '{_MARK}'; echo '{_MARK}' >&2\n" for block in blocks)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.root if start is None else start,
            env={**self._environment(), "OLDPWD": str(self.root)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        outs, errs = (text.split(f"{_MARK}\n") for text in (done.stdout, done.stderr))
        assert done.returncode == 0, f"{blocks[min(len(outs), len(blocks)) - 1]}\n{outs[-1]}\n{errs[-1]}"
        return [Printed(block, *map(self._shortened, texts)) for block, *texts in zip(blocks, outs, errs)]

    def _environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "error",
            "TMPDIR": str(self._scratch),
        }

    def _shortened(self, text: str) -> str:
        return re.sub(rf"{re.escape(str(self._scratch.resolve()))}/[^/\s]+", "…", text)


def missing_lines(page: Path, printed: Sequence[Printed]) -> list[str]:
    """The lines of a page's `text` blocks that nothing has printed."""
    lines = {line for block in printed for line in block.out.splitlines()}
    shown = [line for block in blocks_of(page, "text") for line in block.text.splitlines()]
    return [line for line in shown if line not in lines and line.strip()]
