"""Measure how long the ranks of a job take to load a checkpoint 2.0 that was saved under another layout.

    .venv-mindformers-2.1.0/bin/python tools/bench_load2.py --gb 2

Four ranks (processes of this machine, MindSpore on CPU) load weights and moments that another job saved (`--source`:
eight ranks, mp8 or two stages of dp2 mp2, or one card) into a network and an optimizer cut as mp4, in three ways, in
turn, each round in another order:

    MindFormers   its own `load_checkpoint` of checkpoint 2.0
    install()     the same call, with our engine under it
    hook          `CheckpointHook.load`, with `auto_trans_save: False`

The files are in the page cache; with `--latency` they are on storage that answers every request so many milliseconds
late, as one behind a network does (`tools/slow_mount.py`), mounted anew for every run.

Needs the environment that `bash tools/test_mindformers.sh` makes. MindSpore compiles no parallel network on a CPU: the
layouts that MindFormers asks it for are made by hand, and the ranks' numbers come from the environment. Imports and the
making of the network are not counted. What every rank holds in the end is compared between the ways, byte for byte.
CPU is that of all ranks. Memory is the peak of anonymous memory of the largest rank above what it held before.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import checkout  # noqa: F401 - finds the package of this checkout
import click
from bench_load import RANKS, cpu_seconds, run_job, start_together, tell, watch_memory
from bench_transform import ours, shapes, specs, strategy_argument, write_complete, write_strategies
from slow_mount import mounted, why_not

from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.integrations.mindformers import check_installed
from mindformers_ckpt.strategy.files import rank_file_name, read_strategy
from mindformers_ckpt.strategy.model import Strategy

WAYS = ("MindFormers", "install()", "hook")
TARGET = "mp4"
_PORT = 28740


def run_rank(way: str, folder: Path) -> None:
    """One rank: make the network and the optimizer, load them in one way, and print what it took as JSON."""
    import mindspore

    from mindformers_ckpt.job.cluster.cluster import Cluster

    os.environ["LOG_MF_PATH"] = str(folder / "log")
    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU")
    rank = int(os.environ["RANK_ID"])
    whole = {spec.name: spec for spec in _tensors(json.loads((folder / "gb.json").read_text()))}
    strategy = read_strategy(strategy_argument(folder / "strategy", TARGET))
    network, optimizer = _cells(mindspore, whole, strategy, rank)
    memory = 2 * sum(path.stat().st_size for path in (folder / "saved").rglob("*.safetensors"))
    if way == "hook":
        cluster, load = _hook(folder, rank, network, optimizer)
    else:
        cluster = Cluster.from_environment(600)
        load = _their_loading(way, mindspore, folder, whole, strategy)
    start_together(cluster, memory)
    before, peak = watch_memory()
    started, cpu = time.perf_counter(), cpu_seconds()
    load(network, optimizer)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    tell({"seconds": seconds, "cpu": cpu, "private": max(peak) - before, **_held(optimizer)})
    if way != "hook":
        cluster.barrier("loaded")
        cluster.close()


def _tensors(gb: float) -> list[TensorSpec]:
    """The weights and their moments."""
    return [spec for spec in specs(shapes(gb)) if spec.name != "global_step"]


def _cells(mindspore: Any, whole: Mapping[str, Any], strategy: Strategy, rank: int) -> tuple[Any, Any]:
    """A network of weights, and an optimizer that has them, their moments and the step."""
    import numpy as np

    network, optimizer = mindspore.nn.Cell(), mindspore.nn.Cell()
    optimizer.update_parameters_name = lambda *arguments, **options: None
    for number, (name, spec) in enumerate(whole.items()):
        layout = strategy.layout(name, 0)
        shape = spec.shape if layout is None else layout.box(spec.shape, rank).shape
        start = mindspore.Tensor(np.zeros(shape, np.float32), getattr(mindspore, spec.dtype.name))
        parameter = mindspore.Parameter(start, name=name)
        if name.startswith(("model.", "lm_head.")):
            network.insert_param_to_cell(f"p{number}", parameter, False)
        optimizer.insert_param_to_cell(f"p{number}", parameter, False)
    return network, optimizer


def _their_loading(
    way: str, mindspore: Any, folder: Path, whole: Mapping[str, Any], strategy: Strategy
) -> Callable[[Any, Any], Any]:
    """MindFormers' call, with ours under it or not; the layouts are those of a compiled network."""
    from mindformers.checkpoint import checkpoint, layout_adapter

    infos = {}
    for name, layout in strategy.stages[0].items():
        axes = [f"axis_{number}" for number in range(len(layout.device_matrix))]
        made = mindspore.Layout(layout.device_matrix, tuple(axes), list(range(RANKS)))
        rows = [tuple(axes[len(axes) - 1 - axis] for axis in cut) or "None" for cut in layout.tensor_map]
        infos[name] = [made(*rows), getattr(mindspore, whole[name].dtype.name), whole[name].shape]
    layout_adapter.get_context = lambda key: mindspore.GRAPH_MODE
    layout_adapter.get_strategy_metadata = lambda network: dict.fromkeys(range(RANKS), infos)
    if way == "install()":
        from mindformers_ckpt.integrations import checkpoint2
        from mindformers_ckpt.mindformers import install

        install()
        assert checkpoint2.replaced()
    return lambda network, optimizer: checkpoint.load_checkpoint(str(folder / "source"), network, optimizer)


