"""Kills one command before each of its operations on files, and looks at what is left. To be run with the shim.

    LD_PRELOAD=shim.so python driver.py FOLDER COMMAND EXCHANGE

A process that has imported everything forks a child for every run. Prints JSON: the operations of the command, and
what was wrong after which of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "cli"), str(TESTS / "convert"), str(TESTS / "lora")]

import huggingface as hf  # noqa: E402
import lora_model  # noqa: E402
import toy  # noqa: E402

from mindformers_ckpt.cli import convert, merge_lora, merge_strategy, plan, transform  # noqa: E402, F401
from mindformers_ckpt.cli.main import cli  # noqa: E402
from mindformers_ckpt.execution import Options, Run  # noqa: E402
from mindformers_ckpt.job.output_dir import OutputDir  # noqa: E402
from mindformers_ckpt.planning.build import build_plan  # noqa: E402
from mindformers_ckpt.publish import recover  # noqa: E402
from mindformers_ckpt.sources.checkpoint import Checkpoint  # noqa: E402
from mindformers_ckpt.sources.find import find_source  # noqa: E402
from mindformers_ckpt.strategy.files import read_strategy  # noqa: E402
from mindformers_ckpt.strategy.model import Strategy  # noqa: E402

Tree = dict[str, str]


class Case:
    """A command for `out`, what makes the old result, and whether the command has --resume."""

    def __init__(
        self, *words: str, old: Sequence[str] | None = None, resume: bool = True, out: str = "out", folder: Path
    ) -> None:
        self.folder, self.out = folder, folder / "work" / out
        self.words = [str(self.out) if word == "OUT" else word for word in words]
        self.old = None if old is None else [str(self.out) if word == "OUT" else word for word in old]
        self.has_resume = resume

    def run(self, words: Sequence[str]) -> int:
        if words[0] == "job":
            return _job(self.folder, words[1])
        cli.main(list(words), prog_name="mindformers-ckpt")
        return 0


def _job(folder: Path, target: str) -> int:
    """What the main rank of a job does with its output dir."""
    source = Checkpoint(find_source(folder / "in/full.ckpt"), Strategy.complete())
    output = OutputDir(folder / "work")
    output.clear()
    options = Options(overwrite_anything=True, keep=False)
    with Run(build_plan(source, read_strategy(folder / "in" / target)), output.transformed, options) as run:
        run.prepare()
        run.copy()
        run.publish()
    output.keep()
    return 0


def cases(folder: Path) -> dict[str, Case]:
    """All commands that publish something."""
    to_mp2pp2 = ["transform", "--quiet", "--src-checkpoint", "in/full.ckpt", "--dst-strategy", "in/mp2pp2"]
    to_mp2pp2 += ["--dst-checkpoint-dir", "OUT"]
    to_dp2mp2 = [*to_mp2pp2[:5], "in/dp2mp2", *to_mp2pp2[6:]]
    ranks = [*to_mp2pp2, "--ranks", "0,1"]
    to_ms = ["convert", "--quiet", "--input-path", "in/hf", "--output-path", "OUT"]
    lora = ["merge-lora", "--quiet", "--src-ckpt-path-or-dir", "in/lora.ckpt", "--lora-scaling", "2"]
    plan_out = ["plan", "--src-checkpoint", "in/full.ckpt", "--out", "OUT"]
    merge = ["merge-strategy", "in/mp2pp2", "OUT"]
    return {
        "transform": Case(*to_mp2pp2, folder=folder),
        "overwrite": Case(*to_mp2pp2, "--overwrite", old=to_dp2mp2, folder=folder),
        "fsync": Case(*to_mp2pp2, "--overwrite", "--fsync", "--crc-check", old=to_dp2mp2, folder=folder),
        "ranks, first": Case(*ranks, folder=folder),
        "ranks, added": Case(*to_mp2pp2, "--ranks", "2,3", old=ranks, folder=folder),
        "ranks, replaced": Case(*ranks, "--overwrite", old=[*ranks, "--prefix", "old_"], folder=folder),
        "convert, file": Case(*to_ms, "--overwrite", old=[*to_ms, "--dtype", "fp16"], out="out.ckpt", folder=folder),
        "convert, folder": Case(*to_ms, "--overwrite", old=[*to_ms, "--dtype", "fp16"], folder=folder),
        "merge-lora": Case(*lora, "--dst-ckpt-dir", "OUT", folder=folder),
        "merge-strategy": Case(*merge, old=["merge-strategy", "in/dp2mp2", "OUT"], resume=False, folder=folder),
        "plan": Case(*plan_out, "--dst-strategy", "in/mp2pp2", old=plan_out, resume=False, folder=folder),
        "job": Case("job", "mp2pp2", old=["job", "dp2mp2"], resume=False, out="transformed_checkpoint", folder=folder),
    }


def write_inputs(folder: Path) -> None:
    toy.write_toy(folder / "in")
    hf.write_folder(folder / "in/hf", hf.random_tensors(hf.llama_shapes()), hf.decoder_config())
    lora_model.write_complete(folder / "in/lora.ckpt", lora_model.lora_model())


class Driver:
    """Runs a case in children, killed before one operation after the other."""

    def __init__(self, case: Case, can_exchange: bool) -> None:
        self.case, self.can_exchange = case, can_exchange
        self.shim = ctypes.CDLL(None)
        self.work = case.folder / "work"
        self.faults: list[str] = []
        self.at = 0

    def main(self) -> dict[str, Any]:
        self.reset()
        old = tree(self.case.out)
        operations = self.child(lambda: self.case.run(self.case.words), count=True)
        new = tree(self.case.out)
        assert new is not None
        for self.at in range(1, operations + 1):
            self.reset()
            code = self.child(lambda: self.case.run(self.case.words), at=self.at)
            if code != -signal.SIGKILL:
                self.faults.append(f"{self.at}: it was not killed, but ended with {code}")
            self.look(old, new)
        return {"operations": operations, "faults": self.faults}

    def look(self, old: Tree | None, new: Tree) -> None:
        """After a kill: is the destination whole, and does the same command put everything right?"""
        state = tree(self.case.out)
        if state is None and old is not None and not self.can_exchange:
            # Between two renames. Whoever comes next gives the name back.
            self.child(lambda: recover(self.case.out))
            state = tree(self.case.out)
        if state not in (old, new):
            self.faults.append(f"{self.at}: neither the old nor the new result: {sorted(state or {})}")
        resume = ["--resume"] if self.case.has_resume and self.at % 2 else []
        code = self.child(lambda: self.case.run([*self.case.words, *resume]))
        is_refused = code == 1 and state == new and not resume and "--overwrite" not in self.case.words
        if code != 0 and not is_refused:
            self.faults.append(f"{self.at}: the same command {resume} exits with {code}: {self.said()}")
        if tree(self.case.out) != new:
            self.faults.append(f"{self.at}: the same command {resume} does not make the result")
        names = {path.name for path in self.work.iterdir()} - {self.case.out.name, "strategy", ".checkpoint_hook.lock"}
        if is_refused and "merge-lora" in self.case.words:
            names = set()  # it refuses a folder that is not empty before it looks any further, and touches nothing
        if names:
            self.faults.append(f"{self.at}: left after the same command {resume}: {sorted(names)}")

    def reset(self) -> None:
        """The old result, and nothing else."""
        pristine = self.case.folder / "pristine"
        if not pristine.exists():
            self.work.mkdir()
            if self.case.old is not None:
                old = self.case.old
                assert self.child(lambda: self.case.run(old)) == 0, self.said()
            shutil.copytree(self.work, pristine)
        shutil.rmtree(self.work)
        shutil.copytree(pristine, self.work)

    def said(self) -> str:
        return (self.case.folder / "said").read_text()[-300:]

    def child(self, action: Callable[[], object], *, at: int = 0, count: bool = False) -> int:
        """Run something in a child; its exit code, or with `count` the number of its operations."""
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = os.open(self.case.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            code = 1
            try:
                self.shim.shim_arm(os.fsencode(self.work), at, int(self.can_exchange))
                action()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            except BaseException as error:
                os.write(2, repr(error).encode())
            finally:
                os.write(theirs, str(self.shim.shim_count()).encode())
                os._exit(code)
        os.close(theirs)
        with open(ours, "rb") as stream:
            counted = stream.read()
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if count:
            assert code == 0, self.said()
            return int(counted)
        return code


def tree(path: Path) -> Tree | None:
    """What a result is, but for the time that its manifest names. None for nothing at all, or an empty folder."""
    if path.is_file():
        return {"": _digest(path)}
    files = {str(file.relative_to(path)): _digest(file) for file in path.rglob("*") if file.is_file()}
    return files or None


def _digest(file: Path) -> str:
    data = file.read_bytes()
    with contextlib.suppress(ValueError, UnicodeDecodeError):
        content = json.loads(data)
        content.pop("created", None)
        data = json.dumps(content, sort_keys=True).encode()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


if __name__ == "__main__":
    root, name, exchange = sys.argv[1:]
    os.chdir(root)
    write_inputs(Path(root))
    found = Driver(cases(Path(root))[name], exchange == "exchange").main()
    print(json.dumps(found))
