"""Jobs on nodes without a shared disk, whose strategies and weights go through an object storage (ModelArts).

`remote_save_url` names the place. A job keeps everything under a prefix of its own there:

    <remote_save_url>/auto_trans/<run>/
        strategy/                  strategy files of all ranks, node_<n>.json of every node, the merged file
        transformed_checkpoint/    <checkpoint>/rank_<r>/checkpoint_<r>.ckpt, node_<n>.json of every node
        manifest.json              last of all: every file of the result with size and xxh3-128

A manifest is sent after all that it names, and nothing is read that no manifest names. The nodes wait for
each other through the cluster, so a failure of one reaches all of them.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from mindformers_ckpt.disk.files import remove
from mindformers_ckpt.errors import ConfigError, PlanError, describe_problems
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.messages import name_ranks
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.job.object_store import StoreError, open_store
from mindformers_ckpt.job.transfers import Entry, Transfers
from mindformers_ckpt.log import log
from mindformers_ckpt.objects.path import is_url
from mindformers_ckpt.publish.staging import check_free_space
from mindformers_ckpt.strategy.files import MERGED_FILE, rank_file_name, read_strategy, strategy_of_job
from mindformers_ckpt.strategy.model import Strategy

_FOLDER = "auto_trans"
_FETCHED = "fetched"


def nodes_by_number(ranks: int, npu_num_per_node: int) -> tuple[str, ...]:
    """The node of every rank where each node has so many."""
    return tuple(f"node_{rank // npu_num_per_node}" for rank in range(ranks))


def check_nodes(npu_num_per_node: int, hosts: Sequence[str], owners: Sequence[int]) -> None:
    """See that `npu_num_per_node` cuts the ranks into those that share a disk.

    `owners` gives every rank the lowest rank that works in the same folder, `hosts` the names of the hosts.
    Raises ConfigError that tells the number to set.
    """
    if all(owner == rank - rank % npu_num_per_node for rank, owner in enumerate(owners)):
        return
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault(host, []).append(rank)
    listed = "; ".join(f"{host.rpartition(':')[0]} has {name_ranks(ranks)}" for host, ranks in found.items())
    raise ConfigError(
        f"npu_num_per_node: {npu_num_per_node} ranks a node do not agree with the disks that the ranks see ({listed}). "
        f"Nothing was cleared. Set npu_num_per_node={len(next(iter(found.values())))}, or output_dir to a folder "
        "that all ranks of a node share"
    )


@dataclass
class Exchange:
    """What the nodes of a job have in common: a prefix in an object storage. All ranks make the same calls.

    Only the first rank of a node talks to the storage.
    """

    cluster: Cluster
    store_url: str
    run: str

    @classmethod
    def open(cls, config: Config, cluster: Cluster) -> Exchange:
        """Agree on the run's prefix, and see that every node can write there. Raises StoreError, ConfigError."""
        run = cluster.gather("run", time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(4))[MAIN_RANK]
        exchange = cls(cluster, config.remote_save_url, run)
        if cluster.is_first_on_node:
            host = {"node": cluster.node, "ranks": list(cluster.node_ranks)}
            exchange.transfers.send_manifest(exchange.key("nodes", f"{cluster.node}.json"), host)
        cluster.barrier("storage reached")
        return exchange

    @cached_property
    def transfers(self) -> Transfers:
        """The connection to the storage. Raises ConfigError when there can be none."""
        return Transfers(open_store(self.store_url), self.cluster.timeout, self.cluster.check)

    @property
    def prefix(self) -> str:
        """What all keys of this run begin with."""
        return f"{_FOLDER}/{self.run}"

    @property
    def url(self) -> str:
        """Where the run's objects are."""
        return f"{self.store_url}/{self.prefix}"

    def key(self, *parts: str) -> str:
        return "/".join((self.prefix, *parts))

    def drop(self) -> None:
        """Delete all objects of the run; a failure is logged."""
        self.transfers.drop(self.prefix)

    def share_strategies(self, folder: Path) -> Strategy:
        """Bring the strategy files of all ranks together on the main rank's disk, the merged one on all disks."""
        cluster = self.cluster
        if cluster.is_first_on_node:
            names = [rank_file_name(rank) for rank in cluster.node_ranks]
            self.send_share("strategy", {name: folder / name for name in names})
        cluster.barrier("strategy files sent")
        if cluster.rank == MAIN_RANK:
            sent = [entry for entries in self.shares("strategy").values() for entry in entries]
            files = {folder / PurePosixPath(entry.key).name: entry for entry in sent}
            self.transfers.fetch((entry, file) for file, entry in files.items() if not file.exists())
            stages = len(strategy_of_job(folder, cluster.size).stages)
            whole = folder / (MERGED_FILE if stages > 1 else rank_file_name(MAIN_RANK))
            (entry,) = self.transfers.send({self.key("strategy", "whole", whole.name): whole})
            self.transfers.send_manifest(self.key("strategy", "manifest.json"), {"files": [entry._asdict()]})
        name = cluster.gather("strategy merged", whole.name if cluster.rank == MAIN_RANK else None)[MAIN_RANK]
        if cluster.is_first_on_node and cluster.rank != MAIN_RANK:
            self.transfers.fetch(
                (entry, folder / name) for entry in self._entries(self.key("strategy", "manifest.json"))
            )
        cluster.barrier("strategy fetched")
        return read_strategy(folder / name)

    def send_share(self, kind: str, files: Mapping[str, Path]) -> None:
        """Send this node's files of a kind (name -> file), and what they are."""
        entries = self.transfers.send({self.key(kind, name): file for name, file in files.items()})
        content = {"files": [entry._asdict() for entry in entries]}
        self.transfers.send_manifest(self.key(kind, f"{self.cluster.node}.json"), content)

    def shares(self, kind: str) -> dict[str, list[Entry]]:
        """What all nodes have sent of a kind, by node. Raises StoreError where the storage does not have it."""
        nodes = dict.fromkeys(self.cluster.nodes)
        shares = {node: self._entries(self.key(kind, f"{node}.json")) for node in nodes}
        there = self.transfers.sizes(self.key(kind))
        problems = [
            f"{entry.key} of {node}: {there.get(entry.key, 'no')} instead of {entry.bytes} bytes"
            for node, entries in shares.items()
            for entry in entries
            if there.get(entry.key) != entry.bytes
        ]
        if problems:
            raise StoreError(describe_problems(f"{self.url} lacks what was sent to it", problems), final=True)
        return shares

    def _entries(self, key: str) -> list[Entry]:
        return entries_of(self.transfers.fetch_manifest(key))


