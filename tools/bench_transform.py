"""Measure re-slicing: MindSpore's tools, ours, and `cp` of the target's bytes, in turn, in one run.

    python tools/bench_transform.py --gb 1

Makes a Llama-like checkpoint (bf16 weights, fp32 Adam moments) of the wanted size, cuts it for the source
strategy, and runs every way as a whole process, process start included, page cache warm. Prints medians of
wall time, CPU time and peak private memory (sampled over the process tree), and the median of the ratios to
the `cp -r` of the same round, of a folder with the target's bytes. Absolute times of a shared machine mean
little: read the ratios.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401 - finds the package of this checkout
import click
import numpy as np
import psutil

from mindformers_ckpt.formats import TensorSpec, layout_file
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import merge_strategies, rank_file_name, write_strategy

DIRECTIONS = ("full:mp8", "mp8:full", "dp2mp2pp2:mp8", "mp4:mp8", "mp8:mp2pp4")
STRATEGIES = {
    "mp8": {"dp": 1, "mp": 8, "pp": 1},
    "mp4": {"dp": 1, "mp": 4, "pp": 1},
    "mp2pp4": {"dp": 1, "mp": 2, "pp": 4},
    "dp2mp2pp2": {"dp": 2, "mp": 2, "pp": 2},
}
LAYERS = 16
# Axis that cuts each weight, by dimension, as MindFormers cuts a Llama.
CUTS = {
    "attention.wq.weight": ("mp", None),
    "attention.wk.weight": ("mp", None),
    "attention.wv.weight": ("mp", None),
    "attention.wo.weight": (None, "mp"),
    "feed_forward.w1.weight": ("mp", None),
    "feed_forward.w2.weight": (None, "mp"),
    "feed_forward.w3.weight": ("mp", None),
    "attention_norm.weight": (None,),
    "ffn_norm.weight": (None,),
}
_SAMPLE_SECONDS = 0.05


# Modules are compiled once, as they are where a package is installed.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


class Measured(NamedTuple):
    """One run of a command: seconds of wall and CPU, bytes of private memory (of all processes, of the largest)."""

    wall: float
    cpu: float
    private: int
    largest: int


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """Weights of a Llama-like model whose weights (2 bytes) and moments (2 x 4 bytes) take `gigabytes`."""
    wanted = gigabytes * 1e9 / 10
    # A layer has 4 h*h + 3 h*f weights with f = 2.75 h; the embedding and the head 32 h*h together.
    hidden = max(256, int((wanted / (LAYERS * 12.25 + 32)) ** 0.5) // 256 * 256)
    ffn = hidden * 11 // 4 // 8 * 8
    by_name_ = {
        "attention.wq.weight": (hidden, hidden),
        "attention.wk.weight": (hidden, hidden),
        "attention.wv.weight": (hidden, hidden),
        "attention.wo.weight": (hidden, hidden),
        "feed_forward.w1.weight": (ffn, hidden),
        "feed_forward.w2.weight": (hidden, ffn),
        "feed_forward.w3.weight": (ffn, hidden),
        "attention_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
    }
    found: dict[str, tuple[int, ...]] = {}
    rows = max(256, int((wanted - LAYERS * 12.25 * hidden**2) / (2 * hidden)) // 64 * 64)
    found["model.tok_embeddings.embedding_weight"] = (rows, hidden)
    for layer in range(LAYERS):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in by_name_.items()}
    found["model.norm_out.weight"] = (hidden,)
    found["lm_head.weight"] = (rows, hidden)
    return found


def specs(weights: Mapping[str, tuple[int, ...]]) -> list[TensorSpec]:
    """Weights, their Adam moments, and a step counter that no strategy names."""
    listed = [TensorSpec(name, by_name("bfloat16"), shape) for name, shape in weights.items()]
    for moment in ("adam_m", "adam_v"):
        listed += [TensorSpec(f"{moment}.{name}", by_name("float32"), shape) for name, shape in weights.items()]
    return [*listed, TensorSpec("global_step", by_name("int32"), (1,))]


def write_complete(path: Path, tensors: list[TensorSpec]) -> None:
    """A complete checkpoint with random contents."""
    layout = layout_file("ckpt", tensors)
    pattern = np.random.default_rng(0).integers(0, 256, 64 << 20, dtype=np.uint8).data
    path.parent.mkdir(parents=True)
    with path.open("wb") as stream:
        os.ftruncate(stream.fileno(), layout.size)
        for offset, data in layout.frames:
            os.pwrite(stream.fileno(), data, offset)
        for number, record in enumerate(layout.tensors.values()):
            for segment in record.segments:
                written = 0
                while written < segment.length:
                    start = (number * 7919 + written) % (32 << 20)
                    count = min(segment.length - written, 32 << 20)
                    os.pwrite(stream.fileno(), pattern[start : start + count], segment.offset + written)
                    written += count


def write_strategies(folder: Path, weights: Mapping[str, tuple[int, ...]]) -> None:
    """The strategy folders of all strategies; those of a pipeline have a merged file, too."""
    for strategy, mesh in STRATEGIES.items():
        axes = {"dp": mesh["dp"], "mp": mesh["mp"]}
        for stage in range(mesh["pp"]):
            layouts: dict[str, Layout] = {}
            for name in weights:
                if stage_of(name, mesh["pp"]) == stage:
                    layout = Layout.on(axes, *CUTS.get(name.split(".", 3)[-1], ("mp", None)[: len(weights[name])]))
                    layout = Layout.on(axes, None) if len(weights[name]) == 1 else layout
                    layouts |= {f"{prefix}{name}": layout for prefix in ("", "adam_m.", "adam_v.")}
            size = mesh["dp"] * mesh["mp"]
            for rank in range(stage * size, (stage + 1) * size):
                write_strategy(layouts, folder / strategy / rank_file_name(rank), stage)
        if mesh["pp"] > 1:
            merge_strategies(folder / strategy, folder / strategy / "merged.ckpt")


def stage_of(name: str, stages: int) -> int:
    """The pipeline stage of a weight: layers spread evenly, embedding first, head last."""
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) * stages // LAYERS
    return 0 if "tok_embeddings" in name else stages - 1


def strategy_argument(folder: Path, strategy: str) -> str:
    """The strategy as the tools take it: merged with a pipeline, any rank's file without, "None" for complete."""
    if strategy == "full":
        return "None"
    return str(folder / strategy / ("merged.ckpt" if STRATEGIES[strategy]["pp"] > 1 else rank_file_name(0)))


