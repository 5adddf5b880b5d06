"""Do all nodes of a job work on one disk? Found out by a file that one makes and the others look for."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.messages import name_ranks
from mindformers_ckpt.job.config import Config

# Network file systems keep folders in a cache: what another node made may show some seconds later.
_PROBE_PATIENCE = 3.0
_FILE_PATIENCE = 60.0
_POLL = 0.1


def owners_of(folder: Path, cluster: Cluster) -> list[int]:
    """For every rank the lowest rank that works in the same folder; rank 0 for all on a shared disk.

    Makes the folder where it is missing. Leaves nothing else behind.
    """
    word = cluster.gather("probe", secrets.token_hex(8))[MAIN_RANK]
    token = hashlib.sha256(str(word).encode()).hexdigest()[:16]  # a rank without the secret might name another file
    probes = {leader: folder / f".shared-disk-{token}-{leader}" for leader in cluster.leaders}
    own = probes.get(cluster.rank)
    try:
        if own is not None:
            folder.mkdir(parents=True, exist_ok=True)
            own.touch()
        cluster.barrier("probe made")
        _appears(probes[MAIN_RANK], _PROBE_PATIENCE)
        seen = [leader for leader, probe in probes.items() if probe.exists()]
        owners: list[int] = cluster.gather("probe seen", min(seen, default=cluster.rank))
    finally:
        if own is not None:
            own.unlink(missing_ok=True)
    return owners


def wait_for_files(
    files: Iterable[Path], patience: float = _FILE_PATIENCE, check: Callable[[], None] = lambda: None
) -> None:
    """Wait until files that other nodes have written are seen here too. Raises PlanError if they are not.

    `check` is called meanwhile and may raise to stop: where the one who writes has failed they never come.
    """
    until = time.monotonic() + patience
    for file in files:
        if not _appears(file, until - time.monotonic(), check):
            raise PlanError(f"{file} was written by another node, but is not seen here after {patience:g} s")


def _appears(file: Path, patience: float, check: Callable[[], None] = lambda: None) -> bool:
    until = time.monotonic() + patience
    while not _is_there(file):
        check()
        if time.monotonic() >= until:
            return False
        _look_again(file.parent)
        time.sleep(_POLL)
    return True


def _is_there(file: Path) -> bool:
    try:
        return file.exists()
    except OSError as error:
        if error.errno == errno.ESTALE:  # a folder above it was replaced, which this node has yet to notice
            return False
        raise


def _look_again(folder: Path) -> None:
    """Have a network file system ask the server for what is new: it does when a folder is opened.

    Where the folder itself is not seen yet, it is the next one above that has to be opened.
    """
    for above in (folder, *folder.parents):
        try:
            os.scandir(above).close()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                raise
        else:
            return


def not_shared(config: Config, root: Path, nodes: Sequence[str], owners: Sequence[int]) -> str:
    """What to tell the user of a job that needs one shared output dir: the offline way (guide), command by command."""
    blind = [rank for rank, owner in enumerate(owners) if owner != MAIN_RANK]
    strategy, result = config.strategy_dir.absolute(), root / "offline_checkpoint"
    there, target = shlex.quote(str(strategy)), shlex.quote(str(result))
    command = ["mindformers-ckpt", "transform", "--src_checkpoint", config.load_checkpoint]
    if config.src_strategy_path_or_dir:
        command += ["--src_strategy", config.src_strategy_path_or_dir]
    command += ["--dst_checkpoint_dir", str(result), "--dst_strategy", str(strategy)]
    others: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        if node != nodes[MAIN_RANK]:
            others.setdefault(shlex.quote(node.rpartition(":")[0]), []).append(rank)
    collect = "".join(f"\n     scp {node}:{there}/ckpt_strategy_rank_* {there}/" for node in others)
    share = ""
    for node, ranks in others.items():
        folders = " ".join(f"{target}/rank_{rank}" for rank in ranks)
        share += f"\n     ssh {node} mkdir -p {target} && scp -r {folders} {node}:{target}/"
    return f"""the output dir {root} is not shared by all nodes:
  {name_ranks(blind)} do not see what rank {MAIN_RANK} writes.
  Nothing was cleared. Put output_dir on a disk that all nodes share, or set remote_save_url to a folder in an object
  storage (obs://bucket/folder or s3://bucket/folder), or convert offline:
  1. Run this job once with only_save_strategy: True. Every node then has its strategy files in {strategy}
  2. Collect them on the node of rank {MAIN_RANK}, there:{collect}
  3. Convert there:
     {shlex.join(command)}
  4. Give every node the files of its ranks:{share}
  5. Run the job with load_checkpoint: {result}, auto_trans_ckpt: False, only_save_strategy: False"""
