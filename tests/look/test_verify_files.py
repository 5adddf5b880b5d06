"""Files against what is recorded of them: in a manifest around them, or in themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from damage_results import MODEL, flip, make
from recorded import write_tensors

from mindformers_ckpt.errors import FormatError
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.formats.ckpt_crc import append_crc
from mindformers_ckpt.look.verify_files import verify_files


def test_hashes_in_a_manifest_and_trailers(tmp_path: Path) -> None:
    result = make(tmp_path, hashes=True)
    files = sorted(result.glob("rank_*/*.ckpt"))
    shutil.copy(tmp_path / "source.ckpt", tmp_path / "with_crc.ckpt")
    append_crc(tmp_path / "with_crc.ckpt")
    known = [*files, tmp_path / "with_crc.ckpt"]
    assert verify_files(known) == []
    assert verify_files([*known, tmp_path / "source.ckpt"]) == [tmp_path / "source.ckpt"]
    for path in (files[1], known[-1]):
        flip(path, read_header(path).tensors["matrix"].segments[0].offset + 9)
    with pytest.raises(FormatError) as caught:
        verify_files(known)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert f"{files[1]}: matrix (rank 1" in lines[1]
    assert f"{known[-1]}: damaged: the bytes have the CRC-32" in lines[2]


def test_a_file_that_cannot_be_read_or_is_not_that_of_the_manifest(tmp_path: Path) -> None:
    result = make(tmp_path, hashes=True)
    write_tensors(result / "rank_1/checkpoint_1.ckpt", MODEL)
    (result / "rank_2/checkpoint_2.ckpt").write_bytes(b"x")
    with pytest.raises(FormatError) as caught:
        verify_files(sorted(result.glob("rank_*/*.ckpt")))
    assert "the manifest says" in str(caught.value)
    assert "no MindSpore checkpoint" in str(caught.value)
