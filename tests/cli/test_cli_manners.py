"""What all commands have alike: help, suggestions, errors for programs, dry runs, names of options, completion."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from safetensors.numpy import save_file
from toy import Result, command, environment, listing, write_llama, write_toy

from mindformers_ckpt.cli.main import _COMMANDS, cli

COMMANDS = tuple(_COMMANDS)


def of(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli, **cli.context_settings), name)
    assert found is not None
    return found


def names(name: str) -> set[str]:
    return {option for parameter in of(name).params for option in parameter.opts}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    write_toy(tmp_path)
    return tmp_path


@pytest.fixture
def inside(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command in the folder of the toy, in this process: many of them take a while to start."""
    monkeypatch.chdir(toy)

    def run(arguments: list[str]) -> Result:
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments, prog_name="mindformers-ckpt")
        said = capsys.readouterr()
        return Result(int(stop.value.code or 0), said.out, said.err)

    return run


# ------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transform"], "Missing options '--src-checkpoint' and '--dst-checkpoint-dir'."),
        (["transform", "--src-checkpoint", "full.ckpt"], "Missing option '--dst-checkpoint-dir'."),  # before it plans
        (["convert"], "Missing options '--input-path' and '--output-path'."),
        (["convert", "--output-path", "x"], "Missing option '--input-path' / '--src-checkpoint'."),
        (["merge-lora", "--rank", "8"], "Missing options '--src-ckpt-path-or-dir' and '--dst-ckpt-dir'."),
        (["diff"], "Missing arguments 'A' and 'B'."),
        (["merge-strategy", "--quiet"], "Missing arguments 'FOLDER' and 'FILE'."),
        (["diff", "full.ckpt"], "Missing argument 'B'."),
        (["show"], "Give the NAME of a tensor (mindformers-ckpt inspect lists them), or --html FILE."),
    ],
)
def test_wrong_calls_are_errors_in_the_style_of_all_others(
    arguments: list[str], message: str, inside: Callable[..., Result]
) -> None:
    said = inside(arguments)
    assert said.code == 2
    assert said.err.startswith(f"Usage: mindformers-ckpt {arguments[0]} ")
    assert said.err.endswith(f"Try 'mindformers-ckpt {arguments[0]} --help' for help.\n\nerror: {message}\n")


