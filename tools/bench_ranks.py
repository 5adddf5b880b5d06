"""How a rank of a job starts on a source of many rank files (tools/bench_storage.py --ranks N).

Eight ranks of a job, each on a node of its own: a slow mount of the same folder. Rank 0 looks at the files and plans,
and the others are told what is their own (`auto_trans_save: False`). Seconds of rank 0 are from the meeting to the
plan, those of the others from being told to the first block. "Heads" are the reads before that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import checkout  # noqa: F401 - finds the package of this checkout
import click
from bench_transform import ours, shapes, specs, strategy_argument, write_complete, write_strategies
from quickstart import free_port
from slow_mount import CONTROL, STATS, mounted

from mindformers_ckpt import Layout
from mindformers_ckpt.strategy.files import rank_file_name, write_strategy

_GB = 0.02  # of the checkpoint that the files of four ranks are cut from
_SECONDS = 300.0
_JOB = 8  # ranks that start


def make_source(folder: Path, ranks: int) -> None:
    """A source of so many ranks, four of which differ, the others being links to them; and its strategy."""
    weights = shapes(_GB)
    write_strategies(folder / "strategy", weights)
    write_complete(folder / "complete" / "rank_0" / "full.ckpt", specs(weights))
    target = strategy_argument(folder / "strategy", "mp4")
    subprocess.run(ours(folder / "complete", "None", folder / "ranks", target), check=True)
    for rank in range(4, ranks):
        (file,) = (folder / "ranks" / f"rank_{rank % 4}").glob("*.ckpt")
        (folder / "ranks" / f"rank_{rank}").mkdir()
        os.link(file, folder / "ranks" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
    for name, mesh in {"many": {"dp": ranks // 4, "mp": 4}, "job": {"mp": _JOB}}.items():
        layouts: dict[str, Layout] = {}
        for tensor, shape in weights.items():
            layout = Layout.on(mesh, *(("mp", None) if len(shape) > 1 else (None,)))
            layouts |= {f"{prefix}{tensor}": layout for prefix in ("", "adam_m.", "adam_v.")}
        (folder / "strategy" / name).mkdir()
        write_strategy(layouts, folder / "strategy" / name / rank_file_name(0))


def report_ranks(folder: Path, ranks: int, latency_ms: float) -> None:
    """Measure the start of ranks on slow mounts, and print its rows."""
    data = folder / "data"
    data.mkdir(parents=True)
    make_source(data, ranks)
    port = free_port()
    with ExitStack() as stack:
        mounts = [
            stack.enter_context(
                mounted(data, folder / f"node{rank}", scratch=folder / f"scratch{rank}", latency_ms=latency_ms)
            )
            for rank in range(_JOB)
        ]
        processes = []
        for rank, mount in enumerate(mounts):
            command = [sys.executable, __file__, str(rank), str(port), str(mount.mountpoint)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        told = [json.loads(process.communicate(timeout=_SECONDS)[0]) for process in processes]
    header = "rank                  opens  names   heads  seconds"
    click.echo(
        f"a source of {ranks} rank files, {latency_ms:g} ms a request, {_JOB} ranks\n{header}\n{'-' * len(header)}"
    )
    names = ["0, plans for all", *(f"{rank}, is told" for rank in range(1, _JOB))]
    for name, (seconds, asked) in zip(names, told):
        looked = asked["stats"] + asked["listings"]
        click.echo(f"{name:<20} {asked['opens']:6d} {looked:6d} {asked['reads']:7d} {seconds:8.2f}")


def be_rank(rank: int, port: int, root: Path) -> tuple[float, dict[str, int]]:
    """Take part in the job; seconds as the head of this file says, and what was asked of the file system by then."""
    from mindformers_ckpt.job.cluster.cluster import Cluster
    from mindformers_ckpt.job.cluster.messages import Address
    from mindformers_ckpt.job.config import Config
    from mindformers_ckpt.job.direct import read_direct
    from mindformers_ckpt.job.reslice import Reslicing
    from mindformers_ckpt.strategy.files import read_strategy

    keys = {
        "load_checkpoint": str(root / "ranks"),
        "src_strategy_path_or_dir": str(root / "strategy" / "many" / rank_file_name(0)),
        "auto_trans_ckpt": True,
        "auto_trans_save": False,
    }
    target = read_strategy(Path(os.path.realpath(root.parent / "data")) / "strategy" / "job" / rank_file_name(0))
    with Cluster.connect(rank, _JOB, Address("127.0.0.1", port), _SECONDS, node=f"node {rank}") as cluster:
        started = time.perf_counter()
        reslicing = Reslicing(Config.from_mapping(keys), cluster, cast(Any, None), target)
        reslicing.look()
        own = reslicing.own_plan()
        assert own is not None
        seconds = time.perf_counter() - started
        (root / CONTROL).write_text("dump", encoding="ascii")
        asked = json.loads((root.parent / f"scratch{rank}" / STATS).read_text(encoding="ascii"))
        if rank > 0:
            checks = [time.perf_counter()]
            next(read_direct(own.plan, lambda: checks.append(time.perf_counter()), own.headers))
            seconds = (checks[2:] or [time.perf_counter()])[0] - checks[0]  # it is called before every request
        cluster.barrier("measured")
    return seconds, asked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A rank of bench_storage.py --ranks, which starts it.")
    parser.add_argument("rank", type=int)
    parser.add_argument("port", type=int)
    parser.add_argument("root", type=Path)
    options = parser.parse_args()
    print(json.dumps(be_rank(options.rank, options.port, options.root)))
