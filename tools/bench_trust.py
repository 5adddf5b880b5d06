#!/usr/bin/env python3
"""Measure fingerprints, verify and diff against reading: python tools/bench_trust.py --gb 1

Makes a Llama-like checkpoint and its re-slices, and prints how fast checksums are counted (the best of several runs,
by CPU time), and the medians of ratios to reading the same files once, in turn, page cache warm, in two ways: by one
thread in blocks of 8 MiB, as programs read files, and by as many threads as `verify --against` and `diff` have, in
pieces of 512 KiB that stay in the cache of a core. Absolute times of a shared machine mean little: read
the ratios. The processor's time of worker processes is counted, too. Of a run with --fingerprint:
`bench_transform.py --option=--fingerprint`.
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command line does: a process with threads forks no others

import checkout  # noqa: F401 - finds the package of this checkout
import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from bench_transform import machine, shapes, specs, write_complete, write_strategies
from slow_mount import mounted, why_not

from mindformers_ckpt.checksums import crc64
from mindformers_ckpt.checksums.shares import share_of
from mindformers_ckpt.engine.buffers import BLOCK_BYTES, PIECE_BYTES
from mindformers_ckpt.engine.threads import run_in_threads
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.look.diff import diff
from mindformers_ckpt.look.fingerprint import fingerprint
from mindformers_ckpt.look.verify import verify
from mindformers_ckpt.look.whole import checkpoint_at
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform

_PART = 32 << 20  # of a file, that one thread reads
_LIMIT = 200e6
THREADS = 2  # of `verify --against` and `diff`


def count_shares(repeats: int) -> None:
    """Print the speed at which the shares of row and column shards are counted."""
    click.echo("checksums by " + ("awscrt" if crc64.has_library() else "numpy (awscrt is not installed)"))
    _count_share("row shard", (4096, 8192), (2048, 8192), repeats)
    for run in (8192, 4096, 2048, 1024, 512, 128):
        _count_share(f"column shard, runs of {run} of 16384 bytes", (4096, 8192), (4096, run // 2), repeats)
    for run in (1024, 512, 256, 128):
        _count_share(f"column shard, runs of {run} of 2048 bytes", (4096, 1024), (4096, run // 2), repeats)


def _count_share(kind: str, shape: tuple[int, ...], stop: tuple[int, ...], repeats: int) -> None:
    whole = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)
    box = Box((0,) * len(shape), stop)
    shard = np.ascontiguousarray(whole[box.slices()])
    best = min(seconds(partial(share_of, shard, box, shape)) for _ in range(5 * repeats))
    click.echo(f"  {kind:40} {shard.nbytes / best / 1e9:6.2f} GB/s")


def cpu() -> float:
    """CPU seconds of all threads, and of processes that have ended."""
    return sum(os.times()[:4])


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """CPU seconds of all threads, or what another clock counts."""
    started = clock()
    work()
    return clock() - started


def read_all(*folders: Path, threads: int) -> None:
    """Read every checkpoint file once, by one thread in blocks, by several in pieces that stay in a core's cache."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*.ckpt"))]
    parts = [(path, start) for path in paths for start in range(0, path.stat().st_size, _PART)]

    count = BLOCK_BYTES if threads == 1 else PIECE_BYTES
    for _ in run_in_threads([_Reading(count) for _ in range(threads)], parts):
        pass


class _Reading:
    """Reads parts of files, and drops what it has read."""

    def __init__(self, size: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, size))

    def run(self, part: tuple[Path, int], check: Callable[[], None], following: tuple[Path, int] | None) -> None:
        """Read a part."""
        path, start = part
        descriptor = os.open(path, os.O_RDONLY)
        stop = start + _PART
        while start < stop and (count := os.preadv(descriptor, [self._memory], start)):
            start += count
        os.close(descriptor)

    def close(self) -> None:
        """All is closed."""


