"""Re-slicing inside a job: the main rank plans and publishes, the first rank of every node copies its share."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from mindformers_ckpt.auto.cluster import Cluster
from mindformers_ckpt.auto.config import Config
from mindformers_ckpt.auto.output_dir import OutputDir
from mindformers_ckpt.checkpoint import Checkpoint
from mindformers_ckpt.execute import Task, copy_tasks, cut_into_tasks
from mindformers_ckpt.plan import Plan, build_plan, holds_same_slices
from mindformers_ckpt.publish import Staging, check_free_space
from mindformers_ckpt.shard_io import FileSink
from mindformers_ckpt.source_files import find_source
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import Options, check_apart, describe_result, fingerprint_of

log = logging.getLogger("mindformers_ckpt")

MAIN_RANK = 0
# A worker needs about 60 MB; the rest is the margin that a training process next to it should have.
_WORKER_MEMORY = 150 << 20
_SECONDS_BETWEEN_LINES = 5.0


@dataclass
class Reslicing:
    """One re-slicing of a job. All ranks call `run`; it returns on all of them or raises on all of them."""

    config: Config
    cluster: Cluster
    output: OutputDir
    target: Strategy

    def run(self) -> Path | None:
        """Re-slice the source for the job's strategy; the folder of the result, None when none is needed."""
        return self._lead() if self.cluster.rank == MAIN_RANK else self._follow()

    def _lead(self) -> Path | None:
        plan = self._plan()
        if plan is None:
            log.info("the checkpoint has the strategy of this job: it is loaded as it is")
            self.cluster.gather("plan", {"staging": None})
            return None
        for warning in plan.warnings:
            log.warning("%s", warning)
        options = Options(by_rank=self.config.transform_by_rank)
        fingerprint = fingerprint_of(plan, options)
        check_apart(plan, self.output.transformed)
        with Staging(self.output.transformed, fingerprint, overwrite=True) as staging:
            check_free_space(staging.folder, plan.bytes_written)
            sink = FileSink(staging.folder, plan.targets)
            for file in range(len(plan.targets)):
                sink.prepare(file)
            log.info(
                "re-slicing %s to %s: %d files, %.2f GB",
                self.config.load_checkpoint,
                self.target.describe(),
                len(plan.targets),
                plan.bytes_written / 1e9,
            )
            self.cluster.gather("plan", {"staging": str(staging.folder), "fingerprint": fingerprint})
            self._copy_share(plan, staging.folder)
            self.cluster.barrier("transformed")
            about = {"source_checkpoint": self.config.load_checkpoint, "target": self.target.describe()}
            staging.publish(describe_result(plan, staging.folder, fingerprint, (), about))
        self.cluster.barrier("published")
        return self._result()

    def _follow(self) -> Path | None:
        told = self.cluster.gather("plan")[MAIN_RANK]
        if told["staging"] is None:
            return None
        if self.cluster.is_first_on_node:
            plan = self._plan()
            assert plan is not None
            self._copy_share(plan, Path(told["staging"]))
        self.cluster.barrier("transformed")
        self.cluster.barrier("published")
        return self._result()

    def _result(self) -> Path:
        return self.output.transformed / self._source().files.name

    def _source(self) -> Checkpoint:
        config = self.config
        files = find_source(config.load_checkpoint, config.step_file)
        strategy = Strategy.complete()
        if config.src_strategy_path_or_dir and files.sharded:
            strategy = read_strategy(config.src_strategy_path_or_dir)
        return Checkpoint(files, strategy)

    def _plan(self) -> Plan | None:
        """The plan of the whole job, None when every rank's slices are those of the source already."""
        source = self._source()
        if holds_same_slices(source, self.target):
            return None
        plan = build_plan(source, self.target, format=self.config.load_ckpt_format)
        name = source.files.name
        targets = tuple(target._replace(path=f"{name}/{target.path}") for target in plan.targets)
        return replace(plan, targets=targets)

    def _copy_share(self, plan: Plan, folder: Path) -> None:
        """Copy this node's tasks, in this node's processes."""
        leaders = [ranks[0] for ranks in _ranks_by_node(self.cluster.nodes)]
        shares = spread(self.config.transform_process_num, len(leaders))
        position = leaders.index(self.cluster.rank)
        tasks = share_of(cut_into_tasks(plan, by_rank=self.config.transform_by_rank), shares, position)
        total = sum(task.bytes_written for task in tasks)
        report = _progress(total)
        done = 0
        processes = affordable(shares[position])
        for finished in copy_tasks(plan, folder, tasks, processes=processes, check=self.cluster.check):
            done += finished.bytes_written
            report(done)


def spread(processes: int, nodes: int) -> list[int]:
    """Spread `transform_process_num` evenly over the nodes; the first nodes take what is left over."""
    base, rest = divmod(processes, nodes)
    return [base + (1 if node < rest else 0) for node in range(nodes)]


def share_of(tasks: Sequence[Task], shares: Sequence[int], node: int) -> list[Task]:
    """The tasks of a node: in turn, as many as it has processes."""
    owners = [number for number, count in enumerate(shares) for _ in range(count)]
    return [task for position, task in enumerate(tasks) if owners[position % len(owners)] == node]


def affordable(processes: int) -> int:
    """So many of `processes` as this node has cores and memory for, with a warning when they are fewer."""
    free = psutil.virtual_memory().available
    most = max(1, min(len(os.sched_getaffinity(0)), free // _WORKER_MEMORY))
    if processes <= most:
        return processes
    log.warning(
        "transform_process_num: %d processes are used on this node instead of %d (%d cores, %.1f GB of memory free)",
        most,
        processes,
        len(os.sched_getaffinity(0)),
        free / 1e9,
    )
    return most


def _ranks_by_node(nodes: Sequence[str]) -> list[list[int]]:
    by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    return list(by_node.values())


def _progress(total: int) -> Callable[[int], None]:
    started = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES or done == total:
            last = now
            rate = done / max(now - started, 1e-9)
            log.info("re-slicing: %.2f of %.2f GB, %.2f GB/s", done / 1e9, total / 1e9, rate / 1e9)

    return report
