"""Re-slicing inside a job: the main rank plans and publishes, the first rank of every node copies its share."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path

from mindformers_ckpt.execution.run import Run
from mindformers_ckpt.formats import Header, read_header
from mindformers_ckpt.formats.headers import are_sampled
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.job.direct import hand_out_plans
from mindformers_ckpt.job.find import find_checkpoint
from mindformers_ckpt.job.looking import look_together
from mindformers_ckpt.job.output_dir import OutputDir
from mindformers_ckpt.job.work import Work
from mindformers_ckpt.log import log
from mindformers_ckpt.planning.build import Slices, build_plan, compare_slices
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.planning.rank_plan import RankPlan, decode_rank, encode_ranks
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.source import Kind, Source
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.strategy.model import Strategy


@dataclass
class Reslicing:
    """One re-slicing of a job. All ranks enter `resliced`; it succeeds on all of them or raises on all.

    `names`: the tensors that the job wants, alike on all ranks; None for all. `found`: the source, where it has been
    looked at before. `check` looks at a plan before anything is written, and raises where it cannot be right.
    """

    config: Config
    cluster: Cluster
    output: OutputDir
    target: Strategy
    names: Container[str] | None = None
    found: Checkpoint | None = None
    check: Callable[[Plan], None] = lambda plan: None
    _headers: Mapping[Path, Header] = field(default_factory=dict)

    def look(self) -> None:
        """Look at the source together, where it has many files; all ranks call it. Raises PlanError on the main rank.

        Otherwise the main rank looks when it needs to.
        """
        config = self.config
        resume = config.resume_training is True
        looked = look_together(self.cluster, self._root, config.step_file, resume=resume)
        if looked is not None:
            self.found_files, self._headers = looked

    @contextmanager
    def resliced(self) -> Iterator[Path | None]:
        """Re-slice the source for the job's strategy; the folder to load from, None when none is needed.

        The result is published when all ranks leave: until all have loaded it, the old one stays in place.
        """
        work = Work(self.cluster, self.config.transform_process_num, self.config.transform_by_rank)
        if self.cluster.rank != MAIN_RANK:
            made = work.follow(lambda name: self.plan())
            yield None if made is None else Path(*made)
            self.cluster.barrier("loaded")
            return
        plan = self.plan()
        if plan is None:
            log.info("the checkpoint has the strategy of this job: it is loaded as it is")
            work.end()
            yield None
            self.cluster.barrier("loaded")
            return
        # The others learn of a failure before the folder is removed that they are reading.
        with Run(plan, self.output.transformed, work.options(), about=self.about) as run, self.cluster.step("load"):
            self.announce(plan)
            work.lead(run, name_of(plan))
            yield run.folder / name_of(plan)
            self.cluster.barrier("loaded")
            run.publish()
            log.info("the re-sliced checkpoint is in %s", self.output.transformed / name_of(plan))

    @property
    def about(self) -> dict[str, str]:
        """What the manifest of the result says of the job."""
        return {"source_checkpoint": self.config.load_checkpoint, "target": self.target.describe()}

    def announce(self, plan: Plan) -> None:
        """Log the warnings of the plan, and what it will do."""
        for warning in plan.warnings:
            log.warning("%s", warning)
        log.info(
            "re-slicing %s to %s: %d files, %.2f GB",
            self.config.load_checkpoint,
            self.target.describe(),
            len(plan.targets),
            plan.bytes_written / 1e9,
        )

    @cached_property
    def found_files(self) -> Source:
        """What `load_checkpoint` leads to. Raises PlanError."""
        if self.found is not None:
            return self.found.files
        return find_checkpoint(self.config)

    @cached_property
    def source(self) -> Checkpoint:
        """The source and its strategy. Raises PlanError or StrategyError when they do not fit together.

        Most of many files, or of those on a slow disk, are looked at quickly: whoever copies or reads one of them looks
        at all heads.
        """
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
        source = Checkpoint(files, files.strategy(strategy), self.names)
        source.take_headers(self._headers)
        if are_sampled(files.files):
            source.look_quickly()
        return source

    def plan(self) -> Plan | None:
        """The plan of the whole job, None when every rank's slices are those of the source already."""
        plan = self._plan()
        if plan is None:
            return None
        self.check(plan)
        name = self.found_files.name
        targets = tuple(target._replace(path=f"{name}/{target.path}") for target in plan.targets)
        return replace(plan, targets=targets)

    def own_plan(self) -> RankPlan | None:
        """What this rank takes from the source, None when its slices are those of the source already.

        All ranks call it: the main rank looks and plans for all, and tells each what is its own.
        """
        plan = self._plan() if self.cluster.rank == MAIN_RANK else None
        text = hand_out_plans(self.cluster, None if plan is None else self._texts(plan))
        if text is None:
            return None
        own = decode_rank(text, self._root)
        if plan is not None:
            own = own._replace(plan=replace(own.plan, warnings=plan.warnings))
        self.check(own.plan)
        return own

    def _texts(self, plan: Plan) -> Iterator[str]:
        """What every rank is told of a plan; whole weights are alike on all ranks."""
        is_model = self.found_files.kind is Kind.HUGGING_FACE
        texts = encode_ranks(plan, self._root, read_header if is_model else self.source.header)
        return repeat(next(texts), self.cluster.size) if len(plan.targets) == 1 else texts

    @property
    def _root(self) -> Path:
        """Where this rank finds the source; nodes may have it in different places."""
        return Path(os.path.abspath(self.config.load_checkpoint))

    def _plan(self) -> Plan | None:
        format = self.config.load_ckpt_format
        if self.found_files.kind is Kind.HUGGING_FACE:
            return self._plan_conversion(format)
        if compare_slices(self.source, self.target) is Slices.SAME:
            return None
        return build_plan(
            self.source,
            self.target,
            format=format,
            contents=self.config.check_contents,
            allow_missing=self.config.allow_missing,
        )

    def _plan_conversion(self, format: str) -> Plan:
        """Convert and re-slice Hugging Face weights in one pass, to the names that the job's strategy has."""
        from mindformers_ckpt.convert.request import Request, with_settings
        from mindformers_ckpt.convert.run import plan_ranks

        is_mcore = any(name.startswith(("decoder.", "embedding.")) for name in self.target.names())
        request = Request(None, Path(self.config.load_checkpoint), naming="mcore" if is_mcore else None)
        request = with_settings(request, dict(self.config.layout_settings))
        allowed = self.config.allow_missing
        return plan_ranks(request, self.target, format=format, allow_missing=allowed)


def name_of(plan: Plan) -> str:
    """The folder of the result's rank folders: the checkpoint's name."""
    return Path(plan.targets[0].path).parts[0]
