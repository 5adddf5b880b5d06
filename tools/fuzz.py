"""Fuzz every reader that takes a file from outside: `python tools/fuzz.py --minutes 3 [--only ckpt] [--seed 1]`.

Each reader runs in a process of its own, with 2 GiB of memory and 10 s an input. It may give a result or a
CheckpointError; anything else is a fault: the input is kept in the folder that --keep names, and the exit code is 1.
What is accepted has to be what protobuf, safetensors and, where it is installed, PyTorch find in the file. The inputs
are whole files drawn at random, mutations of them, and of tests/data/broken. With atheris installed coverage guides
them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

from fuzz_inputs import READERS, inputs, seeds_of  # noqa: E402
from fuzz_oracles import compare, load  # noqa: E402

from mindformers_ckpt.errors import CheckpointError  # noqa: E402

MEMORY = 2 << 30
SECONDS_AN_INPUT = 10
LONGEST_MESSAGE = 20_000


def reader_of(name: str) -> Callable[[Path], Any]:
    """The function of the project that reads such a file."""
    from mindformers_ckpt.formats import read_header
    from mindformers_ckpt.planning.file import read_plan
    from mindformers_ckpt.sources.index import read_index
    from mindformers_ckpt.strategy.files import read_strategy

    table: dict[str, Callable[[Path], Any]] = {"plan": read_plan, "index": read_index}
    return table.get(name, read_strategy if name.startswith("strategy") else read_header)


class Case:
    """One reader: runs it on an input, and notices what must not happen."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.path = folder / f"{name}{READERS[name][0]}"
        self.read = reader_of(name)
        self.runs = self.accepted = 0
        for shard in ("x.safetensors", "y.safetensors"):  # the files that an index names
            (folder / shard).touch()
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT)

    def run(self, data: bytes) -> None:
        """Raises whatever the reader raises beside its own errors; AssertionError where its result is wrong."""
        self.runs += 1
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
        signal.alarm(SECONDS_AN_INPUT)
        try:
            found = self.read(self.path)
        except CheckpointError as error:
            if len(str(error)) > LONGEST_MESSAGE:
                raise AssertionError(f"a message of {len(str(error))} characters") from None
            return
        finally:
            signal.alarm(0)
        self.accepted += 1
        compare(self.name, data, found)


def limit_memory() -> None:
    """This process, as it is with the other libraries, may take some memory more."""
    load()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fuzz(name: str, seconds: float, seed: int) -> None:
    """Fuzz one reader in this process; raises at the first fault, with the input still in its file."""
    with tempfile.TemporaryDirectory() as folder:
        guided = importlib.util.find_spec("atheris") is not None
        with _instrumented() if guided else contextlib.nullcontext():
            case = Case(name, Path(folder))
        limit_memory()
        try:
            (_guide if guided else _mutate)(case, seconds, seed)
        except BaseException:
            print(f"INPUT {case.path.read_bytes().hex()}", flush=True)
            raise
        print(f"DONE {case.runs} {case.accepted}", flush=True)


def _mutate(case: Case, seconds: float, seed: int) -> None:
    chance, stop = random.Random(seed), time.monotonic() + seconds
    for data in seeds_of(case.name):
        case.run(data)
    for data in inputs(chance, case.name):
        if time.monotonic() >= stop:
            return
        case.run(data)


def _instrumented() -> Any:
    """What is imported within it tells atheris where it runs."""
    import atheris

    return atheris.instrument_imports(include=["mindformers_ckpt"])


def _guide(case: Case, seconds: float, seed: int) -> None:
    """The same, guided by coverage."""
    import atheris

    corpus = case.path.with_name("corpus")
    corpus.mkdir()
    for number, data in enumerate(seeds_of(case.name)):
        (corpus / str(number)).write_bytes(data)
    stop = time.monotonic() + seconds

    def one(data: bytes) -> None:
        # libFuzzer ends the process itself, and says nothing that the parent reads.
        try:
            case.run(data)
        except BaseException:
            print(f"INPUT {data.hex()}", flush=True)
            traceback.print_exc()
            os._exit(1)
        if time.monotonic() > stop:
            print(f"DONE {case.runs} {case.accepted}", flush=True)
            os._exit(0)

    atheris.Setup([sys.argv[0], f"-seed={seed + 1}", "-max_len=20000", "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", choices=sorted(READERS))
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    seed = random.randrange(1 << 31) if options.seed is None else options.seed
    if options.child is not None:
        fuzz(options.only, options.child, seed)
        return 0
    names = [options.only] if options.only else list(READERS)
    seconds = options.minutes * 60 / len(names)
    print(f"seed {seed}, {seconds:.0f} s a reader")
    return max(_reader_run(name, seconds, seed, options.keep) for name in names)


def _reader_run(name: str, seconds: float, seed: int, keep: Path) -> int:
    command = [sys.executable, __file__, "--only", name, "--child", str(seconds), "--seed", str(seed)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name:15} FAULT: it hangs and takes no signal")
        return 1
    found = done.stdout.split()
    if done.returncode == 0 and found[:1] == ["DONE"]:
        print(f"{name:15} {int(found[1]):10,} inputs, {int(found[2]):8,} accepted, no fault")
        return 0
    cause = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    if found[:1] == ["INPUT"]:
        file = keep / f"fuzz_{name}{READERS[name][0]}"
        file.write_bytes(bytes.fromhex(found[1] if len(found) > 1 else ""))
        cause += f" (the input is in {file})"
    print(f"{name:15} FAULT: {cause}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
