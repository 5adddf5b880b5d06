"""Signatures go with fingerprints: through a re-slicing, and no further."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from recorded import random_bits, write_tensors

import mindformers_ckpt as mc
from mindformers_ckpt.errors import ConfigError, TransferError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.publish.signature import BUNDLE_FILE, RECORD_FILE
from mindformers_ckpt.strategy.files import write_strategy

pytest.importorskip("model_signing", reason="model-signing has no release for this Python")

FLOAT32, BFLOAT16 = by_name("float32"), by_name("bfloat16")
RANDOM = np.random.default_rng(1)
MODEL = {"a.weight": random_bits(FLOAT32, (8, 6), RANDOM), "b.weight": random_bits(BFLOAT16, (4, 8), RANDOM)}


def write_key(path: Path, password: bytes | None = None) -> Path:
    """A private key, with its public key beside it (.pub)."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    lock = form.NoEncryption() if password is None else form.BestAvailableEncryption(password)
    path.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, lock))
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_key(tmp_path / "key.pem")


@pytest.fixture
def strategy(tmp_path: Path) -> Path:
    mesh = {"dp": 2, "mp": 2}
    layouts = {"a.weight": Layout.on(mesh, "mp", None), "b.weight": Layout.on(mesh, None, "mp")}
    path = tmp_path / "strategy" / "ckpt_strategy_rank_0.ckpt"
    write_strategy(layouts, path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tensors(tmp_path / "source.ckpt", MODEL)


@pytest.fixture
def signed(source: Path, strategy: Path, key: Path, tmp_path: Path) -> Path:
    report = mc.transform(source, tmp_path / "signed", dst_strategy=strategy, sign=key)
    assert report.fingerprints["."] == mc.fingerprint(source).digest
    return report.destination


def differences(result: Path, key: Path, strategy: Path | None = None) -> list[str]:
    found = mc.verify(result, strategy, public_key=key.with_suffix(".pub"))
    assert bool(found.differences) != any("signature" in line for line in found.checked)
    return [str(difference) for difference in found.differences]


def test_a_signed_result_is_verified(signed: Path, key: Path, tmp_path: Path) -> None:
    assert differences(signed, key) == []
    (error,) = differences(signed, write_key(tmp_path / "other.pem"))
    assert f"{signed / BUNDLE_FILE}: is not a signature of these tensors by this key" in error


def test_the_signature_outlives_re_slicing(signed: Path, strategy: Path, key: Path, tmp_path: Path) -> None:
    report = mc.transform(signed, tmp_path / "whole", src_strategy=strategy, fingerprints=True)
    assert report.signature == f"taken over from {signed / BUNDLE_FILE}"
    whole = report.destination
    assert (whole / BUNDLE_FILE).read_bytes() == (signed / BUNDLE_FILE).read_bytes()
    assert differences(whole, key) == []
    again = mc.transform(whole, tmp_path / "again", dst_strategy=strategy, fingerprints=True, format="safetensors")
    assert differences(again.destination, key) == []


def test_a_signature_that_is_left_behind_is_said(signed: Path, strategy: Path, key: Path, tmp_path: Path) -> None:
    """Where nobody knows whether the tensors are the same, and where some of them are left out."""
    assert mc.transform(signed, tmp_path / "plain", src_strategy=strategy).signature == (
        f"left behind: {signed / BUNDLE_FILE}: only with --fingerprint is it known whether the tensors are the same"
    )
    whole = mc.transform(signed, tmp_path / "whole", src_strategy=strategy, fingerprints=True).destination
    more = tmp_path / "whole/rank_0/checkpoint_0.ckpt"
    other = write_tensors(more, {**MODEL, "a.weight": random_bits(FLOAT32, (8, 6), RANDOM)})
    changed = mc.transform(other, tmp_path / "changed", dst_strategy=strategy, fingerprints=True)
    assert changed.signature == f"left behind: {whole / BUNDLE_FILE}: the result has other tensors"
    again = mc.transform(signed, tmp_path / "again", src_strategy=strategy, sign=key)
    assert again.signature == f"made with {key}"
    unsigned = write_tensors(tmp_path / "unsigned.ckpt", MODEL)
    assert mc.transform(unsigned, tmp_path / "result", dst_strategy=strategy).signature == ""


def test_other_tensors_are_not_what_was_signed(signed: Path, strategy: Path, key: Path, tmp_path: Path) -> None:
    """Of a part of the tensors, of changed ones, and where somebody made a new record of them."""
    other = write_tensors(tmp_path / "other.ckpt", {**MODEL, "a.weight": random_bits(FLOAT32, (8, 6), RANDOM)})
    forged = mc.transform(other, tmp_path / "forged", dst_strategy=strategy, fingerprints=True).destination
    assert not (forged / BUNDLE_FILE).exists()
    assert "is not signed" in differences(forged, key)[0]
    for name in (BUNDLE_FILE, RECORD_FILE):
        shutil.copyfile(signed / name, forged / name)
    assert "is not a signature of these tensors" in differences(forged, key)[0]
    shutil.copytree(signed, tmp_path / "broken")
    file = tmp_path / "broken/rank_1/checkpoint_1.ckpt"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = mc.verify(tmp_path / "broken", strategy, public_key=key.with_suffix(".pub"))
    assert found.differences and not any("signature" in str(difference) for difference in found.differences)
    (signed / BUNDLE_FILE).write_text("{", encoding="utf-8")
    assert "is not a signature" in differences(signed, key)[0]


def test_a_signature_of_tensors_that_were_not_looked_at_is_not_enough(signed: Path, strategy: Path, key: Path) -> None:
    strategy.unlink()
    found = mc.verify(signed, public_key=key.with_suffix(".pub"))
    assert [str(difference) for difference in found.differences] == [
        f"{signed}: what is signed could not be compared with the tensors"
    ]


def test_a_manifest_that_cannot_be_read_is_not_signed(signed: Path, key: Path) -> None:
    manifest = json.loads((signed / "manifest.json").read_text(encoding="utf-8"))
    manifest["fingerprints"]["."]["tensors"]["a.weight"] = {"crc64nvme": "no number"}
    (signed / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert differences(signed, key)


def test_what_cannot_be_signed_is_said_first(
    source: Path, strategy: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "result"
    for wrong in (source, tmp_path / "none.pem", write_key(tmp_path / "locked.pem", b"password")):
        with pytest.raises(ConfigError, match=f"{wrong}: cannot sign: .*\n? .*openssl"):
            mc.transform(source, target, dst_strategy=strategy, sign=wrong)
    with pytest.raises(ConfigError, match="whole tensors, but one rank is a unit of work"):
        mc.transform(source, target, dst_strategy=strategy, sign=key, by_rank=True)
    result = mc.transform(source, target, dst_strategy=strategy).destination
    assert "made without --fingerprint" in differences(result, key)[0]
    with pytest.raises(ConfigError, match="is not the PEM file of a public key"):
        mc.verify(
            mc.transform(source, tmp_path / "more", dst_strategy=strategy, sign=key).destination, public_key=source
        )
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    with pytest.raises(ConfigError, match=r"pip install 'mindformers_ckpt\[sign\]'"):
        mc.transform(source, tmp_path / "without", dst_strategy=strategy, sign=key)
    assert not (tmp_path / "without").exists()


def test_a_finished_result_is_signed_with_resume(source: Path, strategy: Path, key: Path, tmp_path: Path) -> None:
    mc.transform(source, tmp_path / "result", dst_strategy=strategy, fingerprints=True)
    result = mc.transform(source, tmp_path / "result", dst_strategy=strategy, sign=key, resume=True).destination
    assert differences(result, key) == []


def test_a_finished_result_that_cannot_be_signed(source: Path, strategy: Path, key: Path, tmp_path: Path) -> None:
    mc.transform(source, tmp_path / "result", dst_strategy=strategy, fingerprints=True)
    (tmp_path / "result" / RECORD_FILE).mkdir()
    with pytest.raises(TransferError, match=f"{RECORD_FILE}: cannot be written: Is a directory"):
        mc.transform(source, tmp_path / "result", dst_strategy=strategy, sign=key, resume=True)


def test_the_command_line_signs_and_verifies(signed: Path, source: Path, key: Path, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "mindformers_ckpt", *words], capture_output=True, text=True)

    public = str(key.with_suffix(".pub"))
    done = run("verify", str(signed), "--public-key", public)
    assert done.returncode == 0, done.stderr
    assert f"checked: signature: {signed / BUNDLE_FILE}" in done.stdout
    assert run("verify", str(signed), "--public-key", public, "--against", str(source)).returncode == 2
    strategy = str(tmp_path / "strategy")
    done = run(
        "transform",
        "--src-checkpoint",
        str(signed),
        "--src-strategy",
        strategy,
        "--dst-checkpoint-dir",
        str(tmp_path / "w"),
    )
    assert f"signature left behind: {signed / BUNDLE_FILE}: only with --fingerprint" in done.stdout, done.stderr
    out = tmp_path / "llama.ckpt"
    done = run(
        "convert", "--model", "llama", "--input_path", str(source), "--output_path", str(out), "--sign", str(key)
    )
    assert done.returncode == 1 and not out.exists()


def test_other_tools_can_verify(signed: Path, key: Path) -> None:
    """The record and the bundle are those of the library's own command."""
    words = ["verify", "key", str(signed / RECORD_FILE), "--signature", str(signed / BUNDLE_FILE)]
    words += ["--public_key", str(key.with_suffix(".pub"))]
    subprocess.run([sys.executable, "-m", "model_signing", *words], check=True, capture_output=True)
