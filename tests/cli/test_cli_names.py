"""Paths in any bytes, names with control characters, and any locale: no traceback, nothing raw on the terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from recorded import write_tensors
from toy import DP2MP2, MODEL, Result, environment, write_toy

from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import write_strategy

GBK = os.fsdecode("模型".encode("gbk"))  # a folder as an archive from a Chinese Windows makes it
LOCALES = {
    "UTF-8": {"LC_ALL": "C.UTF-8"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
EVIL = "\x1b]0;owned\x07\x1b[2J\nerror: forged\u202e\x9b31m"
SHARDED = ("--src-checkpoint", "sharded", "--src-strategy", "dp2mp2", "--dst-strategy", "mp2pp2")
RUNS = {
    "transform": ["transform", *SHARDED, "--dst-checkpoint-dir", "out"],
    "resume": ["transform", *SHARDED, "--dst-checkpoint-dir", "out", "--resume"],
    "hash": ["transform", *SHARDED, "--dst-checkpoint-dir", "out2", "--hash", "--transform-process-num", "2", "--json"],
    "prefix": ["transform", *SHARDED, "--dst-checkpoint-dir", "out3", "--prefix", GBK, "--format", "safetensors"],
    "ranks": ["transform", *SHARDED, "--dst-checkpoint-dir", "part", "--ranks", "0"],
    "other ranks": ["transform", *SHARDED, "--dst-checkpoint-dir", "part", "--ranks", "1-3", "--json"],
    "plan": ["plan", *SHARDED, "--dst-checkpoint-dir", "planned", "--out", "plan.json", "--json"],
    "planned": ["transform", "--plan", "plan.json"],
    "merge-strategy": ["merge-strategy", "mp2pp2", "merged.ckpt"],
}


def run(arguments: list[str], folder: Path, **extra: str) -> Result:
    """Run the command line in a folder, whose name may be any bytes."""
    command = [sys.executable, "-m", "mindformers_ckpt", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(extra), capture_output=True, timeout=120)
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.parametrize("locale", LOCALES.values(), ids=LOCALES)
def test_paths_that_are_not_utf8(locale: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / GBK
    folder.mkdir()
    write_toy(folder)
    for name, arguments in RUNS.items():
        absolute = [str(folder / word) if (folder / word).exists() else word for word in arguments]
        result = run(absolute, folder, **locale)
        assert result.code == 0, (name, result)
        if arguments[-1] == "--json":
            json.loads(result.out)
    for rank in range(4):
        file = f"rank_{rank}/checkpoint_{rank}.ckpt"
        assert len({(folder / out / file).read_bytes() for out in ("out", "out2", "part", "planned")}) == 1
    assert (folder / f"out3/rank_3/{GBK}3.safetensors").is_file()


@pytest.mark.parametrize("locale", LOCALES.values(), ids=LOCALES)
def test_files_are_utf8_in_every_locale(locale: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "模型"
    folder.mkdir()
    write_toy(folder)
    transform = ["transform", "--src-checkpoint", str(folder / "full.ckpt"), "--dst-strategy", str(folder / "dp2mp2")]
    assert run([*transform, "--dst-checkpoint-dir", "out"], tmp_path, **locale).code == 0
    raw = (tmp_path / "out/manifest.json").read_bytes()
    assert json.loads(raw)
    raw.decode()
    lost = run(["plan", "--src-checkpoint", "模型/不在"], tmp_path, **locale)
    assert (lost.code, "there is no checkpoint" in lost.err) == (1, True)


def hostile(folder: Path) -> dict[str, list[str]]:
    """Commands that meet a name full of escapes: of a tensor, a parameter, a file, an option."""
    write_tensors(folder / "plain.ckpt", MODEL)
    write_tensors(folder / "evil.ckpt", {**MODEL, EVIL: MODEL["norm.bias"]})
    write_tensors(folder / "lora.ckpt", {**MODEL, f"{EVIL}.lora_a": MODEL["layers.0.weight"]})
    write_strategy(DP2MP2, folder / "strategy/ckpt_strategy_rank_0.ckpt")
    layouts = {**DP2MP2, EVIL: Layout.on({"dp": 2, "mp": 2}, "mp")}
    write_strategy(layouts, folder / "evil/ckpt_strategy_rank_0.ckpt")
    for rank in range(4):
        (folder / f"ranks/rank_{rank}").mkdir(parents=True)
        write_tensors(folder / f"ranks/rank_{rank}/a.ckpt", {EVIL: MODEL["norm.bias"]})
    strategy = str(folder / "strategy/ckpt_strategy_rank_0.ckpt")
    return {
        "error": ["plan", "--src-checkpoint", "plain.ckpt", "--dst-strategy", "evil/ckpt_strategy_rank_0.ckpt"],
        "list": ["plan", "--src-checkpoint", "evil.ckpt", "--dst-strategy", strategy],
        "json": ["plan", "--src-checkpoint", "evil.ckpt", "--dst-strategy", strategy, "--json"],
        "result": ["transform", "--src-checkpoint", "plain.ckpt", "--dst-checkpoint-dir", EVIL],
        "ranks": ["plan", "--src-checkpoint", "ranks", "--src-strategy", strategy, "--dst-strategy", strategy],
        "file": ["plan", "--src-checkpoint", f"no{EVIL}"],
        "lora": ["merge-lora", "--src-ckpt-path-or-dir", "lora.ckpt", "--lora-scaling", "1", "--dst-ckpt-dir", "o"],
        "command": [EVIL],
        "option": ["plan", f"--{EVIL}"],
        "value": ["plan", "--format", EVIL],
        "argument": ["plan", EVIL],
    }


def on_a_terminal(arguments: list[str], folder: Path) -> str:
    """What a command prints on a terminal, stdout and stderr together."""
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "mindformers_ckpt", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=environment({"NO_COLOR": "1"}), stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    output = b""
    try:
        while block := os.read(screen, 65536):
            output += block
    except OSError:  # how a pty says that the last writer is gone
        pass
    process.wait(timeout=120)
    os.close(screen)
    return output.decode().replace("\r\n", "\n")


def test_names_cannot_give_orders_to_the_terminal(tmp_path: Path) -> None:
    for what, arguments in hostile(tmp_path).items():
        printed = on_a_terminal(arguments, tmp_path)
        assert "\x1b]0;" not in printed, what
        assert not {"\x07", "\u202e", "\x9b"} & set(printed), what
        assert not [line for line in printed.splitlines() if line.startswith("error: forged")], what
        assert "Traceback" not in printed, printed
        assert "owned" in printed, (what, printed)  # else the case shows nothing


def test_json_has_the_name_exactly(tmp_path: Path) -> None:
    result = run(hostile(tmp_path)["json"], tmp_path)
    assert result.out.isascii()
    assert result.out.rstrip("\n").isprintable()
    assert EVIL in json.loads(result.out)["replicated"]
