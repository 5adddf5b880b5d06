"""Target files are made several at once where the disk lets a writer wait, as one over a network does."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mindformers_ckpt.disk import waiting
from mindformers_ckpt.engine.sinks import FileSink
from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.formats import TensorSpec, read_header
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.planning.model import TargetFile

SPECS = tuple(TensorSpec(f"layers.{number}.weight", by_name("float32"), (8, 16)) for number in range(200))
FILES = [TargetFile(f"rank_{rank}/a_{rank}.ckpt", rank, "ckpt", SPECS) for rank in range(4)]


@pytest.mark.parametrize("repair", [False, True])
def test_writes_do_not_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repair: bool) -> None:
    sink, write, lock = FileSink(tmp_path, FILES), os.pwrite, threading.Lock()
    if repair:
        sink.prepare_files(range(4))
        (tmp_path / FILES[2].path).write_bytes(b"")
    under_way, most, count = 0, 0, 0

    def slow(*arguments: Any) -> int:
        nonlocal under_way, most, count
        with lock:
            under_way, count = under_way + 1, count + 1
            most = max(most, under_way)
        time.sleep(0.002)
        with lock:
            under_way -= 1
        return write(*arguments)

    monkeypatch.setattr(waiting, "_waited", 0.0)
    monkeypatch.setattr(os, "pwrite", slow)
    sink.prepare_files(range(4), repair=repair)
    assert count == 4 * len(SPECS)
    assert 4 < most <= 64
    for file in FILES:
        assert [record.spec for record in read_header(tmp_path / file.path).tensors.values()] == list(SPECS)


def test_what_cannot_be_written_is_one_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "rank_1").write_bytes(b"")
    with pytest.raises(TransferError, match=r"rank_1/a_1.ckpt: cannot be written: (File exists|Not a directory)$"):
        FileSink(tmp_path, FILES).prepare_files(range(4))