def _hook(folder: Path, rank: int, network: Any, optimizer: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    import mindformers_ckpt.ms.loading  # noqa: F401 - imports are not counted
    from mindformers_ckpt.job.config import Config
    from mindformers_ckpt.ms.hook import CheckpointHook

    hook = CheckpointHook(
        Config(
            load_checkpoint=str(folder / "source"),
            auto_trans_ckpt=True,
            auto_trans_save=False,
            output_dir=str(folder / "output"),
        )
    )
    hook.prepare()
    shutil.copy(strategy_argument(folder / "strategy", TARGET), hook.strategy_dir / rank_file_name(rank))
    return hook.cluster, hook.load


def _held(optimizer: Any) -> dict[str, Any]:
    """The bytes of a rank, and what all of them are, in short."""
    import xxhash

    digest, own = xxhash.xxh3_128(), 0
    for parameter in sorted(optimizer.get_parameters(), key=lambda found: str(found.name)):
        content = parameter.get_bytes()
        digest.update(parameter.name.encode())
        digest.update(content)
        own += len(content)
    return {"own": own, "digest": digest.hexdigest()}


@contextmanager
def _storage(folder: Path, latency: float) -> Iterator[None]:
    """Have the checkpoint in `source`: the files themselves, or what slow storage shows of them."""
    source = folder / "source"
    if not latency:
        source.symlink_to(folder / "saved")
        yield
        source.unlink()
        return
    with TemporaryDirectory() as scratch, mounted(folder / "saved", source, scratch=Path(scratch), latency_ms=latency):
        yield


@click.command()
@click.option("--gb", default=2.0, show_default=True, help="Unique bytes of the checkpoint, in GB.")
@click.option("--source", default="mp8", show_default=True, type=click.Choice(["mp8", "dp2mp2pp2", "full"]))
@click.option("--repeats", default=3, show_default=True, help="Rounds of all ways, each in another order.")
@click.option("--latency", default=0.0, show_default=True, help="Milliseconds that storage takes for a request.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("output/bench_load2"), show_default=True)
@click.option("--rank-way", hidden=True)
def main(gb: float, source: str, repeats: int, latency: float, folder: Path, rank_way: str | None) -> None:
    """Measure loading and print a table."""
    try:
        check_installed()
    except ConfigError:
        raise click.ClickException(
            "MindFormers is not in this environment: `bash tools/test_mindformers.sh` makes one that has it; run this "
            "with .venv-mindformers-2.1.0/bin/python"
        ) from None
    folder = folder.absolute()
    if rank_way:
        run_rank(rank_way, folder)
        return
    reason = why_not() if latency else None
    if reason:
        raise click.ClickException(f"no slow file system can be mounted here: {reason}")
    shutil.rmtree(folder, ignore_errors=True)
    write_strategies(folder / "strategy", shapes(gb))
    (folder / "gb.json").write_text(json.dumps(gb))
    write_complete(folder / "complete" / "rank_0" / "full.ckpt", _tensors(gb))
    target = strategy_argument(folder / "strategy", source)
    subprocess.run(ours(folder / "complete", "None", folder / "saved", target, "--format", "checkpoint2"), check=True)
    shutil.rmtree(folder / "complete")
    runs: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
    for number in range(repeats):
        for position, way in enumerate(WAYS[number % 3 :] + WAYS[: number % 3]):
            with _storage(folder, latency):
                runs[way].append(run_job(way, folder, _PORT + 10 * number + position, __file__))
    held = {tuple(rank["digest"] for rank in ranks) for found in runs.values() for ranks in found}
    if len(held) != 1:
        raise click.ClickException("the ways do not give the same bytes")
    own = max(rank["own"] for rank in runs["hook"][0]) / 1e6
    where = f"{latency:g} ms a request" if latency else "page cache"
    click.echo(
        f"{gb:.1f} GB, {source} -> {RANKS} ranks ({TARGET}), {own:.0f} MB a rank, {where}; all hold the same bytes"
    )
    click.echo("way           seconds   CPU seconds   MindFormers / this   MB above the start")
    slowest = {way: [max(rank["seconds"] for rank in ranks) for ranks in found] for way, found in runs.items()}
    for way, found in runs.items():
        cpu = statistics.median(sum(rank["cpu"] for rank in ranks) for ranks in found)
        ratio = statistics.median(theirs / this for theirs, this in zip(slowest["MindFormers"], slowest[way]))
        memory = max(rank["private"] for ranks in found for rank in ranks) / 1e6
        click.echo(f"{way:<12} {statistics.median(slowest[way]):8.2f} {cpu:13.2f} {ratio:20.1f} {memory:20.0f}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
