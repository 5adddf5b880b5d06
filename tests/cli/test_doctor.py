"""`mindformers-ckpt doctor`: what it finds, that it finds traps, and that it leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

import pytest
from toy import command, listing, write_toy

from mindformers_ckpt.cli.doctor import _meeting
from mindformers_ckpt.disk import files
from mindformers_ckpt.disk.locks import Owner
from mindformers_ckpt.look import doctor
from mindformers_ckpt.look.doctor import Finding
from mindformers_ckpt.publish import replace


def texts(findings: list[Finding]) -> dict[str, str]:
    return {finding.about: f"{finding.mark} {finding.text}".strip() for finding in findings}


def test_it_says_what_is_there_and_leaves_nothing(tmp_path: Path) -> None:
    write_toy(tmp_path)
    before = listing(tmp_path)
    done = command(["doctor", "full.ckpt", "--json"], tmp_path)
    assert done.code == 0, done
    said = {title: texts([Finding(**one) for one in found]) for title, found in json.loads(done.out).items()}
    assert set(said) == {"versions", "machine", "storage", "checkpoint"}
    assert said["machine"]["cores"] == str(len(os.sched_getaffinity(0)))
    assert said["storage"]["exchange"] == "names change in one step"
    assert said["storage"]["locks"] == "flock, and it excludes"
    assert said["storage"]["stray files"] == "none"
    assert said["checkpoint"] == {
        "checkpoint": "1 file, 0.00 GB",
        "T_io": "it is too small to tell how fast the storage is",
    }
    assert listing(tmp_path) == before
    text = command(["doctor"], tmp_path).out
    assert text.splitlines()[0] == "versions"
    assert text.splitlines()[-1].endswith(("warning", "warnings"))


def test_how_long_a_run_would_take(tmp_path: Path) -> None:
    path = tmp_path / "large.ckpt"
    path.write_bytes(os.urandom(1 << 20) * 20)
    found = texts(list(doctor.checkpoint([path], tmp_path)))
    assert found["reading"].endswith("lets us choose)")
    rates = [float(found[key].split()[0]) for key in ("reading", "writing")]
    expected = sum(path.stat().st_size / 1e9 / max(rate, 0.005) for rate in rates)
    assert float(found["T_io"].split()[0]) <= 2 * expected + 0.2
    assert listing(tmp_path) == ["large.ckpt"]


@pytest.mark.parametrize(
    ("package", "version", "is_trap"),
    [
        ("safetensors", "0.8.0rc1", True),
        ("safetensors", "0.7.9", False),
        ("numpy", "2.1.0", True),
        ("numpy", "1.26.4", False),
        ("protobuf", "4.24.4", True),
    ],
)
def test_versions_that_go_wrong(package: str, version: str, is_trap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"mindspore": "2.10.0", "safetensors": "0.7.0", "numpy": "1.26.4", "protobuf": "6.0", package: version}
    monkeypatch.setattr(doctor, "_version", installed.get)
    marked = [finding.about for finding in doctor.traps() if finding.mark]
    assert marked == [package] * is_trap


def test_a_file_system_that_can_do_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "exchange", lambda first, second: False)
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "link", refuse)
    found = texts(list(doctor.file_system(tmp_path)))
    assert found["exchange"] == "none: a result is put in place by three renames"
    assert found["locks"] == "none (No locks available): a file that names its owner stands for one"
    assert found["hard links"] == "none: files are copied in their place"


def test_what_our_runs_leave_is_found(tmp_path: Path) -> None:
    """By the very names that publishing gives."""
    destination = tmp_path / "result"
    destination.mkdir()
    gate, old = replace.gate_of(destination).path, replace._old_name(destination)
    names = [f"{replace.staging_prefix(destination)}0123456789abcdef", gate.name, old.name, ".plan.json.part-0123abcd"]
    for name in (names[0], names[3], ".hidden", ".foreign.lock", "ordinary.lock"):
        (tmp_path / name).touch()
    gate.write_text(str(Owner.myself()._replace(started="long ago")))
    old.mkdir()
    (old / "manifest.json").write_text(json.dumps({"mindformers_ckpt": "0.1.0"}))
    (found,) = doctor.stray(destination)
    assert found.mark == "warning"
    for name in names:
        assert str(tmp_path / name) in found.text
    for name in ("hidden", "foreign", "ordinary"):
        assert name not in found.text
    gate.write_text(str(Owner.myself()))
    dead, alive = doctor.stray(destination)
    assert str(gate) not in dead.text
    assert f"{gate} (a lock, of {Owner.myself().described})" in alive.text
    assert alive.mark != "warning"


def test_the_meeting_of_a_job() -> None:
    assert "not in a job of ranks" in texts(list(_meeting({})))["meeting"]
    assert texts(list(_meeting({"MS_SCHED_HOST": "0.0.0.0", "MS_SCHED_PORT": "1"})))["meeting"].startswith("warning")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        host, port = taken.getsockname()
        busy = texts(list(_meeting({"MINDFORMERS_CKPT_MASTER": f"{host}:{port}"})))["meeting"]
        assert busy == f"warning {host}:{port} answers: a job, or another program, is there"
    free = texts(list(_meeting({"MINDFORMERS_CKPT_MASTER": f"{host}:{port}"})))["meeting"]
    assert free == f"{host}:{port} is free on this machine"


def test_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    done = command(["doctor", "results/of/tomorrow"], tmp_path)
    assert done.code == 0, done
    assert f"at {tmp_path}\n" in done.out
