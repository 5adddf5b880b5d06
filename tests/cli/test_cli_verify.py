"""`mindformers-ckpt verify`, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

from toy import command, invoke

from mindformers_ckpt.formats import read_header

TRANSFORM = ["transform", "--src-checkpoint", "full.ckpt", "--dst-strategy", "mp2pp2", "--dst-checkpoint-dir", "out"]
AGAINST = ["verify", "out", "--strategy", "mp2pp2", "--against", "full.safetensors"]


def _damage(toy: Path) -> int:
    """Change the last byte of a tensor of rank 1; where it is in the file."""
    file = toy / "out/rank_1/checkpoint_1.ckpt"
    segment = read_header(file).tensors["layers.0.weight"].segments[0]
    place = segment.offset + segment.length - 1
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    return place


def test_a_result_by_its_manifest(toy: Path) -> None:
    made = invoke([*TRANSFORM, "--fingerprint", "--hash", "--crc-check", "--quiet"], toy)
    assert made.code == 0, made
    whole = invoke(["verify", "out"], toy)
    assert whole.code == 0, whole
    assert whole.out.splitlines() == [
        "checked: 4 files: there, in their sizes, and readable; no others",
        "checked: 4 ranks: complete",
        "checked: 4 of 4 files: the CRC-32 that they store",
        "checked: 12 of 12 tensors in files: xxh3-128 of their bytes",
        "checked: 5 of 5 tensors: fingerprint of the whole, and replicas",
        "out: nothing differs",
    ]
    place = _damage(toy)
    found = invoke(["verify", "out"], toy)
    assert found.code == 1, found
    assert "CRC-32" in found.err
    assert "layers.0.weight (rank 1, from byte" in found.err
    assert "CRC-64" in found.err
    assert "3 differences" in found.err
    report = json.loads(invoke([*AGAINST, "--json"], toy).out)
    (difference,) = report["differences"]
    assert difference == {
        "what": "1 of 96 bytes differ from the source",
        "file": str(toy / "out/rank_1/checkpoint_1.ckpt"),
        "tensor": "layers.0.weight",
        "rank": 1,
        "box": [[4, 0], [8, 6]],
        "offset": place,
    }


def test_a_result_against_its_source(toy: Path) -> None:
    assert invoke([*TRANSFORM, "--quiet"], toy).code == 0
    whole = invoke(AGAINST, toy)
    assert (whole.code, whole.out.splitlines()[-1]) == (0, "out: nothing differs")
    assert invoke([*AGAINST, "--sample", "5%"], toy).code == 0
    not_read = invoke(["verify", "out"], toy)
    assert not_read.code == 0
    assert "not checked: the contents" in not_read.out
    _damage(toy)
    assert invoke(["verify", "out"], toy).code == 0
    found = command([*AGAINST, "--quiet"], toy)
    assert (found.code, found.out) == (1, "")
    assert found.err.splitlines()[-1] == "error: out: 1 difference"


def test_a_strategy_for_other_ranks_is_told_from_damage(toy: Path) -> None:
    assert invoke(["transform", *TRANSFORM[1:3], "--dst-checkpoint-dir", "out", "--quiet"], toy).code == 0
    for against in ([], ["--against", "full.safetensors"]):
        found = invoke(["verify", "out", "--strategy", "mp2pp2", *against], toy)
        assert found.code == 1, found
        assert (
            "by its manifest the result was made for complete weights, but the strategy given is 4 ranks" in found.err
        )
    (toy / "mp2pp2").rename(toy / "moved")
    assert invoke([*TRANSFORM[:3], "--dst-strategy", "moved", "--dst-checkpoint-dir", "cut", "--quiet"], toy).code == 0
    (toy / "moved").rename(toy / "mp2pp2")
    (toy / "cut/rank_1/checkpoint_1.ckpt").unlink()
    assert "by its manifest" not in invoke(["verify", "cut", "--strategy", "mp2pp2"], toy).err


def test_options_of_no_sense_are_usage_errors(toy: Path) -> None:
    for words in (["--sample", "0"], ["--sample", "many"], ["--sample", "101%"], ["--src-strategy", "dp2mp2"]):
        found = invoke(["verify", "out", *words], toy)
        assert found.code == 2, found
