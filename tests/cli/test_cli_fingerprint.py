"""`mindformers-ckpt fingerprint`, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

from toy import MODEL, command, invoke, write_toy

from mindformers_ckpt.checksums.crc64 import crc64
from mindformers_ckpt.checksums.digest import TensorChecksum, digest_of


def test_it_is_one_for_whole_and_sharded_checkpoints(tmp_path: Path) -> None:
    write_toy(tmp_path)
    checksums = [
        TensorChecksum(name, dtype.name, bits.shape, crc64(bits.tobytes())) for name, (dtype, bits) in MODEL.items()
    ]
    digest = digest_of(checksums)
    whole = command(["fingerprint", "full.ckpt", "--quiet"], tmp_path)
    assert (whole.code, whole.out.split()[0], whole.err) == (0, digest, "")
    sharded = invoke(["fingerprint", "sharded", "--strategy", "dp2mp2", "--json"], tmp_path)
    report = json.loads(sharded.out)
    assert report["digest"] == digest
    assert report["tensors"]["norm.bias"] == {
        "dtype": "float32",
        "shape": [6],
        "crc64nvme": f"{crc64(MODEL['norm.bias'].bits.tobytes()):016x}",
    }
    lines = invoke(["fingerprint", "full.safetensors", "--tensors"], tmp_path).out.splitlines()
    assert [line.split()[-1] for line in lines[:-1]] == sorted(MODEL)
    without = invoke(["fingerprint", "sharded"], tmp_path)
    assert without.code == 1
    assert "no source strategy is given" in without.err
