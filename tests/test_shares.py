"""Which of several ranks reads what, where all need the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ckpt.engine.into_memory import Piece, Request, requests_of
from mindformers_ckpt.engine.shares import digest_of, groups_of, shares_of

MIB = 1 << 20


@given(st.lists(st.integers(1, MIB), max_size=60), st.integers(1, 9))
def test_shares_are_runs_of_about_as_many_bytes(sizes: list[int], members: int) -> None:
    shares = shares_of(sizes, members)
    assert len(shares) == len(sizes)
    assert shares == sorted(shares)
    assert set(shares) <= set(range(members))
    largest = max(sizes, default=0)
    for member in range(members):
        own = sum(size for size, share in zip(sizes, shares) if share == member)
        assert abs(own - sum(sizes) / members) <= largest


def test_requests_of_one_size_are_shared_evenly() -> None:
    assert shares_of([MIB] * 8, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert shares_of([MIB] * 2, 4) == [1, 3]
    assert shares_of([0, 0], 3) == [0, 0]  # no division by nothing


def test_groups_are_ranks_of_several_nodes_with_one_digest() -> None:
    nodes = ("a", "a", "b", "b", "c")
    assert groups_of(["x", "y", "x", "y", "z"], nodes, 32) == [(0, 2), (1, 3)]
    assert groups_of(["x", "x", None, None, None], nodes, 32) == []  # one node: the page cache has it
    assert groups_of(["x"] * 5, nodes, 32) == [(0, 1, 2, 3, 4)]
    assert groups_of([None] * 5, nodes, 32) == []


def test_large_groups_are_divided_evenly() -> None:
    nodes = [str(rank) for rank in range(70)]
    groups = groups_of(["x"] * 70, nodes, 32)
    assert [len(ranks) for ranks in groups] == [23, 23, 24]
    assert [rank for ranks in groups for rank in ranks] == list(range(70))


def requests(start: int, length: int = 3 * MIB, name: str = "a") -> list[Request]:
    return list(requests_of([Piece(Path(name), start, start + length, np.zeros(length, np.uint8))]))


def test_a_digest_says_which_bytes_of_which_file_are_read() -> None:
    same = digest_of(requests(4096), str)
    assert digest_of(requests(4096), str) == same
    columns = [Piece(Path("a"), 4096, 4096 + 70, np.zeros((2, 10), np.uint8), (60, 1))]
    others = [requests(4097), requests(4096, 2 * MIB), requests(4096, name="b"), list(requests_of(columns))]
    assert len({same, *(digest_of(other, str) for other in others)}) == 5
    assert digest_of(requests(4096), lambda path: (str(path), 7)) != same  # another size, say


def test_what_is_sent_of_a_request_is_what_another_one_takes() -> None:
    """Runs and columns, without what lies between them in the file."""
    content = np.arange(100, dtype=np.uint8)

    def pieces(targets: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]) -> list[Piece]:
        file = Path("a")
        spans = (3, 40, ()), (40, 70, (10, 1)), (72, 99, ())
        return [Piece(file, *span[:2], array, span[2]) for span, array in zip(spans, targets)]

    read = [content[3:40].copy(), content[40:70].reshape(3, 10)[:, :4].copy(), content[72:99].copy()]
    taken = [np.zeros_like(array) for array in read]
    (sent,), (received,) = (list(requests_of(pieces(arrays))) for arrays in (read, taken))
    assert sent.size == received.size == 37 + 12 + 27
    received.take(np.frombuffer(bytes(sent.content(np.empty(100, np.uint8))), np.uint8))
    for own, other in zip(read, taken):
        assert own.tobytes() == other.tobytes()
