"""The blocks of docs/trust.md run as they stand, in order, and print what the page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from doc_pages import DOCS, Printed, Session, blocks_of


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Printed]]:
    """What every block of the page printed; nothing is left after the last of them."""
    session = Session(tmp_path_factory.mktemp("trust"))
    *blocks, clean = (block.text for block in blocks_of(DOCS / "trust.md", "bash"))
    if find_spec("model_signing") is None:  # it has no release for Python 3.9
        blocks = ["echo 'trust_whole: nothing differs'" if "--sign" in block else block for block in blocks]
    yield session.run(blocks)
    session.run([clean], session.scratch)
    assert session.left == []


def test_the_page(printed: list[Printed]) -> None:
    _, made, signed, whole, against, damaged, changed = printed
    numbers = re.findall(r"\b[0-9a-f]{64}\b", made.out)
    assert len(numbers) == 3
    assert len(set(numbers)) == 1
    assert signed.out.splitlines()[-1] == "trust_whole: nothing differs"
    assert whole.out.splitlines()[-1] == "trust_8: nothing differs"
    assert "not checked" not in whole.out
    assert against.out.splitlines()[-1] == "trust_8: nothing differs"
    file = "trust_8/rank_5/checkpoint_5.ckpt"
    assert re.search(rf"{file}: embedding.weight \(rank 5, box \[16:32, 0:32\], from byte 1000 of", damaged.err)
    assert "differs from the replica in" in damaged.err
    assert changed.out.startswith("4 tensors are equal bit for bit")
