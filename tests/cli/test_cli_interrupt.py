"""Ctrl-C, SIGTERM and kill -9: one line, an exit code of its own, the old result intact, the rest done later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from recorded import Tensor, assert_same, read_tensors, write_tensors
from toy import command, environment, listing

from mindformers_ckpt.formats.dtypes import by_name

# Tasks are 8 MB at least: these tensors are six tasks.
MEGABYTE = 1 << 20
LARGE = {f"w{number}": Tensor(by_name("float32"), np.full((2 * MEGABYTE,), number, np.uint32)) for number in range(6)}
ARGUMENTS = ["transform", "--src-checkpoint", "large.ckpt", "--dst-checkpoint-dir", "out"]
# The command itself, made slow: it says when its first task begins, and takes a second for each.
SLOW = """
import os, time
from mindformers_ckpt.engine import copier
from mindformers_ckpt.cli.main import main

run = copier.Copier.run

def slow(self, task, *rest):
    os.write(1, b"begins\\n")  # at once, there are several threads
    time.sleep(1)
    return run(self, task, *rest)

copier.Copier.run = slow
main()
"""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "large.ckpt", LARGE)
    return tmp_path


@pytest.mark.parametrize(
    ("number", "processes"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 2), (signal.SIGHUP, 1)]
)
def test_interrupt_and_resume(large: Path, number: signal.Signals, processes: int) -> None:
    # One process has two threads: when both have begun their second task, the first ones are done.
    code, errors = _stop(large, number, processes, tasks=4 if processes == 1 else 1)
    assert code == 128 + number, errors
    assert errors[-1] == "error: interrupted; out is as it was. The same command with --resume goes on from here"
    assert len(errors) == 1
    assert not (large / "out").exists()
    resumed = command([*ARGUMENTS, "--resume", "--json"], large)
    assert resumed.code == 0, resumed
    already = json.loads(resumed.out)["resumed_bytes"]
    assert already < 6 * 8 * MEGABYTE
    assert already > 0 or processes == 2
    assert_same(read_tensors(large / "out/rank_0/checkpoint_0.ckpt"), LARGE)
    assert not [path for path in listing(large) if "staging" in path]


def test_a_second_interrupt_ends_at_once(large: Path) -> None:
    """While the first one waits for the workers' blocks."""
    process = _start(large, 2)
    _wait_for_tasks(process, 1)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "error: interrupted" in errors


# The command itself, interrupted while it imports a module.
IMPORTING = """
import os, signal, sys
sys.argv = ["mindformers-ckpt", *sys.argv[2:]]
name = {module!r}

class Interrupting:
    def find_spec(self, wanted, path=None, target=None):
        if wanted == name:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from mindformers_ckpt.cli.main import main
main()
"""


@pytest.mark.parametrize(
    ("module", "arguments", "code", "said"),
    [
        ("click", ARGUMENTS, -signal.SIGINT, ""),
        ("mindformers_ckpt.engine.copier", ARGUMENTS, 130, "error: interrupted"),
        ("numpy", ["diff", "large.ckpt", "large.ckpt"], 130, "error: interrupted"),
    ],
)
def test_an_interrupt_while_it_starts_is_no_traceback(
    large: Path, module: str, arguments: list[str], code: int, said: str
) -> None:
    """Numpy makes an ImportError of an interrupt that reaches it."""
    words = [sys.executable, "-c", IMPORTING.format(module=module), "", *arguments]
    done = subprocess.run(words, cwd=large, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)  # one line, which may say more: these are imported late
    assert command([*ARGUMENTS, "--resume"], large).code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_options_are_read(number: signal.Signals) -> None:
    """click's own answer is "Aborted!" and exit code 1, for any of them."""
    script = f"""
import os, click
from mindformers_ckpt.cli.main import main
click.Command.parse_args = lambda *arguments: os.kill(os.getpid(), {int(number)})
main(["plan", "--src-checkpoint", "x"])
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "error: interrupted\n")


def test_an_old_result_survives_and_the_next_run_clears_up(large: Path) -> None:
    assert command([*ARGUMENTS, "--prefix", "old_"], large).code == 0
    code, _ = _stop(large, signal.SIGKILL, 1, "--overwrite", tasks=2)
    assert code == -signal.SIGKILL
    assert sorted(listing(large / "out")) == ["manifest.json", "rank_0", "rank_0/old_0.ckpt"]
    assert [path for path in listing(large) if "staging" in path]
    again = command([*ARGUMENTS, "--overwrite"], large)
    assert again.code == 0, again
    assert sorted(listing(large / "out")) == ["manifest.json", "rank_0", "rank_0/checkpoint_0.ckpt"]
    assert not [path for path in listing(large) if "staging" in path]


def test_a_second_run_for_the_same_folder_is_refused(large: Path) -> None:
    process = _start(large, 1)
    _wait_for_tasks(process, 1)
    process.send_signal(signal.SIGSTOP)  # however slow the machine is
    for options in ([], ["--prefix", "other_"]):
        second = command([*ARGUMENTS, *options], large)
        assert second.code == 1, second
        assert "another process is" in second.err
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 0
    process.communicate()
    assert_same(read_tensors(large / "out/rank_0/checkpoint_0.ckpt"), LARGE)


def _start(folder: Path, processes: int, *options: str) -> subprocess.Popen[str]:
    """Start the slow command in a process group of its own, as a shell does for Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *ARGUMENTS, "--transform-process-num", str(processes), *options],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for_tasks(process: subprocess.Popen[str], count: int) -> None:
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline() == "begins\n"


def _stop(folder: Path, number: signal.Signals, processes: int, *options: str, tasks: int) -> tuple[int, list[str]]:
    """Stop the command in its last of `tasks` tasks; the exit code and the lines on stderr."""
    process = _start(folder, processes, *options)
    _wait_for_tasks(process, tasks)
    time.sleep(0.7)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors.splitlines()
