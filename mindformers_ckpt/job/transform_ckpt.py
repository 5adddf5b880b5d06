"""What `TransformCkpt` of MindFormers does, done with our engine: for a job's ranks, or one process alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mindformers_ckpt.errors import ConfigError, PlanError
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.execution.run import Run
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.settings import differences, raise_different
from mindformers_ckpt.job.shared_disk import wait_for_files
from mindformers_ckpt.job.work import Work, log_progress
from mindformers_ckpt.log import log
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.missing import missing_names
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_mindspore
from mindformers_ckpt.sources.source import Source
from mindformers_ckpt.strategy.files import read_strategy, strategy_of_job
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform
from mindformers_ckpt.words import shortened

_FOLDER_MODE = 0o750  # MindFormers' mode of the folders that it makes for results
_WHOLE_MODES = ("data_parallel", "stand_alone")
_STEP = "transform checkpoint"


@dataclass(frozen=True)
class Request:
    """What to make of what.

    Attributes:
        source: a file, a folder of files, or a folder of rank folders.
        source_strategy: file or folder; None for complete weights.
        target_strategy: file or folder; None for complete weights, or where there are live strategies.
        live_strategies: the folder that the job's ranks save their strategies in.
        parallel_mode: MindSpore's, "semi_auto_parallel" or another.
        destination: folder of the results, one folder a checkpoint.
        prefix: of the target files' names.
        rank, world_size: of this process.
        first_ranks: the first target rank of every process's share (`transform_process_num`).
        by_rank: one target rank is the unit of work (`transform_by_rank`).
    """

    source: Path
    source_strategy: Path | None
    target_strategy: Path | None
    live_strategies: Path | None
    parallel_mode: str
    destination: Path
    prefix: str
    rank: int
    world_size: int
    first_ranks: tuple[int, ...]
    by_rank: bool

    def settings(self) -> dict[str, object]:
        """What has to be the same on all ranks of a job, by MindFormers' names."""
        return {
            "src_checkpoint": self.source,
            "src_strategy": self.source_strategy,
            "dst_strategy": self.target_strategy,
            "dst_checkpoint_dir": self.destination,
            "prefix": self.prefix,
            "world_size": self.world_size,
            "transform_process_num": len(self.first_ranks),
            "transform_by_rank": self.by_rank,
        }

    def plans(self, target: Strategy, ranks: Sequence[int] | None = None) -> dict[str, Plan]:
        """A plan for every checkpoint of the source, by the name of its folder. Raises the errors of planning."""
        files = find_mindspore(self.source)
        strategy = Strategy.complete()
        if self.source_strategy is not None and files.sharded:
            strategy = read_strategy(self.source_strategy)
        strategy = files.strategy(strategy)
        plans, held = {}, {}
        for name, part in _parts(files).items():
            checkpoint = Checkpoint(part, strategy)
            plans[name] = build_plan(checkpoint, target, ranks=ranks, prefix=self.prefix, allow_missing=True)
            held.update(checkpoint.tensors())
        if not strategy.is_complete and strategy.names().isdisjoint(held):
            raise PlanError(
                f"{files.root} and {self.source_strategy} have no parameter in common ({min(held, default='-')}, … and "
                f"{min(strategy.names())}, …); it is the strategy of another model"
            )
        self._warn(plans, missing_names(target.names(), held).required, unused=strategy.is_complete)
        return plans

    def _warn(self, plans: Mapping[str, Plan], lacking: Sequence[str], unused: bool) -> None:
        if self.rank != MAIN_RANK:
            return
        if unused and self.source_strategy is not None:
            log.warning("%s holds complete weights; its strategy %s is not used", self.source, self.source_strategy)
        for warning in dict.fromkeys(warning for plan in plans.values() for warning in plan.warnings):
            log.warning("%s", warning)
        if lacking:
            log.warning(
                "%s lacks %s: they keep the values that the network starts with", self.source, shortened(lacking, 8)
            )

    def about(self, target: Strategy) -> dict[str, Any]:
        """What the manifest says of the run."""
        return {"source_path": str(self.source), "target": target.describe()}

    def mark(self, folder: Path, ranks: Sequence[int]) -> None:
        """Make the marks of success that MindFormers leaves, and give the folder its mode."""
        folder.chmod(_FOLDER_MODE)
        for rank in ranks:
            (folder / f"transform_succeed_rank_{rank}.txt").touch()


def transform_checkpoint(
    request: Request, rank: int, size: int, timeout: float, joined: Cluster | None = None
) -> list[str]:
    """Do what is asked for. In a job of `size` ranks by MindSpore's count all of them call this.

    `joined`: the ranks, where they have met before; whoever joined them leaves them. Returns the names of the results
    when these are in their places. Raises the errors of reading, planning and writing, on all ranks alike; then the
    results that were there before are intact.
    """
    if size not in (1, request.world_size):
        raise ConfigError(f"world_size is {request.world_size}, but this job has {size} ranks; leave world_size out")
    folder = request.destination if request.live_strategies is None else request.live_strategies.parent
    meeting = join(rank, size, timeout, folder) if joined is None else nullcontext(joined)
    with meeting as cluster, cluster.step(_STEP):
        return _Job(request, cluster).run() if size > 1 else _run_alone(request, cluster)


def join(rank: int, size: int, timeout: float, folder: Path) -> Cluster:
    """Join the ranks of this job by MindSpore's count, however it was started; their secret is in `folder`."""
    if size == 1:
        return Cluster.from_environment(timeout, {})
    ours = {"MS_ROLE": "", "MS_WORKER_NUM": str(size), "RANK_ID": str(rank)}
    return Cluster.from_environment(timeout, {**os.environ, **ours}, folder)