def test_no_command_at_all_is_answered_with_help(inside: Callable[..., Result]) -> None:
    """Not as a line with escapes for its newlines: click calls it an error."""
    said = inside([])
    text = said.out + said.err
    assert "\n  transform  " in text
    assert "\\n" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_a_page_and_exit_codes(name: str) -> None:
    text = of(name).get_help(click.Context(of(name), info_name=name, parent=click.Context(cli, **cli.context_settings)))
    assert f"  mindformers-ckpt {name} " in text or f"  mindformers-ckpt {name}\n" in text
    page = re.search(r"More: (docs/[\w.]+)", text)
    assert page is not None
    assert "Exit codes: 0 done, 1 wrong input or failed" in text
    assert {"--json", "--quiet", "--verbose"} <= names(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_parse(name: str) -> None:
    epilog = of(name).epilog or ""
    examples = re.findall(rf"mindformers-ckpt {name} ?(.*)", epilog)
    assert examples
    for example in examples:
        context = of(name).make_context(
            name, example.split(), token_normalize_func=cli.context_settings["token_normalize_func"]
        )
        assert context.params


def test_the_usage_line_names_what_is_required() -> None:
    for name, needed in {
        "transform": "--src-checkpoint PATH --dst-checkpoint-dir PATH",
        "convert": "--input-path PATH --output-path PATH",
        "merge-lora": "--src-ckpt-path-or-dir PATH --dst-ckpt-dir PATH",
    }.items():
        usage = " ".join(
            of(name)
            .get_usage(click.Context(of(name), info_name=name, parent=click.Context(cli, **cli.context_settings)))
            .split()
        )
        assert f"{name} {needed} [OPTIONS]" in usage


# ------------------------------------------------------------------------------------------- names


def test_the_same_thing_has_the_same_names() -> None:
    alike = (
        {"--transform-process-num", "--process-num"},
        {"--format", "--save-format"},
        {"--dst-strategy", "--dst-ckpt-strategy"},
    )
    for command_name in ("transform", "convert", "merge-lora"):
        for group in alike:
            assert group <= names(command_name), (command_name, group)
        assert {"--src-checkpoint", "--dst-checkpoint-dir", "--dst-checkpoint", "--dry-run"} <= names(command_name)
    for command_name in ("transform", "plan", "merge-lora"):
        assert {"--src-strategy", "--src-ckpt-strategy", "--src-ckpt-path-or-dir"} <= names(command_name)


@pytest.mark.parametrize(
    ("given", "reverse"),
    [([], False), (["--reversed"], True), (["--reversed", "True"], True), (["--reversed", "False"], False)],
)
def test_reversed_as_the_guide_writes_it(given: list[str], reverse: bool) -> None:
    context = of("convert").make_context("convert", ["--input-path", "a", *given, "--output-path", "b"])
    assert context.params["reverse"] is reverse


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["transfrom"], "No such command 'transfrom'. Did you mean 'transform'?"),
        (["merge_lora_", "x"], "Did you mean 'merge-lora'"),
        (["transform", "--src-checkpont", "x"], "--src-checkpoint"),
        (["convert", "--input-path", "hf", "--output-path", "x", "--dtpye", "fp32"], "Did you mean '--dtype'"),
        (["convert", "--input-path", "hf", "--output-path", "x", "--dtype", "fp23"], "Did you mean 'fp32'?"),
        (["plan", "--src-checkpoint", "full.ckpt", "--format", "safetensor"], "Did you mean 'safetensors'?"),
        (["convert", "--model", "lama", "--input-path", "hf", "--output-path", "x"], "Did you mean 'llama'?"),
    ],
)
def test_misspelt_words_are_known(
    toy: Path, inside: Callable[..., Result], arguments: list[str], suggestion: str
) -> None:
    (toy / "hf").mkdir()
    save_file({"model.norm.weight": np.zeros(8, np.float16)}, toy / "hf/model.safetensors")
    done = inside(arguments)
    assert done.code in (1, 2)
    assert suggestion in done.err


# ------------------------------------------------------------------------------------------- for programs

# The one shape of an error on stdout, as docs/offline.md has it.
SCHEMA: dict[str, Any] = {"error": {"kind": str, "message": str, "exit_code": int}}


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (["transform", "--json"], "UsageError", 2),
        (["nothing", "--json"], "UsageError", 2),
        (["plan", "--src-checkpoint", "full.ckpt", "--ranks", "x", "--json"], "BadParameter", 2),
        (["plan", "--src-checkpoint", "nowhere.ckpt", "--json"], "PlanError", 1),
        (["plan", "--src-checkpoint", "full.ckpt", "--dst-strategy", "nowhere", "--json"], "StrategyError", 1),
        (["inspect", "broken.ckpt", "--json"], "FormatError", 1),
        (["merge-strategy", "dp2mp2", "full.ckpt", "--json"], "StrategyError", 1),
        (["convert", "--input-path", "x", "--output-path", "y", "--json"], "PlanError", 1),
        (["show", "x", "--src-checkpoint", "full.ckpt", "--json"], "PlanError", 1),
    ],
)
def test_an_error_has_one_shape(
    toy: Path, inside: Callable[..., Result], arguments: list[str], kind: str, code: int
) -> None:
    (toy / "broken.ckpt").write_bytes((toy / "full.ckpt").read_bytes()[:-3])
    done = inside(arguments)
    assert done.code == code, done
    (line,) = done.out.splitlines()
    content = json.loads(line)
    assert content.keys() == SCHEMA.keys()
    assert {key: type(value) for key, value in content["error"].items()} == SCHEMA["error"]
    assert (content["error"]["kind"], content["error"]["exit_code"]) == (kind, code)
    assert content["error"]["message"].splitlines()[0][:20] in done.err.replace("\n", " ")
    assert inside([word for word in arguments if word != "--json"]).out == ""


