"""Measure re-slicing on storage with latency: the best raw read of the same bytes, `cat`, `cp -r` and ours.

    python tools/bench_storage.py --gb 2

Makes a Llama-like checkpoint cut as mp4, shows it through a slow file system that it compiles and mounts itself
(tools/slow_mount.py), and re-slices it to mp8 into memory (`--result`). For every latency, and for storage that is
limited to 200 MB/s, it prints

- T_io: the quickest raw read of the source's bytes, of 1 to 64 threads, through the page cache or past it (O_DIRECT),
  and the quickest of the other kind;
- "raw copy": the same requests, each written to its place in a file of the result as soon as it has come: what a copy
  takes at the least, with no checkpoint looked at;
- the seconds of every way and their ratio to T_io, the seconds of the processor that it and the file system took; what
  the file system was asked for: opens, reads, and how many reads were in flight at most;
- the same for loading as a rank does it without files (`auto_trans_save: False`): one rank that gets all weights.

The files below are warm, so that only the added latency counts; every run has a mount of its own, for what was read
once stays in the page cache above it. Ways are measured in turn, `--repeats` times; the least times count.

`--s3` measures object storage (tools/bench_objects.py), `--ranks N` how a rank starts (tools/bench_ranks.py),
`--nodes N` what ranks of several nodes read that load the same weights (tools/bench_sharing.py).
"""

from __future__ import annotations

import itertools
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401 - finds the package of this checkout
import click

sys.path.insert(0, str(Path(__file__).parent))
from bench_objects import report_s3
from bench_ranks import report_ranks
from bench_sharing import report_sharing
from bench_transform import (
    machine,
    ours,
    shapes,
    specs,
    strategy_argument,
    take_memory,
    write_complete,
    write_strategies,
)
from slow_mount import mounted, why_not

_REQUEST = 1 << 20
_THROTTLED = 200e6
_NODE_THROTTLED = 20e6  # of each node, so that eight of them leave two cores time
_LOAD = """
import sys
import time
from pathlib import Path
import numpy as np
from bench_transform import shapes, specs
from mindformers_ckpt.disk.waiting import has_waited
from mindformers_ckpt.job.direct import read_direct
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_mindspore
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.strategy.model import Strategy
memory = {spec.name: np.ones(spec.nbytes, np.uint8) for spec in specs(shapes(float(sys.argv[3])))}
print("ready", flush=True)
sys.stdin.readline()
used = time.process_time()
checkpoint = Checkpoint(find_mindspore(sys.argv[1]), read_strategy(Path(sys.argv[2])))
if has_waited():  # as mindformers_ckpt/job/reslice.py
    checkpoint.look_quickly()
plan = build_plan(checkpoint, Strategy.complete())
weights = list(read_direct(plan, lambda: None, is_shared=False, given=lambda wanted: memory))
assert all(content is memory[spec.name] for spec, content in weights)
print(time.process_time() - used)
"""


class Case(NamedTuple):
    """How a file system behaves."""

    name: str
    latency_ms: float
    bytes_per_s: float


class Run(NamedTuple):
    """What a way took, and what it asked of the file system."""

    seconds: float
    cpu: float
    served: float
    counters: dict[str, int]