def entries_of(manifest: Mapping[str, Any]) -> list[Entry]:
    """The objects that a manifest names."""
    return [Entry(file["key"], file["bytes"], file["xxh3_128"]) for file in manifest["files"]]


def fetch_sources(config: Config, cluster: Cluster, root: Path, owner: int) -> Config:
    """Fetch a checkpoint and a strategy that are given by URL; the configuration with the local paths.

    They go to `<root>/fetched/`, whole, and take the place of what an earlier job fetched there under the
    same name. The rank `owner` of every disk fetches. Raises PlanError when there is nothing at a URL.
    """

    def fetched(key: str, path: str) -> str:
        if not is_url(path):
            return path
        target = root / _FETCHED / key / PurePosixPath(path).name
        if cluster.rank == owner:
            _fetch_tree(path, target, config, cluster)
        cluster.barrier(f"{key} fetched")
        return str(target)

    return replace(
        config,
        load_checkpoint=fetched("load_checkpoint", config.load_checkpoint),
        src_strategy_path_or_dir=fetched("src_strategy_path_or_dir", config.src_strategy_path_or_dir),
    )


def _fetch_tree(url: str, target: Path, config: Config, cluster: Cluster) -> None:
    """Fetch the object at a URL, or all objects below it."""
    parent, _, name = url.rstrip("/").rpartition("/")
    if parent in ("obs:/", "s3:/"):
        raise PlanError(f"{url} is a whole bucket; name a folder or a file in it")
    transfers = Transfers(open_store(parent), config.transform_timeout, cluster.check)
    objects = transfers.sizes(name)
    if not objects:
        raise PlanError(f"there is nothing at {url}")
    log.info("fetching %s to %s: %d files, %.2f GB", url, target, len(objects), sum(objects.values()) / 1e9)
    check_free_space(target, sum(objects.values()))
    fresh = target.with_name(f".{target.name}.fetching")
    remove(fresh)
    # The sender left no manifest, so the sizes alone are known.
    files = [(Entry(key, size, ""), fresh / PurePosixPath(key).relative_to(name)) for key, size in objects.items()]
    transfers.fetch(files)
    remove(target)
    os.rename(fresh, target)