def test_reports_are_one_line_of_json(toy: Path) -> None:
    for arguments in (
        ["merge-strategy", "mp2pp2", "merged.ckpt"],
        ["plan", "--src-checkpoint", "full.ckpt"],
        ["transform", "--src-checkpoint", "full.ckpt", "--dst-checkpoint-dir", "out"],
        ["inspect", "out"],
        ["doctor"],
    ):
        done = command([*arguments, "--json"], toy)
        assert done.code == 0, done
        (line,) = done.out.splitlines()
        assert isinstance(json.loads(line), dict)


def test_quiet_and_verbose(toy: Path) -> None:
    wrong = ["inspect", "nowhere"]
    plain, verbose = command(wrong, toy), command([*wrong, "-v"], toy)
    assert "Traceback" not in plain.err
    assert "Traceback" in verbose.err
    assert verbose.err.splitlines()[-1] == plain.err.splitlines()[-1]
    (toy / "sharded/stray.ckpt").write_bytes(b"")
    noisy = ["plan", "--src-checkpoint", "sharded", "--src-strategy", "dp2mp2"]
    assert "warning: " in command(noisy, toy).err
    assert command([*noisy, "--quiet"], toy).err == ""


def test_no_color(toy: Path) -> None:
    def said(**extra: str) -> bytes:
        terminal, theirs = pty.openpty()
        line = [sys.executable, "-m", "mindformers_ckpt", "inspect", "nowhere"]
        env = environment({"TERM": "xterm", **extra})
        done = subprocess.Popen(line, cwd=toy, stderr=theirs, stdout=theirs, env=env)
        os.close(theirs)
        text = b""
        try:
            while chunk := os.read(terminal, 4096):
                text += chunk
        except OSError:
            pass
        done.wait(60)
        os.close(terminal)
        return text

    assert b"\x1b[" in said()
    assert b"\x1b[" not in said(NO_COLOR="1")


# ------------------------------------------------------------------------------------------- before and after


def test_a_dry_run_writes_nothing_and_tells_what_a_run_would_refuse(toy: Path) -> None:
    arguments = [
        "transform",
        "--src-checkpoint",
        "full.ckpt",
        "--dst-checkpoint-dir",
        "out",
        "--dst-strategy",
        "dp2mp2",
    ]
    before = listing(toy)
    done = command([*arguments, "--dry-run"], toy)
    assert done.code == 0, done
    assert "would write 4 files" in done.out
    assert listing(toy) == before
    assert command(arguments, toy).code == 0
    content = json.loads(command([*arguments, "--dry-run", "--json"], toy).out)
    assert content["refusals"] == ["out is not empty; choose another folder, or --overwrite replaces it"]
    assert content["disk_needed"] == sum(path.stat().st_size for path in (toy / "out").rglob("*.ckpt"))
    assert command([*arguments, "--dry-run"], toy).code == 1
    assert command(arguments, toy).code == 1
    again = command([*arguments, "--overwrite", "--dry-run"], toy)
    assert (again.code, "refused" in again.out) == (0, False)
    added = command([*arguments, "--ranks", "0", "--overwrite", "--dry-run"], toy)
    assert (added.code, "refused" in added.out) == (0, False)
    plan = command(["plan", *arguments[1:]], toy)
    assert "refused:" in plan.out
    (toy / "other").mkdir()
    (toy / "other/file").touch()
    for more, code in ((["--overwrite"], 1), (["--overwrite-anything"], 0)):
        done = command([*arguments[:4], "other", "--dry-run", *more], toy)
        assert ("--overwrite-anything replaces it" in done.out, done.code) == (bool(code), code)


