"""What a user sees: what a start imports, the bar on a terminal, lines in a log."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy import command, environment

from mindformers_ckpt.cli import progress

HEAVY = {"numpy", "mindspore", "rich", "psutil", "yaml", "ml_dtypes", "xxhash", "safetensors"}
# Of an object storage: whoever has none starts without.
HEAVY |= {"mindformers_ckpt.objects.client", "mindformers_ckpt.uploads.run", "botocore", "http"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["transform", "--help"], ["convert", "--help"]])
def test_help_loads_no_heavy_module(arguments: list[str]) -> None:
    program = "import sys; from mindformers_ckpt.cli.main import cli; cli.main(sys.argv[1:], standalone_mode=False); "
    program += "print('modules', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment(), capture_output=True, text=True, check=True
    )
    modules = set(done.stdout.splitlines()[-1].split()[1:])
    assert not modules & HEAVY
    if arguments[0].startswith("-"):  # of no command: it is there at once
        assert len([name for name in modules if name.startswith("mindformers_ckpt")]) <= 12


def test_options_of_help_are_written_one_way(tmp_path: Path) -> None:
    text = command(["transform", "-h"], tmp_path).out
    assert "--src-checkpoint" in text
    assert "--src_checkpoint" not in text


def test_the_bar_on_a_terminal(toy: Path) -> None:
    """The bar ends full, and the summary stands on a line of its own below it."""
    text = _on_a_terminal(["transform", "--src-checkpoint", "full.ckpt", "--dst-strategy", "mp2pp2",
                           "--dst-checkpoint-dir", "out"], toy)  # fmt: skip
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    frames = [line for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert re.fullmatch(r"transform ━+ 544/544 bytes.*", frames[-3]), frames
    assert "0/100 bytes" not in plain  # no made-up total before the first bytes
    assert frames[-2].startswith("4 files, 544 B written to "), frames
    assert frames[-1].startswith("next, in the yaml "), frames


def test_colours_on_a_terminal_only(toy: Path) -> None:
    arguments = ["transform", "--src-checkpoint", "absent", "--dst-checkpoint-dir", "out"]
    assert "\x1b[" in _on_a_terminal(arguments, toy)
    assert "\x1b[" not in command(arguments, toy).err


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every five seconds: what is done, the rate, the time left."""
    clock = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr("mindformers_ckpt.progress.time.monotonic", lambda: next(clock))
    with progress.show_progress("transform") as update:
        assert update is not None
        for done in (1, 6, 7, 12):
            update(done * 10**9, 24 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "transform: 6.00 of 24.00 GB, 1.00 GB/s, 18 s left",
        "transform: 12.00 of 24.00 GB, 1.00 GB/s, 12 s left",
    ]


def _on_a_terminal(arguments: list[str], folder: Path) -> str:
    """Run the command with a terminal for all of its streams, and return what it shows."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mindformers_ckpt", *arguments],
        cwd=folder,
        env=environment({"TERM": "xterm", "COLUMNS": "200"}),
        stdin=child,
        stdout=child,
        stderr=child,
    )
    os.close(child)
    text = b"".join(_read(parent)).decode()
    process.wait(timeout=60)
    os.close(parent)
    return text


def _read(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # how Linux tells that the other side is closed
            return
        yield data