class Bench:
    """A checkpoint, and the ways of reading it through a slow file system."""

    def __init__(self, folder: Path, result: Path, case: Case, gb: float) -> None:
        self._folder, self._result, self._case, self._gb = folder, result, case, gb
        self._bytes = sum(path.stat().st_size for path in (folder / "data" / "source").rglob("*.ckpt"))

    def run(self, way: Callable[[Path], None], before: Callable[[Path], None] = lambda mount: None) -> Run:
        """Run one way on a mount of its own, that of the folder of data; `before` does not count."""
        shutil.rmtree(self._result, ignore_errors=True)
        case, scratch = self._case, self._folder / "scratch"
        with mounted(
            self._folder / "data",
            self._folder / "mount",
            scratch=scratch,
            latency_ms=case.latency_ms,
            bytes_per_s=case.bytes_per_s,
        ) as mount:
            take_memory(self._bytes)
            before(mount.mountpoint)
            started, used = time.perf_counter(), _cpu_seconds()
            way(mount.mountpoint)
            seconds = time.perf_counter() - started
            run = Run(seconds, _cpu_seconds() - used, mount.cpu_seconds(), mount.counters())
        shutil.rmtree(self._result, ignore_errors=True)
        return run

    def raw(self, readers: int, direct: bool, limit: float = float("inf"), *, copies: bool = False) -> Run:
        """A raw read by some threads, or a copy; it may end early when it takes longer than `limit` seconds."""
        target = self._result if copies else None
        return self.run(
            lambda mount: read_all(sorted((mount / "source").rglob("*.ckpt")), readers, direct, limit, target)
        )

    def cat(self, mount: Path) -> None:
        """One reader after the other."""
        with open(os.devnull, "wb") as nothing:
            subprocess.run(["cat", *sorted((mount / "source").rglob("*.ckpt"))], check=True, stdout=nothing)

    def copy(self, mount: Path) -> None:
        """`cp -r` of the source."""
        subprocess.run(["cp", "-r", str(mount / "source"), str(self._result)], check=True)

    def transform(self, processes: int, *options: str) -> Callable[[Path], None]:
        """Ours: mp4 -> mp8."""

        def way(mount: Path) -> None:
            src, dst = (strategy_argument(self._folder / "data" / "strategy", name) for name in ("mp4", "mp8"))
            words = ("--transform_process_num", str(processes), *options)
            subprocess.run(ours(mount / "source", src, self._result, dst, *words), check=True)

        return way

    def load(self) -> Run:
        """Ours, as a rank of a job loads without files: one that runs, and whose parameters get all weights."""
        ranks: list[subprocess.Popen[str]] = []
        told = ""

        def start(mount: Path) -> None:
            strategy = strategy_argument(self._folder / "data" / "strategy", "mp4")
            command = [sys.executable, "-c", _LOAD, str(mount / "source"), strategy, str(self._gb)]
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            }
            pipe = subprocess.PIPE
            ranks.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment))
            assert ranks[0].stdout is not None
            if ranks[0].stdout.readline() != "ready\n":
                raise click.ClickException("the rank that is to load did not start")

        def way(mount: Path) -> None:
            nonlocal told
            told = ranks[0].communicate("\n")[0]
            if ranks[0].returncode:
                raise click.ClickException("the rank did not load")

        return self.run(way, start)._replace(cpu=float(told or "nan"))


