"""Fuzz every reader that takes a file from outside: `python tools/fuzz.py --minutes 3 [--only ckpt] [--seed 1]`.

Each reader runs in a process of its own, with 2 GiB of memory and 10 s an input. It may give a result or a
CheckpointError; anything else is a fault: the input is kept in the folder that --keep names, and the exit code is 1.
Where the safetensors library is installed, what it refuses may not be accepted. The inputs are mutations of
tests/data/broken and of the whole files that its script makes; with atheris installed coverage guides them.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MEMORY = 2 << 30
SECONDS_AN_INPUT = 10
# Reader -> the suffix of its files and their folder in the corpus.
READERS = {
    "ckpt": (".ckpt", ""),
    "safetensors": (".safetensors", ""),
    "torch": (".bin", ""),
    "strategy": (".ckpt", "strategy"),
    "strategy_json": (".json", "strategy"),
    "plan": (".json", "plan"),
    "index": (".json", "index"),
}
WORDS = [
    b"",
    b"\0",
    b"\xff" * 9 + b"\x01",
    b"[" * 70,
    b"1e999",
    b"NaN",
    b'"',
    b"-1",
    b"true",
    b"\xed\xa0\x80",
    b"(" * 70,
]
NUMBERS = [0, 1, 127, 128, 255, 65536, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]


def reader_of(name: str) -> Callable[[Path], Any]:
    """The function of the project that reads such a file."""
    from mindformers_ckpt.formats import read_header
    from mindformers_ckpt.planning.file import read_plan
    from mindformers_ckpt.sources.index import read_index
    from mindformers_ckpt.strategy.files import read_strategy

    table: dict[str, Callable[[Path], Any]] = {"plan": read_plan, "index": read_index}
    return table.get(name, read_strategy if name.startswith("strategy") else read_header)


def seeds_of(name: str) -> list[bytes]:
    """Broken files and whole ones."""
    import make_broken as made

    suffix, folder = READERS[name]
    whole = {
        "ckpt": made.record(b"w", [2], b"Int8", b"ab") + made.record(b"v", [0], b"Float32", bytes(4)),
        "safetensors": made.safetensors({"w": made.entry([2], 0, 8), "v": made.entry([], 8, 12)}, bytes(12)),
        "torch": made.torch_zip(made.torch_dict(made.tensor())),
        "strategy": made.strategy({b"0-w": ([2, 2], [0, 2**64 - 1]), b"1-v": ([4], [0])}, mark=1, shards=2),
        "strategy_json": made.flattened(dev_matrix=[2, 2], tensor_map=[1, 0, -1], tensor_shape=[2, 2, 4]),
        "plan": made.plan(),
        "index": b'{"weight_map":{"a":"x.safetensors"}}',
    }
    broken = [data for path, data in made.FILES.items() if path.endswith(suffix) and path.rpartition("/")[0] == folder]
    return [whole[name], *broken]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The same bytes with a few of them changed."""
    changed = bytearray(data[:20_000])
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        at = rng.randrange(len(changed) + 1)
        number = rng.choice(NUMBERS).to_bytes(8, "little")
        kind = rng.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del changed[at : at + rng.choice([1, 2, 8, 64])]
        elif kind == 2:
            changed[at:at] = rng.choice(WORDS)
        elif kind == 3:
            changed[at : at + 8] = number
        elif kind == 4:
            changed[at : at + 1] = number[: rng.choice([1, 2, 4])]
        else:
            start = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[start : start + rng.choice([1, 8, 64])]
    return bytes(changed)


class Case:
    """One reader: runs it on an input, and notices what must not happen."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.path = folder / f"input{READERS[name][0]}"
        self.read = reader_of(name)
        self.runs = self.accepted = 0

    def run(self, data: bytes) -> None:
        from mindformers_ckpt.errors import CheckpointError

        self.runs += 1
        self.path.write_bytes(data)
        signal.alarm(SECONDS_AN_INPUT)
        try:
            header = self.read(self.path)
        except CheckpointError as error:
            if len(str(error)) > 20_000:
                raise AssertionError(f"a message of {len(str(error))} characters") from None
            return
        finally:
            signal.alarm(0)
        self.accepted += 1
        self._compare(data, header)

    def _compare(self, data: bytes, header: Any) -> None:
        if self.name == "strategy" or self.name == "strategy_json":
            for layout in (layout for stage in header.stages for layout in stage.values() if layout.rank_count < 4096):
                with contextlib.suppress(ValueError):
                    layout.cells  # noqa: B018
        if self.name == "safetensors":
            try:
                from safetensors import deserialize
            except ImportError:
                return
            found = {name: tuple(tensor["shape"]) for name, tensor in deserialize(data)}
            assert found == {name: record.spec.shape for name, record in header.tensors.items()}
        if self.name in ("ckpt", "safetensors", "torch"):
            for record in header.tensors.values():
                assert sum(segment.length for segment in record.segments) == record.spec.nbytes
                assert all(segment.offset + segment.length <= len(data) for segment in record.segments)


def fuzz(name: str, seconds: float, seed: int) -> None:
    """Fuzz one reader in this process; raises at the first fault, with the input still in its file."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        guided = importlib.util.find_spec("atheris") is not None
        with _instrumented() if guided else contextlib.nullcontext():
            case = Case(name, Path(folder))
        try:
            (_guide if guided else _mutate)(case, seconds, seed)
        except BaseException:
            print(f"INPUT {case.path.read_bytes().hex()}", flush=True)
            raise
        print(f"DONE {case.runs} {case.accepted}", flush=True)


def _mutate(case: Case, seconds: float, seed: int) -> None:
    rng, seeds, stop = random.Random(seed), seeds_of(case.name), time.monotonic() + seconds
    for data in seeds:
        case.run(data)
    while time.monotonic() < stop:
        case.run(mutated(rng, rng.choice(seeds)))


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
