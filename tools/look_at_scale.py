"""How long `mindformers-ckpt inspect` takes for a large checkpoint.

    python tools/look_at_scale.py                 # 1,024 ranks of a DeepSeek-V3 with optimizer, 9.9 TB
    python tools/look_at_scale.py --ranks 2048

The files are sparse: their headers are real, and the ranks of a stage share one file by hard links (see
simulate_scale.py). The command is run once to warm the page cache, then as often as --repeats says; seconds are those
on the clock and of the processor, start of Python included.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import checkout  # noqa: F401 - finds the package of this checkout
import click
from simulate_scale import mesh_of, strategy_of, write_source

from mindformers_ckpt.strategy.files import rank_file_name, write_strategy


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("output/look"), show_default=True)
@click.option("--ranks", default=1024, show_default=True)
@click.option("--stages", default=8, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(folder: Path, ranks: int, stages: int, repeats: int) -> None:
    """Make the checkpoint, look at it, print seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    strategy = strategy_of(mesh_of(ranks, stages))
    write_source(folder / "ckpt", strategy)
    for stage, layouts in enumerate(strategy.stages):
        write_strategy(layouts, folder / "strategy" / rank_file_name(stage * strategy.stage_size), stage)
    command = [sys.executable, "-m", "mindformers_ckpt", "inspect", str(folder / "ckpt")]
    for number in range(repeats + 1):
        before, started = os.times(), time.perf_counter()
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, after = time.perf_counter() - started, os.times()
        processor = sum(after[2:4]) - sum(before[2:4])
        click.echo(f"{'cold' if number == 0 else 'warm'}: {seconds:.2f} s, {processor:.2f} s of the processor")
    click.echo("\n".join(said.splitlines()[:12]))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