def test_dry_runs_of_conversion_and_merge(toy: Path) -> None:
    write_llama(toy / "model")
    before = listing(toy)
    asked = ["convert", "--input-path", "model", "--output-path", "out.ckpt"]
    done = command([*asked, "--dry-run"], toy)
    assert done.code == 0, done
    assert "would write 1 file," in done.out
    assert listing(toy) == before
    done = command(asked, toy)
    assert done.out.splitlines()[-1] == f"next, in the yaml: load_checkpoint: {toy / 'out.ckpt'}, auto_trans_ckpt: True"
    assert "is there; choose another name" in command([*asked, "--dry-run"], toy).out


def test_the_next_step_is_told(toy: Path) -> None:
    arguments = ["transform", "--src-checkpoint", "full.ckpt", "--dst-checkpoint-dir", "out"]
    whole = command(arguments, toy).out.splitlines()
    assert whole[-1] == f"next, in the yaml: load_checkpoint: {toy}/out/rank_0/checkpoint_0.ckpt, auto_trans_ckpt: True"
    cut = command([*arguments[:4], "cut", "--dst-strategy", "dp2mp2"], toy).out.splitlines()
    assert cut[-1] == (
        f"next, in the yaml of a job with this strategy: load_checkpoint: {toy}/cut, auto_trans_ckpt: False"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["transform", "--src-checkpoint", "full.ckpt", "--weights-only"],
        ["merge-lora", "--src-checkpoint", "lora.safetensors", "--alpha", "2"],
    ],
)
def test_the_next_step_of_a_checkpoint_2_is_that_of_mindformers(toy: Path, arguments: list[str]) -> None:
    """It is a folder, also where it holds one file of tensors."""
    lora = {"wq.lora_a": (1, 6), "wq.lora_b": (8, 1), "wq.weight": (8, 6)}
    save_file({name: np.ones(shape, np.float32) for name, shape in lora.items()}, toy / "lora.safetensors")
    done = command([*arguments, "--dst-checkpoint", "out", "--format", "checkpoint2"], toy)
    assert done.code == 0, done
    assert done.out.splitlines()[-1] == (
        f"next, in the yaml of MindFormers: load_checkpoint: {toy}/out, use_legacy_format: False"
    )


def test_paths_without_their_options(toy: Path) -> None:
    done = command(["transform", "full.ckpt", "out"], toy)
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith(
        "(full.ckpt out). Paths are given by options here: --src-checkpoint PATH --dst-checkpoint-dir PATH"
    )


def test_doctor_says_when_a_path_is_not_there(toy: Path) -> None:
    done = command(["doctor", "nowhere/deep"], toy)
    assert done.code == 0
    assert f"nowhere/deep is not there; what is said of the storage is of {toy}" in done.out


def test_completion_of_commands_models_and_formats(toy: Path) -> None:
    def completed(words: str) -> list[str]:
        extra = {"_MINDFORMERS_CKPT_COMPLETE": "bash_complete", "COMP_WORDS": words}
        extra["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        line = [sys.executable, "-m", "mindformers_ckpt"]
        done = subprocess.run(line, cwd=toy, env=environment(extra), capture_output=True, text=True, timeout=60)
        return [entry.partition(",")[2] for entry in done.stdout.splitlines()]

    assert completed("mindformers-ckpt merge") == ["merge-lora", "merge-strategy"]
    assert completed("mindformers-ckpt convert --model qwen") == [
        "qwen",
        "qwen2_5_vl",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
    ]
    assert completed("mindformers-ckpt transform --format s") == ["safetensors"]


def test_a_program_that_imports_the_command_line_keeps_its_garbage_collection(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import gc, mindformers_ckpt.cli.main; print(gc.isenabled(), gc.get_freeze_count())"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True 0\n", "")
