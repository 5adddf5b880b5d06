"""Ranks on several nodes that load the same weights (tools/bench_storage.py --nodes N).

Each node is a slow mount of the same folder, with a cache of its own, and has `--node-ranks` ranks of a data-parallel
job that load all weights (`auto_trans_save: False`), each for itself and sharing what they read. Printed are the bytes
that all mounts together gave, as a multiple of the bytes of the weights; the seconds of the slowest rank from a common
start, and how they compare with those of the quickest; and seconds of the processor of all ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import checkout  # noqa: F401 - finds the package of this checkout
import click
from quickstart import free_port
from slow_mount import mounted

_SECONDS = 600.0
HEADER = "way                    seconds  slowest / fastest  storage / unique  from peers GB  CPU s"


class Told(NamedTuple):
    """What a rank tells: seconds, seconds of the processor, bytes of its weights, and those that came from others."""

    seconds: float
    cpu: float
    weights: int
    from_peers: int


def report_sharing(
    folder: Path, nodes: int, node_ranks: int, latency_ms: float, bytes_per_s: float, repeats: int
) -> None:
    """Measure and print a row for each way; the checkpoint is under data/source, its strategy under data/strategy."""
    limit = f", {bytes_per_s / 1e6:g} MB/s a node" if bytes_per_s else ""
    click.echo(f"{nodes} nodes with {node_ranks} ranks each, {latency_ms:g} ms a request{limit}")
    click.echo(f"{HEADER}\n{'-' * len(HEADER)}")
    for _ in range(repeats):
        for way in ("off", "auto"):
            told, read = _run(folder, nodes, node_ranks, latency_ms, bytes_per_s, way)
            seconds = [one.seconds for one in told]
            name = "each for itself" if way == "off" else "sharing"
            click.echo(
                f"{name:<20} {max(seconds):9.2f} {max(seconds) / min(seconds):18.2f} {read / told[0].weights:17.2f} "
                f"{sum(one.from_peers for one in told) / 1e9:14.2f} {sum(one.cpu for one in told):6.1f}"
            )


def _run(
    folder: Path, nodes: int, node_ranks: int, latency_ms: float, bytes_per_s: float, way: str
) -> tuple[list[Told], int]:
    """What the ranks tell, and the bytes that all mounts gave of contents."""
    port = free_port()
    with ExitStack() as stack:
        mounts = [
            stack.enter_context(
                mounted(
                    folder / "data",
                    folder / f"node{node}",
                    scratch=folder / f"scratch{node}",
                    latency_ms=latency_ms,
                    bytes_per_s=bytes_per_s,
                )
            )
            for node in range(nodes)
        ]
        ranks = [node for node in range(nodes) for _ in range(node_ranks)]
        processes = []
        for rank, node in enumerate(ranks):
            words = [rank, len(ranks), node, port, mounts[node].mountpoint, way]
            command = [sys.executable, __file__, *map(str, words)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        told = [Told(*json.loads(process.communicate(timeout=_SECONDS)[0])) for process in processes]
        return told, sum(mount.counters()["read_bytes"] for mount in mounts)


def be_rank(rank: int, size: int, node: int, port: int, root: Path, way: str) -> Told:
    """Load all weights as a rank of the job."""
    from mindformers_ckpt.job.cluster.cluster import Cluster
    from mindformers_ckpt.job.cluster.messages import Address
    from mindformers_ckpt.job.cluster.secret import Trust
    from mindformers_ckpt.job.config import Config
    from mindformers_ckpt.job.direct import read_direct
    from mindformers_ckpt.job.reslice import Reslicing
    from mindformers_ckpt.job.sharing import reads
    from mindformers_ckpt.job.sharing.board import Board
    from mindformers_ckpt.job.sharing.exchange import Exchange
    from mindformers_ckpt.strategy.model import Strategy

    keys = {
        "load_checkpoint": str(root / "source"),
        "src_strategy_path_or_dir": os.path.realpath(root.parent / "data" / "strategy" / "mp4"),
        "auto_trans_ckpt": True,
        "auto_trans_save": False,
    }
    from_peers: list[int] = []
    report = reads._report

    def count(rank: int, board: Board, exchange: Exchange) -> None:
        from_peers.append(sum(board.bytes_from.values()) - board.bytes_from[rank])
        report(rank, board, exchange)

    reads._report = count
    secret = Trust("the secret of a benchmark")
    address = Address("127.0.0.1", port)
    with Cluster.connect(rank, size, address, _SECONDS, node=f"node {node}", trust=secret) as cluster:
        own = Reslicing(Config.from_mapping(keys), cluster, cast(Any, None), Strategy.complete()).own_plan()
        assert own is not None
        fill = reads.filling(cluster, root / "source", is_on=way != "off")
        is_shared = len(cluster.node_ranks) > 1
        cluster.barrier("start")
        started, used = time.perf_counter(), time.process_time()
        tensors = read_direct(own.plan, cluster.check, own.headers, is_shared=is_shared, fill=fill)
        weights = sum(content.nbytes for _, content in tensors)
        told = Told(time.perf_counter() - started, time.process_time() - used, weights, sum(from_peers))
        cluster.barrier("measured")
    return told


def main(words: Sequence[str]) -> None:
    """Be a rank of `report_sharing`, which starts it."""
    parser = argparse.ArgumentParser(description="A rank of bench_storage.py --nodes, which starts it.")
    for name in ("rank", "size", "node", "port"):
        parser.add_argument(name, type=int)
    parser.add_argument("root", type=Path)
    parser.add_argument("way")
    options = parser.parse_args(words)
    print(json.dumps(be_rank(**vars(options))))


if __name__ == "__main__":
    main(sys.argv[1:])