def _cpu_seconds() -> float:
    """What this process and those that it has waited for took of the processor."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def read_all(
    files: list[Path], readers: int, direct: bool, limit: float = float("inf"), target: Path | None = None
) -> None:
    """Read files by requests of 1 MiB, several at a time; write what is read below `target`, or drop it."""
    end = time.perf_counter() + limit
    descriptors = [os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0)) for file in files]
    copies = dict(zip(descriptors, [] if target is None else _copies(target, files)))
    jobs: Iterator[tuple[int, int]] = itertools.chain.from_iterable(
        ((descriptor, start) for start in range(0, os.fstat(descriptor).st_size, _REQUEST))
        for descriptor in descriptors
    )
    lock = threading.Lock()

    def read() -> None:
        buffer = mmap.mmap(-1, _REQUEST)
        while time.perf_counter() < end:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            descriptor, start = job
            count = os.preadv(descriptor, [buffer], start)
            if descriptor in copies:
                os.pwrite(copies[descriptor], memoryview(buffer)[:count], start)

    threads = [threading.Thread(target=read) for _ in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for descriptor in (*descriptors, *copies.values()):
        os.close(descriptor)


def _copies(target: Path, files: list[Path]) -> list[int]:
    """A file below `target` for each, open for writing."""
    target.mkdir(parents=True)
    return [os.open(target / str(number), os.O_WRONLY | os.O_CREAT) for number, _ in enumerate(files)]


def best_raw(bench: Bench, readers: list[int], direct: bool) -> tuple[Run, str]:
    """The quickest raw read past the page cache or through it, and how it was done."""
    best: tuple[Run, str] | None = None
    for count in sorted(readers, reverse=True):
        limit = float("inf") if best is None else best[0].seconds + 1
        found = bench.raw(count, direct, limit)
        if best is None or found.seconds < best[0].seconds:
            best = found, f"{count} readers{', O_DIRECT' if direct else ''}"
    assert best is not None
    return best


def make_checkpoint(folder: Path, gb: float) -> None:
    """The source, cut as mp4, under data/source, and the strategies."""
    weights = shapes(gb)
    write_strategies(folder / "data" / "strategy", weights)
    write_complete(folder / "complete" / "rank_0" / "full.ckpt", specs(weights))
    target = strategy_argument(folder / "data" / "strategy", "mp4")
    subprocess.run(ours(folder / "complete", "None", folder / "data" / "source", target), check=True)
    shutil.rmtree(folder / "complete")


def report(case: Case, bench: Bench, repeats: int, readers: list[int], options: tuple[str, ...]) -> None:
    """Measure one case and print its rows."""
    (t_io, how), (other, other_how) = sorted(
        (best_raw(bench, readers, direct) for direct in (True, False)), key=lambda found: found[0].seconds
    )
    commands: dict[str, Callable[[Path], None]] = {"cat": bench.cat, "cp -r": bench.copy}
    commands |= {
        f"ours, {count} process{'es' if count > 1 else ''}": bench.transform(count, *options) for count in (1, 2)
    }
    ways: dict[str, Callable[[], Run]] = {way: partial(bench.run, command) for way, command in commands.items()}
    ways["load in a job"] = bench.load
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, work in ways.items():
            runs[way].append(work())
    best = {f"T_io ({how})": t_io, f"raw ({other_how})": other}
    best["raw copy"] = min((bench.raw(count, True, copies=True) for count in readers), key=lambda run: run.seconds)
    best |= {way: min(found, key=lambda run: run.seconds) for way, found in runs.items()}
    for way, run in best.items():
        counted = run.counters
        click.echo(
            f"{case.name:<9} {way:<28} {run.seconds:8.2f} {run.seconds / t_io.seconds:8.2f} "
            f"{run.cpu:6.2f} {run.served:7.2f} {counted['opens']:6d} "
            f"{counted['stats'] + counted['listings']:6d} {counted['reads']:7d} {counted['most_in_flight']:10d}"
        )


@click.command()
@click.option("--gb", default=2.0, show_default=True, help="Bytes of the checkpoint, in GB.")
@click.option("--latency", "latencies", multiple=True, type=float, help="Milliseconds a request. Default: 0, 1, 5, 30.")
@click.option("--throttled/--not-throttled", default=True, show_default=True, help="Also storage of 200 MB/s.")
@click.option("--readers", default="1,8,16,32,64", show_default=True, help="Threads of the raw reads.")
@click.option("--repeats", default=2, show_default=True)
@click.option("--option", "options", multiple=True, help="Further options of ours, e.g. --option=--hash.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("output/bench_storage"), show_default=True)
@click.option("--s3", is_flag=True, help="Object storage instead: a local S3 server behind a delay and a link.")
@click.option("--link", default=200.0, show_default=True, help="With --s3: MB a second in each direction.")
@click.option("--ranks", type=int, help="The start of a rank instead, of a source of so many rank files.")
@click.option("--nodes", type=int, help="Ranks on so many nodes that load the same weights instead.")
@click.option("--node-ranks", default=1, show_default=True, help="With --nodes: ranks a node.")
@click.option("--result", type=click.Path(path_type=Path), help="Where results go. Default: memory (/dev/shm).")
def main(
    gb: float,
    latencies: tuple[float, ...],
    throttled: bool,
    readers: str,
    repeats: int,
    options: tuple[str, ...],
    folder: Path,
    s3: bool,
    link: float,
    ranks: int | None,
    nodes: int | None,
    node_ranks: int,
    result: Path | None,
) -> None:
    """Measure re-slicing on slow storage and print a table."""
    reason = None if s3 else why_not()
    if reason is not None:
        raise click.ClickException(f"no slow file system can be mounted here: {reason}")
    folder = folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    if ranks is not None:
        for latency in latencies or (1,):
            report_ranks(folder, ranks, latency)
            shutil.rmtree(folder)
        return
    make_checkpoint(folder, gb)
    size = sum(path.stat().st_size for path in (folder / "data" / "source").rglob("*.ckpt"))
    click.echo(f"{size / 1e9:.2f} GB, mp4 -> mp8; {machine()}")
    if nodes is not None:
        limited = [(1.0, _NODE_THROTTLED)] if throttled else []
        for latency, rate in [*((latency, 0.0) for latency in latencies or (5,)), *limited]:
            report_sharing(folder, nodes, node_ranks, latency, rate, repeats)
        shutil.rmtree(folder)
        return
    if s3:
        for latency in latencies or (20,):
            report_s3(folder, result or folder / "result", delay_ms=latency, link=link * 1e6, repeats=repeats)
        shutil.rmtree(folder)
        return
    header = "case      way                           seconds   x T_io  CPU s  served  opens  names   reads  in flight"
    click.echo(f"{header}\n{'-' * len(header)}")
    cases = [Case(f"{latency:g} ms", latency, 0) for latency in latencies or (0, 1, 5, 30)]
    cases += [Case("200 MB/s", 1, _THROTTLED)] if throttled else []
    target = result or Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    target.mkdir(parents=True, exist_ok=True)
    try:
        for case in cases:
            for path in (folder / "data" / "source").rglob("*.ckpt"):
                read_all([path], 1, False)  # warm
            bench = Bench(folder, target / "result", case, gb)
            report(case, bench, repeats, [int(n) for n in readers.split(",")], options)
    finally:
        shutil.rmtree(target / "result" if result else target, ignore_errors=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