def _parts(files: Source) -> dict[str, Source]:
    """The checkpoints of a source by the name of their result, as MindFormers names it.

    That is the name of the folder with rank folders, or of a file up to its first dot; every file of a
    folder of complete weights has a result of its own. Only the .ckpt files count where there are any.
    """
    if files.sharded:
        strays = [paths[-1] for paths in files.by_rank.values() if paths[-1].suffix != ".ckpt"]
        strays = [path for path in strays if any(path.parent.glob("*.ckpt"))]
        if strays:
            raise PlanError(f"{strays[0].parent} holds .ckpt and other checkpoint files; keep those of one format")
        return {files.root.name: files}
    paths = [path for path in files.by_rank[0] if path.suffix == ".ckpt"]
    if not paths:
        return {files.root.name.split(".")[0]: files}
    parts: dict[str, Source] = {}
    for path in paths:
        name = path.name.split(".")[0]
        if name in parts:
            raise PlanError(f"the results of {parts[name].root} and {path} would both be named {name}; rename one")
        parts[name] = Source(path, {0: (path,)})
    return parts


def _run_alone(request: Request, cluster: Cluster) -> list[str]:
    """All target ranks, or the share of one of several processes that were started by hand; the names of results."""
    target = _target(request, cluster)
    ranks = _share(request, target)
    # A part replaces ranks of its own source only; the whole replaces whatever is there.
    options = Options(
        by_rank=request.by_rank, overwrite=True, overwrite_anything=ranks is None, partial=ranks is not None, keep=False
    )
    done = request.first_ranks if ranks is None else (request.rank,)
    plans = request.plans(target, ranks)
    for name, plan in plans.items():
        transform(
            plan,
            request.destination / name,
            options,
            about=request.about(target),
            progress=log_progress(),
            companions=lambda folder: request.mark(folder, done),
        )
        log.info("the transformed checkpoint is in %s", request.destination / name)
    return list(plans)


def _share(request: Request, target: Strategy) -> Sequence[int] | None:
    """The target ranks of this process, None for all."""
    if request.world_size > 1 and request.world_size != target.rank_count:
        raise ConfigError(
            f"world_size is {request.world_size}, but the target strategy is for {target.describe()}; give the "
            "strategy of the job with that many ranks"
        )
    firsts = request.first_ranks
    if len(firsts) == 1:
        return None
    if request.rank not in firsts:
        listed = ", ".join(map(str, firsts))
        raise ConfigError(f"rank_id {request.rank} begins no share: {len(firsts)} processes begin at {listed}")
    position = firsts.index(request.rank)
    return range(request.rank, (*firsts, request.world_size)[position + 1])


def _target(request: Request, cluster: Cluster) -> Strategy:
    """The strategy to re-slice for. The main rank writes the merged file of a pipeline, as MindFormers does."""
    folder = request.live_strategies
    if folder is None:
        if request.target_strategy is None:
            return Strategy.complete()
        return read_strategy(request.target_strategy)
    if not any(folder.glob("*_rank_*")):
        if request.parallel_mode not in _WHOLE_MODES:
            raise PlanError(
                f"no rank has saved its strategy in {folder}; the network must be compiled before, in an output dir "
                "where strategy_ckpt_save_file points to"
            )
        return Strategy(({},), request.world_size, f"{request.parallel_mode}: whole weights on every rank")
    return strategy_of_job(folder, request.world_size, merges=cluster.rank == MAIN_RANK)


@dataclass
class _Job:
    """The transformation by all ranks of a job: the main rank plans and publishes, every node copies its share."""

    request: Request
    cluster: Cluster

    def run(self) -> list[str]:
        """Returns the names of results on all ranks when these are in their places, or raises on all of them."""
        self.cluster.check_members()
        raise_different(differences(self.cluster, self.request.settings()))
        self._check_strategies()
        names = self._lead() if self.cluster.rank == MAIN_RANK else self._follow()
        if self.request.live_strategies is not None and len(set(self.cluster.nodes)) > 1:
            rank, prefix = self.cluster.rank, self.request.prefix
            files = [self.request.destination / name / f"rank_{rank}/{prefix}{rank}.ckpt" for name in names]
            wait_for_files(files, check=self.cluster.check)
            self.cluster.barrier("seen")
        return list(names)

    def _check_strategies(self) -> None:
        """Wait until every rank has saved its strategy. Raises PlanError naming the ranks that have not."""
        folder = self.request.live_strategies
        if folder is None:
            return
        there = self.cluster.gather("strategy", any(folder.glob(f"*_rank_{self.cluster.rank}.*")))
        lacking = [rank for rank, has in enumerate(there) if not has]
        if any(there) and lacking:
            raise PlanError(f"ranks {lacking[:16]} have saved no strategy in {folder}, the others have")

    @cached_property
    def target(self) -> Strategy:
        return _target(self.request, self.cluster)

    @cached_property
    def plans(self) -> dict[str, Plan]:
        return self.request.plans(self.target)

    @cached_property
    def _work(self) -> Work:
        return Work(self.cluster, len(self.request.first_ranks), self.request.by_rank)

    def _lead(self) -> list[str]:
        request = self.request
        for name, plan in self.plans.items():
            run = Run(plan, request.destination / name, self._work.options(), about=request.about(self.target))
            # The others learn of a failure before the folder is removed that they write to.
            with run, self.cluster.step(_STEP):
                self._work.lead(run, name)
                run.publish(lambda folder: request.mark(folder, request.first_ranks))
            log.info("the transformed checkpoint is in %s", request.destination / name)
        self._work.end()
        return list(self.plans)

    def _follow(self) -> list[str]:
        names = []
        while (made := self._work.follow(lambda name: self.plans.get(name))) is not None:
            names.append(made[1])
        return names
