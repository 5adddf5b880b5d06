"""Closed, full and broken streams, short memory: one message, the right exit code, the result kept."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from recorded import assert_same, read_tensors
from toy import MODEL, command, environment, listing

from mindformers_ckpt.cli import progress

TRANSFORM = ["transform", "--src-checkpoint", "full.ckpt", "--dst-checkpoint-dir", "out"]
LOST = "The report is lost; what the command did is done"


def in_a_shell(line: str, folder: Path, arguments: Sequence[str] = TRANSFORM) -> subprocess.CompletedProcess[str]:
    """Run the command as "$@" of a line for bash."""
    words = [sys.executable, "-m", "mindformers_ckpt", *arguments]
    return subprocess.run(
        ["bash", "-c", line, "bash", *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=120
    )


def assert_result(folder: Path) -> None:
    assert_same(read_tensors(folder / "out/rank_0/checkpoint_0.ckpt"), MODEL)


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_closed_streams(closed: str, processes: str, toy: Path) -> None:
    done = in_a_shell(f'"$@" {closed}', toy, [*TRANSFORM, "--transform-process-num", processes])
    assert (done.returncode, done.stderr) == (0, "")
    assert_result(toy)


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_an_error_where_nobody_hears_it(closed: str, toy: Path) -> None:
    """Nothing but the exit code tells of it; and no file that was opened instead of stderr has the message in it."""
    before = listing(toy)
    done = in_a_shell(f'"$@" {closed}', toy, ["transform", "--src-checkpoint", "absent", "--dst-checkpoint-dir", "out"])
    assert done.returncode == 1
    assert listing(toy) == before


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_stdout(options: list[str], toy: Path) -> None:
    done = in_a_shell('"$@" > /dev/full', toy, [*TRANSFORM, *options])
    assert done.returncode == 1
    assert done.stderr == f"error: stdout cannot be written: No space left on device. {LOST}\n"
    assert_result(toy)


def test_a_closed_pipe(toy: Path) -> None:
    done = in_a_shell('"$@" | true; exit ${PIPESTATUS[0]}', toy)
    assert done.returncode == 1
    assert done.stderr == f"error: stdout cannot be written: Broken pipe. {LOST}\n"
    assert_result(toy)


@pytest.mark.parametrize("stderr", ["/dev/full", ">(true)"])
def test_notices_that_cannot_be_printed_stop_nothing(stderr: str, toy: Path) -> None:
    source = toy / "full.ckpt"
    source.rename(toy / "other.ckpt")
    done = in_a_shell(f'"$@" 2> {stderr}', toy, [*TRANSFORM, "--src-checkpoint", "other.ckpt", "--crc-check"])
    assert done.returncode == 0  # with a warning: no file has a checksum
    assert "written to" in done.stdout
    assert_result(toy)
    failed = in_a_shell(f'"$@" 2> {stderr}', toy)
    assert failed.returncode == 1


def test_a_bar_on_a_terminal_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pty.openpty()
    terminal = open(child, "w", encoding="utf-8")  # noqa: SIM115 - closing it fails
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.show_progress("transform") as update:
        assert update is not None
        os.close(parent)
        for done in range(10):
            update(done, 10)
    with contextlib.suppress(OSError):
        terminal.close()


@pytest.mark.parametrize("megabytes", range(45, 120, 10))
def test_little_memory(megabytes: int, toy: Path) -> None:
    """From where the command itself starts up to where it is enough."""
    # Coverage, when it is measured, takes memory of its own and cannot say that it lacks it.
    limit = f"unset COVERAGE_PROCESS_CONFIG; ulimit -v {megabytes * 1000}; "
    if in_a_shell(limit + '"$@"', toy, ["--version"]).returncode:
        return  # Python does not start with so little
    done = in_a_shell(limit + '"$@"', toy)
    if done.returncode == 0:
        assert_result(toy)
        return
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: the memory is not enough") == 1
    assert not (toy / "out").exists()
    assert command([*TRANSFORM, "--resume"], toy).code == 0
    assert_result(toy)
