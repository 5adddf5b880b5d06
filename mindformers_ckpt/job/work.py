"""The work of a re-slicing, shared out over a job: the main rank leads, the first rank of every node copies a share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ckpt.engine.machine import MEMORY_PER_PROCESS, free_memory, usable_cores
from mindformers_ckpt.engine.tasks import Task, cut_into_tasks
from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.execution.copying import copy_unchanged
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.execution.run import Run
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.shared_disk import wait_for_files
from mindformers_ckpt.log import log
from mindformers_ckpt.planning.digest import digest_of
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.progress import lines_of


@dataclass(frozen=True)
class Work:
    """The ranks that make a result together, on a disk that all of them see.

    Attributes:
        processes: those of the whole job (`transform_process_num`), spread over the nodes.
        by_rank: one target rank is the unit of work (`transform_by_rank`).
    """

    cluster: Cluster
    processes: int
    by_rank: bool

    def options(self) -> Options:
        """How the main rank runs a plan: a job replaces what is there, and starts anew when it fails."""
        return Options(by_rank=self.by_rank, overwrite_anything=True, keep=False)

    def lead(self, run: Run, name: str) -> None:
        """On the main rank: have all nodes make the files of a run that has been entered, by its checkpoint's name."""
        run.prepare()
        self.cluster.gather("plan", {"folder": str(run.folder), "name": name, "digest": run.digest})
        self._copy_share(run.plan, run.folder)
        self.cluster.barrier("transformed")

    def end(self) -> None:
        """On the main rank: nothing is to be made, or nothing more."""
        self.cluster.gather("plan", {"folder": None})

    def follow(self, plan_of: Callable[[str], Plan | None]) -> tuple[Path, str] | None:
        """On every other rank, as often as the main rank leads or ends: copy a share if this rank has one.

        `plan_of` gives this rank's plan for the checkpoint of a name. Returns the folder and that name, None at the
        end. Raises PlanError when this node sees other sources than the main rank.
        """
        told = self.cluster.gather("plan")[MAIN_RANK]
        if told["folder"] is None:
            return None
        folder, name = Path(told["folder"]), str(told["name"])
        if self._processes_here():
            plan = plan_of(name)
            _check_same(plan, told, self.cluster.node)
            assert plan is not None
            wait_for_files([folder], check=self.cluster.check)
            self._copy_share(plan, folder)
        self.cluster.barrier("transformed")
        return folder, name

    def _shares(self) -> dict[int, int]:
        """The first rank of every node, in the order of the nodes' ranks -> how many of the processes it has."""
        leaders = self.cluster.leaders
        return dict(zip(leaders, spread(self.processes, len(leaders))))

    def _processes_here(self) -> int:
        return self._shares().get(self.cluster.rank, 0)

    def _copy_share(self, plan: Plan, folder: Path) -> None:
        """Copy this node's tasks, in this node's processes."""
        shares = self._shares()
        tasks = cut_into_tasks(plan, by_rank=self.by_rank)
        tasks = share_of(tasks, list(shares.values()), list(shares).index(self.cluster.rank))
        options = Options(processes=affordable(self._processes_here()))
        copy_unchanged(plan, folder, tasks, options, progress=log_progress(), check=self.cluster.check)


def log_progress() -> Callable[[int, int], None]:
    """Progress as lines of a job's log."""
    return lines_of("re-slicing", log.info, last_too=True)


def _check_same(plan: Plan | None, told: Mapping[str, Any], node: str) -> None:
    if plan is None or digest_of(plan) != told["digest"]:
        raise PlanError(
            f"node {node} sees other source files or strategies than rank {MAIN_RANK}; load_checkpoint and "
            "src_strategy_path_or_dir must be the same on all nodes"
        )


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
