"""All commands that publish something, on inputs made here, and what is right after one of them was cut off."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from child import NO_EVENT, Ended, Event, Lacks, run

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "cli"), str(TESTS / "convert"), str(TESTS / "lora")]

import huggingface as hf  # noqa: E402
import lora_model  # noqa: E402
import toy  # noqa: E402

from mindformers_ckpt.cli import convert, merge_lora, merge_strategy, plan, transform  # noqa: E402, F401
from mindformers_ckpt.cli.main import main  # noqa: E402
from mindformers_ckpt.execution.options import Options  # noqa: E402
from mindformers_ckpt.execution.run import Run  # noqa: E402
from mindformers_ckpt.job.output_dir import OutputDir  # noqa: E402
from mindformers_ckpt.planning.build import build_plan  # noqa: E402
from mindformers_ckpt.publish.replace import recover  # noqa: E402
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
        self.words = self._full(words)
        self.old = None if old is None else self._full(old)
        self.has_resume = resume
        self.replaces = "--overwrite" in words or not resume

    def _full(self, words: Sequence[str]) -> list[str]:
        """The words with their paths."""
        full = [str(self.folder / word) if word.startswith("in/") else word for word in words]
        return [str(self.out) if word == "OUT" else word for word in full]

    def run(self, words: Sequence[str]) -> int:
        if words[0] == "job":
            try:
                return _job(self.folder, words[1])
            except OSError as error:  # shown by the training script
                sys.exit(f"error: {error}")
        main(list(words))
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
    """Make the sources and strategies of all cases in `folder`/in."""
    toy.write_toy(folder / "in")
    hf.write_folder(folder / "in/hf", hf.random_tensors(hf.llama_shapes()), hf.decoder_config())
    lora_model.write_complete(folder / "in/lora.ckpt", lora_model.lora_model())


class Bench:
    """A case on a file system that lacks something: its old and its new result, and how long it takes.

    `by_shim`: the shim takes away what it lacks; otherwise the file system is one that is so.
    """

    def __init__(self, case: Case, lacks: Lacks, *, by_shim: bool = True) -> None:
        self.case, self.lacks = case, lacks
        self._taken = lacks if by_shim else Lacks.NOTHING
        self.work = case.folder / "work"
        self.reset()
        self.old = tree(case.out)
        began = time.monotonic()
        done = self.run(case.words)
        self.seconds = time.monotonic() - began
        assert done.code == 0, done.said
        self.operations = done.operations
        new = tree(case.out)
        assert new is not None
        self.new = new

    @cached_property
    def operations_with_reads(self) -> int:
        """The operations when reading counts, too."""
        self.reset()
        operations = self.run(self.case.words, reads=True).operations
        self.reset()
        return operations

    def reset(self) -> None:
        """The old result, and nothing else."""
        pristine = self.case.folder / "pristine"
        if not pristine.exists():
            self.work.mkdir()
            if self.case.old is not None:
                made = self.run(self.case.old)
                assert made.code == 0, made.said
            shutil.copytree(self.work, pristine)
        shutil.rmtree(self.work)
        shutil.copytree(pristine, self.work)

    def run(
        self,
        words: Sequence[str],
        event: Event = NO_EVENT,
        *,
        reads: bool = False,
        seconds: float = 60.0,
        after: tuple[float, tuple[int, ...]] | None = None,
    ) -> Ended:
        """Run the command line, with something happening at one of its operations, or after some seconds."""
        watched, lacks = (self.case.folder, self._taken | Lacks.READS_TOO) if reads else (self.work, self._taken)
        action = self._action(words)
        return run(action, watched, lacks, event, seconds=seconds, after=after)

    def _action(self, words: Sequence[str]) -> Callable[[], object]:
        return lambda: self.case.run(words)

    def state(self) -> Tree | None:
        """What is at the destination, after whoever comes next has given the name back where it was between two."""
        found = tree(self.case.out)
        if found is None and self.old is not None and Lacks.EXCHANGE in self.lacks:
            run(lambda: recover(self.case.out), self.work, self._taken)
            found = tree(self.case.out)
        return found

    def settle(self, *, resume: bool) -> list[str]:
        """After a run was cut off: is the destination whole, and does the same command put everything right?"""
        faults = []
        state = self.state()
        if state not in (self.old, self.new):
            faults.append(f"neither the old nor the new result: {sorted(state or {})}")
        options = ["--resume"] if resume and self.case.has_resume else []
        self.age()
        done = self.run([*self.case.words, *options])
        is_refused = done.code == 1 and state == self.new and not options and not self.case.replaces
        if done.code != 0 and not is_refused:
            faults.append(f"the same command {options} exits with {done.code}: {done.said[-300:]}")
        if tree(self.case.out) != self.new:
            faults.append(f"the same command {options} does not make the result")
        if left := self.left():
            faults.append(f"left after the same command {options}: {left}")
        return faults

    def age(self) -> None:
        """Some seconds pass: the lock of a process that died before it wrote its name is believed for a while."""
        if Lacks.LOCKS in self.lacks:
            for path in self.work.rglob("*lock*"):
                os.utime(path, (0, 0))

    def left(self) -> list[str]:
        """What is beside the result, and should not be."""
        return sorted({path.name for path in self.work.iterdir()} - {self.case.out.name, *_ALLOWED})


_ALLOWED = ("strategy", ".checkpoint_hook.lock")  # of jobs


def tree(path: Path) -> Tree | None:
    """What a result is, but for the time and the checksum in its manifest. None for nothing, or an empty folder."""
    if path.is_file():
        return {"": _digest(path)}
    files = {str(file.relative_to(path)): _digest(file) for file in path.rglob("*") if file.is_file()}
    return files or None


def _digest(file: Path) -> str:
    data = file.read_bytes()
    with contextlib.suppress(ValueError, UnicodeDecodeError):
        content = json.loads(data)
        for key in ("created", "checksum"):
            content.pop(key, None)
        data = json.dumps(content, sort_keys=True).encode()
    return hashlib.blake2b(data, digest_size=8).hexdigest()
