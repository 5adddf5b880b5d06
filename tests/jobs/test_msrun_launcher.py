"""tools/msrun_launcher.sh, with a stand-in for msrun that writes down its arguments."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).resolve().parents[2] / "tools" / "msrun_launcher.sh"
SCRIPT = str(LAUNCHER.parent / "run_mindformer.py")
STAND_IN = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["ARGUMENTS"], "w") as stream:
    json.dump(sys.argv[1:], stream)
sys.exit(int(os.environ.get("MSRUN_EXIT", "0")))
"""

Run = subprocess.CompletedProcess[str]
Launch = Callable[..., tuple[Run, list[str]]]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    msrun = tmp_path / "bin" / "msrun"
    msrun.parent.mkdir()
    msrun.write_text(STAND_IN)
    msrun.chmod(0o755)

    def run(*arguments: str, **extra: str) -> tuple[Run, list[str]]:
        record = tmp_path / "arguments.json"
        record.unlink(missing_ok=True)
        path = f"{msrun.parent}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", str(LAUNCHER), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "ARGUMENTS": str(record), **extra},
            capture_output=True,
            text=True,
            check=False,
        )
        return result, json.loads(record.read_text()) if record.exists() else []

    return run


def test_one_machine_with_defaults(launch: Launch) -> None:
    result, arguments = launch("run_mindformer.py --config C --run_mode train", "4")
    assert result.returncode == 0, result.stderr
    assert arguments == [
        "--worker_num=4",
        "--local_worker_num=4",
        "--master_addr=127.0.0.1",
        "--master_port=8118",
        "--log_dir=output/msrun_log",
        "--join=False",
        "--cluster_time_out=7200",
        SCRIPT,
        "--config",
        "C",
        "--run_mode",
        "train",
    ]
    assert "output/msrun_log/worker_RANK.log" in result.stdout
    assert "in the background" in result.stdout


def test_eight_workers_without_a_number(launch: Launch) -> None:
    _, arguments = launch("run_mindformer.py")
    assert arguments[:2] == ["--worker_num=8", "--local_worker_num=8"]


def test_one_machine_that_waits(launch: Launch) -> None:
    result, arguments = launch("run_mindformer.py", "2", "9000", "logs here", "True", "60")
    assert arguments[3:7] == [
        "--master_port=9000",
        "--log_dir=logs here",
        "--join=True",
        "--cluster_time_out=60",
    ]
    assert "in the background" not in result.stdout


def test_the_guides_form_for_two_machines(launch: Launch) -> None:
    order = "run_mindformer.py \\\n  --config C \\\n  --run_mode train"
    arguments = ["16", "8", "10.0.0.1", "8118", "1", "output/msrun_log", "False", "300"]
    _, arguments = launch(order.replace("\\\n", ""), *arguments)
    assert arguments[:8] == [
        "--worker_num=16",
        "--local_worker_num=8",
        "--master_addr=10.0.0.1",
        "--master_port=8118",
        "--log_dir=output/msrun_log",
        "--join=False",
        "--cluster_time_out=300",
        "--node_rank=1",
    ]
    assert arguments[8:] == [SCRIPT, "--config", "C", "--run_mode", "train"]


def test_the_exit_code_of_msrun_is_that_of_the_launcher(launch: Launch) -> None:
    result, _ = launch("run_mindformer.py", "2", "8118", "logs", "True", "60", MSRUN_EXIT="1")
    assert result.returncode == 1


def test_quotes_in_the_order_are_kept_and_nothing_in_it_is_run(launch: Launch) -> None:
    _, arguments = launch("run_mindformer.py --config 'my file.yaml' --seed \"$(touch gone; echo 1)\" *", "2")
    assert arguments[-4:] == ["my file.yaml", "--seed", "$(touch gone; echo 1)", "*"]


def test_a_script_of_the_working_directory_goes_first(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "run_mindformer.py").touch()
    _, arguments = launch("run_mindformer.py", "2")
    assert arguments[-1] == "run_mindformer.py"


def test_the_order_may_begin_with_python(launch: Launch) -> None:
    """What docs/mindformers.md writes for MindFormers' own launcher."""
    _, arguments = launch("python -m mindformers_ckpt.run run_mindformer.py --config C", "2")
    assert arguments[-6:] == ["python", "-m", "mindformers_ckpt.run", SCRIPT, "--config", "C"]
    _, arguments = launch("python run_mindformer.py", "2")
    assert arguments[-2:] == ["python", SCRIPT]
    _, arguments = launch("python -m my.trainer --seed 1", "2")
    assert arguments[-5:] == ["python", "-m", "my.trainer", "--seed", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py", "2"], "no script 'nowhere.py'"),
        (["python -m mindformers_ckpt.run nowhere.py", "2"], "no script 'nowhere.py'"),
        (["python", "2"], "no script ''"),
        (["python9.9 run_mindformer.py", "2"], "python9.9 is not in PATH"),
        (["run_mindformer.py", "0"], "WORKER_NUM is from 1 to"),
        (["run_mindformer.py", "2", "99999", "logs", "no", "60"], "MASTER_PORT is from 1 to 65535, not 99999; JOIN is"),
        (
            ["run_mindformer.py", "8", "16", "a", "8118", "0", "logs", "True", "60"],
            "LOCAL_WORKER is from 1 to 8, not 16",
        ),
        (["run_mindformer.py", "16", "8", "a", "8118", "2", "logs", "True", "60"], "NODE_RANK is from 0 to 1, not 2"),
        (["run_mindformer.py", "16", "8", "", "8118", "0", "logs", "True", "60"], "MASTER_ADDR is empty"),
        (["", "2"], "the script to run"),
        (["run_mindformer.py --config 'C", "2"], "not a valid command line"),
        (["run_mindformer.py", "two"], "WORKER_NUM is a number"),
        (["run_mindformer.py", "2", "8118", "logs", "yes", "60"], "JOIN is True or False"),
        (["run_mindformer.py", "2", "8118"], "usage:"),
    ],
)
def test_wrong_arguments(launch: Launch, arguments: list[str], message: str) -> None:
    result, called = launch(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert called == []
