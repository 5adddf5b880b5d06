"""`verify --against` and `diff` read every byte that they need once, and no other."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from damage_results import MODEL, flip, make, strategy_of
from recorded import write_tensors

from mindformers_ckpt.formats import read_header
from mindformers_ckpt.look.diff import diff
from mindformers_ckpt.look.verify import verify


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes of contents that were read, by file."""
    found: Counter[str] = Counter()
    real = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        count = real(descriptor, buffers, offset, flags)
        if not flags:  # with flags one byte is asked for, to see whether a file is in memory
            found[os.readlink(f"/proc/self/fd/{descriptor}")] += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    return found


def contents(*paths: Path) -> dict[str, int]:
    """Bytes of the tensors of files."""
    return {str(path): sum(record.spec.nbytes for record in read_header(path).tensors.values()) for path in paths}


def test_verify_against_reads_every_byte_once(tmp_path: Path, reads: Counter[str]) -> None:
    result, strategy = make(tmp_path), strategy_of(tmp_path)
    reads.clear()
    assert verify(result, strategy, against=tmp_path / "source.ckpt", contents="off").ok
    assert reads == contents(tmp_path / "source.ckpt", *result.glob("rank_*/*.ckpt"))


def test_diff_reads_every_byte_of_equal_tensors_once(tmp_path: Path, reads: Counter[str]) -> None:
    result, strategy = make(tmp_path), strategy_of(tmp_path)
    files = [tmp_path / "source.ckpt", *(result / f"rank_{rank}/checkpoint_{rank}.ckpt" for rank in range(4))]
    reads.clear()
    assert diff(tmp_path / "source.ckpt", result, None, strategy, contents="off").ok
    whole = sum(tensor.bits.nbytes for tensor in MODEL.values())
    assert reads[str(files[0])] == whole
    assert sum(reads.values()) == 2 * whole  # of replicas one is read


def test_diff_reads_a_tensor_that_differs_once_more_and_the_others_once(tmp_path: Path, reads: Counter[str]) -> None:
    ours, theirs = (write_tensors(tmp_path / name, MODEL) for name in ("a.ckpt", "b.safetensors"))
    flip(theirs, read_header(theirs).tensors["cube"].segments[0].offset)
    reads.clear()
    (found,) = diff(ours, theirs, contents="off").tensors
    assert (found.name, found.differing) == ("cube", 1)
    again = MODEL["cube"].bits.nbytes
    assert reads == {path: size + again for path, size in contents(ours, theirs).items()}
