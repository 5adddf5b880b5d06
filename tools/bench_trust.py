#!/usr/bin/env python3
"""Measure fingerprints, verify and diff against reading: python tools/bench_trust.py --gb 1

Makes a Llama-like checkpoint and its re-slices, and prints how fast checksums are counted (the best of several runs,
by CPU time), and the medians of ratios to reading the same files once, in turn, page cache warm. Absolute times of a
shared machine mean little: read the ratios. Of a run with --fingerprint: `bench_transform.py --option=--fingerprint`.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import checkout  # noqa: F401 - finds the package of this checkout
import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from bench_transform import machine, shapes, specs, write_complete, write_strategies

from mindformers_ckpt.checksums import crc64
from mindformers_ckpt.checksums.shares import share_of
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.look.diff import diff
from mindformers_ckpt.look.fingerprint import fingerprint
from mindformers_ckpt.look.verify import verify
from mindformers_ckpt.look.whole import checkpoint_at
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform

_BLOCK = 8 << 20


def count_shares(repeats: int) -> None:
    """Print the speed at which the shares of row and column shards are counted."""
    whole = np.random.default_rng(0).integers(0, 1 << 16, (4096, 8192), np.uint16)
    click.echo("checksums by " + ("awscrt" if crc64.has_library() else "numpy (awscrt is not installed)"))
    for kind, box in {
        "row shard": Box((0, 0), (2048, 8192)),
        "column shard, runs of 8 KiB": Box((0, 0), (4096, 4096)),
        "column shard, runs of 4 KiB": Box((0, 0), (4096, 2048)),
        "column shard, runs of 2 KiB": Box((0, 0), (4096, 1024)),
        "column shard, runs of 1 KiB": Box((0, 0), (4096, 512)),
        "column shard, runs of 128 B": Box((0, 0), (4096, 64)),
    }.items():
        shard = np.ascontiguousarray(whole[box.slices()])
        best = min(seconds(partial(share_of, shard, box, whole.shape)) for _ in range(5 * repeats))
        click.echo(f"  {kind:28} {shard.nbytes / best / 1e9:6.2f} GB/s")


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """CPU seconds of all threads, or what another clock counts."""
    started = clock()
    work()
    return clock() - started


def read_all(*folders: Path) -> None:
    """Read every checkpoint file once, into one buffer."""
    buffer = bytearray(_BLOCK)
    for folder in folders:
        for path in sorted(folder.rglob("*.ckpt")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def compare(name: str, work: Callable[[], object], baseline: Callable[[], object], repeats: int) -> None:
    """Print the median ratio of some work to its baseline, by wall time and by CPU time."""
    ratios: dict[str, list[float]] = {"wall": [], "CPU": []}
    for _ in range(repeats):
        for kind, clock in (("wall", time.perf_counter), ("CPU", time.process_time)):
            base = seconds(baseline, clock)
            ratios[kind].append(seconds(work, clock) / base)
    click.echo(f"  {name:44} " + "  ".join(f"{kind} {statistics.median(found):5.2f}" for kind, found in ratios.items()))


@click.command()
@click.option("--gb", default=1.0, show_default=True, help="Bytes of the checkpoint, in GB.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("output/bench_trust"), show_default=True)
def main(gb: float, repeats: int, folder: Path) -> None:
    """Measure fingerprints, verify and diff."""
    shutil.rmtree(folder, ignore_errors=True)
    weights = shapes(gb)
    write_strategies(folder / "strategy", weights)
    complete, rows, columns = folder / "complete", folder / "mp8", folder / "mp4"
    write_complete(complete / "full.ckpt", specs(weights))
    strategies = {
        rows: read_strategy(folder / "strategy/mp8/ckpt_strategy_rank_0.ckpt"),
        columns: read_strategy(folder / "strategy/mp4/ckpt_strategy_rank_0.ckpt"),
    }
    for target, strategy in strategies.items():
        transform(build_plan(checkpoint_at(complete), strategy, contents="off"), target)
    click.echo(machine())
    count_shares(repeats)
    click.echo("times of reading once what is read:")
    for kind, path, known in (("complete", complete, Strategy.complete()), ("mp8", rows, strategies[rows])):
        compare(
            f"fingerprint of {kind}",
            partial(fingerprint, path, known, contents="off"),
            partial(read_all, path),
            repeats,
        )
    compare(
        "verify mp8 --against complete",
        lambda: verify(rows, strategies[rows], against=complete, contents="off"),
        lambda: read_all(rows, complete),
        repeats,
    )
    compare(
        "verify mp8 --against mp4",
        lambda: verify(rows, strategies[rows], against=columns, src_strategy=strategies[columns], contents="off"),
        lambda: read_all(rows, columns),
        repeats,
    )
    compare(
        "diff complete mp8, which are equal",
        lambda: diff(complete, rows, None, strategies[rows], contents="off"),
        lambda: read_all(complete, rows),
        repeats,
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
