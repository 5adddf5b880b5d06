"""The blocks of docs/offline.md run as they stand, in order, and give what the page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from doc_pages import DOCS, Printed, Session, blocks_of
from recorded import assert_same, read_ranks, read_tensors

PAGE = DOCS / "offline.md"


class Ran(NamedTuple):
    folder: Path
    printed: list[Printed]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """The scratch folder of the page with all that its blocks made; nothing is left after the last of them."""
    session = Session(tmp_path_factory.mktemp("offline"))
    *blocks, clean = (block.text for block in blocks_of(PAGE, "bash"))
    assert len(blocks) > 8
    printed = session.run(blocks)
    yield Ran(session.scratch, printed)
    session.run([clean], session.scratch)
    assert session.left == []


def test_all_ways_lead_back_to_the_complete_weights(ran: Ran) -> None:
    whole = read_tensors(ran.folder / "llama.safetensors")
    for name in ("llama_complete", "llama_again"):
        assert_same(read_tensors(ran.folder / name / "rank_0/checkpoint_0.ckpt"), whole)


def test_runs_for_the_same_target_agree(ran: Ran) -> None:
    reference = read_ranks(ran.folder / "llama_8to16")
    assert reference.keys() == set(range(16))
    for name in ("llama_1to16", "llama_planned"):
        found = read_ranks(ran.folder / name)
        assert found.keys() == reference.keys()
        for rank, tensors in reference.items():
            assert_same(found[rank], tensors)
    one, by_hand = read_ranks(ran.folder / "llama_1to8"), read_ranks(ran.folder / "llama_by_hand")
    assert one.keys() == by_hand.keys() == set(range(8))
    for rank, tensors in one.items():
        assert_same(by_hand[rank], tensors)


def test_the_plan_is_printed_as_the_page_shows(ran: Ran) -> None:
    (shown,) = blocks_of(PAGE, "text")
    printed = "".join(block.out for block in ran.printed)
    assert shown.text in re.sub(r"[\d.,]+ GB are free", "69.09 GB are free", printed)