def compare(name: str, work: Callable[[], object], folders: Sequence[Path], repeats: int) -> None:
    """Print the median ratios of some work to reading the folders once, in both ways."""
    ratios: dict[str, list[float]] = {}
    for _ in range(repeats):
        for kind, clock in (("wall", time.perf_counter), ("CPU", cpu)):
            needed = seconds(work, clock)
            for threads in (1, THREADS):
                base = seconds(partial(read_all, *folders, threads=threads), clock)
                ratios.setdefault(f"{kind}, {threads}", []).append(needed / base)
    told = "  ".join(f"{kind}: {statistics.median(found):5.2f}" for kind, found in ratios.items())
    click.echo(f"  {name:44} {told}")


def against(root: Path, source: str, processes: int, strategies: Mapping[str, Strategy]) -> Callable[[], object]:
    """`verify --against` of the eight ranks and a source."""
    return partial(
        verify,
        *(root / "mp8", strategies["mp8"]),
        against=root / source,
        src_strategy=strategies.get(source),
        contents="off",
        processes=processes,
        may_fork=True,
    )


def reading(root: Path, source: str) -> Callable[[], object]:
    """What `against` reads, read by one thread."""
    return partial(read_all, root / "mp8", root / source, threads=1)


def compare_limited(folder: Path, strategies: Mapping[str, Strategy], repeats: int) -> None:
    """Print the median ratios of `verify --against` to reading where the storage is what takes time."""
    click.echo("times of reading once what is read, by the clock, on storage that gives 200 MB/s, 1 ms a request:")
    for source in ("complete", "mp4"):
        ratios = []
        for _ in range(repeats):
            found = []
            for work in (
                partial(against, source=source, processes=2, strategies=strategies),
                partial(reading, source=source),
            ):
                with mounted(
                    folder,
                    folder.with_name("mount"),
                    scratch=folder.with_name("slow"),
                    latency_ms=1,
                    bytes_per_s=_LIMIT,
                ) as mount:
                    found.append(seconds(work(mount.mountpoint), time.perf_counter))
            ratios.append(found[0] / found[1])
        click.echo(f"  verify mp8 --against {source + ', 2 processes':23} wall, 1: {statistics.median(ratios):5.2f}")


@click.command()
@click.option("--gb", default=1.0, show_default=True, help="Bytes of the checkpoint, in GB.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--limited", is_flag=True, help="Storage of 200 MB/s instead, of a FUSE file system (slow_mount.py).")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("output/bench_trust"), show_default=True)
def main(gb: float, repeats: int, limited: bool, folder: Path) -> None:
    """Measure fingerprints, verify and diff."""
    reason = why_not() if limited else None
    if reason is not None:
        raise click.ClickException(f"no slow file system can be mounted here: {reason}")
    shutil.rmtree(folder, ignore_errors=True)
    root = folder.absolute() / "data"
    weights = shapes(gb)
    write_strategies(root / "strategy", weights)
    complete, rows = root / "complete", root / "mp8"
    write_complete(complete / "full.ckpt", specs(weights))
    strategies = {
        name: read_strategy(root / "strategy" / name / "ckpt_strategy_rank_0.ckpt") for name in ("mp8", "mp4")
    }
    for name, strategy in strategies.items():
        transform(build_plan(checkpoint_at(complete), strategy, contents="off"), root / name)
    click.echo(machine())
    if limited:
        compare_limited(root, strategies, repeats)
    else:
        count_shares(repeats)
        click.echo(
            f"times of reading once what is read, by the clock and by the processor, by 1 thread and by {THREADS}:"
        )
        for kind, path, known in (("complete", complete, Strategy.complete()), ("mp8", rows, strategies["mp8"])):
            compare(f"fingerprint of {kind}", partial(fingerprint, path, known, contents="off"), [path], repeats)
        for source in ("complete", "mp4"):
            for processes, told in ((1, ""), (2, ", 2 processes")):
                check = against(root, source, processes, strategies)
                compare(f"verify mp8 --against {source}{told}", check, [rows, root / source], repeats)
        compare(
            "diff complete mp8, which are equal",
            lambda: diff(complete, rows, None, strategies["mp8"], contents="off"),
            [complete, rows],
            repeats,
        )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