def take_memory(wanted: int) -> None:
    """Have free memory touched, just before something is measured that will need this many bytes.

    Many virtual machines hand free memory back to their host, and get it again page by page when it is touched:
    then the same copy takes three times as long, after a pause of a few seconds.
    """
    free = int(min(wanted, 0.9 * psutil.virtual_memory().free))
    subprocess.run([sys.executable, "-c", f"b'.' * {free}"], check=True)


def measure(command: list[str], memory: int) -> Measured:
    """Run a command to its end and watch its processes; `memory` is for `take_memory`.

    Raises RuntimeError when it fails.
    """
    os.sync()
    take_memory(memory)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = os.pidfd_open(process.pid)
    peak = largest = 0
    while not select.select([end], [], [], _SAMPLE_SECONDS)[0]:
        sizes = [private_bytes(pid) for pid in tree(process.pid)]
        peak, largest = max(peak, sum(sizes)), max(largest, *sizes, 0)
    wall = time.perf_counter() - started
    os.close(end)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        assert process.stderr is not None
        raise RuntimeError(f"{command[:6]} failed: {process.stderr.read().decode()[-2000:]}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, peak, largest)


def evict(folder: Path) -> None:
    """Write a folder to the disk and take it out of the page cache, which has better use for the room."""
    for path in folder.rglob("*.*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def tree(root: int) -> Iterator[int]:
    """A process and its descendants, as far as they are there. Cheap: it runs beside what is measured."""
    yield root
    for children in Path(f"/proc/{root}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                yield from tree(int(child))


def private_bytes(pid: int) -> int:
    """Private_Clean and Private_Dirty of a process; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as stream:
            return sum(int(line.split()[1]) << 10 for line in stream if line.startswith("Private_"))
    except OSError:
        return 0


def ours(source: Path, src_strategy: str, target: Path, dst_strategy: str, *options: str) -> list[str]:
    """The command line of our transform."""
    program = [sys.executable, "-m", "mindformers_ckpt", "transform", "--quiet", *options]
    paths = ["--src_checkpoint", str(source), "--src_strategy", src_strategy]
    return [*program, *paths, "--dst_checkpoint_dir", str(target), "--dst_strategy", dst_strategy]


_MINDSPORE = """
import glob, json, os, sys
import mindspore as ms
source, src, target, dst, way, format = json.loads(sys.argv[1])
if way == "all":
    extra = {"output_format": "safetensors"} if format == "safetensors" else {}
    ms.transform_checkpoints(source, target, "checkpoint_", src, dst, **extra)
else:
    files = {int(f.split("rank_")[-1].split("/")[0]): f for f in glob.glob(source + "/rank_*/*.ckpt")}
    for rank in range(way):
        os.makedirs(f"{target}/rank_{rank}")
        needed = ms.rank_list_for_transform(rank, src, dst)
        ms.transform_checkpoint_by_rank(
            rank, {r: files[r] for r in needed}, f"{target}/rank_{rank}/checkpoint_{rank}.ckpt", src, dst)
"""


def incumbent(source: Path, src: str, target: Path, dst: str, way: object, format: str) -> list[str]:
    """MindSpore's own tool: "all" ranks at once, or by rank for the given number of ranks."""
    values = [str(source), None if src == "None" else src, str(target), None if dst == "None" else dst, way, format]
    return [sys.executable, "-c", _MINDSPORE, json.dumps(values)]


@click.command()
@click.option("--gb", default=1.0, show_default=True, help="Unique bytes of the checkpoint, in GB.")
@click.option("--direction", "directions", multiple=True, type=click.Choice(DIRECTIONS), help="Default: all.")
@click.option("--format", "formats", multiple=True, type=click.Choice(["ckpt", "safetensors"]), help="Default: ckpt.")
@click.option("--repeats", default=3, show_default=True, help="Runs of ours and of cp; the incumbent runs once.")
@click.option("--processes", default="1,2", show_default=True, help="Process numbers of ours.")
@click.option("--option", "options", multiple=True, help="Further ways of ours, e.g. --option=--hash.")
@click.option("--incumbent/--no-incumbent", "with_incumbent", default=True, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("output/bench"), show_default=True)
def main(
    gb: float,
    directions: tuple[str, ...],
    formats: tuple[str, ...],
    repeats: int,
    processes: str,
    options: tuple[str, ...],
    with_incumbent: bool,
    folder: Path,
) -> None:
    """Measure re-slicing and print a table."""
    shutil.rmtree(folder, ignore_errors=True)
    weights = shapes(gb)
    tensors = specs(weights)
    write_strategies(folder / "strategy", weights)
    click.echo(f"{sum(spec.nbytes for spec in tensors) / 1e9:.2f} GB unique in {len(tensors)} tensors; {machine()}")
    header = "direction          format       way                 wall s   x cp    CPU s  private MB (largest)"
    click.echo(f"{header}\n{'-' * len(header)}")
    for format in formats or ("ckpt",):
        write_complete(folder / "complete" / "rank_0" / "full.ckpt", tensors)
        for direction in directions or DIRECTIONS:
            one_direction(folder, direction, format, repeats, processes, options, with_incumbent)
        shutil.rmtree(folder / "complete")
    shutil.rmtree(folder)


def one_direction(
    folder: Path,
    direction: str,
    format: str,
    repeats: int,
    processes: str,
    options: tuple[str, ...],
    with_incumbent: bool,
) -> None:
    """Measure one direction in one format, the ways in turn, and print its rows."""
    source_name, target_name = direction.split(":")
    strategies = folder / "strategy"
    src, dst = strategy_argument(strategies, source_name), strategy_argument(strategies, target_name)
    complete, source, target, copy = (folder / name for name in ("complete", "source", "target", "copy"))
    make = ours(complete, "None", source, src, "--format", format)
    subprocess.run(make, check=True)
    ways = {
        f"{count} process{'es' if count != '1' else ''}": ["--transform_process_num", count]
        for count in processes.split(",")
    }
    ways |= {f"2, {option}": ["--transform_process_num", "2", *option.split()] for option in options}
    results: dict[str, list[Measured]] = {}
    subprocess.run(ours(source, src, copy, dst, "--format", format), check=True)
    evict(complete)
    commands = {way: ours(source, src, target, dst, "--format", format, *words) for way, words in ways.items()}
    commands["cp -r"] = ["cp", "-r", str(copy), str(target)]
    memory = sum(path.stat().st_size for path in copy.rglob("*.*")) * 5 // 4
    for _ in range(repeats):
        for way, command in commands.items():
            results.setdefault(way, []).append(measure(command, memory))
            shutil.rmtree(target)
    if with_incumbent:
        evict(copy)  # MindSpore compares a file with the memory that holds nothing, and a page cache is something
        count = 1 if dst == "None" else int(np.prod(list(STRATEGIES[target_name].values())))
        for way, how in {"MindSpore": "all", **({"MindSpore by rank": count} if format == "ckpt" else {})}.items():
            try:
                results[way] = [measure(incumbent(source, src, target, dst, how, format), memory)]
            except RuntimeError as error:
                click.echo(f"{direction:<18} {format:<12} {way:<18} refused: {str(error).splitlines()[-1][:200]}")
            shutil.rmtree(target, ignore_errors=True)
    for used in (source, copy):
        shutil.rmtree(used)
    for way, runs in results.items():
        wall, cpu = (statistics.median(run[part] for run in runs) for part in (0, 1))
        ratio = statistics.median(run.wall / copied.wall for run, copied in zip(runs, results["cp -r"]))
        private, largest = max(run.private for run in runs) >> 20, max(run.largest for run in runs) >> 20
        click.echo(
            f"{direction:<18} {format:<12} {way:<18} {wall:7.2f} {ratio:6.2f} {cpu:8.2f} {private:8d} ({largest})"
        )


def machine() -> str:
    """One line about the machine."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "unknown processor",
    )
    memory = psutil.virtual_memory().total / 1e9
    return (
        f"{os.cpu_count()} cores ({model}), {memory:.0f} GB, Linux {os.uname().release}, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
