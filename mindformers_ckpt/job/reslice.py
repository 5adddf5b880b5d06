"""Re-slicing inside a job: the main rank plans and publishes, the first rank of every node copies its share."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mindformers_ckpt.engine.copier import Task, cut_into_tasks
from mindformers_ckpt.engine.machine import MEMORY_PER_PROCESS, free_memory, usable_cores
from mindformers_ckpt.engine.pool import copy_tasks
from mindformers_ckpt.engine.shard_io import FileSink
from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.job.find import find_checkpoint
from mindformers_ckpt.job.output_dir import OutputDir
from mindformers_ckpt.log import log
from mindformers_ckpt.planning.build import build_plan, holds_same_slices
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.publish import Staging, check_free_space
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.source import Kind, Source
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import Options, check_apart, describe_result, fingerprint_of

MAIN_RANK = 0
_SECONDS_BETWEEN_LINES = 5.0


@dataclass
class Reslicing:
    """One re-slicing of a job. All ranks enter `resliced`; it succeeds on all of them or raises on all.

    `names`: the tensors that the job wants, alike on all ranks; None for all. `found`: the source, where it has been
    looked at before.
    """

    config: Config
    cluster: Cluster
    output: OutputDir
    target: Strategy
    names: Container[str] | None = None
    found: Checkpoint | None = None

    @contextmanager
    def resliced(self) -> Iterator[Path | None]:
        """Re-slice the source for the job's strategy; the folder to load from, None when none is needed.

        The result is published when all ranks leave: until all have loaded it, the old one stays in place.
        """
        if self.cluster.rank != MAIN_RANK:
            yield self._follow()
            self.cluster.barrier("loaded")
            return
        plan = self.plan()
        if plan is None:
            log.info("the checkpoint has the strategy of this job: it is loaded as it is")
            self.cluster.gather("plan", {"folder": None})
            yield None
            self.cluster.barrier("loaded")
            return
        # The others learn of a failure before the folder is removed that they are reading.
        with self._staging(plan) as staging, self.cluster.step("load"):
            self._lead(plan, staging)
            yield staging.folder / _name(plan)
            self.cluster.barrier("loaded")
            about = {"source_checkpoint": self.config.load_checkpoint, "target": self.target.describe()}
            staging.publish(describe_result(plan, staging.folder, staging.fingerprint, (), about))
            log.info("the re-sliced checkpoint is in %s", self.output.transformed / _name(plan))

    def _staging(self, plan: Plan) -> Staging:
        check_apart(plan, self.output.transformed)
        options = Options(by_rank=self.config.transform_by_rank)
        return Staging(self.output.transformed, fingerprint_of(plan, options), overwrite=True)

    def _lead(self, plan: Plan, staging: Staging) -> None:
        for warning in plan.warnings:
            log.warning("%s", warning)
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
        self.cluster.gather("plan", {"folder": str(staging.folder), "name": _name(plan), "digest": digest_of(plan)})
        self._copy_share(plan, staging.folder)
        self.cluster.barrier("transformed")

    def _follow(self) -> Path | None:
        told = self.cluster.gather("plan")[MAIN_RANK]
        if told["folder"] is None:
            return None
        folder = Path(told["folder"])
        if self._processes_here():
            plan = self.plan()
            if plan is None or digest_of(plan) != told["digest"]:
                raise PlanError(
                    f"node {self.cluster.node} sees other source files or strategies than rank {MAIN_RANK}; "
                    "load_checkpoint and src_strategy_path_or_dir must be the same on all nodes"
                )
            self._copy_share(plan, folder)
        self.cluster.barrier("transformed")
        return folder / str(told["name"])

    @cached_property
    def found_files(self) -> Source:
        """What `load_checkpoint` leads to. Raises PlanError."""
        if self.found is not None:
            return self.found.files
        return find_checkpoint(self.config)

    def source(self) -> Checkpoint:
        """The source and its strategy. Raises PlanError or StrategyError when they do not fit together."""
        if self.found is not None:
            return self.found.only(self.names)
        config = self.config
        files = self.found_files
        strategy = Strategy.complete()
        if config.src_strategy_path_or_dir:
            if files.sharded:
                strategy = read_strategy(config.src_strategy_path_or_dir)
            elif self.cluster.rank == MAIN_RANK:
                log.warning(
                    "%s is read as complete weights, src_strategy_path_or_dir is not used; for a sharded checkpoint "
                    "load_checkpoint is the folder that holds the rank_<n> folders",
                    files.root,
                )
        return Checkpoint(files, strategy, self.names)

    def plan(self) -> Plan | None:
        """The plan of the whole job, None when every rank's slices are those of the source already."""
        plan = self._plan_for(None)
        if plan is None:
            return None
        name = self.found_files.name
        targets = tuple(target._replace(path=f"{name}/{target.path}") for target in plan.targets)
        return replace(plan, targets=targets)

    def own_plan(self) -> Plan | None:
        """What this rank alone takes from the source, None when its slices are those of the source already."""
        rank = min(self.cluster.rank, self.target.rank_count - 1)  # whole weights are alike on all ranks
        return self._plan_for([rank])

    def _plan_for(self, ranks: Sequence[int] | None) -> Plan | None:
        format = self.config.load_ckpt_format
        if self.found_files.kind is Kind.HUGGING_FACE:
            return self._plan_conversion(ranks, format)
        source = self.source()
        if holds_same_slices(source, self.target):
            return None
        looks = ranks is None or self.cluster.is_first_on_node
        contents = self.config.check_contents if looks else "off"
        return build_plan(source, self.target, ranks=ranks, format=format, contents=contents)

    def _plan_conversion(self, ranks: Sequence[int] | None, format: str) -> Plan:
        """Convert and re-slice Hugging Face weights in one pass, to the names that the job's strategy has."""
        from mindformers_ckpt.convert.run import Request, plan_ranks, with_settings

        is_mcore = any(name.startswith(("decoder.", "embedding.")) for name in self.target.names())
        request = Request(None, Path(self.config.load_checkpoint), naming="mcore" if is_mcore else None)
        request = with_settings(request, dict(self.config.layout_settings))
        return plan_ranks(request, self.target, ranks=ranks, format=format)

    def _leaders(self) -> list[int]:
        """The first rank of every node, in the order of the nodes' ranks."""
        nodes = self.cluster.nodes
        return [nodes.index(node) for node in dict.fromkeys(nodes)]

    def _processes_here(self) -> int:
        """How many of the job's processes are this rank's."""
        leaders = self._leaders()
        if self.cluster.rank not in leaders:
            return 0
        return spread(self.config.transform_process_num, len(leaders))[leaders.index(self.cluster.rank)]

    def _copy_share(self, plan: Plan, folder: Path) -> None:
        """Copy this node's tasks, in this node's processes."""
        leaders = self._leaders()
        shares = spread(self.config.transform_process_num, len(leaders))
        tasks = cut_into_tasks(plan, by_rank=self.config.transform_by_rank)
        tasks = share_of(tasks, shares, leaders.index(self.cluster.rank))
        report = _progress(sum(task.bytes_written for task in tasks))
        done = 0
        processes = affordable(self._processes_here())
        copied = copy_tasks(plan, folder, tasks, processes=processes, check=self.cluster.check)
        with closing(copied):  # whatever goes wrong here, the workers end before the folder is removed
            for finished in copied:
                done += finished.bytes_written
                report(done)


def digest_of(plan: Plan) -> str:
    """A digest of what is read and written where, whatever the times of the files."""
    content = [(str(file.path), file.size) for file in plan.sources], plan.targets, plan.transfers
    return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()


def _name(plan: Plan) -> str:
    """The folder of the result's rank folders: the checkpoint's name."""
    return Path(plan.targets[0].path).parts[0]


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
    free, cores = free_memory(), usable_cores()
    most = max(1, min(cores, free // MEMORY_PER_PROCESS))
    if processes <= most:
        return processes
    log.warning(
        "transform_process_num: %d processes are used on this node instead of %d (%d cores, %.1f GB of memory free)",
        most,
        processes,
        cores,
        free / 1e9,
    )
    return most


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
