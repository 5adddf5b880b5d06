"""Measure how fast the system copies into and out of buffers aligned differently from their place in the file.

    python tools/bench_alignment.py

Prints CPU seconds for 1 GB of reads and of writes by 1 MiB, page cache warm, by the distance of the buffer's
first byte from the beginning of a page; the file is read and written from the beginning of a page.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import checkout  # noqa: F401 - finds the package of this checkout
import click

sys.path.insert(0, str(Path(__file__).parent))
from bench_transform import machine

_SIZE, _CALL, _PAGE, _REPEATS = 1 << 30, 1 << 20, 4096, 4
_DISTANCES = (0, 1, 8, 16, 31, 32, 64, 2048, _PAGE - 64, _PAGE - 31, _PAGE - 16)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("output"), show_default=True)
def main(folder: Path) -> None:
    """Measure, and print a table."""
    folder.mkdir(parents=True, exist_ok=True)
    memory = memoryview(mmap.mmap(-1, _CALL + 2 * _PAGE))
    click.echo(f"{machine()}\nbuffer begins behind a page by   read s   write s")
    with tempfile.TemporaryFile(dir=folder) as file:
        descriptor = file.fileno()
        write = _pass(lambda view, at: os.pwrite(descriptor, view, at))
        read = _pass(lambda view, at: os.preadv(descriptor, [view], at))
        write(memory[:_CALL])
        for distance in _DISTANCES:
            view = memory[distance : distance + _CALL]
            best = (min(way(view) for _ in range(_REPEATS)) for way in (read, write))
            click.echo(f"{distance:25d} bytes" + "".join(f"{seconds:10.3f}" for seconds in best))


def _pass(call: Callable[[memoryview, int], int]) -> Callable[[memoryview], float]:
    """One pass over the file: CPU seconds, for a buffer."""

    def run(view: memoryview) -> float:
        started = time.process_time()
        for at in range(0, _SIZE, _CALL):
            call(view, at)
        return time.process_time() - started

    return run


if __name__ == "__main__":
    main()
