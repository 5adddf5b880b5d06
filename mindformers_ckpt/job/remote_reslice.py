"""Re-slicing inside a job whose nodes have no shared disk: each makes its share, the object storage has all.

Every node makes the files of its own ranks, from the source on its own disk. The ranks of nodes that do not
have the source are spread over the others, and fetched.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.engine.tasks import cut_into_tasks
from mindformers_ckpt.errors import PlanError, TransferError
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.execution.run import Run
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.modelarts import Exchange, entries_of
from mindformers_ckpt.job.reslice import Reslicing, name_of
from mindformers_ckpt.job.transfers import Entry
from mindformers_ckpt.job.work import affordable, log_progress, spread
from mindformers_ckpt.log import log
from mindformers_ckpt.planning.digest import digest_of
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.publish.manifest import MANIFEST_FILE
from mindformers_ckpt.publish.staging import check_free_space

KIND = "transformed_checkpoint"


class Node(NamedTuple):
    """What the first rank of a node tells the others of its disk.

    Attributes:
        has_source: whether the source is there.
        digest: that of its plan, None when nothing needs to be re-sliced or there is no source.
        name: the checkpoint's, "" when nothing needs to be re-sliced or there is no source.
        folder: where the weights of its ranks will be, below a folder of the checkpoint's name.
    """

    has_source: bool
    digest: str | None
    name: str
    folder: str


@dataclass
class RemoteReslicing:
    """One re-slicing of a job, used as `Reslicing` is: all ranks enter `resliced`."""

    reslicing: Reslicing
    exchange: Exchange

    def __post_init__(self) -> None:
        self.cluster = self.reslicing.cluster

    @contextmanager
    def resliced(self) -> Iterator[Path | None]:
        """The folder to load this rank's weights from, None when the source has the job's slices already."""
        cluster = self.cluster
        plan = self._plan_here() if cluster.is_first_on_node else None
        run = self._run_of(plan) if cluster.is_first_on_node else None
        nodes = self._tell(plan, run)
        name = nodes[cluster.nodes[MAIN_RANK]].name
        if not name:
            if cluster.rank == MAIN_RANK:
                log.info("the checkpoint has the strategy of this job: it is loaded as it is")
            yield None
            cluster.barrier("loaded")
            if cluster.rank == MAIN_RANK:
                self.exchange.drop()
        elif run is not None:
            with run, cluster.step("load"):
                manifest = self._make(run, nodes)
                yield run.folder / name
                cluster.barrier("loaded")
                run.publish(manifest=self._local_manifest(manifest))
        else:
            for step in ("weights sent", "weights complete", "weights fetched"):
                cluster.barrier(step)
            yield Path(nodes[cluster.node].folder, name)
            cluster.barrier("loaded")

    def _plan_here(self) -> Plan | None:
        """The plan of the whole job; None when nothing needs to be re-sliced, or this node has no source."""
        if self._has_source():
            return self.reslicing.plan()
        source = self.reslicing.config.load_checkpoint
        log.warning("%s has no %s: the weights of its ranks come from the other nodes", self.cluster.node, source)
        return None

    def _run_of(self, plan: Plan | None) -> Run:
        """This node's run, which makes nothing where there is no plan: its files are fetched then."""
        options = Options(by_rank=self.reslicing.config.transform_by_rank, overwrite_anything=True, keep=False)
        # A run's name is not that of an earlier one, so nothing is mistaken for a part of this result.
        name = self.exchange.run
        return Run(plan or Plan((), (), ()), self.reslicing.output.transformed, options, identity=name)

    def _has_source(self) -> bool:
        return self.cluster.rank == MAIN_RANK or Path(self.reslicing.config.load_checkpoint).exists()

    def _tell(self, plan: Plan | None, run: Run | None) -> dict[str, Node]:
        """Share what the nodes have. Raises PlanError where their sources differ."""
        cluster = self.cluster
        digest, name = None, ""
        if plan is not None:
            digest = digest_of(plan, Path(self.reslicing.config.load_checkpoint))
            name = name_of(plan)
        about = None if run is None else Node(self._has_source(), digest, name, str(run.folder))
        told = cluster.gather("plan", about)
        nodes = {node: Node(*told[cluster.nodes.index(node)]) for node in dict.fromkeys(cluster.nodes)}
        main = cluster.nodes[MAIN_RANK]
        others = [name for name, node in nodes.items() if node.has_source and node.digest != nodes[main].digest]
        if others:
            raise PlanError(
                f"{', '.join(others)}: other source files or strategies than on {main}; load_checkpoint and "
                "src_strategy_path_or_dir must be the same on all nodes, or missing where the weights shall be fetched"
            )
        return nodes

    def _make(self, run: Run, nodes: Mapping[str, Node]) -> Mapping[str, Any]:
        """Make, send and fetch; afterwards the staging folder holds the files of this node's ranks. The manifest."""
        cluster, exchange, folder = self.cluster, self.exchange, run.folder
        made = self._make_share(run, [name for name in nodes if nodes[name].has_source])
        exchange.send_share(KIND, {path: folder / path for path in made})
        cluster.barrier("weights sent")
        if cluster.rank == MAIN_RANK:
            exchange.transfers.send_manifest(exchange.key(MANIFEST_FILE), self._whole_manifest(run.plan))
        cluster.barrier("weights complete")
        manifest = exchange.transfers.fetch_manifest(exchange.key(MANIFEST_FILE))
        names = [file["path"] for file in manifest["files"]]
        own = {
            path: entry
            for path, entry, file in zip(names, entries_of(manifest), manifest["files"])
            if file["rank"] in cluster.node_ranks
        }
        self._fetch(folder, {path: entry for path, entry in own.items() if path not in made})
        for path in set(made) - set(own):
            shutil.rmtree((folder / path).parent)
        cluster.barrier("weights fetched")
        return manifest

    def _make_share(self, run: Run, makers: Sequence[str]) -> list[str]:
        """Make the files that are this node's to make; their paths in the staging folder."""
        cluster, config, plan = self.cluster, self.reslicing.config, run.plan
        if not plan.targets:
            return []
        owners = makers_of(cluster.nodes, makers)
        share = [number for number, file in enumerate(plan.targets) if owners[file.rank] == cluster.node]
        part = plan.for_targets(share)
        if cluster.rank == MAIN_RANK:
            self.reslicing.announce(plan)
        log.info("%s re-slices %d files, %.2f GB", cluster.node, len(share), part.bytes_written / 1e9)
        run.prepare(share)
        # At least one process where there is work, as MindFormers has it on ModelArts.
        processes = spread(max(config.transform_process_num, len(makers)), len(makers))[makers.index(cluster.node)]
        tasks = [task for task in cut_into_tasks(part, by_rank=config.transform_by_rank) if task.bytes_written]
        run.copy(tasks, processes=affordable(processes), progress=log_progress(), check=cluster.check)
        return [plan.targets[number].path for number in share]

    def _fetch(self, folder: Path, files: Mapping[str, Entry]) -> None:
        if files:
            size = sum(entry.bytes for entry in files.values())
            log.info("%s fetches %d files, %.2f GB", self.cluster.node, len(files), size / 1e9)
            check_free_space(folder, size)
            self.exchange.transfers.fetch((entry, folder / path) for path, entry in files.items())

    def _whole_manifest(self, plan: Plan) -> dict[str, Any]:
        """What the result consists of. Raises TransferError unless all files of the plan have been sent."""
        from mindformers_ckpt import __version__

        sent = {entry.key: entry for entries in self.exchange.shares(KIND).values() for entry in entries}
        keys = {target.path: self.exchange.key(KIND, target.path) for target in plan.targets}
        lacking = [path for path, key in keys.items() if key not in sent]
        if lacking:
            raise TransferError(f"{self.exchange.url}: no node has sent {', '.join(lacking[:8])}")
        return {
            "mindformers_ckpt": __version__,
            **self.reslicing.about,
            "files": [
                {"path": file.path, "rank": file.rank, "tensors": len(file.tensors), **sent[keys[file.path]]._asdict()}
                for file in plan.targets
            ],
        }

    def _local_manifest(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        files = [file for file in manifest["files"] if file["rank"] in self.cluster.node_ranks]
        return {**manifest, "remote": self.exchange.url, "files": files}


def makers_of(nodes: Sequence[str], makers: Sequence[str]) -> list[str]:
    """For every rank the node that makes its file: its own, or the `makers` in turn where that is none of them."""
    turns = itertools.cycle(makers)
    return [node if node in makers else next(turns) for node in nodes]
