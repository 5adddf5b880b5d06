"""Measure how long the ranks of a job take from `hook.load` to weights in the network.

    python tools/bench_load.py --gb 2

Four ranks (processes of this machine, MindSpore on CPU) load a checkpoint that was saved under mp8 into
networks cut as mp4, in three ways: MindSpore's `transform_checkpoints` on rank 0 followed by
`load_checkpoint` and `load_param_into_net` on every rank; our hook as the guide has it (re-sliced files are
written, then read); our hook with `auto_trans_save: False`. Imports and the making of the network are not
counted. CPU is that of all ranks and the processes that they start: it says more than the time where the ranks
share few cores. Memory is the peak of anonymous memory of the largest rank above what it held before.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkout  # noqa: F401 - finds the package of this checkout
import click

if TYPE_CHECKING:
    from mindformers_ckpt.job.cluster.cluster import Cluster

sys.path.insert(0, str(Path(__file__).parent))
from bench_transform import ours, shapes, specs, strategy_argument, take_memory, write_complete, write_strategies

RANKS = 4
WAYS: dict[str, dict[str, Any]] = {
    "MindSpore": {},
    "hook, saved": {"auto_trans_save": True},
    "hook, direct": {"auto_trans_save": False},
}
RESULT = "result: "
_PORT = 28640


def run_rank(way: str, folder: Path) -> None:
    """One rank: make the network, load it in one way, and print what it took as JSON."""
    import mindspore
    import numpy as np

    from mindformers_ckpt.formats import read_header
    from mindformers_ckpt.job.cluster.cluster import Cluster
    from mindformers_ckpt.job.config import Config
    from mindformers_ckpt.ms.hook import CheckpointHook
    from mindformers_ckpt.strategy.files import rank_file_name

    rank = int(os.environ["MS_NODE_ID"])
    memory = 2 * sum(path.stat().st_size for path in (folder / "target").rglob("*.ckpt"))  # weights, and their files
    network = mindspore.nn.Cell()
    for number, record in enumerate(
        read_header(folder / "target" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt").tensors.values()
    ):
        kind = {"bfloat16": mindspore.bfloat16, "float32": mindspore.float32, "int32": mindspore.int32}
        tensor = mindspore.Tensor(np.zeros(record.spec.shape, np.float32), kind[record.spec.dtype.name])
        network.insert_param_to_cell(f"p{number}", mindspore.Parameter(tensor, name=record.spec.name), False)
    strategy = folder / "strategy" / "mp4" / rank_file_name(0)
    if way == "MindSpore":
        cluster = Cluster.from_environment(600)
        start_together(cluster, memory)
        before, peak = watch_memory()
        started, cpu = time.perf_counter(), cpu_seconds()
        if rank == 0:
            mindspore.transform_checkpoints(
                str(folder / "source"),
                str(folder / "mindspore"),
                "checkpoint_",
                strategy_argument(folder / "strategy", "mp8"),
                str(strategy),
            )
        cluster.barrier("transformed")
        loaded = mindspore.load_checkpoint(str(folder / "mindspore" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"))
        mindspore.load_param_into_net(network, loaded)
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
        cluster.barrier("loaded")
        cluster.close()
    else:
        config = Config(
            load_checkpoint=str(folder / "source"),
            src_strategy_path_or_dir=strategy_argument(folder / "strategy", "mp8"),
            auto_trans_ckpt=True,
            transform_process_num=2,
            output_dir=str(folder / "output"),
            **WAYS[way],
        )
        hook = CheckpointHook(config)
        hook.prepare()
        shutil.copy(strategy, hook.strategy_dir / rank_file_name(rank))
        start_together(hook.cluster, memory)
        before, peak = watch_memory()
        started, cpu = time.perf_counter(), cpu_seconds()
        hook.load(network)
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    own = sum(parameter.nbytes for parameter in network.get_parameters())
    tell({"seconds": seconds, "cpu": cpu, "private": max(peak) - before, "own": own})


def tell(found: Mapping[str, object]) -> None:
    """Print what a rank measured, for `run_job`."""
    print(f"\n{RESULT}{json.dumps(found)}", flush=True)


def start_together(cluster: Cluster, memory: int) -> None:
    """Wait for all ranks, with this many bytes of memory at hand."""
    if cluster.rank == 0:
        take_memory(memory)
    cluster.barrier("start")


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _anonymous_bytes() -> int:
    """The anonymous memory of this process; unlike a walk over its mappings, reading it does not hold it up."""
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("RssAnon:")) << 10


def watch_memory() -> tuple[int, list[int]]:
    """The anonymous memory of this process now, and a list that a thread fills with what it is from now on."""
    before = _anonymous_bytes()
    seen = [before]

    def watch() -> None:
        while True:
            seen.append(_anonymous_bytes())
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    return before, seen


def run_job(way: str, folder: Path, port: int, script: str = __file__) -> list[dict[str, Any]]:
    """All ranks in one way, each by `script`. Raises RuntimeError when one fails."""
    shutil.rmtree(folder / "output", ignore_errors=True)
    shutil.rmtree(folder / "mindspore", ignore_errors=True)
    os.sync()
    common = {**os.environ, "GLOG_v": "3", "MS_WORKER_NUM": str(RANKS), "MS_ROLE": "MS_WORKER"}
    common |= {"MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(port), "RANK_SIZE": str(RANKS)}
    command = [sys.executable, script, "--rank-way", way, "--folder", str(folder)]
    # Into files: a rank whose output nobody reads would stop in the middle.
    outputs = [folder / f"rank_{rank}.out" for rank in range(RANKS)]
    processes = []
    for rank, output in enumerate(outputs):
        env = {**common, "MS_NODE_ID": str(rank), "RANK_ID": str(rank)}
        with output.open("wb") as stream:
            processes.append(subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT))
    for process in processes:
        process.wait()
    said = [output.read_text(encoding="utf-8", errors="replace") for output in outputs]
    for process, text in zip(processes, said):
        if process.returncode:
            raise RuntimeError(f"{way} failed: {text[-2000:]}")
    return [
        json.loads(next(line for line in text.splitlines() if line.startswith(RESULT))[len(RESULT) :]) for text in said
    ]


@click.command()
@click.option("--gb", default=2.0, show_default=True, help="Unique bytes of the checkpoint, in GB.")
@click.option("--repeats", default=3, show_default=True, help="Runs of our ways; MindSpore runs once.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("output/bench_load"), show_default=True)
@click.option("--rank-way", hidden=True)
def main(gb: float, repeats: int, folder: Path, rank_way: str | None) -> None:
    """Measure loading and print a table."""
    folder = folder.absolute()
    if rank_way:
        run_rank(rank_way, folder)
        return
    shutil.rmtree(folder, ignore_errors=True)
    weights = shapes(gb)
    write_strategies(folder / "strategy", weights)
    write_complete(folder / "complete" / "rank_0" / "full.ckpt", specs(weights))
    for name, strategy in (("source", "mp8"), ("target", "mp4")):
        target = strategy_argument(folder / "strategy", strategy)
        subprocess.run(ours(folder / "complete", "None", folder / name, target), check=True)
    shutil.rmtree(folder / "complete")
    slowest: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    for number in range(repeats):
        for position, way in enumerate(WAYS):
            if way == "MindSpore" and number:
                continue
            ranks = run_job(way, folder, _PORT + 10 * number + position)
            slowest.setdefault(way, []).append(max(rank["seconds"] for rank in ranks))
            cpu.setdefault(way, []).append(sum(rank["cpu"] for rank in ranks))
            memory[way] = max(memory.get(way, 0.0), *(rank["private"] / 1e6 for rank in ranks))
            own = max(rank["own"] for rank in ranks) / 1e6
    reference = slowest["MindSpore"][0]
    click.echo(f"{gb:.1f} GB, mp8 -> {RANKS} ranks (mp4), {own:.0f} MB of weights a rank")
    click.echo("way             seconds   CPU seconds   MindSpore / this   MB above the start")
    for way, seconds in slowest.items():
        median, used = sorted(seconds)[len(seconds) // 2], sorted(cpu[way])[len(seconds) // 2]
        click.echo(f"{way:<14} {median:8.2f} {used:13.2f} {reference / median:18.1f} {memory[way]:20.0f}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
