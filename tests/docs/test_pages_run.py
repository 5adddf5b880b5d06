"""The blocks of docs/start.md, and of the pages that go on in its scratch folder, run and print what the pages show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from doc_pages import DOCS, Printed, Session, blocks_of, missing_lines
from recorded import assert_same, read_ranks, read_tensors

# In this order, in one folder.
PAGES = ("start.md", "complete_to_sharded.md", "sharded_to_sharded.md", "to_one_card.md", "no_shared_disk.md")
# `pip install .` is not for a test: the package is there.
_INSTALL = "pip install .\n"


class Ran(NamedTuple):
    folder: Path
    printed: dict[str, list[Printed]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """The scratch folder of the first page, and what every page printed; nothing is left after its last block."""
    session = Session(tmp_path_factory.mktemp("pages"))
    printed: dict[str, list[Printed]] = {}
    *blocks, clean = (block.text for block in blocks_of(DOCS / PAGES[0], "bash"))
    assert _INSTALL in blocks
    printed[PAGES[0]] = session.run([block for block in blocks if block != _INSTALL])
    for name in PAGES[1:]:
        printed[name] = session.run([block.text for block in blocks_of(DOCS / name, "bash")], session.scratch)
    yield Ran(session.scratch, printed)
    session.run([clean], session.scratch)
    assert session.left == []


@pytest.mark.parametrize("name", PAGES)
def test_what_is_printed_is_what_the_page_shows(name: str, ran: Ran) -> None:
    assert missing_lines(DOCS / name, ran.printed[name]) == []


def test_the_fingerprint_is_the_same_under_both_strategies(ran: Ran) -> None:
    printed = "".join(block.out for block in ran.printed["sharded_to_sharded.md"])
    numbers = re.findall(r"^[0-9a-f]{64}\b", printed, re.MULTILINE)
    assert len(numbers) == 2
    assert numbers[0] == numbers[1]


def test_one_card_has_the_complete_weights(ran: Ran) -> None:
    whole = read_tensors(ran.folder / "llama.safetensors")
    assert_same(read_tensors(ran.folder / "llama_complete/rank_0/checkpoint_0.ckpt"), whole)
    del whole["global_step"]
    assert_same(read_tensors(ran.folder / "llama_weights/rank_0/checkpoint_0.ckpt"), whole)


@pytest.mark.parametrize("name", ["llama_dp2mp4pp2", "llama_own"])
def test_every_node_has_its_ranks(ran: Ran, name: str) -> None:
    reference = read_ranks(ran.folder / "llama_dp2mp4pp2")
    second = read_ranks(ran.folder / "node1" / name)
    assert second.keys() == set(range(8, 16))
    for rank, tensors in second.items():
        assert_same(tensors, reference[rank])


def test_the_pictures_of_how_it_works(tmp_path: Path) -> None:
    page = DOCS / "how_it_works.md"
    session = Session(tmp_path)
    printed = session.run([block.text for block in blocks_of(page, "bash")])
    assert missing_lines(page, printed) == []
    assert session.left == []
